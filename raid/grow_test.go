package raid_test

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/raid/layout"
	"github.com/ledge-storage/ledge/raid/raidtest"
)

// spares returns n more blank drives of the bed's enclosure.
func (b *bed) addDisks(n, slots int) []raid.Drive {
	first := len(b.set.Disks)
	b.set.Add(uint64(first)*7+1, n, driveBytes(slots))
	return b.set.Drives("A")[first:]
}

// Geometries grow by one and by several, full, sparse and partly written again; everything reads back as it was, cold
// and with m members lost; the array has the stripes of one that was made with all drives; new stripes are unwritten.
func TestGrow(t *testing.T) {
	for _, g := range []struct{ n, k, m, spares, slots, more int }{
		{6, 4, 2, 0, 60, 1}, {6, 4, 2, 0, 60, 3}, {5, 2, 2, 1, 70, 1}, {5, 2, 2, 1, 70, 2}, {3, 1, 1, 0, 40, 1}, {9, 3, 2, 2, 45, 1},
		{12, 8, 2, 2, 60, 4},
	} {
		t.Run(fmt.Sprintf("%d+%d of %d and %d more", g.k, g.m, g.n, g.more), func(t *testing.T) {
			b := newBed(t, g.n, raid.Options{K: g.k, M: g.m, Spares: g.spares}, g.slots)
			for s := range b.geo.Stripes {
				if s%5 != 3 {
					b.fill(s)
				}
			}
			before := b.geo.Stripes
			var steps int
			must(t, b.a.Grow(ctx, b.addDisks(g.more, g.slots), raid.GrowOptions{Progress: func(done, total uint64) { steps++ }}))
			b.geo = b.a.Geometry()
			fresh := newBed(t, g.n+g.more, raid.Options{K: g.k, M: g.m, Spares: g.spares}, g.slots)
			if b.geo != fresh.geo || b.geo.Stripes <= before {
				t.Fatalf("%+v after %d stripes, a new one has %+v", b.geo, before, fresh.geo)
			}
			if s := b.a.GrowStatus(); s.Growing || s.Running || s.Carried != 0 || s.To != g.n+g.more {
				t.Fatalf("%+v", s)
			}
			b.checkAll()
			b.scrubClean()
			for s := range b.geo.Stripes {
				if b.want[s] != nil {
					continue
				}
				if r, err := b.a.Scrub(ctx, s); err != nil || !r.Unwritten {
					t.Fatalf("stripe %d: %+v %v", s, r, err)
				}
				b.fill(s)
			}
			for s := range b.geo.Stripes {
				b.update(s, 1, b.blocks()-1)
			}
			must(t, b.a.Flush(ctx))
			b.cold()
			b.checkAll()
			b.scrubClean()
			lost := b.rng.Perm(b.geo.N)[:g.m]
			c := b.clone(lost...)
			c.checkAll()
			t.Logf("%d stripes moved in %d steps, %d now", before, steps, b.geo.Stripes)
		})
	}
}

