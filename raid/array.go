package raid

import (
	"context"
	"fmt"
	"log/slog"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/klauspost/reedsolomon"

	"github.com/ledge-storage/ledge/raid/layout"
)

// Options of Create and Open. The zero value of each field is given in brackets.
type Options struct {
	// K, M and Spares shape a new array; Open takes them from the label. [8, 2, 2 where n allows, else 0]
	K, M, Spares int
	// NoSpares asks Create for no spare space: Spares zero means zero.
	NoSpares bool
	// Pool is the pool of a new array, or the only one that Open accepts. [Create: random; Open: any]
	Pool UUID
	// Array is the only array that Open accepts. [the one that a majority of the labels names]
	Array UUID
	// Force lets Create overwrite drives that are not blank.
	Force bool
	// ReadOnly opens to look: nothing is written, not even a repair. A standby controller's way.
	ReadOnly bool
	// CacheBytes bounds what is kept in memory of checksum blocks: half of it whole ones (with 8+2, of 1 GiB of data in 3 MiB), half the
	// generations alone, without which a read of a block takes one more I/O of each parity strip (of 1 GiB in 48 KiB). [64 MiB]
	CacheBytes int
	// QueueDepth bounds the I/Os in flight to one member. [32]
	QueueDepth int
	// ReadTimeout: a read that takes longer counts as failed, and parity answers. [4 s]
	ReadTimeout time.Duration
	// WriteTimeout: a write, flush or label that takes longer fails its member. [30 s]
	WriteTimeout time.Duration
	// Suspicion is when a member that errs is suspected and failed.
	Suspicion Suspicion
	// Random makes UUIDs; simulations pass their own. [crypto/rand]
	Random func([]byte)
	// Logger hears of members that fail and blocks that are repaired. [none]
	Logger *slog.Logger
	// OldChecksums makes an array with ChecksumsCRC32C, as all were before 2026-11-28: for tests.
	OldChecksums bool
}

// Geometry is the shape of an array.
type Geometry struct {
	N, K, M, Spares int
	Stripes         uint64
	// StripeBytes is the data of a stripe: K*StripBytes.
	StripeBytes int64
}

// BlockWrite is one data block of a stripe to be changed.
type BlockWrite struct {
	Block int // 0 to K*StripBlocks-1
	Data  []byte
}

// MemberState is where a member stands.
type MemberState string

const (
	Online MemberState = "online"
	// Missing: absent, not yet recorded as failed: no write missed it so far.
	Missing MemberState = "missing"
	// Failed: recorded as failed on the other members; it must be rebuilt.
	Failed MemberState = "failed"
	// Rebuilding: it failed, and its strips are being rebuilt to spare space.
	Rebuilding MemberState = "rebuilding"
	// Spared: it failed, and all its strips were rebuilt to spare space.
	Spared MemberState = "spared"
)

// MemberStatus is one member as Status sees it.
type MemberStatus struct {
	Index int
	Path  string // empty when absent
	State MemberState
	// Slow: reads are outstanding beyond ReadTimeout, and parity answers in its place.
	Slow bool
	// ReadErrors, WriteErrors and Timeouts were the drive's answers; ChecksumErrors are blocks that did not
	// match; StaleStrips had lost a write; Repairs are strips rewritten in place.
	ReadErrors, WriteErrors, Timeouts, ChecksumErrors, StaleStrips, Repairs uint64
	// Hedges are reads of it that were late, so that parity was asked in its place.
	Hedges uint64
	// ID is the drive's own, in its label and the array's. Bytes is its size, 0 when absent; Serial what it says of
	// itself, if it can.
	ID     UUID
	Bytes  int64
	Serial string
	// Points is what Suspicion counts; LastError the newest of any kind, and when.
	Points      float64
	LastError   string
	LastErrorAt time.Time
	// Job is what is being done for the member, or waits to go on; nil: nothing.
	Job *JobStatus
}

// Refusal is a drive that Open did not take, and why (one of the Err… above, wrapped).
type Refusal struct {
	Path string
	Err  error
}

// Counters count since Open.
type Counters struct {
	Reads, DegradedReads, FullWrites, Updates, UpdatesByDelta, UpdatesByRebuild uint64
	Repairs, ChecksumErrors, StaleStrips, Unrecoverable, CacheHits, CacheMisses uint64
	// CacheGens are those of CacheHits that found the generations alone.
	CacheGens uint64
	// Hedges are reads that did not wait for a member that was late; of HedgeWins parity answered in its place.
	Hedges, HedgeWins uint64
}

