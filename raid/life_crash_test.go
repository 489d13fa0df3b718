package raid_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/raid/raidtest"
)

// lifeAll was run when this was written: every write of every scenario was a power cut.
var lifeAll = flag.Bool("life-all", false, "cut the power at every write of rebuild, copy-back and re-add")

// logged is a caller's log: what was written and not yet flushed.
type logged struct {
	stripe, gen uint64
	data        []byte // full write
	update      []byte // or an encoded update
	after       []byte
}

// owner writes as the shelf does: log first, then the array; replays all of it after a crash.
type owner struct {
	*bed
	log []logged
}

// put makes one write. Its outcome does not matter: it is in the log.
func (o *owner) put(stripe uint64, update bool) {
	o.gen++
	e := logged{stripe: stripe, gen: o.gen}
	if update {
		e.after = append([]byte(nil), o.want[stripe]...)
		d := o.random(1)
		n := o.rng.IntN(o.blocks())
		copy(e.after[n*raid.BlockBytes:], d)
		u, err := o.a.PrepareUpdate(ctx, stripe, o.gen, []raid.BlockWrite{{Block: n, Data: d}})
		if err != nil {
			return // nothing was logged
		}
		e.update = flatten(u.Encode())
		o.log, o.want[stripe] = append(o.log, e), e.after
		o.a.Apply(ctx, u)
		u.Release()
		return
	}
	e.data = o.random(o.blocks())
	o.log, o.want[stripe] = append(o.log, e), e.data
	o.a.WriteStripe(ctx, stripe, e.gen, [][]byte{e.data})
}

// trim is a destage's end.
func (o *owner) trim() {
	if o.a.Flush(ctx) == nil {
		o.log = nil
	}
}

func (o *owner) replay() {
	o.t.Helper()
	for _, e := range o.log {
		var err error
		if e.update != nil {
			err = o.a.Apply(ctx, decode(o.t, e.update))
		} else {
			err = o.a.WriteStripe(ctx, e.stripe, e.gen, [][]byte{e.data})
		}
		if err != nil {
			o.t.Fatalf("replay of stripe %d gen %d: %v", e.stripe, e.gen, err)
		}
	}
	must(o.t, o.a.Flush(ctx))
	o.log = nil
}

// The power goes at a write, any write, of a rebuild, a copy-back or a re-add, labels included, with writers running: from
// there on no drive takes anything, and of the caches every sector lands or not. Then the array opens, the log is
// replayed, everything reads back, also with one more member lost than already is, and the job goes on to its end.
func TestCrashInMembersLife(t *testing.T) {
	for _, scenario := range []string{"rebuild", "rebuild two", "copy-back", "copy-back spared", "re-add", "re-add spared"} {
		t.Run(scenario, func(t *testing.T) {
			total := lifeCrash(t, scenario, 1<<30)
			step := total/12 + 1
			if *lifeAll {
				step = 1
			}
			tried := 0
			for n := total % step; n < total; n += step {
				lifeCrash(t, scenario, n)
				tried++
			}
			t.Logf("%d writes, %d power cuts", total, tried)
		})
	}
}

