package sim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/ledge-storage/ledge/firmware/shelf"
	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/nvram/nvramtest"
	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/raid/raidtest"
)

// A step of the pool world is what survives or does not: a write of the NVRAM region, and an operation of the array (the
// writes of a stripe to its members, a flush of all of them, the rebuild of a stripe). When the power goes during a
// step of the array, each member's part of it has arrived or not, by the seed, and of what the members' caches held each
// sector has landed or not.

// errPower is everything's answer while the power is off.
var errPower = errors.New("sim: no power")

// The shape of a world: small enough that all of it is used, with every path of the product in reach.
const (
	updateBytes  = 64 * blockBytes
	extentBlocks = 128 // two stripes
	blockBytes   = raid.BlockBytes
)

// shape is an array's geometry.
type shape struct {
	members, data, parity, spares, slots int
	regionBlocks                         int64
}

// shapes: without spare space; with one column of it: of these seven members three can be lost (the labels need a
// majority), one of them rebuilt; and one in which a small update reads less than the rest of its stripe.
var shapes = []shape{{5, 2, 2, 0, 16, 352}, {7, 2, 2, 1, 12, 352}, {5, 4, 1, 0, 16, 704}}

// shapeOf is the number of a seed's shape: the last, whose stripes are large, is rare.
func shapeOf(seed uint64) int { return []int{0, 1, 0, 1, 1, 2}[seed/8%6] }

func (s shape) driveBytes() int64 { return raid.DataOffset + int64(s.slots)*raid.SlotBytes }

func (w *world) raidOptions() raid.Options {
	s := w.shape
	return raid.Options{Logger: w.logger, K: s.data, M: s.parity, Spares: s.spares, NoSpares: s.spares == 0, Random: w.random, CacheBytes: cacheBytes(w.seed)}
}

// cacheBytes is so little in a third of the seeds that of most stripes the generations alone stay in memory.
func cacheBytes(seed uint64) int {
	if seed%3 == 0 {
		return 1
	}
	return 0
}

// world is the hardware and its power.
type world struct {
	seed     uint64
	mutation Mutation
	counts   Counts
	shape    shape
	logger   *slog.Logger
	disks    *raidtest.Set
	regions  []*nvramtest.Region
	current  int // region of the running log
	epoch    uint64

	off     atomic.Bool
	cutting atomic.Bool // an operation of the array during which the power goes

	mu    sync.Mutex // guards steps, cutAt, counts: the log trims beside a pool that opens
	steps int
	cutAt int // step; 0: never

	// taking: a takeover has begun; the members' label would say so.
	taking    bool
	acceptOld bool // the log was given up
	unflushed bool // TrimBeforeFlush: a flush is owed

	sick   sick
	grown  bool
	array  *raid.Array
	log    *nvram.Log
	pool   *shelf.Pool
	closed []shelf.Counters // of pools
}

// step counts a durable step and tells whether the power goes during it.
func (w *world) step() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.steps++
	w.counts["step"]++
	return w.steps == w.cutAt
}

// cutIn has the power go during the step-th step from now on; 0: never.
func (w *world) cutIn(step int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.steps, w.cutAt = 0, step
}

// spare takes back what cutIn said.
func (w *world) spare() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cutAt = 0
}

// count notes that something happened.
func (w *world) count(what string) { w.counted(what, 1) }

func (w *world) counted(what string, n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.counts[what] += n
}

func (w *world) stepped() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.steps
}

// arrives tells by the seed alone whether a member's part of the step that is cut arrived.
func (w *world) arrives(member int, off int64) bool {
	h := w.seed*0x9e3779b97f4a7c15 ^ uint64(w.stepped())<<40 ^ uint64(member)<<32 ^ uint64(off)
	h ^= h >> 31
	h *= 0xbf58476d1ce4e5b9
	return h>>40&1 == 0
}

// port is a drive with the world's power.
type port struct {
	raid.Drive
	w      *world
	member int
}

func (p *port) ReadAt(b []byte, off int64) (int, error) {
	if p.w.off.Load() {
		return 0, errPower
	}
	return p.Drive.ReadAt(b, off)
}

func (p *port) WriteAt(b []byte, off int64) (int, error) {
	switch {
	case p.w.off.Load():
		return 0, errPower
	case p.w.cutting.Load():
		// Labels do not change during the last step: the array would have to outlive the power to learn of
		// the failure that they record.
		if off >= raid.DataOffset && p.w.arrives(p.member, off) {
			p.Drive.WriteAt(b, off)
		}
		return 0, errPower
	}
	return p.Drive.WriteAt(b, off)
}

