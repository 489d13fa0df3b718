package shelf_test

import (
	"context"
	"errors"
	"testing"

	"github.com/ledge-storage/ledge/firmware/shelf"
	"github.com/ledge-storage/ledge/target"
)

// TestManage: names and the warning threshold change durably: they are there after a power cut, from the log, and
// after another, from the members.
func TestManage(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 4<<20, shelf.Options{})
	d := r.lun("a", shelf.KindPlain, extentBytes, 4096)
	r.lun("b", shelf.KindPlain, extentBytes, 4096)
	write(t, d, 0, pattern(1, 4*kib))
	uuid := d.Info().UUID
	if got := r.WarnPercent(); got != 90 {
		t.Fatalf("a new pool warns at %d %%", got)
	}
	for _, c := range []struct {
		from, to string
		want     error
	}{{"none", "x", shelf.ErrNotFound}, {"a", "b", shelf.ErrExists}, {"a", "", shelf.ErrName}, {"a", "x y", shelf.ErrName}, {"a", "a", nil}, {"a", "c", nil}} {
		if err := r.RenameLUN(ctx, c.from, c.to); !errors.Is(err, c.want) {
			t.Errorf("rename %s to %s: %v, want %v", c.from, c.to, err, c.want)
		}
	}
	for percent, want := range map[int]error{0: shelf.ErrSize, 101: shelf.ErrSize, -1: shelf.ErrSize, 75: nil} {
		if err := r.SetWarnPercent(ctx, percent); !errors.Is(err, want) {
			t.Errorf("warning at %d %%: %v, want %v", percent, err, want)
		}
	}
	check := func(when string) {
		t.Helper()
		d := r.device("c")
		if _, ok := r.LUN("a"); ok || d.Info().UUID != uuid {
			t.Fatalf("%s: the LUN has its old name, or is another", when)
		}
		mustEqual(t, when, read(t, d, 0, 4*kib), pattern(1, 4*kib))
		s := d.(target.Provisioned).Space()
		if got := r.WarnPercent(); got != 75 || s.ThresholdBytes != uint64(r.Status().CapacityBytes)/4 {
			t.Fatalf("%s: warns at %d %%, below %d bytes of %d", when, got, s.ThresholdBytes, r.Status().CapacityBytes)
		}
	}
	check("at once")
	r.cut()
	r.open()
	check("after a power cut")
	r.drain()
	r.cut()
	r.open()
	check("from the members")
}
