package cache

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"
)

// The path of a line to the medium:
//
//  1. Write asks the ghost, copies the line and queues it, or drops it.
//  2. The writer (put) encodes it into the region that is being filled, in memory. From here on it is found.
//  3. A region that is full goes to the flusher (flush): lines in one sweep, barrier, table. A second one
//     fills meanwhile. One that fills slowly is written as far as it is every 10 s.
//  4. The next region round the medium is taken (reclaim): those of its lines that were read most since they were
//     written, at most a quarter, are read back and written again with the new ones; of the
//     rest the ghost remembers those that were read at all.
//
// Writing round the medium in whole regions is what a flash drive's own log likes best: its blocks
// become invalid all at once, and it has nothing to move. Keeping what was read is CLOCK, or
// S3-FIFO's main queue, on regions. Passing over lines that stay, instead of writing them again,
// would only hide that from our figures: the drive would have to move them.

const (
	keepPart  = 8       // one in so many lines of a region may stay
	pieceSize = 1 << 20 // of one write
)

// buffer is a region in memory.
type buffer struct {
	region, used, written uint32 // slots used, and of these those on the medium
	sequence              uint64
	data                  []byte
	stores                int // distinct
	seen                  [maxStores]bool
}

func (b *buffer) slot(l *layout, i uint32) []byte {
	return b.data[int(i)*l.slotBytes : int(i+1)*l.slotBytes]
}

// writeLoop is the writer.
func (c *Cache) writeLoop() {
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	for {
		select {
		case p, more := <-c.queue:
			if !more {
				c.finish()
				return
			}
			c.put(&p)
		case r := <-c.resizes:
			r.done <- c.resize(r.bytes)
		case <-ticker.C:
			c.everyTick()
		}
	}
}

// everyTick retries a medium that failed, and every 10 s makes durable what there is.
func (c *Cache) everyTick() {
	c.retry()
	now := c.opt.now()
	if c.index == nil || now.Sub(c.lastFlush) < checkpoint || c.bypassed.Load() || c.full.Load() {
		return
	}
	c.lastFlush = now
	if b := c.filling; b != nil && b.used > b.written {
		c.writeOut(b)
	}
	if c.unsynced.Swap(false) {
		if err := c.slow(c.medium.Sync); err != nil {
			c.writeFault(fmt.Errorf("sync: %w", err))
		}
	}
}

func (c *Cache) flushLoop() {
	for b := range c.flushes {
		c.flush(b)
	}
}

// put takes one line into the region that is being filled.
func (c *Cache) put(p *put) {
	defer c.lines.Put(p.data)
	if c.bypassed.Load() || c.full.Load() || c.filling == nil && !c.fillNext() {
		c.dropped.Add(1)
		return
	}
	c.mu.Lock()
	s, ok := c.addStore(p.store)
	n := nameOf(s, p.segment, p.line)
	_, have := c.index.find(n)
	c.mu.Unlock()
	if have {
		return
	}
	b := c.filling
	if ok && !b.seen[s] && b.stores == tableStores { // no room for one more in the table
		if c.turn(b); !c.fillNext() {
			ok = false
		}
		b = c.filling
	}
	if !ok {
		c.dropped.Add(1)
		return
	}
	full := c.lineName(p.store, p.segment, p.line)
	encodeLine(b.slot(&c.layout, b.used), &full, p.data)
	c.mu.Lock()
	c.take(b, n)
	c.mu.Unlock()
	c.written.Add(1)
	if b.used == c.layout.perRegion {
		c.turn(b)
	}
}

// take says that the buffer's next slot holds a line. mu is held.
func (c *Cache) take(b *buffer, n name) {
	if s := n.store(); !b.seen[s] {
		b.seen[s] = true
		b.stores++
	}
	c.index.put(b.region*c.layout.perRegion+b.used, n)
	b.used++
}

