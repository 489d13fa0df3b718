package shelf_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/ledge-storage/ledge/firmware/shelf"
	"github.com/ledge-storage/ledge/target"
)

func (r *rig) reserved(name string) []byte {
	r.t.Helper()
	l, ok := r.LUN(name)
	if !ok {
		r.t.Fatalf("LUN %s is gone", name)
	}
	b, err := l.LoadReservations()
	if err != nil {
		r.t.Fatal(err)
	}
	return b
}

func (r *rig) reserve(name string, state []byte) error {
	r.t.Helper()
	l, ok := r.LUN(name)
	if !ok {
		r.t.Fatalf("LUN %s is gone", name)
	}
	return l.SaveReservations(state)
}

// TestReservationsThroughPowerCuts: whatever the length before and after, what was acknowledged last is there
// after a power cut, or what was under way; never a mixture; also once it was destaged.
func TestReservationsThroughPowerCuts(t *testing.T) {
	lengths := []int{0, 1, 4064, 4065, 9000, 12192, 300}
	for round := range 12 {
		t.Run(fmt.Sprint(round), func(t *testing.T) {
			r := newRig(t, 2<<20, shelf.Options{})
			d := r.lun("v", shelf.KindPlain, 4*extentBytes, 4096)
			r.lun("w", shelf.KindPlain, extentBytes, 4096)
			if err := r.reserve("w", pattern(7, 5000)); err != nil {
				t.Fatal(err)
			}
			rng := rand.New(rand.NewPCG(uint64(round), 9))
			r.region.CutAt(20 + rng.IntN(250))
			var acked, begun []byte
			for v := uint64(1); ; v++ {
				begun = pattern(v, lengths[rng.IntN(len(lengths))])
				if err := r.reserve("v", begun); err != nil {
					break
				}
				acked = begun
				if v%5 == 0 { // so that destage has something to do
					if d.Write(ctx, v%512, [][]byte{pattern(v, 4096)}, false) != nil {
						break
					}
				}
				if v%13 == 0 && r.Drain(ctx) != nil {
					break
				}
			}
			for pass := range 3 {
				r.cut()
				r.open()
				if got := r.reserved("v"); !bytes.Equal(got, acked) && !bytes.Equal(got, begun) {
					t.Fatalf("pass %d: %d bytes, %d were acknowledged and %d begun", pass, len(got), len(acked), len(begun))
				}
				mustEqual(t, "another LUN's reservations", r.reserved("w"), pattern(7, 5000))
				if pass == 1 {
					r.drain()
				}
			}
		})
	}
}

// TestReservationsHaveBounds: no room is an answer and changes nothing; a full pool takes reservations; a deleted
// LUN's are gone with it.
func TestReservationsHaveBounds(t *testing.T) {
	r := newRig(t, 2<<20, shelf.Options{ReservationBlocks: 4})
	d := r.lun("v", shelf.KindPlain, 64*extentBytes, 4096)
	r.lun("w", shelf.KindPlain, extentBytes, 4096)
	lba := uint64(0)
	for ; d.Write(ctx, lba, [][]byte{pattern(1, 4096)}, false) == nil; lba += extentBlocks {
	}
	if err := d.Write(ctx, lba, [][]byte{pattern(1, 4096)}, false); !errors.Is(err, target.ErrNoSpace) {
		t.Fatalf("a full pool: %v", err)
	}
	state := pattern(1, 3*4064)
	if err := r.reserve("v", state); err != nil {
		t.Fatalf("reservations in a full pool: %v", err)
	}
	for _, n := range []int{2 * 4064, 1 << 20} {
		if err := r.reserve("w", make([]byte, n)); !errors.Is(err, target.ErrNoSpace) {
			t.Errorf("%d bytes where one block is left: %v", n, err)
		}
	}
	mustEqual(t, "after the refusals", r.reserved("v"), state)
	if err := r.reserve("w", state[:10]); err != nil {
		t.Error(err)
	}
	l, _ := r.LUN("v")
	if err := r.DeleteLUN(ctx, "v"); err != nil {
		t.Fatal(err)
	}
	if err := l.SaveReservations(state); !errors.Is(err, target.ErrUnavailable) {
		t.Errorf("a deleted LUN is reserved: %v", err)
	}
	eventually(t, "the LUN's id is free", func() bool {
		again, err := r.CreateLUN(ctx, shelf.LUNSpec{Name: "u", Kind: shelf.KindPlain, Bytes: extentBytes})
		if err != nil {
			return false
		}
		if again.ID() != l.ID() && r.DeleteLUN(ctx, "u") != nil {
			t.Fatal("not deleted")
		}
		return again.ID() == l.ID()
	})
	for range 2 {
		if b := r.reserved("u"); len(b) != 0 {
			t.Errorf("a new LUN has the reservations of an old one: %d bytes", len(b))
		}
		r.cut()
		r.open()
	}
	if err := r.reserve("u", state); err != nil {
		t.Errorf("the blocks of a deleted LUN are not free: %v", err)
	}
	r.cut()
	r.open()
	mustEqual(t, "after a power cut", r.reserved("u"), state)
	mustEqual(t, "after a power cut", r.reserved("w"), state[:10])
}
