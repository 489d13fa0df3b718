package raid

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"sync"
	"sync/atomic"

	"github.com/ledge-storage/ledge/raid/layout"
)

// Growing an array by members, while it serves.
//
// Every stripe has at any time exactly one place that counts, and layout.Reshape says which, from two numbers in the
// label: below GrowDone by the new layout, from there to GrowStaged in staging slots (in the reserved megabyte of
// all members), the others by the old one. A step of the growth
//
//	1. locks    a few stripes, so that their reads and writes wait;
//	2. copies   each from where it counts to where it goes next: whole, verified, what is missing computed;
//	3. flushes  all members;
//	4. records  the new number in the label, on a majority;
//	5. unlocks.
//
// Where it copies to, nothing lies that counts (layout.TestReshape). That is the whole proof:
//
//	 cut in     the label says     the stripes of the step are           and the copies
//	 1, 2, 3    they are behind    untouched, k+m strips where they were are garbage, written again by the next step
//	 4          behind, or ahead:  complete, durable and equal in        so it does not matter which of the two
//	            both are labels    both places                           becomes the truth (labels.go)
//	 5          they are ahead     the copies                            what they lay on before is free now
//
// No log, no backup and no redo are needed, and a stripe never has less redundancy than its members give. The price
// is that the first stripes (where the layouts overlap: about c*c'/(w*(c'-c)) of them) are written twice. The design
// that was rejected moves in place and keeps what it overwrites in a log: its critical section is a second copy in a
// place with other failures than the members'.
//
// Checksums and generations carry array, stripe and strip, none carries a place: a strip is moved with its generation,
// and an update that was applied before a move may be replayed after it. One that was not applied may not: it has
// no image for a strip whose member was absent when it was prepared, and applied after a move it would make that strip
// stale, beside the strips that are absent now: more than m. So a stripe does not move between PrepareUpdate and Release
// (pins), nor at all when the update was given up in between, since it may be in the log: Grow answers ErrBusy then. For
// the same reason the log is replayed before Grow is called.
//
// # Members
//
// A new member first gets a label that is older than every other (sequence 0, epoch 0), then the label in which the
// growth begins goes to all. Before that is on a majority nothing is moved, and both numbers of members are right.
// Afterwards any majority of the old members has one with the new label among it: n ≥ 2m+1, and at most m failed. Like
// every label change, those of a growth rely on an owner who raises the epoch before it changes anything else.
//
// A member that fails is one of the m that may. The growth goes on until nothing is staged, then returns ErrDegraded:
// a rebuild should go first. Called again, it goes on without the member. While stripes are staged no rebuild
// begins: staging slots have no spares. For the same reason no stripe is staged while a member is spared: it would be one
// of the m again (found by qa/sim, seed 9441 of 2026-11-26). Its drive has to be replaced first.
//
// # Behind the end
//
// Slots of stripes that did not exist before hold strips of moved ones, of other addresses: the stripe counts as never
// written. No strip of its own can be among them.

// growBatch is how many stripes move, and wait, in one step; growWorkers of them are copied at a time.
const (
	growBatch   = 32
	growWorkers = 4
	stageOffset = labelSlots * BlockBytes
)

var (
	// ErrBusy: a rebuild, a copy-back or a growth is under way, and excludes what was asked for.
	ErrBusy = errors.New("raid: a rebuild, a copy-back or a growth is under way")
	// ErrNotGrowing: Grow without drives on an array that is not growing.
	ErrNotGrowing = errors.New("raid: array is not growing")
)

// GrowOptions of Grow. The zero value of each field is given in brackets.
type GrowOptions struct {
	// Force takes drives that are not blank. A drive that is a member of this array is never taken. [refused: ErrNotBlank]
	Force bool
	// GiveUp moves stripes that parity cannot mend because blocks of them cannot be read: what can be read goes along, the
	// rest is lost for good. [such a stripe ends the growth for now: ErrUnrecoverable]
	GiveUp bool
	// Pace is called before each stripe and may wait: the throttle. It may end the growth for now by an error. [none]
	Pace func(context.Context) error
	// Progress is told after each step. [none]
	Progress func(done, total uint64)
}

