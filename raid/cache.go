package raid

import (
	"container/list"
	"math"
	"sync"
	"sync/atomic"
)

// stripeMeta is what is known of a stripe's checksum blocks. It is immutable: it is replaced, under the
// stripe's lock, by a better one.
type stripeMeta struct {
	// gens is the true generation of every strip: the highest that any checksum block read so far tells.
	gens []uint64
	// sums are the checksum blocks that are current, nil where unknown (or not current).
	sums []*stripSum
	// parity says that every parity strip that can be read was asked for its generations.
	parity bool
}

// sumCache is a bounded LRU of stripeMeta, and behind it the generations alone of what had to leave it.
type sumCache struct {
	limit int // stripes

	mu      sync.Mutex
	order   *list.List // front: newest; values are *sumEntry
	entries map[uint64]*list.Element
	gens    *genTable
}

// leastStripes of the LRU.
const leastStripes = 1

type sumEntry struct {
	stripe uint64
	meta   *stripeMeta
}

// newSumCache bounds the cache to about bytes, half of them for the LRU, counting every entry as if all its strips were known.
func newSumCache(bytes, k, m int) *sumCache {
	entry := 256 + (k+m)*(4*StripBlocks+8*maxWidth/4+64)
	return &sumCache{limit: max(bytes/2/entry, leastStripes), order: list.New(), entries: make(map[uint64]*list.Element), gens: newGenTable(bytes/2, k, m)}
}

func (c *sumCache) get(stripe uint64) *stripeMeta {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[stripe]
	if e == nil {
		return c.gens.get(stripe)
	}
	c.order.MoveToFront(e)
	return e.Value.(*sumEntry).meta
}

// put replaces what is known of a stripe; a nil meta forgets it.
func (c *sumCache) put(stripe uint64, meta *stripeMeta) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.gens.drop(stripe)
	e := c.entries[stripe]
	switch {
	case meta == nil && e == nil:
	case meta == nil:
		c.order.Remove(e)
		delete(c.entries, stripe)
	case e != nil:
		e.Value.(*sumEntry).meta = meta
		c.order.MoveToFront(e)
	default:
		c.entries[stripe] = c.order.PushFront(&sumEntry{stripe, meta})
		for c.order.Len() > c.limit {
			last := c.order.Remove(c.order.Back()).(*sumEntry)
			delete(c.entries, last.stripe)
			c.gens.put(last.stripe, last.meta)
		}
	}
}

// clear forgets everything: the members' strips moved (a member failed or returned).
func (c *sumCache) clear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.order.Init()
	clear(c.entries)
	c.gens.clear()
}

// genTable keeps the generations of stripes, all that a read needs to see a lost write without asking the parity strips, in a
// sixtieth of a stripeMeta's memory. It is a table of sets of genWays entries; where a set is full, one entry gives way,
// in turn. An entry is words of 32 bits, the lower half of 64 first:
//
//	0  2  stripe + 1; 0: none
//	2  2  generation of the parity strips, the newest
//	4  k  how far behind it those of the data strips are
type genTable struct {
	k, m int
	sets uint64
	all  []uint32 // made with the first entry
	turn int
	hits atomic.Uint64
}

const genWays = 8

func newGenTable(bytes, k, m int) *genTable {
	return &genTable{k: k, m: m, sets: uint64(max(bytes/(genWays*4*(4+k)), 1))}
}

func (t *genTable) entry(i uint64) []uint32 {
	n := uint64(4 + t.k)
	return t.all[i*n:][:n]
}

// set returns where the entries of the stripe's set begin.
func (t *genTable) set(stripe uint64) uint64 {
	return stripe * 0x9E3779B97F4A7C15 >> 20 % t.sets * genWays
}

func (t *genTable) find(stripe uint64) []uint32 {
	if t.all == nil {
		return nil
	}
	first := t.set(stripe)
	for i := range uint64(genWays) {
		if e := t.entry(first + i); words64(e) == stripe+1 {
			return e
		}
	}
	return nil
}

func words64(w []uint32) uint64 { return uint64(w[0]) | uint64(w[1])<<32 }

func putWords64(w []uint32, v uint64) { w[0], w[1] = uint32(v), uint32(v>>32) }

// get returns what is known, or nil.
func (t *genTable) get(stripe uint64) *stripeMeta {
	e := t.find(stripe)
	if e == nil {
		return nil
	}
	t.hits.Add(1)
	meta := &stripeMeta{gens: make([]uint64, t.k+t.m), sums: make([]*stripSum, t.k+t.m), parity: true}
	newest := words64(e[2:])
	for i := range meta.gens {
		meta.gens[i] = newest
		if i < t.k {
			meta.gens[i] -= uint64(e[4+i])
		}
	}
	return meta
}

// put notes what a meta tells, if it tells all.
func (t *genTable) put(stripe uint64, meta *stripeMeta) {
	newest := meta.newest()
	if !meta.parity || stripe+1 == 0 {
		return
	}
	for _, g := range meta.gens[:t.k] {
		if newest-g > math.MaxUint32 {
			return
		}
	}
	if t.all == nil {
		t.all = make([]uint32, t.sets*genWays*uint64(4+t.k))
	}
	e := t.find(stripe)
	first := t.set(stripe)
	for i := uint64(0); i < genWays && e == nil; i++ {
		if free := t.entry(first + i); words64(free) == 0 {
			e = free
		}
	}
	if e == nil {
		t.turn++
		e = t.entry(first + uint64(t.turn)%genWays)
	}
	putWords64(e, stripe+1)
	putWords64(e[2:], newest)
	for i, g := range meta.gens[:t.k] {
		e[4+i] = uint32(newest - g)
	}
}

func (t *genTable) drop(stripe uint64) {
	if e := t.find(stripe); e != nil {
		putWords64(e, 0)
	}
}

func (t *genTable) clear() { t.all = nil }