// What cannot be done is refused before anything is written.
func TestGrowRefuses(t *testing.T) {
	b := newBed(t, 9, raid.Options{K: 3, M: 2, Spares: 2}, 30)
	b.fillAll()
	b.rng.Uint64()
	added := b.addDisks(3, 30)
	used, small := added[1].(*raidtest.Port).Disk(), raidtest.NewSet(9, 1, driveBytes(20)).Drives("A")[0]
	_, err := used.Port("A").WriteAt(make([]byte, raid.BlockBytes), 0)
	must(t, err)
	refused := func(target error, o raid.GrowOptions, drives ...raid.Drive) {
		t.Helper()
		writes := func() (n uint64) {
			for _, d := range b.set.Disks {
				n += d.Stats().Writes
			}
			return n
		}
		label, before := b.a.Label(), writes()
		wantErr(t, b.a.Grow(ctx, drives, o), target)
		if s := b.a.GrowStatus(); s.Growing || s.Running || b.a.Label().Seq != label.Seq || writes() != before || b.a.Geometry() != b.geo {
			t.Fatalf("%+v after a refusal, %d writes", s, writes()-before)
		}
	}
	refused(raid.ErrNotGrowing, raid.GrowOptions{})
	refused(raid.ErrSize, raid.GrowOptions{}, small)
	refused(raid.ErrRange, raid.GrowOptions{}, added[0], nil)
	used.Rot(0)
	refused(raid.ErrNotBlank, raid.GrowOptions{}, added[0], added[1])
	refused(raid.ErrDuplicate, raid.GrowOptions{Force: true}, b.set.Drives("B")[4])
	refused(layout.ErrGeometry, raid.GrowOptions{}, make([]raid.Drive, 56)...)
	stop, cancel := context.WithCancel(ctx)
	cancel()
	wantErr(t, b.a.Grow(stop, added, raid.GrowOptions{}), context.Canceled)
	ro, err := raid.Open(ctx, b.set.Drives("B"), raid.Options{ReadOnly: true})
	must(t, err)
	wantErr(t, ro.Grow(ctx, added[:1], raid.GrowOptions{}), raid.ErrReadOnly)
	ro.Close()
	// One drive by two paths is found out, after a label was written to it, and may be used then.
	wantErr(t, b.a.Grow(ctx, []raid.Drive{added[0], added[0].(*raidtest.Port).Disk().Port("A2")}, raid.GrowOptions{}), raid.ErrDuplicate)

	// A member that failed, one that is being rebuilt, one that is spared: not while.
	b.set.Disks[4].Die()
	b.fillAll()
	refused(raid.ErrDegraded, raid.GrowOptions{}, added[0])
	var during error
	cut, cancel := context.WithCancel(ctx)
	wantErr(t, b.a.Rebuild(cut, 4, func(context.Context) error {
		during = b.a.Grow(ctx, added[:1], raid.GrowOptions{})
		cancel()
		return nil
	}, nil), context.Canceled)
	wantErr(t, during, raid.ErrBusy)
	refused(raid.ErrBusy, raid.GrowOptions{}, added[0])
	must(t, b.a.Rebuild(ctx, 4, nil, nil))
	refused(raid.ErrDegraded, raid.GrowOptions{}, added[0])
	b.checkAll()
	b.a.Close()
	wantErr(t, b.a.Grow(ctx, added[:1], raid.GrowOptions{}), raid.ErrClosed)

	// What is left of the refused growth does not hinder the array, and is taken without force.
	b = newBed(t, 5, raid.Options{K: 2, M: 2}, 12)
	b.fillAll()
	added = b.addDisks(1, 12)
	must(t, b.a.BeginGrow(ctx, added, raid.GrowOptions{}))
	wantErr(t, b.a.BeginGrow(ctx, b.addDisks(1, 12), raid.GrowOptions{}), raid.ErrBusy)
	if s := b.a.GrowStatus(); !s.Growing || s.Running || s.From != 5 || s.To != 6 || s.Done != 0 || s.Total != 15 || s.StripesAfter != 18 {
		t.Fatalf("%+v", s)
	}
	b.cold()
	must(t, b.a.Grow(ctx, nil, raid.GrowOptions{}))
	b.checkAll()
}

// Members fail while the array grows, old and new ones. The growth stops when nothing is staged; a rebuild goes between,
// or there is no spare space and it goes on without; the array bears m failures all the time, and at the end.
func TestGrowFailures(t *testing.T) {
	for _, c := range []struct {
		name           string
		spares, die    int
		rebuild, twice bool
	}{{"old member, rebuilt", 2, 3, true, false}, {"new member, rebuilt", 1, 9, true, false},
		{"old member", 0, 0, false, false}, {"new member", 0, 9, false, false}, {"two", 1, 4, false, true}} {
		t.Run(c.name, func(t *testing.T) {
			b := newBed(t, 9, raid.Options{K: 3, M: 2, Spares: c.spares}, 40)
			b.fillAll()
			must(t, b.a.BeginGrow(ctx, b.addDisks(1, 40), raid.GrowOptions{}))
			at := 1 + b.rng.IntN(3)
			err := b.a.Grow(ctx, nil, raid.GrowOptions{Progress: func(done, total uint64) {
				if at--; at == 0 {
					b.set.Disks[c.die].Die()
					if c.twice {
						b.set.Disks[c.die+1].Die()
					}
				}
			}})
			wantErr(t, err, raid.ErrDegraded)
			s := b.a.GrowStatus()
			if b.a.Err() != nil || s.Staged != 0 || !s.Growing || s.Running || s.Done == 0 || s.Done == s.Total {
				t.Fatalf("%+v %v", s, b.a.Err())
			}
			b.checkAll()
			b.update(0, 1)
			b.update(b.geo.Stripes-1, 1)
			if c.rebuild {
				must(t, b.a.Rebuild(ctx, c.die, nil, nil))
				b.checkAll()
			}
			b.cold()
			must(t, b.a.Grow(ctx, nil, raid.GrowOptions{}))
			b.geo = b.a.Geometry()
			b.checkAll()
			b.fill(b.geo.Stripes - 1)
			if b.geo.N != 10 {
				t.Fatalf("%+v", b.geo)
			}
			left := 2
			if !c.rebuild {
				left--
			}
			if c.twice {
				left--
			}
			if !c.rebuild && c.spares > 0 && !c.twice {
				must(t, b.a.Rebuild(ctx, c.die, nil, nil))
				left++
			}
			must(t, b.a.Flush(ctx))
			var lost []int
			for _, i := range b.rng.Perm(10) {
				if len(lost) < left && b.a.Status().Members[i].State == raid.Online {
					lost = append(lost, i)
				}
			}
			b.clone(lost...).checkAll()
		})
	}
}