// GrowStatus says how far a growth is.
type GrowStatus struct {
	// Growing: members are being added. From and To are the numbers of members, equal when not.
	Growing  bool
	From, To int
	// Running: Grow is at work in this process; a growth that is not must be resumed.
	Running bool
	// Done of Total stripes lie by the new layout; Staged more are on their way.
	Done, Total, Staged uint64
	// StripesAfter is what Geometry().Stripes will be.
	StripesAfter uint64
	// Carried stripes could not be verified and were moved as they are, since this array was opened: stripes whose
	// first write was cut, or which had lost more than parity mends.
	Carried uint64
}

// GrowStatus is a snapshot.
func (a *Array) GrowStatus() GrowStatus {
	a.mu.Lock()
	defer a.mu.Unlock()
	l := &a.label
	s := GrowStatus{From: l.N, To: l.N, Total: a.at.Stripes(l.Slots), Running: a.growing, Carried: a.carried}
	s.StripesAfter = s.Total
	if l.Growing() {
		s.Growing, s.From, s.Done, s.Staged = true, l.GrowFrom, l.GrowDone, l.GrowStaged-l.GrowDone
		s.StripesAfter = a.reshape.New.Stripes(l.GrowSlots)
	}
	return s
}

// Grow adds drives as members and moves the stripes over all of them; with no drives it goes on with a growth that was
// cut. It returns when all is done: from then on Geometry().Stripes is what the drives hold. When ctx ends it returns
// at the next step; the label says where to go on, after a crash too. The array serves all the time.
//
// It refuses, and changes nothing, while a rebuild or growth is under way (ErrBusy), unless all members are online and
// none is spared (ErrDegraded), drives that are not blank (ErrNotBlank) or too small (ErrSize), and more members than
// layout.MaxMembers. When it fails so, and GrowStatus().Growing is false, the drives remain the caller's; else they are
// the array's, and Close closes them. ErrDegraded later on: a member failed; rebuild it and call again, or only call
// again. ErrUnrecoverable: a stripe cannot be read now, and may be yet; what was moved stays moved.
func (a *Array) Grow(ctx context.Context, drives []Drive, o GrowOptions) error {
	if !a.rebuildMu.TryLock() {
		return fmt.Errorf("raid: grow: %w", ErrBusy)
	}
	defer a.rebuildMu.Unlock()
	if len(drives) > 0 {
		if err := a.beginGrow(ctx, drives, o.Force); err != nil {
			return fmt.Errorf("raid: grow: %w", err)
		}
	}
	if err := a.runGrow(ctx, o); err != nil {
		return fmt.Errorf("raid: grow: %w", err)
	}
	return nil
}

// BeginGrow is the first part of Grow: it returns when the growth is recorded, and nothing is moved yet.
func (a *Array) BeginGrow(ctx context.Context, drives []Drive, o GrowOptions) error {
	if !a.rebuildMu.TryLock() {
		return fmt.Errorf("raid: grow: %w", ErrBusy)
	}
	defer a.rebuildMu.Unlock()
	if len(drives) == 0 {
		return fmt.Errorf("raid: grow: no drives: %w", ErrRange)
	}
	if err := a.beginGrow(ctx, drives, o.Force); err != nil {
		return fmt.Errorf("raid: grow: %w", err)
	}
	return nil
}

// beginGrow makes the drives members of a growing array. rebuildMu is held.
func (a *Array) beginGrow(ctx context.Context, drives []Drive, force bool) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	next, reshape, err := a.planGrow(drives)
	if err != nil {
		return err
	}
	var added []*member
	for i, d := range drives {
		m := newMember(next.GrowFrom+i, d, a.opts.QueueDepth)
		m.id, m.state = a.opts.uuid(), Online
		next.IDs[m.index] = m.id
		added = append(added, m)
	}
	if err := a.checkNew(added, force); err != nil {
		return err
	}
	if err := a.reserveNew(added); err != nil {
		return err
	}
	err = a.labelNew(added, next)
	if err == nil {
		err = a.joinNew(added, next, reshape)
	}
	if err != nil {
		if !a.GrowStatus().Growing {
			a.releaseNew(added)
		}
		return err
	}
	a.log(slog.LevelInfo, "raid: array grows", "from", next.GrowFrom, "to", next.N)
	return nil
}

