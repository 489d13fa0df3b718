package shelf_test

import (
	"testing"

	"github.com/ledge-storage/ledge/firmware/shelf"
	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/nvram/nvramtest"
	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/raid/raidtest"
)

// A LUN of many extents is deleted; the power goes at each write of the log from the order on. Either the LUN is there as it
// was, or after the next start all of its extents come back, and nobody else's; its id goes to the next LUN only then.
func TestCutInDelete(t *testing.T) {
	const extents, small = 450, 8 // blocks an extent
	first := &rig{t: t, disks: raidtest.NewSet(1, 5, raid.DataOffset+600*raid.SlotBytes), region: nvramtest.NewRegion(24<<20, 512, 1), lost: map[int]bool{},
		opts: shelf.Options{ExtentBlocks: small, MaxLUNs: 8, MaxHosts: 4, IdleAfter: -1}}
	var err error
	if first.array, err = raid.Create(ctx, first.disks.Drives("A"), raid.Options{K: 2, M: 2, NoSpares: true}); err != nil {
		t.Fatal(err)
	}
	if err := nvram.Format(first.region, first.area(), nvram.FormatOptions{ID: nvram.NewID(), Epoch: 1}); err != nil {
		t.Fatal(err)
	}
	if err := first.openLog(); err != nil {
		t.Fatal(err)
	}
	if first.Pool, err = shelf.CreatePool(ctx, first.array, first.log, first.opts); err != nil {
		t.Fatal(err)
	}
	other := first.lun("other", shelf.KindPlain, 100*small*4*kib, 4096)
	write(t, other, 0, pattern(1, 3*small*4*kib))
	d := first.lun("v", shelf.KindPlain, 2*extents*small*4*kib, 4096)
	for i := range uint64(extents) {
		write(t, d, 2*i*small+i%small, pattern(i, 4*kib))
	}
	kept, all := int64(3*small*4*kib), first.Status().AllocatedBytes
	first.stop()
	// The first cuts are within the order; one after all records of the deletion is the last.
	deleted, whole := 0, 0
	for cut := 1; cut < 60 && whole < 2; cut++ {
		r := &rig{t: t, disks: first.disks.Clone(), region: nvramtest.NewRegion(24<<20, 512, uint64(cut)), opts: first.opts, lost: map[int]bool{}}
		r.region.Load(first.region.Bytes())
		r.open()
		r.region.CutAt(cut)
		err := r.DeleteLUN(ctx, "v")
		if err == nil {
			eventually(t, "the power goes, or all is freed", func() bool { return r.region.Off() || r.Status().AllocatedBytes == kept && len(r.Deleting()) == 0 })
		}
		if !r.region.Off() {
			whole++
		}
		r.cut()
		r.open()
		switch l, there := r.LUN("v"); {
		case there && err == nil:
			t.Fatalf("cut %d: the deletion was acknowledged, and is forgotten", cut)
		case there:
			if r.Status().AllocatedBytes != all {
				t.Fatalf("cut %d: the LUN is there with %d bytes of %d", cut, r.Status().AllocatedBytes, all)
			}
			mustEqual(t, "the LUN that is kept", read(t, l.Device(), 2*17*small+17%small, 4*kib), pattern(17, 4*kib))
		default:
			deleted++
			eventually(t, "all is freed", func() bool { return r.Status().AllocatedBytes == kept && len(r.Deleting()) == 0 })
			next := r.lun("next", shelf.KindPlain, 2*extents*small*4*kib, 4096)
			mustEqual(t, "the next LUN", read(t, next, 2*17*small, small*4*kib), make([]byte, small*4*kib))
		}
		mustEqual(t, "the other LUN", read(t, r.device("other"), 0, int(kept)), pattern(1, int(kept)))
		r.stop()
	}
	if deleted < 5 || whole < 2 {
		t.Fatalf("%d deletions were cut, %d not", deleted, whole)
	}
}
