package cache

import (
	"math/bits"
	"sync/atomic"
)

// name is a line's name in 8 bytes, with how often it was read:
//
//	bits 0–6 line, 7–38 segment, 39–46 number of the store, 62–63 hits
type name uint64

const (
	hitsShift = 62
	nameMask  = name(1)<<47 - 1
)

func nameOf(store int, segment uint32, line uint8) name {
	return name(store)<<39 | name(segment)<<7 | name(line)
}

func (n name) bare() name      { return n & nameMask }
func (n name) hits() uint8     { return uint8(n >> hitsShift) }
func (n name) store() int      { return int(n >> 39 & 0xff) }
func (n name) segment() uint32 { return uint32(n >> 7) }
func (n name) line() uint8     { return uint8(n & (segmentLines - 1)) }

func (n name) withHits(h uint8) name { return n.bare() | name(h)<<hitsShift }

// hash spreads names over 64 bits (the finalizer of MurmurHash3).
func (n name) hash() uint64 {
	h := uint64(n.bare())
	h = (h ^ h>>33) * 0xff51afd7ed558ccd
	h = (h ^ h>>33) * 0xc4ceb9fe1a85ec53
	return h ^ h>>33
}

// index finds lines: names by slot, and an open-addressing table of slots, at most 80 % full. A
// place holds a slot's number and 4 bits of its name's hash, which spare 15 of 16 looks at names
// that are others'. 13 bytes for each slot, without a pointer, so that the collector doesn't
// look through them.
type index struct {
	names  []atomic.Uint64 // by slot; 0: empty
	places []uint32
	lines  int
	held   [maxStores]int // lines of each store
}

const (
	noPlace  = ^uint32(0)
	slotBits = 28
	slotMask = 1<<slotBits - 1
)

func newIndex(slots uint32) *index {
	x := &index{names: make([]atomic.Uint64, slots), places: make([]uint32, uint64(slots)*5/4+1)}
	for i := range x.places {
		x.places[i] = noPlace
	}
	return x
}

func (x *index) at(slot uint32) name { return name(x.names[slot].Load()) }

// home is where the name's place is, if it was free.
func (x *index) home(n name) (at int, tag uint32) {
	h := n.hash()
	hi, _ := bits.Mul64(h, uint64(len(x.places)))
	return int(hi), uint32(h) << slotBits
}

func (x *index) after(at int) int {
	if at++; at == len(x.places) {
		return 0
	}
	return at
}

func (x *index) place(n name) (int, bool) {
	at, tag := x.home(n)
	for ; x.places[at] != noPlace; at = x.after(at) {
		if p := x.places[at]; p&^slotMask == tag && x.at(p&slotMask).bare() == n.bare() {
			return at, true
		}
	}
	return at, false
}

func (x *index) find(n name) (slot uint32, ok bool) {
	at, ok := x.place(n)
	return x.places[at] & slotMask, ok
}

// hit counts a read. It may be called concurrently with others of itself and of find.
func (x *index) hit(slot uint32) {
	for {
		if old := x.names[slot].Load(); name(old).hits() == maxHits || x.names[slot].CompareAndSwap(old, old+1<<hitsShift) {
			return
		}
	}
}

// put says that an empty slot holds a line that is nowhere else.
func (x *index) put(slot uint32, n name) {
	at, _ := x.place(n)
	_, tag := x.home(n)
	x.places[at] = tag | slot
	x.names[slot].Store(uint64(n))
	x.lines++
	x.held[n.store()]++
}

// remove says that a slot holds nothing, and returns what it held.
func (x *index) remove(slot uint32) name {
	n := x.at(slot)
	if n == 0 {
		return 0
	}
	hole, _ := x.place(n)
	// What follows in the run moves up, unless it would come before its home.
	for at := x.after(hole); x.places[at] != noPlace; at = x.after(at) {
		home, _ := x.home(x.at(x.places[at] & slotMask))
		if between := (at - home + len(x.places)) % len(x.places); between >= (at-hole+len(x.places))%len(x.places) {
			x.places[hole], hole = x.places[at], at
		}
	}
	x.places[hole] = noPlace
	x.names[slot].Store(0)
	x.lines--
	x.held[n.store()]--
	return n
}
