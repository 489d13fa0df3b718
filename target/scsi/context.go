package scsi

import (
	"context"
	"sync"
	"time"
)

// taskContext is a context.Context that lives in its Task and makes its channel only when
// somebody asks for it, so that a command costs no allocation.
type taskContext struct {
	mu        sync.Mutex
	done      chan struct{}
	cancelled bool
}

func (c *taskContext) Deadline() (time.Time, bool) { return time.Time{}, false }
func (c *taskContext) Value(any) any               { return nil }

func (c *taskContext) Done() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.done == nil {
		c.done = make(chan struct{})
		if c.cancelled {
			close(c.done)
		}
	}
	return c.done
}

func (c *taskContext) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cancelled {
		return context.Canceled
	}
	return nil
}

func (c *taskContext) cancel() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cancelled {
		return
	}
	c.cancelled = true
	if c.done != nil {
		close(c.done)
	}
}

// used says that somebody may hold the channel or wait for it: the context must not serve
// another task.
func (c *taskContext) used() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.done != nil || c.cancelled
}
