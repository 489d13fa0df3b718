package shelf_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/firmware/shelf"
	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/nvram/nvramtest"
	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/raid/raidtest"
)

// spareRig is a pool of 2+2 on eight drives with spare space, on a log of 4 MiB, with background work.
func spareRig(t *testing.T, o shelf.MaintenanceOptions) *rig {
	t.Helper()
	r := &rig{t: t, disks: raidtest.NewSet(1, 8, raid.DataOffset+90*raid.SlotBytes), region: nvramtest.NewRegion(4<<20, 512, 1), lost: map[int]bool{}}
	r.opts = shelf.Options{ExtentBlocks: extentBlocks, MaxLUNs: 8, MaxHosts: 4, IdleAfter: -1, Maintenance: o}
	var err error
	if r.array, err = raid.Create(ctx, r.disks.Drives("A"), raid.Options{K: 2, M: 2, Spares: 2}); err != nil {
		t.Fatal(err)
	}
	if err := nvram.Format(r.region, r.area(), nvram.FormatOptions{ID: nvram.NewID(), Epoch: 1}); err != nil {
		t.Fatal(err)
	}
	if err := r.openLog(); err != nil {
		t.Fatal(err)
	}
	if r.Pool, err = shelf.CreatePool(ctx, r.array, r.log, r.opts); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.stop)
	return r
}

// fillPool writes n extents and destages them.
func (r *rig) fillPool(n int) []byte {
	d := r.lun("v", shelf.KindPlain, int64(n)*extentBytes, 4096)
	want := pattern(5, n*extentBytes)
	write(r.t, d, 0, want)
	r.drain()
	return want
}

func (r *rig) member(i int) raid.MemberState { return r.array.Status().Members[i].State }

// A failed member is rebuilt by itself once it was failed long enough; cut in the middle, the rebuild goes on after the
// next start. Then two more may go.
func TestRebuildByItself(t *testing.T) {
	var now atomic.Int64
	clock := func() time.Time { return time.Unix(1<<30+now.Load(), 0) }
	r := spareRig(t, shelf.MaintenanceOptions{RebuildDelay: time.Hour, Now: clock})
	want := r.fillPool(20)
	r.disks.Disks[3].Die()
	write(t, r.device("v"), 0, want)
	r.drain()
	if r.member(3) != raid.Failed {
		t.Fatalf("member 3 is %s", r.member(3))
	}
	for range 3 {
		time.Sleep(lookTwice)
		if r.member(3) != raid.Failed || r.Maintenance().Task != shelf.TaskNone {
			t.Fatal("it did not wait")
		}
	}
	// Slow, so that it can be cut.
	if err := r.SetRates(shelf.MaintenanceRates{Rebuild: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the rebuild begins", func() bool {
		now.Add(3601) // again and again: it counts from when the failure is seen
		return r.Maintenance().Task == shelf.TaskRebuild
	})
	if s := r.Maintenance(); s.Member != 3 {
		t.Fatalf("status: %+v", s)
	}
	mustEqual(t, "under rebuild", read(t, r.device("v"), 0, len(want)), want)
	r.cut()
	r.open()
	eventually(t, "the rebuild goes on", func() bool { return r.member(3) == raid.Spared })
	for _, m := range []int{0, 6} {
		r.disks.Disks[m].Die()
	}
	mustEqual(t, "with two more gone", read(t, r.device("v"), 0, len(want)), want)
}

const lookTwice = 300 * time.Millisecond

// Without redundancy left there is no delay.
func TestRebuildAtOnce(t *testing.T) {
	r := spareRig(t, shelf.MaintenanceOptions{RebuildDelay: time.Hour, Rates: shelf.MaintenanceRates{Floor: 64 << 10}})
	want := r.fillPool(8)
	r.disks.Disks[3].Die()
	r.disks.Disks[5].Die()
	write(t, r.device("v"), 0, want)
	eventually(t, "one is rebuilt", func() bool {
		r.drain()
		return r.member(3) == raid.Spared || r.member(5) == raid.Spared
	})
	time.Sleep(lookTwice)
	if r.member(3) == raid.Spared && r.member(5) == raid.Spared {
		t.Fatal("the second did not wait")
	}
}

