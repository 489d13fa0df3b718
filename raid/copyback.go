package raid

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"slices"
)

// Copy-back: a failed member gets a drive again, a new one (Replace) or its own that was away (Readd). The label names
// the drive as the member's and says how far its strips are copied; the member stays failed until all are, and one
// label change then makes it a member like any other and frees its spare column. It is a job as rebuild.go
// describes it.
//
// Until then redundancy is what it was, or better. A strip that has a place, in spare space or on another member, is
// read from there, and written to both (place.twin); a strip that has none is read from the new drive as soon as it is
// copied. A write that misses the new drive takes it out of the label before the write is reported, and all is as before.
//
// What must be copied to a member is every strip that will lie on it: its own, and those of other failed members whose
// spare place it is. The latter follow from what is spared where: therefore a rebuild that begins meanwhile lets the copy
// begin again.
//
// A returning drive's strip is kept when a parity strip's checksum block, read from a working member, says that its
// generation is the newest, and all of its blocks match its own checksum block.

// Restore is what the label says of a copy-back.
type Restore struct {
	member   uint8 // 1 + index, 0 none
	Reuse    bool  // the drive may hold current strips
	Progress uint64
	Passes   [maxPasses]Pass
}

// Member is the index of the member being restored, -1 if none is.
func (r *Restore) Member() int { return int(r.member) - 1 }

// restart forgets the progress.
func (r *Restore) restart() { *r = Restore{member: r.member, Reuse: r.Reuse} }

func (r *Restore) encode(b []byte) {
	b[0] = r.member
	if r.Reuse {
		b[1] = 1
	}
	binary.LittleEndian.PutUint64(b[8:], r.Progress)
}

func (r *Restore) decode(b []byte) {
	r.member, r.Reuse, r.Progress = b[0], b[1] == 1, binary.LittleEndian.Uint64(b[8:])
}

// restoring returns the member being restored, -1 if none is.
func (a *Array) restoring() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.label.Restore.Member()
}

// Replace gives a failed or spared member a new drive, and copies its strips back to it; see CopyBack. When it returns
// nil the member is online and its spare column free. A drive that is not blank is refused (ErrNotBlank, ErrForeign,
// ErrStaleMember) without Force; a working member of this array (ErrDuplicate) and one too small (ErrSize) always.
// ErrRange: the member is not failed. ErrBusy: another copy-back was begun. ErrReservation: somebody else's reservation
// is on the drive. After these, and ErrNoReservations, the drive remains the caller's; else it is the array's, even when
// the copying fails.
func (a *Array) Replace(ctx context.Context, index int, d Drive, o ReplaceOptions) error {
	a.rebuildMu.Lock() // before enter: see RebuildWith
	defer a.rebuildMu.Unlock()
	if err := a.enter(); err != nil {
		return err
	}
	defer a.leave()
	if err := a.attachNew(ctx, index, d, o.Force); err != nil {
		return fmt.Errorf("raid: replace member %d by %s: %w", index, d.Name(), err)
	}
	return a.copyBack(ctx, index, o.RebuildOptions)
}

// CopyBack goes on with a copy-back or re-add that a crash, Close or the end of a context cut. When the new drive fails
// the result is ErrNewDrive and the array is as it was before. Stripes that cannot be had make the result
// ErrUnrecoverable, after all others are copied and the member is online. ErrRange: no copy-back of this member was begun.
func (a *Array) CopyBack(ctx context.Context, index int, o RebuildOptions) error {
	a.rebuildMu.Lock() // before enter: see RebuildWith
	defer a.rebuildMu.Unlock()
	if err := a.enter(); err != nil {
		return err
	}
	defer a.leave()
	return a.copyBack(ctx, index, o)
}

// Readd takes a member's own drive back. One that is only missing is online at once. One that was recorded as failed is
// brought up to date: what its generations prove current is kept, the rest copied. Errors as for Replace.
func (a *Array) Readd(ctx context.Context, d Drive, o RebuildOptions) error {
	a.rebuildMu.Lock() // before enter: see RebuildWith
	defer a.rebuildMu.Unlock()
	if err := a.enter(); err != nil {
		return err
	}
	defer a.leave()
	index, online, err := a.attachOwn(ctx, d)
	if err != nil {
		return fmt.Errorf("raid: take %s back: %w", d.Name(), err)
	}
	if online {
		return nil
	}
	return a.copyBack(ctx, index, o)
}

