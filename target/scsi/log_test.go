package scsi

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/mem"
)

// limited serves a unit of 8 MiB whose pool has 1 MiB, with a threshold of 128 KiB.
func limited(t *testing.T) *Target {
	t.Helper()
	d, err := mem.New(mem.Options{Bytes: 8 << 20, Limit: 1 << 20, Name: "limited"})
	if err != nil {
		t.Fatal(err)
	}
	tgt := NewTarget("iqn.2026-11.io.ledge:test", Options{})
	if err := tgt.Attach(0, d, UnitOptions{}); err != nil {
		t.Fatal(err)
	}
	return tgt
}

func TestLogPages(t *testing.T) {
	n := connect(limited(t), "a", 1)
	run(n, 0, 0, block, wrOne...) // a page of 64 KiB
	thick := NewTarget("iqn.2026-11.io.ledge:thick", Options{})
	if err := thick.Attach(0, plain{}, UnitOptions{}); err != nil {
		t.Fatal(err)
	}
	on := connect(thick, "a", 1)
	sense := func(page, sub, pointer byte) []byte {
		return []byte{0x4D, 0, 0x40 | page, sub, 0, 0, pointer, 1, 0, 0}
	}
	for _, x := range []struct {
		name string
		n    *Nexus
		cdb  []byte
		want []byte // nil: INVALID FIELD IN CDB
	}{
		{"pages", n, sense(0, 0, 0), []byte{0, 0, 0, 3, 0, 0x0C, 0x2F}},
		{"pages and subpages", n, sense(0, 0xFF, 0), []byte{0x40, 0xFF, 0, 8, 0, 0, 0, 0xFF, 0x0C, 0, 0x2F, 0}},
		{"pages of a unit without a pool", on, sense(0, 0, 0), []byte{0, 0, 0, 2, 0, 0x2F}},
		{"provisioning", n, sense(0x0C, 0, 0), []byte{0x0C, 0, 0, 24, 0, 1, 3, 8, 0, 0, 0, 0, 1, 0, 0, 0, 0, 2, 3, 8, 0, 0, 0, 0, 1, 0, 0, 0}},
		{"provisioning from 2", n, sense(0x0C, 0, 2), []byte{0x0C, 0, 0, 12, 0, 2, 3, 8, 0, 0, 0, 0, 1, 0, 0, 0}},
		{"exceptions", n, sense(0x2F, 0, 0), []byte{0x2F, 0, 0, 8, 0, 0, 3, 4, 0, 0, 0xFF, 0}},
		{"exceptions of a standing start", on, []byte{0x4D, 0, 0x6F, 0, 0, 0, 0, 0, 4, 0}, []byte{0x2F, 0, 0, 8}},
		{"provisioning without a pool", on, sense(0x0C, 0, 0), nil},
		{"a pointer beyond", n, sense(0x0C, 0, 3), nil},
		{"temperature", n, sense(0x0D, 0, 0), nil},
		{"a subpage", n, sense(0x2F, 1, 0), nil},
		{"save", n, []byte{0x4D, 1, 0x6F, 0, 0, 0, 0, 1, 0, 0}, nil},
	} {
		r := run(x.n, 0, 256, nil, x.cdb...)
		if x.want == nil {
			if r.code != ascInvalidFieldCDB {
				t.Errorf("%s: %+v", x.name, r)
			}
		} else if r.status != StatusGood || !bytes.Equal(r.data, x.want) {
			t.Errorf("%s: %+v", x.name, r)
		}
	}
}

// plain is a thick unit without a pool.
type plain struct{ target.Device }

func (plain) Info() target.Info { return target.Info{Blocks: 64, BlockBytes: 512} }

