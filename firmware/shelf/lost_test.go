package shelf_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/ledge-storage/ledge/firmware/shelf"
	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/nvram/nvramtest"
	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/raid/raidtest"
	"github.com/ledge-storage/ledge/target"
)

const stripBlocks = raid.StripBlocks

// strip is where a strip of a stripe lies.
type strip struct {
	disk  *raidtest.Disk
	index int
	off   int64 // of its checksum block
}

func (s strip) rot(c int) { s.disk.Rot(s.off + int64(1+c)*raid.BlockBytes + 99) }

// whole makes the strip bad as a whole.
func (s strip) whole() { s.disk.Rot(s.off + 99) }

// strips finds a stripe on the members by what its checksum blocks say (raid/checksum.go).
func (r *rig) strips(stripe uint64) map[int]strip {
	found := map[int]strip{}
	for i, d := range r.disks.Disks {
		for n, b := range d.Snapshot() {
			if string(b[:8]) == "LEDGESUM" && binary.LittleEndian.Uint64(b[32:]) == stripe {
				found[int(b[10])] = strip{d, i, n * raid.BlockBytes}
			}
		}
	}
	if len(found) != 4 {
		r.t.Fatalf("stripe %d: %d strips found", stripe, len(found))
	}
	return found
}

// stripeOf is the stripe with a block of that content.
func (r *rig) stripeOf(content []byte) uint64 {
	for _, d := range r.disks.Disks {
		s := d.Snapshot()
		for n, b := range s {
			if bytes.Equal(b, content) {
				first := (n*raid.BlockBytes-raid.DataOffset)/raid.SlotBytes*raid.SlotBytes + raid.DataOffset
				return binary.LittleEndian.Uint64(s[first/raid.BlockBytes][32:])
			}
		}
	}
	r.t.Fatal("no member has the block")
	return 0
}

// lossAt expects a read of n blocks to fail at block, and to be the error that initiators understand.
func lossAt(t *testing.T, d target.Device, lba uint64, n int, block uint64) {
	t.Helper()
	var me *target.MediumError
	err := d.Read(ctx, lba, [][]byte{make([]byte, n*int(d.Info().BlockBytes))})
	if !errors.Is(err, target.ErrMediumRead) || !errors.As(err, &me) || me.LBA != block {
		t.Fatalf("read of %d blocks at %d: %v, want a medium error at %d", n, lba, err, block)
	}
}

// lossRig has a LUN with one destaged stripe, want, of which blocks 5, 9 and 32+5 are lost. Block 9 of the second strip
// is good: parity mends one strip of two there.
func lossRig(t *testing.T, o shelf.Options) (r *rig, want []byte, lost map[int]bool) {
	r = newRig(t, 4<<20, o)
	d := r.lun("v", shelf.KindPlain, 8*extentBytes, 4096)
	want = pattern(1, stripeBlocks*4*kib)
	write(t, d, extentBlocks, want)
	r.drain()
	at := r.strips(r.stripeOf(want[:4*kib]))
	at[0].rot(5)
	at[1].rot(5)
	at[2].rot(5)
	at[0].rot(9)
	at[2].rot(9)
	at[3].rot(9)
	at[1].rot(20)
	return r, want, map[int]bool{5: true, stripBlocks + 5: true, 9: true}
}

// checkLoss reads each block of the stripe.
func checkLoss(t *testing.T, d target.Device, want []byte, lost map[int]bool) {
	t.Helper()
	for b := range stripeBlocks {
		lba := uint64(extentBlocks + b)
		if lost[b] {
			lossAt(t, d, lba, 1, lba)
			continue
		}
		mustEqual(t, "block beside lost ones", read(t, d, lba, 4*kib), want[b*4*kib:(b+1)*4*kib])
	}
	if len(lost) > 0 {
		lossAt(t, d, extentBlocks, stripeBlocks, extentBlocks+uint64(slices.Min(slices.Collect(maps.Keys(lost)))))
	}
}