// planGrow says what the label of the growth will be, or why there can be none.
func (a *Array) planGrow(drives []Drive) (*Label, *layout.Reshape, error) {
	if err := a.enter(); err != nil {
		return nil, nil, err
	}
	defer a.leave()
	if err := a.prepareToWrite(); err != nil {
		return nil, nil, err
	}
	if err := a.mayGrow(); err != nil {
		return nil, nil, err
	}
	l := a.Label()
	n := l.N + len(drives)
	if err := checkGeometry(n, l.K, l.M, l.Spares); err != nil {
		return nil, nil, err
	}
	wide, err := layout.New(n, l.K, l.M, l.Spares)
	if err != nil {
		return nil, nil, err
	}
	smallest := int64(1<<63 - 1)
	for _, m := range a.members {
		smallest = min(smallest, m.drive.Size())
	}
	old := a.Geometry().Stripes
	for i, d := range drives {
		if d == nil {
			return nil, nil, fmt.Errorf("drive %d is absent: %w", i, ErrRange)
		}
		if d.Size() < l.MemberBytes {
			return nil, nil, fmt.Errorf("%s: %d bytes, a member needs %d: %w", d.Name(), d.Size(), l.MemberBytes, ErrSize)
		}
		smallest = min(smallest, d.Size())
	}
	slots := wide.Slots(uint64(smallest-DataOffset) / SlotBytes)
	if wide.Stripes(slots) <= old {
		return nil, nil, fmt.Errorf("%d stripes would become %d: %w", old, wide.Stripes(slots), ErrSize)
	}
	reshape, err := layout.NewReshape(a.at, wide, old)
	if err != nil {
		return nil, nil, err
	}
	l.GrowFrom, l.GrowSlots, l.N = l.N, slots, n
	l.MemberBytes = DataOffset + int64(max(l.Slots, l.GrowSlots))*SlotBytes
	return &l, reshape, nil
}

// mayGrow refuses a growth of an array that is not whole.
func (a *Array) mayGrow() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.err != nil {
		return a.err
	}
	l := &a.label
	switch {
	case l.Growing():
		return fmt.Errorf("from %d to %d members: %w", l.GrowFrom, l.N, ErrBusy)
	case l.RebuildMember >= 0:
		return fmt.Errorf("member %d is being rebuilt: %w", l.RebuildMember, ErrBusy)
	case l.Failed != 0:
		return fmt.Errorf("failed members %b: %w", l.Failed, ErrDegraded)
	case l.SpareOf != [8]uint8{}:
		return fmt.Errorf("spare space is in use: %w", ErrDegraded)
	}
	for _, m := range a.members {
		if m.state != Online {
			return fmt.Errorf("%v is %s: %w", m, m.state, ErrDegraded)
		}
	}
	return nil
}

// onNew does f on every new drive; the first error counts.
func (a *Array) onNew(added []*member, f func(*member, Drive) error) error {
	t := a.newBatch()
	for _, m := range added {
		t.call(m, func(d Drive) error { return f(m, d) })
	}
	t.run(a.opts.WriteTimeout)
	for _, o := range t.ops {
		if err := o.err(); err != nil {
			return err
		}
	}
	return nil
}

// checkNew refuses drives with something on them: members of this array always, others unless forced.
func (a *Array) checkNew(added []*member, force bool) error {
	l := a.Label()
	return a.onNew(added, func(m *member, d Drive) error {
		own, _, err := readDriveLabel(d)
		if err != nil && !errors.Is(err, ErrBlank) && !errors.Is(err, ErrCorrupt) {
			return err
		}
		// A label of this array with a number beyond its members is left of a growth that did not begin.
		ours := own != nil && own.Array == l.Array
		if ours && own.Member < l.N {
			return fmt.Errorf("raid: %s: member %d of this array: %w", d.Name(), own.Member, ErrDuplicate)
		}
		if ours || force {
			return nil
		}
		const head = 64 << 10
		buf := alignedBytes(head)
		if _, err := d.ReadAt(buf, 0); err != nil {
			return fmt.Errorf("raid: %s: %w", d.Name(), err)
		}
		if !bytes.Equal(buf, make([]byte, head)) {
			return fmt.Errorf("raid: %s: %w", d.Name(), ErrNotBlank)
		}
		return nil
	})
}

