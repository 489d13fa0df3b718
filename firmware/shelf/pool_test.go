package shelf_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/ledge-storage/ledge/firmware/shelf"
	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/devicetest"
)

var ctx = context.Background()

func TestWriteSurvivesCutAndLostMembers(t *testing.T) {
	for _, destaged := range []bool{false, true} {
		t.Run(fmt.Sprint("destaged=", destaged), func(t *testing.T) {
			r := newRig(t, 4<<20, shelf.Options{IdleAfter: -1})
			d := r.lun("v", shelf.KindPlain, 8*extentBytes, 4096)
			want := pattern(1, 3*extentBytes/2)
			write(t, d, 100, want)
			if destaged {
				r.drain()
				patch := pattern(2, 5*4*kib)
				write(t, d, 130, patch)
				copy(want[30*4*kib:], patch)
			}
			r.cut()
			r.lose(1)
			r.lose(3)
			r.open()
			mustEqual(t, "after the cut", read(t, r.device("v"), 100, len(want)), want)
			r.drain()
			if s := r.Status(); s.DirtyBytes != 0 {
				t.Fatalf("%d bytes dirty after a drain", s.DirtyBytes)
			}
			mustEqual(t, "from the members", read(t, r.device("v"), 100, len(want)), want)
			r.stop()
			r.open()
			mustEqual(t, "after a clean start", read(t, r.device("v"), 100, len(want)), want)
		})
	}
}

func TestAddressesBeyondTheLUN(t *testing.T) {
	r := newRig(t, 4<<20, shelf.Options{})
	d := r.lun("v", shelf.KindPlain, extentBytes, 512)
	n := d.Info().Blocks
	b := make([]byte, 1024)
	for what, err := range map[string]error{
		"read":       d.Read(ctx, n-1, [][]byte{b}),
		"write":      d.Write(ctx, n-1, [][]byte{b}, false),
		"far write":  d.Write(ctx, ^uint64(0), [][]byte{b}, false),
		"unmap":      d.Unmap(ctx, []target.Range{{LBA: 0, Blocks: 1}, {LBA: n, Blocks: 1}}),
		"write same": d.WriteSame(ctx, n, ^uint64(0), b[:512]),
		"compare":    d.CompareAndWrite(ctx, n, b[:512], b[:512]),
	} {
		if !errors.Is(err, target.ErrRange) {
			t.Errorf("%s: %v, want ErrRange", what, err)
		}
	}
	if r.Status().AllocatedBytes != 0 {
		t.Error("a refused write allocated")
	}
}

// A LUN keeps the promises of a device, while its blocks go to the members by and by, of which two are lost in the end.
func TestDevice(t *testing.T) {
	for _, block := range []uint32{512, 4096} {
		r := newRig(t, 8<<20, shelf.Options{OverlayBlocks: 300})
		devicetest.Run(t, r.lun("v", shelf.KindPlain, 8*extentBytes, block), uint64(block))
		r.drain()
		r.lose(1)
		r.lose(3)
		r.cut()
		r.open()
		d := r.device("v")
		if err := d.Unmap(ctx, []target.Range{{Blocks: d.Info().Blocks}}); err != nil {
			t.Fatal(err)
		}
		devicetest.Run(t, d, uint64(block)+1)
		r.stop()
	}
}

// Sectors of 512 bytes in blocks of 4 KiB.
func TestSectors(t *testing.T) {
	r := newRig(t, 4<<20, shelf.Options{})
	d := r.lun("v", shelf.KindPlain, extentBytes, 512)
	if i := d.Info(); i.PhysicalExponent != 3 || i.BlockBytes != 512 || !i.Thin {
		t.Fatalf("info: %+v", i)
	}
	want := make([]byte, 64*kib)
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range 200 {
		lba := rng.IntN(127)
		n := 1 + rng.IntN(min(20, 128-lba))
		p := pattern(uint64(i), n*512)
		switch i % 4 {
		case 3:
			if err := d.Unmap(ctx, []target.Range{{LBA: uint64(lba), Blocks: uint64(n)}}); err != nil {
				t.Fatal(err)
			}
			p = make([]byte, n*512)
		case 2:
			if err := d.CompareAndWrite(ctx, uint64(lba), want[lba*512:][:len(p)], p); err != nil {
				t.Fatal(err)
			}
		default:
			write(t, d, uint64(lba), p)
		}
		copy(want[lba*512:], p)
		if i%50 == 49 {
			r.drain()
		}
	}
	mustEqual(t, "sectors", read(t, d, 0, len(want)), want)
	var mis *target.MiscompareError
	bad := bytes.Clone(want[:1024])
	bad[700] ^= 1
	if err := d.CompareAndWrite(ctx, 0, bad, bad); !errors.As(err, &mis) || mis.Offset != 700 {
		t.Fatalf("compare and write: %v", err)
	}
}

