package raid_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"

	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/raid/raidtest"
)

// fail makes a member fail for good: it dies, and a write misses it.
func (b *bed) fail(members ...int) {
	b.t.Helper()
	for _, m := range members {
		b.set.Disks[m].Die()
		must(b.t, b.a.FailMember(ctx, m, true))
	}
}

// blank puts a new drive in a member's slot and returns a port to it.
func (b *bed) blank(member int) raid.Drive {
	b.set.Disks[member].Wipe()
	b.set.Disks[member].Revive()
	return b.set.Disks[member].Port("A")
}

func (b *bed) state(member int) raid.MemberState { return b.a.Status().Members[member].State }

func (b *bed) wantState(member int, s raid.MemberState) {
	b.t.Helper()
	if got := b.state(member); got != s {
		b.t.Fatalf("member %d is %v, not %v", member, got, s)
	}
}

// wantRisk compares AtRisk with the places of every stripe, and returns it.
func (b *bed) wantRisk() raid.Risk {
	b.t.Helper()
	want := raid.Risk{Lost: make([]uint64, b.geo.M+1)}
	for s := range b.geo.Stripes {
		if n := b.a.LostStrips(s); n <= b.geo.M {
			want.Lost[n]++
		} else {
			want.Beyond++
		}
	}
	got := b.a.AtRisk()
	if !slices.Equal(got.Lost, want.Lost) || got.Beyond != want.Beyond {
		b.t.Fatalf("at risk: %+v, by places %+v", got, want)
	}
	return got
}

var errStop = errors.New("stop")

// after returns a pace that stops after n stripes.
func after(n int) func(context.Context) error {
	return func(context.Context) error {
		if n--; n < 0 {
			return errStop
		}
		return nil
	}
}

// With two members failed the stripes that lost two strips are rebuilt before any that lost one; also when the second
// fails in the middle of the first one's rebuild, and after a restart. AtRisk agrees with the places at every stop.
func TestUrgentFirst(t *testing.T) {
	b := newBed(t, 9, raid.Options{K: 3, M: 2, Spares: 2}, 300)
	for s := uint64(0); s < b.geo.Stripes; s += 3 {
		b.fill(s)
	}
	must(t, b.a.Flush(ctx))
	b.fail(4)
	b.wantRisk()
	wantErr(t, b.a.Rebuild(ctx, 4, after(70), nil), errStop)
	before := b.wantRisk()
	b.fail(1)
	now := b.wantRisk()
	if now.Lost[2] == 0 || now.Lost[2] >= before.Lost[1] {
		t.Fatalf("%+v, then %+v", before, now)
	}
	urgent := int(now.Lost[2])
	wantErr(t, b.a.Rebuild(ctx, 4, after(urgent/2), nil), errStop)
	if r := b.wantRisk(); r.Lost[2] != uint64(urgent-urgent/2) {
		t.Fatalf("after %d of %d urgent stripes: %+v", urgent/2, urgent, r)
	}
	must(t, b.a.Flush(ctx))
	b.a.Close()
	b.set.PowerCut()
	b.set.PowerOn()
	b.open(raid.Options{})
	if r := b.wantRisk(); r.Lost[2] != uint64(urgent-urgent/2) {
		t.Fatalf("after a restart: %+v", r)
	}
	wantErr(t, b.a.Rebuild(ctx, 4, after(urgent-urgent/2), nil), errStop)
	if r := b.wantRisk(); r.Lost[2] != 0 || r.Lost[1] != now.Lost[1]+uint64(urgent) {
		t.Fatalf("after all urgent stripes: %+v", r)
	}
	b.checkAll()
	must(t, b.a.Rebuild(ctx, 4, nil, nil))
	must(t, b.a.Rebuild(ctx, 1, nil, nil))
	if r := b.wantRisk(); r.Lost[0] != b.geo.Stripes {
		t.Fatalf("%+v", r)
	}
	b.checkAll()
	b.scrubClean()
	for _, lost := range [][2]int{{0, 2}, {3, 8}} {
		must(t, b.a.Flush(ctx))
		c := b.clone(lost[0], lost[1])
		c.checkAll()
		c.wantRisk()
		c.a.Close()
	}
}

