package store

import (
	"bytes"
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/target"
)

// A block of the store LUN that the shelf cannot read is an error for the volumes' blocks that lie in it, and for no others, however
// they are read.
func TestUnreadableBlock(t *testing.T) {
	sh, ctx := newShelf(t, 1), t.Context()
	o := sh.options()
	cache := &mapCache{lines: map[lineKey][]byte{}}
	o.Cache = cache
	st := open(t, o)
	_, err := st.CreateVolume(ctx, "a", 1<<30)
	must(t, err)
	const blocks = 600
	data := append(text(1, blocks/2), noise(2, blocks/2)...)
	must(t, volume(t, st, "a").Write(ctx, 0, data))
	must(t, st.Close(ctx))
	rng := rand.New(rand.NewPCG(1, 1))
	for range 20 {
		clear(cache.lines)
		st = open(t, o)
		v := volume(t, st, "a")
		places := make([]loc, blocks)
		for i := range places {
			places[i] = placeOf(t, v, uint64(i))
		}
		hit := places[rng.IntN(blocks)]
		bad := (int64(hit.segment())*SegmentBytes + int64(hit.off())) / BlockBytes * BlockBytes
		lies := func(i int) bool { // in it
			from := int64(places[i].segment())*SegmentBytes + int64(places[i].off())
			return from < bad+BlockBytes && from+int64(places[i].len()) > bad
		}
		sh.p.mu.Lock()
		sh.segments.bad = func(off int64) bool { return off == bad }
		sh.p.mu.Unlock()
		for i := 0; i < blocks; {
			n := min(1+rng.IntN(3)*rng.IntN(20), blocks-i)
			any := false
			for k := range n {
				any = any || lies(i+k)
			}
			got := make([]byte, n*BlockBytes)
			err := v.Read(ctx, uint64(i), got)
			if any != errors.Is(err, target.ErrMediumRead) {
				t.Fatalf("blocks %d+%d, in an unreadable one: %v: %v", i, n, any, err)
			}
			if err == nil && !bytes.Equal(got, data[i*BlockBytes:(i+n)*BlockBytes]) {
				t.Fatalf("blocks %d+%d: other data", i, n)
			}
			i += n
		}
		sh.p.mu.Lock()
		sh.segments.bad = nil
		sh.p.mu.Unlock()
		wantBlocks(t, v, 0, data) // it was repaired
		must(t, st.Close(ctx))
	}
}

