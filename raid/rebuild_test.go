package raid_test

import (
	"context"
	"errors"
	"testing"

	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/raid/raidtest"
)

// Members fail one after the other, each rebuilt to spare space, with writes in between and under the rebuild, cut and
// restarted; then m more are lost, and everything reads back.
func TestRebuildToSpare(t *testing.T) {
	b := newBed(t, 9, raid.Options{K: 3, M: 2, Spares: 2}, 300)
	for s := range b.geo.Stripes {
		if s%6 == 0 { // most were never written
			b.fill(s)
		}
	}
	written := func() uint64 { return b.rng.Uint64N(b.geo.Stripes/6) * 6 }
	for i, failed := range []int{4, 1} {
		b.set.Disks[failed].Die()
		b.fill(written())
		for f := b.a.Label().Failed; f>>failed&1 == 0; f = b.a.Label().Failed {
			b.fill(written())
		}
		// Cut in the middle of a batch.
		cut, cancel := context.WithCancel(ctx)
		paced := 0
		err := b.a.Rebuild(cut, failed, func(context.Context) error {
			if b.rng.IntN(8) == 0 {
				b.update(written(), b.rng.IntN(b.blocks()))
			}
			if paced++; paced == 100 {
				cancel()
			}
			return nil
		}, nil)
		cancel()
		if !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		b.checkAll()
		if st := b.a.Status().Members[failed].State; st != raid.Rebuilding {
			t.Fatalf("member %d is %v", failed, st)
		}
		must(t, b.a.Flush(ctx))
		b.a.Close()
		b.set.PowerCut()
		b.set.PowerOn()
		b.open(raid.Options{})
		for range 20 {
			b.fill(written())
			b.update(written(), b.rng.IntN(b.blocks()))
		}
		var last uint64
		must(t, b.a.Rebuild(ctx, failed, nil, func(done, total uint64) { last = done }))
		if last != b.geo.Stripes {
			t.Fatalf("rebuilt %d of %d", last, b.geo.Stripes)
		}
		if st := b.a.Status().Members[failed].State; st != raid.Spared {
			t.Fatalf("member %d is %v", failed, st)
		}
		for s := range b.want {
			if r, err := b.a.Scrub(ctx, s); err != nil || r.Bad != 0 || r.Absent != 0 {
				t.Fatalf("after rebuild %d: stripe %d: %+v %v", i, s, r, err)
			}
		}
	}
	if err := b.a.Rebuild(ctx, 4, nil, nil); !errors.Is(err, raid.ErrRange) {
		t.Fatalf("rebuilt twice: %v", err)
	}
	must(t, b.a.Flush(ctx))
	for _, lost := range [][2]int{{0, 2}, {3, 8}, {5, 6}} {
		c := b.clone(lost[0], lost[1])
		c.checkAll()
		c.update(0, 3, 50)
		c.fill(1) // never written before
		c.checkAll()
		c.a.Close()
	}
	// No spare is left.
	b.set.Disks[0].Die()
	b.fill(0)
	for f := b.a.Label().Failed; f&1 == 0; f = b.a.Label().Failed {
		b.fill(written())
	}
	wantErr(t, b.a.Rebuild(ctx, 0, nil, nil), raid.ErrDegraded)
	b.checkAll()
}

// A member that lost writes while another was gone is no source for what is rebuilt: else the new strip would be as old as its
// own, on a member that did nothing wrong, and the next loss would be one too many.
func TestRebuildLooksForLostWrites(t *testing.T) {
	for victim := range 6 {
		b := newBed(t, 7, raid.Options{K: 2, M: 2, Spares: 1}, 20)
		for s := range b.geo.Stripes {
			b.fill(s)
		}
		const failed = 6
		b.set.Disks[failed].Die()
		for s := uint64(0); b.a.Label().Failed>>failed&1 == 0; s++ {
			b.fill(s % b.geo.Stripes)
		}
		b.updateLosing(victim)
		must(t, b.a.Rebuild(ctx, failed, nil, nil))
		must(t, b.a.Flush(ctx))
		for lost := range 6 {
			if lost == victim {
				continue
			}
			c := b.clone(lost)
			c.checkAll()
			c.a.Close()
		}
	}
}

// updateLosing changes every stripe a little, while a member says that it writes and does not.
func (b *bed) updateLosing(victim int) {
	b.set.Disks[victim].OnWrite(func(w raidtest.Write) raidtest.Verdict {
		if w.Off < raid.DataOffset {
			return raidtest.Land
		}
		return raidtest.Lose
	})
	for s := range b.geo.Stripes {
		b.update(s, b.rng.IntN(b.blocks()))
	}
	b.set.Disks[victim].OnWrite(nil)
}

// Nor does it say what of a member that comes back is current.
func TestReaddLooksForLostWrites(t *testing.T) {
	const failed = 6
	for victim := range 6 {
		b := newBed(t, 7, raid.Options{K: 2, M: 2, Spares: 1}, 20)
		b.fillAll()
		must(t, b.a.Flush(ctx))
		b.fail(failed)
		b.updateLosing(victim)
		b.set.Disks[failed].Revive()
		must(t, b.a.Readd(ctx, b.set.Disks[failed].Port("A"), raid.RebuildOptions{}))
		must(t, b.a.Flush(ctx))
		for lost := range 6 {
			if lost == victim {
				continue
			}
			c := b.clone(lost)
			c.checkAll()
			c.a.Close()
		}
		b.a.Close()
	}
}
