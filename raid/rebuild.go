package raid

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ledge-storage/ledge/raid/layout"
)

// Rebuild of a failed member to distributed spare space, and what copy-back (copyback.go) shares with it: a job.
// Stripe by stripe, under its lock, the strip that lay on the member is computed and written to its new place: for a
// rebuild the spare place of its row, for a copy-back its old place on the new drive. Several stripes are worked on at
// once; all members read, and for a rebuild all members write. From then on the stripe's writes include the new place.
// After each batch the members are flushed, and then the label says how far the job is: a crash repeats at most a
// batch. When all is done one label change makes the new places the only ones.
//
// # Least redundancy first
//
// A job walks the stripes in order, and ends when RebuildProgress (or Restore.Progress) has passed them all. But while
// n ≥ 2 members are failed and not spared, urgent passes come first: one over the stripes that lost n strips, then one
// over those that lost n-1, … 2. How many a stripe has lost is arithmetic over the failed members and the spare columns as
// they were when the pass began, which the label keeps with the pass: so a stripe is done when the progress has passed it,
// or the progress of a pass has whose rule holds for it. When a further member fails in the middle, new passes are put
// before the rest; the old ones stay, for what they did must not be forgotten when it is needed most.
//
// # A stripe that cannot be rebuilt
//
// Of its strip the blocks are written that can be computed; the others get checksums that they do not match, so that they
// stay what they were: unrecoverable, and nobody's guess. If none can, the new place gets a checksum block of zeros: what
// lay there before, perhaps an older strip of the same address, must not be believed by a reader that finds no parity
// to contradict it. The job goes on: one such stripe must not cost all others their redundancy.
//
// An update prepared before its stripe was rebuilt and applied after has no image for the new place: Apply sees that
// and repairs the stripe.

// RebuildBatch is how many stripes are worked on between two flushes and label writes, if RebuildOptions says nothing.
const RebuildBatch = 1024

// batchLooks is how many stripes a batch looks at, at most, to find RebuildBatch that need work.
const batchLooks = 1 << 20

// maxPasses bounds the urgent passes in a label: see addPass.
const maxPasses = 4

// Pass is an urgent pass of a job: stripes below Progress that have lost at least Lost strips, with the members of
// Failed gone and the spare columns of SpareOf in use, are done. The zero Pass is none.
type Pass struct {
	Progress, Failed uint64
	SpareOf          [8]uint8
	Lost             int
}

const passBytes = 32

func encodePasses(b []byte, passes [maxPasses]Pass) {
	le := binary.LittleEndian
	for i, p := range passes {
		le.PutUint64(b[passBytes*i:], p.Progress)
		le.PutUint64(b[passBytes*i+8:], p.Failed)
		copy(b[passBytes*i+16:], p.SpareOf[:])
		b[passBytes*i+24] = byte(p.Lost)
	}
}

func decodePasses(b []byte) (passes [maxPasses]Pass) {
	le := binary.LittleEndian
	for i := range passes {
		p := &passes[i]
		p.Progress, p.Failed, p.Lost = le.Uint64(b[passBytes*i:]), le.Uint64(b[passBytes*i+8:]), int(b[passBytes*i+24])
		copy(p.SpareOf[:], b[passBytes*i+16:])
	}
	return passes
}

// job is the rebuild or copy-back that runs. Array.mu guards ahead; the rest is its call's.
type job struct {
	kind   JobKind
	member int
	o      RebuildOptions
	// ahead are stripes done since the label last said how far the job is.
	ahead     map[uint64]struct{}
	started   time.Time
	startedAt uint64
	bad       atomic.Uint64 // stripes that cannot be rebuilt
}

func (j *job) restores() bool { return j.kind != JobRebuild }

// Rebuild rebuilds a failed member to a free spare column, or goes on with a rebuild that was cut. It returns when it
// is done, or ctx ends; progress (may be nil) is told after each batch. Only one rebuild or copy-back runs at a time.
// pace, if not nil, is called before each stripe that needs work and may wait: that is the throttle. Stripes that
// cannot be rebuilt make the result ErrUnrecoverable, after all others are done. Close waits for a rebuild: end ctx
// first. ErrRange: the member is not failed, or is rebuilt. ErrDegraded: no spare column is free. ErrBusy: another
// member's rebuild was begun, or the copy-back of a member that is not spared.
func (a *Array) Rebuild(ctx context.Context, failed int, pace func(context.Context) error, progress func(done, total uint64)) error {
	return a.RebuildWith(ctx, failed, RebuildOptions{Pace: pace, Progress: progress})
}

