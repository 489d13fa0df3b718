package raid_test

import (
	"errors"
	"slices"
	"testing"

	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/raid/raidtest"
)

// Members are known by label: shuffled, some absent, a blank and a foreign drive among them.
func TestOpenByLabel(t *testing.T) {
	b := newBed(t, 6, raid.Options{K: 3, M: 2}, 5)
	b.fillAll()
	must(t, b.a.Flush(ctx))
	other := newBed(t, 6, raid.Options{K: 3, M: 2, Random: deterministic(2)}, 5)
	drives := b.set.Drives("A")
	drives[2] = nil
	drives = append(drives, other.set.Disks[0].Port("A"), raidtest.NewSet(1, 1, driveBytes(5)).Disks[0].Port("A"))
	slices.Reverse(drives)
	a, err := raid.Open(ctx, drives, raid.Options{Pool: b.a.Label().Pool})
	must(t, err)
	b.adopt(a)
	b.checkAll()
	st := a.Status()
	if st.Members[2].State != raid.Missing || st.Members[0].Path != "A:disk0" || len(st.Refused) != 2 {
		t.Fatalf("%+v", st)
	}
	wantErr(t, st.Refused[0].Err, raid.ErrBlank)
	wantErr(t, st.Refused[1].Err, raid.ErrForeign)
}

func TestOpenRefuses(t *testing.T) {
	b := newBed(t, 6, raid.Options{K: 3, M: 2}, 5)
	b.fillAll()
	must(t, b.a.Flush(ctx))
	open := func(drives []raid.Drive, o raid.Options) error {
		a, err := raid.Open(ctx, drives, o)
		if err == nil {
			a.Close()
		}
		return err
	}
	drives := func() []raid.Drive { return b.set.Drives("A") }
	wantErr(t, open(nil, raid.Options{}), raid.ErrBlank)
	wantErr(t, open(raidtest.NewSet(1, 6, driveBytes(5)).Drives("A"), raid.Options{}), raid.ErrBlank)
	wantErr(t, open(drives()[:3], raid.Options{}), raid.ErrNoMajority)
	wantErr(t, open(drives(), raid.Options{Pool: raid.UUID{1}}), raid.ErrForeign)
	for _, d := range b.set.Disks {
		d.Rot(20)
		d.Rot(4096 + 20)
	}
	wantErr(t, open(drives(), raid.Options{}), raid.ErrNoMajority)
}

// One rotten or torn label slot is covered by the other; the array loses nothing.
func TestRottenLabelSlot(t *testing.T) {
	b := newBed(t, 6, raid.Options{K: 3, M: 2}, 5)
	b.fillAll()
	must(t, b.a.WriteLabel(ctx, func(l *raid.Label) { l.Epoch, l.Owner = 3, 'A' }))
	must(t, b.a.Flush(ctx))
	slot := int64(b.a.Label().Seq % 2 * 4096)
	b.set.Disks[0].Rot(slot + 100)
	b.set.Disks[1].Rot(slot + 100)
	b.cold()
	if l := b.a.Label(); l.Epoch != 3 || l.Owner != 'A' || len(b.a.Status().Refused) != 0 {
		t.Fatalf("%+v", l)
	}
	b.checkAll()
}

// Drives that claim what others are: a copy with an older label is refused, equal copies are all refused.
func TestDuplicates(t *testing.T) {
	b := newBed(t, 6, raid.Options{K: 3, M: 2}, 5)
	b.fillAll()
	must(t, b.a.Flush(ctx))
	twin := b.set.Disks[1].Clone()
	a, err := raid.Open(ctx, append(b.set.Drives("A"), twin.Port("twin")), raid.Options{})
	must(t, err)
	if st := a.Status(); len(st.Refused) != 2 || st.Members[1].State != raid.Missing {
		t.Fatalf("%+v", st)
	}
	wantErr(t, a.Status().Refused[0].Err, raid.ErrDuplicate)
	must(t, b.a.WriteLabel(ctx, func(l *raid.Label) {}))
	a, err = raid.Open(ctx, append([]raid.Drive{twin.Port("twin")}, b.set.Drives("A")...), raid.Options{})
	must(t, err)
	if st := a.Status(); len(st.Refused) != 1 || st.Refused[0].Path != "twin:disk1" || st.Members[1].State != raid.Online {
		t.Fatalf("%+v", st)
	}
	wantErr(t, a.Status().Refused[0].Err, raid.ErrDuplicate)
}

