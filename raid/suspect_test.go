package raid_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/raid/raidtest"
)

// clocked opens the array again with a clock that stands still until it is moved.
func (b *bed) clocked(s raid.Suspicion) *time.Time {
	b.t.Helper()
	now := time.Unix(1e9, 0)
	s.Now = func() time.Time { return now }
	b.a.Close()
	b.open(raid.Options{Suspicion: s})
	return &now
}

// rotAll rots a block of every strip that lies on a member, but for the first n slots.
func (b *bed) rotAll(member, skip int) {
	for slot := skip; slot < 40; slot++ {
		b.set.Disks[member].Rot(raid.DataOffset + int64(slot)*raid.SlotBytes + 5*raid.BlockBytes)
	}
}

func suspectBed(t *testing.T) *bed {
	b := newBed(t, 8, raid.Options{K: 3, M: 2, Spares: 1}, 42)
	b.fillAll()
	must(t, b.a.Flush(ctx))
	return b
}

// A member that rots all over is repaired, suspected, and failed; what is read is right all the time.
func TestRottingMemberFails(t *testing.T) {
	b := suspectBed(t)
	b.clocked(raid.Suspicion{SuspectAt: 4, FailAt: 8})
	b.rotAll(3, 0)
	seen := make(map[raid.MemberState]bool)
	for round := 0; round < 50 && !seen[raid.Failed]; round++ { // one read in eight is tried on a suspect
		for s := range b.want {
			b.check(s, 0, b.blocks())
			seen[b.state(3)] = true
		}
	}
	if !seen[raid.Online] || !seen[raid.Suspect] || !seen[raid.Failed] {
		t.Fatalf("states %v", seen)
	}
	st := b.a.Status().Members[3]
	if st.Repairs == 0 || st.LastError == "" || st.LastErrorAt.IsZero() || b.a.Label().Failed != 1<<3 {
		t.Fatalf("%+v", st)
	}
	must(t, b.a.Rebuild(ctx, 3, nil, nil))
	b.checkAll()
	b.scrubClean()
}

// One rotten block, read a thousand times, repaired, rotten again: no reason to fail a member. Nor are a few in a day.
func TestOneRottenBlock(t *testing.T) {
	b := suspectBed(t)
	now := b.clocked(raid.Suspicion{SuspectAt: 4, FailAt: 8})
	d, off := b.where(0, 1, 3)
	for range 100 {
		d.Rot(off)
		b.check(0, 0, b.blocks())
	}
	for s := range uint64(40) { // one each half-life never adds up to more than two points
		*now = now.Add(10 * time.Minute)
		d, off := b.where(s, 1, 3)
		d.Rot(off)
		b.check(s, 0, b.blocks())
	}
	for i := range b.geo.N {
		b.wantState(i, raid.Online)
	}
}

// Reads go round a suspect, and come back to it when it has been forgotten.
func TestSuspectForgotten(t *testing.T) {
	b := suspectBed(t)
	now := b.clocked(raid.Suspicion{SuspectAt: 4, FailAt: -1})
	b.rotAll(3, 0)
	b.checkAll()
	for range 3 {
		b.scrubClean2()
	}
	b.wantState(3, raid.Suspect)
	before := b.set.Disks[3].Stats().Reads
	reads := b.a.Status().Counters.Reads
	b.checkAll()
	round := b.set.Disks[3].Stats().Reads - before
	if n := b.a.Status().Counters.Reads - reads; round > n/4 {
		t.Fatalf("%d reads of the suspect in %d reads", round, n)
	}
	b.fillAll() // it takes writes as before
	*now = now.Add(24 * time.Hour)
	b.checkAll()
	b.wantState(3, raid.Online)
	b.scrubClean()
}

// scrubClean2 scrubs, whatever is found.
func (b *bed) scrubClean2() {
	b.t.Helper()
	for s := range b.want {
		if _, err := b.a.Scrub(ctx, s); err != nil {
			b.t.Fatal(err)
		}
	}
}

// A suspect is kept when redundancy does not allow to fail it, or when more members than parity stands for are suspect.
func TestSuspectKept(t *testing.T) {
	t.Run("redundancy", func(t *testing.T) {
		b := suspectBed(t)
		b.clocked(raid.Suspicion{SuspectAt: 4, FailAt: 8})
		b.fail(0, 1)
		b.rotAll(3, 5) // beyond parity where all three have a strip; there it is unrecoverable
		for range 3 {
			for s := range b.want {
				if p, err := b.read(s, 0, b.blocks()); err == nil && string(p) != string(b.want[s]) {
					t.Fatal("wrong data")
				}
			}
		}
		b.wantState(3, raid.Suspect)
		if b.a.Label().Failed != 3 || b.a.Err() != nil {
			t.Fatalf("%b %v", b.a.Label().Failed, b.a.Err())
		}
	})
	t.Run("many", func(t *testing.T) {
		b := suspectBed(t)
		b.clocked(raid.Suspicion{SuspectAt: 2, FailAt: 3})
		for round := range 10 { // a strip of each of four members, never two of one stripe
			for i := range 4 {
				s := uint64(round*4 + i)
				for strip := range 5 {
					if m, _ := raid.LayoutOf(b.a).Strip(s, strip); m == i {
						d, off := b.where(s, strip, 3)
						d.Rot(off)
					}
				}
			}
		}
		for s := range uint64(40) {
			if s%8 < 4 {
				b.check(s, 0, b.blocks())
			}
		}
		b.scrubClean2()
		failed := 0
		for i := range b.geo.N {
			if b.state(i) == raid.Failed {
				failed++
			}
		}
		if failed > 1 {
			t.Fatalf("%d members failed", failed)
		}
		b.checkAll()
	})
}