// Out of space is answered before anything is logged, and what UNMAP frees can be written again.
func TestThin(t *testing.T) {
	r := newRig(t, 4<<20, shelf.Options{})
	total := r.Status().CapacityBytes - r.Status().ReserveBytes
	d := r.lun("v", shelf.KindPlain, 2*total, 4096)
	n := uint64(total / extentBytes)
	for e := range n - 1 {
		write(t, d, e*extentBlocks, pattern(e, 4*kib))
	}
	// Two extents are needed, one is left.
	edge := (n+1)*extentBlocks - 1
	if err := d.Write(ctx, edge, [][]byte{pattern(9, 8*kib)}, false); !errors.Is(err, target.ErrNoSpace) {
		t.Fatalf("write of the pool's last extent and one more: %v", err)
	}
	mustEqual(t, "refused write", read(t, d, edge, 8*kib), make([]byte, 8*kib))
	write(t, d, (n-1)*extentBlocks, pattern(n-1, 4*kib)) // the one that is left is still there
	if s := r.Status(); s.State != "full" || s.AllocatedBytes != total {
		t.Fatalf("status of a full pool: %+v", s)
	}
	write(t, d, 0, pattern(77, 4*kib)) // a full pool takes overwrites
	if err := d.Unmap(ctx, []target.Range{{LBA: 10, Blocks: 3*extentBlocks - 10}}); err != nil {
		t.Fatal(err)
	}
	if got := r.Status().AllocatedBytes; got != total-2*extentBytes {
		t.Fatalf("%d bytes allocated after two extents of %d were unmapped", got, total)
	}
	mustEqual(t, "kept part", read(t, d, 0, 4*kib), pattern(77, 4*kib))
	mustEqual(t, "unmapped", read(t, d, extentBlocks, 4*kib), make([]byte, 4*kib))
	write(t, d, edge, pattern(9, 8*kib))
	r.cut()
	r.open()
	d = r.device("v")
	mustEqual(t, "after all", read(t, d, edge, 8*kib), pattern(9, 8*kib))
	mustEqual(t, "freed, another LUN extent's now", read(t, d, extentBlocks, 4*kib), make([]byte, 4*kib))
	if mapped, run, err := d.Mapped(ctx, extentBlocks, 4*extentBlocks); mapped || run != 2*extentBlocks || err != nil {
		t.Fatalf("mapped: %v %d %v", mapped, run, err)
	}
}

// An UNMAP whose ends lie in parts of blocks that hold nothing needs no space (qa/sim, seeds 1125803 and 1140517).
func TestUnmapNeedsNoSpace(t *testing.T) {
	r := newRig(t, 4<<20, shelf.Options{})
	total := r.Status().CapacityBytes - r.Status().ReserveBytes
	d := r.lun("v", shelf.KindPlain, 2*total, 512)
	n := uint64(total / extentBytes)
	for e := range n {
		write(t, d, e*extentBlocks*8, pattern(e, 4*kib))
	}
	hole := (n + 1) * extentBlocks * 8
	if err := d.Write(ctx, hole, [][]byte{pattern(1, 512)}, false); !errors.Is(err, target.ErrNoSpace) {
		t.Fatalf("the pool is not full: %v", err)
	}
	for _, x := range []target.Range{{LBA: 4, Blocks: hole}, {LBA: hole + 1, Blocks: 3}} {
		if err := d.Unmap(ctx, []target.Range{x}); err != nil {
			t.Fatal(err)
		}
	}
	mustEqual(t, "kept part", read(t, d, 0, 2*kib), pattern(0, 4*kib)[:2*kib])
	mustEqual(t, "unmapped", read(t, d, 4, 2*kib), make([]byte, 2*kib))
	if s := r.Status(); s.AllocatedBytes != extentBytes {
		t.Fatalf("%d bytes are allocated, want one extent", s.AllocatedBytes)
	}
}

