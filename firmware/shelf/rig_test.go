package shelf_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ledge-storage/ledge/firmware/shelf"
	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/nvram/nvramtest"
	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/raid/raidtest"
	"github.com/ledge-storage/ledge/target"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	kib          = 1024
	extentBlocks = 128 // two stripes of 2+2
	stripeBlocks = 64
	extentBytes  = extentBlocks * 4 * kib
)

// rig is a pool on drives and NVRAM in memory.
type rig struct {
	t      *testing.T
	disks  *raidtest.Set
	region *nvramtest.Region
	opts   shelf.Options
	lost   map[int]bool

	array *raid.Array
	log   *nvram.Log
	*shelf.Pool
}

// newRig makes a pool of 2+2 on five drives, with about 20 extents of 512 KiB and a log of logBytes.
func newRig(t *testing.T, logBytes int64, o shelf.Options) *rig {
	t.Helper()
	r := &rig{t: t, disks: raidtest.NewSet(1, 5, raid.DataOffset+60*raid.SlotBytes), region: nvramtest.NewRegion(logBytes, 512, 1), lost: map[int]bool{}}
	if o.ExtentBlocks == 0 {
		o.ExtentBlocks = extentBlocks
	}
	o.MaxLUNs, o.MaxHosts = 8, 4
	r.opts = o
	ctx := context.Background()
	var err error
	if r.array, err = raid.Create(ctx, r.disks.Drives("A"), raid.Options{K: 2, M: 2, NoSpares: true}); err != nil {
		t.Fatal(err)
	}
	if err := nvram.Format(r.region, r.area(), nvram.FormatOptions{ID: nvram.NewID(), Epoch: 1}); err != nil {
		t.Fatal(err)
	}
	if r.log, err = nvram.Open(ctx, r.region, r.area(), nvram.Options{Epoch: 1}); err != nil {
		t.Fatal(err)
	}
	if r.Pool, err = shelf.CreatePool(ctx, r.array, r.log, r.opts); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.stop)
	return r
}

func (r *rig) area() nvram.Area { return nvram.Area{Size: r.region.Size()} }

// stop ends everything as a crash of the process would.
func (r *rig) stop() {
	if r.Pool != nil {
		r.Abort()
	}
	if r.log != nil {
		r.log.Close()
	}
	if r.array != nil {
		r.array.Close()
	}
	r.Pool, r.log, r.array = nil, nil, nil
}

// cut cuts the power of everything.
func (r *rig) cut() {
	r.region.Cut()
	r.stop()
	r.disks.PowerCut()
	r.disks.PowerOn()
	r.region.Restore()
}

// lose takes a member away for good.
func (r *rig) lose(i int) { r.lost[i] = true }

func (r *rig) open() {
	r.t.Helper()
	if err := r.tryOpen(); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) openLog() (err error) {
	r.log, err = nvram.Open(context.Background(), r.region, r.area(), nvram.Options{Epoch: 1})
	return err
}

func (r *rig) tryOpen(sources ...shelf.Source) (err error) {
	ctx := context.Background()
	ds := r.disks.Drives("A")
	for i := range ds {
		if r.lost[i] {
			ds[i] = nil
		}
	}
	if r.array, err = raid.Open(ctx, ds, raid.Options{}); err != nil {
		return err
	}
	if err = r.openLog(); err != nil {
		return err
	}
	r.Pool, err = shelf.OpenPool(ctx, r.array, r.log, sources, r.opts)
	return err
}

func (r *rig) lun(name string, kind shelf.Kind, bytes int64, block uint32) target.Device {
	r.t.Helper()
	l, err := r.CreateLUN(context.Background(), shelf.LUNSpec{Name: name, Kind: kind, Bytes: bytes, BlockBytes: block})
	if err != nil {
		r.t.Fatal(err)
	}
	return l.Device()
}

func (r *rig) device(name string) target.Device {
	r.t.Helper()
	l, ok := r.LUN(name)
	if !ok {
		r.t.Fatalf("LUN %s is gone", name)
	}
	return l.Device()
}

func (r *rig) drain() {
	r.t.Helper()
	if err := r.Drain(context.Background()); err != nil {
		r.t.Fatal(err)
	}
}

// pattern is n bytes that no other seed gives.
func pattern(seed uint64, n int) []byte {
	g := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), 1})
	b := make([]byte, n)
	g.Read(b)
	return b
}

func write(t *testing.T, d target.Device, lba uint64, b []byte) {
	t.Helper()
	if err := d.Write(context.Background(), lba, [][]byte{b}, false); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, d target.Device, lba uint64, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	if err := d.Read(context.Background(), lba, [][]byte{b}); err != nil {
		t.Fatal(err)
	}
	return b
}

func mustEqual(t *testing.T, what string, got, want []byte) {
	t.Helper()
	if !bytes.Equal(got, want) {
		at := 0
		for got[at] == want[at] {
			at++
		}
		t.Fatalf("%s: differs from byte %d on", what, at)
	}
}

// eventually waits for what the background does.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 12000 {
		if ok() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("not in a minute: %s", what)
}
