package shelf

import (
	"context"
	"sync"
)

// rangeLock serialises operations on overlapping runs of a LUN's blocks, first come first served: a
// waiter also waits for waiters before it that it overlaps, so that a large operation is not starved by
// small ones. Held across I/O by design: it orders what is on media, and the log must see overlapping
// writes in the order in which the overlay does.
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
}

func (c *claim) overlaps(d *claim) bool { return c.lo < d.hi && d.lo < c.hi }

// lock returns with [lo, hi) owned, or ctx's error.
func (l *rangeLock) lock(ctx context.Context, lo, hi uint64) (*claim, error) {
	c := &claim{lo: lo, hi: hi}
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
		if d := l.queue[i]; !d.open && d.overlaps(c) && l.free(i) {
			d.open = true
			close(d.granted)
		}
	}
}

// free tells whether nothing before queue[i] overlaps it.
func (l *rangeLock) free(i int) bool {
	for _, d := range l.queue[:i] {
		if d.overlaps(l.queue[i]) {
			return false
		}
	}
	return true
}