// RebuildWith is Rebuild with options.
func (a *Array) RebuildWith(ctx context.Context, failed int, o RebuildOptions) error {
	// Before enter: who waits here must not keep a growth from taking in its members (joinNew).
	a.rebuildMu.Lock()
	defer a.rebuildMu.Unlock()
	if err := a.enter(); err != nil {
		return err
	}
	defer a.leave()
	if err := a.beginRebuild(failed); err != nil {
		return fmt.Errorf("raid: rebuild member %d: %w", failed, err)
	}
	j := a.startJob(JobRebuild, failed, o)
	defer a.endJob()
	if err := a.runJob(ctx, j); err != nil {
		return fmt.Errorf("raid: rebuild member %d: %w", failed, err)
	}
	return a.endRebuild(j)
}

// beginRebuild picks the spare column and says so in the label, or finds the rebuild that was begun.
func (a *Array) beginRebuild(failed int) error {
	if err := a.prepareToWrite(); err != nil {
		return err
	}
	a.labelMu.Lock()
	defer a.labelMu.Unlock()
	l := a.Label()
	if err := l.mayRebuild(); err != nil {
		return err
	}
	restoring := l.Restore.Member()
	switch {
	case failed < 0 || failed >= l.N || l.Failed>>failed&1 == 0:
		return fmt.Errorf("it is not failed: %w", ErrRange)
	case l.lost(1<<failed) == 0:
		return fmt.Errorf("it is rebuilt: %w", ErrRange)
	case restoring == failed:
		return fmt.Errorf("it is being restored: %w", ErrBusy)
	case restoring >= 0 && l.lost(1<<restoring) != 0:
		// What is restored of it counts: it must not be given up, and finishing it helps as much as a rebuild.
		return fmt.Errorf("member %d is being restored: %w", restoring, ErrBusy)
	case l.RebuildMember == failed:
		return a.restartRestore(&l)
	case l.RebuildMember >= 0:
		return fmt.Errorf("member %d is being rebuilt: %w", l.RebuildMember, ErrBusy)
	}
	spare := -1
	for j := range l.Spares {
		if l.SpareOf[j] == 0 {
			spare = j
			break
		}
	}
	if spare < 0 {
		return fmt.Errorf("no spare space is free: %w", ErrDegraded)
	}
	return a.changeLabel(func(l *Label) {
		l.RebuildMember, l.RebuildSpare, l.RebuildProgress, l.RebuildPasses = failed, spare, 0, [maxPasses]Pass{}
		l.Restore.restart()
	})
}

// restartRestore lets a copy-back of a spared member begin again, when a rebuild goes on that was begun: which strips
// the new drive must hold follows from what is spared where, and that changes now.
func (a *Array) restartRestore(l *Label) error {
	if l.Restore.Member() < 0 {
		return nil
	}
	return a.changeLabel(func(l *Label) { l.Restore.restart() })
}

func (a *Array) endRebuild(j *job) error {
	a.labelMu.Lock()
	defer a.labelMu.Unlock()
	err := a.changeLabel(func(l *Label) {
		l.SpareOf[l.RebuildSpare] = uint8(j.member + 1)
		l.RebuildMember, l.RebuildSpare, l.RebuildProgress, l.RebuildPasses = -1, -1, 0, [maxPasses]Pass{}
	})
	a.cache.clear()
	if bad := j.bad.Load(); err == nil && bad > 0 {
		err = fmt.Errorf("raid: rebuild member %d: %d stripes: %w", j.member, bad, ErrUnrecoverable)
	}
	return err
}

func (a *Array) startJob(kind JobKind, member int, o RebuildOptions) *job {
	if o.Workers <= 0 {
		o.Workers = min(max(a.Geometry().N*4/3, 4), 32)
	}
	if o.Batch <= 0 {
		o.Batch = RebuildBatch
	}
	j := &job{kind: kind, member: member, o: o, ahead: make(map[uint64]struct{}), started: a.opts.Suspicion.Now()}
	a.mu.Lock()
	defer a.mu.Unlock()
	j.startedAt, _ = a.label.jobProgress(j.restores())
	a.job = j
	return j
}

func (a *Array) endJob() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.job = nil
}

// jobProgress returns the progress and the urgent passes of the rebuild, or of the restore.
func (l *Label) jobProgress(restore bool) (uint64, *[maxPasses]Pass) {
	if restore {
		return l.Restore.Progress, &l.Restore.Passes
	}
	return l.RebuildProgress, &l.RebuildPasses
}