// lifeCrash cuts the power at the n-th write, and returns how many there were until the job ended.
func lifeCrash(t *testing.T, scenario string, n int) int {
	t.Helper()
	b := newBed(t, 8, raid.Options{K: 3, M: 2, Spares: 1}, 21)
	o := &owner{bed: b}
	b.fillAll()
	must(t, b.a.Flush(ctx))
	b.fail(3)
	var job func(a *raid.Array, paced raid.RebuildOptions) error
	resume := func(a *raid.Array) error { return a.CopyBack(ctx, 3, raid.RebuildOptions{}) }
	spared := scenario == "copy-back spared" || scenario == "re-add spared"
	if spared {
		must(t, b.a.Rebuild(ctx, 3, nil, nil))
	}
	for range 5 {
		b.fill(b.rng.Uint64N(b.geo.Stripes))
	}
	switch scenario {
	case "rebuild two":
		b.fail(6)
		fallthrough
	case "rebuild":
		job = func(a *raid.Array, p raid.RebuildOptions) error { return a.RebuildWith(ctx, 3, p) }
		resume = func(a *raid.Array) error { return a.Rebuild(ctx, 3, nil, nil) }
	case "copy-back", "copy-back spared":
		d := b.blank(3)
		job = func(a *raid.Array, p raid.RebuildOptions) error {
			return a.Replace(ctx, 3, d, raid.ReplaceOptions{RebuildOptions: p})
		}
	default:
		b.set.Disks[3].Revive()
		job = func(a *raid.Array, p raid.RebuildOptions) error { return a.Readd(ctx, b.set.Disks[3].Port("A"), p) }
	}
	must(t, b.a.Flush(ctx))
	var count atomic.Int64
	for _, d := range b.set.Disks {
		d.OnWrite(func(raidtest.Write) raidtest.Verdict {
			if count.Add(1) > int64(n) {
				return raidtest.Fail
			}
			return raidtest.Land
		})
	}
	var wg sync.WaitGroup
	stop := make(chan struct{})
	step := make(chan struct{})
	wg.Add(1)
	go func() { // one writer, as many writes as the job has stripes
		defer wg.Done()
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-step:
			}
			o.put(b.rng.Uint64N(b.geo.Stripes), i%3 > 0)
			if i%7 == 6 {
				o.trim()
			}
		}
	}()
	err := job(b.a, raid.RebuildOptions{Workers: 3, Batch: 6, Pace: func(context.Context) error {
		select {
		case step <- struct{}{}:
		default:
		}
		return nil
	}})
	close(stop)
	wg.Wait()
	writes := int(count.Load())
	if n == 1<<30 {
		must(t, err)
	}
	label := b.a.Label()
	b.a.Close()
	b.set.PowerCut()
	for _, d := range b.set.Disks {
		d.OnWrite(nil)
	}
	b.set.PowerOn()
	b.open(raid.Options{})
	o.replay()
	b.checkAll()
	b.wantRisk()
	st := b.a.Status()
	failed := st.Members[3].State
	if r := b.a.AtRisk(); r.Beyond != 0 {
		t.Fatalf("cut at %d: %+v", n, r)
	}
	if scenario != "rebuild two" { // the log was replayed: any further member may go
		c := b.clone(5)
		c.checkAll()
		c.a.Close()
	}
	fail := func(err error) {
		if err != nil {
			t.Fatalf("cut at write %d (label %+v then %+v): %v", n, label, b.a.Label(), err)
		}
	}
	switch {
	case failed == raid.Online || failed == raid.Spared && !spared:
	case failed == raid.Restoring:
		fail(resume(b.a))
	case scenario == "rebuild" || scenario == "rebuild two":
		fail(resume(b.a))
	default: // the job was cut before the drive was in the label
		if scenario[:2] == "re" {
			fail(b.a.Readd(ctx, b.set.Disks[3].Port("A"), raid.RebuildOptions{}))
		} else {
			fail(b.a.Replace(ctx, 3, b.set.Disks[3].Port("A"), raid.ReplaceOptions{Force: true}))
		}
	}
	b.checkAll()
	b.scrubClean()
	if scenario != "rebuild two" {
		if r := b.wantRisk(); r.Lost[0] != b.geo.Stripes {
			t.Fatalf("cut at %d: %+v", n, r)
		}
		must(t, b.a.Flush(ctx))
		c := b.clone(0, 7)
		c.checkAll()
		c.a.Close()
	}
	b.a.Close()
	return writes
}

