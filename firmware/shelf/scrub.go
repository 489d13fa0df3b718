package shelf

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/ledge-storage/ledge/raid"
)

// Scrub passes: every stripe of the metadata and of the allocated extents is verified, and repaired where it is bad. A
// pass that is cut goes on where it was; what is allocated behind its position waits for the next.

const (
	// scrubSave is how often the position is put into the superblock.
	scrubSave = 5 * time.Minute
	// scrubSlice is how often what was found is added to the status.
	scrubSlice   = 15 * time.Second
	scrubWorkers = 2
)

var errSlice = errors.New("shelf: a slice of the scrub is done")

type scrubMarkState uint8

const (
	scrubMarkIdle scrubMarkState = iota
	scrubMarkRunning
	scrubMarkPaused
)

// scrubMark is what the superblock keeps of the scrub. Times are Unix seconds, 0 for never.
type scrubMark struct {
	state    scrubMarkState
	position uint64
	began    uint64
	// base is when the time to the next pass began: the end of the last, or when the pool was first seen.
	base uint64
	now  scrubCounts
	// last is what the last whole pass found, from lastBegan to lastEnded.
	last                 scrubCounts
	lastBegan, lastEnded uint64
}

type scrubCounts struct {
	stripes, unwritten, bad, repaired, lost, unrecoverable, parity uint64
}

func (c *scrubCounts) fields() []*uint64 {
	return []*uint64{&c.stripes, &c.unwritten, &c.bad, &c.repaired, &c.lost, &c.unrecoverable, &c.parity}
}

const (
	scrubOffset = 256
	scrubBytes  = 8 + 8*5 + 2*7*8
)

func (m *scrubMark) fields() []*uint64 {
	fs := []*uint64{&m.position, &m.began, &m.base, &m.lastBegan, &m.lastEnded}
	return append(append(fs, m.now.fields()...), m.last.fields()...)
}

// encode writes the mark as doc.go's table of the superblock says.
func (m *scrubMark) encode(b []byte) {
	b[0] = byte(m.state)
	for i, f := range m.fields() {
		le.PutUint64(b[8+8*i:], *f)
	}
}

// decodeScrubMark takes any bytes: a mark that cannot be is none.
func decodeScrubMark(b []byte) (m scrubMark) {
	m.state = scrubMarkState(b[0])
	for i, f := range m.fields() {
		*f = le.Uint64(b[8+8*i:])
	}
	if m.state > scrubMarkPaused {
		return scrubMark{}
	}
	return m
}

func (c *scrubCounts) report(begin, end uint64) ScrubReport {
	return ScrubReport{Begin: unixTime(begin), End: unixTime(end), Stripes: c.stripes, Unwritten: c.unwritten, BadStrips: c.bad, Repaired: c.repaired,
		LostBlocks: c.lost, UnrecoverableStripes: c.unrecoverable, ParityErrors: c.parity}
}

func unixTime(s uint64) time.Time {
	if s == 0 {
		return time.Time{}
	}
	return time.Unix(int64(s), 0)
}

func (m *maintainer) unix() uint64 { return uint64(max(m.o.Now().Unix(), 1)) }

// scrubStatus makes the public picture. Called with mu held.
func (m *maintainer) scrubStatus() ScrubStatus {
	s := &m.scrub
	out := ScrubStatus{State: ScrubIdle, Total: m.a.Geometry().Stripes, Last: s.last.report(s.lastBegan, s.lastEnded)}
	switch s.state {
	case scrubMarkRunning:
		out.State = ScrubWaiting
		if m.status.Task == TaskScrub {
			out.State = ScrubRunning
		}
	case scrubMarkPaused:
		out.State = ScrubPaused
	case scrubMarkIdle:
		if m.o.ScrubEvery > 0 && !m.o.Off {
			out.Next = unixTime(s.base).Add(m.o.ScrubEvery)
		}
		return out
	}
	out.Position, out.Began, out.Now = s.position, unixTime(s.began), s.now.report(s.began, 0)
	return out
}

// scrubDue tells whether a pass shall begin by itself.
func (m *maintainer) scrubDue() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	s, now := &m.scrub, m.o.Now()
	if s.base == 0 || unixTime(s.base).After(now) { // the first time, or a clock that was wrong then
		s.base = m.unix()
	}
	return s.state == scrubMarkIdle && m.o.ScrubEvery > 0 && !m.o.Off && now.Sub(unixTime(s.base)) >= m.o.ScrubEvery
}

