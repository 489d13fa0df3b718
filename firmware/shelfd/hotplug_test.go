package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/firmware/control"
	"github.com/ledge-storage/ledge/firmware/ha"
	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/raid/drive"
)

// shelfFiles are drives on files, as an operator has them.
type shelfFiles struct {
	t   *testing.T
	dir string
	b   *backend
	a   *api
}

const driveBytes = raid.DataOffset + 12*raid.SlotBytes

func newShelfFiles(t *testing.T, n int) *shelfFiles {
	t.Helper()
	f := &shelfFiles{t: t, dir: t.TempDir()}
	for i := range n {
		f.plug(i)
	}
	log := slog.New(slog.DiscardHandler)
	f.b = &backend{self: ha.A, log: log, conf: &Config{Shelf: "s1", Controller: "A", Array: ArrayConfig{Data: 2, Parity: 2}}, tasks: newTasks(log)}
	f.b.drives = newDrives([]string{filepath.Join(f.dir, "d*")}, func(path string) (port, error) { return drive.Open(path, drive.Options{Controller: "s1.A"}) }, log)
	f.a = &api{b: f.b}
	t.Cleanup(func() { f.b.closeArray(); f.b.drives.close() })
	return f
}

func (f *shelfFiles) path(i int) string { return filepath.Join(f.dir, fmt.Sprintf("d%02d", i)) }

func (f *shelfFiles) plug(i int) {
	f.t.Helper()
	if err := drive.Create(f.path(i), driveBytes); err != nil {
		f.t.Fatal(err)
	}
}

func (f *shelfFiles) move(from, to string) {
	f.t.Helper()
	for _, end := range []string{"", ".pr"} { // a drive's reservation goes with it
		if err := os.Rename(from+end, to+end); err != nil && end == "" {
			f.t.Fatal(err)
		}
	}
}

// create makes an array of the first n drives, finished as Form does.
func (f *shelfFiles) create(n int) *raid.Array {
	f.t.Helper()
	var paths []string
	for i := range n {
		paths = append(paths, f.path(i))
	}
	lent, err := f.b.drives.lend(paths...)
	if err != nil {
		f.t.Fatal(err)
	}
	key := keyOf(ha.A, 1)
	if err := f.b.drives.reserveAll(f.t.Context(), lent, key, f.b.mine); err != nil {
		f.t.Fatal(err)
	}
	a, err := raid.Create(f.t.Context(), lent, raid.Options{K: 2, M: 2, NoSpares: true})
	if err != nil {
		f.t.Fatal(err)
	}
	if err := a.WriteLabel(f.t.Context(), func(l *raid.Label) { l.Epoch, l.Owner = 1, 'A' }); err != nil {
		f.t.Fatal(err)
	}
	f.b.hold(a, key)
	return a
}

func (f *shelfFiles) list() string {
	f.t.Helper()
	l, err := f.a.Drives(f.t.Context())
	if err != nil {
		f.t.Fatal(err)
	}
	var out []string
	for _, d := range l.Drives {
		s := filepath.Base(d.Path) + " " + d.Label
		if d.Member != nil {
			s += fmt.Sprint(" ", *d.Member)
		}
		if d.InUse {
			s += " in use"
		}
		out = append(out, s)
	}
	return strings.Join(out, "; ")
}