// A scrub repairs; it can be paused, also over a restart, stopped, and comes by itself when its time has come.
func TestScrubPass(t *testing.T) {
	var now atomic.Int64
	clock := func() time.Time { return time.Unix(1<<30+now.Load(), 0) }
	r := spareRig(t, shelf.MaintenanceOptions{Now: clock, Rates: shelf.MaintenanceRates{Scrub: 8 << 20}})
	want := r.fillPool(40)
	first := r.strips(r.stripeOf(want[:4*kib]))
	last := r.strips(r.stripeOf(want[39*extentBytes:][:4*kib]))
	first[0].rot(7)
	last[1].whole()
	if err := r.PauseScrub(ctx); !errors.Is(err, shelf.ErrScrubState) {
		t.Fatalf("pause of nothing: %v", err)
	}
	if err := r.StartScrub(ctx); err != nil {
		t.Fatal(err)
	}
	if err := r.StartScrub(ctx); !errors.Is(err, shelf.ErrScrubState) {
		t.Fatalf("second start: %v", err)
	}
	eventually(t, "the pass is under way", func() bool { return r.array.Status().Counters.Repairs == 1 })
	if err := r.PauseScrub(ctx); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it pauses", func() bool {
		s := r.Maintenance()
		return s.Task == shelf.TaskNone && s.Scrub.State == shelf.ScrubPaused
	})
	at := r.Maintenance().Scrub
	if at.Position == at.Total || at.Now.Stripes == 0 || at.Now.Repaired != 1 {
		t.Fatalf("paused: %+v", at)
	}
	r.cut()
	r.opts.Maintenance.Rates.Scrub = 0
	r.open()
	if s := r.Maintenance().Scrub; s.State != shelf.ScrubPaused || s.Position != at.Position || s.Now != at.Now {
		t.Fatalf("after a restart %+v, before %+v", s, at)
	}
	if err := r.StartScrub(ctx); err != nil {
		t.Fatal(err)
	}
	ended := func() bool { s := r.Maintenance().Scrub; return s.State == shelf.ScrubIdle && !s.Last.End.IsZero() }
	eventually(t, "the pass ends", ended)
	s := r.Maintenance().Scrub
	if s.Last.BadStrips != 2 || s.Last.Repaired != 2 || s.Last.Stripes < 80 || s.Last.UnrecoverableStripes+s.Last.LostBlocks+s.Last.ParityErrors != 0 {
		t.Fatalf("report: %+v", s.Last)
	}
	if want := clock().Add(7 * 24 * time.Hour); !s.Next.Equal(want) {
		t.Fatalf("next at %v, want %v", s.Next, want)
	}
	first[2].rot(1)
	now.Add(7*24*3600 + 1)
	before := s.Last.End
	eventually(t, "the next pass by itself", func() bool { return ended() && r.Maintenance().Scrub.Last.End.After(before) })
	if s := r.Maintenance().Scrub; s.Last.BadStrips != 1 || s.Last.Repaired != 1 {
		t.Fatalf("report: %+v", s.Last)
	}
	if err := r.StopScrub(ctx); !errors.Is(err, shelf.ErrScrubState) {
		t.Fatalf("stop of nothing: %v", err)
	}
	mustEqual(t, "data", read(t, r.device("v"), 0, len(want)), want)
}

