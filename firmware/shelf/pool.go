package shelf

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/target"
)

const (
	blockBytes  = raid.BlockBytes
	stripBlocks = raid.StripBlocks
	// maxLUNBlocks is 2^32 extents of 8 MiB.
	maxLUNBlocks = 1 << 43
)

// The kinds of the sets that this package logs; the ranges are nvram's.
const (
	setData   = nvram.KindWrite
	setMap    = nvram.KindInternal
	setMeta   = nvram.KindInternal + 1
	setUpdate = nvram.KindUpdate
)

// Array is what a pool needs of *raid.Array.
type Array interface {
	Geometry() raid.Geometry
	Read(ctx context.Context, stripe uint64, block int, dst [][]byte) error
	Fetch(ctx context.Context, stripe uint64, block, count int, dst [][]byte, loan *raid.Loan) ([][]byte, error)
	WriteStripe(ctx context.Context, stripe, gen uint64, data [][]byte) error
	PrepareUpdate(ctx context.Context, stripe, gen uint64, blocks []raid.BlockWrite) (*raid.Update, error)
	PrepareLoss(ctx context.Context, stripe, gen uint64, blocks []raid.BlockWrite, spec raid.LossSpec) (*raid.Update, error)
	Apply(ctx context.Context, u *raid.Update) error
	Flush(ctx context.Context) error
}

// Log is what a pool needs of *nvram.Log.
type Log interface {
	Source
	Append(ctx context.Context, sets ...nvram.Set) (uint64, error)
	Trim(lsn uint64)
	TrimUpdates(lsn uint64)
	MaxAppendBlocks() int
	MaxUpdateBlocks() int
	Stats() nvram.Stats
	// Failed is closed when the log takes nothing more; Err says why.
	Failed() <-chan struct{}
	Err() error
}

// Source gives back what a log took: *nvram.Log, or *nvram.Mirror in a takeover.
type Source interface {
	Replay(fn func(lsn uint64, set nvram.Set) error) error
}

// Options of a pool. The zero value of each field is given in brackets.
type Options struct {
	// PoolUUID is written by CreatePool [random] and checked by OpenPool [not checked].
	PoolUUID [16]byte
	// Shelf is the shelf's name, for the serial numbers of LUNs.
	Shelf string
	// ExtentBlocks is the unit of allocation of a new pool. [2048: 8 MiB]
	ExtentBlocks int
	// MaxLUNs and MaxHosts bound a new pool's records. [1023, 256]
	MaxLUNs, MaxHosts int
	// ReservationBlocks bounds the blocks of 4 KiB in which a new pool keeps its LUNs' persistent reservations. [2 × MaxLUNs]
	ReservationBlocks int
	// PieceBlocks bounds the blocks that one log record carries for one write. [256: 1 MiB, at least a stripe]
	PieceBlocks int
	// OverlayBlocks bounds the blocks acknowledged but not destaged. [what the log holds, twice: zeros take
	// no payload]
	OverlayBlocks int
	// BatchBlocks bounds the blocks that one round of destage writes, so its memory. [4096: 16 MiB]
	BatchBlocks int
	// Workers is how many stripes a round writes at a time. [4]
	Workers int
	// IdleAfter: when no write came for so long, destage goes on without need, so that a takeover has little
	// to replay. [2 s; negative: never]
	IdleAfter time.Duration
	// Maintenance is the background work on the array; Inline pools have none.
	Maintenance MaintenanceOptions
	// AcceptOld opens a pool whose log was given up: stripes of the metadata that were being changed then are taken as they are
	// (raid.ScrubOptions.AcceptOld). The array must be a *raid.Array, or have its ScrubAll. [false]
	AcceptOld bool
	// Inline destages in the calls that need room instead of in the background: no goroutine runs, and the
	// same calls give the same I/Os in the same order. For simulations.
	Inline bool
	// Random makes UUIDs. [crypto/rand]
	Random func([]byte)
	// Logger hears of what an operator should know. [none]
	Logger *slog.Logger
}

