package store

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/target"
)

func snapshotOf(t testing.TB, st *Store, volume, name string) *Volume {
	t.Helper()
	v, err := st.OpenSnapshot(volume, name)
	must(t, err)
	return v
}

func snapshotNames(t testing.TB, st *Store, volume string) (names []string) {
	t.Helper()
	list, err := st.Snapshots(volume)
	must(t, err)
	for _, s := range list {
		names = append(names, s.Volume+"@"+s.Name)
	}
	return names
}

// reopen ends the store as kill -9 does, or well, and opens it.
func reopen(t testing.TB, st *Store, sh *shelf, well bool) *Store {
	t.Helper()
	if well {
		must(t, st.Close(t.Context()))
	} else {
		st.stop()
	}
	return open(t, sh.options())
}

// What a snapshot, a clone and a rolled back volume hold, before and after the next opening.
func TestSnapshot(t *testing.T) {
	for _, well := range []bool{true, false} {
		sh := newShelf(t, 1)
		ctx := t.Context()
		o := sh.options()
		now := time.Unix(1e9, 5)
		o.Now = func() time.Time { return now }
		st := open(t, o)
		_, err := st.CreateVolume(ctx, "v", 1<<30)
		must(t, err)
		v := volume(t, st, "v")
		monday, tuesday := text(1, 600), text(2, 600)
		must(t, v.Write(ctx, 0, monday))
		list, err := st.Snapshot(ctx, "monday", "v")
		must(t, err)
		if s := list[0]; len(list) != 1 || s.Volume != "v" || s.Name != "monday" || !s.Created.Equal(now) || s.SizeBytes != 1<<30 {
			t.Errorf("%+v", list)
		}
		must(t, v.Write(ctx, 0, tuesday))
		must(t, v.Zero(ctx, 700, 100))
		_, err = st.Snapshot(ctx, "tuesday", "v")
		must(t, err)
		must(t, st.ResizeVolume(ctx, "v", 2<<30))
		must(t, v.Write(ctx, 1<<18, tuesday))
		_, err = st.Clone(ctx, "v", "monday", "c")
		must(t, err)
		c := volume(t, st, "c")
		must(t, c.Write(ctx, 3, tuesday[:BlockBytes]))
		copied := bytes.Clone(monday)
		copy(copied[3*BlockBytes:], tuesday[:BlockBytes])
		check := func() {
			t.Helper()
			wantBlocks(t, snapshotOf(t, st, "v", "monday"), 0, monday)
			wantBlocks(t, snapshotOf(t, st, "v", "tuesday"), 0, tuesday)
			wantBlocks(t, volume(t, st, "c"), 0, copied)
			if i := volume(t, st, "c").Info(); i.Origin != "v@monday" || i.SizeBytes != 1<<30 {
				t.Errorf("clone: %+v", i)
			}
			if n := snapshotNames(t, st, "v"); !slices.Equal(n, []string{"v@monday", "v@tuesday"}) {
				t.Errorf("snapshots %v", n)
			}
		}
		check()
		wantBlocks(t, v, 1<<18, tuesday)
		st = reopen(t, st, sh, well)
		check()
		v = volume(t, st, "v")
		wantBlocks(t, v, 1<<18, tuesday)

		must(t, v.Write(ctx, 100, monday[:50*BlockBytes]))
		must(t, st.Rollback(ctx, "v", "monday"))
		wantBlocks(t, v, 0, monday)
		if v.Size() != 1<<30 {
			t.Errorf("%d bytes after the roll back", v.Size())
		}
		must(t, v.Write(ctx, 5, tuesday[:BlockBytes]))
		st = reopen(t, st, sh, well)
		check()
		v = volume(t, st, "v")
		wantBlocks(t, v, 0, monday[:5*BlockBytes])
		wantBlocks(t, v, 5, tuesday[:BlockBytes])
		wantBlocks(t, v, 6, monday[6*BlockBytes:])
		must(t, st.DeleteSnapshot(ctx, "v", "monday"))
		if i := volume(t, st, "c").Info(); i.Origin != "" {
			t.Errorf("the origin is deleted: %+v", i)
		}
		must(t, st.DeleteSnapshot(ctx, "v", "tuesday"))
		must(t, st.DeleteVolume(ctx, "v"))
		wantBlocks(t, volume(t, st, "c"), 0, copied)
		st = reopen(t, st, sh, well)
		wantBlocks(t, volume(t, st, "c"), 0, copied)
		must(t, st.DeleteVolume(ctx, "c"))
		must(t, st.Checkpoint(ctx))
		if n := sh.segments.allocated(); n > 2 { // the checkpoint's own
			t.Errorf("%d segments after everything was deleted", n)
		}
		checkCounts(t, st)
		must(t, st.Close(ctx))
	}
}