func TestStore(t *testing.T) {
	r := newRig(t, 4<<20, shelf.Options{})
	d := r.lun("s", shelf.KindStore, 1<<40, 4096)
	a, b := pattern(1, stripeBlocks*4*kib), pattern(2, stripeBlocks*4*kib)
	at := uint64(1<<40)/4096 - extentBlocks // sparse: the last extent
	write(t, d, at, a)
	steps := func(when string) {
		t.Helper()
		write(t, d, at, a) // the same again is a repetition
		if err := d.Write(ctx, at, [][]byte{b}, false); !errors.Is(err, target.ErrOverwrite) {
			t.Fatalf("%s: overwrite: %v", when, err)
		}
		if err := d.Write(ctx, at+1, [][]byte{b}, false); !errors.Is(err, target.ErrAlignment) {
			t.Fatalf("%s: not aligned: %v", when, err)
		}
		if err := d.Write(ctx, at, [][]byte{b[:4096]}, false); !errors.Is(err, target.ErrAlignment) {
			t.Fatalf("%s: part of a stripe: %v", when, err)
		}
		if err := d.Unmap(ctx, []target.Range{{LBA: at, Blocks: stripeBlocks}}); !errors.Is(err, target.ErrAlignment) {
			t.Fatalf("%s: unmap of part of an extent: %v", when, err)
		}
		mustEqual(t, when, read(t, d, at, len(a)), a)
		mustEqual(t, when+": rest of the extent", read(t, d, at+stripeBlocks, len(a)), make([]byte, len(a)))
	}
	steps("in the overlay")
	r.drain()
	steps("on the members")
	if err := d.Unmap(ctx, []target.Range{{LBA: at, Blocks: extentBlocks}}); err != nil {
		t.Fatal(err)
	}
	if r.Status().AllocatedBytes != 0 {
		t.Fatal("the extent was not freed")
	}
}

// Blocks that are overwritten again and again before a destage reach the members once.
func TestHotBlocksAreDestagedOnce(t *testing.T) {
	r := newRig(t, 8<<20, shelf.Options{IdleAfter: -1})
	d := r.lun("v", shelf.KindJournal, extentBytes, 4096)
	write(t, d, 0, pattern(0, 64*4*kib))
	r.drain()
	before := r.Status().Counters
	var want []byte
	for i := range 100 {
		want = pattern(uint64(i), 4*kib)
		write(t, d, 7, want)
	}
	r.drain()
	after := r.Status().Counters
	if n := after.PartialStripes - before.PartialStripes; n > 3 { // the block, and the metadata that tells of the first
		t.Fatalf("100 overwrites of a block made %d stripe updates", n)
	}
	mustEqual(t, "hot block", read(t, d, 7, 4*kib), want)
}

// A log of two megabytes takes any amount of writes: they wait for destage, and all of it is there.
func TestBackPressure(t *testing.T) {
	r := newRig(t, 2<<20, shelf.Options{})
	d := r.lun("v", shelf.KindPlain, 16*extentBytes, 4096)
	var wg sync.WaitGroup
	const writers, each = 4, 4 * extentBytes / (16 * kib)
	for w := range writers {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 1))
			for _, i := range rng.Perm(each) {
				lba := uint64(w*4*extentBlocks + i*4)
				write(t, d, lba, pattern(lba, 16*kib))
			}
		})
	}
	wg.Wait()
	for lba := uint64(0); lba < 16*extentBlocks; lba += 4 {
		mustEqual(t, fmt.Sprint("block ", lba), read(t, d, lba, 16*kib), pattern(lba, 16*kib))
	}
	if s := r.Status(); s.Counters.Stalls == 0 {
		t.Error("8 MiB went through a 2 MiB log without a stall: the test tests nothing")
	}
	r.cut()
	r.open()
	d = r.device("v")
	for lba := uint64(0); lba < 16*extentBlocks; lba += 4 {
		mustEqual(t, fmt.Sprint("block after a cut ", lba), read(t, d, lba, 16*kib), pattern(lba, 16*kib))
	}
}

