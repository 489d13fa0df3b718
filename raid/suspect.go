package raid

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"math/bits"
	"sync"
	"time"
)

// Members that err. A write that a member misses fails it at once (labels.go): it no longer has what it must have. A read
// that errs, hangs or does not verify loses nothing, parity answers and the strip is repaired; but a member that goes on
// like that costs latency, hides what redundancy is left, and one day dies. So each such event adds a point to the
// member's account, and points decay.
//
//	online ── SuspectAt points ──► suspect ── FailAt points ──► failed
//	   ◄── half of SuspectAt ────────┘
//
// Reads of data go round a suspect; writes, parity's checksum blocks (they tell lost writes), repairs, scrubs and one read
// in eight do not: so it can add to its account, or be seen to behave. What is tried on it must not be a
// danger, and is not: parity answers if it fails.
//
// One strip adds one point, however often it is read before it is repaired: a rotten block is not a rotten member.
//
// A suspect that is not failed still has nearly all of its strips, and is the better of two when another member rots too. So
// it is failed only when a stripe can lose a further strip afterwards; with one parity strip, where that is never so,
// only when a spare column is free for a rebuild to begin at once. Nor while more members are suspect than parity stands
// for: that is a cable, a controller or a power supply, and failing drives would make it worse. It stays suspect
// then, and Status says so: the operator may know better (FailMember, Replace).

func (s *Suspicion) withDefaults() {
	if s.SuspectAt == 0 {
		s.SuspectAt = 8
	}
	if s.FailAt == 0 {
		s.FailAt = 32
	}
	if s.HalfLife == 0 {
		s.HalfLife = 10 * time.Minute
	}
	if s.Now == nil {
		s.Now = time.Now
	}
}

const (
	// probeEvery-th read of a suspect is tried all the same.
	probeEvery = 8
	// hangEvery: reads that wait for a hung member add a point once in this time.
	hangEvery = time.Second
)

// account is a member's.
type account struct {
	mu       sync.Mutex
	points   float64
	at       time.Time // of points
	lastHang time.Time
	lastErr  string
	lastAt   time.Time
	// recent are the last stripes that added a point, plus one: they do not add another.
	recent [8]uint64
	next   int
	probes uint64
}

// decay brings the points to now; mu is held.
func (c *account) decay(now time.Time, halfLife time.Duration) {
	if dt := now.Sub(c.at); dt > 0 {
		c.points *= math.Exp2(-dt.Seconds() / halfLife.Seconds())
		c.at = now
	}
}

// blame notes that a read of a stripe's strip on a member went wrong.
func (a *Array) blame(m *member, stripe uint64, what string) {
	a.charge(m, fmt.Sprintf("%s, stripe %d", what, stripe), func(c *account, now time.Time) bool {
		for _, s := range c.recent {
			if s == stripe+1 {
				return false
			}
		}
		c.recent[c.next%len(c.recent)] = stripe + 1
		c.next++
		return true
	})
}

// blameHang notes that a read would have waited for a member that hangs.
func (a *Array) blameHang(m *member) {
	a.charge(m, "does not answer", func(c *account, now time.Time) bool {
		if now.Sub(c.lastHang) < hangEvery {
			return false
		}
		c.lastHang = now
		return true
	})
}

func (a *Array) charge(m *member, what string, counts func(*account, time.Time) bool) {
	s := &a.opts.Suspicion
	now := s.Now()
	c := &m.account
	c.mu.Lock()
	defer c.mu.Unlock()
	c.decay(now, s.HalfLife)
	c.lastErr, c.lastAt = what, now
	if !counts(c, now) || s.Off {
		return
	}
	c.points++
	if c.points >= s.SuspectAt && !m.suspect.Swap(true) {
		a.log(slog.LevelWarn, "raid: member is suspect", "member", m.index, "points", c.points, "last", what)
	}
	if s.FailAt > 0 && c.points >= s.FailAt {
		a.guilty.Or(1 << m.index)
	}
}

// avoid tells whether a read should go round a member.
func (a *Array) avoid(m *member) bool {
	if !m.suspect.Load() {
		return false
	}
	s := &a.opts.Suspicion
	c := &m.account
	c.mu.Lock()
	defer c.mu.Unlock()
	c.decay(s.Now(), s.HalfLife)
	if c.points < s.SuspectAt/2 {
		m.suspect.Store(false)
		a.log(slog.LevelInfo, "raid: member is no longer suspect", "member", m.index)
		return false
	}
	c.probes++
	return c.probes%probeEvery != 0
}

