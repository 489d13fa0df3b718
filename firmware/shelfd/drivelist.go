package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/ledge-storage/ledge/firmware/control"
	"github.com/ledge-storage/ledge/firmware/ha"
	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/raid"
)

// headBytes of a drive are zeros on a blank one (raid.Create looks at as many).
const headBytes = 64 << 10

// Drives looks at every drive's label through this controller's ports.
func (a *api) Drives(ctx context.Context) (control.DriveList, error) {
	b := a.b
	list := b.drives.scan()
	out := control.DriveList{Controller: b.conf.Controller}
	b.mu.Lock()
	array := b.array
	b.mu.Unlock()
	var id raid.UUID
	using := map[string]bool{}
	if array != nil {
		st := array.Status()
		id = st.Array
		for _, m := range st.Members {
			if m.State == raid.Online || m.State == raid.Suspect || m.State == raid.Restoring {
				using[m.Path] = true
			}
		}
	}
	s, err := raid.ReadLabels(ctx, list, id)
	if err := ctx.Err(); err != nil {
		return out, err
	}
	if err == nil {
		out.Pool = s.Label.Pool.String()
	}
	for i, d := range list {
		x := control.Drive{Path: d.Name(), SizeBytes: d.Size(), InUse: using[d.Name()] && b.drives.has(d.Name()), Label: control.DriveSilent, Detail: "the labels could not be read"}
		if i < len(s.Drives) {
			describe(&x, s.Drives[i], s.Label, err == nil, d)
		}
		who := identify(x.Path)
		x.Slot, x.Serial, x.Model = who.Slot, who.Serial, who.Model
		out.Drives = append(out.Drives, x)
	}
	for path, why := range b.drives.unopened() {
		who := identify(path)
		out.Drives = append(out.Drives, control.Drive{Path: path, Slot: who.Slot, Serial: who.Serial, Model: who.Model, Label: control.DriveUnopened, Detail: why})
	}
	slices.SortFunc(out.Drives, func(a, b control.Drive) int { return comparePaths(a.Path, b.Path) })
	return out, nil
}

// describe says what a drive is by its label. known: truth is the label of the pool; else only what each drive says.
func describe(x *control.Drive, d raid.DriveLabel, truth raid.Label, known bool, drive raid.Drive) {
	x.Detail = ""
	if l := d.Label; l != nil {
		m := l.Member
		x.Member, x.Pool, x.Epoch, x.Seq = &m, l.Pool.String(), l.Epoch, l.Seq
	}
	switch {
	case d.Err == nil && !known:
		x.Label, x.Detail = control.DriveMember, "of an array that has no majority here"
	case d.Err == nil && behind(d.Label, &truth):
		x.Label, x.Detail = control.DriveOld, fmt.Sprintf("its label is of epoch %d write %d, the array's of epoch %d write %d", d.Label.Epoch, d.Label.Seq, truth.Epoch, truth.Seq)
	case d.Err == nil:
		x.Label = control.DriveMember
	case errors.Is(d.Err, raid.ErrDuplicate):
		x.Label, x.Detail = control.DriveDuplicate, "another drive carries this member's label too"
	case errors.Is(d.Err, raid.ErrStaleMember):
		x.Label, x.Detail = control.DriveStale, "the array went on without it"
		switch {
		case !known || d.Label == nil || d.Label.Member >= truth.N:
		case truth.IDs[d.Label.Member] != d.Label.MemberID:
			x.Detail = "another drive took its place"
		case truth.Failed>>d.Label.Member&1 == 0:
			x.Label, x.Detail = control.DriveOld, fmt.Sprintf("its label is of epoch %d write %d, the array's of epoch %d write %d", d.Label.Epoch, d.Label.Seq, truth.Epoch, truth.Seq)
		}
	case errors.Is(d.Err, raid.ErrForeign):
		x.Label, x.Detail = control.DriveForeign, "a member of another pool"
		if known && d.Label != nil && d.Label.Pool == truth.Pool {
			x.Detail = "a member of an array that this pool had"
		}
	case errors.Is(d.Err, raid.ErrSize):
		x.Label, x.Detail = control.DriveStale, "it is smaller than its label says"
	case errors.Is(d.Err, raid.ErrTimeout):
		x.Label, x.Detail = control.DriveSilent, "it does not answer"
	case errors.Is(d.Err, raid.ErrBlank):
		x.Label = content(drive)
		if x.Label == control.DriveUnreadable {
			x.Detail = "its first blocks cannot be read"
		}
		if drive.Size() < raid.DataOffset {
			x.Detail = "too small for a member"
		}
	default:
		x.Label, x.Detail = control.DriveUnreadable, oneLine(d.Err)
	}
}

// behind says that a label is older than what every working member carries. One write of difference may be a change
// that was under way when we looked.
func behind(l, truth *raid.Label) bool {
	return l.Epoch < truth.Epoch || l.Epoch == truth.Epoch && l.Seq+1 < truth.Seq
}

// content tells a blank drive from one with data but no label.
func content(d raid.Drive) string {
	buf := aligned(headBytes)
	if d.Size() < headBytes {
		buf = buf[:d.Size()/raid.BlockBytes*raid.BlockBytes]
	}
	if _, err := d.ReadAt(buf, 0); err != nil {
		return control.DriveUnreadable
	}
	for _, c := range buf {
		if c != 0 {
			return control.DriveData
		}
	}
	return control.DriveBlank
}

// aligned is n zero bytes in memory that drives take.
func aligned(n int) []byte { return nvram.AlignedBlocks(n / raid.BlockBytes)[:n] }

func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