func (p *port) Flush() error {
	switch {
	case p.w.off.Load():
		return errPower
	case p.w.cutting.Load():
		if p.w.arrives(p.member, 1) {
			p.Drive.Flush()
		}
		return errPower
	}
	return p.Drive.Flush()
}

// region is NVRAM with the world's power.
type region struct {
	*nvramtest.Region
	w *world
}

func (r *region) ReadAt(b []byte, off int64) (int, error) {
	if r.w.off.Load() {
		return 0, errPower
	}
	return r.Region.ReadAt(b, off)
}

func (r *region) WriteAt(b []byte, off int64) (int, error) {
	if r.w.off.Load() {
		return 0, errPower
	}
	if r.w.step() {
		r.w.count("cut in a region write")
		r.w.off.Store(true)
		r.Region.CutAt(1) // tears this write
	}
	return r.Region.WriteAt(b, off)
}

// array is the pool's array: the edge where operations are steps, and some mutations.
type array struct {
	*raid.Array
	w *world
}

// do runs an operation that is one step.
func (a *array) do(kind string, f func() error) error {
	w := a.w
	if w.off.Load() {
		return errPower
	}
	if !w.step() {
		return f()
	}
	w.count("cut in " + kind)
	w.cutting.Store(true)
	f()
	w.cutting.Store(false)
	w.off.Store(true)
	return errPower
}

func (a *array) WriteStripe(ctx context.Context, stripe, gen uint64, data [][]byte) error {
	return a.do("a stripe write", func() error { return a.Array.WriteStripe(ctx, stripe, gen, data) })
}

func (a *array) Apply(ctx context.Context, u *raid.Update) error {
	return a.do("an update", func() error { return a.Array.Apply(ctx, u) })
}

func (a *array) Flush(ctx context.Context) error {
	switch a.w.mutation {
	case SkipFlush:
		return nil
	case TrimBeforeFlush:
		a.w.unflushed = true
		return nil
	}
	return a.do("a flush", func() error { return a.Array.Flush(ctx) })
}

// log is the pool's log: its trims are waited for, so that the steps are the same again, and mutations.
type log struct {
	*nvram.Log
	w    *world
	held [][]nvram.Set // AckBeforeAppend, ApplyBeforeLog: answered, not yet appended
}

func (l *log) Append(ctx context.Context, sets ...nvram.Set) (uint64, error) {
	switch l.w.mutation {
	case AckBeforeAppend:
		for _, h := range l.held {
			if _, err := l.Log.Append(ctx, h...); err != nil {
				return 0, err
			}
		}
		l.held = append(l.held[:0], copySets(sets))
		return l.Log.Stats().Next, nil
	case SkipUpdateLog:
		if sets[0].Kind >= nvram.KindUpdate {
			return l.Log.Stats().Next, nil
		}
	case SkipMap:
		if len(sets) == 1 && sets[0].Kind == nvram.KindInternal {
			return l.Log.Stats().Next, nil
		}
	case SplitAppend:
		if len(sets) > 1 {
			if _, err := l.Log.Append(ctx, sets[0]); err != nil {
				return 0, err
			}
			return l.Log.Append(ctx, sets[1:]...)
		}
	case ZerosAreForgotten:
		for i := range sets {
			sets[i].Extents = slices.DeleteFunc(sets[i].Extents, func(e nvram.Extent) bool { return e.Zero })
		}
	case ApplyBeforeLog:
		for _, h := range l.held {
			if _, err := l.Log.Append(ctx, h...); err != nil {
				return 0, err
			}
		}
		l.held = nil
		if sets[0].Kind >= nvram.KindUpdate {
			l.held = append(l.held, copySets(sets))
			return l.Log.Stats().Next, nil
		}
	case TrimUpdatesEarly:
		lsn, err := l.Log.Append(ctx, sets...)
		if err == nil && sets[0].Kind >= nvram.KindUpdate {
			l.TrimUpdates(lsn + 1)
		}
		return lsn, err
	}
	return l.Log.Append(ctx, sets...)
}

// copySets keeps sets beyond the call that owns their buffers.
func copySets(sets []nvram.Set) []nvram.Set {
	out := slices.Clone(sets)
	for i := range out {
		out[i].Extents = slices.Clone(out[i].Extents)
		p := make([][]byte, len(out[i].Payload))
		for j, b := range out[i].Payload {
			p[j] = slices.Clone(b)
		}
		out[i].Payload = p
	}
	return out
}

// mostSpins ends a wait for the log that a mutation makes endless.
const mostSpins = 1 << 20

