package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/ledge-storage/ledge/firmware/control"
	"github.com/ledge-storage/ledge/raid"
)

// Members that are failed, replaced, taken back and added on the operator's word. A drive is fenced before the array
// gets it: from its first write on it carries the reservation that every member carries, so that a takeover finds it
// as it finds the others. The array alone judges what a drive is; here is said what that means.

func (s *storage) FailMember(ctx context.Context, member int, force bool) error {
	if err := s.exists(member); err != nil {
		return err
	}
	s.a.b.log.Warn("failing a member on the operator's word", "member", member, "force", force)
	return arrayError(s.array.FailMember(ctx, member, force))
}

func (s *storage) exists(member int) error {
	if n := s.array.Geometry().N; member >= n {
		return &control.Hint{Err: fmt.Errorf("%w: the array has members 0 to %d, no member %d", control.ErrNotFound, n-1, member), Hint: "'ledge array show' shows them"}
	}
	return nil
}

func (s *storage) state(member int) raid.MemberState { return s.array.Status().Members[member].State }

func (s *storage) ReplaceMember(ctx context.Context, member int, path string, force bool) (control.Task, error) {
	if err := s.exists(member); err != nil {
		return control.Task{}, err
	}
	if st := s.state(member); st == raid.Online || st == raid.Suspect {
		return control.Task{}, &control.Hint{Err: fmt.Errorf("%w: member %d is %s: replacing it now would lose its redundancy before the new drive has it", control.ErrConflict, member, st),
			Hint: fmt.Sprintf("first: ledge drive fail %d; its strips are then rebuilt to spare space, or copied to the new drive", member)}
	}
	s.a.b.placing.Lock()
	defer s.a.b.placing.Unlock()
	x, err := s.a.driveAt(ctx, path)
	if err != nil {
		return control.Task{}, err
	}
	if err := mayTake(x, force); err != nil {
		return control.Task{}, err
	}
	return s.restore(ctx, "replace", member, path, force, func(ctx context.Context, d raid.Drive, o raid.RebuildOptions) error {
		return s.array.Replace(ctx, member, d, raid.ReplaceOptions{RebuildOptions: o, Force: force})
	})
}

// mayTake refuses drives that hold something, unless by force, and living members always.
func mayTake(x control.Drive, force bool) error {
	what := ""
	switch x.Label {
	case control.DriveBlank:
		return nil
	case control.DriveMember, control.DriveDuplicate:
		if x.InUse || x.Label == control.DriveMember {
			return &control.Hint{Err: fmt.Errorf("%w: %s is member %d of this array already", control.ErrConflict, x.Path, *x.Member), Hint: "choose a blank drive: ledge drive list"}
		}
		what = fmt.Sprintf("a copy of member %d", *x.Member)
	case control.DriveSilent, control.DriveUnopened, control.DriveUnreadable:
		return fmt.Errorf("%w: %s: %s", control.ErrConflict, x.Path, x.Detail)
	case control.DriveForeign:
		what = fmt.Sprintf("member %d of pool %s", *x.Member, x.Pool)
	case control.DriveStale, control.DriveOld:
		what = fmt.Sprintf("an older state of member %d of this array", *x.Member)
	default:
		what = "data without a label of Ledge's"
	}
	if force {
		return nil
	}
	return &control.Hint{Err: fmt.Errorf("%w: %s is not blank: it holds %s, which would be lost", control.ErrConflict, x.Path, what),
		Hint: "choose another drive, or force it; a member's own drive comes back with: ledge drive readd"}
}

