package nvram

import (
	"fmt"

	"github.com/zeebo/xxh3"
)

const (
	recordMagic     = "LEDGEREC"
	recordVersion   = 2
	recordVersion1  = 1 // with a CRC-32C; see doc.go
	recordFixed     = 96
	recordSumAt     = 88
	setEntryBytes   = 8
	extentBytes     = 24
	recordPad       = 1
	extentZero      = 1
	maxRecordBlocks = 16 << 20 / BlockBytes
	minAreaBytes    = (superBlocks + 2*minLaneBlocks) * BlockBytes
	minLaneBlocks   = 8
)

// header is the fixed part of a record; doc.go has the byte table.
type header struct {
	lane         uint8
	pad          bool
	old          bool   // version 1
	sum          uint64 // as it was read
	lsn, seq     uint64
	id           ID
	epoch, run   uint64
	acked        uint64
	blocks       uint32
	headerBlocks uint32
	sets         uint32
	extents      uint32
}

// frameBlocks are the blocks that are written and sent: a pad's rest is not.
func (h *header) frameBlocks() uint32 {
	if h.pad {
		return 1
	}
	return h.blocks
}

// headerBlocksFor a record of so many sets and extents.
func headerBlocksFor(sets, extents int) int {
	return (recordFixed + setEntryBytes*sets + extentBytes*extents + BlockBytes - 1) / BlockBytes
}

func (h *header) encode(b []byte) {
	copy(b, recordMagic)
	le.PutUint16(b[8:], recordVersion)
	b[10] = h.lane
	b[11] = 0
	if h.pad {
		b[11] = recordPad
	}
	le.PutUint32(b[12:], 0)
	le.PutUint64(b[16:], h.lsn)
	le.PutUint64(b[24:], h.seq)
	copy(b[32:], h.id[:])
	le.PutUint64(b[48:], h.epoch)
	le.PutUint64(b[56:], h.run)
	le.PutUint64(b[64:], h.acked)
	le.PutUint32(b[72:], h.blocks)
	le.PutUint32(b[76:], h.headerBlocks)
	le.PutUint32(b[80:], h.sets)
	le.PutUint32(b[84:], h.extents)
	le.PutUint64(b[88:], 0)
}

// decodeHeader reads the fixed part and bounds its numbers. The checksum is not verified yet: it covers the whole record.
func decodeHeader(b []byte) (header, error) {
	var h header
	if len(b) < recordFixed || string(b[:8]) != recordMagic {
		return h, fmt.Errorf("%w: no record", ErrCorrupt)
	}
	switch v := le.Uint16(b[8:]); v {
	case recordVersion:
		h.sum = le.Uint64(b[recordSumAt:])
	case recordVersion1:
		h.old, h.sum = true, uint64(le.Uint32(b[12:]))
	default:
		return h, fmt.Errorf("%w: record version %d", ErrCorrupt, v)
	}
	h.lane = b[10]
	h.pad = b[11]&recordPad != 0
	h.lsn = le.Uint64(b[16:])
	h.seq = le.Uint64(b[24:])
	copy(h.id[:], b[32:])
	h.epoch = le.Uint64(b[48:])
	h.run = le.Uint64(b[56:])
	h.acked = le.Uint64(b[64:])
	h.blocks = le.Uint32(b[72:])
	h.headerBlocks = le.Uint32(b[76:])
	h.sets = le.Uint32(b[80:])
	h.extents = le.Uint32(b[84:])
	switch {
	case h.lane >= lanes || b[11]&^recordPad != 0:
		return h, fmt.Errorf("%w: record of lane %d, flags %#x", ErrCorrupt, h.lane, b[11])
	case h.lsn == ^uint64(0) || h.acked > h.lsn:
		return h, fmt.Errorf("%w: record lsn %d says that all below %d are acknowledged", ErrCorrupt, h.lsn, h.acked)
	case h.blocks == 0 || !h.pad && h.blocks > maxRecordBlocks || h.headerBlocks == 0 || h.headerBlocks > h.blocks:
		return h, fmt.Errorf("%w: record of %d blocks, %d of header", ErrCorrupt, h.blocks, h.headerBlocks)
	case h.pad && (h.sets != 0 || h.extents != 0 || h.headerBlocks != 1):
		return h, fmt.Errorf("%w: pad record with content", ErrCorrupt)
	case uint64(recordFixed)+setEntryBytes*uint64(h.sets)+extentBytes*uint64(h.extents) > uint64(h.headerBlocks)*BlockBytes:
		return h, fmt.Errorf("%w: table of %d sets, %d extents in %d header blocks", ErrCorrupt, h.sets, h.extents, h.headerBlocks)
	}
	return h, nil
}