// Every wrong request is refused, says why, and changes nothing.
func TestSnapshotErrors(t *testing.T) {
	sh := newShelf(t, 1)
	ctx := t.Context()
	st := open(t, sh.options())
	for _, n := range []string{"v", "w"} {
		_, err := st.CreateVolume(ctx, n, 1<<30)
		must(t, err)
	}
	_, err := st.Snapshot(ctx, "s", "v")
	must(t, err)
	_, err = st.Clone(ctx, "v", "s", "c")
	must(t, err)
	snap := snapshotOf(t, st, "v", "s")
	var many []string
	for i := range 17 { // a record takes 16 here
		many = append(many, fmt.Sprint("x", i))
	}
	wrap := func(_ any, err error) error { return err }
	for i, x := range []struct{ err, want error }{
		{wrap(st.Snapshot(ctx, "s", "v")), ErrExists}, {wrap(st.Snapshot(ctx, "t", "v", "v")), ErrExists}, {wrap(st.Snapshot(ctx, "t", "v", "none")), ErrNotFound},
		{wrap(st.Snapshot(ctx, "a/b", "v")), ErrName}, {wrap(st.Snapshot(ctx, "t")), ErrLimit}, {wrap(st.Snapshot(ctx, "t", many...)), ErrLimit},
		{wrap(st.Clone(ctx, "v", "none", "d")), ErrNotFound}, {wrap(st.Clone(ctx, "none", "s", "d")), ErrNotFound}, {wrap(st.Clone(ctx, "v", "s", "w")), ErrExists},
		{wrap(st.Clone(ctx, "v", "s", "")), ErrName}, {st.Rollback(ctx, "w", "s"), ErrNotFound}, {st.DeleteSnapshot(ctx, "v", "none"), ErrNotFound},
		{st.DeleteVolume(ctx, "v"), ErrHasSnapshots}, {st.Promote(ctx, "w"), ErrNoClone}, {st.Promote(ctx, "none"), ErrNotFound},
		{snap.Write(ctx, 0, text(1, 1)), target.ErrReadOnly}, {snap.Zero(ctx, 0, 1), target.ErrReadOnly}, {wrap(st.Volume("v@s")), ErrNotFound},
		{wrap(st.Snapshots("none")), ErrNotFound},
	} {
		if !errors.Is(x.err, x.want) {
			t.Errorf("%d: %v, want %v", i, x.err, x.want)
		}
	}
	if n := snapshotNames(t, st, ""); !slices.Equal(n, []string{"v@s"}) {
		t.Errorf("snapshots %v", n)
	}
	must(t, st.Close(ctx))
}