// The cleaner meets blocks, and tables, that cannot be read: they stay where they are, all else moves, and nothing stops.
func TestCleanerMeetsUnreadable(t *testing.T) {
	sh, ctx := newShelf(t, 1), t.Context()
	o := sh.options()
	o.CapacityBytes, o.LineBytes, o.TableBytes = 28*SegmentBytes, LineBytes, 1<<20
	sh.journal.size = 64 << 20
	st := open(t, o)
	_, err := st.CreateVolume(ctx, "a", 1<<30)
	must(t, err)
	v := volume(t, st, "a")
	const blocks = 20000
	seeds := make([]uint64, blocks/100)
	for i := range seeds {
		seeds[i] = uint64(i)
		must(t, v.Write(ctx, uint64(i)*100, noise(seeds[i], 100)))
	}
	must(t, st.Checkpoint(ctx))
	bad := map[int64]bool{}
	rng := rand.New(rand.NewPCG(1, 1))
	st.mu.RLock()
	for n := range st.segs {
		switch n % 8 {
		case 1:
			for range 3 {
				bad[int64(n)*SegmentBytes+rng.Int64N(SegmentBytes/BlockBytes/2)*BlockBytes] = true
			}
		case 2:
			bad[int64(n+1)*SegmentBytes-2*BlockBytes] = true // of its table
		}
	}
	st.mu.RUnlock()
	sh.p.mu.Lock()
	sh.segments.bad = func(off int64) bool { return bad[off] }
	sh.p.mu.Unlock()
	for k := range 400 {
		i := rng.IntN(len(seeds)/5)*5 + 1 + rng.IntN(4) // a fifth of each segment stays
		seeds[i] = uint64(1000 + k)
		if err := v.Write(ctx, uint64(i)*100, noise(seeds[i], 100)); errors.Is(err, target.ErrNoSpace) {
			must(t, st.Sync(ctx))
			must(t, st.Checkpoint(ctx))
			must(t, v.Write(ctx, uint64(i)*100, noise(seeds[i], 100)))
		} else {
			must(t, err)
		}
	}
	must(t, st.Sync(ctx))
	s, stuck := st.Stats(), 0
	st.mu.RLock()
	for _, g := range st.segs {
		if g.stuck {
			stuck++
		}
	}
	st.mu.RUnlock()
	if s.BlocksMoved == 0 || s.SegmentsFreed == 0 || stuck == 0 {
		t.Errorf("%d blocks moved, %d segments freed, %d stay where they are", s.BlocksMoved, s.SegmentsFreed, stuck)
	}
	check := func() {
		t.Helper()
		unreadable, got := 0, make([]byte, BlockBytes)
		for i, seed := range seeds {
			want := noise(seed, 100)
			for k := range 100 {
				switch err := v.Read(ctx, uint64(i*100+k), got); {
				case errors.Is(err, target.ErrMediumRead):
					unreadable++
				case err != nil:
					t.Fatal(err)
				case !bytes.Equal(got, want[k*BlockBytes:(k+1)*BlockBytes]):
					t.Fatalf("block %d: other data", i*100+k)
				}
			}
		}
		if unreadable == 0 || unreadable > 2*len(bad) {
			t.Errorf("%d blocks cannot be read, with %d unreadable ones on the shelf", unreadable, len(bad))
		}
		t.Logf("%d moved, %d freed, %d stuck, %d unreadable", s.BlocksMoved, s.SegmentsFreed, stuck, unreadable)
	}
	check()
	checkCounts(t, st)
	must(t, st.Close(ctx))
	st = open(t, o)
	v = volume(t, st, "a")
	check()
	must(t, st.Close(ctx))
}

