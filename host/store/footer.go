package store

import (
	"encoding/binary"
	"fmt"
)

const (
	segmentMagic   = "LEDGESG1"
	trailerOffset  = SegmentBytes - BlockBytes
	kindWide       = 1 // data, of version 1: its slots are wide
	kindCheckpoint = 2
	kindData       = 3
	kindAside      = 4 // beside the log: what the cleaner moved; since version 5 also what logPut names
	slotBytes      = 22
	wideBytes      = 40
)

// trailer is the last block of a segment. Its stripe is written after the others are durable, and
// it covers that stripe with a checksum: a trailer that decodes proves the whole segment.
type trailer struct {
	kind    uint8
	uuid    [16]byte
	epoch   uint64
	segment uint32
	prev    uint32   // data: the data segment before it in the log
	cover   position // data: everything in the journal before it is in this segment or an earlier one
	payload uint32   // bytes from the segment's start
	slots   uint32
	log     uint32 // bytes of the log of ops
	table   uint32 // crc32c of slots and log, which lie just before the trailer
	stripe  uint32 // crc32c of the last stripe up to the trailer
	ckptID  uint64 // checkpoint: which,
	index   uint32 // which segment of it, from 0
	items   uint32 // where in the payload its items begin, behind pages of maps,
	content uint32 // and the crc32c of them
}

func (t *trailer) isData() bool {
	return t.kind == kindData || t.kind == kindWide || t.kind == kindAside
}

// slotBytes is the size of each slot.
func (t *trailer) slotBytes() int {
	if t.kind == kindWide {
		return wideBytes
	}
	return slotBytes
}

func (t *trailer) tableOffset() int { return trailerOffset - int(t.slots)*t.slotBytes() - int(t.log) }

func (t *trailer) encode(p []byte) {
	clear(p[:BlockBytes])
	copy(p, segmentMagic)
	p[12] = t.kind
	copy(p[16:], t.uuid[:])
	le.PutUint64(p[32:], t.epoch)
	le.PutUint32(p[40:], t.segment)
	le.PutUint32(p[44:], t.prev)
	le.PutUint64(p[48:], t.cover.seq)
	le.PutUint64(p[56:], t.cover.unit)
	le.PutUint32(p[64:], t.payload)
	le.PutUint32(p[68:], t.slots)
	le.PutUint32(p[72:], t.log)
	le.PutUint32(p[76:], t.table)
	le.PutUint32(p[80:], t.stripe)
	le.PutUint64(p[88:], t.ckptID)
	le.PutUint32(p[96:], t.index)
	le.PutUint32(p[100:], t.content)
	le.PutUint32(p[104:], t.items)
	le.PutUint32(p[8:], crc(p[12:BlockBytes]))
}

func decodeTrailer(p []byte) (trailer, error) {
	var t trailer
	if len(p) != BlockBytes || string(p[:8]) != segmentMagic || le.Uint32(p[8:]) != crc(p[12:]) {
		return t, fmt.Errorf("segment trailer: %w", ErrCorrupt)
	}
	t.kind = p[12]
	copy(t.uuid[:], p[16:])
	t.epoch, t.segment, t.prev = le.Uint64(p[32:]), le.Uint32(p[40:]), le.Uint32(p[44:])
	t.cover = position{le.Uint64(p[48:]), le.Uint64(p[56:])}
	t.payload, t.slots, t.log = le.Uint32(p[64:]), le.Uint32(p[68:]), le.Uint32(p[72:])
	t.table, t.stripe = le.Uint32(p[76:]), le.Uint32(p[80:])
	t.ckptID, t.index, t.content, t.items = le.Uint64(p[88:]), le.Uint32(p[96:]), le.Uint32(p[100:]), le.Uint32(p[104:])
	if p[13]|p[14]|p[15] != 0 || le.Uint32(p[84:]) != 0 || !isZero(p[108:]) || t.items > t.payload || t.isData() && t.items != 0 ||
		!t.isData() && t.kind != kindCheckpoint || t.segment == 0 || t.segment >= maxSegments || t.prev >= maxSegments ||
		t.slots > maxSlots || t.log > SegmentBytes || t.payload > SegmentBytes || t.tableOffset() < int(t.payload) {
		return t, fmt.Errorf("segment trailer fields: %w", ErrCorrupt)
	}
	return t, nil
}

