package store

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/ledge-storage/ledge/target"
)

// mapCache is a flash cache in memory whose lines can be damaged.
type mapCache struct {
	mu    sync.Mutex
	lines map[lineKey][]byte
}

func (c *mapCache) Read(_ [16]byte, segment uint32, line int, p []byte) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	l := c.lines[lineKey{segment, line}]
	copy(p, l)
	return l != nil
}

func (c *mapCache) Write(_ [16]byte, segment uint32, line int, p []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lines[lineKey{segment, line}] = bytes.Clone(p)
}

// A bit flipped in a segment is an error for its block and for no other; the same in a line from a
// cache, even one that verifies nothing, is read past.
func TestDamage(t *testing.T) {
	sh, ctx := newShelf(t, 1), t.Context()
	o := sh.options()
	cache := &mapCache{lines: map[lineKey][]byte{}}
	o.Cache = cache
	st := open(t, o)
	_, err := st.CreateVolume(ctx, "a", 1<<30)
	must(t, err)
	data := append(text(1, 300), noise(2, 300)...)
	v := volume(t, st, "a")
	must(t, v.Write(ctx, 0, data))
	must(t, st.Close(ctx))
	rng := rand.New(rand.NewPCG(1, 1))

	st = open(t, o)
	v = volume(t, st, "a")
	for k := range cache.lines {
		for i := 0; i < LineBytes; i += 1500 {
			cache.lines[k][i+rng.IntN(1000)] ^= 4
		}
	}
	wantBlocks(t, v, 0, data)
	if s := st.Stats(); s.BadLines == 0 || s.CacheHits == 0 || s.BadBlocks != 0 {
		t.Errorf("damaged cache: %+v", s)
	}
	o.Cache = nil
	must(t, st.Close(ctx))

	for range 30 {
		st = open(t, o)
		v = volume(t, st, "a")
		lba := uint64(rng.IntN(600))
		l := placeOf(t, v, lba)
		at := int64(l.segment())*SegmentBytes + int64(l.off()+rng.IntN(l.len()))
		flip := func() { sh.segments.pages[at/BlockBytes*BlockBytes][at%BlockBytes] ^= 16 }
		flip()
		got := make([]byte, BlockBytes)
		for i := range uint64(600) {
			err := v.Read(ctx, i, got)
			if damaged := placeOf(t, v, i) == l; damaged != errors.Is(err, target.ErrMediumRead) || damaged != errors.Is(err, ErrCorrupt) {
				t.Errorf("block %d, damaged %v: %v", i, damaged, err)
			} else if !damaged && !bytes.Equal(got, data[i*BlockBytes:(i+1)*BlockBytes]) {
				t.Errorf("block %d: wrong data", i)
			}
		}
		st.stop()
		flip()
	}

	// Damage to what opening needs is told, not lived with.
	st = open(t, o)
	must(t, st.Close(ctx))
	first := int64(st.ckptFirst) * SegmentBytes
	trail := make([]byte, BlockBytes)
	must(t, sh.segments.ReadAt(ctx, trail, first+trailerOffset))
	tr, err := decodeTrailer(trail)
	must(t, err)
	flip := func(at int64) { // in a copy: what is saved shares the others
		p := bytes.Clone(sh.segments.pages[at/BlockBytes*BlockBytes])
		p[at%BlockBytes] ^= 1
		sh.segments.pages[at/BlockBytes*BlockBytes] = p
	}
	if st.ckptItems != 1 || st.ckptCopies != 1 {
		t.Fatalf("%d segments of the checkpoint, %d of its copy", st.ckptItems, st.ckptCopies)
	}
	saved := sh.save()
	for _, first := range []int64{first, first + SegmentBytes} { // either copy will do
		items := first
		if items == int64(st.ckptFirst)*SegmentBytes {
			items += int64(tr.items)
		}
		for i := range 3 {
			sh.restore(saved)
			switch i {
			case 0:
				flip(items + 5)
			case 1:
				flip(first + trailerOffset + 50)
			case 2:
				sh.segments.bad = func(off int64) bool { return off == items/BlockBytes*BlockBytes }
			}
			again := open(t, o)
			want := int64(0)
			if first == int64(st.ckptFirst)*SegmentBytes {
				want = 1
			}
			if again.counters.copiesRead != want {
				t.Errorf("damage %d to the checkpoint in segment %d: %d copies read", i, first/SegmentBytes, again.counters.copiesRead)
			}
			if i < 2 { // what cannot be read may be data, too
				wantBlocks(t, volume(t, again, "a"), 0, data)
			}
			checkpoints := again.counters.checkpoints
			again.stop()
			sh.segments.bad = nil
			if again = open(t, o); checkpoints != want || again.counters.copiesRead != 0 && want == 1 {
				t.Errorf("damage %d to the checkpoint in segment %d is left as it was", i, first/SegmentBytes)
			}
			wantBlocks(t, volume(t, again, "a"), 0, data)
			again.stop()
		}
	}
	sh.restore(saved)
	flip(first + int64(tr.items) + 5)
	flip(first + SegmentBytes + 5)
	if _, err := Open(ctx, o); !errors.Is(err, ErrCorrupt) {
		t.Errorf("damaged checkpoint: %v", err)
	}
	sh.restore(saved)

	// Damage to a page is an error for its blocks and for no others, and nothing is lost where it heals.
	st = open(t, o)
	v = volume(t, st, "a")
	at := v.m.page(0).rest
	flip(int64(at.segment())*SegmentBytes + int64(at.off()+at.len()/2))
	got := make([]byte, BlockBytes)
	for i := range uint64(600) {
		if err := v.Read(ctx, i, got); (i < pageEntries) != errors.Is(err, target.ErrMediumRead) || (i < pageEntries) != errors.Is(err, ErrCorrupt) {
			t.Errorf("damaged page: block %d: %v", i, err)
		}
	}
	flip(int64(at.segment())*SegmentBytes + int64(at.off()+at.len()/2))
	wantBlocks(t, v, 0, data)
	must(t, st.Close(ctx))
	for i := range int64(2) { // either superblock will do
		sh.journal.pages[i*BlockBytes][100] ^= 1
		st = open(t, o)
		wantBlocks(t, volume(t, st, "a"), 0, data)
		must(t, st.Close(ctx))
		sh.journal.bad = func(off int64) bool { return off == i*BlockBytes }
		st = open(t, o)
		wantBlocks(t, volume(t, st, "a"), 0, data)
		must(t, st.Close(ctx))
		sh.journal.bad = nil
	}
}

