package nvram

import (
	"bytes"
	"errors"
	"flag"
	"hash/crc32"
	"os"
	"path/filepath"
	"testing"
)

var update = flag.Bool("update", false, "write the golden files")

// golden compares b with testdata/name: the bytes on media of this version, for ever.
func golden(t *testing.T, name string, b []byte) []byte {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b, want) {
		t.Fatalf("%s: the bytes that this build writes differ", name)
	}
	return want
}

// old is what an earlier version wrote.
func old(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

const goldenArea = 1 << 20

func goldenSuper() super {
	id := ID{0xde, 0xad, 15: 1}
	return super{
		seq: 7, id: id, epoch: 3, run: 5, runLSN: 1000, bytes: [lanes]uint64{80 * BlockBytes, 40 * BlockBytes},
		tail:  [lanes]Position{{900, 16 * BlockBytes, 400}, {950, 90 * BlockBytes, 401}},
		acked: 999, ackedSeq: [lanes]uint64{450, 451}, mirror: true, incomplt: true,
	}
}

func TestGoldenSuper(t *testing.T) {
	s := goldenSuper()
	b := AlignedBlocks(1)
	s.encode(b)
	b = golden(t, "superblock-2", b)
	if got, err := decodeSuper(b, goldenArea); err != nil || got != s {
		t.Fatalf("%+v, %v", got, err)
	}
	for i := range b {
		b[i] ^= 1
		if _, err := decodeSuper(b, goldenArea); !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrForeign) {
			t.Fatalf("byte %d changed: %v", i, err)
		}
		b[i] ^= 1
	}
	s.of, s.regionBytes = Identity{"shelf-1", 'B'}, 2*goldenArea
	s.encode(b)
	if got, err := decodeSuper(golden(t, "superblock-2-identity", b), goldenArea); err != nil || got != s {
		t.Fatalf("%+v, %v", got, err)
	}
	if got, err := decodeSuper(old(t, "superblock-1-identity"), goldenArea); err != nil || got != s {
		t.Fatalf("version 1: %+v, %v", got, err)
	}
	if got, err := decodeSuper(old(t, "superblock-1"), goldenArea); err != nil || got != goldenSuper() {
		t.Fatalf("version 1: %+v, %v", got, err)
	}
	if _, err := decodeSuper(b, 100*BlockBytes); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("a log larger than its area: %v", err)
	}
}

func goldenRecord() (header, []byte) {
	payload := bytes.Repeat([]byte("ledge"), 3*BlockBytes/5+1)[:3*BlockBytes]
	q := []*request{
		{sets: []Set{{Kind: 0, Extents: []Extent{{LUN: 1, LBA: 2, Blocks: 1}, {LUN: 3, LBA: 4, Blocks: 5, Zero: true}}, Payload: [][]byte{payload[:BlockBytes]}}}},
		{sets: []Set{{Kind: 7}, {Kind: 1, Extents: []Extent{{LUN: 0xffffffff, LBA: 1 << 60, Blocks: 2}}, Payload: [][]byte{payload[BlockBytes : BlockBytes+10], payload[BlockBytes+10:]}}}},
	}
	h := header{lsn: 77, seq: 5, id: ID{0xde, 0xad}, epoch: 3, run: 4, acked: 70, blocks: 4, headerBlocks: 1, sets: 3, extents: 3}
	b := AlignedBlocks(4)
	h.build(b, q)
	return h, b
}

func TestGoldenRecord(t *testing.T) {
	_, b := goldenRecord()
	checkGoldenRecord(t, golden(t, "record-2", b), false)
	checkGoldenRecord(t, old(t, "record-1"), true)
}