// reserveNew takes on the new drives the reservation that the members have.
func (a *Array) reserveNew(added []*member) error {
	a.mu.Lock()
	key := a.key
	a.mu.Unlock()
	if key == 0 {
		return nil
	}
	err := a.onNew(added, func(m *member, d Drive) error {
		r, ok := d.(Reserver)
		if !ok {
			return fmt.Errorf("raid: %s: %w", d.Name(), ErrNoReservations)
		}
		if err := r.Register(key); err != nil {
			return fmt.Errorf("raid: %s: register: %w", d.Name(), err)
		}
		if err := r.Reserve(key); err != nil {
			return fmt.Errorf("raid: %s: reserve: %w", d.Name(), err)
		}
		return nil
	})
	if err != nil {
		a.releaseNew(added)
	}
	return err
}

// releaseNew gives the reservation back, as far as that is possible.
func (a *Array) releaseNew(added []*member) {
	a.mu.Lock()
	key := a.key
	a.mu.Unlock()
	if key == 0 {
		return
	}
	err := a.onNew(added, func(m *member, d Drive) error {
		r, ok := d.(Reserver)
		if !ok {
			return nil
		}
		return errors.Join(r.Release(key), r.Unregister(key))
	})
	if err != nil {
		a.log(slog.LevelWarn, "raid: drives that were not taken stay reserved", "err", err)
	}
}