func encodeSlots(p []byte, slots []slot) {
	for i := range slots {
		e := p[i*slotBytes:]
		copy(e, slots[i].fp[:])
		le.PutUint16(e[20:], slots[i].len)
	}
}

// decodeSlots reads the table of a segment. Blocks lie one behind the other; wide slots say where, too.
func (t *trailer) decodeSlots(p []byte) ([]slot, error) {
	size, payload := t.slotBytes(), t.payload
	slots, end := make([]slot, len(p)/size), uint32(0)
	for i := range slots {
		e := p[i*size:]
		s := &slots[i]
		copy(s.fp[:], e)
		s.off, s.len = end, le.Uint16(e[20:])
		zero := uint16(0)
		if size == wideBytes {
			s.off, s.len, zero = le.Uint32(e[32:]), le.Uint16(e[36:]), le.Uint16(e[38:])
		}
		end = s.off + uint32(s.len)
		if zero != 0 || s.len <= blockHeader || s.len > blockHeader+BlockBytes || s.off > payload || s.off+uint32(s.len) > payload {
			return nil, fmt.Errorf("slot %d: %w", i, ErrCorrupt)
		}
	}
	return slots, nil
}

// The log of a segment: what the map becomes, in order.
const (
	logStore  = 1 // vol lba n: the next n slots of this segment are blocks lba…
	logRef    = 2 // vol lba n segment off len…: stored before, one behind the other in segment
	logZero   = 3 // vol lba n
	logCreate = 4 // vol n description
	logDelete = 5 // vol
	logResize = 6 // vol bytes
	logMove   = 7 // vol lba from to (8 bytes each): only if the block is still stored at from; for all that share the page
	// Since version 2:
	logCopy     = 8  // vol source n description: vol is as source is here
	logRollback = 9  // vol source: vol becomes as source is
	logDescribe = 10 // vol n description, but for its size
	// Since version 5:
	logPut = 11 // as logRef, of blocks that were stored for it, in a segment beside the log
)

// change is one decoded entry of a segment's log.
type change struct {
	kind     uint8
	vol      uint32
	lba, n   uint64 // logCopy, logRollback: n is the source
	places   []loc  // logStore, logRef, logPut: n of them; logMove: from, to
	describe []byte
}

// logWriter builds a segment's log, joining what continues the entry before.
type logWriter struct {
	p    []byte
	last change // not yet in p; kind 0: none
	size int    // bound of the bytes that last will take
}

func (w *logWriter) bytes() int { return len(w.p) + w.size }

func (w *logWriter) store(vol uint32, lba uint64, place loc) {
	l := &w.last
	if l.kind == logStore && l.vol == vol && l.lba+l.n == lba {
		l.n++
		return
	}
	w.flush()
	w.last, w.size = change{kind: logStore, vol: vol, lba: lba, n: 1}, 20
}

func (w *logWriter) ref(vol uint32, lba uint64, place loc) { w.refer(logRef, vol, lba, place) }
func (w *logWriter) put(vol uint32, lba uint64, place loc) { w.refer(logPut, vol, lba, place) }

func (w *logWriter) refer(kind uint8, vol uint32, lba uint64, place loc) {
	l := &w.last
	if l.kind == kind && l.vol == vol && l.lba+l.n == lba {
		end := l.places[len(l.places)-1]
		if end.segment() == place.segment() && end.off()+end.len() == place.off() {
			l.n++
			l.places = append(l.places, place)
			w.size += 2
			return
		}
	}
	places := w.last.places[:0]
	w.flush()
	w.last, w.size = change{kind: kind, vol: vol, lba: lba, n: 1, places: append(places, place)}, 32
}

func (w *logWriter) zero(vol uint32, lba, n uint64) {
	l := &w.last
	if l.kind == logZero && l.vol == vol && l.lba+l.n == lba {
		l.n += n
		return
	}
	w.flush()
	w.last, w.size = change{kind: logZero, vol: vol, lba: lba, n: n}, 28
}

func (w *logWriter) volume(kind uint8, vol uint32, n uint64, describe []byte) {
	w.flush()
	w.last, w.size = change{kind: kind, vol: vol, n: n, describe: describe}, 20+len(describe)
}

func (w *logWriter) move(vol uint32, lba uint64, from, to loc) {
	w.flush()
	w.last, w.size = change{kind: logMove, vol: vol, lba: lba, places: append(w.last.places[:0], from, to)}, 32
}

