package raid_test

import (
	"fmt"
	"testing"

	"github.com/ledge-storage/ledge/raid"
)

// Every way of splitting reads over blocks, strips and buffers returns what was written, warm and cold.
func TestReadBack(t *testing.T) {
	for _, g := range []struct{ n, k, m int }{{12, 8, 2}, {10, 8, 2}, {5, 2, 2}, {3, 1, 1}, {9, 3, 4}, {40, 32, 4}} {
		t.Run(fmt.Sprintf("%d:%d+%d", g.n, g.k, g.m), func(t *testing.T) {
			b := newBed(t, g.n, raid.Options{K: g.k, M: g.m}, 20)
			for s := range min(b.geo.Stripes, 5) {
				b.fill(s)
			}
			for range 60 {
				s := b.rng.Uint64N(uint64(len(b.want)))
				at := b.rng.IntN(b.blocks())
				b.check(s, at, 1+b.rng.IntN(b.blocks()-at))
				if b.rng.IntN(4) == 0 {
					b.update(s, b.rng.IntN(b.blocks()))
				}
				if b.rng.IntN(20) == 0 {
					b.cold()
				}
			}
			b.checkAll()
			b.scrubClean()
			if c := b.a.Status().Counters; c.ChecksumErrors+c.StaleStrips+c.DegradedReads != 0 {
				t.Fatalf("healthy drives, and %+v", c)
			}
		})
	}
}

// choose calls f with every subset of at most most of n members.
func choose(n, most int, f func([]int)) {
	var rec func(from int, set []int)
	rec = func(from int, set []int) {
		f(set)
		if len(set) == most {
			return
		}
		for i := from; i < n; i++ {
			rec(i+1, append(set[:len(set):len(set)], i))
		}
	}
	rec(0, nil)
}

// Any m members may be missing: all reads back, and writes go on and read back too.
func TestEveryMissingCombination(t *testing.T) {
	for _, g := range []struct{ n, k, m int }{{12, 8, 2}, {7, 3, 3}, {9, 2, 4}} {
		t.Run(fmt.Sprintf("%d:%d+%d", g.n, g.k, g.m), func(t *testing.T) {
			b := newBed(t, g.n, raid.Options{K: g.k, M: g.m}, 6)
			for s := range min(b.geo.Stripes, 3) {
				b.fill(s)
			}
			if err := b.a.Flush(ctx); err != nil {
				t.Fatal(err)
			}
			choose(g.n, g.m, func(missing []int) {
				c := b.clone(missing...)
				c.checkAll()
				c.update(0, 1, 2, 40%c.blocks())
				c.update(1, c.rng.IntN(c.blocks()))
				c.fill(2)
				c.checkAll()
				if err := c.a.Flush(ctx); err != nil {
					t.Fatal(err)
				}
				st := c.a.Status()
				for _, m := range missing {
					if st.Members[m].State != raid.Failed {
						t.Fatalf("member %d is %v", m, st.Members[m].State)
					}
				}
				// The members that come back now are old: they are refused.
				c.cold()
				if got := len(c.a.Status().Refused); got != len(missing) {
					t.Fatalf("without %v: %d refused", missing, got)
				}
				c.checkAll()
				c.a.Close()
			})
		})
	}
}

// With m+1 members gone exactly the stripes that had m+1 strips on them are lost: reads of the others' data, and of
// lost stripes' strips that are still there, are right.
func TestBeyondParity(t *testing.T) {
	b := newBed(t, 12, raid.Options{K: 4, M: 2}, 12)
	b.fillAll()
	if err := b.a.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	gone := []int{1, 5, 8}
	for _, m := range gone {
		b.set.Disks[m].Die()
	}
	b.a.Close()
	drives := b.set.Drives("A")
	for _, m := range gone {
		drives[m] = nil
	}
	a, err := raid.Open(ctx, drives, raid.Options{})
	if err != nil {
		t.Fatal(err)
	}
	b.adopt(a)
	lay := raid.LayoutOf(a)
	lost := 0
	for s := range b.geo.Stripes {
		var absent []int
		for i := range 6 {
			if m, _ := lay.Strip(s, i); m == 1 || m == 5 || m == 8 {
				absent = append(absent, i)
			}
		}
		for i := range 4 {
			_, err := b.read(s, i*raid.StripBlocks, raid.StripBlocks)
			mine := false
			for _, x := range absent {
				mine = mine || x == i
			}
			if len(absent) > 2 && mine {
				lost++
				wantErr(t, err, raid.ErrUnrecoverable)
			} else {
				b.check(s, i*raid.StripBlocks, raid.StripBlocks)
			}
		}
	}
	if lost == 0 {
		t.Fatal("no stripe had three strips there: the test tests nothing")
	}
	// Nothing may be written: a third member recorded as failed would be lost for good.
	b.gen++
	wantErr(t, a.WriteStripe(ctx, 0, b.gen, [][]byte{b.random(b.blocks())}), raid.ErrDegraded)
	wantErr(t, a.Err(), raid.ErrDegraded)
	if st := a.Status(); st.State != raid.Broken {
		t.Fatalf("state %v", st.State)
	}
	// The members were only unreachable: the next start has everything.
	for _, m := range gone {
		b.set.Disks[m].Revive()
	}
	b.cold()
	b.checkAll()
	b.fill(0)
	b.checkAll()
}

