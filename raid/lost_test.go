package raid_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/raid/raidtest"
)

// harm is damage to one stripe and what of it must be lost.
type harm struct {
	b      *bed
	stripe uint64
	bad    []uint32 // by strip: columns that cannot be had
	lost   map[int]bool
}

// spot is where block c of a strip lies; -1: its checksum block.
func (b *bed) spot(stripe uint64, strip, c int) (*raidtest.Disk, int64) {
	m, slot := raid.LayoutOf(b.a).Strip(stripe, strip)
	return b.set.Disks[m], raid.DataOffset + int64(slot)*raid.SlotBytes + int64(1+c)*raid.BlockBytes
}

func (h *harm) block(strip, c int) {
	if h.b.rng.IntN(2) == 0 {
		d, off := h.b.spot(h.stripe, strip, c)
		d.Rot(off + 77)
	} else {
		d, off := h.b.spot(h.stripe, strip, c)
		d.Unreadable(off)
	}
	h.bad[strip] |= 1 << c
}

func (h *harm) whole(strip int) {
	d, off := h.b.spot(h.stripe, strip, -1)
	d.Rot(off + 100)
	h.bad[strip] = ^uint32(0)
}

// judge computes what is lost by the rule: a data block that is bad in a column with more than M bad blocks.
func (h *harm) judge() {
	h.lost = map[int]bool{}
	k := h.b.geo.K
	for c := range raid.StripBlocks {
		n := 0
		for _, bad := range h.bad {
			n += int(bad >> c & 1)
		}
		for i := range k {
			if n > h.b.geo.M && h.bad[i]>>c&1 != 0 {
				h.lost[i*raid.StripBlocks+c] = true
			}
		}
	}
}

func newHarm(b *bed, stripe uint64) *harm {
	return &harm{b: b, stripe: stripe, bad: make([]uint32, b.geo.K+b.geo.M)}
}

// random harms at least one column beyond parity.
func (h *harm) random(rng *rand.Rand) {
	w := len(h.bad)
	for len(h.lost) == 0 {
		for range rng.IntN(h.b.geo.M + 2) {
			h.whole(rng.IntN(w))
		}
		for range 1 + rng.IntN(3) {
			c := rng.IntN(raid.StripBlocks)
			for _, i := range rng.Perm(w)[:1+rng.IntN(w)] {
				if h.bad[i]>>c&1 == 0 {
					h.block(i, c)
				}
			}
		}
		h.judge()
	}
}

// give prepares the marking of a stripe with blocks written by it.
func (h *harm) give(spec raid.LossSpec, blocks ...int) (*raid.Update, []byte) {
	b := h.b
	b.t.Helper()
	after := bytes.Clone(b.want[h.stripe])
	var w []raid.BlockWrite
	for _, n := range blocks {
		d := b.random(1)
		copy(after[n*raid.BlockBytes:], d)
		w = append(w, raid.BlockWrite{Block: n, Data: d})
	}
	b.gen++
	u, err := b.a.PrepareLoss(ctx, h.stripe, b.gen, w, spec)
	if err != nil {
		b.t.Fatal(err)
	}
	got := map[int]bool{}
	for _, n := range u.Lost() {
		got[n] = true
	}
	for _, n := range blocks {
		delete(h.lost, n)
	}
	if fmt.Sprint(got) != fmt.Sprint(h.lost) {
		b.t.Fatalf("declared lost: %v, want %v", got, h.lost)
	}
	return u, after
}

// check reads every block of the stripe by itself, and all at once.
func (h *harm) check() {
	b := h.b
	b.t.Helper()
	first := -1
	for n := range b.blocks() {
		p, err := b.read(h.stripe, n, 1)
		if h.lost[n] {
			var be *raid.BlockError
			if !errors.Is(err, raid.ErrUnrecoverable) || !errors.As(err, &be) || be.Block != n || !be.Lost {
				b.t.Fatalf("lost block %d: %v", n, err)
			}
			if first < 0 {
				first = n
			}
			continue
		}
		if err != nil || !bytes.Equal(p, b.want[h.stripe][n*raid.BlockBytes:(n+1)*raid.BlockBytes]) {
			b.t.Fatalf("block %d: %v, or wrong data", n, err)
		}
	}
	_, err := b.read(h.stripe, 0, b.blocks())
	var be *raid.BlockError
	switch {
	case first < 0 && err != nil:
		b.t.Fatal(err)
	case first >= 0 && (!errors.As(err, &be) || be.Block != first):
		b.t.Fatalf("read of all, first lost %d: %v", first, err)
	}
}

