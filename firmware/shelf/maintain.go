package shelf

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/ledge-storage/ledge/raid"
)

// Background work on the array: one goroutine of the pool does one task at a time, the most urgent first.
//
//	1. a copy-back or re-add that was begun of a member that is nowhere else
//	2. a rebuild that was begun is finished
//	3. a member that failed is rebuilt to a free spare column, RebuildDelay after it was first seen failed: a drive
//	   that was only reseated comes back sooner than it is rebuilt. At once when some stripe has no redundancy left
//	4. a copy-back or re-add that was begun of a member that is in spare space
//	5. a growth that was begun is finished, before 1 to 4 where these have to wait for it
//	6. what the array has gained becomes extents
//	7. a scrub that is due, or was ordered
//
// A task that is running gives way to a more urgent one: pace, which every task calls before each step, looks at the
// array once a second. Tasks go on where they were after a restart: what they keep is in the array's label, and the
// scrub's position in the superblock (every scrubSave and at each stop; what lies between is verified again).
//
// A task that fails is tried again after retryMin, then twice that, up to retryMax; others go on meanwhile.
//
// How much of the members' time a task takes from initiators: pace.go.

// MaintenanceOptions rule the background work on the array. The zero value of each field is given in brackets.
type MaintenanceOptions struct {
	// Off starts nothing by itself: no rebuild, no scrub. StartScrub works.
	Off bool
	// RebuildDelay is how long a member must have been failed before its rebuild starts. [1 min]
	RebuildDelay time.Duration
	// ScrubEvery is the time from the end of a pass to the start of the next. [7 days; negative: only on demand]
	ScrubEvery time.Duration
	// Rates bound the work's speed.
	Rates MaintenanceRates
	// Now is the clock. [time.Now]
	Now func() time.Time
}

