package cache

import (
	"errors"
	"fmt"
	"io"
)

// resize is a request to the writer.
type resize struct {
	bytes int64
	done  chan error
}

// resizer is a medium that can change its length.
type resizer interface {
	// grow makes the medium at least so long, if it can, and returns how much of these bytes it has.
	grow(bytes int64) (int64, error)
	// cut gives back what lies beyond.
	cut(bytes int64) error
}

func (f *file) grow(bytes int64) (int64, error) {
	end, err := f.Seek(0, io.SeekEnd)
	if err == nil && f.regular && bytes > end {
		err, end = f.Truncate(bytes), bytes
	}
	if bytes == 0 {
		return end, err
	}
	return min(bytes, end), err
}

func (f *file) cut(bytes int64) error {
	end, err := f.Seek(0, io.SeekEnd)
	if err == nil && f.regular && bytes < end {
		err = f.Truncate(bytes)
	}
	return err
}

// Resize changes how many bytes of the medium are used, while the cache serves; zero: all that the
// device has now. A file changes its length. What fits stays. Reads miss for as long as the index is
// made anew (about a second for 1 TB).
func (c *Cache) Resize(bytes int64) error {
	if c.opt.inline {
		return c.resize(bytes)
	}
	r := resize{bytes, make(chan error, 1)}
	select {
	case c.resizes <- r:
		return <-r.done
	case <-c.stop:
		return errors.New("cache: resize: closed")
	}
}

// resize: the writer's part, which is all.
func (c *Cache) resize(bytes int64) error {
	m, ok := c.medium.(resizer)
	if !ok || bytes < 0 || c.index == nil || c.bypassed.Load() || c.full.Load() {
		return errors.New("cache: resize: the medium is bypassed; try again when it serves")
	}
	c.settle()
	size, err := m.grow(min(bytes, maxBytes))
	if err != nil {
		return fmt.Errorf("cache: resize to %d: %w", bytes, err)
	}
	size = min(size, maxBytes)
	l, err := layoutOf(&c.head, size)
	if err != nil {
		return err
	}
	c.bypassed.Store(true)
	c.remap(&l)
	if c.reading.err() == nil {
		c.bypassed.Store(false)
	}
	c.opt.SizeBytes = bytes // for when it is opened again
	if err := c.fit(c.medium, &l, size); err != nil {
		return err
	}
	c.log.Info("cache resized", "bytes", size, "lines", c.Stats().Lines)
	return nil
}

// fit empties the tables of regions that are not used, and gives back their bytes. Otherwise they would be
// believed when the medium grows again, and name lines in a hole.
func (c *Cache) fit(m medium, l *layout, size int64) error {
	from, n := l.tableAt(l.regions-1)+blockBytes, l.perGroup-1-(l.regions-1)%l.perGroup
	p, err := c.readBlocks(from, int(n)*blockBytes)
	if err == nil && !allZero(p) {
		if err = c.writeBlocks(m, alignedBytes(len(p)), from); err == nil {
			err = c.slow(m.Sync)
		}
	}
	if r, ok := m.(resizer); ok && err == nil {
		err = c.slow(func() error { return r.cut(size) })
	}
	if err != nil {
		return fmt.Errorf("cache: fit into %d bytes: %w", size, err)
	}
	return nil
}

// remap makes the index for another number of regions.
func (c *Cache) remap(l *layout) {
	c.mu.Lock()
	defer c.mu.Unlock()
	x, seqs := newIndex(l.slots()), make([]uint64, l.regions)
	copy(seqs, c.seqs)
	for slot := range min(l.slots(), c.layout.slots()) {
		if n := c.index.at(slot); n != 0 {
			x.put(slot, n)
		}
	}
	c.index, c.seqs, c.layout, c.ghost = x, seqs, *l, newGhost(l.slots())
	c.moved = true
	newest := uint32(0)
	for r, s := range seqs {
		if s > seqs[newest] {
			newest = uint32(r)
		}
	}
	c.choose(newest)
}