// done tells whether the rebuild, or the restore, has done a stripe that lies by a layout. Array.mu is held.
func (a *Array) done(at *layout.Layout, restore bool, stripe uint64) bool {
	progress, passes := a.label.jobProgress(restore)
	if stripe < progress {
		return true
	}
	if a.job != nil && a.job.restores() == restore {
		if _, ok := a.job.ahead[stripe]; ok {
			return true
		}
	}
	for i := range passes {
		if p := &passes[i]; stripe < p.Progress && lostBy(at, stripe, p.Failed, p.SpareOf) >= p.Lost {
			return true
		}
	}
	return false
}

// lostBy counts the strips of a stripe that are nowhere when these members are failed, with these spare columns.
func lostBy(at *layout.Layout, stripe, failed uint64, spareOf [8]uint8) int {
	lost := 0
	for i := range at.Width() {
		index, slot := at.Strip(stripe, i)
		for hop := 0; failed>>index&1 != 0; hop++ {
			spare := bytesIndex(spareOf, index)
			if spare < 0 || hop > at.Spares() {
				lost++
				break
			}
			index = at.Spare(slot, spare)
		}
	}
	return lost
}

func bytesIndex(spareOf [8]uint8, member int) int {
	for j, s := range spareOf {
		if int(s) == member+1 {
			return j
		}
	}
	return -1
}

// Errors that end a job.
var (
	// ErrNewDrive: the drive that was to be restored failed; the array is as before.
	ErrNewDrive = errors.New("raid: the new drive failed")
)

// runJob works until every stripe is done.
func (a *Array) runJob(ctx context.Context, j *job) error {
	for {
		pass, more, err := a.nextPass(j)
		if err != nil || !more {
			return err
		}
		if err := a.runPass(ctx, j, pass); err != nil {
			return err
		}
	}
}

// nextPass picks the most urgent pass, and puts it in the label if it is new; pass is nil for the last one, over all
// stripes. Without more everything is done.
func (a *Array) nextPass(j *job) (pass *Pass, more bool, err error) {
	a.labelMu.Lock()
	defer a.labelMu.Unlock()
	l := a.Label()
	total := a.Geometry().Stripes
	progress, passes := l.jobProgress(j.restores())
	if progress >= total {
		return nil, false, nil
	}
	lost := l.lost(l.Failed)
	if l.lost(1<<j.member) == 0 {
		lost = 0 // a spared member's copy-back adds no redundancy: no stripe is more urgent than another
	}
	for ; lost >= 2; lost-- {
		want := Pass{Failed: l.Failed, SpareOf: l.SpareOf, Lost: lost}
		found := false
		for _, p := range passes {
			if p.Lost == want.Lost && p.Failed == want.Failed && p.SpareOf == want.SpareOf {
				if want.Progress, found = p.Progress, true; p.Progress < total {
					return &want, true, nil
				}
			}
		}
		if found {
			continue
		}
		added := false
		err := a.changeLabel(func(l *Label) {
			_, passes := l.jobProgress(j.restores())
			added = addPass(passes, want)
		})
		if err != nil {
			return nil, false, err
		}
		if added {
			return &want, true, nil
		}
	}
	return nil, true, nil
}

// addPass puts a new pass in a free place; what others cover is dropped. At most four are needed: a failed member more
// is one more strip lost, there are at most MaxParity, and of one set of failed members only the pass that runs
// and the one before it are kept. Were there more, this pass would have to be left out: order, not safety.
func addPass(passes *[maxPasses]Pass, want Pass) bool {
	for i := range passes {
		for k := range passes {
			p, q := &passes[i], &passes[k]
			if i != k && q.Progress >= p.Progress && q.Lost <= p.Lost && p.Failed&^q.Failed == 0 && p.SpareOf == q.SpareOf && q.Lost != 0 {
				*p = Pass{}
			}
		}
	}
	for i := range passes {
		if passes[i].Lost == 0 {
			passes[i] = want
			return true
		}
	}
	return false
}

// runPass works through a pass, batch by batch. It returns early, with nil, when another member failed meanwhile: a more
// urgent pass may be due.
func (a *Array) runPass(ctx context.Context, j *job, pass *Pass) error {
	total := a.Geometry().Stripes
	l := a.Label()
	next, _ := l.jobProgress(j.restores())
	if pass != nil {
		next = pass.Progress
	}
	for next < total {
		work, end := a.collect(j, pass, next, total)
		stopped, err := a.workOn(ctx, j, work)
		if err != nil && stopped < len(work) {
			end = work[stopped] // what is done is worth keeping
		}
		if j.restores() && a.restoring() != j.member {
			return ErrNewDrive
		}
		if aerr := a.Err(); aerr != nil {
			return aerr
		}
		if end > next || len(work) > 0 {
			if serr := a.saveProgress(j, pass, end); serr != nil {
				return serr
			}
		}
		if err != nil {
			return err
		}
		next = end
		now := a.Label()
		if done, _ := now.jobProgress(j.restores()); j.o.Progress != nil {
			j.o.Progress(done, total)
		}
		if now.Failed != l.Failed {
			return nil
		}
	}
	return nil
}

