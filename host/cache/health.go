package cache

import (
	"errors"
	"fmt"
	"sync"
	"time"
)

// A medium is believed until it has done wrong too often: errors, answers that are late, lines that are
// not what was written. Then it is bypassed, and tried again after a while, each time twice as
// long, up to five minutes. Reads and writes are judged apart: flash that is worn out can
// often be read still.
//
//	        faults, one more than forgiven              wait is over, nobody stuck in the medium,
//	serving ─────────────────────────────► bypassed     the head is ours still
//	   ▲                                      │
//	   └──────────────────────────────────────┘

const (
	readFaults  = 8                // forgiven at once
	forgiveOne  = 10 * time.Second // and each of these forgives one more
	minBackOff  = time.Second
	maxBackOff  = 5 * time.Minute
	backOffGood = 10 // a medium that serves ten times as long as it was bypassed starts from minBackOff again
)

type health struct {
	what      string
	forgiven  float64
	mu        sync.Mutex
	faults    float64
	last      time.Time
	why       error // nil: serving
	until     time.Time
	wait      time.Duration
	since     time.Time // serving again
	bypasses  uint64
	lastFault error
}

// fault counts one, and returns true if it was one too many.
func (h *health) fault(now time.Time, err error) (bypass bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.lastFault = err
	h.faults = max(0, h.faults-float64(now.Sub(h.last))/float64(forgiveOne)) + 1
	h.last = now
	if h.faults <= h.forgiven || h.why != nil {
		return false
	}
	h.trip(now, fmt.Errorf("cache: %s bypassed: %w", h.what, err))
	return true
}

// trip bypasses the medium, or for longer. mu is held.
func (h *health) trip(now time.Time, why error) {
	if h.why == nil {
		h.bypasses++
		if now.Sub(h.since) > backOffGood*h.wait {
			h.wait = 0
		}
	}
	h.wait = min(max(2*h.wait, minBackOff), maxBackOff)
	h.why, h.until, h.faults = why, now.Add(h.wait), 0
}

func (h *health) bypass(now time.Time, why error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.trip(now, why)
}

// due says whether it is time to try again.
func (h *health) due(now time.Time) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.why != nil && !now.Before(h.until)
}

func (h *health) serve(now time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.why, h.since = nil, now
}

func (h *health) err() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.why
}

// readFault judges a read that went wrong.
func (c *Cache) readFault(err error) {
	switch {
	case errors.Is(err, errLate):
		c.late.Add(1)
	case errors.Is(err, ErrCorrupt):
		c.bad.Add(1)
	default:
		c.failures.Add(1)
	}
	if c.reading.fault(c.opt.now(), err) {
		c.bypassed.Store(true)
		c.log.Error("cache bypassed: its medium fails; reads go to the shelf", "err", err)
	}
}

// writeFault judges a write that went wrong: one is enough.
func (c *Cache) writeFault(err error) {
	if errors.Is(err, errLate) {
		c.late.Add(1)
	} else {
		c.failures.Add(1)
	}
	if c.writing.fault(c.opt.now(), err) {
		c.full.Store(true)
		c.log.Error("cache takes no more: its medium fails writes; what it holds is read still", "err", err)
	}
}

// retry tries a bypassed medium again when it is time. The writer calls it.
func (c *Cache) retry() {
	now := c.opt.now()
	if c.stuck.Load() > 0 || c.foreign {
		return
	}
	if c.reading.due(now) && c.inflight.Load() == 0 && c.drained() {
		if err := c.again(); err != nil {
			c.reading.bypass(now, err)
			c.foreign = errors.Is(err, ErrForeign) // somebody else's now: never touched again
			return
		}
		c.reading.serve(now)
		c.bypassed.Store(false)
		c.log.Info("cache serves again")
	}
	if c.writing.due(now) && !c.bypassed.Load() {
		c.writing.serve(now)
		c.full.Store(false)
		c.log.Info("cache takes lines again")
	}
}
