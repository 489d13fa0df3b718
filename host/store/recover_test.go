package store

import (
	"cmp"
	"context"
	"errors"
	"testing"
	"time"
)

// A segment of the log refers to blocks that the cleaner moved into one with a higher number while it was open. Both
// are durable when the power goes, and the second is found.
func TestLogRefersToLaterSegment(t *testing.T) {
	sh, ctx := newShelf(t, 1), t.Context()
	o := sh.options()
	o.CheckpointSegments = 1000
	st := open(t, o)
	if _, err := st.CreateVolume(ctx, "demo", 1<<30); err != nil {
		t.Fatal(err)
	}
	v := volume(t, st, "demo")
	old, fill := noise(1, 40), noise(2, 2*SegmentBytes/BlockBytes)
	must(t, v.Write(ctx, 0, old))
	must(t, st.Checkpoint(ctx))
	victim := st.v("demo").get(0).segment()
	must(t, v.Write(ctx, 1000, fill[:BlockBytes]))
	must(t, st.Sync(ctx))
	st.mu.Lock()
	st.recovering = true // the packer rests, with an open segment, and the test is the cleaner
	st.mu.Unlock()
	must(t, st.beginRound(ctx, []uint32{victim}))
	c := st.cleaning
	must(t, st.cleanSome(ctx, c, len(old)))
	must(t, st.sealAside(ctx))
	st.mu.Lock()
	err := st.wait(ctx, func() bool { return st.sealing == 0 })
	st.mu.Unlock()
	must(t, err)
	st.mu.Lock()
	st.cleaning, st.cleanAfter, st.recovering = nil, 1<<31, false // without a checkpoint that frees the victim
	st.mu.Unlock()

	must(t, v.Write(ctx, 2000, old)) // duplicates of what was moved
	must(t, st.Sync(ctx))
	open1, moved := st.v("demo").get(1000).segment(), st.v("demo").get(2000).segment()
	if open1 >= moved || moved == victim {
		t.Fatalf("the log's segment %d does not refer to a later one: %d, moved from %d", open1, moved, victim)
	}
	must(t, v.Write(ctx, 3000, fill))
	must(t, st.Sync(ctx))
	st.mu.Lock()
	err = st.wait(ctx, func() bool { return st.inMemory[open1] == nil })
	st.mu.Unlock()
	must(t, err)
	st.stop() // as kill -9 does

	st = open(t, o)
	v = volume(t, st, "demo")
	wantBlocks(t, v, 0, old)
	wantBlocks(t, v, 2000, old)
	wantBlocks(t, v, 3000, fill)
	checkCounts(t, st)
	must(t, st.Close(ctx))
}

// v is the map of a volume.
func (st *Store) v(name string) *blockMap {
	st.mu.RLock()
	defer st.mu.RUnlock()
	return &st.byName[name].m
}

// heldJournal lets no record through while held is open.
type heldJournal struct {
	Device
	held chan struct{}
}

func (h *heldJournal) WriteAt(ctx context.Context, p []byte, off int64) error {
	if off >= ringOffset && off < thirdSuper(h) {
		select {
		case <-h.held:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return h.Device.WriteAt(ctx, p, off)
}

// A checkpoint has the names that volumes had at its place in the log, not the one that a rename, which is not durable yet, gave.
func TestRenameIsInOrder(t *testing.T) {
	sh, ctx := newShelf(t, 1), t.Context()
	o := sh.options()
	st := open(t, o)
	for _, name := range []string{"a", "b"} {
		if _, err := st.CreateVolume(ctx, name, 1<<20); err != nil {
			t.Fatal(err)
		}
	}
	must(t, volume(t, st, "a").Write(ctx, 0, noise(1, 4)))
	if err := st.RenameVolume(ctx, "a", "b"); !errors.Is(err, ErrExists) {
		t.Fatalf("two volumes of one name: %v", err)
	}
	for name, want := range map[string]error{"none": ErrNotFound, "": ErrName} {
		if err := st.RenameVolume(ctx, "none", cmp.Or(name, "Bad Name")); !errors.Is(err, want) {
			t.Fatalf("%q: %v", name, err)
		}
	}
	must(t, st.RenameVolume(ctx, "b", "c"))
	must(t, st.Close(ctx))

	held := &heldJournal{Device: o.Journal, held: make(chan struct{})}
	o.Journal = held
	st = open(t, o)
	renamed := make(chan error, 1)
	go func() { renamed <- st.RenameVolume(ctx, "a", "d") }()
	for {
		if _, err := st.Volume("d"); err == nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
	must(t, st.Checkpoint(ctx))
	st.stop() // as kill -9 does
	if err := <-renamed; err == nil {
		t.Fatal("a rename that is nowhere was acknowledged")
	}
	st = open(t, sh.options())
	wantBlocks(t, volume(t, st, "a"), 0, noise(1, 4))
	volume(t, st, "c")
	if n := len(st.Volumes()); n != 2 {
		t.Errorf("%d volumes", n)
	}
	must(t, st.RenameVolume(ctx, "a", "b"))
	st.stop()
	st = open(t, sh.options()) // from the journal
	wantBlocks(t, volume(t, st, "b"), 0, noise(1, 4))
	must(t, st.Close(ctx))
}
