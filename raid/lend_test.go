package raid_test

import (
	"bytes"
	"testing"
	"unsafe"

	"github.com/ledge-storage/ledge/raid"
)

// TestFetch: what is lent stays as it was read, whatever is read and written until it is given back: straight, degraded, repaired,
// and where a drive answers late. It lies at whole blocks, behind what dst had.
func TestFetch(t *testing.T) {
	b := newBed(t, 6, raid.Options{K: 3, M: 2}, 10)
	b.fillAll()
	type borrowed struct {
		loan raid.Loan
		lent [][]byte
		want []byte
	}
	var all []*borrowed
	before := []byte("what dst had")
	fetch := func(stripe uint64, block, count int) {
		t.Helper()
		x := &borrowed{want: b.want[stripe][block*raid.BlockBytes:][:count*raid.BlockBytes]}
		var err error
		if x.lent, err = b.a.Fetch(ctx, stripe, block, count, [][]byte{before}, &x.loan); err != nil {
			t.Fatal(err)
		}
		if &x.lent[0][0] != &before[0] {
			t.Fatal("what dst had is gone")
		}
		for _, p := range x.lent[1:] {
			if len(p)%raid.BlockBytes != 0 || uintptr(unsafe.Pointer(&p[0]))%raid.BlockBytes != 0 {
				t.Fatalf("%d bytes at %p", len(p), p)
			}
		}
		all = append(all, x)
	}
	check := func() {
		t.Helper()
		for i, x := range all {
			if !bytes.Equal(bytes.Join(x.lent[1:], nil), x.want) {
				t.Fatalf("loan %d holds something else", i)
			}
		}
	}
	for i, r := range [][2]int{{0, 96}, {5, 1}, {0, 1}, {30, 4}, {31, 34}, {95, 1}, {40, 16}} {
		fetch(uint64(i%3), r[0], r[1])
	}
	check()
	for stripe := range uint64(3) { // the same stripes anew, and many reads beside
		b.update(stripe, 0, 5, 33, 95)
		b.fill(stripe)
	}
	b.checkAll()
	check()
	d, off := b.where(1, 1, 3)
	d.Rot(off)
	b.cold() // rot: read again, computed, repaired
	fetch(1, 0, 96)
	fetch(1, 33, 3)
	b.cold()
	fetch(1, 5, 1) // little of what is read with the checksum block
	fetch(1, 70, 1)
	b.cold(0, 4)
	for stripe := range uint64(3) {
		fetch(stripe, 0, 96)
		fetch(stripe, 7, 5)
	}
	for stripe := range uint64(3) {
		b.fill(stripe)
	}
	b.checkAll()
	check()
	for _, x := range all {
		x.loan.Return()
	}
	var loan raid.Loan
	lent, err := b.a.Fetch(ctx, 0, 96, 1, [][]byte{before}, &loan)
	wantErr(t, err, raid.ErrRange)
	if len(lent) != 1 {
		t.Fatalf("an error, and %d pieces", len(lent))
	}
	loan.Return()
	loan.Return()
}