// sentence fails members whose account says so, if redundancy allows. It holds no stripe when it is called.
func (a *Array) sentence() {
	if a.guilty.Load() == 0 {
		return
	}
	guilty := a.guilty.Swap(0) // a member that stays will be named again by its next error
	if a.opts.ReadOnly || a.Err() != nil || !a.ready.Load() {
		return
	}
	for guilty != 0 {
		index := bits.TrailingZeros64(guilty)
		guilty &^= 1 << index
		if err := a.mayFail(index); err != nil {
			a.log(slog.LevelWarn, "raid: suspect member is kept", "member", index, "err", err)
			continue
		}
		a.log(slog.LevelError, "raid: suspect member is failed", "member", index)
		if err := a.fail(1 << index); err != nil {
			return // latched; the next call hears of it
		}
	}
}

// mayFail says why a suspect must stay.
func (a *Array) mayFail(index int) error {
	parity := a.layout.Parity()
	a.mu.Lock()
	defer a.mu.Unlock()
	gone, suspects := uint64(1)<<index, 0
	for _, m := range a.members {
		if m.state != Online {
			gone |= 1 << m.index
		} else if m.suspect.Load() {
			suspects++
		}
	}
	free := false
	for j := range a.label.Spares {
		free = free || a.label.SpareOf[j] == 0 && a.label.RebuildSpare != j
	}
	if lost := a.label.lost(gone); lost >= parity && !(parity == 1 && lost == 1 && free) {
		return fmt.Errorf("%d members would be lost, parity stands for %d: %w", lost, parity, ErrRedundancy)
	}
	if suspects > parity {
		return fmt.Errorf("%d members are suspect at once: %w", suspects, ErrRedundancy)
	}
	if n := a.label.N; n-bits.OnesCount64(gone) < majority(n) {
		return fmt.Errorf("too few members would carry the label: %w", ErrNoMajority)
	}
	return nil
}

// FailMember records a member as failed, as if it had missed a write. Without force it refuses (ErrRedundancy) when no
// stripe could lose a further strip afterwards; with force, when a stripe would be beyond parity. nil if it is failed
// already; ErrRange: there is no such member.
func (a *Array) FailMember(ctx context.Context, index int, force bool) error {
	if err := a.enter(); err != nil {
		return err
	}
	defer a.leave()
	if err := ctx.Err(); err != nil {
		return err
	}
	if index < 0 || index >= a.Geometry().N {
		return fmt.Errorf("raid: fail member %d: %w", index, ErrRange)
	}
	if err := a.prepareToWrite(); err != nil {
		return fmt.Errorf("raid: fail member %d: %w", index, err)
	}
	a.labelMu.Lock()
	defer a.labelMu.Unlock()
	a.mu.Lock()
	gone, parity, n := uint64(1)<<index, a.layout.Parity(), a.label.N
	failed := a.members[index].state == Failed
	for _, m := range a.members {
		if m.state != Online {
			gone |= 1 << m.index
		}
	}
	lost := a.label.lost(gone)
	a.mu.Unlock()
	switch {
	case failed:
		return nil
	case lost > parity || n-bits.OnesCount64(gone) < majority(n):
		return fmt.Errorf("raid: fail member %d: %d members would be lost, parity stands for %d: %w", index, lost, parity, ErrRedundancy)
	case lost == parity && !force:
		return fmt.Errorf("raid: fail member %d: no redundancy would be left (only with force): %w", index, ErrRedundancy)
	}
	a.log(slog.LevelWarn, "raid: member is failed on request", "member", index)
	return a.changeLabel(func(l *Label) {
		l.Failed |= 1 << index
		a.dropRestore(l, 1<<index)
	})
}

// describeMember fills in what Status says of a member beyond its counters; Array.mu is held.
func (a *Array) describeMember(ms *MemberStatus, m *member, total uint64) {
	l := &a.label
	ms.ID = l.IDs[m.index]
	if m.drive != nil {
		ms.Bytes = m.drive.Size()
		if s, ok := m.drive.(interface{ Serial() string }); ok {
			ms.Serial = s.Serial()
		}
	}
	c := &m.account
	c.mu.Lock()
	c.decay(a.opts.Suspicion.Now(), a.opts.Suspicion.HalfLife)
	ms.Points, ms.LastError, ms.LastErrorAt = c.points, c.lastErr, c.lastAt
	c.mu.Unlock()
	var kind JobKind
	switch {
	case l.Restore.Member() == m.index && l.Restore.Reuse:
		kind = JobReadd
	case l.Restore.Member() == m.index:
		kind = JobCopyBack
	case l.RebuildMember == m.index:
		kind = JobRebuild
	default:
		return
	}
	ms.Job = &JobStatus{Kind: kind, Total: total}
	ms.Job.Done, _ = l.jobProgress(kind != JobRebuild)
	if j := a.job; j != nil && j.member == m.index && j.kind == kind {
		ms.Job.Running, ms.Job.Started, ms.Job.StartedAt = true, j.started, j.startedAt
	}
}