// A member that hangs, without a write to fail it: suspected by the clock, and failed.
func TestHungMember(t *testing.T) {
	b := suspectBed(t)
	now := b.clocked(raid.Suspicion{SuspectAt: 4, FailAt: 8})
	b.a.Close()
	b.open(raid.Options{ReadTimeout: soon, WriteTimeout: time.Minute, Suspicion: raid.Suspicion{SuspectAt: 4, FailAt: 8,
		Now: func() time.Time { return *now }}})
	b.fill(0)
	resume := b.set.Disks[2].Stall()
	defer resume()
	seen := make(map[raid.MemberState]bool)
	for i := range 40 {
		*now = now.Add(time.Second)
		s := uint64(i) % b.geo.Stripes
		go func() { // the label that fails it waits for nobody: but a write to it would
			time.Sleep(10 * soon)
			resume()
		}()
		b.check(s, 0, b.blocks())
		seen[b.state(2)] = true
		if seen[raid.Failed] {
			break
		}
	}
	if !seen[raid.Suspect] {
		t.Fatalf("states %v", seen)
	}
}

// The operator fails a member: not below parity, and to its very end only with force.
func TestFailMember(t *testing.T) {
	b := suspectBed(t)
	must(t, b.a.FailMember(ctx, 1, false))
	must(t, b.a.FailMember(ctx, 1, false)) // again: nothing to do
	b.wantState(1, raid.Failed)
	wantErr(t, b.a.FailMember(ctx, 2, false), raid.ErrRedundancy)
	must(t, b.a.FailMember(ctx, 2, true))
	wantErr(t, b.a.FailMember(ctx, 3, true), raid.ErrRedundancy)
	wantErr(t, b.a.FailMember(ctx, 99, true), raid.ErrRange)
	b.fillAll()
	must(t, b.a.Rebuild(ctx, 1, nil, nil))
	wantErr(t, b.a.FailMember(ctx, 3, false), raid.ErrRedundancy)
	must(t, b.a.FailMember(ctx, 3, true))
	b.checkAll()
	b.cold()
	b.checkAll()
	for _, m := range []int{1, 2, 3} {
		must(t, b.a.Readd(ctx, b.set.Disks[m].Port("A"), raid.RebuildOptions{}))
	}
	b.checkAll()
	b.scrubClean()
}

// The whole array is scrubbed: every fault is counted by kind and repaired, or named; and nothing is found afterwards.
func TestScrubAll(t *testing.T) {
	b := newBed(t, 12, raid.Options{K: 4, M: 2, Spares: 2}, 120)
	for s := range b.geo.Stripes {
		if s%5 != 4 {
			b.fill(s)
		}
	}
	must(t, b.a.Flush(ctx))
	clean, err := b.a.ScrubAll(ctx, raid.ScrubOptions{})
	must(t, err)
	if clean.Next != b.geo.Stripes || clean.Stripes != uint64(len(b.want)) || clean.Unwritten != b.geo.Stripes-clean.Stripes ||
		clean.Members|clean.Rotten|clean.Stale|clean.Repaired|clean.Lost != 0 {
		t.Fatalf("%+v", clean)
	}
	d, off := b.where(0, 1, 3)
	d.Rot(off)
	d, off = b.where(1, 5, -1)
	d.Rot(off)
	d, off = b.where(2, 0, 31)
	d.Unreadable(off)
	disk, _ := b.where(15, 2, 0)
	disk.Once(1, raidtest.Lose)
	b.update(15, 2*raid.StripBlocks)
	disk.OnWrite(nil)
	for strip := range 3 {
		d, off := b.where(30, strip, 7)
		d.Rot(off)
	}
	r, err := b.a.ScrubAll(ctx, raid.ScrubOptions{Used: func(s uint64) bool { return s%5 != 4 }})
	must(t, err)
	if r.Unwritten != 0 || r.Stripes != clean.Stripes || r.Rotten != 5 || r.Unreadable != 1 || r.Stale != 1 || r.Repaired != 4 || r.Lost != 1 ||
		fmt.Sprint(r.Unrecoverable) != "[30]" {
		t.Fatalf("%+v", r)
	}
	b.fill(30)
	// In two parts, the second degraded.
	n := 0
	r, err = b.a.ScrubAll(ctx, raid.ScrubOptions{Pace: func(context.Context, int64) error {
		if n++; n > 3 {
			return errStop
		}
		return nil
	}})
	wantErr(t, err, errStop)
	if r.Next == 0 || r.Next >= b.geo.Stripes || r.Members != 0 {
		t.Fatalf("%+v", r)
	}
	b.fail(3)
	q, err := b.a.ScrubAll(ctx, raid.ScrubOptions{From: r.Next})
	must(t, err)
	if q.Next != b.geo.Stripes || r.Stripes+q.Stripes != clean.Stripes || q.Members != 0 {
		t.Fatalf("%+v, then %+v", r, q)
	}
	must(t, b.a.Rebuild(ctx, 3, nil, nil))
	q, err = b.a.ScrubAll(ctx, raid.ScrubOptions{})
	must(t, err)
	if q.Stripes != clean.Stripes || q.Members|q.Rotten != 0 {
		t.Fatalf("%+v", q)
	}
	b.checkAll()
}