// A member that dies while the array is open is recorded before the write that missed it returns.
func TestDeathUnderWrite(t *testing.T) {
	b := newBed(t, 12, raid.Options{K: 8, M: 2}, 10)
	b.fillAll()
	b.set.Disks[3].Die()
	b.fill(0)
	b.update(1, 7)
	b.set.Disks[9].Die()
	b.checkAll() // finds member 9 dead by reading; its repair fails it
	for s := range b.want {
		b.update(s, int(s)%b.blocks())
	}
	b.checkAll()
	if f := b.a.Label().Failed; f != 1<<3|1<<9 {
		t.Fatalf("failed members %b", f)
	}
	b.set.Disks[3].Revive()
	b.set.Disks[9].Revive()
	b.cold()
	st := b.a.Status()
	if len(st.Refused) != 2 || st.State != raid.Degraded {
		t.Fatalf("%+v", st)
	}
	wantErr(t, st.Refused[0].Err, raid.ErrStaleMember)
	b.checkAll()
	// A third: writing stops, reading what is there goes on.
	b.set.Disks[0].Die()
	b.gen++
	wantErr(t, b.a.WriteStripe(ctx, 0, b.gen, [][]byte{b.random(b.blocks())}), raid.ErrDegraded)
}

// A drive that hangs delays a read by its time-out once; writes fail it.
func TestHang(t *testing.T) {
	b := newBed(t, 6, raid.Options{K: 3, M: 2}, 6)
	b.fillAll()
	b.a.Close()
	b.open(raid.Options{ReadTimeout: soon, WriteTimeout: 10 * soon})
	resume := b.set.Disks[2].Stall()
	defer resume()
	b.checkAll()
	b.checkAll()
	if n := b.a.Status().Members[2].Timeouts; n == 0 || n > 4 {
		t.Fatalf("%d reads waited for the hanging member", n)
	}
	b.update(0, 0, 33, 65)
	b.fill(1)
	if f := b.a.Label().Failed; f != 1<<2 {
		t.Fatalf("failed members %b", f)
	}
	b.checkAll()
	resume()
}

// All members slow at once is no reason to give up.
func TestAllSlow(t *testing.T) {
	b := newBed(t, 6, raid.Options{K: 3, M: 2}, 5)
	b.fillAll()
	b.a.Close()
	b.open(raid.Options{ReadTimeout: soon})
	done := make(chan struct{})
	var resume []func()
	for _, d := range b.set.Disks {
		resume = append(resume, d.Stall())
	}
	go func() {
		defer close(done)
		b.check(0, 0, 3)
	}()
	for b.a.Status().Members[0].Timeouts+b.a.Status().Members[1].Timeouts == 0 && b.a.Status().Members[2].Timeouts+b.a.Status().Members[3].Timeouts == 0 &&
		b.a.Status().Members[4].Timeouts+b.a.Status().Members[5].Timeouts == 0 {
	}
	for _, r := range resume {
		r()
	}
	<-done
}

// A flush that fails fails its member: its cache may be gone.
func TestFlushFails(t *testing.T) {
	b := newBed(t, 6, raid.Options{K: 3, M: 2}, 5)
	b.fill(0)
	b.set.Disks[1].Die()
	if err := b.a.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	if f := b.a.Label().Failed; f != 1<<1 {
		t.Fatalf("failed members %b", f)
	}
}

// Writes, updates and reads of many stripes at once.
func TestConcurrent(t *testing.T) {
	b := newBed(t, 12, raid.Options{K: 8, M: 2, CacheBytes: 1}, 12)
	b.fillAll()
	done := make(chan error)
	for s := range b.geo.Stripes {
		go func() {
			done <- func() error {
				for i := range 10 {
					d := make([]byte, raid.BlockBytes)
					d[0], d[1] = byte(s), byte(i)
					u, err := b.a.PrepareUpdate(ctx, s, 1000+uint64(i), []raid.BlockWrite{{Block: i * 25, Data: d}})
					if err != nil {
						return err
					}
					if err := b.a.Apply(ctx, u); err != nil {
						return err
					}
					u.Release()
					got, err := b.read(s, i*25, 1)
					if err != nil || got[0] != byte(s) || got[1] != byte(i) {
						return fmt.Errorf("stripe %d: %v %v", s, got[:2], err)
					}
				}
				return nil
			}()
		}()
	}
	b.set.Disks[4].Die()
	for range b.geo.Stripes {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}