// Where the shelf has lost the stripe with both superblocks, the third counts; where there is something else instead of them it does not.
func TestThirdSuperblock(t *testing.T) {
	sh, ctx := newShelf(t, 1), t.Context()
	o := sh.options()
	st := open(t, o)
	_, err := st.CreateVolume(ctx, "a", 1<<30)
	must(t, err)
	must(t, volume(t, st, "a").Write(ctx, 0, text(1, 100)))
	sh.journal.bad = func(off int64) bool { return off < ringOffset }
	must(t, volume(t, st, "a").Write(ctx, 100, text(2, 100)))
	must(t, st.Checkpoint(ctx)) // it looks whether the store is its own still
	st.stop()
	st = open(t, o)
	wantBlocks(t, volume(t, st, "a"), 0, append(text(1, 100), text(2, 100)...))
	must(t, volume(t, st, "a").Write(ctx, 200, text(3, 100)))
	must(t, st.Close(ctx))
	other := open(t, o) // of another host
	if err := volume(t, other, "a").Write(ctx, 300, text(4, 1)); err != nil {
		t.Fatal(err)
	}
	must(t, other.Close(ctx))
	sh.journal.bad = nil
	saved := sh.save()
	for i := range int64(2) {
		sh.journal.pages[i*BlockBytes] = noise(1, 1)
	}
	if _, err := Open(ctx, o); !errors.Is(err, ErrForeign) {
		t.Errorf("something else where the superblocks were: %v", err)
	}
	sh.restore(saved)
	sh.journal.bad = func(off int64) bool { return off < ringOffset }
	sh.journal.pages[thirdSuper(sh.journal)] = noise(1, 1)
	if _, err := Open(ctx, o); !errors.Is(err, ErrForeign) || !errors.Is(err, target.ErrMediumRead) {
		t.Errorf("no superblock at all: %v", err)
	}
	sh.restore(saved)
	st = open(t, o)
	wantBlocks(t, volume(t, st, "a"), 200, append(text(3, 100), text(4, 1)...))
	must(t, st.Close(ctx))
}