func checkGoldenRecord(t *testing.T, b []byte, old bool) {
	t.Helper()
	want, _ := goldenRecord()
	h, err := decodeRecord(b)
	if want.old, want.sum = old, h.sum; err != nil || h != want {
		t.Fatalf("%+v, %v", h, err)
	}
	sets := 0
	err = h.walk(b, func(s Set) error {
		sets++
		if s.Kind == 1 && (len(s.Payload[0]) != 2*BlockBytes || s.Extents[0].LBA != 1<<60) {
			t.Errorf("%+v", s.Extents)
		}
		return nil
	})
	if sets != 3 || err != nil {
		t.Fatal(sets, err)
	}
	for i := 0; i < len(b); i += 3 {
		b[i] ^= 0x80
		if _, err := decodeRecord(b); !errors.Is(err, ErrCorrupt) {
			t.Fatalf("byte %d changed: %v", i, err)
		}
		b[i] ^= 0x80
	}
}

// A record whose payload is in part what was there before is torn, whatever the payload is: also where each block ends in its
// own CRC-32C, which makes a CRC-32C over all of them blind to what they hold.
func TestTornRecord(t *testing.T) {
	build := func(fill byte) []byte {
		p := AlignedBlocks(2)
		for i := range 2 {
			b := p[i*BlockBytes : (i+1)*BlockBytes]
			copy(b, bytes.Repeat([]byte{fill, fill ^ byte(i)}, BlockBytes/2))
			le.PutUint32(b[BlockBytes-4:], crc32.Checksum(b[:BlockBytes-4], castagnoli))
		}
		h := header{lsn: 77, seq: 5, id: ID{1}, epoch: 3, run: 4, acked: 70, blocks: 3, headerBlocks: 1, sets: 1, extents: 1}
		b := AlignedBlocks(3)
		h.build(b, []*request{{sets: []Set{{Extents: []Extent{{LUN: 1, LBA: 2, Blocks: 2}}, Payload: [][]byte{p}}}}})
		return b
	}
	one, two := build(1), build(2)
	if crc32.Checksum(one[BlockBytes:], castagnoli) != crc32.Checksum(two[BlockBytes:], castagnoli) {
		t.Fatal("they are no such blocks")
	}
	for mixed := range 1 << 3 {
		b := bytes.Clone(two)
		for i := range 3 {
			if mixed>>i&1 == 0 {
				copy(b[i*BlockBytes:(i+1)*BlockBytes], one[i*BlockBytes:])
			}
		}
		if _, err := decodeRecord(b); (err == nil) != (mixed == 0 || mixed == 7) {
			t.Errorf("blocks %03b of the one, others of the other: %v", mixed, err)
		}
	}
}

// FuzzRecord: any bytes are a record or ErrCorrupt. The checksum is made right, so that what is behind it is reached.
func FuzzRecord(f *testing.F) {
	_, b := goldenRecord()
	f.Add(b[:200], uint8(4), true)
	f.Add(b[:recordFixed], uint8(1), false)
	f.Fuzz(func(t *testing.T, p []byte, blocks uint8, seal bool) {
		b := make([]byte, int(blocks%6)*BlockBytes)
		copy(b, p)
		if seal && len(b) > 0 {
			le.PutUint32(b[12:], checksum(b))
			if le.Uint16(b[8:]) == recordVersion {
				le.PutUint64(b[recordSumAt:], recordSum(b))
			}
		}
		h, err := decodeRecord(b)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		if err := h.walk(b, func(Set) error { return nil }); err != nil {
			t.Fatalf("accepted, then: %v", err)
		}
	})
}

// FuzzSuper: any block is a superblock or a known error.
func FuzzSuper(f *testing.F) {
	s := goldenSuper()
	b := AlignedBlocks(1)
	s.encode(b)
	f.Add(b[:160])
	f.Fuzz(func(t *testing.T, p []byte) {
		b := AlignedBlocks(1)
		copy(b, p)
		if !allZero(b) {
			le.PutUint32(b[12:], checksum(b))
		}
		s, err := decodeSuper(b, goldenArea)
		switch {
		case err == nil:
			if s.check(goldenArea) != nil {
				t.Fatal("accepted, but not consistent")
			}
		case !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrForeign) && !errors.Is(err, ErrEmpty):
			t.Fatal(err)
		}
	})
}
