package initiator

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/ledge-storage/ledge/host/initiator/iscsi"
	"github.com/ledge-storage/ledge/target"
)

// Device is the LUN. All methods may be called concurrently.
type Device struct {
	cfg    Config
	cancel context.CancelFunc
	ctx    context.Context // ends with Close
	wg     sync.WaitGroup

	mu      sync.Mutex
	changed chan struct{} // closed and replaced when a path's state changes
	paths   []*path
	turn    int
	rank    int    // last given to a path
	unit    string // identity of the LUN, from the first path that was identified
	shape   shape
}

// shape is what reads and writes need to know of the LUN.
type shape struct {
	blocks     uint64
	blockBytes int
	limits     limits
}

// PathStatus is one portal as it is now.
type PathStatus struct {
	Portal    string             `json:"portal"`
	Connected bool               `json:"connected"`
	Access    target.AccessState `json:"-"`
	State     string             `json:"state"` // the access state, or "down"
	Group     uint16             `json:"group"`
	InUse     bool               `json:"in_use"`
	Error     string             `json:"error,omitempty"` // why it is not usable
}

// Open connects to all portals, and returns when one of them serves the LUN, or with ctx's error
// and each path's own. ErrConfig comes at once.
func Open(ctx context.Context, cfg Config) (*Device, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	probe := cfg.session(cfg.Portals[0], [6]byte{})
	if err := probe.Validate(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrConfig, err)
	}
	d := &Device{cfg: cfg, changed: make(chan struct{})}
	d.ctx, d.cancel = context.WithCancel(context.Background())
	for i, portal := range d.cfg.Portals {
		p := &path{d: d, portal: portal, kick: make(chan struct{}, 1), err: errors.New("connecting")}
		rand.Read(p.isid[:])
		p.isid[0] = 0x80 | p.isid[0]&0x3f
		p.isid[5] = byte(i) // two paths of a device are never the same nexus
		d.paths = append(d.paths, p)
	}
	for _, p := range d.paths {
		d.wg.Go(p.run)
	}
	if _, err := d.pick(ctx); err != nil {
		err = fmt.Errorf("initiator: open LUN %d of %s: %w%s", cfg.LUN, cfg.Target, err, d.pathErrors())
		d.Close()
		return nil, err
	}
	return d, nil
}

func (d *Device) pathErrors() (s string) {
	for _, p := range d.Paths() {
		if p.Error != "" {
			s += fmt.Sprintf("; %s: %s", p.Portal, p.Error)
		} else {
			s += fmt.Sprintf("; %s: %s", p.Portal, p.State)
		}
	}
	return s
}

// Close ends all sessions and waits for every goroutine. Calls that run end with ErrClosed.
func (d *Device) Close() error {
	d.cancel()
	d.wg.Wait()
	return nil
}

// Size is the capacity in bytes; it follows the target's.
func (d *Device) Size() int64 {
	s := d.currentShape()
	return int64(s.blocks) * int64(s.blockBytes)
}

// BlockBytes is the logical block size: 512 or 4096. It never changes.
func (d *Device) BlockBytes() int { return d.currentShape().blockBytes }

func (d *Device) currentShape() shape {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.shape
}

// Paths tells how each portal is.
func (d *Device) Paths() []PathStatus {
	d.mu.Lock()
	defer d.mu.Unlock()
	best := d.best()
	var out []PathStatus
	for _, p := range d.paths {
		s := PathStatus{Portal: p.portal, Connected: p.sess != nil, State: "down", Group: p.group}
		if p.sess != nil {
			s.Access, s.State = p.access, p.access.String()
			s.InUse = best != nil && p.serves(best)
		}
		if p.err != nil {
			s.Error = p.err.Error()
		}
		out = append(out, s)
	}
	return out
}

// notify wakes everybody who waits for a path. Whoever is best now stays so until it is lost or
// another is seen to become optimized: it gets a rank, which a path that merely connects has not.
// mu is held.
func (d *Device) notify() {
	if b := d.best(); b != nil && b.rank == 0 {
		d.rank++
		b.rank = d.rank
	}
	close(d.changed)
	d.changed = make(chan struct{})
}

