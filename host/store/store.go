package store

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ledge-storage/ledge/host/dedup"
	"github.com/ledge-storage/ledge/host/meter"
)

var (
	// ErrForeign: the LUN holds something that is no store of ours, or another store.
	ErrForeign = errors.New("store: not this store")
	// ErrVersion: written by a newer program.
	ErrVersion = errors.New("store: unknown version")
	// ErrFenced: another host has opened the store since; nothing more may be written.
	ErrFenced = errors.New("store: opened by another host")
	// ErrFailed: an error before made the store stop; only opening it again helps.
	ErrFailed = errors.New("store: failed")
	// ErrClosed: Close was called.
	ErrClosed = errors.New("store: closed")
	// ErrExists, ErrNotFound, ErrName, ErrSize: what is wrong with a request for a volume.
	ErrExists   = errors.New("store: exists already")
	ErrNotFound = errors.New("store: no such volume or snapshot")
	ErrName     = errors.New("store: bad volume name")
	ErrSize     = errors.New("store: bad volume size")
	// ErrIndexSize: an index cannot be so small.
	ErrIndexSize = errors.New("store: bad index size")
	// ErrLimit: as many volumes or snapshots as a store can have.
	ErrLimit = errors.New("store: too many volumes")
	// ErrCompression: there is none of that name.
	ErrCompression = errors.New("store: no such compression")
	// ErrHasSnapshots: a volume is deleted after its snapshots.
	ErrHasSnapshots = errors.New("store: volume has snapshots")
	// ErrMap: a page of a volume's map cannot be read. It wraps target.ErrMediumRead; see Options.AcceptLost.
	ErrMap = errors.New("store: a page of a volume's map is not readable")
	// ErrJournal: a piece of the journal cannot be read that may hold acknowledged writes, or a segment that no checkpoint knows yet. It wraps
	// target.ErrMediumRead, or ErrCorrupt where the journal no more has what was in a segment that is damaged; see Options.AcceptLost.
	ErrJournal = errors.New("store: a piece of the journal is not readable")
	// ErrNoClone: only a clone of a snapshot that is there can be promoted.
	ErrNoClone = errors.New("store: not a clone of a snapshot that exists")
)

// Options of Open. Journal and Segments are required.
type Options struct {
	Journal, Segments Device
	// Cache is asked before the segment LUN; nil: none.
	Cache Cache
	// UUID refuses every other store; zero takes any.
	UUID [16]byte
	// CapacityBytes bounds the segments that are allocated; zero: the segment LUN's size.
	CapacityBytes int64
	// BufferBytes bounds the data that is acknowledged and not packed; zero: 64 MiB.
	BufferBytes int64
	// PackDelay is how long what is acknowledged may wait in the journal and in memory before it is packed, as long as it is less than half of
	// BufferBytes and a quarter of the journal: what is overwritten meanwhile is never packed. Zero: 2 s; less: not at all.
	PackDelay time.Duration
	// MapBytes bounds the memory of all maps; zero: 1 GiB. What is not in memory is read when it is needed: 2 MiB of a volume
	// are one page of 4 KiB, of which 64 bytes always are there.
	MapBytes int64
	// IndexBytes bounds the memory of the dedup index; zero: 64 MiB, which finds 32 GiB of blocks.
	IndexBytes int64
	// LineBytes bounds the memory of lines of segments kept for reading; zero: 64 MiB.
	LineBytes int64
	// TableBytes bounds the memory of segment tables kept for verifying dedup hits; zero: 64 MiB.
	TableBytes int64
	// RecordBytes bounds a journal record's payload; zero: 1 MiB.
	RecordBytes int
	// Workers fingerprint and compress; zero: two, or one on a single CPU.
	Workers int
	// CheckpointSegments is after how many segments a checkpoint is due; zero: 64, and more when
	// the map is large, so that checkpoints stay a small part of what is written.
	CheckpointSegments int
	// AcceptLost has Open give up the pages of maps that cannot be read, of all volumes and snapshots: nothing is known any more of
	// what their blocks hold. Without it such a page stops the store when it is to be changed. A piece of the journal that cannot be read is
	// its end then: without it the store does not open (ErrJournal). GivenUp tells what that was.
	AcceptLost bool
	// Now is the time that snapshots get; nil: the machine's.
	Now    func() time.Time
	Logger *slog.Logger

	coldTimes float64 // zero: coldTimes
}