// All orders in which m+1 members can fail, one after the other, dying or failed by the operator, with and without a
// rebuild in between, with writes in between, and with the array opened again at the end: exactly the stripes that lost
// more than m strips answer ErrUnrecoverable, and every other reads right.
func TestEveryOrderOfFailures(t *testing.T) {
	base := newBed(t, 7, raid.Options{K: 2, M: 2, Spares: 1}, 16)
	base.fillAll()
	must(t, base.a.Flush(ctx))
	lostStripes, orders := 0, 0
	for i := range 7 * 7 * 7 {
		order := []int{i / 49, i / 7 % 7, i % 7}
		if order[0] == order[1] || order[1] == order[2] || order[0] == order[2] {
			continue
		}
		orders++
		for rebuildAfter := range 3 { // 0: none
			if rebuildAfter == 2 && order[0] > order[1] {
				continue // the same set
			}
			b := base.clone()
			for k, m := range order {
				if k < 2 {
					b.fail(m)
				} else {
					b.set.Disks[m].Die() // beyond what the label may say
				}
				if k == 2 && rebuildAfter == 0 || k == 2 && rebuildAfter == 2 {
					// Nothing is recorded: parity does not stand for it. Reads go on.
					break
				}
				if k < 2 {
					b.update(b.rng.Uint64N(b.geo.Stripes), b.rng.IntN(b.blocks()))
				}
				if rebuildAfter == k+1 {
					must(t, b.a.Rebuild(ctx, order[0], nil, nil))
				}
			}
			name := fmt.Sprintf("order %v, rebuild after %d", order, rebuildAfter)
			gone := func(s uint64) int { return b.a.LostStrips(s) + b.strips(s, order[2]) }
			lost := 0
			for s := range b.want {
				p, err := b.read(s, 0, b.blocks())
				switch n := gone(s); {
				case n <= 2 && (err != nil || string(p) != string(b.want[s])):
					t.Fatalf("%s: stripe %d has lost %d: %v, or wrong data", name, s, n, err)
				case n > 2 && !errors.Is(err, raid.ErrUnrecoverable):
					t.Fatalf("%s: stripe %d has lost %d: %v", name, s, n, err)
				case n > 2:
					lost++
				}
			}
			if rebuildAfter > 0 && lost > 0 {
				t.Fatalf("%s: %d stripes are lost", name, lost)
			}
			lostStripes += lost
			// A write that would leave too little is refused, and all writing stops; reading goes on.
			b.gen++
			err := b.a.WriteStripe(ctx, 0, b.gen, [][]byte{b.random(b.blocks())})
			if rebuildAfter == 0 {
				wantErr(t, err, raid.ErrDegraded)
				delete(b.want, 0) // cut in the middle: the log has it
				if st := b.a.Status().State; st != raid.Broken {
					t.Fatalf("%s: %s", name, st)
				}
			} else if err != nil {
				t.Fatalf("%s: %v", name, err)
			} else {
				delete(b.want, 0)
			}
			if n := b.readable(gone); n > lost {
				t.Fatalf("%s: %d lost, %d before", name, n, lost)
			}
			// Opened again, without the last one, for reading: the same.
			b.a.Close()
			b.open(raid.Options{}, order...)
			if n := b.checkReadable(); rebuildAfter == 0 && n > lost || rebuildAfter > 0 && n > 0 {
				t.Fatalf("%s: opened again: %d lost, %d before", name, n, lost)
			}
			b.wantRisk()
			b.a.Close()
		}
	}
	if orders != 210 || lostStripes == 0 {
		t.Fatalf("%d orders, %d stripes lost", orders, lostStripes)
	}
}

// strips counts the strips of a stripe that lie on a member that the array still counts as working.
func (b *bed) strips(stripe uint64, member int) int { return b.a.PlacesOn(stripe, member) }

// readable reads every stripe and counts those that are lost.
func (b *bed) readable(gone func(uint64) int) (lost int) {
	b.t.Helper()
	for s := range b.want {
		p, err := b.read(s, 0, b.blocks())
		if n := gone(s); n <= b.geo.M && (err != nil || string(p) != string(b.want[s])) {
			b.t.Fatalf("stripe %d has lost %d: %v, or wrong data", s, n, err)
		}
		if err != nil {
			lost++
		}
	}
	return lost
}