// scrub expects the marks, and nothing to repair.
func (h *harm) scrub() {
	h.b.t.Helper()
	r, err := h.b.a.Scrub(ctx, h.stripe)
	if err != nil || r.Bad != 0 || r.Lost != len(h.lost) {
		h.b.t.Fatalf("scrub: %+v, %v, want %d lost", r, err, len(h.lost))
	}
}

// More than M strips bad: exactly what cannot be had is given up. It stays lost without any M members, through updates,
// repair and rebuild, and what is written reads right again.
func TestLoss(t *testing.T) {
	for seed := range uint64(60) {
		geo := []struct{ n, k, m int }{{5, 2, 2}, {9, 4, 2}, {9, 5, 3}, {4, 2, 1}}[seed%4]
		b := newBed(t, geo.n, raid.Options{K: geo.k, M: geo.m}, 12)
		rng := rand.New(rand.NewPCG(seed, 9))
		b.fillAll()
		b.update(1, 7, 40)
		h := newHarm(b, 1)
		h.random(rng)
		b.cold()
		var writes []int
		if seed%3 > 0 {
			writes = rng.Perm(b.blocks())[:1+rng.IntN(8)]
		}
		u, after := h.give(raid.LossSpec{}, writes...)
		log := flatten(u.Encode())
		if u.Blocks()*raid.BlockBytes != len(log) {
			t.Fatalf("%d blocks of %d bytes", u.Blocks(), len(log))
		}
		if seed%2 == 0 {
			must(t, b.a.Apply(ctx, u))
		} else {
			must(t, b.a.Apply(ctx, decode(t, log)))
		}
		b.want[1] = after
		h.check()
		h.scrub()
		b.cold()
		h.check()
		must(t, b.a.Flush(ctx))
		choose(geo.n, geo.m, func(missing []int) {
			if len(missing) == 0 || rng.IntN(4) > 0 {
				return
			}
			c := b.clone(missing...)
			g := &harm{b: c, stripe: 1, bad: h.bad, lost: h.lost}
			g.check()
			c.a.Close()
		})
		// A strip rots: its repair keeps the mark.
		d, off := b.spot(1, rng.IntN(len(h.bad)), -1)
		d.Rot(off + 70)
		b.cold()
		if r, err := b.a.Scrub(ctx, 1); err != nil || r.Repaired != 1 || r.Lost != len(h.lost) {
			t.Fatalf("scrub: %+v, %v", r, err)
		}
		h.check()
		for len(h.lost) > 0 { // written again, a few blocks at a time
			var some []int
			for n := range h.lost {
				if some = append(some, n); len(some) == 20 {
					break
				}
			}
			some = append(some, (some[0]+raid.StripBlocks)%b.blocks())
			if h.lost[some[len(some)-1]] {
				some = some[:len(some)-1]
			}
			b.update(1, some...)
			for _, n := range some {
				delete(h.lost, n)
			}
			h.check()
			if seed%5 == 0 {
				b.fill(1) // a whole stripe clears all
				clear(h.lost)
				h.check()
			}
		}
		b.cold()
		h.check()
		b.checkAll()
		b.scrubClean()
		b.a.Close()
	}
}