// A page that cannot be read, for good, stops who must change it, keeps its volume from nothing else, and no other volume
// from anything, also when the volume is deleted.
func TestDamagedPage(t *testing.T) {
	sh, ctx := newShelf(t, 1), t.Context()
	o := sh.options()
	st := open(t, o)
	for _, name := range []string{"a", "b"} {
		_, err := st.CreateVolume(ctx, name, 1<<30)
		must(t, err)
		must(t, volume(t, st, name).Write(ctx, 0, text(1, 2*pageEntries)))
	}
	must(t, st.Close(ctx))
	st = open(t, o)
	at := volume(t, st, "a").m.page(0).rest
	sh.segments.pages[(int64(at.segment())*SegmentBytes+int64(at.off()))/BlockBytes*BlockBytes][at.off()%BlockBytes] ^= 1 // its checksum
	must(t, volume(t, st, "a").Write(ctx, pageEntries, text(2, 1)))
	must(t, volume(t, st, "b").Write(ctx, 0, text(3, 1)))
	must(t, st.Checkpoint(ctx))
	wantBlocks(t, volume(t, st, "a"), pageEntries, text(2, 1))
	wantBlocks(t, volume(t, st, "b"), 0, text(3, 1))
	must(t, st.Close(ctx))

	st = open(t, o)
	must(t, volume(t, st, "a").Write(ctx, 0, text(4, 1))) // it is in the journal
	if err := st.Sync(ctx); !errors.Is(err, ErrFailed) || !errors.Is(err, target.ErrMediumRead) {
		t.Errorf("a change of the page: %v", err)
	}
	st.stop()

	sh.segments.pages[(int64(at.segment())*SegmentBytes+int64(at.off()))/BlockBytes*BlockBytes][at.off()%BlockBytes] ^= 1
	st = open(t, o)
	wantBlocks(t, volume(t, st, "a"), 0, text(4, 1))
	must(t, st.Close(ctx))
	st = open(t, o)
	at = volume(t, st, "a").m.page(0).rest
	sh.segments.pages[(int64(at.segment())*SegmentBytes+int64(at.off()))/BlockBytes*BlockBytes][at.off()%BlockBytes] ^= 1
	must(t, st.DeleteVolume(ctx, "a"))
	must(t, st.Sync(ctx))
	must(t, st.Checkpoint(ctx))
	must(t, st.Close(ctx))
	st = open(t, o)
	wantBlocks(t, volume(t, st, "b"), 1, text(1, 2)[BlockBytes:])
	must(t, st.Close(ctx))
}

// A failed journal write is never acknowledged, and stops the store.
func TestJournalFailure(t *testing.T) {
	sh, ctx := newShelf(t, 1), t.Context()
	st := open(t, sh.options())
	_, err := st.CreateVolume(ctx, "a", 1<<30)
	must(t, err)
	v := volume(t, st, "a")
	must(t, v.Write(ctx, 0, text(1, 1)))
	sh.p.mu.Lock()
	sh.journal.refuse = func(int64) error { return target.ErrMediumWrite }
	sh.p.mu.Unlock()
	if err := v.Write(ctx, 1, text(2, 1)); !errors.Is(err, ErrFailed) || !errors.Is(err, target.ErrMediumWrite) {
		t.Errorf("write: %v", err)
	}
	if err := v.Read(ctx, 0, make([]byte, BlockBytes)); !errors.Is(err, ErrFailed) {
		t.Errorf("read after failure: %v", err)
	}
	if err := st.Close(ctx); !errors.Is(err, ErrFailed) {
		t.Errorf("close: %v", err)
	}
	sh.journal.refuse = nil
	st = open(t, sh.options())
	wantBlocks(t, volume(t, st, "a"), 0, text(1, 1))
	must(t, st.Close(ctx))
}