const (
	maxRecordBytes   = 4 << 20
	journalPipeline  = 4  // records on their way to the journal LUN
	reserveStep      = 64 // most segment numbers reserved by one superblock write, and lost by one crash
	numbersKept      = 8  // steps of numbers kept back, for checkpoints and openings, when they run out
	mostZeroRanges   = 1024
	smallZero        = 64 // blocks: shorter zeroed ranges are kept block by block
	stripesAtOnce    = 4
	leastSpare       = 8  // segments kept back for checkpoint and cleaner when capacity runs out: a sixteenth, at least
	mostSpare        = 24 // and at most. What is 95 % in use is cleaned with so many.
	linesAtOnce      = 8
	defaultKeepBytes = 64 << 20
)

func (o *Options) complete() error {
	if o.Journal == nil || o.Segments == nil {
		return errors.New("store: options: Journal and Segments are required")
	}
	if o.Cache == nil {
		o.Cache = noCache{}
	}
	for _, d := range []struct {
		p *int64
		v int64
	}{{&o.CapacityBytes, o.Segments.Size()}, {&o.BufferBytes, defaultKeepBytes}, {&o.MapBytes, 1 << 30}, {&o.IndexBytes, defaultKeepBytes},
		{&o.LineBytes, defaultKeepBytes}, {&o.TableBytes, defaultKeepBytes}} {
		if *d.p == 0 {
			*d.p = d.v
		}
		if *d.p < 0 {
			return errors.New("store: options: a negative size")
		}
	}
	if o.RecordBytes == 0 {
		o.RecordBytes = 1 << 20
	}
	if o.RecordBytes < BlockBytes || o.RecordBytes%BlockBytes != 0 || recordBytes(maxEntries, o.RecordBytes) > maxRecordBytes {
		return fmt.Errorf("store: options: RecordBytes %d", o.RecordBytes)
	}
	if need := ringOffset + 4*journalPipeline*int64(recordBytes(maxEntries, o.RecordBytes)); o.Journal.Size() < need {
		return fmt.Errorf("store: journal LUN of %d bytes; records of %d bytes need %d", o.Journal.Size(), o.RecordBytes, need)
	}
	if o.Segments.Size() < 16*SegmentBytes {
		return fmt.Errorf("store: segment LUN of %d bytes; at least %d are needed", o.Segments.Size(), 16*SegmentBytes)
	}
	if o.Workers <= 0 {
		o.Workers = min(2, runtime.GOMAXPROCS(0))
	}
	if o.PackDelay == 0 {
		o.PackDelay = 2 * time.Second
	}
	if o.coldTimes == 0 {
		o.coldTimes = coldTimes
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

// Store is an open store. Lock order: superTurn before mu; lines has a lock of its own, a leaf.
// No lock is held across I/O but superTurn, which is the turn to do that I/O.
type Store struct {
	opt    Options
	hasher *dedup.Hasher
	index  atomic.Pointer[dedup.Index]
	near   near   // the packer's
	slab   []byte // of compress
	lines  *lineCache
	// Of the flash cache, beside counters: no read takes mu for itself alone for them.
	cacheHits, cacheMisses atomic.Int64

	unmetered *meter.Volume // counts the cleaner and snapshots

	uuid      [16]byte
	epoch     uint64
	ringSize  uint64
	spare     int           // segments kept back
	numbers   uint32        // segment numbers that the LUN has, 0 included
	step      uint32        // how many of them are reserved at once
	super     superblock    // read and changed by writeSuper only
	superTurn chan struct{} // one: whose turn it is

	ctx    context.Context // of the goroutines
	cancel context.CancelFunc
	wg     sync.WaitGroup
	wake   chan struct{} // for the packer: look again

	mu      sync.RWMutex
	err     error         // why the store stopped; nil while it works
	closed  bool          // no new requests
	changed chan struct{} // closed and replaced when something waited for may have come
	waiters int

	volumes   map[uint32]*Volume            // and snapshots
	byName    map[string]*Volume            // volumes
	snaps     map[uint32]map[string]*Volume // snapshots, by the volume that they are of
	snapshots int
	nextVol   uint32

	// Journal: records not yet needless, oldest first; the ring in bytes that only grow.
	current    *batch
	inflight   []*batch // being written, in order
	queue      []*batch // durable, not packed
	records    []ringRecord
	head, tail uint64
	handed     uint64 // where the records begin that no sealed segment holds
	buffered   int64  // bytes staged and not packed
	packTo     uint64 // records before it are packed at once
	zeroRanges int
	packed     position // everything before is in the map
	sealedTo   position // everything before is in durable segments, or overwritten by what is durable
	logTo      uint32   // the last of those segments
	awaiting   []await  // segments of the log behind it, in order: durable, but one of them refers to something that is not yet

	// Segments.
	segs         map[uint32]*segment
	inMemory     map[uint32]*builder // open, and on their way to the LUN
	sealing      int
	full         bool // the last segment write found no space
	cleaning     *round
	references   int64  // of maps to blocks that came since the opening, less those that went
	surveyed     survey // what the cleaner last found
	gaveUp       bool   // cleaning frees nothing any more: what is short of space is refused instead of waiting
	maps         mapUse
	unwritten    unwritten
	dying        []*blockMap // of deleted volumes, taken apart little by little
	corpse       *blockMap   // of them, the one that pages are added to,
	corpses      uint64      // and how many were
	ckptSegments int         // of checkpoints: with the items of the one that counts, or with pages that do
	ckptItems    int         // with items,
	ckptCopies   int         // and with their second copy
	ckptBytes    int64
	needed       *checkpointCall // wanted checkpoint
	counters     counters
	indexReady   bool
	recovering   bool
	givenUp      []GivenUp

	// Owned by the packer.
	open        *builder
	lastSegment uint32 // of the log
	nextSegment uint32 // written with mu held, because admit reads it
	reserved    uint32 // numbers below may be used
	sinceCkpt   int    // segments opened since the checkpoint
	tables      tableCache
	toSeal      chan *builder
	ckptID      uint64
	ckptFirst   uint32
	condemned   []uint32 // to free once the next superblock is durable
	pass        uint64   // over all maps
	aside       *builder // open segment beside the log
	clock       float64  // blocks packed since the opening
	age         meanAge  // of blocks that are overwritten
	sinceLook   int      // steps since the cleaner looked around
	cleanAfter  uint32   // no cleaning for tidiness, or after a round that gained nothing, before this segment number
	breaths     int      // of breathe,
	breathed    time.Time
	freeable    int  // segments without references that are worth a checkpoint, once there are enough of them
	segsBefore  int  // segments before the cleaner emptied those
	fruitless   bool // the last round gained nothing
}

// segment is what is known of an allocated data segment.
type segment struct {
	slots     uint32
	bytes     uint32  // in use: blocks, table, log, trailer
	live      int64   // references from maps
	updated   float64 // by Store.clock: when its blocks were overwritten the last time but one, the mean of estimates; not kept through an opening
	condemned bool
	victim    bool // being cleaned
	stuck     bool // something in it cannot be read: the cleaner leaves it alone from now on, and nothing new refers to it
	shares    []share
}

// share is what a volume's writes brought into a segment.
type share struct {
	vol   uint32
	slots uint32
	bytes uint32
}

func (s *segment) share(vol uint32) *share {
	for i := range s.shares {
		if s.shares[i].vol == vol {
			return &s.shares[i]
		}
	}
	s.shares = append(s.shares, share{vol: vol})
	return &s.shares[len(s.shares)-1]
}

// Open formats a blank journal LUN, or recovers what is there, and returns when every
// acknowledged write of the store's past is readable and in segments. ctx bounds the opening.
func Open(ctx context.Context, opt Options) (*Store, error) {
	if err := opt.complete(); err != nil {
		return nil, err
	}
	st := &Store{
		opt: opt, superTurn: make(chan struct{}, 1), wake: make(chan struct{}, 1), changed: make(chan struct{}),
		volumes: map[uint32]*Volume{}, byName: map[string]*Volume{}, snaps: map[uint32]map[string]*Volume{}, nextVol: 1,
		segs: map[uint32]*segment{}, inMemory: map[uint32]*builder{}, toSeal: make(chan *builder, 1),
		lines: newLineCache(int(opt.LineBytes / LineBytes)), unmetered: meter.New(),
	}
	st.spare = int(min(max(opt.CapacityBytes/SegmentBytes/16, leastSpare), mostSpare))
	st.index.Store(dedup.NewIndex(opt.IndexBytes))
	st.tables.limit = opt.TableBytes
	st.maps = mapUse{limit: opt.MapBytes, homes: map[uint32]*home{}, hold: st.hold, release: st.release}
	found, blank, err := readSuper(ctx, opt.Journal)
	if err != nil {
		return nil, err
	}
	if blank {
		if found, err = st.format(ctx); err != nil {
			return nil, err
		}
	}
	if opt.UUID != [16]byte{} && found.uuid != opt.UUID {
		return nil, fmt.Errorf("store: found %x, want %x: %w", found.uuid, opt.UUID, ErrForeign)
	}
	if found.ringSize > uint64(opt.Journal.Size()-ringOffset) {
		return nil, fmt.Errorf("store: ring of %d bytes on a journal LUN of %d: %w", found.ringSize, opt.Journal.Size(), ErrCorrupt)
	}
	st.super, st.uuid, st.ringSize = found, found.uuid, found.ringSize
	st.hasher = dedup.NewHasher(dedup.Key(found.key))
	st.ctx, st.cancel = context.WithCancel(context.Background())
	if err := st.recover(ctx); err != nil {
		st.stop()
		return nil, err
	}
	return st, nil
}

// format writes the first superblocks.
func (st *Store) format(ctx context.Context) (superblock, error) {
	s := superblock{reserved: 1, jSeq: 1, seq: 1, ringSize: ringBytes(st.opt.Journal)}
	rand.Read(s.uuid[:])
	s.uuid[6], s.uuid[8] = s.uuid[6]&0x0f|0x40, s.uuid[8]&0x3f|0x80 // RFC 9562, version 4
	if st.opt.UUID != [16]byte{} {
		s.uuid = st.opt.UUID
	}
	rand.Read(s.key[:])
	if err := st.opt.Journal.WriteAt(ctx, s.encode(), BlockBytes); err != nil {
		return s, fmt.Errorf("store: format: %w", err)
	}
	return s, nil
}

// UUID identifies the store for ever.
func (st *Store) UUID() [16]byte { return st.uuid }

// Close packs everything, writes a checkpoint and ends. The store's next opening then has nothing
// to replay. After an error, or when ctx ends first, it only ends: nothing acknowledged is lost.
func (st *Store) Close(ctx context.Context) error {
	st.mu.Lock()
	if st.closed {
		st.mu.Unlock()
		return ErrClosed
	}
	st.closed = true
	st.notify()
	err := st.wait(ctx, func() bool { return len(st.current.ops) == 0 && len(st.inflight) == 0 })
	st.mu.Unlock()
	if err == nil {
		err = st.checkpoint(ctx, true)
	}
	if err == nil { // nothing uses numbers any more: none is lost by a clean end
		st.mu.RLock()
		next := st.nextSegment
		st.mu.RUnlock()
		err = st.writeSuper(ctx, func(s *superblock) { s.reserved = next })
	}
	st.stop()
	if err != nil {
		return fmt.Errorf("store: close: %w", err)
	}
	return nil
}

// stop ends the goroutines wherever they are and waits for them.
func (st *Store) stop() {
	st.fail(ErrClosed)
	st.cancel()
	st.wg.Wait()
}

// fail makes err the end of the store: everyone who waits is told.
func (st *Store) fail(err error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.err != nil {
		return
	}
	if !errors.Is(err, ErrClosed) {
		st.opt.Logger.Error("store stopped", "err", err)
		err = fmt.Errorf("%w: %w", ErrFailed, err)
	}
	st.err = err
	for _, b := range append(st.inflight, st.current) {
		if b != nil && !b.durable && b.err == nil {
			b.err = err
			close(b.done)
		}
	}
	st.notify()
}

// Err is why the store stopped, or nil.
func (st *Store) Err() error {
	st.mu.RLock()
	defer st.mu.RUnlock()
	return st.err
}

// wait returns when ok holds, with mu held as it was called; ok is called with mu held.
func (st *Store) wait(ctx context.Context, ok func() bool) error {
	for {
		if st.err != nil {
			return st.err
		}
		if ok() {
			return nil
		}
		changed := st.changed
		st.waiters++
		st.mu.Unlock()
		var err error
		select {
		case <-changed:
		case <-ctx.Done():
			err = ctx.Err()
		}
		st.mu.Lock()
		st.waiters--
		if err != nil {
			return err
		}
	}
}

// notify makes all waiters look again, and the packer. mu is held.
func (st *Store) notify() {
	if st.waiters > 0 {
		close(st.changed)
		st.changed = make(chan struct{})
	}
	select {
	case st.wake <- struct{}{}:
	default:
	}
}