// Snapshots of two volumes are of one instant: of a writer who writes number i to a and then to b, every pair has in b what
// a has, or one less.
func TestGroupIsOneInstant(t *testing.T) {
	sh := newShelf(t, 1)
	ctx := t.Context()
	st := open(t, sh.options())
	for _, n := range []string{"a", "b"} {
		_, err := st.CreateVolume(ctx, n, 1<<30)
		must(t, err)
	}
	var wg sync.WaitGroup
	var end atomic.Bool
	wg.Go(func() {
		p := make([]byte, BlockBytes)
		for i := uint64(1); !end.Load(); i++ {
			binary.LittleEndian.PutUint64(p, i)
			for _, n := range []string{"a", "b"} {
				if err := volume(t, st, n).Write(ctx, 7, p); err != nil {
					t.Error(err)
					return
				}
			}
		}
	})
	const groups = 30
	for i := range groups {
		list, err := st.Snapshot(ctx, fmt.Sprint("s", i), "a", "b")
		if err != nil || list[0].Group != list[1].Group || list[0].Group == [16]byte{} {
			t.Errorf("%+v %v", list, err)
			break
		}
	}
	end.Store(true)
	wg.Wait()
	st = reopen(t, st, sh, false)
	for i := range groups {
		var number [2]uint64
		for k, n := range []string{"a", "b"} {
			p := make([]byte, BlockBytes)
			must(t, snapshotOf(t, st, n, fmt.Sprint("s", i)).Read(ctx, 7, p))
			number[k] = binary.LittleEndian.Uint64(p)
		}
		if number[0] != number[1] && number[0] != number[1]+1 {
			t.Errorf("snapshot %d: a has %d, b %d", i, number[0], number[1])
		}
	}
	must(t, st.Close(ctx))
}

// A block that was overwritten before the packer came to it is not packed, but where a snapshot was taken in between it is.
func TestSnapshotOfWhatIsNotPacked(t *testing.T) {
	sh := newShelf(t, 1)
	ctx := t.Context()
	st := open(t, sh.options())
	_, err := st.CreateVolume(ctx, "v", 1<<30)
	must(t, err)
	v := volume(t, st, "v")
	must(t, st.Sync(ctx))
	st.mu.Lock() // the packer stands still while all three are staged
	before, between, after := text(1, 1), op{}, text(2, 1)
	st.stage(st.current, v, op{kind: opWrite, vol: v.id, lba: 9, count: 1, data: before})
	s, between := st.copyOf(v, "s", true, v.id)
	between.data = s.describe()
	st.stage(st.current, s, between)
	st.stage(st.current, v, op{kind: opWrite, vol: v.id, lba: 9, count: 1, data: after})
	b := st.current
	st.notify()
	st.mu.Unlock()
	must(t, (&Ticket{batches: []*batch{b}}).Wait(ctx))
	wantBlocks(t, s, 9, before)
	wantBlocks(t, v, 9, after)
	st = reopen(t, st, sh, false)
	wantBlocks(t, snapshotOf(t, st, "v", "s"), 9, before)
	wantBlocks(t, volume(t, st, "v"), 9, after)
	must(t, st.Close(ctx))
}

// What only a snapshot refers to is moved once for all who share it, and its old segment is freed.
func TestCleaningMovesSharedPagesOnce(t *testing.T) {
	sh := newShelf(t, 1)
	ctx := t.Context()
	o := sh.options()
	o.CapacityBytes = 64 * SegmentBytes
	st := open(t, o)
	_, err := st.CreateVolume(ctx, "v", 1<<30)
	must(t, err)
	v := volume(t, st, "v")
	kept := noise(1, 500) // in pages that all share; what is written between them is not kept
	for i := range 10 {
		must(t, v.Write(ctx, uint64(i)*pageEntries, kept[i*50*BlockBytes:(i+1)*50*BlockBytes]))
		must(t, v.Write(ctx, 1<<17, noise(uint64(100+i), 1000)))
	}
	for i := range 8 {
		_, err := st.Snapshot(ctx, fmt.Sprint("s", i), "v")
		must(t, err)
	}
	must(t, v.Zero(ctx, 1<<17, 1000))
	for i := range 7 {
		must(t, st.DeleteSnapshot(ctx, "v", fmt.Sprint("s", i)))
	}
	_, err = st.Clone(ctx, "v", "s7", "c")
	must(t, err)
	must(t, st.Checkpoint(ctx))
	place := func() loc {
		return placeOf(t, v, 0)
	}
	first := place()
	for i := uint64(0); place() == first && i < 400; i++ { // until the cleaner has been there
		err := v.Write(ctx, 1<<17, noise(1000+i, 500))
		if errors.Is(err, target.ErrNoSpace) {
			must(t, st.Checkpoint(ctx))
			continue
		}
		must(t, err)
	}
	must(t, st.Checkpoint(ctx))
	if place() == first {
		t.Errorf("it was not moved: %+v", st.Stats())
	}
	st.mu.RLock()
	if st.segs[first.segment()] != nil {
		t.Error("the segment that it was in is not freed")
	}
	st.mu.RUnlock()
	check := func() {
		t.Helper()
		for i := range 10 {
			for _, x := range []*Volume{volume(t, st, "v"), volume(t, st, "c"), snapshotOf(t, st, "v", "s7")} {
				wantBlocks(t, x, uint64(i)*pageEntries, kept[i*50*BlockBytes:(i+1)*50*BlockBytes])
			}
		}
		if p := volume(t, st, "v").m.page(0); p != volume(t, st, "c").m.page(0) || p != snapshotOf(t, st, "v", "s7").m.page(0) {
			t.Error("a page is not shared any more")
		}
		checkCounts(t, st)
	}
	check()
	must(t, st.Close(ctx))
	st = open(t, o)
	check()
	must(t, st.Close(ctx))
}