func (s *storage) ReaddMember(ctx context.Context, member int, path string) (control.Task, error) {
	if err := s.exists(member); err != nil {
		return control.Task{}, err
	}
	if st := s.state(member); st == raid.Online || st == raid.Suspect {
		return control.Task{}, &control.Hint{Err: fmt.Errorf("%w: member %d is %s already", control.ErrConflict, member, st), Hint: "'ledge array show' tells which members want something"}
	}
	s.a.b.placing.Lock()
	defer s.a.b.placing.Unlock()
	l, err := s.a.Drives(ctx)
	if err != nil {
		return control.Task{}, err
	}
	var mine []control.Drive
	for _, d := range l.Drives {
		if d.Member != nil && *d.Member == member && d.Pool == l.Pool && !d.InUse && (path == "" || path == d.Path) {
			mine = append(mine, d)
		}
	}
	switch {
	case len(mine) == 0 && path != "":
		if _, err := s.a.driveAt(ctx, path); err != nil {
			return control.Task{}, err
		}
		return control.Task{}, &control.Hint{Err: fmt.Errorf("%w: %s does not carry the label of member %d of this pool", control.ErrConflict, path, member),
			Hint: fmt.Sprintf("to fill it from the array instead: ledge drive replace %d --with %s", member, path)}
	case len(mine) == 0:
		return control.Task{}, &control.Hint{Err: fmt.Errorf("%w: no drive here carries the label of member %d", control.ErrNotFound, member),
			Hint: fmt.Sprintf("plug it in; or give the member a new drive: ledge drive replace %d --with PATH", member)}
	case len(mine) > 1:
		paths := []string{}
		for _, d := range mine {
			paths = append(paths, d.Path)
		}
		return control.Task{}, &control.Hint{Err: fmt.Errorf("%w: several drives carry the label of member %d: %v", control.ErrConflict, member, paths), Hint: "name the one with --drive"}
	}
	return s.restore(ctx, "readd", member, mine[0].Path, true, s.array.Readd)
}

// errLeft ends a copy as soon as it has begun: the pool's maintenance goes on with it, at its pace, and so does the next
// owner's.
var errLeft = errors.New("left to the maintenance")

// restore begins to fill a member, and returns when the array has taken the drive or refused it. The copying is a task.
func (s *storage) restore(ctx context.Context, kind string, member int, path string, force bool, f func(context.Context, raid.Drive, raid.RebuildOptions) error) (control.Task, error) {
	lent, err := s.a.b.drives.lend(path)
	if err != nil {
		return control.Task{}, fmt.Errorf("%w: %w", control.ErrNotFound, err)
	}
	if err := s.fence(lent[0].(shared).port, force); err != nil {
		giveBack(lent)
		return control.Task{}, err
	}
	release, err := s.pool.HoldMaintenance(ctx) // a rebuild and this would be in each other's way
	if err != nil {
		giveBack(lent)
		return control.Task{}, err
	}
	defer release()
	begun, ended := make(chan struct{}), make(chan error, 1)
	t, err := s.a.b.tasks.start(kind, fmt.Sprintf("member %d", member), "stripes", s.array.Geometry().StripeBytes, func(ctx context.Context, tell report) (string, error) {
		once := false
		err := f(ctx, lent[0], raid.RebuildOptions{
			Pace: func(ctx context.Context) error {
				if !once {
					once = true
					close(begun)
				}
				if s.maintained() {
					return errLeft
				}
				return ctx.Err()
			},
			Progress: func(done, total uint64) { tell(done, total) },
		})
		note := path + " is in place"
		if errors.Is(err, errLeft) {
			note, err = path+" is being filled by the maintenance", nil
		} else if err != nil && s.state(member) != raid.Restoring {
			giveBack(lent) // refused: it is still ours
		}
		ended <- err
		return note, err
	})
	if err != nil {
		giveBack(lent)
		return t, err
	}
	select {
	case <-begun:
		return t, nil
	case err := <-ended:
		if err != nil {
			return t, arrayError(err)
		}
		select {
		case <-begun: // and left to the maintenance: it is not done
			return t, nil
		default:
		}
		for _, x := range s.a.b.tasks.of(kind) { // as it ended
			if x.ID == t.ID {
				t = x
			}
		}
		return t, nil
	case <-ctx.Done():
		return t, nil // it goes on, and shows as a task
	}
}

// maintained says that the pool's background work goes on with copies that were begun.
func (s *storage) maintained() bool { return s.pool.Maintains() }