// ArrayState sums the members up.
type ArrayState string

const (
	Optimal  ArrayState = "optimal"
	Degraded ArrayState = "degraded" // members missing, everything readable and writable
	Broken   ArrayState = "failed"   // some stripes are beyond parity, or writes stopped
	Fenced   ArrayState = "fenced"   // another controller owns the members
)

// Status is a snapshot for people and programs.
type Status struct {
	Pool, Array UUID
	Geometry    Geometry
	Checksums   Checksums
	State       ArrayState
	// Err is why the array writes nothing more; nil while it does.
	Err      error
	Members  []MemberStatus
	Refused  []Refusal
	Counters Counters
}

// Array is an open array. Calls on different stripes run in parallel; the caller serialises the writes of one
// stripe (a PrepareUpdate and its Apply enclose no other write of that stripe).
type Array struct {
	id      UUID
	sums    Checksums
	opts    Options
	layout  *layout.Layout // the shape: data, parity and spares, which never change
	code    reedsolomon.Encoder
	members []*member
	refused []Refusal
	unused  []Drive // of the refused
	stripes stripeLocks
	pins    pins // stripes of updates between PrepareUpdate and Release
	cache   *sumCache
	pulse   pulse
	ios     sync.WaitGroup // every I/O goroutine

	// life is held for reading by every call, for writing by Close.
	life   sync.RWMutex
	closed bool

	// labelMu serialises changes of the label, and is held across their I/O.
	labelMu   sync.Mutex
	rebuildMu sync.Mutex // one rebuild at a time; taken before labelMu
	// ready: the label is on all members, makes older copies of them known (offer.go), and names every absent member
	// as failed, so that writes may begin.
	ready atomic.Bool
	// settled is the newest seq that this array put on every member that is not failed; labelMu guards it.
	settled uint64

	// guilty are members whose account says that they must fail (suspect.go).
	guilty atomic.Uint64
	risk   riskCache

	mu    sync.Mutex // guards the fields below, members and member.state
	label Label
	err   error // why nothing is written any more
	// at is where strips lie; while the array grows, reshape says which of its two layouts holds (grow.go). They change
	// with the label.
	at      *layout.Layout
	reshape *layout.Reshape
	key     uint64 // of our reservation; 0: none
	growing bool   // Grow is at work
	carried uint64 // GrowStatus.Carried
	job     *job   // the rebuild or copy-back at work; nil: none

	counters struct {
		reads, degradedReads, fullWrites, updates, updatesByDelta, updatesByRebuild atomic.Uint64
		repairs, checksumErrors, staleStrips, unrecoverable, cacheHits, cacheMisses atomic.Uint64
		hedges, hedgeWins                                                           atomic.Uint64
	}
}

// checkGeometry holds what a label may say and Create may be asked for.
func checkGeometry(n, k, m, spares int) error {
	if err := layout.Check(n, k, m, spares); err != nil {
		return err
	}
	if n < 2*m+1 {
		return fmt.Errorf("%w: %d members lose their majority with %d of them", layout.ErrGeometry, n, m)
	}
	return nil
}

// enter begins a call; leave ends it.
func (a *Array) enter() error {
	a.life.RLock()
	if a.closed {
		a.life.RUnlock()
		return ErrClosed
	}
	return nil
}

func (a *Array) leave() { a.life.RUnlock() }

// Geometry returns the shape of the array.
func (a *Array) Geometry() Geometry {
	a.mu.Lock()
	l, n, slots := a.at, a.label.N, a.label.Slots
	a.mu.Unlock()
	return Geometry{N: n, K: l.Data(), M: l.Parity(), Spares: l.Spares(), Stripes: l.Stripes(slots),
		StripeBytes: int64(l.Data()) * StripBytes}
}

// Err is why the array writes nothing more: ErrReservation, ErrNoMajority, ErrDegraded or ErrStaleEpoch,
// wrapped; nil while it does.
func (a *Array) Err() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.err
}

// latch stops all writing for good. The first reason stays.
func (a *Array) latch(err error) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.err == nil {
		a.err = err
		a.log(slog.LevelError, "raid: writing stops", "err", err)
	}
	return err
}

