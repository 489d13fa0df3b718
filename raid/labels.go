package raid

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"slices"
)

// How the members agree.
//
// A label change is written with a higher seq to every member that is not failed, and counts when a majority
// of all n members has it and has flushed it. A reader that sees a majority therefore sees the newest; what
// is newest among all it sees is the truth. A change that reached only a minority may so become the truth or
// vanish: until it is on a majority (settle), nothing that depends on it is done.
//
// A member with a clear Failed bit has every write that was reported as done. Hence before a write that missed a
// member is reported, that member's bit is set on a majority; and before the first write after Open, the bits of
// all absent members are. A member that was merely passed over in a crashed label change is not stale.

// DriveLabel is what one drive says.
type DriveLabel struct {
	Path  string
	Label *Label // the newer of its two slots; nil with Err
	Err   error
	torn  bool // its other slot cannot be read: it may have been the newer
}

// readDriveLabel reads both slots of a drive. A slot that is torn or rotten counts as absent when the other is good.
func readDriveLabel(d Drive) (label *Label, torn bool, err error) {
	buf := alignedBytes(labelSlots * BlockBytes)
	if d.Size() < DataOffset {
		return nil, false, fmt.Errorf("raid: %s: %d bytes: %w", d.Name(), d.Size(), ErrBlank)
	}
	if _, err := d.ReadAt(buf, 0); err != nil {
		return nil, false, fmt.Errorf("raid: %s: read label: %w", d.Name(), err)
	}
	var best *Label
	err = ErrBlank
	for i := range labelSlots {
		l, e := decodeLabel(buf[i*BlockBytes : (i+1)*BlockBytes])
		if e != nil {
			torn = true
			if !errors.Is(e, ErrBlank) {
				err = e
			}
			continue
		}
		if best == nil || l.newer(best) {
			best = l
		}
	}
	if best == nil {
		return nil, torn, fmt.Errorf("raid: %s: %w", d.Name(), err)
	}
	return best, torn, nil
}

// truth returns the newest of the labels of one array, and whether they come from a majority of its members. What is
// no member by the newest label, because it failed or another drive took its place, has no vote: a change that it never
// saw may have been written without it.
func truth(labels []DriveLabel) (*Label, error) {
	var best *Label
	var seen uint64
	for _, d := range labels {
		if best == nil || d.Label.newer(best) {
			best = d.Label
		}
	}
	if best == nil {
		return nil, ErrBlank
	}
	for _, d := range labels {
		l := d.Label
		if l.Member < best.N && l.MemberID == best.IDs[l.Member] && best.Failed>>l.Member&1 == 0 && !d.older(best) {
			seen |= 1 << l.Member
		}
	}
	if n := bits.OnesCount64(seen); n < majority(best.N) {
		return nil, fmt.Errorf("raid: labels of %d of %d members can be read: %w", n, best.N, ErrNoMajority)
	}
	c := best.clone()
	c.MemberID, c.Member = UUID{}, 0
	return &c, nil
}

func majority(n int) int { return n/2 + 1 }

// Label returns the label as this array knows it.
func (a *Array) Label() Label {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.label.clone()
}

// ReadLabel reads the truth from the members again, e.g. to see whether a partner changed it.
func (a *Array) ReadLabel(ctx context.Context) (Label, error) {
	if err := a.enter(); err != nil {
		return Label{}, err
	}
	defer a.leave()
	if err := ctx.Err(); err != nil {
		return Label{}, err
	}
	l, err := a.readTruth()
	if err != nil {
		return Label{}, err
	}
	return *l, nil
}

// readTruth asks every member that has a drive: a stale one's label is old but honest.
func (a *Array) readTruth() (*Label, error) {
	t := a.newBatch()
	var bufs []*buffer
	a.mu.Lock()
	members := slices.Clone(a.members)
	a.mu.Unlock()
	for _, m := range members {
		if m.drive == nil {
			continue
		}
		b := newSlot()
		bufs = append(bufs, b)
		t.read(m, 0, b, b.b[:labelSlots*BlockBytes], 0)
	}
	t.run(a.opts.WriteTimeout)
	var labels []DriveLabel
	for i, o := range t.ops {
		if o.err() == nil {
			for s := range labelSlots {
				l, err := decodeLabel(o.b[s*BlockBytes : (s+1)*BlockBytes])
				if err == nil && l.Array == a.id && l.Member == o.member.index {
					labels = append(labels, DriveLabel{Label: l, torn: true})
				}
			}
		}
		bufs[i].release()
	}
	l, err := truth(labels)
	if errors.Is(err, ErrBlank) {
		err = fmt.Errorf("raid: no label can be read: %w", ErrNoMajority)
	}
	return l, err
}