func (o *MaintenanceOptions) defaults() {
	if o.RebuildDelay == 0 {
		o.RebuildDelay = time.Minute
	}
	if o.ScrubEvery == 0 {
		o.ScrubEvery = 7 * 24 * time.Hour
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	o.Rates.defaults()
}

// MaintenanceRates are bounds in bytes per second: of stripe data, for scrubs of what is read. The zero value of each field is given in brackets.
type MaintenanceRates struct {
	// Floor is what rebuild, copy-back, re-add and growth do however busy the pool is, so that they end. [32 MiB/s]
	Floor int64
	// ScrubFloor is the same of a scrub. [4 MiB/s]
	ScrubFloor int64
	// Scrub bounds a scrub of an idle pool. [200 MiB/s; negative: none]
	Scrub int64
	// Rebuild bounds a rebuild, copy-back, re-add or growth of an idle pool. [none]
	Rebuild int64
}

func (r *MaintenanceRates) defaults() {
	set := func(p *int64, v int64) {
		if *p == 0 {
			*p = v
		}
	}
	set(&r.Floor, 32<<20)
	set(&r.ScrubFloor, 4<<20)
	set(&r.Scrub, 200<<20)
}

// check refuses rates at which a task would not end in this life.
func (r *MaintenanceRates) check() error {
	const least = 64 << 10
	for _, x := range []struct {
		name string
		v    int64
	}{{"floor", r.Floor}, {"scrub floor", r.ScrubFloor}, {"scrub", max(r.Scrub, 0)}, {"rebuild", max(r.Rebuild, 0)}} {
		if x.v < 0 || x.v > 0 && x.v < least {
			return fmt.Errorf("%w: %s of %d bytes/s, at least %d", ErrRates, x.name, x.v, least)
		}
	}
	return nil
}

// Task is what the maintenance works at.
type Task string

const (
	TaskNone     Task = ""
	TaskRebuild  Task = "rebuild"
	TaskCopyBack Task = "copy-back"
	TaskReadd    Task = "re-add"
	TaskGrow     Task = "grow"
	TaskScrub    Task = "scrub"
)

// MaintenanceStatus is a snapshot of the background work.
type MaintenanceStatus struct {
	// Task is what runs now, Member the member it is for (-1: none).
	Task   Task
	Member int
	// Done of Total stripes; Started is when this run of the task began.
	Done, Total uint64
	Started     time.Time
	// Rate is in bytes of stripe data per second, over the last seconds; ETA is the time left at that rate, 0 where
	// unknown. Throttled: foreground I/O holds the task at its floor.
	Rate      int64
	ETA       time.Duration
	Throttled bool
	// Err is why the last task ended early; it is tried again after RetryAt.
	Err     error
	RetryAt time.Time
	Rates   MaintenanceRates
	// Scrub is the pass that runs, is paused, or ended last.
	Scrub ScrubStatus
}

// ScrubState is where the scrub stands.
type ScrubState string

const (
	ScrubIdle    ScrubState = "idle"
	ScrubRunning ScrubState = "running"
	// ScrubWaiting: a more urgent task runs first.
	ScrubWaiting ScrubState = "waiting"
	ScrubPaused  ScrubState = "paused"
)

// ScrubStatus is a pass, and the report of the last that ended.
type ScrubStatus struct {
	State ScrubState
	// Position is the next stripe of Total.
	Position, Total uint64
	// Began of the pass that runs or is paused; Next is when the next begins by itself (zero: never).
	Began, Next time.Time
	// Now is what the pass found so far, Last what the last whole pass found (its End is zero when there was none).
	Now, Last ScrubReport
}

// ScrubReport sums a pass up. Stripes were verified; Unwritten hold nothing.
type ScrubReport struct {
	Begin, End time.Time
	Stripes    uint64
	Unwritten  uint64
	// BadStrips were rotten, stale or unreadable, Repaired of them rewritten.
	BadStrips, Repaired uint64
	// LostBlocks are marked as lost; UnrecoverableStripes have more bad strips than parity mends, and no mark so far.
	LostBlocks, UnrecoverableStripes uint64
	// ParityErrors are stripes whose parity does not match data of which every checksum is right.
	ParityErrors uint64
}

var (
	// ErrNoMaintenance: the array has no background work.
	ErrNoMaintenance = errors.New("shelf: no background work on this pool")
	// ErrRates: a rate that is too low.
	ErrRates = errors.New("shelf: invalid rate")
	// ErrScrubState: the scrub runs already, or does not run.
	ErrScrubState = errors.New("shelf: scrub is not in that state")
)

// keeper is what maintenance needs of *raid.Array.
type keeper interface {
	Geometry() raid.Geometry
	Status() raid.Status
	Label() raid.Label
	AtRisk() raid.Risk
	RebuildWith(ctx context.Context, failed int, o raid.RebuildOptions) error
	CopyBack(ctx context.Context, index int, o raid.RebuildOptions) error
	ScrubAll(ctx context.Context, o raid.ScrubOptions) (raid.ScrubReport, error)
	Grow(ctx context.Context, drives []raid.Drive, o raid.GrowOptions) error
	GrowStatus() raid.GrowStatus
}

const (
	// lookEvery is how often the array is looked at for something to do, and whether something is more urgent.
	lookEvery = time.Second
	retryMin  = time.Minute
	retryMax  = time.Hour
)

// errPreempted ends a task: another one is more urgent, it was told to stop, or its rate changed.
var errPreempted = errors.New("shelf: something else comes first")

// maintainer is the goroutine and what it shares.
type maintainer struct {
	p    *Pool
	a    keeper
	o    MaintenanceOptions
	wake chan struct{}
	turn semaphore // held while a task runs; HoldMaintenance takes it

	// The goroutine's own.
	failedAt map[int]time.Time // when a member was first seen failed
	looked   time.Time
	urgent   bool // of a rebuild: some stripe has no redundancy left
	// growFirst: a rebuild has to wait for stripes that a growth has on their way.
	growFirst bool
	tooFew    uint64 // stripes of the array of which the pool cannot make extents
	pacer     pacer
	backoff   time.Duration

	mu      sync.Mutex // guards the rest
	status  MaintenanceStatus
	samples []sample
	held    int // HoldMaintenance calls
	// failedTask rests until status.RetryAt.
	failedTask Task
	nudge      bool // the running task shall look at once
	scrub      scrubMark
	acceptOld  bool // of the pass
}

// sample is how far a task was.
type sample struct {
	at   time.Time
	done uint64
}

// work is one task that could be done now.
type work struct {
	task   Task
	member int
}

func (p *Pool) newMaintainer() *maintainer {
	k, ok := p.array.(keeper)
	if !ok || p.opts.Inline {
		return nil
	}
	m := &maintainer{p: p, a: k, o: p.opts.Maintenance, wake: make(chan struct{}, 1), turn: newSemaphore(), failedAt: map[int]time.Time{}}
	m.o.defaults()
	m.pacer = pacer{load: &p.load, pressed: func() bool { return p.pressure() >= hurryAt }}
	m.scrub = p.sb.Scrub
	m.status = MaintenanceStatus{Member: -1, Rates: m.o.Rates}
	return m
}

// run works until the pool stops.
func (m *maintainer) run() {
	defer m.p.wg.Done()
	ctx := m.p.ctx
	for ctx.Err() == nil {
		w := work{member: -1}
		if m.turn.take(ctx) == nil {
			if w = m.next(); w.task != TaskNone {
				m.do(ctx, w)
			}
			m.turn.give()
		}
		if w.task != TaskNone {
			continue
		}
		select {
		case <-ctx.Done():
		case <-m.wake:
		case <-time.After(lookEvery):
		}
	}
}

// do runs one task to its end, or until something comes before it.
func (m *maintainer) do(ctx context.Context, w work) {
	m.begin(w)
	err := m.perform(ctx, w)
	wasFirst := m.growFirst
	m.growFirst = w.task != TaskGrow && w.task != TaskScrub && errors.Is(err, raid.ErrBusy) && !wasFirst && m.a.GrowStatus().Growing
	switch {
	case errors.Is(err, errPreempted), ctx.Err() != nil, m.growFirst:
		err = nil
	case err != nil:
		m.p.opts.Logger.Error("maintenance", "task", string(w.task), "member", w.member, "err", err)
	default:
		m.p.opts.Logger.Info("maintenance: done", "task", string(w.task), "member", w.member)
	}
	m.end(w, err)
}

func (m *maintainer) perform(ctx context.Context, w work) error {
	pace := func(ctx context.Context) error {
		return m.pace(ctx, w, m.a.Geometry().StripeBytes)
	}
	o := raid.RebuildOptions{Pace: pace, Progress: m.progress, Used: m.p.holds}
	switch w.task {
	case TaskRebuild:
		return m.a.RebuildWith(ctx, w.member, o)
	case TaskCopyBack, TaskReadd:
		return m.a.CopyBack(ctx, w.member, o)
	case TaskGrow:
		if m.a.GrowStatus().Growing {
			if err := m.a.Grow(ctx, nil, raid.GrowOptions{Pace: pace, Progress: m.progress}); err != nil {
				return err
			}
		}
		return m.growPool(ctx)
	case TaskScrub:
		return m.scrubPass(ctx, w)
	}
	panic("shelf: maintenance of an unknown kind")
}

// pace is called by tasks before each step of so many bytes.
func (m *maintainer) pace(ctx context.Context, w work, bytes int64) error {
	for {
		m.mu.Lock()
		rates, nudge := m.status.Rates, m.nudge
		m.nudge = false
		m.mu.Unlock()
		if now := time.Now(); nudge || now.Sub(m.looked) >= lookEvery {
			m.looked = now
			if m.next() != w {
				return errPreempted
			}
			m.urgent = w.task != TaskScrub && w.task != TaskGrow && m.atRisk()
			m.sample()
		}
		floor, most := rates.Floor, rates.Rebuild
		if w.task == TaskScrub {
			floor, most = rates.ScrubFloor, rates.Scrub
		} else if m.urgent {
			floor, most = 0, 0
		}
		throttled, woken, err := m.pacer.pace(ctx, bytes, floor, most, m.wake)
		m.mu.Lock()
		m.status.Throttled = throttled
		m.mu.Unlock()
		if !woken {
			return err
		}
	}
}

// next returns what is to be done first.
func (m *maintainer) next() work {
	none := work{TaskNone, -1}
	m.mu.Lock()
	ordered := m.scrub.state == scrubMarkRunning
	held, resting := m.held > 0, TaskNone
	if m.status.RetryAt.After(m.o.Now()) {
		resting = m.failedTask
	}
	m.mu.Unlock()
	if held || m.a.Status().Err != nil {
		return none
	}
	if !m.o.Off {
		if w := m.repairs(); w.task != TaskNone && w.task != resting {
			return w
		}
	}
	if (ordered || m.scrubDue()) && resting != TaskScrub {
		return work{TaskScrub, -1}
	}
	return none
}

// repairs are tasks 1 to 6.
func (m *maintainer) repairs() work {
	l := m.a.Label()
	failed := m.failedMember(&l)
	back := work{TaskCopyBack, l.Restore.Member()}
	if l.Restore.Reuse {
		back.task = TaskReadd
	}
	switch {
	case l.Growing() && (m.growFirst || failed < 0 && back.member < 0 && l.RebuildMember < 0):
		return work{TaskGrow, -1}
	case back.member >= 0 && !spared(&l, back.member): // as good as a rebuild, and in the way of one
		return back
	case l.RebuildMember >= 0:
		return work{TaskRebuild, l.RebuildMember}
	case failed >= 0:
		return work{TaskRebuild, failed}
	case back.member >= 0:
		return back
	case m.poolGrows():
		return work{TaskGrow, -1}
	}
	return work{TaskNone, -1}
}

// poolGrows tells whether the array has room for extents that the pool does not know so far.
func (m *maintainer) poolGrows() bool {
	stripes := m.a.Geometry().Stripes
	m.p.mu.Lock()
	defer m.p.mu.Unlock()
	return stripes != m.tooFew && m.p.sb.extentsOf(stripes) > m.p.sb.extents()
}

// growPool takes in what the array has gained. What does not make a region, or comes too often, is left.
func (m *maintainer) growPool(ctx context.Context) error {
	stripes := m.a.Geometry().Stripes
	err := m.p.Grow(ctx)
	if errors.Is(err, ErrSize) || errors.Is(err, ErrLimit) {
		m.tooFew = stripes
		m.p.opts.Logger.Warn("the pool cannot take in what the array has gained", "stripes", stripes, "err", err)
		return nil
	}
	return err
}

// failedMember returns the member that shall be rebuilt to spare space now, or -1.
func (m *maintainer) failedMember(l *raid.Label) int {
	now := m.o.Now()
	first := -1
	for i := range l.N {
		if l.Failed>>i&1 == 0 || spared(l, i) || i == l.Restore.Member() {
			delete(m.failedAt, i)
			continue
		}
		if _, ok := m.failedAt[i]; !ok {
			m.failedAt[i] = now
		}
		if first < 0 || m.failedAt[i].Before(m.failedAt[first]) {
			first = i
		}
	}
	switch free := freeSpares(l); {
	case first < 0, free == 0:
		return -1
	case !m.atRisk() && now.Sub(m.failedAt[first]) < m.o.RebuildDelay:
		return -1
	}
	return first
}

// atRisk tells whether a stripe has no redundancy left.
func (m *maintainer) atRisk() bool {
	r := m.a.AtRisk()
	return r.Beyond > 0 || r.Lost[len(r.Lost)-1] > 0
}

func spared(l *raid.Label, member int) bool {
	return slices.Contains(l.SpareOf[:], uint8(member+1))
}

func freeSpares(l *raid.Label) (n int) {
	for j := range l.Spares {
		if l.SpareOf[j] == 0 && l.RebuildSpare != j {
			n++
		}
	}
	return n
}

// begin and end frame a task in the status.
func (m *maintainer) begin(w work) {
	m.looked, m.urgent = time.Time{}, false
	m.pacer.begin()
	m.mu.Lock()
	defer m.mu.Unlock()
	s := &m.status
	s.Task, s.Member, s.Started = w.task, w.member, m.o.Now()
	s.Done, s.Total, s.Rate, s.ETA, s.Throttled = 0, 0, 0, 0, false
	m.samples = m.samples[:0]
}

func (m *maintainer) end(w work, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := &m.status
	s.Task, s.Member, s.Throttled, s.Rate, s.ETA = TaskNone, -1, false, 0, 0
	if err != nil || w.task == m.failedTask {
		s.Err, s.RetryAt = err, time.Time{}
	}
	if err == nil {
		if w.task == m.failedTask {
			m.backoff = 0
		}
		return
	}
	m.failedTask = w.task
	m.backoff = min(max(2*m.backoff, retryMin), retryMax)
	s.RetryAt = m.o.Now().Add(m.backoff)
}

// progress is what a task tells.
func (m *maintainer) progress(done, total uint64) {
	m.mu.Lock()
	m.status.Done, m.status.Total = done, total
	m.mu.Unlock()
}

// rateOver is how far back the rate looks.
const rateOver = 10 * time.Second

// sample notes how far the task is, and computes rate and time left.
func (m *maintainer) sample() {
	now := time.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	s := &m.status
	m.samples = append(m.samples, sample{now, s.Done})
	for len(m.samples) > 2 && now.Sub(m.samples[0].at) > rateOver {
		m.samples = m.samples[1:]
	}
	first := m.samples[0]
	took := now.Sub(first.at).Seconds()
	if took <= 0 || s.Done <= first.done {
		return
	}
	stripes := float64(s.Done-first.done) / took
	s.Rate = int64(stripes * float64(m.a.Geometry().StripeBytes))
	s.ETA = time.Duration(float64(s.Total-s.Done) / stripes * float64(time.Second))
}

// poke makes the goroutine look now.
func (m *maintainer) poke() {
	m.mu.Lock()
	m.nudge = true
	m.mu.Unlock()
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// Maintains tells whether rebuilds, copies and growths that are begun are finished in the background.
func (p *Pool) Maintains() bool { return p.keeper != nil && !p.keeper.o.Off }

// Maintenance returns a snapshot of the background work.
func (p *Pool) Maintenance() MaintenanceStatus {
	m := p.keeper
	if m == nil {
		return MaintenanceStatus{Member: -1, Scrub: ScrubStatus{State: ScrubIdle}}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.status
	s.Scrub = m.scrubStatus()
	return s
}

// SetRates changes the bounds until the pool is closed. ErrRates.
func (p *Pool) SetRates(r MaintenanceRates) error {
	m := p.keeper
	if m == nil {
		return ErrNoMaintenance
	}
	r.defaults()
	if err := r.check(); err != nil {
		return err
	}
	m.mu.Lock()
	m.status.Rates = r
	m.mu.Unlock()
	m.poke()
	return nil
}

// HoldMaintenance ends the task that runs, at its next step, and returns when no more will begin until release is
// called: for a handover, or an order to the array that must not meet a rebuild. Holds add up.
func (p *Pool) HoldMaintenance(ctx context.Context) (release func(), err error) {
	m := p.keeper
	if m == nil {
		return func() {}, nil
	}
	m.hold(1)
	release = sync.OnceFunc(func() { m.hold(-1) })
	if err := m.turn.take(ctx); err != nil {
		release()
		return nil, fmt.Errorf("shelf: hold maintenance: %w", err)
	}
	m.turn.give()
	return release, nil
}

func (m *maintainer) hold(n int) {
	m.mu.Lock()
	m.held += n
	m.mu.Unlock()
	m.poke()
}