func (o *Options) defaults() {
	set := func(p *int, v int) {
		if *p == 0 {
			*p = v
		}
	}
	set(&o.ExtentBlocks, 2048)
	set(&o.MaxLUNs, 1023)
	set(&o.MaxHosts, 256)
	set(&o.ReservationBlocks, 2*o.MaxLUNs)
	set(&o.PieceBlocks, 256)
	set(&o.BatchBlocks, 4096)
	set(&o.Workers, 4)
	if o.Inline {
		o.Workers = 1
	}
	if o.IdleAfter == 0 {
		o.IdleAfter = 2 * time.Second
	}
	if o.Random == nil {
		o.Random = func(b []byte) { rand.Read(b) }
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
}

// What pool calls answer, beside the errors of package target.
var (
	// ErrNoPool: the array carries no pool.
	ErrNoPool = errors.New("shelf: no pool on the array")
	// ErrForeign: another pool than the caller asked for.
	ErrForeign = errors.New("shelf: another pool")
	// ErrLogInUse: CreatePool found records in the log; they would be replayed into the new pool.
	ErrLogInUse = errors.New("shelf: log is not empty")
	// ErrLogSize: the log is too small for the pool's stripes.
	ErrLogSize = errors.New("shelf: log too small")
	// ErrExists: the name is taken.
	ErrExists = errors.New("shelf: name is taken")
	// ErrNotFound: no LUN or host of that name.
	ErrNotFound = errors.New("shelf: not found")
	// ErrName: a name that is empty, too long, or not printable ASCII without spaces.
	ErrName = errors.New("shelf: invalid name")
	// ErrSize: a size or block size that the LUN kind cannot have, or a resize that would shrink.
	ErrSize = errors.New("shelf: invalid size")
	// ErrLimit: no free LUN id or host record.
	ErrLimit = errors.New("shelf: limit reached")
	// ErrFailed: the pool stopped after an error of the array or the log; see Pool.Err.
	ErrFailed = errors.New("shelf: pool stopped")
)

// Pool is an open pool. It has one owner: whoever opened it holds the members' reservation.
type Pool struct {
	array Array
	log   Log
	opts  Options

	// ctx ends with the pool: Appends and destage run under it, since an initiator that gives up must not
	// leave a write with an unknown outcome.
	ctx    context.Context
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup
	failed chan struct{}
	kick   chan struct{} // wakes the background goroutine
	reapCh chan struct{} // wakes the reaper

	admin, turn semaphore
	// keeper is the background work; nil: none.
	keeper *maintainer
	load   load
	// giving: a stripe of the running round is given up (lost.go).
	giving atomic.Bool

	mu    sync.Mutex
	sb    superblock
	gen   uint64 // the next generation; below sb.GenCeiling
	err   error  // sticky
	luns  map[uint32]*LUN
	hosts []Host // by record; a Name of "" is a free record
	// reservations are by block.
	reservations []reservationBlock
	table        *extentTable
	over         *overlay
	refs         lsnRefs
	flying       floors
	maxLSN       uint64 // highest LSN whose record is accounted for in refs
	trimmed      uint64 // the log was told that it may trim so far
	// holdTrim: a takeover's source must stay replayable together with the log.
	holdTrim bool
	// inflight are bytes admitted and not yet in the log.
	inflight int64
	// closing: nothing is admitted any more.
	closing bool
	inserts uint64 // counts insertions, for IdleAfter
	picks   uint64 // counts searches for work, for stripes that rest
	waiters []chan struct{}
	stats   Counters
}

// Counters count since the pool was opened.
type Counters struct {
	Reads, Writes, OverlayHits uint64
	// FullStripes, PartialStripes and Blocks were destaged, in Rounds with one flush each.
	FullStripes, PartialStripes, Blocks, Rounds uint64
	// Stalls are writes that waited for room.
	Stalls uint64
	// StuckStripes cannot be destaged now: blocks of them cannot be read, and may come back (lost.go). GivenUp are
	// stripes that were beyond parity and are whole again but for LostBlocks blocks.
	StuckStripes        int
	GivenUp, LostBlocks uint64
	// Replayed are the sets found at start-up; ReplayedUpdates those that were stripe updates.
	Replayed, ReplayedUpdates uint64
}

// Status is a snapshot for people and programs.
type Status struct {
	UUID                          [16]byte
	State                         string // "ok", "full" (no extent left for plain LUNs) or "failed"
	Err                           error
	CapacityBytes, AllocatedBytes int64
	// ReserveBytes of the capacity are only for journal and store LUNs.
	ReserveBytes           int64
	DirtyBytes             int64
	LogBytes, LogUsedBytes int64
	Counters               Counters
}

func newPool(array Array, log Log, o Options) *Pool {
	o.defaults()
	p := &Pool{array: array, log: log, opts: o, failed: make(chan struct{}), kick: make(chan struct{}, 1), reapCh: make(chan struct{}, 1),
		admin: newSemaphore(), turn: newSemaphore(), load: load{epoch: time.Now()}, luns: map[uint32]*LUN{}}
	p.ctx, p.cancel = context.WithCancelCause(context.Background())
	return p
}

// CreatePool writes an empty pool on an array and opens it. The log must be empty.
func CreatePool(ctx context.Context, array Array, log Log, o Options) (*Pool, error) {
	p := newPool(array, log, o)
	if p.opts.PoolUUID == ([16]byte{}) {
		p.opts.Random(p.opts.PoolUUID[:])
	}
	err := log.Replay(func(uint64, nvram.Set) error { return ErrLogInUse })
	if err != nil {
		return nil, fmt.Errorf("shelf: create pool: %w", err)
	}
	g := array.Geometry()
	sb, err := layOut(g.Stripes, g.K, g.M, uint32(p.opts.ExtentBlocks), uint32(p.opts.MaxLUNs), uint32(p.opts.MaxHosts), uint32(p.opts.ReservationBlocks))
	if err != nil {
		return nil, fmt.Errorf("shelf: create pool: %w: %v", ErrSize, err)
	}
	sb.UUID, sb.GenCeiling = p.opts.PoolUUID, 2
	p.sb = sb
	p.table = newExtentTable(&p.sb)
	if err := p.format(ctx); err != nil {
		return nil, fmt.Errorf("shelf: create pool: %w", err)
	}
	return OpenPool(ctx, array, log, nil, p.opts)
}

// format writes the metadata stripes, that of the superblock last: a pool is there when it is.
func (p *Pool) format(ctx context.Context) error {
	n := p.sb.stripeBlocks()
	for i := int64(p.sb.DataStripe) - 1; i >= 0; i-- {
		if i == 0 {
			if err := p.array.Flush(ctx); err != nil {
				return err
			}
		}
		data := make([][]byte, n)
		for b := range data {
			data[b] = p.render(uint32(int(i)*n + b))
		}
		if err := p.array.WriteStripe(ctx, uint64(i), p.sb.GenCeiling-1, data); err != nil {
			return err
		}
	}
	return p.array.Flush(ctx)
}

// render makes the present content of a metadata block.
func (p *Pool) render(block uint32) []byte {
	switch {
	case block == 0:
		return p.sb.encode()
	case block < p.sb.hostBlock():
		if l := p.luns[block]; l != nil {
			return l.rec.encode()
		}
	case block < p.sb.reservationBlock():
		if i := int(block - p.sb.hostBlock()); i < len(p.hosts) && p.hosts[i].Name != "" {
			return encodeHost(p.hosts[i], block)
		}
	case block < p.sb.tableBlock():
		if i := int(block - p.sb.reservationBlock()); i < len(p.reservations) && p.reservations[i].lun != 0 {
			return encodeReservation(p.reservations[i], block)
		}
	default:
		if entries, ok := p.table.block(block); ok {
			return encodeTable(entries, block)
		}
	}
	return zeroBlock
}

var zeroBlock = nvram.AlignedBlocks(1)

// Status returns a snapshot.
func (p *Pool) Status() Status {
	ls := p.log.Stats()
	p.mu.Lock()
	defer p.mu.Unlock()
	eb := int64(p.sb.ExtentBlocks) * blockBytes
	s := Status{UUID: p.sb.UUID, State: "ok", Err: p.err, CapacityBytes: int64(p.sb.capacity()) * eb,
		AllocatedBytes: int64(p.table.used) * eb, DirtyBytes: int64(p.over.entries) * blockBytes,
		LogBytes: ls.Bytes, LogUsedBytes: ls.Used, Counters: p.stats}
	s.ReserveBytes = int64(reserveExtents(p.sb.capacity())) * eb
	s.Counters.StuckStripes = p.over.stuckStripes()
	switch {
	case p.err != nil:
		s.State = "failed"
	case p.table.used+reserveExtents(p.sb.capacity()) >= p.sb.capacity():
		s.State = "full"
	}
	return s
}

// Failed is closed when the pool stopped after an error of the array or the log, which Err returns. Nothing
// is acknowledged from then on; what was acknowledged is in the log.
func (p *Pool) Failed() <-chan struct{} { return p.failed }

// Err is why the pool stopped, or nil.
func (p *Pool) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// fail stops the pool for good. The first error counts.
func (p *Pool) fail(err error) {
	if p.stop(err) {
		p.opts.Logger.Error("pool stopped", "err", err)
	}
}

// stop ends the pool with err, unless it has ended already.
func (p *Pool) stop(err error) (first bool) {
	p.mu.Lock()
	if first = p.err == nil; first {
		p.err = err
		close(p.failed)
		p.wakeWaiters()
	}
	p.mu.Unlock()
	if first {
		p.cancel(err)
	}
	return first
}

// alive returns what an operation on a stopped pool answers.
func (p *Pool) alive() error {
	if err := p.Err(); err != nil {
		return fmt.Errorf("%w: %w: %w", target.ErrUnavailable, ErrFailed, err)
	}
	return nil
}

// append logs sets as one and calls done, under mu, with the record's LSN before Trim can pass it. It ends
// only with an answer of the log: an initiator's impatience must not leave it unknown what is logged.
func (p *Pool) append(done func(lsn uint64), sets ...nvram.Set) error {
	p.mu.Lock()
	if p.err != nil {
		p.mu.Unlock()
		return p.alive()
	}
	f := p.flying.begin(p.maxLSN + 1)
	p.mu.Unlock()
	lsn, err := p.log.Append(p.ctx, sets...)
	p.mu.Lock()
	if err == nil {
		p.maxLSN = max(p.maxLSN, lsn)
		done(lsn)
	}
	p.flying.end(f)
	p.mu.Unlock()
	if err != nil {
		p.fail(fmt.Errorf("shelf: append: %w", err))
		return p.alive()
	}
	return nil
}

// trim tells the log what nothing needs any more. Called with mu free, after the members' flush of what was destaged.
func (p *Pool) trim() {
	p.mu.Lock()
	lsn := p.maxLSN + 1
	if l, ok := p.refs.first(); ok {
		lsn = min(lsn, l)
	}
	if l, ok := p.flying.first(); ok {
		lsn = min(lsn, l)
	}
	hold := p.holdTrim
	if !hold {
		p.trimmed = max(p.trimmed, lsn)
	}
	p.mu.Unlock()
	if !hold {
		p.log.Trim(lsn)
	}
	p.mu.Lock()
	p.wakeWaiters()
	p.mu.Unlock()
}

// ReleaseSources ends a takeover: the sources given to OpenPool will not be replayed again, so the log may be
// trimmed. Call it when the members' label says so durably.
func (p *Pool) ReleaseSources() {
	p.mu.Lock()
	p.holdTrim = false
	p.mu.Unlock()
	p.trim()
}

// Close admits nothing more (ErrTransition), waits for what was admitted, drains until ctx ends, stops and waits. After
// nil everything that was ever acknowledged is on the members; else the rest stays in the log. The array and the log stay
// open.
func (p *Pool) Close(ctx context.Context) error {
	// In this order: a write that is acknowledged after the last look of Drain would be in the log alone, and who takes a
	// pool that was handed over does not read the log.
	err := p.quiesce(ctx)
	if err == nil {
		err = p.Drain(ctx)
	}
	p.Abort()
	return err
}

// quiesce returns when nothing that was admitted is under way, and nothing will be.
func (p *Pool) quiesce(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closing = true
	p.wakeWaiters()
	for p.inflight > 0 && p.err == nil {
		w := make(chan struct{})
		p.waiters = append(p.waiters, w)
		p.mu.Unlock()
		var err error
		select {
		case <-w:
		case <-p.failed:
		case <-ctx.Done():
			err = fmt.Errorf("shelf: close: %w", ctx.Err())
		}
		p.mu.Lock()
		if err != nil {
			return err
		}
	}
	return nil
}

// Abort stops without destaging: the owner was fenced, or goes down.
func (p *Pool) Abort() {
	p.stop(fmt.Errorf("%w: pool closed", target.ErrUnavailable))
	p.wg.Wait()
}

// semaphore gives one holder at a time a turn that may last over I/O.
type semaphore chan struct{}

func newSemaphore() semaphore { return make(semaphore, 1) }

func (s semaphore) take(ctx context.Context) error {
	select {
	case s <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (s semaphore) give() { <-s }
