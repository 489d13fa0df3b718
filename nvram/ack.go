package nvram

import (
	"context"
	"fmt"
	"time"
)

// Who acknowledges what. The log is in one of three states towards its mirror:
//
//	          partner silent for MirrorTimeout while an
//	          acknowledgement waits for it: EnterSolo(acked) ok
//	 sync ───────────────────────────────────────────────────► solo ◄──────────┐ session lost, or silent:
//	  ▲                                                          │              │ solo is still recorded
//	  │ LeaveSolo is called                     the backlog│is small      │
//	  │                                                          ▼              │
//	  └──────────────────────────────────────────────────────── joining ────────┘
//	          Session.Complete: the partner has all, durably
//
// sync and joining acknowledge what is durable in both; solo, what is durable here. The invariants:
//
//   - solo is entered only after EnterSolo returned nil, with the first LSN that is not acknowledged yet: all
//     below are in the mirror. While EnterSolo is under way nothing is acknowledged but what the mirror has.
//   - LeaveSolo is called only once the mirror has, durably, all that was ever acknowledged, and the partner
//     knows itself that it is complete. From Join on nothing new is acknowledged without it, so no write slips
//     between "the partner is complete" and "the members say so".
//   - once LeaveSolo was called its outcome does not matter: the log is in sync, and a partner lost now costs
//     another EnterSolo. An error only means that the members may still say solo, which is safe; it is retried.
//   - EnterSolo's failure fails the log. A fenced owner finds its reservation gone there, at the latest: it can
//     acknowledge neither with the partner, which took over and takes no frames, nor without.
//
// A log starts in sync with an unknown mirror: it acknowledges nothing until a session is complete or solo is
// recorded. Being lazy about solo (only a waiting acknowledgement enters it) keeps an idle pool whose link
// flaps able to fail over.
//
// A log that is fresh (Options.Fresh) acknowledges nothing at all until one of the two calls returned nil: whoever finds
// the members' word that nothing depends on it may drop it. So an owner that dies between its claim and its first
// acknowledgement, and whose NVRAM is lost with it, leaves a pool that either controller may own.
//
// The members are written by one goroutine (warden), one call at a time, in the order of its decisions.

// ErrSlow ends a session: the partner held an acknowledgement up for MirrorTimeout.
var ErrSlow = fmt.Errorf("%w: partner silent for too long", ErrStale)

// partner is what the log knows of its mirror. Log.mu guards it.
type partner struct {
	session  *Session
	synced   bool      // the session's partner is complete: mirrored counts
	mirrored uint64    // all below are durable at the partner
	solo     bool      // solo is recorded; with joining, acknowledgements wait for the mirror all the same
	joining  bool      //
	leave    bool      // LeaveSolo is due
	wanted   bool      // Settle waits
	fresh    bool      // the members say that nothing acknowledged is in the log: they must be told otherwise first
	forced   bool      // the mirror must be filled anew: solo, before its content is void
	since    time.Time // the last progress of what waits for the partner
	retry    time.Time // no LeaveSolo before
	armed    bool      // the warden looks again by itself
}

// needed: acknowledgements wait for the mirror.
func (p *partner) needed() bool { return !p.solo || p.joining }

// advance acknowledges what may be. Called with mu held whenever a record became durable here or there.
func (l *Log) advance() {
	for _, r := range l.pending {
		if r.lsn == l.durable && r.local {
			l.durable++
		} else if r.lsn >= l.durable {
			break
		}
	}
	limit := l.durable
	if l.partner.needed() {
		limit = min(limit, l.partner.mirrored)
	}
	if l.partner.fresh {
		limit = min(limit, l.acked)
	}
	if limit > l.acked && l.err == nil && !l.closed {
		l.acked = limit
		l.partner.since = l.opts.Clock.Now()
		l.retire()
		l.kick()
		l.poke(l.trim) // a Trim may have waited for it
	}
	if l.acked >= l.sb.runLSN && !l.settled {
		l.settled = true
		close(l.settle)
	}
	if l.held() && !l.partner.armed {
		l.partner.armed = true
		l.poke(l.wake)
	}
}

// held: the partner alone is what an acknowledgement waits for.
func (l *Log) held() bool {
	return l.partner.needed() && l.acked < l.durable && (len(l.pending) > 0 || l.partner.wanted)
}