// turn hands a region to the flusher; the last one is through, or this waits.
func (c *Cache) turn(b *buffer) {
	other := <-c.free // the flusher's
	c.mu.Lock()
	c.filling, c.flushing = nil, b
	c.mu.Unlock()
	c.free <- other
	if c.opt.inline {
		c.flush(b)
		return
	}
	c.flushes <- b
}

// drained says that the flusher has nothing to do.
func (c *Cache) drained() bool {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.flushing == nil
}

// fillNext takes the next region round the medium to be filled.
func (c *Cache) fillNext() bool {
	if err := c.mark(); err != nil {
		c.writeFault(fmt.Errorf("mark as in use: %w", err))
		return false
	}
	b := <-c.free
	c.sequence++
	c.life.Store(c.sequence)
	*b = buffer{region: c.next, sequence: c.sequence, data: b.data}
	c.next = (c.next + 1) % c.layout.regions
	c.reclaim(b)
	return true
}

// reclaim empties the region that b will replace, and keeps in b those lines that were read most.
func (c *Cache) reclaim(b *buffer) {
	type kept struct {
		slot uint32
		name name
	}
	var keep []kept
	first := b.region * c.layout.perRegion
	c.mu.RLock()
	for slot := first; slot < first+c.layout.perRegion; slot++ {
		if n := c.index.at(slot); n.hits() > 0 {
			keep = append(keep, kept{slot, n})
		}
	}
	c.mu.RUnlock()
	slices.SortStableFunc(keep, func(x, y kept) int { return cmp.Compare(y.name.hits(), x.name.hits()) })
	keep = keep[:min(len(keep), int(c.layout.perRegion/keepPart))]
	good := keep[:0]
	for _, k := range keep {
		if c.bypassed.Load() {
			break
		}
		if c.readBack(b.slot(&c.layout, uint32(len(good))), k.slot, k.name) {
			good = append(good, k)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	left := map[name]bool{}
	for slot := first; slot < first+c.layout.perRegion; slot++ {
		if n := c.index.remove(slot); n != 0 {
			left[n.bare()] = true
			if n.hits() > 0 {
				c.ghost.remember(n)
			}
		}
	}
	c.roomy.Store(len(left) == 0) // nothing was displaced: room for all comers
	c.seqs[b.region] = b.sequence
	for _, k := range good {
		// One that was forgotten meanwhile keeps its slot, unnamed.
		if left[k.name.bare()] {
			delete(left, k.name.bare())
			c.take(b, k.name.withHits(k.name.hits()-1))
			c.kept.Add(1)
		} else {
			b.used++
		}
	}
	c.evicted.Add(uint64(len(left)))
	c.filling = b
}

// readBack reads a whole line into a slot of a buffer, and verifies it.
func (c *Cache) readBack(to []byte, slot uint32, n name) bool {
	o := c.ops.Get().(*op)
	c.mu.RLock()
	want := c.lineName(c.stores[n.store()], n.segment(), n.line())
	o.m, o.n, o.off = c.medium, c.layout.slotBytes, c.layout.slotAt(slot)
	c.mu.RUnlock()
	err := c.readOp(o)
	if errors.Is(err, errLate) {
		c.readFault(err)
		return false
	}
	defer c.ops.Put(o)
	if err == nil {
		p := c.lines.Get().([]byte)
		defer c.lines.Put(p)
		err = decodeLine(p, o.buf[:o.n], &want, 0)
	}
	if err != nil {
		c.readFault(err)
		return false
	}
	copy(to, o.buf[:o.n])
	return true
}

// flush writes a region that is full, and frees its buffer.
func (c *Cache) flush(b *buffer) {
	late := c.writeOut(b)
	c.mu.Lock()
	c.flushing = nil
	c.mu.Unlock()
	if late {
		b = &buffer{data: alignedBytes(len(b.data))} // the old one is still being written
	}
	c.free <- b
}

// writeOut writes what is new in a region, then its table. If that fails the region's lines are gone.
func (c *Cache) writeOut(b *buffer) (late bool) {
	from, to := b.written, b.used
	err := c.writeRegion(b, from, to)
	if err == nil {
		b.written = to
		return false
	}
	c.mu.Lock()
	first := b.region * c.layout.perRegion
	for slot := first; slot < first+c.layout.perRegion; slot++ {
		c.index.remove(slot)
	}
	c.mu.Unlock()
	c.writeFault(fmt.Errorf("write region %d: %w", b.region, err))
	return errors.Is(err, errLate)
}

func (c *Cache) writeRegion(b *buffer, from, to uint32) error {
	l, m := &c.layout, c.medium
	data, at := b.data[int(from)*l.slotBytes:int(to)*l.slotBytes], l.regionAt(b.region)+int64(from)*int64(l.slotBytes)
	for len(data) > 0 {
		piece := data[:min(pieceSize, len(data))]
		if err := c.writeBlocks(m, piece, at); err != nil {
			return err
		}
		data, at = data[len(piece):], at+int64(len(piece))
	}
	// The lines before the table that names them.
	if err := c.slow(m.Sync); err != nil {
		return err
	}
	c.unsynced.Store(true)
	return c.writeBlocks(m, c.tableOf(b), l.tableAt(b.region))
}

// writeBlocks writes to the medium; if it returns errLate, p is being written still.
func (c *Cache) writeBlocks(m medium, p []byte, at int64) error {
	err := c.slow(func() error { _, err := m.WriteAt(p, at); return err })
	if err == nil {
		c.mediumBytes.Add(uint64(len(p)))
	}
	return err
}

// tableOf makes the table of what is left of a region's lines.
func (c *Cache) tableOf(b *buffer) []byte {
	t := table{region: b.region, sequence: b.sequence}
	numbers := map[int]uint8{}
	c.mu.RLock()
	defer c.mu.RUnlock()
	for i := range b.used {
		n := c.index.at(b.region*c.layout.perRegion + i)
		if n == 0 {
			t.entries = append(t.entries, entry{})
			continue
		}
		s, ok := numbers[n.store()]
		if !ok {
			s = uint8(len(t.stores))
			numbers[n.store()] = s
			t.stores = append(t.stores, c.stores[n.store()])
		}
		t.entries = append(t.entries, entry{n.segment(), n.line(), s, n.hits()})
	}
	p := alignedBytes(blockBytes)
	copy(p, t.encode(c.head.id))
	return p
}

// mark says on the medium that it is being written, and from where on, before the first region is.
func (c *Cache) mark() error {
	if c.marked && !c.moved {
		return nil
	}
	if err := c.writeState(false); err != nil {
		return err
	}
	c.marked, c.moved = true, false
	return nil
}

func (c *Cache) writeState(clean bool) error {
	p, m := alignedBytes(blockBytes), c.medium
	s := state{c.head.id, clean, c.sequence, c.next}
	copy(p, s.encode())
	err := c.writeBlocks(m, p, stateAt)
	if err == nil {
		err = c.slow(m.Sync)
	}
	return err
}

// settle turns the region that is being filled, if there is something new in it, and waits for the flusher.
func (c *Cache) settle() {
	if b := c.filling; b != nil {
		if b.used > b.written && !c.bypassed.Load() && !c.full.Load() {
			c.turn(b)
		} else {
			c.mu.Lock()
			c.filling = nil
			c.mu.Unlock()
			c.free <- b
		}
	}
	one, two := <-c.free, <-c.free
	c.free <- one
	c.free <- two
}

// finish writes what is in memory and says that all is known; the last that the writer does.
func (c *Cache) finish() {
	if c.index != nil {
		c.settle()
		if c.marked && !c.bypassed.Load() && !c.full.Load() {
			if err := c.slow(c.medium.Sync); err != nil {
				c.writeFault(err)
			} else if err := c.writeState(true); err != nil {
				c.writeFault(fmt.Errorf("mark as closed: %w", err))
			}
		}
	}
	close(c.flushes)
	close(c.stop)
}