// Trim returns when the log's tail moved.
func (l *log) Trim(lsn uint64) {
	if l.w.mutation == TrimEarly {
		lsn += 2
	}
	l.Log.Trim(lsn)
	for range mostSpins {
		if l.w.off.Load() || l.Log.Err() != nil {
			break
		}
		if s := l.Log.Stats(); s.Tail >= min(lsn, s.Acked) {
			break
		}
		runtime.Gosched()
	}
	if l.w.unflushed {
		l.w.unflushed = false
		(&array{l.w.array, l.w}).do("a flush", func() error { return l.w.array.Flush(context.Background()) })
	}
}

// TrimUpdates returns when the lane is empty: with destage inline no image is needed when one is trimmed, nor is
// the padding behind it.
func (l *log) TrimUpdates(lsn uint64) {
	l.Log.TrimUpdates(max(lsn, l.Log.Stats().Acked))
	for range mostSpins {
		if l.w.off.Load() || l.Log.Err() != nil || l.Log.Stats().UpdateUsed == 0 {
			break
		}
		runtime.Gosched()
	}
}

func (l *log) Replay(fn func(uint64, nvram.Set) error) error {
	return replay(l.w.mutation, l.Log, fn)
}

// source is an old log that a takeover replays.
type source struct {
	*nvram.Log
	w *world
}

func (s *source) Replay(fn func(uint64, nvram.Set) error) error {
	return replay(s.w.mutation, s.Log, fn)
}

func replay(m Mutation, l *nvram.Log, fn func(uint64, nvram.Set) error) error {
	switch m {
	case ReplayNoUpdates:
		return l.Replay(func(lsn uint64, s nvram.Set) error {
			if s.Kind >= nvram.KindUpdate {
				return nil
			}
			return fn(lsn, s)
		})
	case ReplayReversed:
		type one struct {
			lsn uint64
			set nvram.Set
		}
		var all []one
		err := l.Replay(func(lsn uint64, s nvram.Set) error {
			all = append(all, one{lsn, copySets([]nvram.Set{s})[0]})
			return nil
		})
		for i := len(all) - 1; i >= 0 && err == nil; i-- {
			err = fn(all[i].lsn, all[i].set)
		}
		return err
	}
	return l.Replay(fn)
}

// template is a world after its pool was made, which all worlds of its shape start from.
type template struct {
	disks  *raidtest.Set
	region nvramtest.Image
}

// templates are made once in a process: they are never written again.
var templates struct {
	sync.Mutex
	made [3]*template
}

func newWorld(seed uint64, m Mutation, counts Counts) (*world, error) {
	kind := shapeOf(seed)
	w := &world{seed: seed, counts: counts, shape: shapes[kind], epoch: 1}
	templates.Lock()
	defer templates.Unlock()
	t := templates.made[kind]
	for i := range uint64(2) {
		w.regions = append(w.regions, nvramtest.NewRegion(w.area().Size, 512, seed+i))
	}
	if t == nil {
		w.disks = raidtest.NewSet(1, w.shape.members, w.shape.driveBytes())
		w.counts = Counts{}
		if err := w.create(context.Background()); err != nil {
			return nil, fmt.Errorf("create: %w", err)
		}
		t = &template{w.disks, w.regions[0].Image()}
		templates.made[kind] = t
	}
	w.disks = t.disks.Clone()
	w.disks.Reseed(seed)
	w.regions[0].Show(t.region)
	w.mutation, w.counts = m, counts
	return w, nil
}

func (w *world) drives() []raid.Drive {
	ds := w.disks.Drives("A")
	for i := range ds {
		ds[i] = &port{ds[i], w, i}
		if w.sick.gone[i] {
			ds[i] = nil
		}
	}
	return ds
}

func (w *world) area() nvram.Area { return nvram.Area{Size: w.shape.regionBlocks * blockBytes} }

func (w *world) random(b []byte) {
	r := rand.New(rand.NewPCG(w.seed, uint64(w.stepped())))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
}

func (w *world) options() shelf.Options {
	return shelf.Options{Shelf: "sim", ExtentBlocks: extentBlocks, MaxLUNs: 6, MaxHosts: 4, BatchBlocks: 512, Inline: true, AcceptOld: w.acceptOld, Random: w.random, Logger: w.logger}
}

func (w *world) nvramOptions() nvram.Options { return nvram.Options{Epoch: w.epoch} }