// driveAt finds one drive as Drives sees it.
func (a *api) driveAt(ctx context.Context, path string) (control.Drive, error) {
	l, err := a.Drives(ctx)
	if err != nil {
		return control.Drive{}, err
	}
	for _, d := range l.Drives {
		if d.Path == path {
			return d, nil
		}
	}
	return control.Drive{}, &control.Hint{Err: fmt.Errorf("%w: controller %s has no drive %s", control.ErrNotFound, l.Controller, path),
		Hint: "'ledge drive list' shows what is plugged in; the field drives of the shelf's configuration says where drives are looked for"}
}

// WipeDrive erases the label area of a drive that nobody needs. Only the owner does it, or a controller without a pool:
// who else could not know whether it is a living member.
func (a *api) WipeDrive(ctx context.Context, path string, force bool) (control.Drive, error) {
	if st, _, _ := a.driver.State(); st.Phase != ha.NoPool {
		if _, err := a.Catalog(); err != nil {
			return control.Drive{}, err
		}
	}
	a.b.placing.Lock() // no drive becomes a member while it is wiped
	defer a.b.placing.Unlock()
	x, err := a.driveAt(ctx, path)
	if err != nil {
		return x, err
	}
	if err := mayWipe(x); err != nil {
		return x, err
	}
	p, ok := a.b.drives.find(path)
	if !ok {
		return x, fmt.Errorf("%w: drive %s is gone", control.ErrNotFound, path)
	}
	a.b.log.Warn("wiping a drive on the operator's word", "path", path, "was", x.Label, "pool", x.Pool, "force", force)
	// Of this pool's own drives the owner's and the partner's keys are nobody else's.
	own := x.Pool != "" && x.Label != control.DriveForeign
	if err := wipe(p.port, keyOf(a.b.self, 0), force, own); err != nil {
		return x, err
	}
	return a.driveAt(ctx, path)
}

// mayWipe refuses what is, or may be, a living member.
func mayWipe(x control.Drive) error {
	switch {
	case x.InUse:
		return &control.Hint{Err: fmt.Errorf("%w: %s is a living member of the array; wiping it would lose redundancy", control.ErrConflict, x.Path),
			Hint: "to take it out first: ledge drive fail N"}
	case x.Label == control.DriveMember:
		return &control.Hint{Err: fmt.Errorf("%w: %s carries member %d of pool %s, which the array counts on", control.ErrConflict, x.Path, *x.Member, x.Pool),
			Hint: "start the pool first; a drive that the array went on without is shown as stale, and can be wiped"}
	case x.Label == control.DriveSilent, x.Label == control.DriveUnopened:
		return fmt.Errorf("%w: %s: %s", control.ErrConflict, x.Path, x.Detail)
	}
	return nil
}

// wipe zeroes what lies before slot 0. A reservation of somebody else's is broken only by force.
func wipe(p port, key uint64, force, own bool) error {
	registered, holder, err := p.Keys()
	if err != nil && !force {
		return fmt.Errorf("%s: reservations: %w", p.Name(), err)
	}
	if holder != 0 && !force && !(own && controllerOf(holder) != ha.None) {
		return &control.Hint{Err: fmt.Errorf("%w: %s is reserved (key %016x, %s): another shelf may be using it", control.ErrConflict, p.Name(), holder, keyOwner(holder)),
			Hint: "unplug it from whatever uses it; if nothing does, wipe it by force, which breaks the reservation"}
	}
	if holder != 0 || len(registered) > 0 {
		if err := takeReservation(p, key); err != nil {
			return err
		}
		defer func() {
			p.Release(key) // what remains refuses nobody longer than the next Register
			p.Unregister(key)
		}()
	}
	const piece = 256 << 10
	zeros := aligned(piece)
	end := min(int64(raid.DataOffset), p.Size()/raid.BlockBytes*raid.BlockBytes)
	for off := int64(0); off < end; off += piece {
		if _, err := p.WriteAt(zeros[:min(piece, end-off)], off); err != nil {
			return fmt.Errorf("%s: wipe: %w", p.Name(), err)
		}
	}
	if err := p.Flush(); err != nil {
		return fmt.Errorf("%s: wipe: %w", p.Name(), err)
	}
	return nil
}

// keyOwner says whose reservation key it is, in words.
func keyOwner(key uint64) string {
	if c := controllerOf(key); c != ha.None {
		return fmt.Sprintf("of controller %s of a Ledge shelf", c)
	}
	return "not Ledge's"
}

// takeReservation makes key the only one on a drive and its reservation ours, whoever held it. Registering changes what
// there is, and others may register meanwhile: so it looks until it is alone.
func takeReservation(p port, key uint64) error {
	const attempts = 136 // twice what a drive keeps, and some for those who come meanwhile
	if err := p.Register(key); err != nil {
		return fmt.Errorf("%s: register: %w", p.Name(), err)
	}
	for range attempts {
		registered, holder, err := p.Keys()
		if err != nil {
			return fmt.Errorf("%s: reservations: %w", p.Name(), err)
		}
		strangers := slices.DeleteFunc(registered, func(k uint64) bool { return k == key })
		switch {
		case holder != 0 && holder != key:
			err = p.Preempt(key, holder)
		case len(strangers) > 0:
			err = p.Preempt(key, strangers[0])
		case holder == 0:
			err = p.Reserve(key)
		default:
			return nil
		}
		if err != nil && !errors.Is(err, raid.ErrReservation) {
			return fmt.Errorf("%s: reserve: %w", p.Name(), err) // a conflict only means that the keys changed since we looked
		}
	}
	return fmt.Errorf("%s: another controller keeps reserving it: %w", p.Name(), raid.ErrReservation)
}
