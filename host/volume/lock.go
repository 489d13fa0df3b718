package volume

import (
	"context"
	"sync"
	"time"
)

// rangeLock gives requests that write the same blocks an order, from reading what a partial
// write needs until its place in the log is taken. It is not held while the log becomes
// durable. Requests that overlap take their turn in the order they came.
//
// Reads of several blocks hold their range while they read, shared among each other, so that none sees half of a
// write: what is pending and what is in segments is looked up block by block.
type rangeLock struct {
	mu   sync.Mutex
	held []*heldRange // holders and waiters, in the order they came
}

type heldRange struct {
	first, last uint64
	shared      bool
	gone        chan struct{}
}

// lock returns when blocks first to last-1 are the caller's, the function that gives them back, and how long it waited.
func (l *rangeLock) lock(ctx context.Context, first, last uint64) (unlock func(), waited time.Duration, err error) {
	return l.hold(ctx, &heldRange{first: first, last: last, gone: make(chan struct{})})
}

// share is lock for readers, who exclude writers only.
func (l *rangeLock) share(ctx context.Context, first, last uint64) (unlock func(), waited time.Duration, err error) {
	return l.hold(ctx, &heldRange{first: first, last: last, shared: true, gone: make(chan struct{})})
}

func (l *rangeLock) hold(ctx context.Context, me *heldRange) (func(), time.Duration, error) {
	l.mu.Lock()
	var before []*heldRange
	for _, h := range l.held {
		if h.first < me.last && me.first < h.last && !(h.shared && me.shared) {
			before = append(before, h)
		}
	}
	l.held = append(l.held, me)
	l.mu.Unlock()
	unlock := func() {
		l.mu.Lock()
		for i, h := range l.held {
			if h == me {
				l.held = append(l.held[:i], l.held[i+1:]...)
				break
			}
		}
		l.mu.Unlock()
		close(me.gone)
	}
	if len(before) == 0 {
		return unlock, 0, nil
	}
	start := time.Now()
	for _, h := range before {
		select {
		case <-h.gone:
		case <-ctx.Done():
			// Those behind wait for this range only, so it leaves after those before it.
			go func() {
				for _, h := range before {
					<-h.gone
				}
				unlock()
			}()
			return nil, time.Since(start), ctx.Err()
		}
	}
	return unlock, time.Since(start), nil
}