// create makes array, log and pool, with the power safe, and closes them.
func (w *world) create(ctx context.Context) error {
	a, err := raid.Create(ctx, w.drives(), w.raidOptions())
	if err != nil {
		return err
	}
	if err := nvram.Format(&region{w.regions[0], w}, w.area(), nvram.FormatOptions{ID: logID(w), Epoch: w.epoch, UpdateBytes: updateBytes}); err != nil {
		return err
	}
	l, err := nvram.Open(ctx, &region{w.regions[0], w}, w.area(), w.nvramOptions())
	if err != nil {
		return err
	}
	p, err := shelf.CreatePool(ctx, &array{Array: a, w: w}, &log{Log: l, w: w}, w.options())
	if err != nil {
		return errors.Join(err, l.Close(), a.Close())
	}
	return errors.Join(p.Close(ctx), l.Close(), a.Flush(ctx), a.Close())
}

func logID(w *world) (id nvram.ID) {
	w.random(id[:])
	id[0] |= 1
	return id
}

// powerCut is what happens to the caches when the power is gone, and to everything that ran.
func (w *world) powerCut() {
	w.off.Store(true)
	w.disks.PowerCut() // before what hangs goes on: that must not reach the media
	w.close()
	w.count("power cut")
}

// close ends what runs, without its writing anything.
func (w *world) close() {
	w.off.Store(true)
	w.wake()
	if w.pool != nil {
		w.closed = append(w.closed, w.pool.Status().Counters)
		w.pool.Abort()
	}
	if w.log != nil {
		w.log.Close()
	}
	if w.array != nil {
		w.countRepairs(w.array.Status())
		w.array.Close()
	}
	w.pool, w.log, w.array = nil, nil, nil
}

// countRepairs notes which paths of the array ran.
func (w *world) countRepairs(s raid.Status) {
	c := s.Counters
	for what, n := range map[string]uint64{"degraded read": c.DegradedReads, "strip repaired": c.Repairs, "checksum error found": c.ChecksumErrors,
		"lost write found": c.StaleStrips, "update by delta": c.UpdatesByDelta, "update by rebuild": c.UpdatesByRebuild, "generations alone known": c.CacheGens, "beyond parity": c.Unrecoverable} {
		w.counted(what, int(n))
	}
	for _, m := range s.Members {
		w.counted("drive timed out", int(m.Timeouts))
		w.counted("read error", int(m.ReadErrors))
	}
	for _, r := range s.Refused {
		if errors.Is(r.Err, raid.ErrStaleMember) {
			w.count("stale member refused")
		}
	}
}

func (w *world) powerOn() {
	w.disks.PowerOn()
	for _, r := range w.regions {
		r.Restore()
	}
	if w.mutation == IgnoreChecksums || w.mutation == IgnoreGenerations {
		w.believe()
	}
	w.off.Store(false)
	w.cutIn(0)
}

// start opens array, log and pool. With takeover, the other region gets a new log at the next epoch, and the old
// one is only a source.
func (w *world) start(ctx context.Context, takeover bool) error {
	a, err := raid.Open(ctx, w.drives(), w.raidOptions())
	if err != nil {
		return fmt.Errorf("open array: %w", err)
	}
	w.array = a
	var sources []shelf.Source
	if takeover {
		old, err := nvram.Open(ctx, &region{w.regions[w.current], w}, w.area(), w.nvramOptions())
		if err != nil {
			return fmt.Errorf("open source: %w", err)
		}
		defer old.Close()
		sources = []shelf.Source{&source{old, w}}
		if err := w.formatOther(old.Stats().Next); err != nil {
			return err
		}
	}
	at := w.current
	if takeover {
		at = 1 - at
	}
	l, err := nvram.Open(ctx, &region{w.regions[at], w}, w.area(), w.nvramOptions())
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	w.log = l
	p, err := shelf.OpenPool(ctx, &array{Array: a, w: w}, &log{Log: l, w: w}, sources, w.options())
	if err != nil {
		return fmt.Errorf("open pool: %w", err)
	}
	w.pool = p
	if takeover {
		// Here the label's flag would be cleared on a majority; this world takes that step as done at once.
		p.ReleaseSources()
		w.current, w.taking = at, false
		w.count("takeover")
	}
	return nil
}

// formatOther makes the new owner's log, once for a takeover however often that is started again.
func (w *world) formatOther(next uint64) error {
	if w.taking {
		return nil
	}
	err := nvram.Format(&region{w.regions[1-w.current], w}, w.area(), nvram.FormatOptions{ID: logID(w), Epoch: w.epoch + 1, FirstLSN: next, UpdateBytes: updateBytes})
	if err == nil {
		w.epoch++
		w.taking = true
	}
	return err
}
