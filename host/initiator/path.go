package initiator

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/ledge-storage/ledge/host/initiator/iscsi"
	"github.com/ledge-storage/ledge/target"
)

const (
	firstBackoff    = 50 * time.Millisecond
	searchInterval  = 200 * time.Millisecond // between probes while no path is usable
	probeSpacing    = 20 * time.Millisecond  // between probes, whoever asks for them
	probeTimeout    = 5 * time.Second
	maxProbeRetries = 10
	pageBytes       = 1024
)

// path is one portal and the session to it. It is
//
//	down ── login, identify ──► a state of SPC-4 ◄── probe, sense data ──► another state
//	  ▲                               │
//	  └── session lost, foreign unit ─┘
type path struct {
	d      *Device
	portal string
	isid   [6]byte
	kick   chan struct{}

	// Under d.mu.
	sess        *iscsi.Session // nil: down
	access      target.AccessState
	group, port uint16
	rank        int // when it was seen to become optimized; zero: it said so when we came
	owesReset   bool
	resetting   bool
	err         error
}

// serves tells whether p is as good as best. d.mu is held.
func (p *path) serves(best *path) bool {
	return p == best || p.group == best.group && p.access == best.access
}

// probeSoon asks for a probe.
func (p *path) probeSoon() {
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

// enter takes over a state that was learned on the living session. d.mu is held.
func (p *path) enter(s target.AccessState) {
	if s == target.Optimized && p.access != target.Optimized {
		p.d.rank++
		p.rank = p.d.rank
	}
	p.access = s
}

// leave takes the path down, whoever notices first that its session ended. Commands may be unanswered,
// and other paths to the same controller owe a reset, because it may still work on them. d.mu is held.
func (p *path) leave(err error) {
	if p.sess != nil {
		for _, q := range p.d.paths {
			if q != p && (q.group == p.group || q.group == 0) { // 0: not identified yet
				q.owesReset = true
			}
		}
	}
	p.sess, p.rank, p.err = nil, 0, err
}

// run is the path's goroutine.
func (p *path) run() {
	ctx, log := p.d.ctx, p.d.cfg.Logger.With("portal", p.portal)
	backoff, said := firstBackoff, ""
	for ctx.Err() == nil {
		cfg := p.d.cfg.session(p.portal, p.isid)
		sess, err := iscsi.Dial(ctx, cfg)
		if err == nil {
			var served bool
			served, err = p.serve(ctx, sess)
			sess.Close()
			if served {
				backoff, said = firstBackoff, ""
			}
		}
		p.d.mu.Lock()
		p.leave(err)
		p.d.notify()
		p.d.mu.Unlock()
		if ctx.Err() != nil {
			return
		}
		if s := fmt.Sprint(err); s != said { // once for each reason, not for each attempt
			log.Warn("path down", "error", err)
			said = s
		}
		pause := backoff/2 + rand.N(backoff/2+1)
		backoff = min(2*backoff, p.d.cfg.MaxBackoff)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}

// serve keeps the state of one session current until it ends. served says that the LUN was seen.
func (p *path) serve(ctx context.Context, sess *iscsi.Session) (served bool, err error) {
	var tpgs bool
	for {
		if !served {
			tpgs, err = p.identify(ctx, sess)
		} else {
			err = p.probe(ctx, sess, tpgs)
		}
		if err != nil {
			return served, err
		}
		served = true
		select {
		case <-time.After(probeSpacing):
		case <-sess.Dead():
			return served, sess.Err()
		case <-ctx.Done():
			return served, ErrClosed
		}
		select {
		case <-time.After(p.interval()):
		case <-p.kick:
		case <-sess.Dead():
			return served, sess.Err()
		case <-ctx.Done():
			return served, ErrClosed
		}
	}
}

func (p *path) interval() time.Duration {
	p.d.mu.Lock()
	defer p.d.mu.Unlock()
	if p.d.best() == nil {
		return min(searchInterval, p.d.cfg.ProbeInterval)
	}
	return p.d.cfg.ProbeInterval
}

// identify learns what is behind a new session, and then its state.
func (p *path) identify(ctx context.Context, sess *iscsi.Session) (tpgs bool, err error) {
	std, err := p.ask(ctx, sess, "INQUIRY", cdbInquiry(96), 96)
	if err != nil {
		return false, err
	}
	if len(std) < 6 || std[0] != 0 { // qualifier 0 and type 0: a disk that is connected
		return false, ErrNoLUN
	}
	tpgs = std[5]&0x30 != 0
	page, err := p.ask(ctx, sess, "INQUIRY page 83h", cdbVitalPage(0x83, pageBytes), pageBytes)
	if err != nil {
		return false, err
	}
	id, err := decodeIdentity(page)
	if err != nil {
		return false, err
	}
	d := p.d
	d.mu.Lock()
	if d.unit == "" {
		d.unit = id.unit
	}
	same := d.unit == id.unit
	p.group, p.port = id.group, id.port
	if p.group == 0 && sess.PortalGroup() > 0 {
		p.group = uint16(sess.PortalGroup())
	}
	d.mu.Unlock()
	if !same {
		return false, fmt.Errorf("%w: LUN %d is %s here, %s elsewhere", ErrForeign, d.cfg.LUN, id.unit, d.unit)
	}
	return tpgs, p.probe(ctx, sess, tpgs)
}

// probe asks for the access state and, where the path may serve, for the LUN's shape.
func (p *path) probe(ctx context.Context, sess *iscsi.Session, tpgs bool) error {
	state := target.Optimized // a target without ALUA
	if tpgs {
		b, err := p.ask(ctx, sess, "REPORT TARGET PORT GROUPS", cdbPortGroups(pageBytes), pageBytes)
		if err != nil {
			return err
		}
		groups, err := decodePortGroups(b)
		if err != nil {
			return err
		}
		var ok bool
		if state, ok = groups[p.group]; !ok {
			return fmt.Errorf("%w: port group %d is not among those reported", ErrMalformed, p.group)
		}
	}
	var s shape
	if state == target.Optimized || state == target.NonOptimized {
		var err error
		if s, err = p.measure(ctx, sess); err != nil {
			return err
		}
	}
	d := p.d
	d.mu.Lock()
	defer d.mu.Unlock()
	if sess.Err() != nil {
		return sess.Err()
	}
	if s.blockBytes != 0 {
		if d.shape.blockBytes != 0 && d.shape.blockBytes != s.blockBytes {
			return fmt.Errorf("%w: blocks of %d bytes became %d", ErrForeign, d.shape.blockBytes, s.blockBytes)
		}
		d.shape = s
	}
	switch {
	case p.sess != nil:
		if p.access != state {
			d.cfg.Logger.Info("path changed", "portal", p.portal, "from", p.access, "to", state)
		}
		p.enter(state)
	default:
		d.cfg.Logger.Info("path up", "portal", p.portal, "state", state)
		p.sess, p.access, p.err = sess, state, nil
		p.owesReset, p.resetting = p.owesReset && p.sameController(), false
	}
	d.notify()
	return nil
}

// sameController tells whether another path leads to p's controller: only then may a session other
// than the one that p's login reinstated have left commands there. d.mu is held.
func (p *path) sameController() bool {
	for _, q := range p.d.paths {
		if q != p && q.group == p.group {
			return true
		}
	}
	return false
}

// measure reads capacity and limits.
func (p *path) measure(ctx context.Context, sess *iscsi.Session) (s shape, err error) {
	b, err := p.ask(ctx, sess, "READ CAPACITY", cdbReadCapacity(32), 32)
	if err != nil {
		return s, err
	}
	if s.blocks, s.blockBytes, err = decodeCapacity(b); err != nil {
		return s, err
	}
	if b, err = p.ask(ctx, sess, "INQUIRY page B0h", cdbVitalPage(0xb0, 64), 64); err == nil {
		s.limits, err = decodeLimits(b)
	}
	if _, refused := err.(*SenseError); refused {
		err = nil // the page is optional
	}
	return s, err
}

// ask sends one command of the probe on this very session.
func (p *path) ask(ctx context.Context, sess *iscsi.Session, op string, c cdb, n int) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	cmd := iscsi.Command{LUN: p.d.cfg.LUN, CDB: c, In: make([]byte, n)}
	for i := 0; ; i++ {
		if err := sess.Do(ctx, &cmd); err != nil {
			return nil, err
		}
		v, code, err := judge(op, &cmd)
		switch {
		case v == done:
			return cmd.In[:cmd.Transferred], nil
		case err == nil && code == codeNoSuchLUN:
			return nil, ErrNoLUN
		case v == failed:
			return nil, err
		case i == maxProbeRetries:
			return nil, fmt.Errorf("initiator: %s: no good answer in %d attempts (status %#02x, code %04x)", op, i+1, cmd.Status, code)
		}
		if v != attention {
			select {
			case <-time.After(probeSpacing):
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
	}
}