// A page of a map that cannot be read stops who must change it, and does so at every opening, until its blocks are given up: they are
// errors then until they are written or unmapped, also when the page could be read again, and nothing else is lost.
func TestGiveUp(t *testing.T) {
	sh, ctx := newShelf(t, 1), t.Context()
	o := sh.options()
	o.CheckpointSegments = 1000
	st := open(t, o)
	data := text(1, 2*pageEntries)
	for _, name := range []string{"a", "b", "c"} {
		_, err := st.CreateVolume(ctx, name, 3*pageEntries*BlockBytes)
		must(t, err)
	}
	other := noise(9, 2*pageEntries)
	for _, i := range rand.New(rand.NewPCG(1, 1)).Perm(2 * pageEntries) { // in no order, so that pages are long
		for _, x := range []struct {
			name  string
			first int
			data  []byte
		}{{"a", 100, data}, {"b", 0, data}, {"c", 0, other}} {
			if i >= x.first {
				must(t, volume(t, st, x.name).Write(ctx, uint64(i), x.data[i*BlockBytes:(i+1)*BlockBytes]))
			}
		}
	}
	_, err := st.Snapshot(ctx, "s", "a")
	must(t, err)
	must(t, volume(t, st, "a").Write(ctx, pageEntries, text(2, 1))) // they share the first page, and not the second
	must(t, st.Close(ctx))

	st = open(t, o)
	bad := map[int64]bool{}
	lose := func(name string, number uint64) {
		at := volume(t, st, name).m.page(number * pageEntries).rest
		bad[int64(at.segment())*SegmentBytes+int64(at.off()+at.len()/2)/BlockBytes*BlockBytes] = true
	}
	lose("a", 0)
	lose("c", 0)
	lose("c", 1)
	// Pages lie closely: those that share a block with the lost ones are lost, too.
	var want []GivenUp
	for _, x := range []struct{ name, snapshot string }{{"a", ""}, {"b", ""}, {"c", ""}, {"a", "s"}} {
		v := volume(t, st, x.name)
		if x.snapshot != "" {
			v, err = st.OpenSnapshot(x.name, x.snapshot)
			must(t, err)
		}
		for i := range uint64(2) {
			at := v.m.page(i * pageEntries).rest
			for n := at.off() / BlockBytes; n*BlockBytes < at.off()+at.len(); n++ {
				if bad[int64(at.segment())*SegmentBytes+int64(n)*BlockBytes] {
					g := GivenUp{x.name, x.snapshot, int64(i) * pageEntries * BlockBytes, pageEntries * BlockBytes, false}
					if l := len(want); l > 0 && want[l-1].Volume == x.name && want[l-1].Snapshot == x.snapshot && want[l-1].OffsetBytes+want[l-1].Bytes == g.OffsetBytes {
						want[l-1].Bytes += g.Bytes
					} else {
						want = append(want, g)
					}
					break
				}
			}
		}
	}
	isLost := func(name, snapshot string, lba uint64) bool {
		return slices.ContainsFunc(want, func(g GivenUp) bool {
			return g.Volume == name && g.Snapshot == snapshot && int64(lba)*BlockBytes >= g.OffsetBytes && int64(lba)*BlockBytes < g.OffsetBytes+g.Bytes
		})
	}
	if len(want) == 4 && isLost("b", "", 0) && isLost("b", "", pageEntries) {
		t.Fatal("nothing is left")
	}
	sh.p.mu.Lock()
	sh.segments.bad = func(off int64) bool { return bad[off] }
	sh.p.mu.Unlock()
	must(t, volume(t, st, "a").Write(ctx, 7, text(4, 1))) // it is in the journal
	if err := st.Sync(ctx); !errors.Is(err, ErrFailed) || !errors.Is(err, ErrMap) || !errors.Is(err, target.ErrMediumRead) {
		t.Errorf("a change of the page: %v", err)
	}
	st.stop()
	if _, err := Open(ctx, o); !errors.Is(err, ErrMap) {
		t.Fatalf("opened: %v", err)
	}

	o.AcceptLost = true
	st = open(t, o)
	if got := st.GivenUp(); !slices.Equal(got, want) {
		t.Errorf("given up: %v, want %v", got, want)
	}
	got := make([]byte, BlockBytes)
	again := map[uint64][]byte{7: text(4, 1)} // what was written to a since
	check := func(what string) {
		t.Helper()
		a, b := volume(t, st, "a"), volume(t, st, "b")
		s, err := st.OpenSnapshot("a", "s")
		must(t, err)
		for _, x := range []struct {
			v              *Volume
			name, snapshot string
		}{{a, "a", ""}, {b, "b", ""}, {s, "a", "s"}} {
			for lba := range uint64(2 * pageEntries) {
				err := x.v.Read(ctx, lba, got)
				expect := data[lba*BlockBytes : (lba+1)*BlockBytes]
				if x.name == "a" && lba < 100 {
					expect = make([]byte, BlockBytes)
				}
				if x.name == "a" && x.snapshot == "" && lba == pageEntries {
					expect = text(2, 1)
				}
				gone := isLost(x.name, x.snapshot, lba)
				if p := again[lba]; p != nil && x.name == "a" && x.snapshot == "" {
					expect, gone = p, false
				}
				switch {
				case gone != errors.Is(err, target.ErrMediumRead):
					t.Fatalf("%s: %s@%s block %d, given up: %v: %v", what, x.name, x.snapshot, lba, gone, err)
				case err == nil && !bytes.Equal(got, expect):
					t.Fatalf("%s: %s@%s block %d: other data", what, x.name, x.snapshot, lba)
				}
			}
		}
	}
	check("given up")
	checkCounts(t, st)
	if mapped, n := volume(t, st, "a").Mapped(0, 50); !mapped || n < 7 {
		t.Errorf("blocks that are given up are unmapped: %v for %d", mapped, n)
	}
	a := volume(t, st, "a")
	must(t, a.Write(ctx, 20, text(5, 3)))
	for i := range uint64(3) {
		again[20+i] = text(5, 3)[i*BlockBytes : (i+1)*BlockBytes]
	}
	must(t, a.Zero(ctx, 40, 30))
	for i := range uint64(30) {
		again[40+i] = make([]byte, BlockBytes)
	}
	check("written and unmapped")
	checkCounts(t, st)
	must(t, st.Close(ctx))

	// The drives come back, or their content is made again: given up is given up.
	sh.p.mu.Lock()
	sh.segments.bad = nil
	sh.p.mu.Unlock()
	o.AcceptLost = false
	st = open(t, o)
	if got := st.GivenUp(); len(got) != 0 {
		t.Errorf("given up again: %v", got)
	}
	check("another opening")
	_, err = st.Clone(ctx, "a", "s", "d")
	must(t, err)
	must(t, volume(t, st, "d").Write(ctx, 3, text(6, 1)))
	check("beside a clone")
	must(t, st.Sync(ctx))
	checkCounts(t, st)
	st.stop() // as kill -9 does
	st = open(t, o)
	check("after a crash")
	wantBlocks(t, volume(t, st, "d"), 3, text(6, 1))
	if err := volume(t, st, "d").Read(ctx, 4, got); !errors.Is(err, target.ErrMediumRead) {
		t.Errorf("a clone reads what was given up: %v", err)
	}
	must(t, st.DeleteVolume(ctx, "d"))
	must(t, st.DeleteVolume(ctx, "c"))
	must(t, st.Sync(ctx))
	checkCounts(t, st)
	must(t, st.Checkpoint(ctx))
	check("after a deletion")
	must(t, st.Close(ctx))
}