// attachNew makes a drive the one that a failed member is restored to.
func (a *Array) attachNew(ctx context.Context, index int, d Drive, force bool) error {
	offer, err := a.look(ctx, d)
	if err != nil {
		return err
	}
	if refused := offer.refusal(force); refused != nil {
		return refused
	}
	if err := a.prepareToWrite(); err != nil {
		return err
	}
	if err := a.mayRestore(index); err != nil {
		return err
	}
	m := newMember(index, d, a.opts.QueueDepth)
	m.id = a.opts.uuid()
	err = a.patiently(m, func(d Drive) error {
		if err := a.reserveDrive(d, force); err != nil {
			return err
		}
		// Old labels must not outlive the new ones. This also shows whether the drive takes writes at all.
		if _, err := d.WriteAt(alignedBytes(labelSlots*BlockBytes), 0); err != nil {
			return fmt.Errorf("%w: %w", ErrNewDrive, err)
		}
		if err := d.Flush(); err != nil {
			return fmt.Errorf("%w: %w", ErrNewDrive, err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return a.attach(m, false)
}

// patiently does something with a drive that is no member yet, no longer than a write may take.
func (a *Array) patiently(m *member, f func(Drive) error) error {
	t := a.newBatch()
	t.call(m, f)
	t.run(a.opts.WriteTimeout)
	return t.ops[0].err()
}

// attachOwn takes a member's own drive: online at once when nothing was missed.
func (a *Array) attachOwn(ctx context.Context, d Drive) (index int, online bool, err error) {
	offer, err := a.look(ctx, d)
	if err != nil {
		return 0, false, err
	}
	index = offer.Member
	switch offer.Kind {
	case OfferReturned:
		return index, true, a.takeReturned(index, d)
	case OfferStale:
	case OfferBlank:
		return 0, false, ErrBlank
	default:
		return 0, false, offer.refusal(false)
	}
	if err := a.prepareToWrite(); err != nil {
		return 0, false, err
	}
	if err := a.mayRestore(index); err != nil {
		return 0, false, err
	}
	m := newMember(index, d, a.opts.QueueDepth)
	m.id = a.Label().IDs[index]
	if err := a.patiently(m, func(d Drive) error { return a.reserveDrive(d, false) }); err != nil {
		return 0, false, err
	}
	return index, false, a.attach(m, true)
}

// takeReturned puts a drive in the place of a member that is missing, if no write has missed it until now: the first
// write that would miss it changes the label first, and waits for labelMu.
func (a *Array) takeReturned(index int, d Drive) error {
	m := newMember(index, d, a.opts.QueueDepth)
	if err := a.patiently(m, func(d Drive) error { return a.reserveDrive(d, false) }); err != nil {
		return err
	}
	a.labelMu.Lock()
	defer a.labelMu.Unlock()
	a.mu.Lock()
	defer a.mu.Unlock()
	if old := a.members[index]; old.state != Missing || old.drive != nil || a.label.Failed>>index&1 != 0 {
		return fmt.Errorf("member %d is %s now: %w", index, old.state, ErrStaleMember)
	}
	m.id, m.state = a.label.IDs[index], Online
	a.swap(m)
	a.cache.clear()
	return nil
}

// swap puts a member in the place of another; Array.mu is held. The old drive is closed with the array.
func (a *Array) swap(m *member) {
	if old := a.members[m.index].drive; old != nil && old != m.drive {
		a.unused = append(a.unused, old)
	}
	a.members = slices.Clone(a.members) // others may be looking at it
	a.members[m.index] = m
}

// mayRestore refuses what is not failed, or while another copy-back was begun. rebuildMu is held: neither begins now.
func (a *Array) mayRestore(index int) error {
	l := a.Label()
	switch r := l.Restore.Member(); {
	case index < 0 || index >= l.N || l.Failed>>index&1 == 0:
		return fmt.Errorf("it is not failed: %w", ErrRange)
	case r >= 0:
		return fmt.Errorf("member %d is being restored: %w", r, ErrBusy)
	}
	return l.mayRebuild()
}

// attach puts a drive in the place of a failed member, and then in the label.
func (a *Array) attach(m *member, reuse bool) error {
	index, id := m.index, m.id
	a.labelMu.Lock()
	defer a.labelMu.Unlock()
	a.mu.Lock()
	m.state = Restoring
	a.swap(m)
	a.mu.Unlock()
	// Twice: both slots.
	for range labelSlots {
		err := a.changeLabel(func(l *Label) {
			l.IDs[index] = id
			l.Restore = Restore{member: uint8(index + 1), Reuse: reuse}
		})
		if err != nil {
			return err
		}
		if a.restoring() != index {
			return ErrNewDrive
		}
	}
	a.log(slog.LevelInfo, "raid: member gets a drive", "member", index, "drive", m.drive.Name(), "own", reuse)
	return nil
}

// reserveDrive puts our reservation on a drive, if the array is reserved.
func (a *Array) reserveDrive(d Drive, force bool) error {
	a.mu.Lock()
	key := a.key
	a.mu.Unlock()
	if key == 0 {
		return nil
	}
	r, ok := d.(Reserver)
	if !ok {
		return ErrNoReservations
	}
	if force {
		return preempt(r, key)
	}
	if err := r.Register(key); err != nil {
		return err
	}
	err := hold(r, key)
	if err == nil {
		return nil
	}
	return errors.Join(err, r.Unregister(key))
}

// copyBack runs the job and makes the member one like any other; rebuildMu is held.
func (a *Array) copyBack(ctx context.Context, index int, o RebuildOptions) error {
	if err := a.prepareToWrite(); err != nil {
		return fmt.Errorf("raid: copy back to member %d: %w", index, err)
	}
	l := a.Label()
	if index < 0 || l.Restore.Member() != index {
		return fmt.Errorf("raid: copy back to member %d: none was begun: %w", index, ErrRange)
	}
	kind := JobCopyBack
	if l.Restore.Reuse {
		kind = JobReadd
	}
	j := a.startJob(kind, index, o)
	defer a.endJob()
	err := a.runJob(ctx, j)
	if err == nil {
		err = a.endRestore(index)
	}
	if bad := j.bad.Load(); err == nil && bad > 0 {
		err = fmt.Errorf("%d stripes: %w", bad, ErrUnrecoverable)
	}
	if err != nil {
		return fmt.Errorf("raid: copy back to member %d: %w", index, err)
	}
	return nil
}

func (a *Array) endRestore(index int) error {
	err := func() error {
		a.labelMu.Lock()
		defer a.labelMu.Unlock()
		if a.restoring() != index {
			return ErrNewDrive
		}
		return a.changeLabel(func(l *Label) {
			l.Failed &^= 1 << index
			l.Restore = Restore{}
			if j := bytesIndex(l.SpareOf, index); j >= 0 {
				l.SpareOf[j] = 0
			}
			if l.RebuildMember == index {
				l.RebuildMember, l.RebuildSpare, l.RebuildProgress, l.RebuildPasses = -1, -1, 0, [maxPasses]Pass{}
			}
		})
	}()
	a.cache.clear()
	if err != nil {
		return err
	}
	a.mu.Lock()
	online := a.members[index].state == Online
	a.mu.Unlock()
	if !online {
		return ErrNewDrive
	}
	// Operations that found their places before end now: nothing writes to the freed spare column any more.
	a.stripes.drain()
	a.log(slog.LevelInfo, "raid: member restored", "member", index)
	return nil
}

// drain waits for every operation that holds a stripe now.
func (s *stripeLocks) drain() {
	s.mu.Lock()
	var held []uint64
	for stripe := range s.locks {
		held = append(held, stripe)
	}
	s.mu.Unlock()
	for _, stripe := range held {
		s.lock(stripe)()
	}
}

// holds tells whether the place has the strip as it should be now; v is filled with the parity strips' checksum blocks.
func (v *view) holds(strip int, at place) bool {
	v.fromMedia, v.sums = true, true
	if v.fetch() != nil || v.unwritten() {
		return false
	}
	known := false
	for i := v.a.layout.Data(); i < len(v.strips); i++ {
		known = known || v.usable(i) && v.strips[i].sum != nil
	}
	if !known {
		return false
	}
	b := newSlot()
	defer b.release()
	t := v.a.newBatch()
	t.read(at.member, strip, b, b.b, at.off)
	t.run(v.a.opts.WriteTimeout)
	if t.ops[0].err() != nil {
		return false
	}
	where := v.a.address(v.stripe, strip)
	sum, err := decodeSum(b.b[:BlockBytes], where)
	if err != nil || sum.gen != v.gens[strip] {
		return false
	}
	for i, g := range sum.gens {
		if g != v.gens[i] {
			return false
		}
	}
	for c := range StripBlocks {
		if checksumOf(where, c, b.b[(1+c)*BlockBytes:(2+c)*BlockBytes]) != sum.crcs[c] {
			return false
		}
	}
	return true
}