// A member with lost blocks fails, and is rebuilt to spare space: the mark goes along, also when the others that knew
// of it go next.
func TestLossRebuilt(t *testing.T) {
	for strip := range 5 {
		b := newBed(t, 9, raid.Options{K: 3, M: 2, Spares: 2}, 12)
		b.fillAll()
		h := newHarm(b, 0)
		for i := range 3 {
			h.block(i, 5)
		}
		h.whole(3)
		h.judge()
		b.cold()
		u, after := h.give(raid.LossSpec{})
		must(t, b.a.Apply(ctx, u))
		b.want[0] = after
		must(t, b.a.Flush(ctx))
		disk, _ := b.spot(0, strip, 0)
		index := 0
		for i, d := range b.set.Disks {
			if d == disk {
				index = i
			}
		}
		disk.Die()
		b.fill(1)
		for s := uint64(0); b.a.Label().Failed>>index&1 == 0; s++ {
			b.fill(2 + s%(b.geo.Stripes-2))
		}
		h.check()
		must(t, b.a.Rebuild(ctx, index, nil, nil))
		h.check()
		h.scrub()
		choose(5, 2, func(strips []int) {
			var missing []int
			for _, i := range strips {
				if i != strip {
					m, _ := raid.LayoutOf(b.a).Strip(0, i)
					missing = append(missing, m)
				}
			}
			c := b.clone(append(missing, index)...)
			g := &harm{b: c, stripe: 0, lost: h.lost}
			g.check()
			c.a.Close()
		})
		b.a.Close()
	}
}

// The power goes inside the marking, with each of its member writes landed, lost or torn, and members missing after it:
// the replayed log ends it, and again is the same.
func TestCrashInLoss(t *testing.T) {
	for kind := range 3 {
		b := newBed(t, 5, raid.Options{K: 2, M: 2}, 4)
		b.fill(0)
		b.update(0, 9)
		must(t, b.a.Flush(ctx))
		h := newHarm(b, 0)
		switch kind {
		case 0: // a column
			for _, i := range []int{0, 1, 3} {
				h.block(i, 5)
			}
		case 1: // strips
			for _, i := range []int{0, 2, 3} {
				h.whole(i)
			}
		case 2: // both
			h.whole(1)
			h.block(0, 30)
			h.block(2, 30)
		}
		h.judge()
		b.cold()
		u, after := h.give(raid.LossSpec{}, 5, 40)
		log := flatten(u.Encode())
		writes := discover(t, b, log)
		states := 1
		for range writes {
			states *= 3
		}
		tried := 0
		for state := 0; state < states; state += states/15 | 1 {
			choose(5, 2, func(missing []int) {
				if len(missing) == 1 && state%2 == 1 {
					return
				}
				tried++
				c := b.clone()
				applyWith(t, c, log, writes, state)
				c.a.Close()
				c.set.PowerCut()
				c.set.PowerOn()
				c.open(raid.Options{}, missing...)
				for range 2 {
					if err := c.a.Apply(ctx, decode(t, log)); err != nil {
						t.Fatalf("state %d without %v: %v", state, missing, err)
					}
				}
				c.want[0] = after
				g := &harm{b: c, stripe: 0, lost: h.lost}
				g.check()
				c.cold(missing...)
				g.check()
				g.scrub()
				c.a.Close()
			})
		}
		t.Logf("kind %d: %d member writes, %d crashes replayed", kind, len(writes), tried)
	}
}

