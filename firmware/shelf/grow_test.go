package shelf_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/ledge-storage/ledge/firmware/shelf"
	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/raid/raidtest"
	"github.com/ledge-storage/ledge/target"
)

// addMembers grows the array by n members.
func (r *rig) addMembers(n int) {
	r.t.Helper()
	first := len(r.disks.Disks)
	r.disks.Add(uint64(first), n, raid.DataOffset+60*raid.SlotBytes)
	if err := r.array.Grow(ctx, r.disks.Drives("A")[first:], raid.GrowOptions{}); err != nil {
		r.t.Fatal(err)
	}
}

// capacity is what a plain LUN can have, in extents.
func (r *rig) capacity() int64 {
	st := r.Status()
	return (st.CapacityBytes - st.ReserveBytes) / extentBytes
}

// fillUp writes version v of one block of each extent of a LUN until the pool is full, and returns how many it holds.
func fillUp(t *testing.T, d target.Device, from int, v uint64) int {
	t.Helper()
	for x := from; ; x++ {
		err := d.Write(ctx, uint64(x*extentBlocks+x%extentBlocks), [][]byte{version(v, x)}, false)
		if errors.Is(err, target.ErrNoSpace) {
			return x
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func checkUp(t *testing.T, d target.Device, from, to int, v uint64) {
	t.Helper()
	for x := from; x < to; x++ {
		mustEqual(t, fmt.Sprint("extent ", x), read(t, d, uint64(x*extentBlocks+x%extentBlocks), 4*kib), version(v, x))
		mustEqual(t, fmt.Sprint("rest of extent ", x), read(t, d, uint64(x*extentBlocks+(x+1)%extentBlocks), 4*kib), make([]byte, 4*kib))
	}
}

// A full pool grows three times under a writer, by one, two and one members: each time it takes exactly the new extents
// but those of the table, before and after it was opened again, with members lost.
func TestPoolGrows(t *testing.T) {
	r := newRig(t, 2<<20, shelf.Options{})
	d := r.lun("v", shelf.KindPlain, 400*extentBytes, 4096)
	full := fillUp(t, d, 0, 1)
	if int64(full) != r.capacity() {
		t.Fatalf("%d extents taken of %d", full, r.capacity())
	}
	if err := r.Grow(ctx); err != nil || r.capacity() != int64(full) { // nothing is there to take in
		t.Fatal(r.capacity(), err)
	}
	for i, more := range []int{1, 2, 1} {
		was, before := r.array.Geometry().Stripes, r.capacity()
		stop := make(chan struct{})
		var wg sync.WaitGroup
		hot := uint64(10 + i)
		wg.Go(func() {
			for x := 0; ; x++ {
				select {
				case <-stop:
					return
				default:
				}
				if err := d.Write(ctx, uint64(x%full*extentBlocks+x%full%extentBlocks), [][]byte{version(hot, x%full)}, false); err != nil {
					t.Error(err)
					return
				}
			}
		})
		r.addMembers(more)
		if err := r.Grow(ctx); err != nil {
			t.Fatal(err)
		}
		close(stop)
		wg.Wait()
		for x := range full {
			write(t, d, uint64(x*extentBlocks+x%extentBlocks), version(hot, x))
		}
		gained := int64(r.array.Geometry().Stripes-was) / 2
		if got := r.capacity() - before; got < gained-2 || got >= gained+1 || got < 1 {
			t.Fatalf("%d extents more of %d", got, gained)
		}
		now := fillUp(t, d, full, hot)
		if int64(now) != r.capacity() || r.Status().State != "full" {
			t.Fatalf("%d extents taken of %d, %s", now, r.capacity(), r.Status().State)
		}
		full = now
		checkUp(t, d, 0, full, hot)
		if i == 1 {
			r.drain()
		}
		r.cut()
		r.open()
		d = r.device("v")
		checkUp(t, d, 0, full, hot)
		if int64(full) != r.capacity() || r.Status().State != "full" {
			t.Fatalf("opened again: %d extents, %d used, %s", r.capacity(), full, r.Status().State)
		}
	}
	r.drain()
	r.cut()
	r.lose(2)
	r.lose(7)
	r.open()
	d = r.device("v")
	checkUp(t, d, 0, full, 12)
	// Freed space is given out again, in all regions.
	if err := d.Unmap(ctx, []target.Range{{LBA: 0, Blocks: uint64(full * extentBlocks)}}); err != nil {
		t.Fatal(err)
	}
	if n := fillUp(t, d, 0, 20); n != full {
		t.Fatalf("%d extents of %d after all were freed", n, full)
	}
	r.drain()
	checkUp(t, d, 0, full, 20)
}

// cutDrivesAt lets all writes of members fail from the nth on.
func (r *rig) cutDrivesAt(n int) {
	var writes atomic.Int32
	for _, d := range r.disks.Disks {
		d.OnWrite(func(raidtest.Write) raidtest.Verdict {
			switch w := int(writes.Add(1)); {
			case w < n:
				return raidtest.Land
			case w == n:
				return raidtest.FailTorn
			}
			return raidtest.Fail
		})
	}
}

// The power goes at each write of the NVRAM, and each write of the members, between the end of the array's growth and
// a few writes into the new space; two members are lost with it. The pool opens with every acknowledged block, grows
// if it had not, and takes as many extents as one that was never cut.
func TestPoolGrowCut(t *testing.T) {
	step := 1
	for cut, drives := 1, false; ; cut += step {
		r := newRig(t, 2<<20, shelf.Options{Inline: true})
		d := r.lun("v", shelf.KindPlain, 400*extentBytes, 4096)
		full := fillUp(t, d, 0, 1)
		r.addMembers(2)
		if drives {
			r.cutDrivesAt(cut)
		} else {
			r.region.CutAt(cut)
		}
		acked := full
		err := r.Grow(ctx)
		if err == nil {
			for x := full; ; x++ {
				if err = d.Write(ctx, uint64(x*extentBlocks+x%extentBlocks), [][]byte{version(1, x)}, false); err != nil {
					break
				}
				acked = x + 1
				if x == full+3 {
					if err = r.Drain(ctx); err != nil {
						break
					}
				}
			}
		}
		done := errors.Is(err, target.ErrNoSpace)
		r.cut()
		for _, d := range r.disks.Disks {
			d.OnWrite(nil)
		}
		rng := rand.New(rand.NewPCG(uint64(cut), 4))
		lost := rng.Perm(7)
		r.lose(lost[0])
		r.lose(lost[1])
		r.open()
		d = r.device("v")
		checkUp(t, d, 0, acked, 1)
		if err := r.Grow(ctx); err != nil {
			t.Fatalf("cut at %d: %v", cut, err)
		}
		if n := fillUp(t, d, acked, 1); int64(n) != r.capacity() || r.capacity() <= int64(full) {
			t.Fatalf("cut at %d: %d extents of %d, %d before", cut, n, r.capacity(), full)
		}
		r.drain()
		r.cut()
		r.open()
		checkUp(t, r.device("v"), 0, int(r.capacity()), 1)
		r.stop()
		if done {
			t.Logf("%d cuts, of the drives: %v", cut, drives)
			if drives {
				return
			}
			drives, step = true, 7
			cut = 1 - step
		}
	}
}