// While stripes are staged no rebuild begins; a growth that goes on clears them.
func TestRebuildWaitsForStaged(t *testing.T) {
	b := newBed(t, 9, raid.Options{K: 3, M: 2, Spares: 1}, 30)
	b.fillAll()
	stop, cancel := context.WithCancel(ctx)
	defer cancel()
	wantErr(t, b.a.Grow(stop, b.addDisks(1, 30), raid.GrowOptions{Progress: func(uint64, uint64) {
		if b.a.GrowStatus().Staged > 0 {
			cancel()
		}
	}}), context.Canceled)
	b.checkAll()
	b.set.Disks[2].Die()
	b.fillAll()
	b.fill(0)
	wantErr(t, b.a.Rebuild(ctx, 2, nil, nil), raid.ErrBusy)
	must(t, b.a.Grow(ctx, nil, raid.GrowOptions{}))
	must(t, b.a.Rebuild(ctx, 2, nil, nil))
	b.checkAll()
	b.scrubClean()
}

// A spared member is none of the m, so no stripe goes where there is no spare space for it.
func TestNoStagingBesideSpares(t *testing.T) {
	b := newBed(t, 9, raid.Options{K: 3, M: 2, Spares: 1}, 30)
	b.fillAll()
	must(t, b.a.BeginGrow(ctx, b.addDisks(1, 30), raid.GrowOptions{}))
	b.set.Disks[2].Die()
	b.fillAll()
	must(t, b.a.Rebuild(ctx, 2, nil, nil))
	wantErr(t, b.a.Grow(ctx, nil, raid.GrowOptions{}), raid.ErrDegraded)
	if s := b.a.GrowStatus(); s.Staged != 0 || s.Done != 0 {
		t.Fatalf("%+v", s)
	}
	b.set.Disks[0].Die()
	b.set.Disks[3].Die()
	b.checkAll()
}

