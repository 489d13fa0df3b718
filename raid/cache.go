package raid

import (
	"container/list"
	"sync"
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

// sumCache is a bounded LRU of stripeMeta.
type sumCache struct {
	limit int // stripes

	mu      sync.Mutex
	order   *list.List // front: newest; values are *sumEntry
	entries map[uint64]*list.Element
}

type sumEntry struct {
	stripe uint64
	meta   *stripeMeta
}

// newSumCache bounds the cache to about bytes, counting every entry as if all its strips were known.
func newSumCache(bytes, width int) *sumCache {
	entry := 256 + width*(4*StripBlocks+8*maxWidth/4+64)
	return &sumCache{limit: max(bytes/entry, 16), order: list.New(), entries: make(map[uint64]*list.Element)}
}

func (c *sumCache) get(stripe uint64) *stripeMeta {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[stripe]
	if e == nil {
		return nil
	}
	c.order.MoveToFront(e)
	return e.Value.(*sumEntry).meta
}

// put replaces what is known of a stripe; a nil meta forgets it.
func (c *sumCache) put(stripe uint64, meta *stripeMeta) {
	c.mu.Lock()
	defer c.mu.Unlock()
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
			last := c.order.Back()
			c.order.Remove(last)
			delete(c.entries, last.Value.(*sumEntry).stripe)
		}
	}
}

// clear forgets everything: the members' strips moved (a member failed or returned).
func (c *sumCache) clear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.order.Init()
	clear(c.entries)
}
