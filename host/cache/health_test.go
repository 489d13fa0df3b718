package cache

import (
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// A drive that hangs: reads come back as misses, at most so many are stuck in it, the cache is
// bypassed and says so; and when the drive answers again, the cache serves again.
func TestHang(t *testing.T) {
	d := newDisk(smallSize(32))
	o := small(d)
	o.inline, o.ReadTimeout, o.slowTimeout = false, 20*time.Millisecond, 50*time.Millisecond
	c := openWith(t, o)
	warm := func() {
		for line := range 64 {
			until(t, "a line is let in", func() bool { return fill(t, c, storeA, 1, line) })
		}
	}
	warm()
	until(t, "regions are on the drive", func() bool { return c.drained() })
	release := make(chan struct{})
	d.set(func() { d.hang = release })
	var wg sync.WaitGroup
	for range 3 * readers {
		wg.Go(func() {
			for line := range 48 { // the last region may be in memory
				if c.Read(storeA, 1, line, make([]byte, smallLine)) {
					t.Error("a hit from a drive that hangs")
				}
			}
		})
	}
	wg.Wait()
	s := c.Stats()
	if s.Err == nil || !errors.Is(s.Err, errLate) || s.Bypasses == 0 || s.Late < readFaults {
		t.Errorf("not reported: %+v", s)
	}
	if n := c.stuck.Load(); n == 0 || n > readers+2 {
		t.Errorf("%d requests are stuck", n)
	}
	if c.Read(storeA, 1, 63, make([]byte, smallLine)) {
		t.Error("a hit while bypassed")
	}
	c.Write(storeA, 9, 9, make([]byte, smallLine)) // returns
	close(release)
	d.set(func() { d.hang = nil })
	until(t, "it serves again", func() bool { return has(t, c, storeA, 1, 5) })
	if s := c.Stats(); s.Err != nil || s.LastFault == nil {
		t.Errorf("%+v", s)
	}
	warm()
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

// A drive that hangs when the cache ends: Close returns all the same. One that hangs when it
// starts: Open returns, and the cache comes up when the drive does.
func TestHangAtTheEnds(t *testing.T) {
	d := newDisk(smallSize(32))
	o := small(d)
	o.inline, o.ReadTimeout, o.slowTimeout = false, 20*time.Millisecond, 50*time.Millisecond
	release := make(chan struct{})
	d.hang = release
	c := openWith(t, o)
	if !errors.Is(c.Stats().Err, errLate) || has(t, c, storeA, 1, 1) {
		t.Errorf("a drive that hangs at start: %v", c.Stats().Err)
	}
	close(release)
	d.set(func() { d.hang = nil })
	until(t, "it serves", func() bool { return fill(t, c, storeA, 1, 1) })
	release = make(chan struct{})
	d.set(func() { d.hang = release })
	if err := c.Close(); err == nil {
		t.Error("closed, as if all was well")
	}
	close(release)
}

// Errors are forgiven a few times; then the cache is bypassed, longer each time, and returns.
func TestErrorsBypass(t *testing.T) {
	d := newDisk(smallSize(32))
	clock := fakeClock{time.Unix(1e9, 0)}
	o := small(d)
	o.now = clock.now
	c := openWith(t, o)
	for line := range 100 {
		fill(t, c, storeA, 1, line)
	}
	d.readErr = func() error { return errMedium }
	for line := range readFaults {
		if has(t, c, storeA, 1, line); c.Stats().Err != nil {
			t.Fatalf("bypassed after %d errors", line+1)
		}
	}
	if has(t, c, storeA, 1, 50); !errors.Is(c.Stats().Err, errMedium) {
		t.Fatalf("not bypassed: %v", c.Stats().Err)
	}
	wait := time.Duration(0)
	for range 12 { // each time about twice as long, up to the limit
		began := clock.t
		for until := c.reading.until; clock.t.Before(until); clock.t = clock.t.Add(time.Second / 2) {
			c.everyTick()
		}
		c.everyTick()
		if c.Stats().Err == nil {
			t.Fatal("a drive that fails still is believed again")
		}
		took := clock.t.Sub(began)
		if took < wait || took > maxBackOff+time.Second {
			t.Errorf("tried after %v, before that after %v", took, wait)
		}
		wait = took
	}
	d.readErr = nil
	clock.t = clock.t.Add(maxBackOff)
	c.stuck.Add(1) // somebody is in the medium still: nobody follows him
	if c.everyTick(); c.Stats().Err == nil {
		t.Error("a drive in which a request hangs is believed again")
	}
	c.stuck.Add(-1)
	c.everyTick()
	if s := c.Stats(); s.Err != nil || !has(t, c, storeA, 1, 60) || s.Bypasses != 1 || s.Failures < readFaults {
		t.Errorf("the drive is well again: %+v", s)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

// A drive that gives other data than was written is found out, and bypassed.
func TestLiarIsBypassed(t *testing.T) {
	d := newDisk(smallSize(32))
	c := openWith(t, small(d))
	for line := range 100 {
		fill(t, c, storeA, 1, line)
	}
	for k, b := range d.blocks {
		if k > 2*smallPer {
			b[77]++
		}
	}
	for line := range 100 {
		has(t, c, storeA, 1, line)
	}
	if s := c.Stats(); !errors.Is(s.Err, ErrCorrupt) || s.Bad <= readFaults || s.Bad > 2*readFaults {
		t.Errorf("%+v", s)
	}
}

// Flash that is worn out takes no more, but what it holds is read on.
func TestWornOut(t *testing.T) {
	d := newDisk(smallSize(32))
	clock := fakeClock{time.Unix(1e9, 0)}
	o := small(d)
	o.now = clock.now
	c := openWith(t, o)
	for line := range 96 {
		fill(t, c, storeA, 1, line)
	}
	d.onWrite = func(int64, int) error { return errMedium }
	for line := range 96 {
		fill(t, c, storeA, 2, line)
	}
	for line := range 96 {
		if !has(t, c, storeA, 1, line) {
			t.Fatalf("line %d is gone", line)
		}
	}
	if s := c.Stats(); s.Err == nil || !strings.Contains(s.Err.Error(), "writing") {
		t.Errorf("not reported: %v", s.Err)
	}
	d.onWrite = nil
	clock.t = clock.t.Add(maxBackOff)
	c.everyTick()
	for range 2 {
		fill(t, c, storeA, 3, 1)
	}
	if !has(t, c, storeA, 3, 1) || c.Stats().Err != nil {
		t.Errorf("does not write again: %v", c.Stats().Err)
	}
}

// While it was bypassed the drive was given to something else, or came back empty.
func TestMediumChanges(t *testing.T) {
	for _, foreign := range []bool{false, true} {
		d := newDisk(smallSize(32))
		clock := fakeClock{time.Unix(1e9, 0)}
		o := small(d)
		o.now = clock.now
		c := openWith(t, o)
		for line := range 96 {
			fill(t, c, storeA, 1, line)
		}
		d.readErr = func() error { return errMedium }
		for line := range 2 * readFaults {
			has(t, c, storeA, 1, line)
		}
		d.readErr = nil
		clear(d.blocks)
		if foreign {
			d.blocks[0] = make([]byte, blockBytes)
			d.blocks[0][99] = 1
		}
		var writes atomic.Int32
		d.onWrite = func(int64, int) error { writes.Add(1); return nil }
		for range 3 {
			clock.t = clock.t.Add(maxBackOff)
			c.everyTick()
		}
		if has(t, c, storeA, 1, 60) {
			t.Error("a line of another medium")
		}
		err := c.Stats().Err
		if foreign && (!errors.Is(err, ErrForeign) || writes.Load() > 0) {
			t.Errorf("somebody else's now: %v, %d writes", err, writes.Load())
		} else if !foreign && (err != nil || !fill(t, c, storeA, 2, 1) && !fill(t, c, storeA, 2, 1)) {
			t.Errorf("empty now: %v", err)
		}
	}
}

// Tables that can't be read, or are torn, cost their regions.
func TestTornTables(t *testing.T) {
	d := newDisk(smallSize(40))
	c := openWith(t, small(d))
	for segment := range uint32(4) {
		for line := range segmentLines {
			fill(t, c, storeA, segment+1, line)
		}
	}
	c.Close()
	all := held(c)
	l := c.layout
	d.blocks[l.tableAt(3)/blockBytes][100]++
	d.blocks[l.tableAt(20)/blockBytes][entriesAt]++
	if c = openWith(t, small(d)); held(c) != all-2*smallPer {
		t.Errorf("%d lines of %d, two tables are torn", held(c), all)
	}
	c.Close()
	fails := 0
	d.readErr = func() error { // the group's first read and one of its tables
		if fails++; fails == 2 || fails == 5 {
			return errMedium
		}
		return nil
	}
	if c = openWith(t, small(d)); held(c) < all-4*smallPer || c.Stats().Err != nil {
		t.Errorf("%d lines of %d, a table can't be read: %v", held(c), all, c.Stats().Err)
	}
}