// Stripes that cannot be made whole are moved as they are: good blocks stay good, bad ones bad, and a full write mends
// them. Where blocks cannot be read at all the growth stops, until they are written or given up.
func TestGrowCarriesDamage(t *testing.T) {
	for _, giveUp := range []bool{false, true} {
		b := newBed(t, 5, raid.Options{K: 2, M: 2}, 40)
		for s := range b.geo.Stripes - 1 {
			b.fill(s)
		}
		must(t, b.a.Flush(ctx))
		lay := raid.LayoutOf(b.a)
		offset := func(stripe uint64, strip, block int) (*raidtest.Disk, int64) {
			m, slot := lay.Strip(stripe, strip)
			return b.set.Disks[m], raid.DataOffset + int64(slot)*raid.SlotBytes + int64(1+block)*raid.BlockBytes
		}
		// The last stripe's first write is cut: half of its strips land. (Labels all do: they are written before.)
		b.cold()
		must(t, b.a.SettleLabel(ctx))
		landed := 0
		for _, d := range b.set.Disks {
			d.OnWrite(func(w raidtest.Write) raidtest.Verdict {
				if landed++; landed%2 == 0 {
					return raidtest.Lose
				}
				return raidtest.Land
			})
		}
		torn := b.geo.Stripes - 1
		b.a.WriteStripe(ctx, torn, 10000, [][]byte{b.random(b.blocks())})
		for _, d := range b.set.Disks {
			d.OnWrite(nil)
		}
		// Stripe 3 and one far behind have rot in the same column of three strips, others beside it.
		rotten := []uint64{3, 40}
		for _, s := range rotten {
			for strip := range 3 {
				d, off := offset(s, strip, 7)
				d.Rot(off + 100)
			}
		}
		const unread = 20
		for strip := range 3 {
			d, off := offset(unread, strip, 9)
			d.Unreadable(off)
		}
		b.cold()
		err := b.a.Grow(ctx, b.addDisks(1, 40), raid.GrowOptions{GiveUp: giveUp})
		if !giveUp {
			wantErr(t, err, raid.ErrUnrecoverable)
			b.check(0, 0, b.blocks())
			b.gen = 20000
			b.fill(unread)
			err = b.a.Grow(ctx, nil, raid.GrowOptions{})
		}
		must(t, err)
		for pass := range 2 {
			for s := range b.want {
				bad := 100
				switch {
				case s == 3 || s == 40:
					bad = 7
				case s == unread && giveUp:
					bad = 9
				}
				for block := range b.blocks() {
					if block%32 != bad {
						b.check(s, block, 1)
					} else if _, err := b.read(s, block, 1); !errors.Is(err, raid.ErrUnrecoverable) {
						t.Fatalf("pass %d: stripe %d block %d: %v", pass, s, block, err)
					}
				}
			}
			if pass == 0 {
				b.cold()
			}
		}
		b.gen = 30000
		b.fill(torn)
		b.fill(3)
		b.fill(40)
		b.fill(unread)
		b.checkAll()
		b.scrubClean()
	}
}

// An update under way keeps its stripe where it is; one that was given up, and may be in the log, stops the growth until
// the stripe is written.
func TestGrowAndUpdates(t *testing.T) {
	b := newBed(t, 5, raid.Options{K: 2, M: 2}, 40)
	b.fillAll()
	held, after := b.prepare(30, 3)
	var free atomic.Bool
	given, _ := b.prepare(44, 3)
	given.Release()
	added := b.addDisks(1, 40)
	done := make(chan error)
	grow := func(added []raid.Drive) {
		done <- b.a.Grow(ctx, added, raid.GrowOptions{Progress: func(at, _ uint64) {
			if at > 30 && !free.Load() {
				t.Error("a stripe with an update under way moved")
			}
		}})
	}
	go grow(added)
	for b.a.GrowStatus().Done != 30 {
		time.Sleep(time.Millisecond)
	}
	b.update(29, 1)
	b.update(31, 1)
	must(t, b.a.Apply(ctx, held))
	b.want[30] = after
	free.Store(true)
	held.Release()
	wantErr(t, <-done, raid.ErrBusy)
	if s := b.a.GrowStatus(); s.Done > 44 || !s.Growing {
		t.Fatalf("%+v", s)
	}
	b.update(44, 5)
	go grow(nil)
	must(t, <-done)
	b.checkAll()
	b.scrubClean()
}

// New members are reserved as the others are; a drive that somebody else holds is not taken.
func TestGrowReserves(t *testing.T) {
	b := newBed(t, 5, raid.Options{K: 2, M: 2}, 12)
	b.fillAll()
	must(t, b.a.Acquire(ctx, 77))
	added := b.addDisks(2, 12)
	other := b.set.Disks[6].Port("C")
	must(t, other.Register(5))
	must(t, other.Reserve(5))
	wantErr(t, b.a.Grow(ctx, added, raid.GrowOptions{}), raid.ErrReservation)
	must(t, b.a.Err())
	if keys, holder, err := b.set.Disks[5].Port("B").Keys(); err != nil || len(keys) != 0 || holder != 0 {
		t.Fatalf("drive that was not taken has keys %v, holder %d, %v", keys, holder, err)
	}
	must(t, other.Release(5))
	must(t, other.Unregister(5))
	must(t, b.a.Grow(ctx, added, raid.GrowOptions{}))
	for i, d := range b.set.Disks {
		if _, holder, err := d.Port("B").Keys(); err != nil || holder != 77 {
			t.Fatalf("disk %d: holder %d, %v", i, holder, err)
		}
	}
	b.checkAll()
}
