package shelf

import (
	"context"
	"sync/atomic"
	"time"
)

// How background work shares the members with initiators. It works in steps (a stripe, a chunk) and calls pace before
// each; pace waits.
//
// What it looks at is the load: how many operations of initiators wait for members, on average over the last moments: 0
// on an idle pool, 1 when there is always one. At load u < 1 the work gets the part 1-u of the time: after a step that
// took w it waits w·u/(1-u). From 1 on, and while destage has to make room in the log, it waits as long as its floor
// allows: the rate below which it never falls by waiting, so that it always ends. Since work that is in the way makes
// initiators wait longer, and so the load higher, it gives way the more it is in the way; no figure of what the drives
// can do is needed.
//
// A rejected design: a fixed rate when busy. Set for flash it starves hosts on disks; set for disks, a rebuild
// takes days on flash that could give it a third of its time unnoticed.

// load measures how many operations wait for members: an integral over time of their number.
type load struct {
	waiting atomic.Int64
	sum     atomic.Int64 // of end minus begin of those that ended, minus begin of those that wait; ns
	epoch   time.Time
}

func (l *load) now() int64 { return int64(time.Since(l.epoch)) }

func (l *load) enter() {
	l.sum.Add(-l.now())
	l.waiting.Add(1)
}

func (l *load) leave() {
	l.waiting.Add(-1)
	l.sum.Add(l.now())
}

// integral is the time that operations have waited so far, all together. What enters or leaves while it reads makes it
// off by a moment.
func (l *load) integral(now int64) int64 { return l.sum.Load() + l.waiting.Load()*now }

const (
	// loadOver is the time over which load is averaged.
	loadOver = 100 * time.Millisecond
	// fullLoad is from where on only the floor counts.
	fullLoad = 0.97
	// leastWait is what a wait is worth a timer; less adds up.
	leastWait = 2 * time.Millisecond
)

// pacer makes one task wait.
type pacer struct {
	load    *load
	pressed func() bool // destage must make room

	last     time.Time // end of the last pace
	measured int64     // on the load's clock
	integral int64
	recent   float64
	debt     time.Duration
}

// begin starts a task.
func (c *pacer) begin() {
	c.last, c.debt, c.recent = time.Now(), 0, 0
	c.measured = c.load.now()
	c.integral = c.load.integral(c.measured)
}

// measure returns the load of the last moments.
func (c *pacer) measure() float64 {
	now := c.load.now()
	if over := now - c.measured; over >= int64(loadOver) {
		sum := c.load.integral(now)
		c.recent = max(0, float64(sum-c.integral)/float64(over))
		c.measured, c.integral = now, sum
		if c.pressed() {
			c.recent = 1
		}
	}
	return c.recent
}

// pace waits before a step of so many bytes. floor 0: not at all; most 0 or less: no upper bound. It leaves early, with
// woken, when wake says something; called again it waits for the rest.
func (c *pacer) pace(ctx context.Context, bytes, floor, most int64, wake <-chan struct{}) (throttled, woken bool, err error) {
	u := 0.0
	if floor > 0 {
		u = c.measure()
	}
	wait, throttled := waitFor(time.Since(c.last), u, bytes, floor, most)
	if c.debt += wait; c.debt >= leastWait {
		t := time.NewTimer(c.debt)
		defer t.Stop()
		began := time.Now()
		select {
		case <-t.C:
		case <-wake:
			c.debt -= wait
			return throttled, true, nil
		case <-ctx.Done():
			return throttled, false, context.Cause(ctx)
		}
		c.debt = max(c.debt-time.Since(began), -8*leastWait) // a timer that was late is made good
	}
	c.last = time.Now()
	return throttled, false, ctx.Err()
}

// waitFor is how long to wait after a step that took so long, at load u; throttled: because of the load.
func waitFor(took time.Duration, u float64, bytes, floor, most int64) (wait time.Duration, throttled bool) {
	at := func(rate int64) time.Duration {
		return max(0, time.Duration(float64(bytes)/float64(rate)*float64(time.Second))-took)
	}
	if floor > 0 && u > 0 {
		wait = at(floor)
		if u < fullLoad {
			wait = min(wait, time.Duration(float64(took)*u/(1-u)))
		}
		throttled = wait > took/8
	}
	if most > 0 {
		wait = max(wait, at(most))
	}
	return wait, throttled
}
