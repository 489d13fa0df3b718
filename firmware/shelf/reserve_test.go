package shelf_test

import (
	"errors"
	"testing"

	"github.com/ledge-storage/ledge/firmware/shelf"
	"github.com/ledge-storage/ledge/target"
)

// A plain LUN fills the pool beside an agent's store. The agent can still write its checkpoint, and free what it deleted;
// then there is space for all again. Nothing of a refused write is to be seen.
func TestReserve(t *testing.T) {
	r := newRig(t, 4<<20, shelf.Options{})
	st := r.Status()
	n := int((st.CapacityBytes - st.ReserveBytes) / extentBytes)
	if reserve := st.ReserveBytes / extentBytes; reserve < 1 || reserve > 2 {
		t.Fatalf("a reserve of %d extents of %d", reserve, st.CapacityBytes/extentBytes)
	}
	store := r.lun("h.store", shelf.KindStore, 1000*extentBytes, 4096)
	plain := r.lun("v", shelf.KindPlain, 1000*extentBytes, 4096)
	segment := func(i int) error {
		return store.Write(ctx, uint64(i)*extentBlocks, [][]byte{pattern(uint64(i), extentBytes)}, false)
	}
	for i := range 4 { // the agent's data
		if err := segment(i); err != nil {
			t.Fatal(err)
		}
	}
	for i := range n - 4 {
		write(t, plain, uint64(i)*extentBlocks, pattern(uint64(i), 4*kib))
	}
	refused := pattern(99, 8*kib)
	if err := plain.Write(ctx, 500*extentBlocks, [][]byte{refused}, false); !errors.Is(err, target.ErrNoSpace) {
		t.Fatalf("write to a full pool: %v", err)
	}
	mustEqual(t, "refused write", read(t, plain, 500*extentBlocks, 8*kib), make([]byte, 8*kib))
	space := func(d target.Device) uint64 { return d.(target.Provisioned).Space().AvailableBytes }
	if s := r.Status(); s.State != "full" || space(plain) != 0 || space(store) != uint64(s.ReserveBytes) {
		t.Fatalf("status %+v, plain sees %d, store %d", s, space(plain), space(store))
	}
	write(t, plain, 0, refused) // what is mapped is written as ever
	// The checkpoint, then what it freed.
	if err := segment(10); err != nil {
		t.Fatalf("the agent's checkpoint: %v", err)
	}
	if err := store.Unmap(ctx, []target.Range{{LBA: 0, Blocks: 3 * extentBlocks}}); err != nil {
		t.Fatal(err)
	}
	write(t, plain, 500*extentBlocks, refused)
	mustEqual(t, "after space came back", read(t, plain, 500*extentBlocks, 8*kib), refused)
	// To the last extent, for the store only.
	i := 11
	for ; segment(i) == nil; i++ {
	}
	if err := segment(i); !errors.Is(err, target.ErrNoSpace) {
		t.Fatalf("segment %d: %v", i, err)
	}
	if s := r.Status(); s.AllocatedBytes != s.CapacityBytes {
		t.Fatalf("status: %+v", s)
	}
	r.cut()
	r.open()
	mustEqual(t, "after a cut", read(t, r.device("v"), 500*extentBlocks, 8*kib), refused)
	if err := r.device("v").Write(ctx, 600*extentBlocks, [][]byte{refused}, false); !errors.Is(err, target.ErrNoSpace) {
		t.Fatalf("write to a full pool: %v", err)
	}
}