func TestCreateRefuses(t *testing.T) {
	set := raidtest.NewSet(1, 6, driveBytes(5))
	p := make([]byte, 4096)
	p[4000] = 1
	_, err := set.Drives("A")[4].WriteAt(p, 8192)
	must(t, err)
	_, err = raid.Create(ctx, set.Drives("A"), raid.Options{K: 3, M: 2})
	wantErr(t, err, raid.ErrNotBlank)
	for i, d := range set.Disks {
		if d.Stats().Writes != 0 && i != 4 {
			t.Fatal("a refused Create wrote")
		}
	}
	a, err := raid.Create(ctx, set.Drives("A"), raid.Options{K: 3, M: 2, Force: true})
	must(t, err)
	must(t, a.Close())
	_, err = raid.Create(ctx, set.Drives("A")[:5], raid.Options{K: 3, M: 2})
	wantErr(t, err, raid.ErrNotBlank)
	_, err = raid.Create(ctx, set.Drives("A")[:4], raid.Options{K: 3, M: 2, Force: true})
	if err == nil {
		t.Fatal("four members for 3+2")
	}
	_, err = raid.Create(ctx, raidtest.NewSet(1, 6, 1<<20+4096).Drives("A"), raid.Options{K: 3, M: 2})
	wantErr(t, err, raid.ErrSize)
	small := b6(t)
	small.a.Close()
	d := small.set.Drives("A")
	d[3] = shrunk{d[3]}
	a, err = raid.Open(ctx, d, raid.Options{})
	must(t, err)
	defer a.Close()
	wantErr(t, a.Status().Refused[0].Err, raid.ErrSize)
}

func b6(t *testing.T) *bed { return newBed(t, 6, raid.Options{K: 3, M: 2}, 5) }

type shrunk struct{ raid.Drive }

func (s shrunk) Size() int64 { return s.Drive.Size() - 4096 }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A power cut inside a label write at every subset of members: what is read afterwards is the old label or the new one,
// and once a later write succeeded, that one for ever.
func TestLabelPowerCut(t *testing.T) {
	for state := range 1 << 6 {
		b := b6(t)
		must(t, b.a.WriteLabel(ctx, func(l *raid.Label) { l.Epoch, l.SoloLSN = 1, 10 }))
		for i, d := range b.set.Disks {
			v := []raidtest.Verdict{raidtest.Land, raidtest.Tear}[state>>i&1]
			d.OnWrite(func(raidtest.Write) raidtest.Verdict { return v })
		}
		must(t, b.a.WriteLabel(ctx, func(l *raid.Label) { l.Flags, l.SoloLSN = raid.FlagSolo, 20 }))
		for _, d := range b.set.Disks {
			d.OnWrite(nil)
		}
		b.cold()
		l := b.a.Label()
		if !(l.SoloLSN == 10 && !l.Solo()) && !(l.SoloLSN == 20 && l.Solo()) || l.Epoch != 1 {
			t.Fatalf("state %06b: %+v", state, l)
		}
		must(t, b.a.WriteLabel(ctx, func(l *raid.Label) { l.SoloLSN = 30 }))
		b.cold(state%6, (state+1)%6)
		if l := b.a.Label(); l.SoloLSN != 30 {
			t.Fatalf("state %06b: %+v", state, l)
		}
		b.a.Close()
	}
}

// Without a majority nothing is written, and writing stops.
func TestLabelNoMajority(t *testing.T) {
	b := b6(t)
	b.fillAll()
	for _, i := range []int{0, 2, 4} {
		d := b.set.Disks[i]
		d.OnWrite(func(raidtest.Write) raidtest.Verdict { return raidtest.Fail })
	}
	wantErr(t, b.a.WriteLabel(ctx, func(l *raid.Label) { l.Epoch = 9 }), raid.ErrNoMajority)
	wantErr(t, b.a.Flush(ctx), raid.ErrNoMajority)
	wantErr(t, b.a.Err(), raid.ErrNoMajority)
	b.checkAll()
}

// An owner that was overtaken finds the higher epoch before it writes a label, and writes nothing more.
func TestStaleEpoch(t *testing.T) {
	b := b6(t)
	b.fillAll()
	must(t, b.a.WriteLabel(ctx, func(l *raid.Label) { l.Epoch, l.Owner = 4, 'A' }))
	a2, err := raid.Open(ctx, b.set.Drives("B"), raid.Options{})
	must(t, err)
	defer a2.Close()
	must(t, a2.WriteLabel(ctx, func(l *raid.Label) { l.Epoch, l.Owner = 5, 'B' }))
	wantErr(t, b.a.WriteLabel(ctx, func(l *raid.Label) { l.Flags |= raid.FlagSolo }), raid.ErrStaleEpoch)
	wantErr(t, b.a.Flush(ctx), raid.ErrStaleEpoch)
	if err := a2.WriteLabel(ctx, func(l *raid.Label) { l.Epoch = 3 }); !errors.Is(err, raid.ErrStaleEpoch) {
		t.Fatal(err)
	}
	l, err := b.a.ReadLabel(ctx)
	if err != nil || l.Owner != 'B' || l.Epoch != 5 || l.Solo() {
		t.Fatalf("%+v %v", l, err)
	}
	must(t, a2.Flush(ctx))
}