// A stripe beyond parity is written: exactly what cannot be had reads as an error, by its address; the log moves on; what
// is written again is well; and so it is after a cut.
func TestLostBlocks(t *testing.T) {
	for _, background := range []bool{false, true} {
		r, want, lost := lossRig(t, shelf.Options{IdleAfter: -1, Inline: !background})
		d := r.device("v")
		checkLoss(t, d, want, lost) // before it is written
		patch := pattern(2, 4*kib)
		write(t, d, extentBlocks+5, patch)
		copy(want[5*4*kib:], patch)
		delete(lost, 5)
		for i := range 600 { // more than the log holds: the tail must pass the stripe
			write(t, d, uint64(4*extentBlocks+i*5%(3*extentBlocks)), pattern(uint64(i), 16*kib))
		}
		if s := r.Status().Counters; s.StuckStripes != 0 || s.GivenUp != 1 || s.LostBlocks != 2 {
			t.Fatalf("counters: %+v", s)
		}
		checkLoss(t, d, want, lost)
		r.cut()
		r.open()
		d = r.device("v")
		checkLoss(t, d, want, lost)
		r.drain()
		checkLoss(t, d, want, lost)
		if res, err := r.array.Scrub(ctx, r.stripeOf(want[:4*kib])); err != nil || res.Lost != 2 || res.Bad != 0 {
			t.Fatalf("scrub: %+v, %v", res, err)
		}
		for b := range lost {
			copy(want[b*4*kib:], pattern(uint64(b), 4*kib))
			write(t, d, extentBlocks+uint64(b), pattern(uint64(b), 4*kib))
		}
		checkLoss(t, d, want, nil)
		r.drain()
		checkLoss(t, d, want, nil)
		r.stop()
	}
}

// On a LUN of 512-byte sectors the address is the sector's.
func TestLostSectors(t *testing.T) {
	r := newRig(t, 4<<20, shelf.Options{IdleAfter: -1})
	d := r.lun("v", shelf.KindPlain, extentBytes, 512)
	want := pattern(1, stripeBlocks*4*kib)
	write(t, d, 0, want)
	r.drain()
	at := r.strips(r.stripeOf(want[:4*kib]))
	for i := range 3 {
		at[i].rot(5)
	}
	lossAt(t, d, 0, 512, 40)
	lossAt(t, d, 43, 1, 43)
	lossAt(t, d, 36, 6, 40)
	lossAt(t, d, 48, 400, 37*8)
	// A part of a lost block cannot be written: the rest of it is not known.
	if err := d.Write(ctx, 41, [][]byte{make([]byte, 512)}, false); !errors.Is(err, target.ErrMediumRead) {
		t.Fatalf("write of a sector of a lost block: %v", err)
	}
	write(t, d, 40, want[40*512:48*512])
	mustEqual(t, "written again", read(t, d, 36, 12*512), want[36*512:48*512])
}

// Strips on failed members may come back with their members: they are waited for, until the log is needed.
func TestLossWaitsForFailedMembers(t *testing.T) {
	for _, ordered := range []bool{false, true} {
		r := newRig(t, 4<<20, shelf.Options{IdleAfter: -1})
		d := r.lun("v", shelf.KindPlain, 8*extentBytes, 4096)
		want := pattern(1, stripeBlocks*4*kib)
		write(t, d, extentBlocks, want)
		r.drain()
		at := r.strips(r.stripeOf(want[:4*kib]))
		at[0].disk.Die()
		at[3].disk.Die()
		for c := range 8 {
			at[1].rot(c)
		}
		write(t, d, extentBlocks+7, want[:4*kib])
		for i := range 200 {
			write(t, d, uint64(4*extentBlocks+i), pattern(uint64(i), 4*kib))
		}
		for r.RoundIdle(t) { // destages what it can, because nobody writes
		}
		if err := r.Drain(ctx); !errors.Is(err, raid.ErrUnrecoverable) {
			t.Fatalf("drain: %v", err)
		}
		if s := r.Status(); s.Counters.StuckStripes != 1 || s.Counters.GivenUp != 0 {
			t.Fatalf("counters: %+v", s.Counters)
		}
		if ordered {
			if n, err := r.GiveUp(ctx); n != 15 || err != nil {
				t.Fatalf("gave up %d blocks, %v", n, err)
			}
		} else {
			for i := range 600 {
				write(t, d, uint64(4*extentBlocks+i*5%(3*extentBlocks)), pattern(uint64(i), 16*kib))
			}
		}
		if s := r.Status(); s.Counters.StuckStripes != 0 || s.Counters.GivenUp != 1 || s.Counters.LostBlocks != 15 {
			t.Fatalf("counters: %+v", s.Counters)
		}
		lossAt(t, d, extentBlocks+6, 8, extentBlocks+6)
		lossAt(t, d, extentBlocks+stripBlocks-1, 8, extentBlocks+stripBlocks)
		mustEqual(t, "the written block", read(t, d, extentBlocks+7, 4*kib), want[:4*kib])
		r.stop()
	}
}