// best is the path whose group gets the commands: optimized before non-optimized, and of those the
// one that became so last. mu is held.
func (d *Device) best() (best *path) {
	for _, p := range d.paths {
		if p.sess == nil || p.access != target.Optimized && p.access != target.NonOptimized {
			continue
		}
		if best == nil || p.access < best.access || p.access == best.access && p.rank > best.rank {
			best = p
		}
	}
	return best
}

// lease is a path chosen for one command.
type lease struct {
	p     *path
	sess  *iscsi.Session
	reset bool // the LUN must be reset first
}

// pick waits until a path is usable, and takes the paths of its group in turn.
func (d *Device) pick(ctx context.Context) (lease, error) {
	for {
		d.mu.Lock()
		if best := d.best(); best != nil {
			for range d.paths {
				d.turn++
				p := d.paths[d.turn%len(d.paths)]
				if p.sess == nil || !p.serves(best) || p.resetting {
					continue
				}
				l := lease{p: p, sess: p.sess, reset: p.owesReset}
				p.resetting = l.reset
				d.mu.Unlock()
				return l, nil
			}
		}
		changed := d.changed
		d.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return lease{}, ctx.Err()
		case <-d.ctx.Done():
			return lease{}, ErrClosed
		}
	}
}

// lost takes a path out of use whose session ended with a command unanswered, before the command is
// sent elsewhere.
func (d *Device) lost(l lease) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if l.p.sess == l.sess {
		l.p.leave(l.sess.Err())
		d.notify()
	}
}

// settleReset ends the lease's reset: done, or the session is given up and the reset stays owed.
func (d *Device) settleReset(l lease, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	l.p.resetting = false
	if err == nil {
		l.p.owesReset = false
	} else {
		l.sess.Kill(fmt.Errorf("reset: %w", err))
		if l.p.sess == l.sess {
			l.p.leave(err)
		}
	}
	d.notify()
}

// Pauses between attempts: short, because most reasons pass in milliseconds, then longer.
const (
	firstPause = time.Millisecond
	lastPause  = 200 * time.Millisecond
	maxLimited = 40 // attempts at what may never pass: 6 s or so
)

// exec sends one idempotent command until it is done, definitely failed, or ctx ends.
func (d *Device) exec(ctx context.Context, op string, c *iscsi.Command) error {
	c.LUN = d.cfg.LUN
	for attempt, bad := 0, 0; ; attempt++ {
		l, err := d.pick(ctx)
		if err != nil {
			return fmt.Errorf("initiator: %s: %w", op, err)
		}
		if l.reset {
			d.settleReset(l, l.sess.ResetLUN(ctx, d.cfg.LUN))
			continue
		}
		if err := l.sess.Do(ctx, c); err != nil {
			if errors.Is(err, iscsi.ErrSessionLost) {
				d.lost(l)
			}
			switch {
			case ctx.Err() != nil:
				return fmt.Errorf("initiator: %s: %w", op, ctx.Err())
			case errors.Is(err, iscsi.ErrSessionLost) || errors.Is(err, iscsi.ErrReset):
				continue
			}
			return fmt.Errorf("initiator: %s: %w", op, err)
		}
		v, code, err := judge(op, c)
		switch v {
		case done:
			return nil
		case failed:
			return err
		case limited:
			if bad++; bad == maxLimited {
				return err
			}
			l.p.probeSoon()
		case attention:
			if code == codeCapacityChanged || code == codeStateChanged || code>>8 == 0x3f {
				l.p.probeSoon()
			}
			if attempt < 8 { // a target that has nothing but attentions is paused for
				continue
			}
		case elsewhere:
			d.demote(l, code)
		}
		pause := min(firstPause<<min(attempt, 20), lastPause)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return fmt.Errorf("initiator: %s: %w", op, ctx.Err())
		case <-d.ctx.Done():
			return fmt.Errorf("initiator: %s: %w", op, ErrClosed)
		}
	}
}

// demote notes what a command learned of its path before the probe confirms it, so that the next
// command does not run into the same.
func (d *Device) demote(l lease, code uint16) {
	d.mu.Lock()
	defer d.mu.Unlock()
	l.p.probeSoon()
	state := map[uint16]target.AccessState{codeTransition: target.Transitioning, codeStandby: target.Standby, codeUnavailable: target.Unavailable, codeNoSuchLUN: target.Unavailable}
	if s, ok := state[code]; ok && l.p.sess == l.sess {
		l.p.enter(s)
		d.notify()
	}
}