// collect finds the next stripes that a pass has to work on; those below end are seen.
func (a *Array) collect(j *job, pass *Pass, next, total uint64) (work []uint64, end uint64) {
	for end = next; end < total && end-next < batchLooks && len(work) < j.o.Batch; end++ {
		if _, _, ok := a.unplaced(j, pass, end); ok {
			work = append(work, end)
		}
	}
	return work, end
}

// unplaced returns the strip that has a place once the job has done the stripe and none before, and that place. There
// is at most one: a member holds one strip of a stripe, or stands as a spare for one. None when a pass, if not nil, leaves
// the stripe out.
func (a *Array) unplaced(j *job, pass *Pass, stripe uint64) (strip int, to place, ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	at := a.layoutOf(stripe)
	if pass != nil && lostBy(at, stripe, pass.Failed, pass.SpareOf) < pass.Lost {
		return 0, place{}, false
	}
	rebuilt, restored := a.done(at, false, stripe), a.done(at, true, stripe)
	if j.restores() && restored || !j.restores() && rebuilt {
		return 0, place{}, false
	}
	for i := range a.layout.Width() {
		now := a.locate(at, stripe, i, rebuilt, restored)
		then := a.locate(at, stripe, i, rebuilt || !j.restores(), restored || j.restores())
		switch {
		case now == then:
		case now.member == nil:
			return i, then, true
		case then.twin != nil && now.twin == nil:
			return i, place{member: then.twin, off: then.twinOff}, true
		}
	}
	return 0, place{}, false
}

// workOn does some stripes, several at once, in order. It returns how many are done, all before the first that is not.
func (a *Array) workOn(ctx context.Context, j *job, work []uint64) (handed int, err error) {
	var (
		wg    sync.WaitGroup
		queue = make(chan uint64)
		first atomic.Pointer[error]
	)
	for range min(j.o.Workers, len(work)) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for stripe := range queue {
				if err := a.jobStripe(j, stripe); err != nil {
					first.CompareAndSwap(nil, &err)
				}
			}
		}()
	}
	for handed < len(work) && err == nil && first.Load() == nil {
		if err = ctx.Err(); err == nil && j.o.Pace != nil {
			err = j.o.Pace(ctx)
		}
		if err == nil {
			queue <- work[handed]
			handed++
		}
	}
	close(queue)
	wg.Wait()
	if e := first.Load(); e != nil {
		return 0, *e // which of them are done is not worth finding out
	}
	return handed, err
}

// jobStripe does one stripe. Its error ends the job: the array stopped writing, or the new drive failed.
func (a *Array) jobStripe(j *job, stripe uint64) error {
	damaged, err := a.jobStripeLocked(j, stripe)
	if damaged && err == nil {
		a.repairQuietly(stripe)
	}
	return err
}

func (a *Array) jobStripeLocked(j *job, stripe uint64) (damaged bool, err error) {
	defer a.stripes.lock(stripe)()
	if j.o.Used != nil && !j.o.Used(stripe) {
		a.markAhead(j, stripe)
		return false, nil
	}
	strip, to, ok := a.unplaced(j, nil, stripe)
	if !ok {
		return false, nil
	}
	v := a.newView(stripe)
	defer v.release()
	a.cache.put(stripe, nil)
	if j.kind == JobReadd && v.holds(strip, to) {
		a.markAhead(j, stripe)
		return v.anyDamaged(), nil
	}
	err = v.fetchForRebuild(strip)
	t := a.newBatch()
	switch {
	case err != nil && v.unwritten():
		if !j.restores() || !a.carriesSum(stripe, strip, to) {
			a.markAhead(j, stripe)
			return false, nil
		}
		planErase(t, strip, to)
	case err != nil:
		j.bad.Add(1)
		a.log(slog.LevelError, "raid: stripe cannot be rebuilt", "stripe", stripe, "err", err)
		v.planPartial(t, strip, to)
	default:
		damaged = v.anyDamaged()
		v.planRewrite(t, strip, to)
	}
	a.cache.put(stripe, nil)
	t.run(a.opts.WriteTimeout)
	if err := a.settle(t); err != nil {
		return damaged, err
	}
	if j.restores() && a.restoring() != j.member {
		return damaged, ErrNewDrive
	}
	a.markAhead(j, stripe)
	return damaged, nil
}

