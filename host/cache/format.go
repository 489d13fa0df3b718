package cache

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

const (
	lineBytes   = 64 << 10
	blockBytes  = 4096
	slotsPer    = 126 // of a region; with its table's header they fill one block
	regionBytes = blockBytes + slotsPer*lineBytes
	headMagic   = "LEDGECH1"
	tableMagic  = "LEDGECT1"
	version     = 1
)

// ErrCorrupt: a block that is not what this package writes there.
var ErrCorrupt = errors.New("cache: corrupt")

var (
	le         = binary.LittleEndian
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

// head is the first block of the medium: which geometry its tables are of.
type head struct {
	id      [16]byte // of this formatting; tables of an older one don't count
	regions uint32
}

func (h *head) encode() []byte {
	p := make([]byte, blockBytes)
	copy(p, headMagic)
	le.PutUint32(p[12:], version)
	copy(p[16:], h.id[:])
	le.PutUint32(p[32:], h.regions)
	le.PutUint32(p[36:], slotsPer)
	le.PutUint32(p[40:], lineBytes)
	le.PutUint32(p[8:], crc32.Checksum(p[12:], castagnoli))
	return p
}

func decodeHead(p []byte) (h head, err error) {
	if len(p) != blockBytes || string(p[:8]) != headMagic || le.Uint32(p[8:]) != crc32.Checksum(p[12:], castagnoli) ||
		le.Uint32(p[12:]) != version || le.Uint32(p[36:]) != slotsPer || le.Uint32(p[40:]) != lineBytes {
		return h, fmt.Errorf("head: %w", ErrCorrupt)
	}
	copy(h.id[:], p[16:])
	h.regions = le.Uint32(p[32:])
	return h, nil
}

// entry is what a slot holds.
type entry struct {
	store   [16]byte
	segment uint32
	line    uint16
	sum     uint32 // crc32c of store, segment, line and the line's bytes
}

func (e *entry) used() bool { return e.segment != 0 }

// sumOf is the checksum of a line under its name, so that a line of another name, however whole,
// is not taken for this one.
func sumOf(store [16]byte, segment uint32, line int, p []byte) uint32 {
	var name [22]byte
	copy(name[:], store[:])
	le.PutUint32(name[16:], segment)
	le.PutUint16(name[20:], uint16(line))
	return crc32.Update(crc32.Checksum(name[:], castagnoli), castagnoli, p)
}

// encodeTable makes a region's table.
func encodeTable(id [16]byte, region uint32, entries *[slotsPer]entry) []byte {
	p := make([]byte, blockBytes)
	copy(p, tableMagic)
	le.PutUint32(p[12:], region)
	copy(p[16:], id[:])
	for i := range entries {
		e, q := &entries[i], p[64+i*32:]
		copy(q, e.store[:])
		le.PutUint32(q[16:], e.segment)
		le.PutUint16(q[20:], e.line)
		le.PutUint32(q[24:], e.sum)
	}
	le.PutUint32(p[8:], crc32.Checksum(p[12:], castagnoli))
	return p
}

func decodeTable(id [16]byte, region uint32, p []byte) (entries [slotsPer]entry, err error) {
	if len(p) != blockBytes || string(p[:8]) != tableMagic || le.Uint32(p[8:]) != crc32.Checksum(p[12:], castagnoli) ||
		le.Uint32(p[12:]) != region || [16]byte(p[16:32]) != id {
		return entries, fmt.Errorf("table of region %d: %w", region, ErrCorrupt)
	}
	for i := range entries {
		e, q := &entries[i], p[64+i*32:]
		copy(e.store[:], q)
		e.segment, e.line, e.sum = le.Uint32(q[16:]), le.Uint16(q[20:]), le.Uint32(q[24:])
		if le.Uint16(q[22:]) != 0 || le.Uint32(q[28:]) != 0 {
			return entries, fmt.Errorf("table of region %d, slot %d: %w", region, i, ErrCorrupt)
		}
	}
	return entries, nil
}