// TestThickHasNoUnmap: what is refused is not among the supported commands.
func TestThickHasNoUnmap(t *testing.T) {
	tgt := NewTarget("iqn.2026-11.io.ledge:thick", Options{})
	if err := tgt.Attach(0, plain{}, UnitOptions{}); err != nil {
		t.Fatal(err)
	}
	n := connect(tgt, "a", 1)
	if r := run(n, 0, 0, make([]byte, 8), 0x42, 0, 0, 0, 0, 0, 0, 0, 8, 0); r.code != ascInvalidOpcode {
		t.Errorf("UNMAP: %+v", r)
	}
	if r := run(n, 0, 64, nil, 0xA3, 0x0C, 1, 0x42, 0, 0, 0, 0, 0, 64, 0, 0); r.data[1] != 1 {
		t.Errorf("REPORT SUPPORTED OPERATION CODES % x", r.data)
	}
}

// TestThreshold: everybody learns once that the pool runs low, and once again after it recovered.
func TestThreshold(t *testing.T) {
	tgt := limited(t)
	a, b := connect(tgt, "a", 1), connect(tgt, "b", 1)
	page := make([]byte, 64<<10)
	fill := func(first, last int) {
		t.Helper()
		for i := first; i < last; i++ {
			cdb := []byte{0x2A, 0, 0, 0, 0, 0, 0, 0, 128, 0}
			binary.BigEndian.PutUint32(cdb[2:], uint32(i*128))
			if r := run(a, 0, 0, page, cdb...); r.status != StatusGood {
				t.Fatalf("page %d: %+v", i, r)
			}
		}
	}
	warned := func(want bool) {
		t.Helper()
		for _, n := range []*Nexus{a, b} {
			if r := run(n, 0, 0, nil, tur...); (r.code == uaThinThreshold) != want || r.key == keyUnitAttention != want {
				t.Errorf("%+v, want a warning: %v", r, want)
			}
		}
	}
	fill(0, 14) // 128 KiB are left
	warned(false)
	fill(14, 15)
	warned(true)
	fill(15, 16)
	warned(false)
	list := make([]byte, 24)
	list[1], list[3], list[18] = 22, 16, 4 // 1024 blocks from 0
	if r := run(a, 0, 0, list, 0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0); r.status != StatusGood {
		t.Fatalf("%+v", r)
	}
	warned(false)
	fill(0, 7)
	warned(true)
}

// TestThresholdPages: the mode pages and the provisioning page say what the log page counts in.
func TestThresholdPages(t *testing.T) {
	d, err := mem.New(mem.Options{Bytes: 64 << 20, Limit: 32 << 20, Name: "x"})
	if err != nil {
		t.Fatal(err)
	}
	tgt := NewTarget("iqn.2026-11.io.ledge:test", Options{})
	if err := tgt.Attach(0, d, UnitOptions{}); err != nil {
		t.Fatal(err)
	}
	n := connect(tgt, "a", 1)
	mode := func(page, sub byte) []byte {
		return run(n, 0, 255, nil, 0x1A, 8, page, sub, 255, 0).data
	}
	want := append([]byte{27, 0, 0x10, 0, 0x5C, 2, 0, 20}, make([]byte, 20)...)
	copy(want[20:], []byte{0x80, 1, 0, 0, 0, 0, 0, 4}) // 4 MiB
	if got := mode(0x1C, 2); !bytes.Equal(got, want) {
		t.Errorf("logical block provisioning\n% x, want\n% x", got, want)
	}
	if got := mode(0x01, 0); len(got) != 16 || got[11] != 0x80 {
		t.Errorf("read-write error recovery % x", got)
	}
	if got := mode(0x3F, 0xFF); !bytes.HasSuffix(got, want[4:]) {
		t.Errorf("all pages % x", got)
	}
	if got := run(n, 0, 255, nil, 0x12, 1, 0xB2, 0, 255, 0).data; got[4] != 11 {
		t.Errorf("threshold exponent %d", got[4])
	}
	log := run(n, 0, 256, nil, 0x4D, 0, 0x4C, 0, 0, 0, 0, 1, 0, 0).data
	if got := binary.BigEndian.Uint32(log[8:]); got != 32 {
		t.Errorf("%d threshold sets available", got)
	}
}