// Three failures of three parity strips: three passes, each stopped in the middle, each remembered.
func TestUrgentThree(t *testing.T) {
	b := newBed(t, 10, raid.Options{K: 3, M: 3, Spares: 2}, 120)
	b.fillAll()
	b.fail(0)
	wantErr(t, b.a.Rebuild(ctx, 0, after(10), nil), errStop)
	b.fail(1)
	wantErr(t, b.a.Rebuild(ctx, 0, after(10), nil), errStop)
	two := b.wantRisk()
	b.fail(2)
	three := b.wantRisk()
	if three.Lost[3] == 0 || three.Lost[3]+three.Lost[2]+three.Lost[1] < two.Lost[2]+two.Lost[1] {
		t.Fatalf("%+v, then %+v", two, three)
	}
	// open tells whether member 0's strip is lost, and its spare place is on a member that works.
	open := func(s uint64) bool {
		for i := range b.geo.K + b.geo.M {
			if m, slot := raid.LayoutOf(b.a).Strip(s, i); m == 0 {
				spare := raid.LayoutOf(b.a).Spare(slot, b.a.Label().RebuildSpare)
				return b.a.LostOn(s, 0) && spare != 1 && spare != 2
			}
		}
		return false
	}
	for lost := 3; lost >= 2; lost-- {
		n := 0
		for s := range b.geo.Stripes {
			if b.a.LostStrips(s) == lost && open(s) {
				n++
			}
		}
		wantErr(t, b.a.Rebuild(ctx, 0, after(n), nil), errStop)
		for s := range b.geo.Stripes {
			if b.a.LostStrips(s) == lost && b.a.Label().RebuildSpare >= 0 && open(s) {
				t.Fatalf("stripe %d has still lost %d, after %d", s, lost, n)
			}
		}
		b.wantRisk()
		b.cold()
		b.wantRisk()
		b.checkAll()
	}
	must(t, b.a.Rebuild(ctx, 0, nil, nil))
	must(t, b.a.Rebuild(ctx, 1, nil, nil))
	b.wantRisk()
	b.checkAll()
}

// A failed member is replaced, spared or not, with writers running: the array is optimal, the spare column free, every
// strip is on the new drive, and every pair of further losses is survived.
func TestReplace(t *testing.T) {
	for _, spared := range []bool{true, false} {
		t.Run(fmt.Sprint("spared ", spared), func(t *testing.T) {
			b := newBed(t, 8, raid.Options{K: 3, M: 2, Spares: 1}, 70)
			b.fillAll()
			b.fail(3)
			if spared {
				must(t, b.a.Rebuild(ctx, 3, nil, nil))
				b.wantState(3, raid.Spared)
			}
			for s := range b.geo.Stripes / 2 {
				b.update(s*2, 5, 70)
			}
			b.replaceUnderWrites(3)
			st := b.a.Status()
			if st.State != raid.Optimal || b.a.Label().SpareOf != [8]uint8{} || st.Members[3].Job != nil {
				t.Fatalf("%+v", st)
			}
			b.checkAll()
			b.scrubClean()
			if r := b.wantRisk(); r.Lost[0] != b.geo.Stripes {
				t.Fatalf("%+v", r)
			}
			must(t, b.a.Flush(ctx))
			choose(8, 2, func(missing []int) {
				c := b.clone(missing...)
				c.checkAll()
				c.a.Close()
			})
			// The spare is good for the next failure, and the member for another replacement.
			b.fail(5)
			must(t, b.a.Rebuild(ctx, 5, nil, nil))
			b.fail(3)
			must(t, b.a.Replace(ctx, 3, b.blank(3), raid.ReplaceOptions{}))
			must(t, b.a.Replace(ctx, 5, b.blank(5), raid.ReplaceOptions{}))
			b.checkAll()
			b.scrubClean()
			b.cold()
			b.checkAll()
		})
	}
}

func (b *bed) replaceUnderWrites(member int) {
	b.t.Helper()
	stop, wg := make(chan struct{}), sync.WaitGroup{}
	wg.Add(1)
	go func() {
		defer wg.Done()
		for {
			select {
			case <-stop:
				return
			default:
				b.fill(b.rng.Uint64N(b.geo.Stripes))
				b.update(b.rng.Uint64N(b.geo.Stripes), b.rng.IntN(b.blocks()))
			}
		}
	}()
	err := b.a.Replace(ctx, member, b.blank(member), raid.ReplaceOptions{})
	close(stop)
	wg.Wait()
	must(b.t, err)
}