// A piece of the journal cannot be read. Behind the last record it is no matter. Where a record is, the store stays shut, since its drives may
// come back; by an order the journal ends there: what was written before is there, and nothing else, of any volume.
func TestLostJournal(t *testing.T) {
	sh, ctx := newShelf(t, 1), t.Context()
	o := sh.options()
	o.PackDelay = time.Hour
	st := open(t, o)
	for _, name := range []string{"a", "b"} {
		_, err := st.CreateVolume(ctx, name, 1<<30)
		must(t, err)
	}
	must(t, st.Sync(ctx))
	const writes = 20
	for i := range uint64(writes) {
		must(t, volume(t, st, []string{"a", "b"}[i%2]).Write(ctx, i, noise(i+1, 1)))
	}
	st.stop()           // as a host that is lost
	var records []int64 // where they begin, those of the writes last
	for off, b := range sh.journal.pages {
		if off >= ringOffset && string(b[:8]) == recordMagic {
			records = append(records, off)
		}
	}
	slices.Sort(records)
	records = records[len(records)-writes:]
	lose := func(at int64) {
		sh.p.mu.Lock()
		defer sh.p.mu.Unlock()
		sh.journal.bad = func(off int64) bool { return off == at }
	}
	check := func(what string, there uint64) {
		t.Helper()
		for i := range uint64(writes) {
			want := noise(i+1, 1)
			if i >= there {
				want = make([]byte, BlockBytes)
			}
			got := make([]byte, BlockBytes)
			must(t, volume(t, st, []string{"a", "b"}[i%2]).Read(ctx, i, got))
			if !bytes.Equal(got, want) {
				t.Fatalf("%s: block %d, of %d that should be there", what, i, there)
			}
		}
	}
	var err error
	const first = 7
	for what, at := range map[string]int64{"header": records[first], "payload": records[first] + BlockBytes} {
		lose(at)
		if _, err = Open(ctx, o); !errors.Is(err, ErrJournal) || !errors.Is(err, target.ErrMediumRead) {
			t.Fatalf("%s: %v", what, err)
		}
	}
	journal, segments := maps.Clone(sh.journal.pages), maps.Clone(sh.segments.pages)
	lose(records[writes-1] + 1<<20) // read along, and nothing there
	st = open(t, o)
	check("behind the end", writes)
	if len(st.GivenUp()) != 0 {
		t.Errorf("given up: %v", st.GivenUp())
	}
	st.stop()

	sh.journal.pages, sh.segments.pages, sh.segments.freed = journal, segments, map[int64]bool{}
	lose(records[first])
	o.AcceptLost = true
	st = open(t, o)
	check("given up", first)
	if g := st.GivenUp(); len(g) != 1 || g[0] != (GivenUp{Journal: true}) {
		t.Errorf("given up: %+v", g)
	}
	must(t, volume(t, st, "a").Write(ctx, 100, noise(100, 1)))
	st.stop()
	o.AcceptLost = false
	st = open(t, o)
	check("opened again", first)
	wantBlocks(t, volume(t, st, "a"), 100, noise(100, 1))
	must(t, st.Close(ctx))
}