// A scrub gives way to a rebuild, and ends after it; what is beyond parity, and what is marked as lost, is told apart.
func TestScrubGivesWay(t *testing.T) {
	r := spareRig(t, shelf.MaintenanceOptions{RebuildDelay: time.Millisecond, Rates: shelf.MaintenanceRates{Scrub: 2 << 20}})
	want := r.fillPool(20)
	beyond := r.strips(r.stripeOf(want[4*extentBytes:][:4*kib]))
	lost := r.strips(r.stripeOf(want[8*extentBytes:][:4*kib]))
	for i := range 3 {
		beyond[i].rot(3)
		lost[i].rot(4)
	}
	write(t, r.device("v"), 8*extentBlocks+4, want[:4*kib])
	r.drain()
	if err := r.StartScrub(ctx); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the pass is under way", func() bool { return r.Maintenance().Task == shelf.TaskScrub })
	victim := lost[3].index
	for v := range r.disks.Disks {
		if v != victim && v != beyond[3].index && v != beyond[0].index && v != beyond[1].index && v != beyond[2].index {
			victim = v
		}
	}
	r.disks.Disks[victim].Die()
	write(t, r.device("v"), 0, want[:extentBytes])
	r.drain()
	eventually(t, "the rebuild runs", func() bool {
		r.drain()
		s := r.Maintenance()
		return s.Task == shelf.TaskRebuild && s.Scrub.State == shelf.ScrubWaiting || r.member(victim) == raid.Spared
	})
	if err := r.SetRates(shelf.MaintenanceRates{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "both end", func() bool { return r.member(victim) == raid.Spared && r.Maintenance().Scrub.State == shelf.ScrubIdle })
	if s := r.Maintenance().Scrub.Last; s.UnrecoverableStripes != 1 || s.LostBlocks != 1 {
		t.Fatalf("report: %+v", s)
	}
}

// While maintenance is held nothing runs.
func TestHoldMaintenance(t *testing.T) {
	r := spareRig(t, shelf.MaintenanceOptions{Rates: shelf.MaintenanceRates{Scrub: 1 << 20}})
	r.fillPool(8)
	if err := r.StartScrub(ctx); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it runs", func() bool { return r.Maintenance().Task == shelf.TaskScrub })
	release, err := r.HoldMaintenance(ctx)
	if err != nil {
		t.Fatal(err)
	}
	at := r.Maintenance()
	time.Sleep(lookTwice)
	if s := r.Maintenance(); s.Task != shelf.TaskNone || s.Scrub.Position != at.Scrub.Position || s.Scrub.State != shelf.ScrubWaiting {
		t.Fatalf("held: %+v", s)
	}
	if err := r.SetRates(shelf.MaintenanceRates{}); err != nil {
		t.Fatal(err)
	}
	release()
	eventually(t, "it goes on", func() bool { return !r.Maintenance().Scrub.Last.End.IsZero() })
	if err := r.SetRates(shelf.MaintenanceRates{Scrub: 1}); !errors.Is(err, shelf.ErrRates) {
		t.Fatalf("rate of a byte: %v", err)
	}
}

// A new drive that was put in place of a failed member is filled in the background, also when it was begun before a
// restart, and so is an array that grows: then the pool has the space.
func TestRestoreAndGrowByThemselves(t *testing.T) {
	r := spareRig(t, shelf.MaintenanceOptions{RebuildDelay: time.Millisecond})
	want := r.fillPool(12)
	r.disks.Disks[2].Die()
	write(t, r.device("v"), 0, want)
	r.drain()
	eventually(t, "the member is in spare space", func() bool { return r.member(2) == raid.Spared })
	release, err := r.HoldMaintenance(ctx)
	if err != nil {
		t.Fatal(err)
	}
	fresh := raidtest.NewSet(9, 3, raid.DataOffset+90*raid.SlotBytes)
	left := errors.New("left to the maintenance")
	pace := func(ctx context.Context) error { return left }
	o := raid.ReplaceOptions{RebuildOptions: raid.RebuildOptions{Pace: pace}}
	if err := r.array.Replace(ctx, 2, fresh.Disks[0].Port("A"), o); !errors.Is(err, left) {
		t.Fatalf("replace: %v", err)
	}
	if r.member(2) != raid.Restoring {
		t.Fatalf("member 2 is %s", r.member(2))
	}
	r.disks.Disks[2] = fresh.Disks[0]
	r.drain()
	r.stop()
	release()
	r.open()
	eventually(t, "the member is online", func() bool { return r.member(2) == raid.Online })
	mustEqual(t, "after the copy", read(t, r.device("v"), 0, len(want)), want)

	before := r.Status().CapacityBytes
	if err := r.array.BeginGrow(ctx, []raid.Drive{fresh.Disks[1].Port("A"), fresh.Disks[2].Port("A")}, raid.GrowOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the pool has grown", func() bool { return r.Status().CapacityBytes > before })
	if r.array.GrowStatus().Growing {
		t.Fatal("the pool grew before the array")
	}
	mustEqual(t, "after the growth", read(t, r.device("v"), 0, len(want)), want)
}