// Readers see each block's acknowledged content or newer, never older and never a mix, while writers overwrite,
// unmap and destage runs, and extents are freed and given away.
func TestReadsDuringDestage(t *testing.T) {
	r := newRig(t, 2<<20, shelf.Options{IdleAfter: -1})
	const blocks = 3 * extentBlocks
	d := r.lun("v", shelf.KindPlain, 3*extentBytes, 4096)
	other := r.lun("w", shelf.KindPlain, 40*extentBytes, 4096)
	var acked, begun [blocks]atomic.Uint64
	var stop atomic.Bool
	var wg, readers sync.WaitGroup
	fill := func(v uint64, lba uint64) []byte {
		b := make([]byte, 4*kib)
		if v%5 != 0 { // every fifth version is zeros
			for i := 0; i < len(b); i += 16 {
				copy(b[i:], fmt.Sprintf("%8d%8d", v, lba))
			}
		}
		return b
	}
	for w := range 3 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 2))
			for v := uint64(1); v < 150; v++ {
				lba, n := uint64(w*extentBlocks+rng.IntN(100)), uint64(1+rng.IntN(24))
				if v%10 == 0 {
					lba, n = uint64(w*extentBlocks), extentBlocks
				}
				var src [][]byte
				for b := lba; b < lba+n; b++ {
					begun[b].Store(v)
					src = append(src, fill(v, b))
				}
				var err error
				if v%5 == 0 {
					err = d.Unmap(ctx, []target.Range{{LBA: lba, Blocks: n}})
				} else {
					err = d.Write(ctx, lba, src, false)
				}
				if err != nil {
					t.Error(err)
					return
				}
				for b := lba; b < lba+n; b++ {
					acked[b].Store(v)
				}
			}
		})
	}
	wg.Go(func() { // takes and frees the extents that d freed
		for i := range uint64(60) {
			lba := i % 20 * extentBlocks
			if err := other.Write(ctx, lba, [][]byte{bytes.Repeat([]byte{0xEE}, 256*kib)}, false); err != nil {
				t.Error(err)
			}
			if err := other.Unmap(ctx, []target.Range{{LBA: lba, Blocks: extentBlocks}}); err != nil {
				t.Error(err)
			}
		}
	})
	for g := range 2 {
		readers.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(g), 3))
			for !stop.Load() {
				b := uint64(rng.IntN(blocks))
				low := acked[b].Load()
				got := read(t, d, b, 4*kib)
				high := begun[b].Load()
				ok := false
				for v := low; v <= high && !ok; v++ {
					ok = bytes.Equal(got, fill(v, b)) || v == 0 && bytes.Equal(got, make([]byte, 4*kib))
				}
				if !ok {
					t.Errorf("block %d: read %q, acknowledged version %d, begun %d", b, got[:32], low, high)
					return
				}
			}
		})
	}
	wg.Wait()
	stop.Store(true)
	readers.Wait()
	r.drain()
}

func TestOverlappingWritersAgree(t *testing.T) {
	r := newRig(t, 4<<20, shelf.Options{})
	d := r.lun("v", shelf.KindPlain, extentBytes, 4096)
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range 30 {
				write(t, d, uint64(i%5), bytes.Repeat([]byte{byte(w*30 + i)}, 40*kib))
			}
		})
	}
	wg.Wait()
	before := read(t, d, 0, 60*kib)
	r.cut() // replay must order them as the overlay did
	r.open()
	mustEqual(t, "after replay", read(t, r.device("v"), 0, 60*kib), before)
}