// labelNew writes the first label of each new drive, in both slots, and reads it back: a drive that was given twice
// has the later one.
func (a *Array) labelNew(added []*member, next *Label) error {
	err := a.onNew(added, func(m *member, d Drive) error {
		own := next.clone()
		own.Member, own.MemberID, own.Epoch, own.Settled = m.index, m.id, 0, 0
		buf := alignedBytes(labelSlots * BlockBytes)
		for i := range labelSlots {
			own.Seq = uint64(i)
			own.encode(buf[i*BlockBytes : (i+1)*BlockBytes])
		}
		if _, err := d.WriteAt(buf, 0); err != nil {
			return fmt.Errorf("raid: %s: write label: %w", d.Name(), err)
		}
		if err := d.Flush(); err != nil {
			return fmt.Errorf("raid: %s: flush label: %w", d.Name(), err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return a.onNew(added, func(m *member, d Drive) error {
		own, _, err := readDriveLabel(d)
		if err != nil {
			return err
		}
		if own.MemberID != m.id {
			return fmt.Errorf("raid: %s: given as two drives: %w", d.Name(), ErrDuplicate)
		}
		return nil
	})
}

// joinNew makes the new drives members, and writes the label in which the growth begins. No call is under way
// meanwhile: from the first to the last member's label the number of members changes.
func (a *Array) joinNew(added []*member, next *Label, reshape *layout.Reshape) error {
	a.life.Lock()
	defer a.life.Unlock()
	if a.closed {
		return ErrClosed
	}
	a.labelMu.Lock()
	defer a.labelMu.Unlock()
	if err := a.mayGrow(); err != nil {
		return err
	}
	a.mu.Lock()
	was := a.members
	a.members = append(append([]*member{}, was...), added...)
	a.reshape = reshape
	a.mu.Unlock()
	err := a.changeLabel(func(l *Label) {
		l.N, l.IDs, l.MemberBytes = next.N, next.IDs, next.MemberBytes
		l.GrowFrom, l.GrowSlots, l.GrowDone, l.GrowStaged = next.GrowFrom, next.GrowSlots, 0, 0
	})
	if now := a.Label(); !now.Growing() {
		a.mu.Lock()
		a.members, a.reshape = was, nil
		a.mu.Unlock()
	}
	return err
}

// runGrow moves stripes until all are moved. rebuildMu is held.
func (a *Array) runGrow(ctx context.Context, o GrowOptions) error {
	if err := a.setGrowing(true); err != nil {
		return err
	}
	defer a.setGrowing(false)
	if l := a.Label(); l.RebuildMember >= 0 {
		return fmt.Errorf("member %d is being rebuilt: %w", l.RebuildMember, ErrBusy)
	} else if r := l.Restore.Member(); r >= 0 {
		return fmt.Errorf("member %d is being restored: %w", r, ErrBusy)
	}
	var failed uint64
	for first := true; ; first = false {
		if err := a.settleAbsent(); err != nil {
			return err
		}
		l := a.Label()
		if first {
			failed = l.Failed
		}
		if l.Failed&^failed != 0 && l.GrowStaged == l.GrowDone {
			return fmt.Errorf("%d of %d stripes moved, members %b failed: %w", l.GrowDone, a.reshape.Stripes, l.Failed, ErrDegraded)
		}
		step, more := a.reshape.Next(l.GrowDone, l.GrowStaged, growBatch)
		if !more {
			return a.endGrow()
		}
		if step.Action == layout.Stage && l.SpareOf != ([8]uint8{}) {
			return fmt.Errorf("%d of %d stripes moved; a failed member is in spare space, which the stripes that come next have none of while they move: give its place another drive first: %w",
				l.GrowDone, a.reshape.Stripes, ErrDegraded)
		}
		for range step.To - step.From {
			if err := ctx.Err(); err != nil {
				return err
			}
			if o.Pace != nil {
				if err := o.Pace(ctx); err != nil {
					return err
				}
			}
		}
		if err := a.growStep(step, o.GiveUp); err != nil {
			return err
		}
		if o.Progress != nil {
			o.Progress(a.Label().GrowDone, a.reshape.Stripes)
		}
	}
}

func (a *Array) setGrowing(on bool) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if on && !a.label.Growing() {
		return ErrNotGrowing
	}
	a.growing = on
	return nil
}

// settleAbsent records members that are absent as failed, as before every write.
func (a *Array) settleAbsent() error {
	if err := a.enter(); err != nil {
		return err
	}
	defer a.leave()
	return a.prepareToWrite()
}

// growStep is one step; see above. Stripes of updates that are under way end the step before them: only for the first one
// it waits, and holds nothing then.
func (a *Array) growStep(step layout.Step, giveUp bool) error {
	// Before enter, as in PrepareUpdate: who waits for the other must not keep Close waiting, behind which both would.
	defer a.pins.hold(&step)()
	if err := a.enter(); err != nil {
		return err
	}
	defer a.leave()
	if s, given := a.pins.givenUp(step); given {
		return fmt.Errorf("an update of stripe %d was given up and may be in the log: open again, and replay it: %w", s, ErrBusy)
	}
	for s := step.From; s < step.To; s++ {
		defer a.stripes.lock(s)()
	}
	if err := a.copyStripes(step, giveUp); err != nil {
		return err
	}
	if err := a.flush(); err != nil {
		return err
	}
	a.labelMu.Lock()
	defer a.labelMu.Unlock()
	err := a.changeLabel(func(l *Label) {
		switch step.Action {
		case layout.Stage:
			l.GrowStaged = step.To
		case layout.Unstage:
			l.GrowDone = step.To
		case layout.Direct:
			l.GrowDone, l.GrowStaged = step.To, step.To
		}
	})
	// What memory knows of the stripes names the members where they were.
	for s := step.From; s < step.To; s++ {
		a.cache.put(s, nil)
	}
	return err
}

// pins keep stripes where they are. Each is a read lock: who prepares an update waits while the stripe moves.
type pins struct {
	locks stripeLocks
	count atomic.Int32 // of abandoned

	mu        sync.Mutex
	abandoned map[uint64]bool
}

// pin keeps a stripe in place until the returned function is called, or for good when that says that the update was
// not applied.
func (a *Array) pin(stripe uint64) (unpin func(applied bool)) {
	p := &a.pins
	unlock := p.locks.rlock(stripe)
	return func(applied bool) {
		if !applied {
			p.mu.Lock()
			if p.abandoned == nil {
				p.abandoned = make(map[uint64]bool)
			}
			p.abandoned[stripe] = true
			p.count.Store(int32(len(p.abandoned)))
			p.mu.Unlock()
		}
		unlock()
	}
}

// written: whatever was given up, the stripe is beyond it.
func (p *pins) written(stripe uint64) {
	if p.count.Load() == 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.abandoned, stripe)
	p.count.Store(int32(len(p.abandoned)))
}

// givenUp finds a stripe of a step that must not move.
func (p *pins) givenUp(step layout.Step) (uint64, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for s := step.From; s < step.To; s++ {
		if p.abandoned[s] {
			return s, true
		}
	}
	return 0, false
}

// hold waits for the updates of the first stripe of a step, and cuts the step before the next stripe that has any.
func (p *pins) hold(step *layout.Step) (release func()) {
	unlock := []func(){p.locks.lock(step.From)}
	for s := step.From + 1; s < step.To; s++ {
		u, ok := p.locks.tryLock(s)
		if !ok {
			step.To = s
			break
		}
		unlock = append(unlock, u)
	}
	return func() {
		for _, u := range unlock {
			u()
		}
	}
}

func (a *Array) copyStripes(step layout.Step, giveUp bool) error {
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex
		first error
		next  = step.From
	)
	take := func() (uint64, bool) {
		mu.Lock()
		defer mu.Unlock()
		if first != nil || next == step.To {
			return 0, false
		}
		next++
		return next - 1, true
	}
	for range min(growWorkers, step.To-step.From) {
		wg.Go(func() {
			for {
				s, ok := take()
				if !ok {
					return
				}
				if err := a.copyStripe(s, step.Action, giveUp); err != nil {
					mu.Lock()
					if first == nil {
						first = err
					}
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	return first
}

// copyStripe copies a stripe from where it counts to where the action puts it. Its lock is held.
func (a *Array) copyStripe(stripe uint64, action layout.Action, giveUp bool) error {
	to := a.growPlaces(stripe, action)
	if err := a.writable(stripe, to); err != nil {
		return err
	}
	v := a.newView(stripe)
	defer v.release()
	v.fromMedia = true
	for i := range v.strips {
		v.strips[i].want = ^uint32(0)
	}
	if err := v.fetch(); err != nil {
		unread := false
		for i := range v.strips {
			s := &v.strips[i]
			if s.silent || s.unread && !giveUp {
				return err // it may be readable yet: nothing is given up
			}
			unread = unread || s.unread
		}
		if !unread && v.unwritten() {
			return nil
		}
		return a.carryStripe(v, to, err)
	}
	t := a.newBatch()
	for i, p := range to {
		if v.gens[i] == 0 { // no parity strip is left to tell it: as new as the newest
			v.gens[i] = v.gens[len(v.gens)-1]
		}
		if p.member != nil {
			v.planRewrite(t, i, p)
		}
	}
	t.run(a.opts.WriteTimeout)
	if err := a.settle(t); err != nil {
		return fmt.Errorf("stripe %d: %w", stripe, err)
	}
	return nil
}

// carryStripe moves a stripe that cannot be made whole, as it is: blocks that verify will verify there, the others, and
// those that cannot be read, will not. Most such stripes are first writes that were cut, and will be written again
// from the log.
func (a *Array) carryStripe(v *view, to []place, why error) error {
	bufs := make([]*buffer, len(to))
	read := a.newBatch()
	for i, from := range v.places {
		b := newSlot()
		defer b.release()
		bufs[i] = b
		clear(b.b) // no checksum block: nothing that was copied there before may count
		if from.member == nil {
			continue
		}
		for c := range 1 + StripBlocks {
			read.read(from.member, i, b, b.b[c*BlockBytes:(c+1)*BlockBytes], from.off+int64(c)*BlockBytes)
		}
	}
	read.run(a.opts.WriteTimeout)
	for _, o := range read.ops {
		switch {
		case o.outcome.Load() == opAbandoned:
			return o.err()
		case o.err() != nil && !v.strips[o.strip].unread:
			return o.err()
		case o.err() != nil:
			clear(o.b)
		}
	}
	write := a.newBatch()
	for i, p := range to {
		if p.member != nil {
			write.write(p.member, i, bufs[i], bufs[i].b, p.off)
		}
	}
	write.run(a.opts.WriteTimeout)
	if err := a.settle(write); err != nil {
		return fmt.Errorf("stripe %d: %w", v.stripe, err)
	}
	a.mu.Lock()
	a.carried++
	a.mu.Unlock()
	a.log(slog.LevelWarn, "raid: stripe moved as it is", "stripe", v.stripe, "err", why)
	return nil
}

// growPlaces is where an action puts a stripe's strips.
func (a *Array) growPlaces(stripe uint64, action layout.Action) []place {
	a.mu.Lock()
	defer a.mu.Unlock()
	if action == layout.Stage {
		return a.stagePlaces(stripe)
	}
	return a.placesBy(a.reshape.New, stripe)
}

// stagePlaces locates the strips of a stripe that is staged. Called with mu held.
func (a *Array) stagePlaces(stripe uint64) []place {
	out := make([]place, a.layout.Width())
	for i := range out {
		index, slot := a.reshape.Staged(stripe, i)
		if m := a.members[index]; m.state == Online {
			out[i] = place{member: m, off: stageOffset + int64(slot)*SlotBytes}
		}
	}
	return out
}

// endGrow records that the new layout is the only one.
func (a *Array) endGrow() error {
	if err := a.enter(); err != nil {
		return err
	}
	defer a.leave()
	a.labelMu.Lock()
	defer a.labelMu.Unlock()
	err := a.changeLabel(func(l *Label) {
		l.Slots = l.GrowSlots
		l.MemberBytes = DataOffset + int64(l.Slots)*SlotBytes
		l.GrowFrom, l.GrowSlots, l.GrowDone, l.GrowStaged = 0, 0, 0, 0
	})
	if err == nil {
		a.log(slog.LevelInfo, "raid: array has grown", "members", a.Geometry().N, "stripes", a.Geometry().Stripes)
	}
	return err
}

// adoptGrow switches to the new layout with the label that says so. Called with mu held.
func (a *Array) adoptGrow(next *Label) {
	if a.label.Growing() && !next.Growing() {
		a.at, a.reshape = a.reshape.New, nil
	}
}

// openGrowing gives an array that is opened in mid-growth its two layouts.
func (a *Array) openGrowing(l *Label) error {
	old, err := layout.New(l.GrowFrom, l.K, l.M, l.Spares)
	if err != nil {
		return err
	}
	a.at = old
	stripes := old.Stripes(l.Slots)
	a.reshape, err = layout.NewReshape(old, a.layout, stripes)
	if err != nil {
		return err
	}
	if l.GrowStaged > stripes || l.GrowStaged-l.GrowDone > a.reshape.Ring() || a.reshape.New.Stripes(l.GrowSlots) < stripes {
		return fmt.Errorf("label of a growth at %d, %d of %d stripes: %w", l.GrowDone, l.GrowStaged, stripes, ErrCorrupt)
	}
	return nil
}

// mayRebuild refuses a rebuild while stripes are staged.
func (l *Label) mayRebuild() error {
	if n := l.GrowStaged - l.GrowDone; n != 0 {
		return fmt.Errorf("%d stripes are staged, go on growing first: %w", n, ErrBusy)
	}
	return nil
}

// grownFrom tells whether an older label of the same array may have other numbers: it has grown since.
func (l *Label) grownFrom(old *Label) bool { return l.newer(old) && old.N <= l.N }

// memberSet is the set of members 0 to n-1.
func memberSet(n int) uint64 { return ^uint64(0) >> (64 - min(n, 64)) }

func (l *Label) encodeGrow(b []byte) {
	if !l.Growing() {
		return
	}
	le := binary.LittleEndian
	le.PutUint32(b[8:], growVersion)
	b[2300] = byte(l.GrowFrom)
	le.PutUint64(b[2304:], l.GrowSlots)
	le.PutUint64(b[2312:], l.GrowDone)
	le.PutUint64(b[2320:], l.GrowStaged)
}

func (l *Label) decodeGrow(b []byte) error {
	le := binary.LittleEndian
	l.GrowFrom = int(b[2300])
	l.GrowSlots, l.GrowDone, l.GrowStaged = le.Uint64(b[2304:]), le.Uint64(b[2312:]), le.Uint64(b[2320:])
	if !l.Growing() {
		return fmt.Errorf("label of version %d without a growth: %w", growVersion, ErrCorrupt)
	}
	return nil
}

func (l *Label) validateGrow() error {
	if !l.Growing() {
		if l.GrowSlots|l.GrowDone|l.GrowStaged != 0 {
			return fmt.Errorf("label of a growth from no members: %w", ErrCorrupt)
		}
		return nil
	}
	if err := checkGeometry(l.GrowFrom, l.K, l.M, l.Spares); err != nil {
		return fmt.Errorf("label: %w: %w", err, ErrCorrupt)
	}
	if l.GrowFrom >= l.N || l.GrowSlots == 0 || l.GrowSlots > 1<<48 || l.GrowDone > l.GrowStaged || bits.Len64(l.GrowStaged) > 60 {
		return fmt.Errorf("label of a growth from %d to %d members, at %d and %d: %w", l.GrowFrom, l.N, l.GrowDone, l.GrowStaged, ErrCorrupt)
	}
	return nil
}