// newPass begins a pass at stripe 0. Called with mu held.
func (m *maintainer) newPass() {
	m.scrub.state, m.scrub.position, m.scrub.began, m.scrub.now = scrubMarkRunning, 0, m.unix(), scrubCounts{}
}

// saveScrub puts the mark as it is now into the superblock.
func (p *Pool) saveScrub(ctx context.Context) error {
	if err := p.admin.take(ctx); err != nil {
		return err
	}
	defer p.admin.give()
	p.keeper.mu.Lock()
	mark := p.keeper.scrub
	p.keeper.mu.Unlock()
	p.mu.Lock()
	next := p.sb
	p.mu.Unlock()
	if next.Scrub == mark {
		return nil
	}
	if mark.now.repaired != next.Scrub.now.repaired { // what was repaired below the position must not need the next pass
		if err := p.array.Flush(ctx); err != nil {
			return fmt.Errorf("shelf: save scrub: %w", err)
		}
	}
	next.Scrub = mark
	if err := p.logBlock(ctx, 0, next.encode(), func() { p.sb.Scrub = mark }); err != nil {
		return fmt.Errorf("shelf: save scrub: %w", err)
	}
	return nil
}

// order changes the mark for an operator, durably.
func (p *Pool) orderScrub(ctx context.Context, change func(s *scrubMark) bool) error {
	m := p.keeper
	if m == nil {
		return ErrNoMaintenance
	}
	if err := p.alive(); err != nil {
		return err
	}
	m.mu.Lock()
	ok := change(&m.scrub)
	m.mu.Unlock()
	if !ok {
		return ErrScrubState
	}
	err := p.saveScrub(ctx)
	m.poke()
	return err
}

// StartScrub begins a pass now, or goes on with one that is paused. ErrScrubState when one runs.
func (p *Pool) StartScrub(ctx context.Context) error { return p.startScrub(ctx, false) }

// StartScrubAcceptingOld begins a pass after a log was given up (raid.ScrubOptions.AcceptOld), in place of one that is paused: what that has
// behind it was not accepted. It holds until the pass ends or this controller does.
func (p *Pool) StartScrubAcceptingOld(ctx context.Context) error { return p.startScrub(ctx, true) }

func (p *Pool) startScrub(ctx context.Context, acceptOld bool) error {
	return p.orderScrub(ctx, func(s *scrubMark) bool {
		if s.state != scrubMarkRunning {
			p.keeper.acceptOld = acceptOld
		}
		switch {
		case s.state == scrubMarkIdle || s.state == scrubMarkPaused && acceptOld:
			p.keeper.newPass()
		case s.state == scrubMarkPaused:
			s.state = scrubMarkRunning
		default:
			return false
		}
		return true
	})
}

// PauseScrub stops the pass where it is, also over restarts, until StartScrub. ErrScrubState when none runs.
func (p *Pool) PauseScrub(ctx context.Context) error {
	return p.orderScrub(ctx, func(s *scrubMark) bool {
		if s.state != scrubMarkRunning {
			return false
		}
		s.state = scrubMarkPaused
		return true
	})
}

// StopScrub ends the pass: the next begins at stripe 0. ErrScrubState when none runs or is paused.
func (p *Pool) StopScrub(ctx context.Context) error {
	return p.orderScrub(ctx, func(s *scrubMark) bool {
		if s.state == scrubMarkIdle {
			return false
		}
		s.state, s.position, s.base, p.keeper.acceptOld = scrubMarkIdle, 0, p.keeper.unix(), false
		return true
	})
}

