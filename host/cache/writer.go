package cache

import (
	"fmt"
	"time"
)

// tableDelay is how long a line may be on the medium before its table says so.
const tableDelay = time.Second

// writeLoop writes lines to the medium until the queue is closed and empty.
func (c *Cache) writeLoop() {
	tick := time.NewTicker(tableDelay)
	defer tick.Stop()
	for {
		select {
		case p, more := <-c.queue:
			if !more {
				c.writeTables()
				return
			}
			c.write(&p)
			c.lines.Put(p.data)
		case <-tick.C:
			c.writeTables()
		}
	}
}

// write puts one line into the next slot.
func (c *Cache) write(p *put) {
	c.mu.Lock()
	s, ok := c.storeNumber(p.store, true)
	n := nameOf(s, p.segment, p.line)
	_, have := c.where[n]
	if !ok || have || c.failed != nil {
		c.mu.Unlock()
		return
	}
	at := c.takeSlot()
	c.mu.Unlock()
	sum := sumOf(p.store, p.segment, p.line, p.data)
	if _, err := c.medium.WriteAt(p.data, lineAt(at)); err != nil {
		c.fail(fmt.Errorf("write slot %d: %w", at, err))
		return
	}
	c.written.Add(1)
	c.mu.Lock()
	c.enter(at, n, sum)
	c.mu.Unlock()
	c.dirty[at/slotsPer] = true
	if at%slotsPer == slotsPer-1 {
		c.writeTables()
	}
}

// takeSlot empties and returns the next slot round the medium that was not read since the last
// round; after a region's worth of those that were, it takes one all the same. mu is held.
func (c *Cache) takeSlot() uint32 {
	for skipped := 0; ; skipped++ {
		at := c.next
		c.next = (c.next + 1) % uint32(len(c.slots))
		if s := &c.slots[at]; s.used && skipped < slotsPer {
			s.used = false
			continue
		}
		c.leave(at)
		return at
	}
}

// writeTables writes the tables whose lines have changed.
func (c *Cache) writeTables() {
	for region := range c.dirty {
		delete(c.dirty, region)
		var entries [slotsPer]entry
		c.mu.RLock()
		failed := c.failed
		for i := range entries {
			if s := &c.slots[region*slotsPer+uint32(i)]; s.name != 0 {
				entries[i] = entry{c.stores[s.name>>48], uint32(s.name >> 16), uint16(s.name), s.sum}
			}
		}
		c.mu.RUnlock()
		if failed != nil {
			return
		}
		if _, err := c.medium.WriteAt(encodeTable(c.head.id, region, &entries), tableAt(region)); err != nil {
			c.fail(fmt.Errorf("write table %d: %w", region, err))
			return
		}
	}
}