// The new drive fails in the middle: the array is as it was, whatever was written meanwhile; the next one does it.
func TestReplaceFails(t *testing.T) {
	for _, spared := range []bool{true, false} {
		for n, done := 0, false; !done; n++ {
			b := newBed(t, 8, raid.Options{K: 3, M: 2, Spares: 1}, 21)
			b.fillAll()
			b.fail(3)
			if spared {
				must(t, b.a.Rebuild(ctx, 3, nil, nil))
			}
			was := b.wantRisk()
			d := b.blank(3)
			writes := 0
			b.set.Disks[3].OnWrite(func(raidtest.Write) raidtest.Verdict {
				if writes++; writes > n {
					return raidtest.Fail
				}
				return raidtest.Land
			})
			err := b.a.Replace(ctx, 3, d, raid.ReplaceOptions{RebuildOptions: raid.RebuildOptions{Pace: func(context.Context) error {
				b.update(b.rng.Uint64N(b.geo.Stripes), b.rng.IntN(b.blocks()))
				return nil
			}}})
			if done = err == nil; done { // it was never reached: all of its writes were tried
				if n < 20 {
					t.Fatalf("%d writes", n)
				}
				continue
			}
			wantErr(t, err, raid.ErrNewDrive)
			if r := b.wantRisk(); !slices.Equal(r.Lost, was.Lost) {
				t.Fatalf("%d writes: %+v, was %+v", n, r, was)
			}
			b.set.Disks[3].Die()
			b.checkAll()
			b.scrubClean()
			must(t, b.a.Flush(ctx))
			if spared { // two more, at once
				c := b.clone(3, 0, 6)
				c.checkAll()
				c.a.Close()
			}
			b.set.Disks[3].OnWrite(nil)
			must(t, b.a.Replace(ctx, 3, b.blank(3), raid.ReplaceOptions{}))
			b.checkAll()
			b.scrubClean()
			b.a.Close()
		}
	}
}

// A member that failed and comes back is brought up to date: only what changed is written.
func TestReadd(t *testing.T) {
	for _, spared := range []bool{true, false} {
		b := newBed(t, 8, raid.Options{K: 3, M: 2, Spares: 1}, 70)
		b.fillAll()
		must(t, b.a.Flush(ctx))
		b.fail(3)
		changed := uint64(0)
		for s := uint64(0); s < b.geo.Stripes; s += 10 {
			b.update(s, 5, 70)
			b.fill(s + 1)
			changed += 2
		}
		if spared {
			must(t, b.a.Rebuild(ctx, 3, nil, nil))
		}
		b.set.Disks[3].Revive()
		b.set.Disks[3].Rot(raid.DataOffset + 7*raid.SlotBytes + 5*4096) // and it rotted meanwhile
		d := b.set.Disks[3].Port("A")
		o, err := b.a.Offer(ctx, d)
		if err != nil || o.Kind != raid.OfferStale || o.Member != 3 {
			t.Fatalf("%+v %v", o, err)
		}
		before := b.set.Disks[3].Stats()
		must(t, b.a.Readd(ctx, d, raid.RebuildOptions{}))
		wrote := b.set.Disks[3].Stats().WriteBlocks - before.WriteBlocks
		if max := (changed+1)*33 + 20; wrote > max || wrote < 33 {
			t.Fatalf("%d blocks written, at most %d changed", wrote, max)
		}
		b.wantState(3, raid.Online)
		b.checkAll()
		b.scrubClean()
		must(t, b.a.Flush(ctx))
		choose(8, 2, func(missing []int) {
			c := b.clone(missing...)
			c.checkAll()
			c.a.Close()
		})
	}
}

