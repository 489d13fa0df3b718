package shelf

import (
	"bytes"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"testing"
)

var update = flag.Bool("update", false, "write the golden files")

// golden are one block of each format, with fixed content.
func golden(t testing.TB) map[string][]byte {
	t.Helper()
	sb, err := layOut(100000, 8, 2, 2048, 1023, 256, 0) // as pools were made at first
	if err != nil {
		t.Fatal(err)
	}
	sr, err := layOut(100000, 8, 2, 2048, 1023, 256, 2046)
	if err != nil {
		t.Fatal(err)
	}
	sr.UUID = [16]byte{1, 2, 4}
	sg := sr
	for _, stripes := range []uint64{150000, 160000} {
		if err := sg.grow(stripes); err != nil {
			t.Fatal(err)
		}
	}
	sb.UUID, sb.GenCeiling = [16]byte{1, 2, 3}, 1<<41+7
	l := lunRecord{ID: 7, UUID: [16]byte{9}, Blocks: 12345, BlockBytes: 512, Kind: KindPlain, State: lunLive, Name: "demo"}
	h := Host{Name: "host1", Initiator: "iqn.2026-11.io.ledge:host1", LUNs: []uint32{7, 9}}
	tab := []extentEntry{{lun: 7, ext: 3, birth: 99, written: 0xff}, {birth: 12}, {lun: 9, ext: 1 << 31, birth: 1 << 42}}
	d := deltaBlock{dataStripe: 17, extentStripes: 8, deltas: []delta{
		{op: opAlloc, extent: 4, lun: 7, ext: 3, birth: 99},
		{op: opWritten, extent: 4, lun: 7, ext: 3, birth: 99, written: 5},
		{op: opFree, extent: 4, lun: 7, ext: 3, birth: 99}}}
	return map[string][]byte{"super": sb.encode(), "super-reservations": sr.encode(), "super-grown": sg.encode(), "lun": l.encode(), "host": encodeHost(h, 1030), "table": encodeTable(tab, 1281), "deltas": d.encode(),
		"reservations": encodeReservation(reservationBlock{lun: 7, part: 1, parts: 3, data: []byte(`"key":1`)}, 1290)}
}

// The formats on media do not change: a block of each is kept, without its zeros at the end.
func TestGolden(t *testing.T) {
	for name, b := range golden(t) {
		path := filepath.Join("testdata", name+".golden")
		if *update {
			os.MkdirAll("testdata", 0o755)
			if err := os.WriteFile(path, bytes.TrimRight(b, "\x00"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(bytes.TrimRight(b, "\x00"), want) {
			t.Errorf("%s: the format on media has changed", name)
		}
	}
}

func TestRoundTrip(t *testing.T) {
	g := golden(t)
	sb, err := decodeSuperblock(g["super"])
	if err != nil || sb.GenCeiling != 1<<41+7 || sb.ExtentStripes != 8 || sb.usable(7) != 256 {
		t.Errorf("superblock: %+v %v", sb, err)
	}
	l, err := decodeLUN(g["lun"], 7)
	if err != nil || l.Name != "demo" || l.Blocks != 12345 {
		t.Errorf("LUN: %+v %v", l, err)
	}
	if _, err := decodeLUN(g["lun"], 8); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a misplaced LUN record: %v", err)
	}
	h, err := decodeHost(g["host"], 1030)
	if err != nil || !reflect.DeepEqual(h.LUNs, []uint32{7, 9}) {
		t.Errorf("host: %+v %v", h, err)
	}
	tab := make([]extentEntry, 3)
	if err := decodeTable(g["table"], 1281, tab); err != nil || tab[2].ext != 1<<31 || tab[1].birth != 12 {
		t.Errorf("table: %+v %v", tab, err)
	}
	if err := decodeTable(g["table"], 1281, tab[:2]); !errors.Is(err, ErrCorrupt) {
		t.Errorf("table of another length: %v", err)
	}
	d, err := decodeDeltas(g["deltas"])
	if err != nil || len(d.deltas) != 3 || d.deltas[1].written != 5 {
		t.Errorf("deltas: %+v %v", d, err)
	}
	r, err := decodeReservation(g["reservations"], 1290)
	if err != nil || r.lun != 7 || r.part != 1 || r.parts != 3 || string(r.data) != `"key":1` {
		t.Errorf("reservations: %+v %v", r, err)
	}
	for name, b := range g {
		for _, at := range []int{0, 5, 9, 13, 20, 100, 4095} {
			bad := bytes.Clone(b)
			bad[at] ^= 4
			if decodeAny(name, bad) == nil {
				t.Errorf("%s: byte %d flipped, and it was taken", name, at)
			}
		}
	}
}

func decodeAny(name string, b []byte) (err error) {
	switch name {
	case "super", "super-reservations", "super-grown":
		_, err = decodeSuperblock(b)
	case "lun":
		_, err = decodeLUN(b, 7)
	case "host":
		_, err = decodeHost(b, 1030)
	case "table":
		err = decodeTable(b, 1281, make([]extentEntry, 3))
	case "deltas":
		_, err = decodeDeltas(b)
	case "reservations":
		_, err = decodeReservation(b, 1290)
	}
	return err
}

// FuzzDecode: decoders take any block, also one whose checksum is right, and answer ErrCorrupt or something that
// encodes to the same bytes where all of them mean something.
func FuzzDecode(f *testing.F) {
	for _, b := range golden(f) {
		f.Add(bytes.TrimRight(b, "\x00"), true)
	}
	f.Fuzz(func(t *testing.T, in []byte, right bool) {
		b := make([]byte, blockBytes)
		copy(b, in)
		for name := range golden(t) {
			if right {
				le.PutUint32(b[8:], blockCRC(b))
			}
			if err := decodeAny(name, b); err != nil && !errors.Is(err, ErrCorrupt) {
				t.Fatalf("%s: %v", name, err)
			}
		}
		if s, err := decodeSuperblock(b); err == nil {
			if got, err := decodeSuperblock(s.encode()); err != nil || got != s {
				t.Fatalf("superblock %+v came back as %+v, %v", s, got, err)
			}
		}
		if d, err := decodeDeltas(b); err == nil {
			if got, err := decodeDeltas(d.encode()); err != nil || !reflect.DeepEqual(got, d) {
				t.Fatalf("deltas %+v came back as %+v, %v", d, got, err)
			}
		}
		if r, err := decodeReservation(b, le.Uint32(b[12:])); err == nil {
			if got, err := decodeReservation(encodeReservation(r, 3), 3); err != nil || !reflect.DeepEqual(got, r) {
				t.Fatalf("reservations %+v came back as %+v, %v", r, got, err)
			}
		}
		if h, err := decodeHost(b, le.Uint32(b[12:])); err == nil {
			if got, err := decodeHost(encodeHost(h, 3), 3); err != nil || !reflect.DeepEqual(got, h) {
				t.Fatalf("host %+v came back as %+v, %v", h, got, err)
			}
		}
	})
}