func (a *Array) log(level slog.Level, msg string, args ...any) {
	if a.opts.Logger != nil {
		a.opts.Logger.Log(context.Background(), level, msg, args...)
	}
}

// place is where a strip lies now; member is nil while it is nowhere: its member is absent, failed, or not
// rebuilt so far. twin is where it must be written too, because its member is being restored there (copyback.go).
type place struct {
	member  *member
	off     int64
	twin    *member
	twinOff int64
}

// places locates every strip of a stripe, sparing included.
func (a *Array) places(stripe uint64) []place {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch l := &a.label; {
	case !l.Growing():
	case stripe < l.GrowDone:
		return a.placesBy(a.reshape.New, stripe)
	case stripe < l.GrowStaged:
		return a.stagePlaces(stripe)
	}
	return a.placesBy(a.at, stripe)
}

// placesBy locates the strips of a stripe by a layout. Called with mu held.
func (a *Array) placesBy(at *layout.Layout, stripe uint64) []place {
	out := make([]place, at.Width())
	rebuilt, restored := a.label.RebuildMember >= 0 && a.done(at, false, stripe), a.label.Restore.Member() >= 0 && a.done(at, true, stripe)
	for i := range out {
		out[i] = a.locate(at, stripe, i, rebuilt, restored)
	}
	return out
}

// layoutOf is the layout by which a stripe that is not staged lies; Array.mu is held.
func (a *Array) layoutOf(stripe uint64) *layout.Layout {
	if a.label.Growing() && stripe < a.label.GrowDone {
		return a.reshape.New
	}
	return a.at
}

// locate is placesBy for one strip, with the stripe rebuilt and restored or not; Array.mu is held.
func (a *Array) locate(at *layout.Layout, stripe uint64, strip int, rebuilt, restored bool) (p place) {
	index, slot := at.Strip(stripe, strip)
	off := DataOffset + int64(slot)*SlotBytes
	// A spare's own member may have failed and been spared in turn: at most once per spare column.
	for hop := 0; hop <= at.Spares(); hop++ {
		m := a.members[index]
		if m.state == Online {
			p.member, p.off = m, off
			return p
		}
		if m.state == Restoring && restored {
			p.twin, p.twinOff = m, off
		}
		spare := a.label.spareFor(index, rebuilt)
		if spare < 0 {
			break
		}
		index = at.Spare(slot, spare)
	}
	return place{member: p.twin, off: p.twinOff}
}

// spareFor returns the spare column that holds the member's strip of a stripe, or -1.
func (l *Label) spareFor(member int, rebuilt bool) int {
	if j := bytesIndex(l.SpareOf, member); j >= 0 {
		return j
	}
	if rebuilt && l.RebuildMember == member {
		return l.RebuildSpare
	}
	return -1
}

// lost counts the members of a set that no spare column stands for.
func (l *Label) lost(members uint64) int {
	for _, s := range l.SpareOf {
		if s != 0 {
			members &^= 1 << (s - 1)
		}
	}
	return bits.OnesCount64(members)
}

// checkBlocks refuses a range that is not within a stripe of the array.
func (a *Array) checkBlocks(stripe uint64, block, count int) error {
	g := a.Geometry()
	if stripe >= g.Stripes || block < 0 || count < 0 || block+count > g.K*StripBlocks {
		return fmt.Errorf("raid: stripe %d blocks %d+%d: %w", stripe, block, count, ErrRange)
	}
	return nil
}

func (a *Array) address(stripe uint64, strip int) address {
	return address{a.id, stripe, strip, a.layout.Data(), a.layout.Parity(), a.sums}
}