// What may come back is not given up.
func TestNotLost(t *testing.T) {
	harmed := func(o raid.Options) *harm {
		b := newBed(t, 7, raid.Options{K: 3, M: 2}, 10)
		b.fillAll()
		b.a.Close()
		b.open(o)
		return newHarm(b, 1)
	}
	member := func(h *harm, strip int) int {
		m, _ := raid.LayoutOf(h.b.a).Strip(1, strip)
		return m
	}
	t.Run("dead", func(t *testing.T) { // an enclosure without power: every request is answered with an error
		h := harmed(raid.Options{})
		for i := range 3 {
			h.b.set.Disks[member(h, i)].Die()
		}
		_, err := h.b.a.PrepareLoss(ctx, 1, h.b.gen+1, nil, raid.LossSpec{Failed: true})
		wantErr(t, err, raid.ErrDegraded)
		wantErr(t, h.b.a.Err(), raid.ErrDegraded)
		h.b.a.Close()
		for i := range 3 {
			h.b.set.Disks[member(h, i)].Revive()
		}
		h.b.open(raid.Options{})
		h.b.checkAll()
		h.b.scrubClean()
	})
	t.Run("hung", func(t *testing.T) {
		h := harmed(raid.Options{ReadTimeout: soon, WriteTimeout: 4 * soon})
		var resume []func()
		for i := range 3 {
			resume = append(resume, h.b.set.Disks[member(h, i)].Stall())
		}
		_, err := h.b.a.PrepareLoss(ctx, 1, h.b.gen+1, nil, raid.LossSpec{Failed: true})
		wantErr(t, err, raid.ErrDegraded)
		for _, r := range resume {
			r()
		}
		h.b.a.Close()
		h.b.open(raid.Options{})
		h.b.checkAll()
	})
	t.Run("failed", func(t *testing.T) {
		h := harmed(raid.Options{})
		b := h.b
		index := member(h, 0)
		b.set.Disks[index].Die()
		for s := uint64(2); b.a.Label().Failed>>index&1 == 0; s++ {
			b.fill(2 + s%(b.geo.Stripes-2))
		}
		h.bad[0] = ^uint32(0)
		h.block(1, 3)
		h.block(4, 3)
		h.judge()
		_, err := b.a.PrepareLoss(ctx, 1, b.gen+1, nil, raid.LossSpec{})
		wantErr(t, err, raid.ErrNotLost)
		u, after := h.give(raid.LossSpec{Failed: true}, 70)
		must(t, b.a.Apply(ctx, u))
		b.want[1] = after
		h.check()
		b.cold(index)
		h.check()
	})
	t.Run("nothing lost", func(t *testing.T) { // all of it can be had after all: a repair, logged
		h := harmed(raid.Options{})
		h.whole(0)
		h.block(4, 3)
		h.judge()
		u, after := h.give(raid.LossSpec{}, 70)
		must(t, h.b.a.Apply(ctx, u))
		h.b.want[1] = after
		h.check()
		h.b.scrubClean()
	})
	t.Run("never written", func(t *testing.T) {
		b := newBed(t, 7, raid.Options{K: 3, M: 2}, 10)
		_, err := b.read(1, 0, 1)
		wantErr(t, err, raid.ErrUnwritten)
		wantErr(t, err, raid.ErrUnrecoverable)
		_, err = b.a.PrepareLoss(ctx, 1, 1, nil, raid.LossSpec{})
		wantErr(t, err, raid.ErrNotLost)
	})
	t.Run("too large", func(t *testing.T) {
		h := harmed(raid.Options{})
		for _, i := range []int{0, 1, 3} {
			h.whole(i)
		}
		_, err := h.b.a.PrepareUpdate(ctx, 1, h.b.gen+1, []raid.BlockWrite{{Block: 0, Data: h.b.random(1)}})
		wantErr(t, err, raid.ErrUnrecoverable)
		_, err = h.b.a.PrepareLoss(ctx, 1, h.b.gen+1, nil, raid.LossSpec{MaxBlocks: 10})
		wantErr(t, err, raid.ErrRange)
	})
}

// Reads and updates of other blocks go on while a stripe is marked. (For the race detector.)
func TestLossUnderReads(t *testing.T) {
	b := newBed(t, 7, raid.Options{K: 3, M: 2}, 10)
	b.fillAll()
	h := newHarm(b, 1)
	for i := range 3 {
		h.block(i, 4)
	}
	h.judge()
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			p := make([]byte, raid.BlockBytes)
			for n := range 200 {
				block := (n*7 + g) % b.blocks()
				if err := b.a.Read(ctx, 1, block, [][]byte{p}); err != nil && !h.lost[block] {
					t.Errorf("block %d: %v", block, err)
				}
			}
		})
	}
	b.gen++
	u, err := b.a.PrepareLoss(ctx, 1, b.gen, nil, raid.LossSpec{})
	must(t, err)
	must(t, b.a.Apply(ctx, u))
	wg.Wait()
	h.check()
}
