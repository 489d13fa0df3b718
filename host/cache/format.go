package cache

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

const (
	version    = 2
	blockBytes = 4096
	magicBytes = 8
	headMagic  = "LEDGECH2"
	stateMagic = "LEDGECS2"
	tableMagic = "LEDGECT2"

	payloadBytes = blockBytes - 16 // of a line, in one block
	entriesAt    = 240             // in a table
	maxEntries   = (blockBytes - entriesAt) / 8
	tableStores  = (entriesAt - 48) / 16
	maxHits      = 3
)

// ErrCorrupt: a block that is not what this package writes there.
var ErrCorrupt = errors.New("cache: corrupt")

var (
	le         = binary.LittleEndian
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

// seal puts the checksum of a metadata block in its place.
func seal(p []byte) []byte {
	le.PutUint32(p[8:], crc32.Checksum(p[12:], castagnoli))
	return p
}

func sealed(p []byte, magic string) bool {
	return len(p) == blockBytes && string(p[:magicBytes]) == magic && le.Uint32(p[8:]) == crc32.Checksum(p[12:], castagnoli)
}

func allZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

// head says how the medium is divided; it is written once.
type head struct {
	id                     [16]byte // of this formatting: nothing of an older one counts
	regionBytes, lineBytes uint32
}

func (h *head) encode() []byte {
	p := make([]byte, blockBytes)
	copy(p, headMagic)
	le.PutUint32(p[12:], version)
	copy(p[16:], h.id[:])
	le.PutUint32(p[32:], h.regionBytes)
	le.PutUint32(p[36:], h.lineBytes)
	return seal(p)
}

func decodeHead(p []byte) (h head, err error) {
	if !sealed(p, headMagic) || le.Uint32(p[12:]) != version || !allZero(p[40:]) {
		return h, fmt.Errorf("head: %w", ErrCorrupt)
	}
	h = head{[16]byte(p[16:]), le.Uint32(p[32:]), le.Uint32(p[36:])}
	if r := h.regionBytes; r < leastRegion || r > maxRegionBytes || r&(r-1) != 0 || h.lineBytes == 0 || h.lineBytes > LineBytes {
		return head{}, fmt.Errorf("head: regions of %d bytes, lines of %d: %w", r, h.lineBytes, ErrCorrupt)
	}
	return h, nil
}

// isOurs says whether a first block was written by this package, in whatever version and state.
func isOurs(p []byte) bool { return string(p[:magicBytes-1]) == headMagic[:magicBytes-1] }

// state tells whether the newest region is known for sure.
type state struct {
	id       [16]byte
	clean    bool
	sequence uint64 // of the newest region
	next     uint32 // the region that is written after it
}

func (s *state) encode() []byte {
	p := make([]byte, blockBytes)
	copy(p, stateMagic)
	if s.clean {
		p[12] = 1
	}
	copy(p[16:], s.id[:])
	le.PutUint64(p[32:], s.sequence)
	le.PutUint32(p[40:], s.next)
	return seal(p)
}

func decodeState(p []byte) (s state, err error) {
	if !sealed(p, stateMagic) || le.Uint32(p[12:]) > 1 || !allZero(p[44:]) {
		return s, fmt.Errorf("state: %w", ErrCorrupt)
	}
	return state{[16]byte(p[16:]), p[12] == 1, le.Uint64(p[32:]), le.Uint32(p[40:])}, nil
}

// table says which lines a region holds.
type table struct {
	region   uint32
	sequence uint64
	stores   [][16]byte // at most tableStores
	entries  []entry    // by slot
}

// entry is what a slot holds; segment 0: nothing that counts.
type entry struct {
	segment           uint32
	line, store, hits uint8
}

func (t *table) encode(id [16]byte) []byte {
	p := make([]byte, blockBytes)
	copy(p, tableMagic)
	le.PutUint32(p[12:], t.region)
	copy(p[16:], id[:])
	le.PutUint64(p[32:], t.sequence)
	le.PutUint16(p[40:], uint16(len(t.entries)))
	p[42] = uint8(len(t.stores))
	for i, s := range t.stores {
		copy(p[48+16*i:], s[:])
	}
	for i, e := range t.entries {
		q := p[entriesAt+8*i:]
		le.PutUint32(q, e.segment)
		q[4], q[5], q[6] = e.line, e.store, e.hits
	}
	return seal(p)
}

// decode reads the table of a region; entries and stores are reused.
func (t *table) decode(id [16]byte, region uint32, p []byte) error {
	if !sealed(p, tableMagic) || le.Uint32(p[12:]) != region || [16]byte(p[16:32]) != id {
		return fmt.Errorf("table of region %d: %w", region, ErrCorrupt)
	}
	lines, stores := int(le.Uint16(p[40:])), int(p[42])
	if lines > maxEntries || stores > tableStores || !allZero(p[43:48]) || !allZero(p[48+16*stores:entriesAt]) || !allZero(p[entriesAt+8*lines:]) {
		return fmt.Errorf("table of region %d: %d lines of %d stores: %w", region, lines, stores, ErrCorrupt)
	}
	t.region, t.sequence, t.stores, t.entries = region, le.Uint64(p[32:]), t.stores[:0], t.entries[:0]
	for i := range stores {
		t.stores = append(t.stores, [16]byte(p[48+16*i:]))
	}
	for i := range lines {
		q := p[entriesAt+8*i:]
		e := entry{le.Uint32(q), q[4], q[5], q[6]}
		if e.segment != 0 && (e.line >= segmentLines || int(e.store) >= stores || e.hits > maxHits) || q[7] != 0 {
			return fmt.Errorf("table of region %d, slot %d: %w", region, i, ErrCorrupt)
		}
		t.entries = append(t.entries, e)
	}
	return nil
}

// lineName is what each block of a line proves to be a part of. Its seed covers what the trailer
// has no room for.
type lineName struct {
	store   [16]byte
	segment uint32
	line    uint8
	seed    uint32
}

func (c *Cache) lineName(store [16]byte, segment uint32, line uint8) lineName {
	return lineName{store, segment, line, crc32.Update(crc32.Checksum(c.head.id[:], castagnoli), castagnoli, store[:])}
}

func (n *lineName) trailer(block int, t []byte) {
	le.PutUint32(t[4:], n.segment)
	t[8], t[9], t[10], t[11] = n.line, 0, uint8(block), 0
	copy(t[12:16], n.store[:])
}

// isOf says whether a trailer is the one of this block of the line.
func (n *lineName) isOf(block int, t []byte) bool {
	return le.Uint32(t[4:]) == n.segment && le.Uint32(t[8:]) == uint32(n.line)|uint32(block)<<16 && [4]byte(t[12:]) == [4]byte(n.store[:])
}

// encodeLine fills a slot with a line.
func encodeLine(slot []byte, n *lineName, p []byte) {
	for i := 0; len(p) > 0; i++ {
		b := slot[i*blockBytes : (i+1)*blockBytes]
		k := copy(b[:payloadBytes], p)
		clear(b[k:payloadBytes])
		p = p[k:]
		n.trailer(i, b[payloadBytes:])
		le.PutUint32(b[payloadBytes:], n.sum(b))
	}
}

func (n *lineName) sum(b []byte) uint32 {
	return crc32.Update(crc32.Update(n.seed, castagnoli, b[:payloadBytes]), castagnoli, b[payloadBytes+4:])
}

// decodeLine fills p with what stands in the line from byte at on; blocks begin with the block that
// holds this byte. It returns ErrCorrupt where a block is not the line's, and p is not to be used then.
func decodeLine(p, blocks []byte, n *lineName, at int) error {
	for i, off := at/payloadBytes, at%payloadBytes; len(p) > 0; i, off = i+1, 0 {
		b := blocks[:blockBytes]
		blocks = blocks[blockBytes:]
		if t := b[payloadBytes:]; !n.isOf(i, t) || le.Uint32(t) != n.sum(b) {
			return fmt.Errorf("segment %d line %d block %d: %w", n.segment, n.line, i, ErrCorrupt)
		}
		p = p[copy(p, b[off:payloadBytes]):]
	}
	return nil
}