// Takeover: the partner preempts; the old owner's writes fail on every member, at once, and no byte of them is read.
func TestFencing(t *testing.T) {
	b := b6(t)
	must(t, b.a.Acquire(ctx, 0xA))
	b.fillAll()
	must(t, b.a.Flush(ctx))
	a2, err := raid.Open(ctx, b.set.Drives("B"), raid.Options{})
	must(t, err)
	defer a2.Close()
	wantErr(t, a2.Acquire(ctx, 0xB), raid.ErrReservation)
	if a2.Err() != nil {
		t.Fatalf("a refused Acquire stopped the array: %v", a2.Err())
	}
	keys, holder, err := a2.Keys(ctx)
	if err != nil || holder != 0xA || !slices.Equal(keys, []uint64{0xA}) {
		t.Fatalf("%x %x %v", keys, holder, err)
	}
	s, err := raid.ReadLabels(ctx, b.set.Drives("B"), raid.UUID{})
	if err != nil || s.Holder != 0xA || s.HolderMembers != 6 || s.Members != 6 {
		t.Fatalf("%+v %v", s, err)
	}
	u, _ := b.prepare(1, 3)
	b.set.Disks[5].Die() // cannot be fenced
	must(t, a2.Preempt(ctx, 0xB))
	b.set.Disks[5].Revive()
	wantErr(t, b.a.Apply(ctx, u), raid.ErrReservation)
	b.gen++
	wantErr(t, b.a.WriteStripe(ctx, 0, b.gen, [][]byte{b.random(b.blocks())}), raid.ErrReservation)
	wantErr(t, b.a.WriteLabel(ctx, func(l *raid.Label) {}), raid.ErrReservation)
	if st := b.a.Status(); st.State != raid.Fenced {
		t.Fatalf("%+v", st)
	}
	old := b.a
	b.a = a2
	b.checkAll()
	b.fillAll()
	if f := a2.Label().Failed; f != 1<<5 {
		t.Fatalf("the member that was not fenced is not failed: %b", f)
	}
	b.checkAll()
	b.scrubClean()
	must(t, a2.Release(ctx, 0xB))
	if keys, holder, err := a2.Keys(ctx); err != nil || holder != 0 || len(keys) != 0 {
		t.Fatalf("%x %x %v", keys, holder, err)
	}
	old.Close()
}

// Read-only: a standby's look writes nothing, not even a repair.
func TestReadOnly(t *testing.T) {
	b := b6(t)
	b.fillAll()
	must(t, b.a.Flush(ctx))
	b.a.Close()
	b.open(raid.Options{ReadOnly: true}, 4)
	writes := func() (n uint64) {
		for _, d := range b.set.Disks {
			n += d.Stats().Writes
		}
		return n
	}
	d, off := b.where(0, 1, 3)
	d.Rot(off)
	before := writes()
	b.checkAll()
	wantErr(t, b.a.WriteLabel(ctx, func(l *raid.Label) {}), raid.ErrReadOnly)
	wantErr(t, b.a.WriteStripe(ctx, 0, 1000, [][]byte{b.random(b.blocks())}), raid.ErrReadOnly)
	if writes() != before {
		t.Fatal("written")
	}
}

func TestArguments(t *testing.T) {
	b := b6(t)
	b.fill(0)
	blk := make([]byte, 4096)
	_, err := b.read(b.geo.Stripes, 0, 1)
	wantErr(t, err, raid.ErrRange)
	_, err = b.read(0, b.blocks()-1, 2)
	wantErr(t, err, raid.ErrRange)
	wantErr(t, b.a.Read(ctx, 0, 0, [][]byte{blk[:512]}), raid.ErrRange)
	wantErr(t, b.a.WriteStripe(ctx, 0, 9, [][]byte{blk}), raid.ErrRange)
	_, err = b.a.PrepareUpdate(ctx, 0, 9, []raid.BlockWrite{{Block: 1, Data: blk}, {Block: 1, Data: blk}})
	wantErr(t, err, raid.ErrRange)
	_, err = b.a.PrepareUpdate(ctx, 0, b.gen, []raid.BlockWrite{{Block: 1, Data: blk}})
	wantErr(t, err, raid.ErrGeneration)
	_, err = b.a.PrepareUpdate(ctx, 1, 100, []raid.BlockWrite{{Block: 1, Data: blk}})
	wantErr(t, err, raid.ErrUnrecoverable) // never written
	r, err := b.a.Scrub(ctx, 1)
	if err != nil || !r.Unwritten {
		t.Fatalf("%+v %v", r, err)
	}
	b.a.Close()
	_, err = b.read(0, 0, 1)
	wantErr(t, err, raid.ErrClosed)
}
