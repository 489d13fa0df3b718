package nvram

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"
)

// Options of an open log.
type Options struct {
	// ID that the area must carry, else ErrForeign; the zero ID accepts any.
	ID ID
	// Identity is recorded in the superblock, if it is not zero. See CheckIdentity.
	Identity Identity
	// Epoch of the owner; ErrStale if the log saw a newer one.
	Epoch uint64
	// Replicator mirrors the log to the partner (mirror.Link.Replicator). nil: there is no partner, and the
	// log goes solo with its first Append.
	Replicator Replicator
	// Witness records solo; nil records nothing (tools and tests).
	Witness Witness
	// Fresh: the Witness has it recorded that no acknowledged write depends on this log yet. Before the first
	// acknowledgement EnterSolo or LeaveSolo says otherwise, and has returned nil.
	Fresh bool
	// MirrorTimeout: an acknowledgement that the partner holds up for so long makes the log solo; 0 means 2 s.
	MirrorTimeout time.Duration
	// WitnessTimeout bounds one call of the Witness; 0 means 30 s.
	WitnessTimeout time.Duration
	// ReserveBytes of the data lane are for KindInternal only; 0 means an eighth of the lane.
	ReserveBytes int64
	// MaxRecordBytes bounds one record, so one Append; 0 means 8 MiB or a quarter of the lane, the lesser.
	MaxRecordBytes int64
	// GroupBytes: a record takes no further Append once it has so many; 0 means 1 MiB.
	GroupBytes int64
	// Pipeline is how many records may be in flight; 0 means 4.
	Pipeline int
	// Logger gets changes of the mirror's state; nil discards.
	Logger *slog.Logger
	// Clock is the time; nil means the machine's.
	Clock Clock
}

// Clock is what the log waits by.
type Clock interface {
	Now() time.Time
	After(d time.Duration) <-chan time.Time
}

type machineClock struct{}

func (machineClock) Now() time.Time                         { return time.Now() }
func (machineClock) After(d time.Duration) <-chan time.Time { return time.After(d) }

func (o *Options) setDefaults() {
	o.MirrorTimeout = orDefault(o.MirrorTimeout, 2*time.Second)
	o.WitnessTimeout = orDefault(o.WitnessTimeout, 30*time.Second)
	o.MaxRecordBytes = min(orDefault(o.MaxRecordBytes, 8<<20), maxRecordBlocks*BlockBytes)
	o.GroupBytes = orDefault(o.GroupBytes, 1<<20)
	o.Pipeline = orDefault(o.Pipeline, 4)
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Clock == nil {
		o.Clock = machineClock{}
	}
}

func orDefault[T int | int64 | time.Duration](v, d T) T {
	if v <= 0 {
		return d
	}
	return v
}

// Log is an open log. Its methods may be called concurrently.
type Log struct {
	region Region
	area   Area
	opts   Options
	found  *scanned // what Open found; nil after the first Append
	feed   Feed
	id     ID
	// requests are reused within a log, not beyond it: their channels belong to who runs it (testing/synctest).
	requests sync.Pool

	mu      sync.Mutex
	changed *sync.Cond // a record is ready, a tail moved, the session ended: what the feed waits for
	sb      super      // the superblock on media; the trimmer alone writes it after Open
	lane    [lanes]lane
	want    [lanes]uint64 // Trim's last argument
	next    uint64        // LSN of the next record
	durable uint64        // all below are in the own region
	acked   uint64        // all below are acknowledged
	pending []*record     // in flight, by LSN
	flying  int           // of pending, those that are no pads
	queue   [classes][]*request
	leader  *request      // was told to lead, and did not start yet
	settle  chan struct{} // closed once all that Open found is acknowledged
	settled bool
	partner partner
	stats   Stats
	closed  bool
	err     error

	failed   chan struct{}
	stop     chan struct{}
	wake     chan struct{} // the warden has something to decide
	trim     chan struct{} // the trimmer has something to write
	writers  sync.WaitGroup
	routines sync.WaitGroup
}

