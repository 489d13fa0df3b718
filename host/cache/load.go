package cache

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"syscall"
)

const (
	stateAt = blockBytes
	copyAt  = 2 * blockBytes // of the head
	// A device counts as empty if these are zeros at its beginning and its end: there every file system,
	// partition table, RAID and volume manager leaves its mark.
	emptyBytes = 1 << 20

	badReads     = 64 // of tables, until the medium is given up
	suspectsPast = 2  // around the newest region, when it is not known for sure
	suspectsNext = 3
)

// isRefusal says that an error of attach is for the operator, and waiting won't help.
func isRefusal(err error) bool {
	for _, e := range []error{ErrForeign, ErrInUse, ErrSize, context.Canceled, context.DeadlineExceeded, fs.ErrPermission, errNoPath,
		syscall.ENOTDIR, syscall.EISDIR, syscall.EROFS} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// errNoPath: the directory is not there.
var errNoPath = errors.New("no such path")

// attach opens the medium and takes up what it holds.
func (c *Cache) attach(ctx context.Context) error {
	size, err := c.openMedium()
	if err != nil {
		return err
	}
	return c.adopt(ctx, size)
}

func (c *Cache) openMedium() (int64, error) {
	type opened struct {
		m    medium
		size int64
	}
	got := make(chan opened, 1)
	err := c.slow(func() error {
		defer close(got)
		m, size, err := c.opt.open()
		if errors.Is(err, fs.ErrNotExist) && !isDevice(c.opt.Path) {
			err = fmt.Errorf("%w: %w", errNoPath, err)
		}
		if err == nil {
			got <- opened{m, size}
		}
		return err
	})
	if errors.Is(err, errLate) {
		c.wg.Go(func() { // or it would be in use when it is opened again
			if o, ok := <-got; ok {
				o.m.Close()
			}
		})
	}
	if err != nil {
		return 0, fmt.Errorf("cache: open: %w", err)
	}
	o := <-got
	if o.size > maxBytes {
		c.log.Warn("cache uses 16 TiB of its medium, and not the rest", "bytes", o.size)
		o.size = maxBytes
	}
	c.mu.Lock()
	c.medium = o.m
	c.mu.Unlock()
	return o.size, nil
}

// again opens a bypassed medium anew, and goes on if it is still the one.
func (c *Cache) again() error {
	if c.medium != nil {
		c.medium.Close() // it failed; so may this
	}
	size, err := c.openMedium()
	if err != nil {
		return err
	}
	if c.index != nil && size >= c.layout.endBytes() {
		if h, err := c.readHead(); err != nil {
			return err
		} else if h == c.head {
			c.moved = true // nobody knows what it remembers
			return nil
		}
	}
	c.log.Warn("cache: the medium is not what it was; what was on it is forgotten")
	return c.adopt(context.Background(), size)
}

// readBlocks reads n bytes of metadata.
func (c *Cache) readBlocks(at int64, n int) ([]byte, error) {
	p, m := alignedBytes(n), c.medium
	if err := c.slow(func() error { return readFull(m, p, at) }); err != nil {
		return nil, fmt.Errorf("cache: read %d bytes at %d: %w", n, at, err)
	}
	return p, nil
}

// readHead returns the head, from its copy if need be; or errFresh, if the medium is to be formatted.
func (c *Cache) readHead() (h head, err error) {
	p, err := c.readBlocks(0, copyAt+blockBytes)
	if err != nil {
		return h, err
	}
	first, second := p[:blockBytes], p[copyAt:]
	if h, err = decodeHead(first); err == nil {
		return h, nil
	}
	if h, err = decodeHead(second); err == nil {
		c.log.Warn("cache: the head is damaged; its copy is used")
		return h, nil
	}
	if isOurs(first) || isOurs(second) {
		c.log.Warn("cache starts empty: its medium was written by another version, or is damaged")
		return h, errFresh
	}
	return h, nil
}

var errFresh = errors.New("to be formatted")

// isEmpty says whether nobody has marked the medium as his.
func (c *Cache) isEmpty(size int64) (bool, error) {
	n := int(min(emptyBytes, size/blockBytes*blockBytes))
	for _, at := range []int64{0, size/blockBytes*blockBytes - int64(n)} {
		p, err := c.readBlocks(at, n)
		if err != nil {
			return false, err
		}
		if !allZero(p) {
			return false, nil
		}
	}
	return true, nil
}

// adopt takes up what the medium holds, or formats it.
func (c *Cache) adopt(ctx context.Context, size int64) error {
	if size < minRegions*blockBytes {
		return fmt.Errorf("cache: %d bytes: %w", size, ErrSize)
	}
	h, err := c.readHead()
	if err != nil && !errors.Is(err, errFresh) {
		return err
	}
	if err == nil && h.regionBytes == 0 {
		if empty, err := c.isEmpty(size); err != nil {
			return err
		} else if !empty {
			return fmt.Errorf("cache %s: it holds something else and is not touched; if it may be lost, empty it (blkdiscard, or zeros over its first and last MiB): %w",
				c.opt.Path, ErrForeign)
		}
	}
	// It is ours, and may change its length.
	if r, ok := c.medium.(resizer); ok && c.opt.SizeBytes > size {
		if size, err = r.grow(min(c.opt.SizeBytes, maxBytes)); err != nil {
			return fmt.Errorf("cache: grow: %w", err)
		}
	}
	ideal := idealRegion(size)
	if c.opt.regionBytes != 0 {
		ideal = c.opt.regionBytes
	}
	switch {
	case h.regionBytes == 0: // new
	case h.lineBytes == c.opt.lineBytes && h.regionBytes/8 < ideal && ideal/8 < h.regionBytes:
		return c.load(ctx, h, size)
	default:
		c.log.Warn("cache starts empty: its medium was formatted for another size", "regionBytes", h.regionBytes, "now", ideal)
	}
	return c.format(head{regionBytes: ideal, lineBytes: c.opt.lineBytes}, size)
}

// format begins anew. Tables of an older formatting have another id.
func (c *Cache) format(h head, size int64) error {
	l, err := layoutOf(&h, size)
	if err != nil {
		return err
	}
	rand.Read(h.id[:])
	p, m := alignedBytes(copyAt+blockBytes), c.medium
	// Nothing but heads: whatever a power cut leaves of this is known as ours. A state is written when it's needed.
	copy(p, h.encode())
	copy(p[copyAt:], h.encode())
	err = c.slow(func() error { _, err := m.WriteAt(p, 0); return err })
	if err == nil {
		err = c.slow(m.Sync)
	}
	if err != nil {
		return fmt.Errorf("cache: format: %w", err)
	}
	c.start(h, l, newIndex(l.slots()), make([]uint64, l.regions), 0)
	return nil
}

// start takes up a medium whose tables are known.
func (c *Cache) start(h head, l layout, x *index, seqs []uint64, newest uint32) {
	for len(c.free) > 0 {
		<-c.free
	}
	for range cap(c.free) {
		c.free <- &buffer{data: alignedBytes(l.bufferBytes())}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.head, c.layout, c.index, c.seqs, c.ghost = h, l, x, seqs, newGhost(l.slots())
	c.filling, c.flushing, c.marked, c.moved, c.sequence = nil, nil, false, false, seqs[newest]
	c.life.Store(c.sequence)
	c.choose(newest)
}

// choose where to write next: behind the newest region, or where nothing is. mu is held.
func (c *Cache) choose(newest uint32) {
	c.next = 0
	if c.sequence > 0 {
		c.next = (newest + 1) % c.layout.regions
	}
	for i := range c.layout.regions {
		if r := (c.next + i) % c.layout.regions; c.seqs[r] == 0 {
			c.next = r
			break
		}
	}
	c.roomy.Store(c.seqs[c.next] == 0)
}

// load reads the tables, a group's at a time. One that is damaged costs its region's lines.
func (c *Cache) load(ctx context.Context, h head, size int64) error {
	l, err := layoutOf(&h, size)
	if err != nil {
		return err
	}
	var (
		x      = newIndex(l.slots())
		seqs   = make([]uint64, l.regions)
		newest uint32
		t      table
		bad    int
	)
	c.mu.Lock()
	c.stores, c.perStore = nil, nil
	c.mu.Unlock()
	for first := uint32(0); first < l.regions; first += l.perGroup {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(l.perGroup, l.regions-first)
		p, err := c.readTables(&l, first, n, &bad)
		if err != nil {
			return err
		}
		for i := range n {
			r := first + i
			if t.decode(h.id, r, p[i*blockBytes:(i+1)*blockBytes]) != nil || len(t.entries) > int(l.perRegion) || t.sequence == 0 {
				continue // never written, or torn: its lines are gone
			}
			seqs[r] = t.sequence
			if t.sequence > seqs[newest] {
				newest = r
			}
			c.enter(x, seqs, &l, &t)
		}
	}
	if err := c.suspect(x, seqs, &l, newest, c.readState(h)); err != nil {
		return err
	}
	if err := c.fit(c.medium, &l, size); errors.Is(err, errLate) {
		return err
	} else if err != nil {
		c.log.Warn("cache: its medium is not as long as it should be", "err", err)
	}
	c.start(h, l, x, seqs, newest)
	c.log.Info("cache found warm", "lines", x.lines, "of", l.slots())
	return nil
}

// enter puts the lines of a table into the index; of two places of a line the newer counts.
func (c *Cache) enter(x *index, seqs []uint64, l *layout, t *table) {
	var numbers [tableStores]int
	c.mu.Lock()
	for i, s := range t.stores {
		n, ok := c.addStore(s)
		if numbers[i] = n; !ok {
			numbers[i] = -1
		}
	}
	c.mu.Unlock()
	for i, e := range t.entries {
		if e.segment == 0 || numbers[e.store] < 0 {
			continue
		}
		n := nameOf(numbers[e.store], e.segment, e.line)
		if old, ok := x.find(n); ok {
			if seqs[old/l.perRegion] > t.sequence {
				continue
			}
			x.remove(old)
		}
		x.remove(t.region*l.perRegion + uint32(i))
		x.put(t.region*l.perRegion+uint32(i), n.withHits(e.hits))
	}
}

// readTables reads tables in one go; where that fails, one by one, those that can be read.
func (c *Cache) readTables(l *layout, first, n uint32, bad *int) ([]byte, error) {
	p, err := c.readBlocks(l.tableAt(first), int(n)*blockBytes)
	if err == nil || errors.Is(err, errLate) {
		return p, err
	}
	p = make([]byte, n*blockBytes)
	for i := range n {
		one, err := c.readBlocks(l.tableAt(first+i), blockBytes)
		if err == nil {
			copy(p[i*blockBytes:], one)
			continue
		}
		c.failures.Add(1)
		if *bad++; *bad > badReads || errors.Is(err, errLate) {
			return nil, err
		}
	}
	return p, nil
}

// readState returns the state, or zeros if there is none.
func (c *Cache) readState(h head) state {
	p, err := c.readBlocks(stateAt, blockBytes)
	if err != nil {
		return state{}
	}
	s, err := decodeState(p)
	if err != nil || s.id != h.id {
		return state{}
	}
	return s
}

// suspect drops, after a power cut, the regions that may have been overwritten without their tables telling: those
// around the newest, and those where writing went on when the state was written, if they are not the
// ones written just then. Their lines would be found out one by one; but a medium that seems to lie is bypassed.
func (c *Cache) suspect(x *index, seqs []uint64, l *layout, newest uint32, s state) error {
	if s.clean && s.sequence >= seqs[newest] || seqs[newest] == 0 { // newer ones may have been cut off
		return nil
	}
	for d := -suspectsPast; d <= suspectsNext; d++ {
		r := uint32((int(newest) + d + int(l.regions)) % int(l.regions))
		if d <= 0 && seqs[r] == seqs[newest]+uint64(d) {
			continue
		}
		if err := c.distrust(x, seqs, l, r); err != nil {
			return err
		}
	}
	for d := range suspectsNext + 1 {
		r := (s.next + uint32(d)) % l.regions
		if seqs[r] > s.sequence {
			continue
		}
		if err := c.distrust(x, seqs, l, r); err != nil {
			return err
		}
	}
	return nil
}

// distrust drops a region's lines, and its table.
func (c *Cache) distrust(x *index, seqs []uint64, l *layout, r uint32) error {
	if seqs[r] == 0 {
		return nil
	}
	for slot := r * l.perRegion; slot < (r+1)*l.perRegion; slot++ {
		x.remove(slot)
	}
	seqs[r] = 0
	if err := c.writeBlocks(c.medium, alignedBytes(blockBytes), l.tableAt(r)); errors.Is(err, errLate) {
		return err
	} // another error: tables that are wrong cost no more than misses
	return nil
}