// TestDriveList: each kind of drive is called what it is, and what an operator may lose by wiping it is refused.
func TestDriveList(t *testing.T) {
	f := newShelfFiles(t, 6)
	f.create(5)
	want := "d00 member 0 in use; d01 member 1 in use; d02 member 2 in use; d03 member 3 in use; d04 member 4 in use; d05 blank"
	if got := f.list(); got != want {
		t.Fatalf("%s\nwant %s", got, want)
	}
	// A copy of a member, data of something else, a drive that is none, and one of another pool.
	b, err := os.ReadFile(f.path(1))
	if err != nil {
		t.Fatal(err)
	}
	os.WriteFile(f.path(6), b, 0o600)
	os.WriteFile(f.path(7), append([]byte("#!/bin/sh"), make([]byte, driveBytes)...), 0o600)
	os.Mkdir(f.path(8), 0o700)
	other := newShelfFiles(t, 5)
	other.create(5)
	other.b.closeArray()
	if b, err = os.ReadFile(other.path(3)); err != nil {
		t.Fatal(err)
	}
	os.WriteFile(f.path(9), b, 0o600)
	// The copied member is a duplicate now, on both: nobody can tell which is the copy. It is in use all the same.
	want = "d00 member 0 in use; d01 duplicate 1 in use; d02 member 2 in use; d03 member 3 in use; d04 member 4 in use; d05 blank; d06 duplicate 1; d07 data; d08 cannot-open; d09 foreign 3"
	if got := f.list(); got != want {
		t.Fatalf("%s\nwant %s", got, want)
	}
	for i, says := range []string{"living", "living", "living", "living", "living", "", "", "", "no drive", ""} {
		d, err := f.a.driveAt(t.Context(), f.path(i))
		if err != nil {
			t.Fatal(err)
		}
		err = mayWipe(d)
		if (err == nil) != (says == "") || err != nil && !strings.Contains(err.Error(), says) || err != nil && !errors.Is(err, control.ErrConflict) {
			t.Errorf("wipe d%02d: %v, want %q", i, err, says)
		}
		err = mayTake(d, false)
		if (err == nil) != (i == 5) {
			t.Errorf("take d%02d: %v", i, err)
		}
		if err = mayTake(d, true); (err == nil) != (i == 5 || i == 6 || i == 7 || i == 9) {
			t.Errorf("take d%02d by force: %v", i, err)
		}
	}
	// After the array went on (two labels more), the copy is an older one.
	f.b.mu.Lock()
	a := f.b.array
	f.b.mu.Unlock()
	for range 2 {
		if err := a.WriteLabel(t.Context(), func(*raid.Label) {}); err != nil {
			t.Fatal(err)
		}
	}
	if got := f.list(); !strings.Contains(got, "d01 member 1 in use") || !strings.Contains(got, "d06 older-copy 1;") {
		t.Fatal(got)
	}
	f.move(f.path(1), filepath.Join(f.dir, "away"))
	if got := f.list(); !strings.Contains(got, "d06 older-copy 1;") {
		t.Fatal(got)
	}
}

// TestWipe: a wiped drive is blank, with no reservation left; another shelf's reservation is broken by force only.
func TestWipe(t *testing.T) {
	f := newShelfFiles(t, 5)
	f.create(5)
	f.b.closeArray()
	p, ok := f.b.drives.find(f.path(2))
	if !ok {
		t.Fatal("no drive")
	}
	if err := wipe(p.port, keyOf(ha.A, 0), false, false); !errors.Is(err, control.ErrConflict) || !strings.Contains(err.Error(), "reserved") {
		t.Fatalf("a reserved drive: %v", err)
	}
	if got := content(p); got != control.DriveData {
		t.Fatalf("it is %s after the wipe was refused", got)
	}
	for i, how := range [][2]bool{{true, false}, {false, true}} { // by force; or as this pool's own
		p, _ := f.b.drives.find(f.path(2 + i))
		if err := wipe(p.port, keyOf(ha.A, 0), how[0], how[1]); err != nil {
			t.Fatal(err)
		}
		if keys, holder, err := p.Keys(); err != nil || len(keys) > 0 || holder != 0 {
			t.Fatalf("left: %x, %x, %v", keys, holder, err)
		}
		b, err := os.ReadFile(f.path(2 + i))
		if err != nil || strings.Trim(string(b[:raid.DataOffset]), "\x00") != "" {
			t.Fatal("not zeroed")
		}
	}
}