// Open scans the area and starts a new run of its log. It does not take over r: the caller closes it after
// the log. ErrEmpty, ErrForeign, ErrCorrupt and ErrStale as their documentation says.
func Open(ctx context.Context, r Region, a Area, o Options) (*Log, error) {
	o.setDefaults()
	found, err := scan(r, a)
	if err != nil {
		return nil, fmt.Errorf("nvram: open: %w", err)
	}
	sb := found.sb
	switch {
	case sb.mirror:
		return nil, fmt.Errorf("nvram: open: area holds a mirror of log %s: %w", sb.id, ErrForeign)
	case o.ID != ID{} && o.ID != sb.id:
		return nil, fmt.Errorf("nvram: open: log %s found, %s wanted: %w", sb.id, o.ID, ErrForeign)
	case o.Epoch < sb.epoch:
		return nil, fmt.Errorf("nvram: open at epoch %d: log %s saw epoch %d: %w", o.Epoch, sb.id, sb.epoch, ErrStale)
	case !o.Identity.valid():
		return nil, fmt.Errorf("nvram: open: identity %s: %w", o.Identity, ErrInvalid)
	case ctx.Err() != nil:
		return nil, fmt.Errorf("nvram: open: %w", ctx.Err())
	}
	zeros := AlignedBlocks(1)
	for _, off := range found.stale {
		if err := a.wipe(r, off, zeros); err != nil {
			return nil, fmt.Errorf("nvram: open: %w", err)
		}
	}
	sb.epoch = o.Epoch
	sb.run++
	sb.runLSN = found.next
	if o.Identity != (Identity{}) {
		sb.of, sb.regionBytes = o.Identity, uint64(r.Size())
	}
	if err := writeSuperTwice(r, a, &sb, AlignedBlocks(1)); err != nil {
		return nil, fmt.Errorf("nvram: open: start run %d: %w", sb.run, err)
	}
	l := &Log{
		region: r, area: a, opts: o, found: found, id: sb.id, sb: sb,
		next: found.next, durable: found.next, acked: max(sb.acked, sb.maxTail()),
		failed: make(chan struct{}), stop: make(chan struct{}),
		wake: make(chan struct{}, 1), trim: make(chan struct{}, 1), settle: make(chan struct{}),
	}
	l.changed = sync.NewCond(&l.mu)
	l.feed.log = l
	l.requests.New = newRequest
	for i := range lanes {
		l.setLane(i)
	}
	l.partner.since = o.Clock.Now()
	l.partner.solo = o.Replicator == nil && o.Witness == nil
	l.partner.fresh = o.Fresh && o.Witness != nil
	l.mu.Lock()
	l.advance()
	l.mu.Unlock()
	l.routines.Go(l.warden)
	l.routines.Go(l.trimmer)
	if o.Replicator != nil {
		o.Replicator.Attach(&l.feed)
	}
	return l, nil
}

func (l *Log) setLane(i int) {
	ln := &l.lane[i]
	ln.start, ln.size = l.sb.start(i), l.sb.bytes[i]
	ln.head, ln.live = l.found.head[i], slices.Clone(l.found.live[i])
	for _, e := range ln.live {
		ln.used += uint64(e.blocks) * BlockBytes
	}
	limit := ln.size / 4
	if i == laneUpdate {
		limit = ln.size / 2 // updates come one by one, and are soon gone
	}
	ln.maxRecordBlk = int(min(limit, uint64(l.opts.MaxRecordBytes)) / BlockBytes)
	if i == laneData {
		ln.reserve = uint64(l.opts.ReserveBytes) / BlockBytes * BlockBytes
		if l.opts.ReserveBytes <= 0 {
			ln.reserve = ln.size / 8 / BlockBytes * BlockBytes
		}
		ln.reserve = min(ln.reserve, ln.size/2)
	}
}

