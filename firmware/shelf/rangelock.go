package shelf

import (
	"context"
	"sync"
)

// rangeLock serialises operations on overlapping runs of a LUN's blocks, first come first served: a
// waiter also waits for waiters before it that it conflicts with, so that a large operation is not starved by
// small ones. Held across I/O by design: it orders what is on media, and the log must see overlapping
// writes in the order in which the overlay does.
//
// Reads of several blocks take part so that none sees half of an atomic write (target.Info.AtomicBlocks): what they
// find in the overlay and what they read from the members afterwards would else be of two times. They wait for, and
// are waited for by, writes of at most that length; longer operations may take minutes, are not atomic, and
// are passed.
type rangeLock struct {
	mu sync.Mutex
	// queue holds granted and waiting claims in order of arrival. Its length is bounded by the commands that
	// the target engine admits.
	queue []*claim
}

type claim struct {
	lo, hi  uint64 // blocks [lo, hi)
	granted chan struct{}
	open    bool // granted is closed
	access  access
}

type access uint8

const (
	accessWrite access = iota
	accessLong         // a write that is not atomic
	accessRead
)

// conflicts tells whether c and d must not be granted at a time.
func (c *claim) conflicts(d *claim) bool {
	reads := c.access == accessRead || d.access == accessRead
	writes := c.access == accessWrite || d.access == accessWrite
	return c.lo < d.hi && d.lo < c.hi && (!reads || writes)
}

// lock returns with [lo, hi) claimed, or ctx's error.
func (l *rangeLock) lock(ctx context.Context, lo, hi uint64, a access) (*claim, error) {
	c := &claim{lo: lo, hi: hi, access: a}
	l.mu.Lock()
	l.queue = append(l.queue, c)
	if l.free(len(l.queue) - 1) {
		c.open = true
		l.mu.Unlock()
		return c, nil
	}
	c.granted = make(chan struct{})
	l.mu.Unlock()
	select {
	case <-c.granted:
		return c, nil
	case <-ctx.Done():
		l.unlock(c)
		return nil, ctx.Err()
	}
}

// unlock gives c up, granted or not.
func (l *rangeLock) unlock(c *claim) {
	l.mu.Lock()
	defer l.mu.Unlock()
	at := -1
	for i, d := range l.queue {
		if d == c {
			at = i
			break
		}
	}
	l.queue = append(l.queue[:at], l.queue[at+1:]...)
	for i := at; i < len(l.queue); i++ {
		if d := l.queue[i]; !d.open && d.conflicts(c) && l.free(i) {
			d.open = true
			close(d.granted)
		}
	}
}

// free tells whether nothing before queue[i] conflicts with it.
func (l *rangeLock) free(i int) bool {
	for _, d := range l.queue[:i] {
		if d.conflicts(l.queue[i]) {
			return false
		}
	}
	return true
}