// TestHotplug: drives that come, go, and change places are known at the next look; one that an array has is kept for
// it until the array closes it.
func TestHotplug(t *testing.T) {
	f := newShelfFiles(t, 6)
	a := f.create(5)
	names := func() (out []string) {
		for _, d := range f.b.drives.scan() {
			out = append(out, filepath.Base(d.Name()))
		}
		return out
	}
	if x := f.b.drives.fresh(); len(x) != 1 || filepath.Base(x[0].Name()) != "d05" {
		t.Fatalf("fresh: %v", x)
	}
	away := filepath.Join(f.dir, "away")
	f.move(f.path(1), away)
	if got := names(); slices.Contains(got, "d01") || !f.b.drives.pulled(f.path(1)) {
		t.Fatalf("%v, pulled %t", got, f.b.drives.pulled(f.path(1)))
	}
	// It comes back in another slot, and a blank one in its own.
	f.move(away, f.path(7))
	f.plug(1)
	if got := names(); !slices.Contains(got, "d07") || !slices.Contains(got, "d01") {
		t.Fatal(got)
	}
	if got := f.list(); !strings.Contains(got, "d01 blank;") || !strings.Contains(got, "d07 member 1") {
		t.Fatal(got)
	}
	var fresh []string
	for _, d := range f.b.drives.fresh() {
		fresh = append(fresh, filepath.Base(d.Name()))
	}
	if strings.Join(fresh, " ") != "d01 d07" || len(f.b.drives.fresh()) != 0 {
		t.Fatalf("fresh: %v", fresh)
	}
	if len(f.b.drives.retired) != 1 {
		t.Fatalf("%d drives retired while the array has one of them", len(f.b.drives.retired))
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if len(f.b.drives.retired) != 0 {
		t.Fatal("the retired drive is not closed with the array")
	}
	// A loan ends once, whatever its holder does.
	lent, err := f.b.drives.lend(f.path(0))
	if err != nil {
		t.Fatal(err)
	}
	giveBack(lent)
	giveBack(lent)
	if p := f.b.drives.ports[f.path(0)]; p.users != 0 {
		t.Fatalf("%d users", p.users)
	}
	for _, bad := range [][]string{{f.path(9)}, {f.path(0), f.path(0)}} {
		if lent, err := f.b.drives.lend(bad...); err == nil {
			giveBack(lent)
			t.Errorf("%v lent", bad)
		}
	}
}

// TestConfirm: a reservation on drives that are no members any more does not count for the owner (P2).
func TestConfirm(t *testing.T) {
	f := newShelfFiles(t, 7)
	a := f.create(5)
	key := keyOf(ha.A, 1)
	// Drives outside of the array hold our reservation too: failed and replaced ones do.
	lent, err := f.b.drives.lend(f.path(5), f.path(6))
	if err != nil {
		t.Fatal(err)
	}
	defer giveBack(lent)
	if err := f.b.drives.reserveAll(t.Context(), lent, key, f.b.mine); err != nil {
		t.Fatal(err)
	}
	if err := f.b.Confirm(t.Context()); err != nil {
		t.Fatal(err)
	}
	// The partner takes four of the five.
	var release []func() error
	for i := range 4 {
		p, err := drive.Open(f.path(i), drive.Options{Controller: "s1.B"})
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		theirs := keyOf(ha.B, 2)
		if err := errors.Join(p.Register(theirs), p.Preempt(theirs, key)); err != nil {
			t.Fatal(err)
		}
		release = append(release, func() error { return errors.Join(p.Release(theirs), p.Unregister(theirs)) })
	}
	if err := f.b.Confirm(t.Context()); !errors.Is(err, ha.ErrConflict) {
		t.Fatalf("one member and two other drives confirm us: %v", err)
	}
	// It backs off. Nobody holds the members then; we have lost them all the same, and must take them up anew.
	for _, f := range release {
		if err := f(); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.b.Confirm(t.Context()); !errors.Is(err, ha.ErrConflict) || !strings.Contains(err.Error(), "nobody on 4") {
		t.Fatalf("nobody holds four of five members: %v", err)
	}
	a.Close()
}

// TestSlowOpen: a drive that hangs when it is opened holds nobody up, and is there later.
func TestSlowOpen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "d")
	os.WriteFile(path, nil, 0o600)
	hang, opens := make(chan struct{}), 0
	d := newDrives([]string{path}, func(path string) (port, error) {
		opens++
		<-hang
		return &fakePort{name: path}, nil
	}, slog.New(slog.DiscardHandler))
	for range 2 {
		if got := d.scan(); len(got) != 0 {
			t.Fatal(got)
		}
	}
	if why := d.unopened()[path]; why != "does not answer" {
		t.Fatalf("unopened: %q", why)
	}
	close(hang)
	d.asked.Wait()
	if got := d.scan(); len(got) != 1 || opens != 1 {
		t.Fatalf("%v after %d opens", got, opens)
	}
	d.close()
}

