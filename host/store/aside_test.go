package store

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/target"
)

// asideStore has a volume of so many blocks of noise that lie in a checkpoint. What is overwritten of them goes beside the log.
func asideStore(t *testing.T, sh *shelf, blocks int) (Options, *Store, *Volume, []byte) {
	t.Helper()
	o := sh.options()
	o.coldTimes, o.CheckpointSegments = 1e-9, 1000
	st := open(t, o)
	st.cleanAfter = 1 << 31
	_, err := st.CreateVolume(t.Context(), "a", 1<<30)
	must(t, err)
	v, data := volume(t, st, "a"), noise(1, blocks)
	must(t, v.Write(t.Context(), 0, data))
	must(t, st.Checkpoint(t.Context()))
	return o, st, v, data
}

// A segment of the log that refers to one beside it counts from when that one is durable, and not before; until then the journal has
// what is in it.
func TestAside(t *testing.T) {
	const first, segment = 32, SegmentBytes / BlockBytes
	for _, full := range []bool{false, true} {
		sh, ctx := newShelf(t, 1), t.Context()
		sh.journal.size = 64 * SegmentBytes
		o, st, v, data := asideStore(t, sh, first+3*segment)
		before := st.sealedTo
		overwrite := func(from, blocks int, seed uint64) {
			p := noise(seed, blocks)
			copy(data[from*BlockBytes:], p)
			must(t, v.Write(ctx, uint64(from), p))
		}
		overwrite(0, first, 2)
		more := noise(4, 4*segment)
		must(t, v.Write(ctx, 1<<16, more[:len(more)/2])) // a segment of the log at least
		if full {                                        // what it refers to is sealed
			overwrite(first, 2*segment, 3)
		}
		must(t, v.Write(ctx, 1<<16+2*segment, more[len(more)/2:]))
		must(t, v.Write(ctx, 1<<17, data[:first*BlockBytes]))
		must(t, st.Sync(ctx))
		st.mu.Lock()
		must(t, st.wait(ctx, func() bool { return len(st.inMemory) == 2 && st.aside != nil })) // those that are open
		reached, aside, open0 := before.less(st.sealedTo), st.counters.aside, v.m.get(1).segment()
		durable := st.inMemory[open0] == nil
		st.mu.Unlock()
		if aside == 0 || durable != full || reached != full {
			t.Fatalf("full %v: %d blocks beside the log, durable: %v, released: %v", full, aside, durable, reached)
		}
		st.stop() // as kill -9 does
		st = open(t, o)
		c := st.counters
		if c.replayedRecords == 0 || full != (c.replayedSegments > 0) {
			t.Errorf("full %v: %d segments and %d records replayed", full, c.replayedSegments, c.replayedRecords)
		}
		v = volume(t, st, "a")
		if s := st.segs[open0]; full && (s == nil || len(s.shares) != 1 || int64(s.shares[0].slots) != s.live) {
			t.Errorf("the segment beside the log is %+v", s)
		}
		wantBlocks(t, v, 0, data)
		wantBlocks(t, v, 1<<16, more)
		wantBlocks(t, v, 1<<17, data[:first*BlockBytes])
		checkCounts(t, st)
		must(t, st.Close(ctx))
	}
}

// A few blocks beside the log do not keep the journal: it is not full, and nobody waits for ever.
func TestAsideIsSealedInTime(t *testing.T) {
	sh := newShelf(t, 1)
	sh.journal.size = 8 * SegmentBytes
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	o, st, v, data := asideStore(t, sh, 64)
	p := noise(2, 2)
	copy(data, p)
	must(t, v.Write(ctx, 0, p))
	more := noise(3, SegmentBytes/BlockBytes)
	for i := range 20 { // two and a half rings
		if err := v.Write(ctx, 1<<16+uint64(i)<<12, more); err != nil {
			t.Fatalf("segment %d: %v", i, err)
		}
		le.PutUint64(more, uint64(i)) // nor are they all duplicates of each other
		for b := 0; b < len(more); b += BlockBytes {
			le.PutUint64(more[b:], uint64(i)<<32|uint64(b))
		}
	}
	wantBlocks(t, v, 0, data)
	st.stop()
	st = open(t, o)
	wantBlocks(t, volume(t, st, "a"), 0, data)
	must(t, st.Close(t.Context()))
}