func (w *logWriter) flush() {
	c := &w.last
	if c.kind == 0 {
		return
	}
	w.p = append(w.p, c.kind)
	w.p = binary.AppendUvarint(w.p, uint64(c.vol))
	switch c.kind {
	case logStore, logZero, logRef, logPut:
		w.p = binary.AppendUvarint(w.p, c.lba)
		w.p = binary.AppendUvarint(w.p, c.n)
		if c.kind == logRef || c.kind == logPut {
			w.p = binary.AppendUvarint(w.p, uint64(c.places[0].segment()))
			w.p = binary.AppendUvarint(w.p, uint64(c.places[0].off()))
			for _, l := range c.places {
				w.p = binary.AppendUvarint(w.p, uint64(l.len()))
			}
		}
	case logMove:
		w.p = binary.AppendUvarint(w.p, c.lba)
		w.p = le.AppendUint64(w.p, uint64(c.places[0]))
		w.p = le.AppendUint64(w.p, uint64(c.places[1]))
	case logCreate, logDescribe:
		w.p = binary.AppendUvarint(w.p, uint64(len(c.describe)))
		w.p = append(w.p, c.describe...)
	case logCopy:
		w.p = binary.AppendUvarint(w.p, c.n)
		w.p = binary.AppendUvarint(w.p, uint64(len(c.describe)))
		w.p = append(w.p, c.describe...)
	case logResize, logRollback:
		w.p = binary.AppendUvarint(w.p, c.n)
	}
	c.kind, w.size = 0, 0
}

// decodeLog calls f for each change of a segment's log, in order. What it was given may be
// damaged: it reports ErrCorrupt, before or after some calls of f.
func decodeLog(segment uint32, slots []slot, p []byte, f func(*change) error) error {
	const most = MaxVolume / BlockBytes
	d, next := decoder{p: p}, 0
	for len(d.p) > 0 {
		c := change{kind: d.bytes(1)[0]}
		c.vol = uint32(d.limited(1<<32 - 1))
		switch c.kind {
		case logStore, logRef, logPut, logZero:
			c.lba = d.limited(most)
			c.n = d.limited(most - c.lba)
			d.bad = d.bad || c.n == 0
			if c.kind == logStore && !d.bad {
				if c.n > uint64(len(slots)-next) {
					return fmt.Errorf("segment %d log: slots: %w", segment, ErrCorrupt)
				}
				for ; uint64(len(c.places)) < c.n; next++ {
					c.places = append(c.places, makeLoc(segment, int(slots[next].off), int(slots[next].len)))
				}
			}
			if c.kind == logRef || c.kind == logPut {
				seg, off := d.limited(maxSegments-1), d.limited(SegmentBytes)
				for range c.n {
					if d.bad {
						break
					}
					l := makeLoc(uint32(seg), int(off), int(d.limited(blockHeader+BlockBytes)))
					if d.bad = d.bad || off >= SegmentBytes || !l.valid(); !d.bad {
						c.places = append(c.places, l)
						off += uint64(l.len())
					}
				}
			}
		case logMove:
			c.lba = d.limited(most - 1)
			c.n = 1
			c.places = []loc{loc(d.uint64()), loc(d.uint64())}
			d.bad = d.bad || !c.places[0].valid() || !c.places[1].valid()
			// The first move to a place brought the block there; later ones share it.
			if next < len(slots) && c.places[1] == makeLoc(segment, int(slots[next].off), int(slots[next].len)) {
				next++
			}
		case logCreate, logDescribe:
			c.describe = d.bytes(d.limited(BlockBytes))
		case logCopy:
			c.n = d.limited(1<<32 - 1)
			c.describe = d.bytes(d.limited(BlockBytes))
			d.bad = d.bad || c.n == 0 || c.n == uint64(c.vol)
		case logRollback:
			c.n = d.limited(1<<32 - 1)
			d.bad = d.bad || c.n == 0 || c.n == uint64(c.vol)
		case logResize:
			c.n = d.limited(MaxVolume)
			d.bad = d.bad || c.n%BlockBytes != 0
		case logDelete:
		default:
			d.bad = true
		}
		if d.bad || c.vol == 0 {
			return fmt.Errorf("segment %d log: %w", segment, ErrCorrupt)
		}
		if err := f(&c); err != nil {
			return err
		}
	}
	return nil
}