func (a *Array) markAhead(j *job, stripe uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	j.ahead[stripe] = struct{}{}
}

// fetchForRebuild gets one strip whole. If it has no place to be read from, the others are read whole in the same
// round as the checksum blocks: k of them, those on the members that have least to do.
func (v *view) fetchForRebuild(strip int) error {
	v.fromMedia, v.sums = true, true
	v.strips[strip].want = ^uint32(0)
	if v.places[strip].member == nil {
		order := make([]int, 0, len(v.strips))
		load := make([]int, len(v.strips))
		for i, p := range v.places {
			if p.member == nil {
				continue
			}
			order = append(order, i)
			load[i] = int(p.member.waiting.Load())
			if p.member.stuck.Load() > 0 || p.member.suspect.Load() {
				load[i] += 1 << 20
			}
		}
		slices.SortStableFunc(order, func(x, y int) int { return load[x] - load[y] })
		for _, i := range order[:min(len(order), v.a.layout.Data())] {
			v.strips[i].want = ^uint32(0)
		}
	}
	if err := v.fetch(); err != nil {
		return err
	}
	if v.gens[strip] == 0 { // no parity strip is left to tell it: as new as the newest
		v.gens[strip] = v.gens[len(v.gens)-1]
	}
	return nil
}

// planPartial plans the write of what can be had of a strip of a stripe that has lost more than parity mends.
func (v *view) planPartial(t *batch, strip int, to place) {
	s, where := &v.strips[strip], v.a.address(v.stripe, strip)
	for c := range StripBlocks {
		if good, lack := v.column(c); lack>>strip&1 != 0 && bits.OnesCount64(good) >= v.a.layout.Data() {
			// An error leaves the block what it is: not there.
			_ = v.computeRun(c, c+1, good, 1<<strip)
		}
	}
	if s.have == 0 || v.gens[strip] == 0 {
		planErase(t, strip, to)
		return
	}
	sum := &stripSum{gen: v.gens[strip]}
	sum.tell(strip, v.a.layout.Data(), v.gens, v.losts())
	for c := range StripBlocks {
		if s.have>>c&1 == 0 {
			clear(v.block(strip, c))
			sum.crcs[c] = ^checksumOf(where, c, v.block(strip, c))
		} else {
			sum.crcs[c] = checksumOf(where, c, v.block(strip, c))
		}
	}
	sum.encode(s.buf.b, where)
	t.writePlace(to, strip, s.buf, s.buf.b, 0)
}

// planErase plans a checksum block that no reader believes.
func planErase(t *batch, strip int, to place) {
	b := newBlock()
	defer b.release()
	clear(b.b)
	t.write(to.member, strip, b, b.b, to.off)
}

// carriesSum tells whether a place holds a checksum block of this very strip: what a stripe that was never written must
// not have.
func (a *Array) carriesSum(stripe uint64, strip int, at place) bool {
	b := newBlock()
	defer b.release()
	t := a.newBatch()
	t.read(at.member, strip, b, b.b, at.off)
	t.run(a.opts.ReadTimeout)
	if t.ops[0].err() != nil {
		return true
	}
	_, err := decodeSum(b.b, a.address(stripe, strip))
	return err == nil
}

// saveProgress makes what was done durable, and then says so.
func (a *Array) saveProgress(j *job, pass *Pass, stripe uint64) error {
	if err := a.flush(); err != nil {
		return err
	}
	a.labelMu.Lock()
	defer a.labelMu.Unlock()
	if j.restores() && a.restoring() != j.member {
		return ErrNewDrive
	}
	a.mu.Lock()
	saved := maps.Clone(j.ahead)
	a.mu.Unlock()
	err := a.changeLabel(func(l *Label) {
		_, passes := l.jobProgress(j.restores())
		switch {
		case pass != nil:
			for i := range passes {
				if p := &passes[i]; p.Lost == pass.Lost && p.Failed == pass.Failed && p.SpareOf == pass.SpareOf {
					p.Progress = stripe
				}
			}
		case j.restores():
			l.Restore.Progress = stripe
		default:
			l.RebuildProgress = stripe
		}
	})
	if err != nil {
		return err
	}
	if j.restores() && a.restoring() != j.member {
		return ErrNewDrive
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for s := range saved {
		delete(j.ahead, s)
	}
	return nil
}