// fence gives a drive the reservation that the members carry. One that somebody else holds is refused without force;
// our own shelf's keys of earlier epochs are not somebody else's on a drive that was ours.
func (s *storage) fence(p port, force bool) error {
	_, holder, err := p.Keys()
	if err != nil {
		return fmt.Errorf("%w: %s: reservations: %w", control.ErrConflict, p.Name(), err)
	}
	if holder != 0 && holder != s.key && !force {
		return &control.Hint{Err: fmt.Errorf("%w: %s is reserved (key %016x, %s): another shelf may be using it", control.ErrConflict, p.Name(), holder, keyOwner(holder)),
			Hint: "unplug it from whatever uses it; if nothing does, force it, which breaks the reservation"}
	}
	return takeReservation(p, s.key)
}

// Grow makes the drives members, and returns when that is recorded. The pool's maintenance moves the data, and takes the
// new space in.
func (s *storage) Grow(ctx context.Context, paths []string, force bool) (control.Task, error) {
	s.a.b.placing.Lock()
	defer s.a.b.placing.Unlock()
	for _, path := range paths {
		x, err := s.a.driveAt(ctx, path)
		if err == nil {
			err = mayTake(x, force)
		}
		if err != nil {
			return control.Task{}, err
		}
	}
	lent, err := s.a.b.drives.lend(paths...)
	if err != nil {
		return control.Task{}, fmt.Errorf("%w: %w", control.ErrNotFound, err)
	}
	release, err := s.pool.HoldMaintenance(ctx)
	if err != nil {
		giveBack(lent)
		return control.Task{}, err
	}
	defer release()
	for _, d := range lent {
		if err = s.fence(d.(shared).port, force); err != nil {
			break
		}
	}
	if err == nil {
		err = arrayError(s.array.BeginGrow(ctx, lent, raid.GrowOptions{Force: force}))
	}
	g := s.array.GrowStatus()
	if err != nil {
		if !g.Growing {
			giveBack(lent)
		}
		return control.Task{}, err
	}
	s.a.b.log.Info("the array grows", "from", g.From, "to", g.To, "drives", strings.Join(paths, " "))
	return control.Task{Kind: "grow", Subject: fmt.Sprintf("%d to %d members", g.From, g.To), State: "running", Done: g.Done, Total: g.Total, Unit: "stripes", Started: s.a.b.tasks.now()}, nil
}

// arrayError is the one table from the array's errors to the API's.
func arrayError(err error) error {
	if err == nil {
		return nil
	}
	for _, x := range []struct {
		from, to error
		hint     string
	}{
		{raid.ErrRedundancy, control.ErrConflict, "wait for what is being rebuilt, or bring another member back first; force it only where no data can be lost by it"},
		{raid.ErrBusy, control.ErrConflict, "'ledge array show' tells what is under way; ask again when it is done"},
		{raid.ErrNotBlank, control.ErrConflict, "what is on the drive would be lost: choose another, or force it"},
		{raid.ErrForeign, control.ErrConflict, "the drive belongs to another pool: choose another, or force it"},
		{raid.ErrDuplicate, control.ErrConflict, "choose a blank drive: ledge drive list"},
		{raid.ErrStaleMember, control.ErrConflict, "fill a drive from the array instead: ledge drive replace N --with PATH"},
		{raid.ErrSize, control.ErrConflict, "choose a drive at least as large as the members"},
		{raid.ErrDegraded, control.ErrConflict, ""},
		{raid.ErrReservation, control.ErrConflict, "another controller holds the drive"},
		{raid.ErrRange, control.ErrConflict, "'ledge array show' tells the member's state"},
		{raid.ErrClosed, control.ErrUnavailable, "the ownership moves; ask the owner again"},
	} {
		if errors.Is(err, x.from) {
			err = fmt.Errorf("%w: %w", x.to, err)
			if x.hint != "" {
				err = &control.Hint{Err: err, Hint: x.hint}
			}
			return err
		}
	}
	return err
}