func TestCompareAndWriteIsAtomic(t *testing.T) {
	r := newRig(t, 4<<20, shelf.Options{})
	d := r.lun("v", shelf.KindPlain, extentBytes, 512)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for n := 0; n < 25; {
				old := read(t, d, 3, 512)
				next := bytes.Clone(old)
				for i := 0; ; i++ {
					if next[i]++; next[i] != 0 {
						break
					}
				}
				var mis *target.MiscompareError
				switch err := d.CompareAndWrite(ctx, 3, old, next); {
				case err == nil:
					n++
				case !errors.As(err, &mis):
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if got := read(t, d, 3, 512)[0]; got != 100 {
		t.Fatalf("100 increments gave %d", got)
	}
}

func TestRecords(t *testing.T) {
	r := newRig(t, 4<<20, shelf.Options{})
	r.lun("a", shelf.KindPlain, extentBytes, 512)
	uuid := r.device("a").Info().UUID
	write(t, r.lun("b", shelf.KindPlain, 20*extentBytes, 4096), 0, pattern(1, 5*extentBytes))
	for what, c := range map[string]struct {
		spec shelf.LUNSpec
		want error
	}{
		"same name":   {shelf.LUNSpec{Name: "a", Kind: shelf.KindPlain, Bytes: extentBytes}, shelf.ErrExists},
		"no name":     {shelf.LUNSpec{Kind: shelf.KindPlain, Bytes: extentBytes}, shelf.ErrName},
		"bad name":    {shelf.LUNSpec{Name: "a b", Kind: shelf.KindPlain, Bytes: extentBytes}, shelf.ErrName},
		"no kind":     {shelf.LUNSpec{Name: "c", Bytes: extentBytes}, shelf.ErrSize},
		"no size":     {shelf.LUNSpec{Name: "c", Kind: shelf.KindPlain}, shelf.ErrSize},
		"negative":    {shelf.LUNSpec{Name: "c", Kind: shelf.KindPlain, Bytes: -4096}, shelf.ErrSize},
		"odd size":    {shelf.LUNSpec{Name: "c", Kind: shelf.KindPlain, Bytes: 5000}, shelf.ErrSize},
		"store 512":   {shelf.LUNSpec{Name: "c", Kind: shelf.KindStore, Bytes: extentBytes, BlockBytes: 512}, shelf.ErrSize},
		"block bytes": {shelf.LUNSpec{Name: "c", Kind: shelf.KindPlain, Bytes: extentBytes, BlockBytes: 1024}, shelf.ErrSize},
		"too large":   {shelf.LUNSpec{Name: "c", Kind: shelf.KindPlain, Bytes: 1 << 62}, shelf.ErrSize},
	} {
		if _, err := r.CreateLUN(ctx, c.spec); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", what, err, c.want)
		}
	}
	if err := r.ResizeLUN(ctx, "a", extentBytes/2); !errors.Is(err, shelf.ErrSize) {
		t.Errorf("shrink: %v", err)
	}
	if err := r.ResizeLUN(ctx, "a", 3*extentBytes); err != nil {
		t.Fatal(err)
	}
	h := shelf.Host{Name: "h1", Initiator: "iqn.2026-11.test:h1", LUNs: []uint32{1, 2}}
	if err := r.PutHost(ctx, h); err != nil {
		t.Fatal(err)
	}
	if err := r.PutHost(ctx, shelf.Host{Name: "h2", Initiator: h.Initiator}); !errors.Is(err, shelf.ErrExists) {
		t.Errorf("two hosts with one initiator name: %v", err)
	}
	h.LUNs = []uint32{1}
	if err := r.PutHost(ctx, h); err != nil {
		t.Fatal(err)
	}
	if err := r.DeleteLUN(ctx, "b"); err != nil {
		t.Fatal(err)
	}
	r.cut()
	r.open()
	if i := r.device("a").Info(); i.UUID != uuid || i.Blocks != 3*extentBytes/512 {
		t.Fatalf("LUN a came back as %+v", i)
	}
	if _, ok := r.LUN("b"); ok {
		t.Fatal("LUN b came back")
	}
	eventually(t, "the extents of a deleted LUN are freed after a restart", func() bool { return r.Status().AllocatedBytes == 0 })
	if hs := r.Hosts(); len(hs) != 1 || hs[0].Initiator != h.Initiator || len(hs[0].LUNs) != 1 {
		t.Fatalf("hosts: %+v", hs)
	}
	if err := r.DeleteHost(ctx, "h1"); err != nil {
		t.Fatal(err)
	}
	if err := r.DeleteHost(ctx, "h1"); !errors.Is(err, shelf.ErrNotFound) {
		t.Fatal(err)
	}
	for i := 0; ; i++ {
		_, err := r.CreateLUN(ctx, shelf.LUNSpec{Name: fmt.Sprint("n", i), Kind: shelf.KindPlain, Bytes: extentBytes})
		if errors.Is(err, shelf.ErrLimit) {
			break
		}
		if err != nil || i > 8 {
			t.Fatalf("LUN %d: %v", i, err)
		}
	}
}

// When the log fails, nothing is acknowledged any more, and everybody who waits is told.
func TestFailedLogStopsThePool(t *testing.T) {
	r := newRig(t, 4<<20, shelf.Options{})
	d := r.lun("v", shelf.KindPlain, extentBytes, 4096)
	write(t, d, 0, pattern(1, 4*kib))
	r.region.Fail(errors.New("module gone"))
	err := d.Write(ctx, 0, [][]byte{pattern(2, 4*kib)}, false)
	if !errors.Is(err, target.ErrUnavailable) || !errors.Is(err, shelf.ErrFailed) {
		t.Fatalf("write: %v", err)
	}
	<-r.Failed()
	if err := d.Write(ctx, 1, [][]byte{pattern(2, 4*kib)}, false); !errors.Is(err, target.ErrUnavailable) {
		t.Fatalf("next write: %v", err)
	}
	if s := r.Status(); s.State != "failed" || s.Err == nil {
		t.Fatalf("status: %+v", s)
	}
	r.cut()
	r.open()
	mustEqual(t, "what was acknowledged", read(t, r.device("v"), 0, 4*kib), pattern(1, 4*kib))
}

func TestOpenRefuses(t *testing.T) {
	r := newRig(t, 4<<20, shelf.Options{})
	r.lun("v", shelf.KindPlain, extentBytes, 4096)
	r.Abort()
	r.log.Close()
	l, err := nvram.Open(ctx, r.region, r.area(), nvram.Options{Epoch: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := shelf.OpenPool(ctx, r.array, l, nil, shelf.Options{PoolUUID: [16]byte{1}}); !errors.Is(err, shelf.ErrForeign) {
		t.Errorf("another pool's UUID: %v", err)
	}
	if _, err := shelf.CreatePool(ctx, r.array, l, shelf.Options{}); !errors.Is(err, shelf.ErrLogInUse) {
		t.Errorf("a pool made over a log in use: %v", err)
	}
	if b, _ := r.Status(), 0; b.UUID == ([16]byte{}) {
		t.Error("no UUID")
	}
}

// Commands that meet a deletion end with ErrUnavailable and leave nothing behind.
func TestDeleteUnderLoad(t *testing.T) {
	r := newRig(t, 4<<20, shelf.Options{})
	var wg sync.WaitGroup
	for round := range 5 {
		d := r.lun(fmt.Sprint("v", round), shelf.KindPlain, 8*extentBytes, 4096)
		for w := range 3 {
			wg.Go(func() {
				for i := range uint64(1000) {
					lba := (uint64(w) + 3*i) % 8 * extentBlocks
					err := d.Write(ctx, lba, [][]byte{pattern(i, 8*kib)}, false)
					if err == nil {
						err = d.Read(ctx, lba, [][]byte{make([]byte, 8*kib)})
					}
					if errors.Is(err, target.ErrUnavailable) {
						return
					}
					if err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		for r.Status().AllocatedBytes == 0 {
			read(t, d, 0, 4*kib)
		}
		if err := r.DeleteLUN(ctx, fmt.Sprint("v", round)); err != nil {
			t.Fatal(err)
		}
		wg.Wait()
	}
	eventually(t, "everything is free", func() bool { return r.Status().AllocatedBytes == 0 })
	r.cut()
	r.open()
	if n := r.Status().AllocatedBytes; n != 0 || len(r.LUNs()) != 0 {
		t.Fatalf("%d bytes and %d LUNs came back", n, len(r.LUNs()))
	}
}