// Replay gives every set in LSN order; before the first Append only, else ErrInvalid. It may start before the
// last Trim of the run before (never after it), as one cut of both lanes. Sets alias a buffer that is reused.
func (l *Log) Replay(fn func(lsn uint64, s Set) error) error {
	l.mu.Lock()
	found := l.found
	l.mu.Unlock()
	if found == nil {
		return fmt.Errorf("nvram: replay after an append: %w", ErrInvalid)
	}
	return found.replay(l.region, l.area, fn)
}

// Settle returns when everything that Replay gave is in the mirror, or solo is recorded. Until then a record
// that was never acknowledged may vanish with this controller, so nobody may have read it: call before serving.
func (l *Log) Settle(ctx context.Context) error {
	l.mu.Lock()
	l.partner.wanted = true
	l.partner.since = l.opts.Clock.Now()
	done := l.settle
	l.advance()
	l.mu.Unlock()
	l.poke(l.wake)
	select {
	case <-done:
		return nil
	case <-l.failed:
		return l.Err()
	case <-l.stop:
		return ErrClosed
	case <-ctx.Done():
		return fmt.Errorf("nvram: settle: %w", ctx.Err())
	}
}

// ID of the log, and its epoch.
func (l *Log) ID() ID        { return l.id }
func (l *Log) Epoch() uint64 { return l.opts.Epoch }

// MaxAppendBlocks is the most payload blocks that one Append of data takes, with up to 64 sets and 512 extents.
func (l *Log) MaxAppendBlocks() int {
	return l.lane[laneData].maxRecordBlk - min(headerBlocksFor(64, 512), l.lane[laneData].maxRecordBlk/2)
}

// MaxUpdateBlocks is the same for KindUpdate.
func (l *Log) MaxUpdateBlocks() int {
	return l.lane[laneUpdate].maxRecordBlk - min(headerBlocksFor(64, 512), l.lane[laneUpdate].maxRecordBlk/2)
}

// Failed is closed when the log failed: it acknowledges nothing more, and Err says why.
func (l *Log) Failed() <-chan struct{} { return l.failed }

// Err is nil while the log works, ErrClosed after Close, the cause wrapped in ErrClosed after a failure.
func (l *Log) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.cause()
}

// cause is Err, called with mu held.
func (l *Log) cause() error {
	if l.err == nil && l.closed {
		return ErrClosed
	}
	return l.err
}

// fail ends the log. Nothing that waits is acknowledged. Called with mu held.
func (l *Log) fail(err error) {
	if l.err != nil || l.closed {
		return
	}
	l.err = fmt.Errorf("%w: %w", ErrClosed, err)
	l.opts.Logger.Error("nvram log failed", "log", l.id, "err", err)
	close(l.failed)
	l.abandon(l.err)
}

// abandon answers every Append that waits, but for those whose payload is being copied: write answers them.
// Called with mu held.
func (l *Log) abandon(err error) {
	for _, r := range l.pending {
		if r.ready {
			r.abandon(err)
		}
	}
	for c := range l.queue {
		for _, q := range l.queue[c] {
			q.finish(0, fmt.Errorf("nvram: append: %w", err))
		}
		l.queue[c] = nil
	}
	l.changed.Broadcast()
}

func (r *record) abandon(err error) {
	for _, q := range r.reqs {
		q.finish(0, fmt.Errorf("nvram: append lsn %d: outcome unknown: %w", r.lsn, err))
	}
	r.reqs = nil
}

// Close ends the log; Appends that wait get ErrClosed, and their outcome is unknown. The replicator is detached.
func (l *Log) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	l.abandon(ErrClosed)
	failed := l.err != nil
	l.mu.Unlock()
	close(l.stop)
	if l.opts.Replicator != nil {
		l.opts.Replicator.Detach()
	}
	l.writers.Wait()
	l.routines.Wait()
	if failed {
		return nil // nothing that failed is touched again; the next Open looks at it
	}
	return l.writeTails(true)
}

func (l *Log) poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
