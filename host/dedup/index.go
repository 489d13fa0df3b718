package dedup

import (
	"encoding/binary"
	"errors"
	"math/bits"
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

func (r Ref) valid() bool {
	return r.Segment != 0 && r.Segment < 1<<SegmentBits && r.Slot < 1<<SlotBits
}

// Index is a fixed-size table fingerprint → Ref, in buckets of one cache line. A full bucket
// forgets one of its entries for a new one: a forgotten entry costs space (a block stored
// twice), never truth.
//
// What it forgets makes it a sample of what there is, ever thinner: an entry's level is the number of zeros that its tag ends in, so
// that each level has half of the blocks of the one below; the entry of the lowest level goes first. So a full index has of what is
// old a few blocks of each run, spread evenly, and a table of what lies beside one of them finds the rest; and one or two places in
// each bucket are left to what came last. One time in eight any of the entries goes, because some name what is there no more.
//
// An entry is 8 bytes: segment (28 bits), slot (14), tag (22). With the bucket's number a hit
// is wrong with a chance of 8 in 2^22; the caller's verification finds that.
type Index struct {
	mu      sync.Mutex
	buckets [][8]uint64
	entries int
	forgot  bool
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
	if !r.valid() {
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
	if free >= 0 {
		x.entries++
	} else if free, x.forgot = int(fp[13]&7), true; fp[12]&7 != 0 {
		free, _ = lowest(bucket, free)
	}
	bucket[free] = pack(r, tag)
	return nil
}

// Hint is Insert for what is older than what the index has: that stays, and of a full bucket an entry goes only if its level is
// below that of fp.
func (x *Index) Hint(fp *Fingerprint, r Ref) error {
	if !r.valid() {
		return ErrRef
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	b, tag := x.locate(fp)
	bucket := &x.buckets[b]
	for i, e := range bucket {
		if e == 0 {
			bucket[i] = pack(r, tag)
			x.entries++
			return nil
		}
		if e&(1<<tagBits-1) == tag {
			return nil
		}
	}
	x.forgot = true
	if i, l := lowest(bucket, int(fp[13]&7)); l < level(tag) {
		bucket[i] = pack(r, tag)
	}
	return nil
}

// lowest is the entry of the lowest level of a full bucket, the first from number from on.
func lowest(bucket *[8]uint64, from int) (at, of int) {
	of = tagBits + 1
	for i := range bucket {
		i = (from + i) % len(bucket)
		if l := level(bucket[i]); l < of {
			at, of = i, l
		}
	}
	return at, of
}

// level of an entry or a tag.
func level(e uint64) int { return bits.TrailingZeros64(e | 1<<tagBits) }

// Forgot says whether it has ever forgotten an entry for want of room.
func (x *Index) Forgot() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.forgot
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