// A takeover destages all that it replayed: with such a stripe too.
func TestLossInTakeover(t *testing.T) {
	r := newRig(t, 4<<20, shelf.Options{IdleAfter: -1})
	d := r.lun("v", shelf.KindPlain, 8*extentBytes, 4096)
	want := pattern(1, stripeBlocks*4*kib)
	write(t, d, extentBlocks, want)
	r.drain()
	r.stop() // the log's trimming is durable: a stripe that is replayed whole loses nothing
	r.open()
	d = r.device("v")
	at := r.strips(r.stripeOf(want[:4*kib]))
	at[0].disk.Die()
	at[2].disk.Die()
	at[1].rot(7)
	copy(want[7*4*kib:], pattern(2, 4*kib))
	write(t, d, extentBlocks+7, pattern(2, 4*kib))
	r.cut()
	old := r.region
	if err := r.openLog(); err != nil {
		t.Fatal(err)
	}
	source := r.log
	defer source.Close()
	r.region = nvramtest.NewRegion(old.Size(), 512, 2)
	if err := nvram.Format(r.region, r.area(), nvram.FormatOptions{ID: nvram.NewID(), Epoch: 1, FirstLSN: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	if err := r.tryOpen(source); err != nil {
		t.Fatal(err)
	}
	r.ReleaseSources()
	if s := r.Status(); s.Counters.GivenUp != 1 || s.Counters.LostBlocks != 1 || s.DirtyBytes != 0 {
		t.Fatalf("status: %+v", s)
	}
	checkLoss(t, r.device("v"), want, map[int]bool{stripBlocks + 7: true})
}

// Metadata is in memory: a stripe of it beyond parity is written whole, and nothing of it is lost. Lost while the pool is
// closed, it is said so.
func TestLostMetadata(t *testing.T) {
	r := newRig(t, 4<<20, shelf.Options{IdleAfter: -1})
	d := r.lun("v", shelf.KindPlain, 8*extentBytes, 4096)
	want := pattern(1, extentBytes)
	write(t, d, 0, want)
	r.drain()
	at := r.strips(0)
	at[1].whole()
	for i := range 4 {
		at[i].rot(2)
		at[i].rot(3)
	}
	r.lun("w", shelf.KindPlain, extentBytes, 4096)
	write(t, d, extentBlocks, want)
	r.drain()
	if s := r.Status().Counters; s.GivenUp != 1 || s.LostBlocks != 0 {
		t.Fatalf("counters: %+v", s)
	}
	r.stop()
	r.open()
	mustEqual(t, "data", read(t, r.device("v"), 0, extentBytes), want)
	r.device("w")
	if res, err := r.array.Scrub(ctx, 0); err != nil || res.Lost != 0 || res.Bad != 0 {
		t.Fatalf("scrub: %+v, %v", res, err)
	}
	at = r.strips(0)
	for i := range 3 {
		at[i].rot(1)
	}
	r.stop()
	err := r.tryOpen()
	if !errors.Is(err, shelf.ErrMetadataLost) || !strings.Contains(err.Error(), "LUN records") || errors.Is(err, shelf.ErrNoPool) {
		t.Fatalf("open: %v", err)
	}
}

// The log is given up, and one checksum block of four is right of the metadata, a parity strip's: records are taken that are right by themselves, and one that is
// torn, or another's, is named as lost.
func TestRecordsByThemselves(t *testing.T) {
	giveUp := func(harm func(at map[int]strip)) (*rig, error) {
		r := newRig(t, 4<<20, shelf.Options{IdleAfter: -1})
		for i, name := range []string{"v", "w"} { // LUN records 1 and 2
			d := r.lun(name, shelf.KindPlain, 4*extentBytes, 4096)
			write(t, d, 0, pattern(uint64(i), 4*kib))
		}
		r.drain()
		r.stop()
		at := r.strips(0)
		for i := range 3 {
			at[i].whole()
		}
		harm(at)
		if err := nvram.Format(r.region, r.area(), nvram.FormatOptions{ID: nvram.NewID(), Epoch: 1}); err != nil {
			t.Fatal(err)
		}
		if err := r.tryOpen(); !errors.Is(err, shelf.ErrMetadataLost) {
			t.Fatalf("the log is new, and nothing was given up: %v", err)
		}
		r.stop()
		r.opts.AcceptOld = true
		return r, r.tryOpen()
	}
	r, err := giveUp(func(map[int]strip) {})
	if err != nil {
		t.Fatal(err)
	}
	for i, name := range []string{"v", "w"} {
		mustEqual(t, name, read(t, r.device(name), 0, 4*kib), pattern(uint64(i), 4*kib))
	}
	r.lun("x", shelf.KindPlain, extentBytes, 4096)
	r.drain()
	if res, err := r.array.Scrub(ctx, 0); err != nil || res.Bad != 0 || res.Lost != 0 {
		t.Errorf("scrub: %+v, %v", res, err)
	}
	if _, err := giveUp(func(at map[int]strip) {
		s := at[0].disk.Snapshot()
		s[(at[0].off+raid.BlockBytes)/raid.BlockBytes] = make([]byte, raid.BlockBytes)
		at[0].disk.Restore(s)
	}); !errors.Is(err, shelf.ErrMetadataLost) || errors.Is(err, shelf.ErrNoPool) {
		t.Errorf("a superblock of zeros: %v", err)
	}
	for what, harm := range map[string]func(at map[int]strip){
		"torn": func(at map[int]strip) { at[0].rot(2) },
		"another's": func(at map[int]strip) {
			s := at[0].disk.Snapshot()
			n := (at[0].off + raid.BlockBytes) / raid.BlockBytes
			s[n+2] = bytes.Clone(s[n+1])
			at[0].disk.Restore(s)
		},
	} {
		if _, err := giveUp(harm); !errors.Is(err, shelf.ErrMetadataLost) || !strings.Contains(err.Error(), "LUN records") {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// The power goes at every write, of the log and of the members, from the first of the marking on: afterwards the same is
// lost as without the cut, and nothing else.
func TestCutInLoss(t *testing.T) {
	first, want, lost := lossRig(t, shelf.Options{IdleAfter: -1, Inline: true})
	first.stop()
	patch := pattern(2, 4*kib)
	copy(want[5*4*kib:], patch)
	delete(lost, 5)
	cuts, whole := 0, 0
	for step := 1; step < 40 || whole < 2; step++ {
		r := &rig{t: t, disks: first.disks.Clone(), region: nvramtest.NewRegion(4<<20, 512, uint64(step)), opts: first.opts, lost: map[int]bool{}}
		r.region.Load(first.region.Bytes())
		r.open()
		d := r.device("v")
		write(t, d, extentBlocks+5, patch)
		var left atomic.Int64
		left.Store(int64(step))
		if step%2 == 0 { // even: a write of a member, odd: one of the region
			left.Store(int64(step / 2))
			for _, disk := range r.disks.Disks {
				disk.OnWrite(func(raidtest.Write) raidtest.Verdict {
					if left.Add(-1) < 0 {
						return raidtest.Fail
					}
					return raidtest.Land
				})
			}
		} else {
			r.region.CutAt(step/2 + 1)
		}
		err := r.Drain(ctx)
		for _, disk := range r.disks.Disks {
			disk.OnWrite(nil)
		}
		if whole++; err != nil {
			cuts++
			whole = 0
		}
		r.cut()
		r.open()
		d = r.device("v")
		checkLoss(t, d, want, lost)
		r.drain()
		checkLoss(t, d, want, lost)
		if s := r.Status().Counters; s.GivenUp > 1 || s.StuckStripes != 0 {
			t.Fatalf("step %d: %+v", step, s)
		}
		r.stop()
	}
	if cuts < 12 {
		t.Fatalf("%d cuts", cuts)
	}
	t.Logf("%d cuts", cuts)
}