// Taking a volume apart goes on while requests are served, a bounded number of pages at a time.
func TestDeleteOfMany(t *testing.T) {
	sh := newShelf(t, 1)
	ctx := t.Context()
	st := open(t, sh.options())
	_, err := st.CreateVolume(ctx, "v", MaxVolume)
	must(t, err)
	v := volume(t, st, "v")
	const pages = 5*discardAtOnce + 3
	for i := range uint64(pages) {
		must(t, v.Write(ctx, i*pageEntries*700, text(i%10, 1))) // some in a node of their own
	}
	_, err = st.Snapshot(ctx, "s", "v")
	must(t, err)
	must(t, st.Sync(ctx))
	if s := st.Stats(); s.MapPages != pages || s.MapBytes != pages*(pageBytes+stubBytes) {
		t.Errorf("%d pages of maps in %d bytes, want %d", s.MapPages, s.MapBytes, pages)
	}
	must(t, st.DeleteSnapshot(ctx, "v", "s"))
	must(t, st.DeleteVolume(ctx, "v"))
	must(t, st.Checkpoint(ctx))
	st.mu.Lock()
	err = st.wait(ctx, func() bool { return len(st.dying) == 0 })
	st.mu.Unlock()
	must(t, err)
	must(t, st.Checkpoint(ctx))
	if s := st.Stats(); s.MapBytes != 0 || s.Segments > 2 {
		t.Errorf("%+v", s)
	}
	must(t, st.Close(ctx))
}

func TestDiff(t *testing.T) {
	for _, reopened := range []bool{false, true} { // true: no page is in memory
		t.Run(fmt.Sprintf("reopened %v", reopened), func(t *testing.T) { testDiff(t, reopened) })
	}
}