// Status is a snapshot.
func (a *Array) Status() Status {
	s := Status{Geometry: a.Geometry(), Checksums: a.sums, Refused: a.refused}
	total := s.Geometry.Stripes
	a.mu.Lock()
	defer a.mu.Unlock()
	s.Pool, s.Array, s.Err = a.label.Pool, a.label.Array, a.err
	absent := uint64(0)
	for _, m := range a.members {
		ms := MemberStatus{Index: m.index, State: m.state, Slow: m.stuck.Load() > 0, ReadErrors: m.readErrors.Load(),
			WriteErrors: m.writeErrors.Load(), Timeouts: m.timeouts.Load(), ChecksumErrors: m.checksumErrors.Load(),
			StaleStrips: m.staleStrips.Load(), Repairs: m.repairs.Load(),
			Hedges: m.hedges.Load()}
		if m.drive != nil {
			ms.Path = m.drive.Name()
		}
		if m.state != Online {
			absent |= 1 << m.index
		}
		switch {
		case m.state == Online && m.suspect.Load():
			ms.State = Suspect
		case m.state == Failed && a.label.lost(1<<m.index) == 0:
			ms.State = Spared
		case m.state == Failed && m.index == a.label.RebuildMember:
			ms.State = Rebuilding
		}
		a.describeMember(&ms, m, total)
		s.Members = append(s.Members, ms)
	}
	s.State = a.state(absent)
	c := &a.counters
	s.Counters = Counters{Reads: c.reads.Load(), DegradedReads: c.degradedReads.Load(), FullWrites: c.fullWrites.Load(),
		Updates: c.updates.Load(), UpdatesByDelta: c.updatesByDelta.Load(), UpdatesByRebuild: c.updatesByRebuild.Load(),
		Repairs: c.repairs.Load(), ChecksumErrors: c.checksumErrors.Load(), StaleStrips: c.staleStrips.Load(),
		Unrecoverable: c.unrecoverable.Load(), CacheHits: c.cacheHits.Load(), CacheMisses: c.cacheMisses.Load(), CacheGens: a.cache.gens.hits.Load(),
		Hedges: c.hedges.Load(), HedgeWins: c.hedgeWins.Load()}
	return s
}

func (a *Array) state(absent uint64) ArrayState {
	lost := a.label.lost(absent)
	switch {
	case isReservation(a.err):
		return Fenced
	case a.err != nil || lost > a.layout.Parity():
		return Broken
	case absent != 0:
		return Degraded
	}
	return Optimal
}

// Close waits for every I/O, as long as a write may take, and closes the drives.
func (a *Array) Close() error {
	a.life.Lock()
	closed := a.closed
	a.closed = true
	a.life.Unlock()
	if closed {
		return nil
	}
	idle := make(chan struct{})
	go func() {
		a.ios.Wait()
		close(idle)
	}()
	timer := time.NewTimer(a.opts.WriteTimeout)
	defer timer.Stop()
	var err error
	select {
	case <-idle:
	case <-timer.C:
		err = fmt.Errorf("raid: close: %w", ErrTimeout)
	}
	a.mu.Lock()
	drives, members := a.unused, slices.Clone(a.members)
	a.mu.Unlock()
	for _, m := range members {
		if m.drive != nil {
			drives = append(drives, m.drive)
		}
	}
	for _, d := range drives {
		if cerr := d.Close(); cerr != nil && err == nil {
			err = fmt.Errorf("raid: %s: close: %w", d.Name(), cerr)
		}
	}
	return err
}

// stripeLocks are the per-stripe read/write locks: an entry exists while somebody holds or waits for it.
type stripeLocks struct {
	mu    sync.Mutex
	locks map[uint64]*stripeLock
}

type stripeLock struct {
	sync.RWMutex
	users int
}

func (s *stripeLocks) get(stripe uint64) *stripeLock {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.locks[stripe]
	if l == nil {
		if s.locks == nil {
			s.locks = make(map[uint64]*stripeLock)
		}
		l = new(stripeLock)
		s.locks[stripe] = l
	}
	l.users++
	return l
}

func (s *stripeLocks) put(stripe uint64, l *stripeLock) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l.users--; l.users == 0 {
		delete(s.locks, stripe)
	}
}

// lock and rlock return the unlocking function.
func (s *stripeLocks) lock(stripe uint64) func() {
	l := s.get(stripe)
	l.Lock()
	return func() { l.Unlock(); s.put(stripe, l) }
}

func (s *stripeLocks) rlock(stripe uint64) func() {
	l := s.get(stripe)
	l.RLock()
	return func() { l.RUnlock(); s.put(stripe, l) }
}

// tryLock does not wait.
func (s *stripeLocks) tryLock(stripe uint64) (unlock func(), ok bool) {
	l := s.get(stripe)
	if !l.TryLock() {
		s.put(stripe, l)
		return nil, false
	}
	return func() { l.Unlock(); s.put(stripe, l) }, true
}
