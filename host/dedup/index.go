package dedup

import (
	"encoding/binary"
	"errors"
	"sync"
)

// Bounds of a Ref: both together with the tag fill one 8-byte entry.
const (
	SegmentBits = 28
	SlotBits    = 14
	tagBits     = 64 - SegmentBits - SlotBits
)

// Ref is a place: slot of a segment. Segment 0 is no segment.
type Ref struct {
	Segment uint32
	Slot    uint16
}

// Index is a fixed-size table fingerprint → Ref, in buckets of one cache line. A full bucket
// forgets one of its entries for a new one: a forgotten entry costs space (a block stored
// twice), never truth.
//
// An entry is 8 bytes: segment (28 bits), slot (14), tag (22). With the bucket's number a hit
// is wrong with a chance of 8 in 2^22; the caller's verification finds that.
type Index struct {
	mu      sync.Mutex
	buckets [][8]uint64
	entries int
}

// ErrRef is a Ref that an entry cannot hold.
var ErrRef = errors.New("dedup: place out of bounds")

// NewIndex returns an index that uses the largest power of two of memory within limitBytes.
func NewIndex(limitBytes int64) *Index {
	n := int64(1)
	for n*2*64 <= limitBytes {
		n *= 2
	}
	return &Index{buckets: make([][8]uint64, n)}
}

func (x *Index) locate(fp *Fingerprint) (bucket uint64, tag uint64) {
	bucket = binary.LittleEndian.Uint64(fp[0:8]) & uint64(len(x.buckets)-1)
	tag = uint64(binary.LittleEndian.Uint32(fp[8:12])) & (1<<tagBits - 1)
	return bucket, tag
}

func pack(r Ref, tag uint64) uint64 {
	return uint64(r.Segment)<<(SlotBits+tagBits) | uint64(r.Slot)<<tagBits | tag
}

func unpack(e uint64) (Ref, uint64) {
	return Ref{Segment: uint32(e >> (SlotBits + tagBits)), Slot: uint16(e >> tagBits & (1<<SlotBits - 1))}, e & (1<<tagBits - 1)
}

// Lookup returns where fp may be stored.
func (x *Index) Lookup(fp *Fingerprint) (Ref, bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	b, tag := x.locate(fp)
	for _, e := range x.buckets[b] {
		if e != 0 && e&(1<<tagBits-1) == tag {
			r, _ := unpack(e)
			return r, true
		}
	}
	return Ref{}, false
}

// Insert remembers that fp is stored at r, in place of what was known of fp before.
func (x *Index) Insert(fp *Fingerprint, r Ref) error {
	if r.Segment == 0 || r.Segment >= 1<<SegmentBits || r.Slot >= 1<<SlotBits {
		return ErrRef
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	b, tag := x.locate(fp)
	bucket, free := &x.buckets[b], -1
	for i, e := range bucket {
		if e == 0 {
			if free < 0 {
				free = i
			}
		} else if e&(1<<tagBits-1) == tag {
			bucket[i] = pack(r, tag)
			return nil
		}
	}
	if free < 0 {
		free = int(fp[12] & 7) // any will do, if it is not always the same
	} else {
		x.entries++
	}
	bucket[free] = pack(r, tag)
	return nil
}

// Remove forgets that fp is stored at r; it does nothing when the index says otherwise.
func (x *Index) Remove(fp *Fingerprint, r Ref) {
	x.mu.Lock()
	defer x.mu.Unlock()
	b, tag := x.locate(fp)
	for i, e := range x.buckets[b] {
		if e == pack(r, tag) {
			x.buckets[b][i] = 0
			x.entries--
			return
		}
	}
}

// Len is the number of entries; Bytes the memory that the table takes, used or not.
func (x *Index) Len() int {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.entries
}

// Bytes is the memory of the table.
func (x *Index) Bytes() int64 { return int64(len(x.buckets)) * 64 }