func testDiff(t *testing.T, reopened bool) {
	sh := newShelf(t, 1)
	ctx := t.Context()
	st := open(t, sh.options())
	_, err := st.CreateVolume(ctx, "v", 1<<40)
	must(t, err)
	v := volume(t, st, "v")
	must(t, v.Write(ctx, 100, text(1, 50)))
	must(t, v.Write(ctx, 3*nodeBlocks+7, text(2, 2)))
	snap := func(name string) {
		_, err := st.Snapshot(ctx, name, "v")
		must(t, err)
	}
	snap("one")
	must(t, v.Write(ctx, 149, text(3, 2)))
	must(t, v.Zero(ctx, 3*nodeBlocks+8, 1))
	snap("two")
	must(t, v.Write(ctx, 1<<27, text(4, 3)))
	must(t, v.Write(ctx, pageEntries-1, text(5, 2))) // across pages
	if reopened {
		st = reopen(t, st, sh, true)
	}
	for _, x := range []struct {
		from, to string
		want     [][2]uint64
	}{
		{"one", "two", [][2]uint64{{149, 2}, {3*nodeBlocks + 8, 1}}},
		{"two", "one", [][2]uint64{{149, 2}, {3*nodeBlocks + 8, 1}}},
		{"two", "", [][2]uint64{{pageEntries - 1, 2}, {1 << 27, 3}}},
		{"", "one", [][2]uint64{{100, 50}, {3*nodeBlocks + 7, 2}}},
		{"two", "two", nil},
	} {
		var got [][2]uint64
		err := st.Diff(ctx, "v", x.from, x.to, func(lba, n uint64) error {
			got = append(got, [2]uint64{lba, n})
			return nil
		})
		if err != nil || !slices.Equal(got, x.want) {
			t.Errorf("%q to %q: %v, want %v; %v", x.from, x.to, got, x.want, err)
		}
	}
	stop := errors.New("stop")
	if err := st.Diff(ctx, "v", "", "one", func(uint64, uint64) error { return stop }); err != stop {
		t.Error(err)
	}
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if err := st.Diff(cancelled, "v", "", "one", func(uint64, uint64) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	must(t, st.Close(ctx))
}

func TestPromote(t *testing.T) {
	sh := newShelf(t, 1)
	ctx := t.Context()
	st := open(t, sh.options())
	_, err := st.CreateVolume(ctx, "v", 1<<30)
	must(t, err)
	for i, s := range []string{"a", "b", "c"} {
		must(t, volume(t, st, "v").Write(ctx, uint64(i), text(uint64(i), 1)))
		_, err := st.Snapshot(ctx, s, "v")
		must(t, err)
	}
	_, err = st.Clone(ctx, "v", "b", "w")
	must(t, err)
	must(t, st.Promote(ctx, "w"))
	for range 2 {
		if n := snapshotNames(t, st, ""); !slices.Equal(n, []string{"w@a", "w@b", "v@c"}) {
			t.Errorf("snapshots %v", n)
		}
		if v, w := volume(t, st, "v").Info(), volume(t, st, "w").Info(); v.Origin != "w@b" || w.Origin != "" || v.Snapshots != 1 || w.Snapshots != 2 {
			t.Errorf("%+v %+v", v, w)
		}
		wantBlocks(t, snapshotOf(t, st, "w", "b"), 0, text(0, 1))
		st = reopen(t, st, sh, false)
	}
	must(t, st.DeleteSnapshot(ctx, "v", "c"))
	must(t, st.DeleteVolume(ctx, "v"))
	if err := st.Promote(ctx, "w"); !errors.Is(err, ErrNoClone) {
		t.Errorf("promote of what is no clone: %v", err)
	}
	must(t, st.Close(ctx))
}

// A snapshot takes as long, and as much memory, of a full volume as of an empty one.
func BenchmarkSnapshot(b *testing.B) {
	sh := newShelf(b, 1)
	o := sh.options()
	o.MapBytes = 16 << 30
	st := open(b, o)
	ctx := b.Context()
	if _, err := st.CreateVolume(ctx, "v", 1<<40); err != nil {
		b.Fatal(err)
	}
	v := volume(b, st, "v")
	p := text(1, 1)
	must(b, v.Write(ctx, 0, p))
	must(b, st.Sync(ctx))
	l := placeOf(b, v, 0)
	st.mu.Lock() // a map of 1 TiB, written densely: every block is the one
	for lba := uint64(0); lba < 1<<28; lba++ {
		v.m.set(&st.maps, lba, l)
	}
	st.mu.Unlock()
	i := 0
	for b.Loop() {
		if _, err := st.Snapshot(ctx, fmt.Sprint("s", i), "v"); err != nil {
			b.Fatal(err)
		}
		if _, err := st.Clone(ctx, "v", fmt.Sprint("s", i), fmt.Sprint("c", i)); err != nil {
			b.Fatal(err)
		}
		must(b, volume(b, st, fmt.Sprint("c", i)).Read(ctx, 1<<27, p))
		must(b, st.DeleteVolume(ctx, fmt.Sprint("c", i)))
		i++
	}
	st.stop()
}