// decodeRecord verifies a whole frame: header, checksum, table.
func decodeRecord(b []byte) (header, error) {
	h, err := decodeHeader(b)
	if err != nil {
		return h, err
	}
	if uint64(len(b)) != uint64(h.frameBlocks())*BlockBytes {
		return h, fmt.Errorf("%w: record lsn %d has %d bytes, not %d blocks", ErrCorrupt, h.lsn, len(b), h.frameBlocks())
	}
	if h.sumOf(b) != h.sum {
		return h, fmt.Errorf("%w: record lsn %d checksum", ErrCorrupt, h.lsn)
	}
	return h, h.walk(b, nil)
}

// sumOf is the checksum that b, the frame of h, should have.
func (h *header) sumOf(b []byte) uint64 {
	if h.old {
		return uint64(checksum(b))
	}
	return recordSum(b)
}

// recordSum is that of a version 2 frame.
func recordSum(b []byte) uint64 { return xxh3.HashSeed(b[recordFixed:], xxh3.Hash(b[:recordSumAt])) }

// walk gives the sets of a verified record. Their payload aliases b.
func (h *header) walk(b []byte, fn func(Set) error) error {
	sets := b[recordFixed:]
	extents := sets[setEntryBytes*h.sets:]
	payload := b[h.headerBlocks*BlockBytes:]
	left := h.extents
	for range h.sets {
		kind, n := sets[0], le.Uint32(sets[4:])
		sets = sets[setEntryBytes:]
		if n > left {
			return fmt.Errorf("%w: record lsn %d: set of %d extents, %d left", ErrCorrupt, h.lsn, n, left)
		}
		left -= n
		s := Set{Kind: kind}
		if fn != nil {
			s.Extents = make([]Extent, n)
		}
		size := 0
		for i := range n {
			e := Extent{LUN: le.Uint32(extents), Blocks: le.Uint32(extents[4:]), LBA: le.Uint64(extents[8:]), Zero: le.Uint32(extents[16:])&extentZero != 0}
			extents = extents[extentBytes:]
			if !e.Zero {
				if uint64(e.Blocks)*BlockBytes > uint64(len(payload)-size) {
					return fmt.Errorf("%w: record lsn %d: extents exceed the payload", ErrCorrupt, h.lsn)
				}
				size += int(e.Blocks) * BlockBytes
			}
			if fn != nil {
				s.Extents[i] = e
			}
		}
		if fn != nil {
			if size > 0 {
				s.Payload = [][]byte{payload[:size:size]}
			}
			if err := fn(s); err != nil {
				return err
			}
		}
		payload = payload[size:]
	}
	if !h.pad && (left != 0 || len(payload) != 0) {
		return fmt.Errorf("%w: record lsn %d: %d extents and %d bytes of no set", ErrCorrupt, h.lsn, left, len(payload))
	}
	return nil
}

// build fills b, the frame of h, with the sets of reqs, and seals it. b's header blocks may hold anything.
func (h *header) build(b []byte, reqs []*request) {
	clear(b[:h.headerBlocks*BlockBytes])
	h.encode(b)
	sets := b[recordFixed:]
	extents := sets[setEntryBytes*h.sets:]
	payload := b[h.headerBlocks*BlockBytes:]
	for _, r := range reqs {
		for i := range r.sets {
			s := &r.sets[i]
			sets[0] = s.Kind
			le.PutUint32(sets[4:], uint32(len(s.Extents)))
			sets = sets[setEntryBytes:]
			for _, e := range s.Extents {
				le.PutUint32(extents, e.LUN)
				le.PutUint32(extents[4:], e.Blocks)
				le.PutUint64(extents[8:], e.LBA)
				if e.Zero {
					le.PutUint32(extents[16:], extentZero)
				}
				extents = extents[extentBytes:]
			}
			for _, p := range s.Payload {
				payload = payload[copy(payload, p):]
			}
		}
	}
	le.PutUint64(b[recordSumAt:], recordSum(b))
}

// measure checks a set and returns its extents and payload blocks.
func (s *Set) measure() (blocks int, err error) {
	want := uint64(0)
	for _, e := range s.Extents {
		if !e.Zero {
			want += uint64(e.Blocks)
		}
	}
	have := uint64(0)
	for _, p := range s.Payload {
		have += uint64(len(p))
	}
	if have != want*BlockBytes {
		return 0, fmt.Errorf("%w: extents of %d blocks, payload of %d bytes", ErrInvalid, want, have)
	}
	return int(want), nil
}