// scrubPass goes on with the pass, or begins one that is due.
func (m *maintainer) scrubPass(ctx context.Context, w work) (err error) {
	m.mu.Lock()
	if m.scrub.state == scrubMarkIdle {
		m.newPass()
	}
	from, began, acceptOld := m.scrub.position, m.scrub.began, m.acceptOld
	m.mu.Unlock()
	defer func() {
		if e := m.p.saveScrub(ctx); err == nil {
			err = e
		}
	}()
	saved := time.Now()
	total := m.a.Geometry().Stripes
	for from < total {
		if time.Since(saved) >= scrubSave {
			if err := m.p.saveScrub(ctx); err != nil {
				return err
			}
			saved = time.Now()
		}
		slice := time.Now()
		r, err := m.a.ScrubAll(ctx, raid.ScrubOptions{From: from, Used: m.p.holds, Workers: scrubWorkers, Progress: m.progress, AcceptOld: acceptOld,
			Pace: func(ctx context.Context, bytes int64) error {
				if time.Since(slice) >= scrubSlice {
					return errSlice
				}
				return m.pace(ctx, w, bytes)
			}})
		from = r.Next
		if !m.passed(began, &r) {
			return errPreempted
		}
		if err != nil && !errors.Is(err, errSlice) {
			return err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if s := &m.scrub; s.state == scrubMarkRunning && s.began == began {
		s.state, s.position, s.base, m.acceptOld = scrubMarkIdle, 0, m.unix(), false
		s.last, s.lastBegan, s.lastEnded = s.now, s.began, s.base
		m.p.opts.Logger.Info("scrub: pass ended", "stripes", s.last.stripes, "bad_strips", s.last.bad, "repaired", s.last.repaired,
			"lost_blocks", s.last.lost, "unrecoverable_stripes", s.last.unrecoverable, "parity_errors", s.last.parity)
	}
	return nil
}

// passed adds up what was found; false: the pass was paused or ended meanwhile.
func (m *maintainer) passed(began uint64, r *raid.ScrubReport) bool {
	c := scrubCounts{stripes: r.Stripes, unwritten: r.Unwritten, bad: r.Rotten + r.Stale + r.Unreadable, repaired: r.Repaired, lost: r.LostBlocks,
		unrecoverable: r.Lost - r.Mismatched, parity: r.Mismatched}
	for _, stripe := range r.Unrecoverable {
		// A write that was cut is in the overlay again, and written whole: that is no loss.
		if c.unrecoverable > 0 && m.p.isDirty(stripe) {
			c.unrecoverable--
		} else {
			m.p.opts.Logger.Error("scrub: a stripe cannot be repaired", "stripe", stripe)
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	s := &m.scrub
	if s.state == scrubMarkIdle || s.began != began {
		return false
	}
	s.position = r.Next
	sum := s.now.fields()
	for i, f := range c.fields() {
		*sum[i] += *f
	}
	return s.state == scrubMarkRunning
}

// holds tells whether a stripe is the metadata's or an allocated extent's. It is true from before the first write of a
// stripe on; where it is false, the next write of the stripe is a whole one (path W of a new extent).
func (p *Pool) holds(stripe uint64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, ok := p.sb.metaOf(stripe); ok {
		return true
	}
	x := (stripe - p.sb.DataStripe) / uint64(p.sb.ExtentStripes)
	return x < uint64(p.sb.extents()) && p.table.entries[x].lun != 0
}

// Written tells whether somebody relies on what the members have of a stripe: the metadata's, and those that the map calls written. What
// lies elsewhere may be torn, and is overwritten whole before it is read.
func (p *Pool) Written(stripe uint64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, ok := p.sb.metaOf(stripe); ok {
		return true
	}
	if stripe < p.sb.DataStripe {
		return false
	}
	x, i := (stripe-p.sb.DataStripe)/uint64(p.sb.ExtentStripes), (stripe-p.sb.DataStripe)%uint64(p.sb.ExtentStripes)
	return x < uint64(p.sb.extents()) && p.table.entries[x].lun != 0 && p.table.entries[x].written>>i&1 != 0
}

// isDirty tells whether blocks of a stripe are in the overlay.
func (p *Pool) isDirty(stripe uint64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if meta, ok := p.sb.metaOf(stripe); ok {
		return p.over.stripe(extentKey{0, meta}, 0) != nil
	}
	x := (stripe - p.sb.DataStripe) / uint64(p.sb.ExtentStripes)
	if x >= uint64(p.sb.extents()) || p.table.entries[x].lun == 0 {
		return false
	}
	e := &p.table.entries[x]
	return p.over.stripe(extentKey{e.lun, e.ext}, int((stripe-p.sb.DataStripe)%uint64(p.sb.ExtentStripes))) != nil
}