// WriteLabel changes the label on a majority of the members. change may set Owner, Epoch, Flags, SoloLSN, NVRAM and
// Opaque; the rest is the array's. It refuses with ErrStaleEpoch when the members carry a higher epoch than this
// array knows, and when change lowers the epoch. ErrNoMajority, ErrReservation and ErrStaleEpoch stop all writing.
func (a *Array) WriteLabel(ctx context.Context, change func(*Label)) error {
	if err := a.enter(); err != nil {
		return err
	}
	defer a.leave()
	if err := ctx.Err(); err != nil {
		return err
	}
	a.labelMu.Lock()
	defer a.labelMu.Unlock()
	return a.changeLabel(func(l *Label) {
		was := l.clone()
		change(l)
		now := *l
		*l = was
		l.Owner, l.Epoch, l.Flags, l.SoloLSN, l.NVRAM, l.Opaque =
			now.Owner, now.Epoch, now.Flags, now.SoloLSN, now.NVRAM, now.Opaque
	})
}

// changeLabel is the only way a label changes; labelMu is held. Members that cannot be written become failed, on
// the others, by a further change. Absent members become failed with the first change.
func (a *Array) changeLabel(change func(*Label)) error {
	if a.opts.ReadOnly {
		return ErrReadOnly
	}
	if err := a.Err(); err != nil {
		return err
	}
	media, err := a.readTruth()
	if err != nil {
		return a.latch(fmt.Errorf("raid: write label: %w", err))
	}
	next := a.Label()
	if media.Epoch > next.Epoch {
		return a.latch(fmt.Errorf("raid: write label: members are at epoch %d, we at %d: %w", media.Epoch, next.Epoch, ErrStaleEpoch))
	}
	epoch := next.Epoch
	change(&next)
	if next.Epoch < epoch {
		return fmt.Errorf("raid: write label: epoch %d after %d: %w", next.Epoch, epoch, ErrStaleEpoch)
	}
	next.Failed |= a.absent()
	a.dropRestore(&next, 0)
	before := a.Label()
	raised := before.Failed &^ next.Failed // restored
	next.Settled = max(next.Settled, a.settled)
	if err := next.validate(); err != nil {
		return fmt.Errorf("raid: write label: %w", err)
	}
	seq := max(next.Seq, media.Seq)
	for {
		// A member too many: what could not be written must not count as lost for good. The caller still has
		// it in its log, and a restart may find the member again.
		if lost := next.lost(next.Failed); lost > next.M {
			return a.latch(fmt.Errorf("raid: %d members failed, parity stands for %d: %w", lost, next.M, ErrDegraded))
		}
		seq++
		next.Seq = seq
		missed, err := a.writeLabels(&next)
		if err != nil {
			return a.latch(fmt.Errorf("raid: write label: %w", err))
		}
		if missed&raised != 0 {
			// It failed in the very moment when it was to be a member again: all is as before. Nobody relied on it yet.
			epoch := next
			next = before
			next.Owner, next.Epoch, next.Flags, next.SoloLSN, next.NVRAM, next.Opaque =
				epoch.Owner, epoch.Epoch, epoch.Flags, epoch.SoloLSN, epoch.NVRAM, epoch.Opaque
			next.Failed |= missed | a.absent()
			next.Settled = max(next.Settled, a.settled)
			raised = 0
			a.dropRestore(&next, missed)
			continue
		}
		a.adopt(&next)
		if missed == 0 {
			// In the second change since Open Settled says that the first is everywhere.
			a.ready.Store(a.settled != 0)
			a.settled = seq
			return nil
		}
		next.Failed |= missed
		a.dropRestore(&next, missed)
	}
}

// dropRestore takes a copy-back out of a label when its drive missed something or is not there.
func (a *Array) dropRestore(l *Label, missed uint64) {
	r := l.Restore.Member()
	if r < 0 {
		return
	}
	a.mu.Lock()
	state := a.members[r].state
	a.mu.Unlock()
	if state != Restoring || missed>>r&1 != 0 {
		l.Restore = Restore{}
	}
}

// absent returns the members without a working drive.
func (a *Array) absent() uint64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	var set uint64
	for _, m := range a.members {
		if m.state == Missing || m.state == Failed {
			set |= 1 << m.index
		}
	}
	return set
}