// A damaged segment of the log ends it, as one does that was never finished. Where the journal no more has what was in it, the store says so, and does not open
// without it; when it is given up, everything is as it was before.
func TestLostSegment(t *testing.T) {
	for _, how := range []string{"damaged", "unreadable"} {
		for _, aside := range []bool{false, true} {
			sh, ctx := newShelf(t, 1), t.Context()
			sh.journal.size = 64 * SegmentBytes
			o, st, v, data := asideStore(t, sh, 3*SegmentBytes/BlockBytes)
			at := uint64(1 << 16)
			if aside {
				at = 0
			}
			must(t, v.Write(ctx, at, noise(2, 2*SegmentBytes/BlockBytes)))
			must(t, v.Write(ctx, 1<<17, noise(3, 2*SegmentBytes/BlockBytes)))
			must(t, v.Write(ctx, at+2*SegmentBytes/BlockBytes, noise(4, SegmentBytes/BlockBytes))) // the first segment of the log has all that it needs
			must(t, v.Write(ctx, 1<<17+1<<16, noise(5, 3*SegmentBytes/BlockBytes)))
			must(t, st.Sync(ctx))
			st.mu.Lock()
			must(t, st.wait(ctx, func() bool { return len(st.inMemory) <= 2 }))
			n := v.m.get(at + 1).segment()
			st.mu.Unlock()
			must(t, st.releaseJournal(ctx))
			st.stop()
			trail := int64(n)*SegmentBytes + trailerOffset
			sh.p.mu.Lock()
			if how == "unreadable" {
				sh.segments.bad = func(off int64) bool { return off == trail }
			} else {
				sh.segments.pages[trail] = noise(9, 1)
			}
			sh.p.mu.Unlock()
			want := ErrCorrupt
			if how == "unreadable" {
				want = target.ErrMediumRead
			}
			if _, err := Open(ctx, o); !errors.Is(err, ErrJournal) || !errors.Is(err, want) {
				t.Fatalf("%s segment %d, beside the log: %v: open: %v", how, n, aside, err)
			}
			lost := o
			lost.AcceptLost = true
			st = open(t, lost)
			if g := st.GivenUp(); len(g) != 1 || !g[0].Journal {
				t.Errorf("given up: %+v", g)
			}
			v = volume(t, st, "a")
			wantBlocks(t, v, 0, data)
			wantBlocks(t, v, 1<<17, make([]byte, BlockBytes))
			checkCounts(t, st)
			must(t, v.Write(ctx, 5, noise(5, 1)))
			must(t, st.Close(ctx))
			sh.p.mu.Lock()
			sh.segments.bad = nil
			sh.p.mu.Unlock()
			st = open(t, o)
			wantBlocks(t, volume(t, st, "a"), 5, noise(5, 1))
			must(t, st.Close(ctx))
		}
	}
}

// What needs no segment does not release the journal for segments of the log that still wait for one beside it.
func TestAsideAbsorbed(t *testing.T) {
	sh, ctx := newShelf(t, 1), t.Context()
	sh.journal.size = 64 * SegmentBytes
	o, st, v, data := asideStore(t, sh, 64)
	before := st.sealedTo
	p := noise(2, 8)
	copy(data, p)
	must(t, v.Write(ctx, 0, p))
	must(t, st.Sync(ctx))
	st.mu.Lock()
	st.recovering = true // the packer rests, and the test seals the open segment, as it does when the journal is half full
	st.mu.Unlock()
	must(t, st.sealOpen(ctx))
	st.mu.Lock()
	must(t, st.wait(ctx, func() bool { return st.sealing == 0 }))
	st.recovering, st.opt.PackDelay = false, time.Hour
	st.mu.Unlock()
	for i := range uint64(2) { // the second makes the first needless
		must(t, v.Write(ctx, 100, noise(3+i, 1)))
	}
	must(t, st.Sync(ctx))
	st.mu.Lock()
	absorbed, released := st.counters.absorbed, before.less(st.sealedTo)
	st.mu.Unlock()
	if absorbed == 0 || released {
		t.Errorf("%d blocks absorbed; released: %v", absorbed, released)
	}
	must(t, st.releaseJournal(ctx))
	st.stop()
	st = open(t, o)
	wantBlocks(t, volume(t, st, "a"), 0, data)
	must(t, st.Close(ctx))
}

// Records that are overwritten are in no segment, and the journal does not have them either: nothing is lost by that, and nothing is told to be.
func TestOverwrittenIsNotLost(t *testing.T) {
	sh, ctx := newShelf(t, 1), t.Context()
	o, st, v, data := asideStore(t, sh, 64)
	st.mu.Lock()
	st.opt.PackDelay = time.Hour
	st.mu.Unlock()
	for i := range uint64(6) {
		must(t, v.Write(ctx, 100, noise(3+i, 1)))
	}
	must(t, st.Sync(ctx))
	before := st.super.jSeq
	must(t, st.releaseJournal(ctx))
	if released := st.super.jSeq - before; released < 4 {
		t.Fatalf("%d records are not in the journal", released)
	}
	st.stop()
	st = open(t, o)
	v = volume(t, st, "a")
	wantBlocks(t, v, 0, data)
	wantBlocks(t, v, 100, noise(8, 1))
	must(t, st.Close(ctx))
}
