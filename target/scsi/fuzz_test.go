package scsi

import (
	"context"
	"testing"

	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/crypt"
	"github.com/ledge-storage/ledge/target/mem"
)

// FuzzCDB carries out commands of any bytes, with any amount of room and data.
func FuzzCDB(f *testing.F) {
	x := newOpTable()
	for _, o := range x.ops {
		cdb := make([]byte, 16)
		cdb[0] = o.code
		if o.action != noAction {
			cdb[1] = byte(o.action)
		}
		f.Add(cdb, uint32(512), make([]byte, 32))
		for i := 1; i < len(o.usage); i++ {
			cdb[i] |= o.usage[i] & 0x0F
		}
		f.Add(cdb, uint32(1<<20), prList(0, 1, 0))
	}
	tgt, dev := newUnitFor(f, UnitOptions{Reservations: &memory{}})
	tgt.opts.SetPortGroups = func(context.Context, []target.PortGroup) error { return nil }
	inner, err := mem.New(mem.Options{Bytes: 4096 * 8, BlockBytes: 4096, Name: "small"})
	if err != nil {
		f.Fatal(err)
	}
	small, err := crypt.New(inner, &keys{})
	if err != nil {
		f.Fatal(err)
	}
	if err := tgt.Attach(300, small, UnitOptions{AllowSanitize: true}); err != nil {
		f.Fatal(err)
	}
	n := connect(tgt, "a", 1)
	units := []target.Device{dev, dev}
	zero := make([]byte, tokenBytes)
	copy(zero, []byte{0xFF, 0xFF, 0, 1, 0, 0, 1, 0xF8})
	at := target.Range{LBA: 4, Blocks: 4}
	for _, l := range [][]byte{list1(1, units, segment{0, 1, 0, 9, 4}), list4(1, true, units, segment{0, 1, 0, 9, 4}), populateList(0, 0, at), useList(zero, 0, 0, at), useList(populate(f, n, 0, 1, 0, at), 0, 1, at)} {
		for _, action := range []byte{0, 1, 0x10, 0x11} {
			f.Add(tokenCDB(action, 1, l), uint32(0), l)
		}
	}
	f.Add([]byte{0x04, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, uint32(0), []byte{0, 0x8A, 0, 0, 0, 1, 0, 1, 9})
	f.Add([]byte{0xA4, 0x0A, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0}, uint32(0), []byte{0, 0, 0, 0, 1, 0, 0, 1})
	f.Fuzz(func(t *testing.T, cdb []byte, room uint32, out []byte) {
		for _, lun := range []uint64{0, 300, 7} {
			r := run(n, lun, int64(room), out, cdb...)
			if int64(len(r.data)) > int64(room) {
				t.Fatalf("%d bytes in a room of %d", len(r.data), room)
			}
			if r.status == StatusCheckCondition && r.key == 0 && r.code == 0 {
				t.Fatal("CHECK CONDITION without sense data")
			}
			u, _ := n.unit(lun)
			if u == nil {
				continue
			}
			u.copies.stop(func(*copyOp) bool { return true })
			if u.first != nil {
				t.Fatal("a task is left in the task set")
			}
			if len(u.visits) != 0 || len(u.copies.ops) > maxCopyOps || len(u.tokens) > maxUnitTokens {
				t.Fatalf("%d visits, %d copies, %d tokens are left", len(u.visits), len(u.copies.ops), len(u.tokens))
			}
		}
	})
}
