package store

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math/bits"

	"github.com/ledge-storage/ledge/host/dedup"
)

// Sizes of the format. None can change without a new version.
const (
	BlockBytes  = 4096
	ringOffset  = 64 << 10  // where the ring of records begins on the journal LUN
	maxSegments = 1 << 28   // numbers of segments, 0 excluded: 2 PiB written in a store's life
	blockHeader = 5         // crc32c and codec in front of a stored block
	MaxVolume   = 256 << 40 // bytes of a volume
	MaxVolumes  = 1024
	maxName     = 128
	// geometry.go has the rest.
)

// ErrCorrupt: what was read is not what was written there; the wrapping says where.
var ErrCorrupt = errors.New("store: corrupt")

var (
	le         = binary.LittleEndian
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

func crc(p []byte) uint32 { return crc32.Checksum(p, castagnoli) }

// loc names a stored block: segment (28 bits), byte offset (23), stored length with its header
// (13). Zero is nothing stored. Immutable: a segment's number is used once.
type loc uint64

func makeLoc(segment uint32, off, n int) loc {
	return loc(uint64(segment)<<36 | uint64(off)<<13 | uint64(n))
}

func (l loc) segment() uint32 { return uint32(l >> 36) }
func (l loc) off() int        { return int(l >> 13 & (1<<23 - 1)) }
func (l loc) len() int        { return int(l & (1<<13 - 1)) }

// valid says whether l can name a stored block.
func (l loc) valid() bool {
	return l.segment() != 0 && l.len() > blockHeader && l.len() <= blockHeader+BlockBytes && l.off()+l.len() <= SegmentBytes-BlockBytes
}

// digest is what is kept of a block's fingerprint: 160 bits of a SHA-256 with a key that nobody outside knows, so that none
// can look for two blocks that share one. By chance, 2^40 different blocks (4 PiB) have such a pair with 2^-81.
type digest [20]byte

func shorten(fp *dedup.Fingerprint) digest { return digest(fp[:len(digest{})]) }

// fingerprint is as much of it as the index looks at.
func (d *digest) fingerprint() (fp dedup.Fingerprint) {
	copy(fp[:], d[:])
	return fp
}

// slot is one entry of a data segment's table.
type slot struct {
	fp  digest
	off uint32
	len uint16 // stored, with the block's header
}

// position is a place in the log: unit units of record seq are behind it, and all records before.
// A written block is one unit, and so is each other entry of a record.
type position struct{ seq, unit uint64 }

func (p position) less(q position) bool { return p.seq < q.seq || p.seq == q.seq && p.unit < q.unit }

func roundUp(n, to int) int { return (n + to - 1) / to * to }

func isZero(p []byte) bool {
	for len(p) >= 32 {
		if le.Uint64(p)|le.Uint64(p[8:])|le.Uint64(p[16:])|le.Uint64(p[24:]) != 0 {
			return false
		}
		p = p[32:]
	}
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

// decoder reads varints and bytes of an untrusted buffer; its first failure sticks.
type decoder struct {
	p   []byte
	bad bool
}

func (d *decoder) uvarint() uint64 {
	v, n := binary.Uvarint(d.p)
	if n <= 0 || n > 1 && n != (bits.Len64(v)+6)/7 { // one encoding for one value
		d.bad, d.p = true, nil
		return 0
	}
	d.p = d.p[n:]
	return v
}

// limited is a uvarint that may not pass most.
func (d *decoder) limited(most uint64) uint64 {
	v := d.uvarint()
	if v > most {
		d.bad, d.p = true, nil
		return 0
	}
	return v
}

func (d *decoder) bytes(n uint64) []byte {
	if n > uint64(len(d.p)) {
		d.bad, d.p = true, nil
		return nil
	}
	b := d.p[:n]
	d.p = d.p[n:]
	return b
}

func (d *decoder) uint64() uint64 {
	b := d.bytes(8)
	if b == nil {
		return 0
	}
	return le.Uint64(b)
}

func crcUpdate(sum uint32, p []byte) uint32 { return crc32.Update(sum, castagnoli, p) }