// retire answers the Appends of acknowledged records.
func (l *Log) retire() {
	n := 0
	for _, r := range l.pending {
		if r.lsn >= l.acked {
			break
		}
		for _, q := range r.reqs {
			q.finish(r.lsn, nil)
		}
		r.reqs = nil
		if !r.pad {
			l.flying--
		}
		ln := &l.lane[r.lane]
		ln.live[ln.find(r.lsn)].rec = nil
		r.release()
		n++
	}
	m := copy(l.pending, l.pending[n:])
	clear(l.pending[m:])
	l.pending = l.pending[:m]
}

// decision is what the warden does next.
type decision int

const (
	decideNothing decision = iota
	decideEnter
	decideLeave
)

// warden decides when to go solo and when to leave it.
func (l *Log) warden() {
	for {
		l.mu.Lock()
		d, lsn, again := l.decide(l.opts.Clock.Now())
		l.mu.Unlock()
		switch d {
		case decideEnter:
			l.enterSolo(lsn)
			continue
		case decideLeave:
			l.leaveSolo()
			continue
		}
		var timer <-chan time.Time
		if again > 0 {
			timer = l.opts.Clock.After(again)
		}
		select {
		case <-l.wake:
		case <-timer:
		case <-l.failed:
			return
		case <-l.stop:
			return
		}
	}
}

// decide restores the invariants above. Called with mu held.
func (l *Log) decide(now time.Time) (d decision, lsn uint64, again time.Duration) {
	p := &l.partner
	p.armed = false
	if l.err != nil || l.closed {
		return decideNothing, 0, 0
	}
	if p.synced && (p.leave || p.solo && p.joining) && p.mirrored >= l.acked {
		if again = p.retry.Sub(now); again <= 0 {
			p.solo, p.joining, p.leave = false, false, true
			return decideLeave, 0, 0
		}
	}
	if p.forced && !p.solo {
		return decideEnter, l.acked, 0
	}
	p.forced = false
	if !l.held() {
		return decideNothing, 0, again
	}
	wait := l.opts.MirrorTimeout - now.Sub(p.since)
	if l.opts.Replicator == nil {
		wait = 0
	}
	switch {
	case wait > 0:
		p.armed = true
		if again > 0 {
			wait = min(wait, again)
		}
		return decideNothing, 0, wait
	case p.solo: // joining: give it up
		l.drop(ErrSlow)
		return decideNothing, 0, 0
	}
	return decideEnter, l.acked, 0
}

func (l *Log) enterSolo(lsn uint64) {
	err := l.witness(func(ctx context.Context) error { return l.opts.Witness.EnterSolo(ctx, lsn) })
	l.mu.Lock()
	defer l.mu.Unlock()
	p := &l.partner
	if err != nil {
		l.fail(fmt.Errorf("enter solo from lsn %d: %w", lsn, err))
		return
	}
	l.opts.Logger.Warn("nvram solo: only this controller has the writes", "log", l.id, "lsn", lsn)
	p.solo, p.joining, p.leave, p.forced, p.fresh = true, false, false, false, false
	l.drop(ErrSlow) // a partner that is connected is brought current by a new session
	l.advance()
}

func (l *Log) leaveSolo() {
	err := l.witness(func(ctx context.Context) error { return l.opts.Witness.LeaveSolo(ctx) })
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		l.opts.Logger.Warn("nvram: the mirror is complete, but the members could not be told", "log", l.id, "err", err)
		l.partner.retry = l.opts.Clock.Now().Add(time.Second)
		return
	}
	l.opts.Logger.Info("nvram mirror in sync", "log", l.id, "lsn", l.acked)
	l.partner.leave = false
	if l.partner.fresh {
		l.partner.fresh = false
		l.advance()
	}
}

func (l *Log) witness(call func(context.Context) error) error {
	if l.opts.Witness == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), l.opts.WitnessTimeout)
	defer cancel()
	stopped := make(chan struct{})
	defer close(stopped)
	go func() {
		select {
		case <-l.stop:
			cancel()
		case <-stopped:
		}
	}()
	return call(ctx)
}

// status in one word. In sync is said only when the members say so too: who reads it may order a takeover.
func (l *Log) status() MirrorStatus {
	p := &l.partner
	switch {
	case l.err != nil:
		return MirrorFailed
	case p.session != nil && !p.synced, p.solo && p.joining, p.leave:
		return MirrorResync
	case p.solo:
		return MirrorSolo
	case p.synced:
		return MirrorInSync
	}
	return MirrorWaiting
}
