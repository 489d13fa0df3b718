package shelf

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/ledge-storage/ledge/target"
)

func TestLSNRefs(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	var r lsnRefs
	model := map[uint64]int{}
	for range 20000 {
		lsn := uint64(rng.IntN(300))
		if model[lsn] > 0 && rng.IntN(2) == 0 {
			r.drop(lsn)
			model[lsn]--
		} else {
			r.add(lsn, 1)
			model[lsn]++
		}
		low, any := ^uint64(0), false
		for l, n := range model {
			if n > 0 {
				low, any = min(low, l), true
			}
		}
		if got, ok := r.first(); ok != any || ok && got != low {
			t.Fatalf("first is %d %v, want %d %v", got, ok, low, any)
		}
	}
}

func TestFloors(t *testing.T) {
	var f floors
	a, b := f.begin(5), f.begin(9)
	f.end(b)
	if l, ok := f.first(); l != 5 || !ok {
		t.Fatalf("an Append at 5 is in flight; first is %d %v", l, ok)
	}
	f.end(a)
	if _, ok := f.first(); ok {
		t.Fatal("nothing is in flight")
	}
}

func TestRangeLock(t *testing.T) {
	var l rangeLock
	var owners [64]atomic.Int32
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(g), 1))
			for range 500 {
				lo := rng.IntN(60)
				hi := lo + 1 + rng.IntN(min(16, 64-lo))
				ctx, cancel := context.WithCancel(context.Background())
				if rng.IntN(8) == 0 {
					cancel()
				}
				c, err := l.lock(ctx, uint64(lo), uint64(hi), accessWrite)
				if err == nil {
					for b := lo; b < hi; b++ {
						if owners[b].Add(1) != 1 {
							t.Errorf("block %d has two owners", b)
						}
					}
					for b := lo; b < hi; b++ {
						owners[b].Add(-1)
					}
					l.unlock(c)
				}
				cancel()
			}
		})
	}
	wg.Wait()
	if len(l.queue) != 0 {
		t.Fatalf("%d claims left", len(l.queue))
	}
}

func testTable(t *testing.T) *extentTable {
	t.Helper()
	sb, err := layOut(400, 2, 2, 128, 8, 4, 16)
	if err != nil {
		t.Fatal(err)
	}
	et := newExtentTable(&sb)
	if err := et.build(1); err != nil {
		t.Fatal(err)
	}
	return et
}

// A freed extent that something may still touch is not given away.
func TestQuarantine(t *testing.T) {
	et := testTable(t)
	birth := uint64(0)
	next := func() uint64 { birth++; return birth }
	k := extentKey{1, 0}
	if err := et.reserve(k, 0, next); err != nil {
		t.Fatal(err)
	}
	x := et.pending[k].extent
	et.apply(&delta{op: opAlloc, extent: x, lun: 1, ext: 0, birth: birth})
	et.unreserve(k)
	et.pin(x)
	et.apply(&delta{op: opFree, extent: x, lun: 1, ext: 0, birth: birth})
	for n := uint32(1); ; n++ {
		err := et.reserve(extentKey{2, n}, 0, next)
		if errors.Is(err, target.ErrNoSpace) {
			break
		}
		if et.pending[extentKey{2, n}].extent == x {
			t.Fatal("a pinned extent was given away")
		}
	}
	et.unpin(x)
	if err := et.reserve(extentKey{3, 0}, 0, next); err != nil || et.pending[extentKey{3, 0}].extent != x {
		t.Fatalf("after the pin went: %v", err)
	}
}

// Deltas in the order of the log, replayed over any state that the members may have, give the same table.
func TestDeltasAreIdempotent(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 3))
	for range 300 {
		var history []delta
		want := testTable(t)
		birth, owner, freed := uint64(0), map[uint32]delta{}, map[uint32]delta{}
		var states [][]extentEntry
		for range 60 {
			states = append(states, append([]extentEntry(nil), want.entries[:4]...))
			x := uint32(rng.IntN(4))
			d, taken := owner[x]
			switch {
			case !taken && freed[x].op != 0 && rng.IntN(3) == 0: // destage was at work on it when it was freed
				d = freed[x]
				d.op, d.written = opWritten, 1 // and changes nothing
			case !taken:
				birth++
				d = delta{op: opAlloc, extent: x, lun: 1 + uint32(rng.IntN(3)), ext: uint32(birth), birth: birth}
				owner[x] = d
				want.entries[x] = extentEntry{lun: d.lun, ext: d.ext, birth: birth}
			case rng.IntN(4) == 0: // a slow writer logs the same allocation, and changes nothing
			case rng.IntN(3) == 0:
				d.op = opFree
				delete(owner, x)
				freed[x] = d
				want.entries[x] = extentEntry{birth: d.birth}
			default:
				d.op, d.written = opWritten, 1<<rng.IntN(2)
				want.entries[x].written |= d.written
			}
			history = append(history, d)
		}
		// The log was trimmed to some point, the members are anywhere from there on.
		from := rng.IntN(len(history))
		at := from + rng.IntN(len(history)-from)
		got := testTable(t)
		copy(got.entries, states[at])
		for _, d := range history[from:] {
			got.alter(&d)
		}
		for i := range 4 {
			if got.entries[i] != want.entries[i] {
				t.Fatalf("entry %d is %+v, want %+v (log from %d, members at %d)", i, got.entries[i], want.entries[i], from, at)
			}
		}
	}
}

func TestLayOut(t *testing.T) {
	for k := 1; k <= 32; k++ {
		sb, err := layOut(100000, k, 2, 2048, 1023, 256, 2046)
		if err != nil {
			t.Fatalf("k=%d: %v", k, err)
		}
		blocks := 0
		for i := range sb.ExtentStripes {
			blocks += sb.usable(i)
		}
		if blocks != 2048 {
			t.Errorf("k=%d: an extent has %d blocks", k, blocks)
		}
		if end := sb.DataStripe + uint64(sb.Extents)*uint64(sb.ExtentStripes); end > sb.Stripes {
			t.Errorf("k=%d: extents end at stripe %d of %d", k, end, sb.Stripes)
		}
		if meta := uint64(sb.tableBlock() + sb.tableBlocks()); meta > sb.DataStripe*uint64(sb.stripeBlocks()) {
			t.Errorf("k=%d: the extent table runs into the data", k)
		}
	}
	if _, err := layOut(3, 8, 2, 2048, 1023, 256, 2046); err == nil {
		t.Error("an array of three stripes was taken")
	}
}