// TestTasks: the same work runs once; what ended is remembered, within bounds; stop ends all, and nothing begins then.
func TestTasks(t *testing.T) {
	now := time.Unix(1000, 0)
	k := newTasks(slog.New(slog.DiscardHandler))
	k.now = func() time.Time { return now }
	goOn := make(chan error)
	work := func(ctx context.Context, tell report) (string, error) {
		tell(25, 100)
		select {
		case err := <-goOn:
			return "noted", err
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
	first, err := k.start("replace", "member 3", "stripes", 1<<20, work)
	if err != nil || first.State != "running" || first.ID != 1 {
		t.Fatalf("%+v %v", first, err)
	}
	if _, err := k.start("replace", "member 3", "stripes", 1<<20, work); !errors.Is(err, control.ErrConflict) {
		t.Fatalf("the same twice: %v", err)
	}
	for k.of("replace")[0].Done == 0 {
		time.Sleep(time.Millisecond)
	}
	k.mu.Lock()
	now = now.Add(5 * time.Second)
	k.mu.Unlock()
	if x := k.of("replace")[0]; x.BytesPerSecond != 5<<20 || x.SecondsLeft == nil || *x.SecondsLeft != 15 {
		t.Fatalf("%+v", x)
	}
	goOn <- nil
	k.wg.Wait()
	if x := k.of("replace", "drain"); len(x) != 1 || x[0].State != "done" || x[0].Done != 100 || x[0].Note != "noted" || x[0].Ended == nil {
		t.Fatalf("%+v", x)
	}
	for i := range 40 { // one at a time
		if _, err := k.start("drain", fmt.Sprint(i), "bytes", 1, work); err != nil {
			t.Fatal(err)
		}
		goOn <- errors.New("no")
		k.wg.Wait()
	}
	if x := k.of("drain", "replace"); len(x) != keptTasks || x[0].Subject != "24" || x[0].State != "failed" || x[0].Error != "no" {
		t.Fatalf("%d kept, first %+v", len(x), x[0])
	}
	for i := range maxTasks {
		if _, err := k.start("grow", fmt.Sprint(i), "stripes", 1, work); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := k.start("grow", "more", "stripes", 1, work); !errors.Is(err, control.ErrUnavailable) {
		t.Fatalf("beyond the limit: %v", err)
	}
	k.stop()
	for _, x := range k.of("grow") {
		if x.State != "stopped" {
			t.Fatalf("%+v", x)
		}
	}
	if _, err := k.start("grow", "late", "stripes", 1, work); !errors.Is(err, control.ErrUnavailable) {
		t.Fatalf("after stop: %v", err)
	}
	k.resume()
	if _, err := k.start("grow", "again", "stripes", 1, work); err != nil {
		t.Fatal(err)
	}
	k.stop()
}

// TestPoolOfDrives: a pool takes the drives it is told; what is on them is named, and lost by force only.
func TestPoolOfDrives(t *testing.T) {
	f := newShelfFiles(t, 7)
	other := newShelfFiles(t, 5)
	other.create(5)
	other.b.closeArray()
	b, err := os.ReadFile(other.path(3))
	if err != nil {
		t.Fatal(err)
	}
	os.WriteFile(f.path(6), b, 0o600)
	make := func(s control.PoolSpec) error {
		lent, err := f.b.drives.lend(s.Drives...)
		if err != nil {
			return err
		}
		a, err := f.b.createArray(t.Context(), lent, keyOf(ha.A, 1), s)
		if err != nil {
			giveBack(lent)
			return err
		}
		f.b.hold(a, keyOf(ha.A, 1))
		return nil
	}
	var hint *control.Hint
	err = make(control.PoolSpec{Spares: -1})
	if !errors.Is(err, control.ErrInvalid) || !strings.Contains(err.Error(), "d06 is member 3 of pool") || !errors.As(err, &hint) || !strings.Contains(hint.Hint, "force") {
		t.Fatalf("a foreign member among them: %v", err)
	}
	if _, holder, _ := f.b.drives.ports[f.path(0)].Keys(); holder != 0 {
		t.Fatal("a refused creation leaves a reservation")
	}
	if err := make(control.PoolSpec{Spares: -1, Data: 6, Parity: 2}); !errors.Is(err, control.ErrInvalid) {
		t.Fatalf("6+2 over 7 drives: %v", err)
	}
	paths := []string{f.path(5), f.path(1), f.path(2), f.path(3), f.path(4)}
	if err := make(control.PoolSpec{Spares: 0, Data: 2, Parity: 1, Drives: paths}); err != nil {
		t.Fatal(err)
	}
	if g := f.b.array.Geometry(); g.N != 5 || g.K != 2 || g.M != 1 || g.Spares != 0 {
		t.Fatalf("%+v", g)
	}
	if got := f.list(); !strings.HasPrefix(got, "d00 blank;") || !strings.Contains(got, "d05 member 0 in use") {
		t.Fatal(got)
	}
	// A pool that was never finished counts as nothing.
	f.b.closeArray()
	if err := make(control.PoolSpec{Spares: -1, Drives: paths}); err != nil {
		t.Fatal(err)
	}
	f.b.mu.Lock()
	a := f.b.array
	f.b.mu.Unlock()
	if err := a.WriteLabel(t.Context(), func(l *raid.Label) { l.Epoch = 1 }); err != nil {
		t.Fatal(err)
	}
	f.b.closeArray()
	if err := make(control.PoolSpec{Spares: -1, Drives: paths}); !errors.Is(err, control.ErrInvalid) {
		t.Fatalf("a finished pool is overwritten: %v", err)
	}
	if err := make(control.PoolSpec{Spares: -1, Force: true}); err != nil {
		t.Fatal(err)
	}
}