// writeLabels writes and flushes one label on every member that is not failed in it. It returns the members that
// missed it; an error when it did not reach a majority.
func (a *Array) writeLabels(l *Label) (missed uint64, err error) {
	var targets []*member
	states := make(map[*member]MemberState)
	a.mu.Lock()
	for _, m := range a.members {
		if m.state == Online && l.Failed>>m.index&1 == 0 || m.state == Restoring && (l.Restore.Member() == m.index || l.Failed>>m.index&1 == 0) {
			targets = append(targets, m)
			states[m] = m.state
		}
	}
	a.mu.Unlock()
	t := a.newBatch()
	for _, m := range targets {
		own := *l
		own.Member, own.MemberID = m.index, m.id
		b := newBlock()
		own.encode(b.b)
		off := int64(l.Seq%labelSlots) * BlockBytes
		t.ops = append(t.ops, &op{kind: opCall, member: m, buf: b, call: func(d Drive) error {
			if _, err := d.WriteAt(b.b, off); err != nil {
				return fmt.Errorf("raid: %v: write label: %w", m, err)
			}
			if err := d.Flush(); err != nil {
				return fmt.Errorf("raid: %v: flush label: %w", m, err)
			}
			return nil
		}})
	}
	t.run(a.opts.WriteTimeout)
	written := 0
	var first error
	for _, o := range t.ops {
		err := o.err()
		switch {
		case err == nil:
			// Whether a restored drive has this label, no reader may conclude from the one before.
			if states[o.member] == Online {
				written++
			}
			continue
		case isReservation(err):
			return 0, err
		case first == nil:
			first = err
		}
		missed |= 1 << o.member.index
		a.log(slog.LevelWarn, "raid: member missed a label", "member", o.member.index, "err", err)
	}
	if written < majority(l.N) {
		err := fmt.Errorf("written on %d of %d members: %w", written, l.N, ErrNoMajority)
		if first != nil {
			err = fmt.Errorf("%w (%v)", err, first)
		}
		return 0, err
	}
	return missed, nil
}

// adopt makes l the array's label, and the members' states what it says.
func (a *Array) adopt(l *Label) {
	a.mu.Lock()
	moved := false
	for _, m := range a.members {
		failed := l.Failed>>m.index&1 != 0
		switch {
		case m.state == Restoring && !failed:
			m.state, moved = Online, true
		case m.state == Restoring && l.Restore.Member() == m.index:
		case failed && m.state != Failed:
			a.log(slog.LevelError, "raid: member failed", "member", m.index)
			m.state = Failed
			moved = true
		}
	}
	moved = moved || l.SpareOf != a.label.SpareOf
	a.adoptGrow(l)
	a.label = l.clone()
	a.mu.Unlock()
	if moved {
		a.cache.clear()
	}
}

// prepareToWrite makes sure that the label allows writes: settled on a majority, absent members recorded.
func (a *Array) prepareToWrite() error {
	if a.opts.ReadOnly {
		return ErrReadOnly
	}
	if err := a.Err(); err != nil {
		return err
	}
	if a.ready.Load() {
		return nil
	}
	a.labelMu.Lock()
	defer a.labelMu.Unlock()
	for !a.ready.Load() {
		if err := a.changeLabel(func(*Label) {}); err != nil {
			return err
		}
	}
	return nil
}

// SettleLabel writes the label so that every copy of a member made before is known as old when the array is opened
// next. Opening does it before the first write; who may see copies made under a running array calls it now and then.
func (a *Array) SettleLabel(ctx context.Context) error {
	for range 2 {
		if err := a.WriteLabel(ctx, func(*Label) {}); err != nil {
			return err
		}
	}
	return nil
}

// settle handles the errors of a batch of writes: members that missed one are recorded as failed before
// it returns nil. A reservation conflict is passed on at once and stops all writing.
func (a *Array) settle(t *batch) error {
	var missed uint64
	for _, o := range t.ops {
		err := o.err()
		if err == nil {
			continue
		}
		if isReservation(err) {
			return a.latch(err)
		}
		if missed>>o.member.index&1 == 0 {
			a.log(slog.LevelWarn, "raid: write missed a member", "member", o.member.index, "err", err)
		}
		missed |= 1 << o.member.index
	}
	if missed == 0 {
		return nil
	}
	return a.fail(missed)
}

// fail records members as failed.
func (a *Array) fail(members uint64) error {
	a.labelMu.Lock()
	defer a.labelMu.Unlock()
	a.mu.Lock()
	known := a.label.Failed
	if r := a.label.Restore.Member(); r >= 0 {
		known &^= 1 << r // it is failed, but what it holds counts
	}
	a.mu.Unlock()
	if members&^known == 0 {
		return a.Err()
	}
	return a.changeLabel(func(l *Label) {
		l.Failed |= members
		a.dropRestore(l, members)
	})
}

func isReservation(err error) bool { return errors.Is(err, ErrReservation) }