// What a drive is to the array.
func TestOffer(t *testing.T) {
	b := newBed(t, 7, raid.Options{K: 2, M: 2, Spares: 1}, 20)
	b.fillAll()
	must(t, b.a.Flush(ctx))
	other := newBed(t, 6, raid.Options{K: 3, M: 2, Random: deterministic(2)}, 40)
	old := b.set.Disks[2].Clone()
	twin := b.set.Disks[3].Clone()
	offer := func(d raid.Drive, kind raid.OfferKind, member int) {
		t.Helper()
		o, err := b.a.Offer(ctx, d)
		if err != nil || o.Kind != kind || o.Member != member {
			t.Fatalf("%s: %+v %v, want %s", d.Name(), o, err, kind)
		}
	}
	spare := raidtest.NewSet(1, 3, driveBytes(20))
	used := spare.Disks[1].Port("A")
	_, err := used.WriteAt(bytes4k(7), 8192)
	must(t, err)
	offer(spare.Disks[0].Port("A"), raid.OfferBlank, -1)
	offer(used, raid.OfferUsed, -1)
	offer(raidtest.NewSet(1, 1, driveBytes(19)).Disks[0].Port("A"), raid.OfferSmall, -1)
	offer(other.set.Disks[0].Port("A"), raid.OfferForeign, -1)
	offer(twin.Port("A"), raid.OfferDuplicate, 3)
	must(t, b.a.WriteLabel(ctx, func(*raid.Label) {}))
	offer(twin.Port("A"), raid.OfferOldCopy, 3)
	wantErr(t, b.a.Replace(ctx, 2, spare.Disks[0].Port("A"), raid.ReplaceOptions{}), raid.ErrRange) // it works
	b.fail(2)
	offer(old.Port("A"), raid.OfferStale, 2)
	replace := func(d raid.Drive, force bool) error {
		return b.a.Replace(ctx, 2, d, raid.ReplaceOptions{Force: force})
	}
	wantErr(t, replace(used, false), raid.ErrNotBlank)
	wantErr(t, replace(other.set.Disks[0].Port("A"), false), raid.ErrForeign)
	wantErr(t, replace(old.Port("A"), false), raid.ErrStaleMember)
	wantErr(t, replace(raidtest.NewSet(1, 1, driveBytes(19)).Disks[0].Port("A"), true), raid.ErrSize)
	must(t, b.a.WriteLabel(ctx, func(*raid.Label) {}))
	wantErr(t, b.a.Readd(ctx, twin.Port("A"), raid.RebuildOptions{}), raid.ErrStaleMember)
	must(t, replace(other.set.Disks[0].Port("A"), true))
	offer(old.Port("A"), raid.OfferOldCopy, 2)
	b.checkAll()
	b.scrubClean()
	b.a.Close()

	// Missing only: taken as it is, and if a write came first, brought up to date.
	b.set.Disks[2] = other.set.Disks[0]
	b.open(raid.Options{}, 5)
	offer(b.set.Disks[5].Port("A"), raid.OfferReturned, 5)
	must(t, b.a.Readd(ctx, b.set.Disks[5].Port("A"), raid.RebuildOptions{}))
	if st := b.a.Status(); st.State != raid.Optimal {
		t.Fatalf("%+v", st)
	}
	b.checkAll()
	b.cold(5)
	b.fill(3)
	offer(b.set.Disks[5].Port("A"), raid.OfferStale, 5)
	must(t, b.a.Readd(ctx, b.set.Disks[5].Port("A"), raid.RebuildOptions{}))
	b.checkAll()
	b.scrubClean()
	if st := b.a.Status(); st.State != raid.Optimal {
		t.Fatalf("%+v", st)
	}
}

func bytes4k(x byte) []byte {
	p := make([]byte, 4096)
	for i := range p {
		p[i] = x
	}
	return p
}

// Members replaced by older copies of themselves, from an earlier session or from before SettleLabel: as many as they
// are, they are refused, and nothing that they hold is read.
func TestOlderCopies(t *testing.T) {
	for _, settle := range []bool{false, true} {
		for n := 1; n <= 7; n++ {
			b := newBed(t, 7, raid.Options{K: 2, M: 2, Spares: 1}, 20)
			b.fillAll()
			must(t, b.a.Flush(ctx))
			if !settle {
				b.a.Close()
			}
			var old []map[int64][]byte
			for _, d := range b.set.Disks {
				old = append(old, d.Snapshot())
			}
			if settle {
				must(t, b.a.SettleLabel(ctx))
			} else {
				b.open(raid.Options{})
			}
			for s := range b.geo.Stripes {
				if s%3 != 0 {
					b.fill(s)
				}
			}
			must(t, b.a.Flush(ctx))
			b.a.Close()
			b.set.PowerCut()
			b.set.PowerOn()
			if n == 7 { // all: a consistent older array; no label can tell
				continue
			}
			for i := range n {
				b.set.Disks[i].Restore(old[i])
			}
			a, err := raid.Open(ctx, b.set.Drives("A"), raid.Options{})
			if n > 3 {
				wantErr(t, err, raid.ErrNoMajority)
				continue
			}
			must(t, err)
			b.adopt(a)
			if r := a.Status().Refused; len(r) != n || !errors.Is(r[0].Err, raid.ErrStaleMember) {
				t.Fatalf("%d older copies: %+v", n, r)
			}
			b.checkReadable()
			if n <= 2 {
				b.checkAll()
				b.fillAll()
				for i := range n { // as stale as any
					must(t, a.Readd(ctx, b.set.Disks[i].Port("A"), raid.RebuildOptions{}))
				}
				b.checkAll()
				b.scrubClean()
			}
			a.Close()
		}
	}
}

// checkReadable reads every stripe: those that have not lost too much must be right, the others must answer
// ErrUnrecoverable. It returns how many are lost.
func (b *bed) checkReadable() (lost int) {
	b.t.Helper()
	for s := range b.want {
		if b.a.LostStrips(s) <= b.geo.M {
			b.check(s, 0, b.blocks())
			continue
		}
		lost++
		if _, err := b.read(s, 0, b.blocks()); !errors.Is(err, raid.ErrUnrecoverable) {
			b.t.Fatalf("stripe %d: %v", s, err)
		}
	}
	return lost
}
