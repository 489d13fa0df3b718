package raid

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"hash/crc32"
	"os"
	"testing"

	"github.com/zeebo/xxh3"
)

var updateGolden = flag.Bool("update", false, "write golden files")

func golden(t testing.TB, name string, got []byte) []byte {
	t.Helper()
	path := "testdata/" + name
	if *updateGolden && got != nil {
		if err := errors.Join(os.MkdirAll("testdata", 0o755), os.WriteFile(path, got, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != nil && !bytes.Equal(got, want) {
		t.Fatalf("%s: the format changed", name)
	}
	return want
}

func pattern(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i)*3 + byte(i>>8) + seed
	}
	return b
}

func sampleLabel() *Label {
	l := &Label{Pool: UUID{1, 2}, Array: UUID{3, 4}, MemberID: UUID{5}, Member: 7, N: 12, K: 8, M: 2, Spares: 2, Slots: 1000,
		MemberBytes: DataOffset + 1000*SlotBytes, Seq: 77, Failed: 1 << 3, SpareOf: [8]uint8{4}, RebuildMember: 9, RebuildSpare: 1,
		RebuildProgress: 55, Owner: 'B', Epoch: 6, Flags: FlagSolo | FlagReplaying, SoloLSN: 812, NVRAM: UUID{9, 9}, Opaque: []byte("shelf")}
	l.IDs[7] = l.MemberID
	return l
}

func sampleAddress(strip int) address { return address{UUID{3, 4}, 123, strip, 3, 2, 0} }

func sampleUpdate() *Update {
	u := &Update{array: UUID{3, 4}, k: 3, m: 2, stripe: 123, gen: 9, gens: []uint64{9, 4, 5, 9, 9}}
	for _, i := range []int{0, 3, 4} {
		s := updateStrip{strip: i, columns: 1<<2 | 1<<31}
		for c := range s.crcs {
			s.crcs[c] = uint32(i*100 + c)
		}
		for _, c := range []int{2, 31} {
			b := bytes.Repeat([]byte{byte(i), byte(c)}, BlockBytes/2)
			s.blocks = append(s.blocks, b)
			s.crcs[c] = checksumOf(sampleAddress(i), c, b)
		}
		u.strips = append(u.strips, s)
	}
	return u
}

// sampleLoss is sampleUpdate with lost blocks and blocks of zeros.
func sampleLoss() *Update {
	u := sampleUpdate()
	u.losts = []uint32{1 << 2, 0, 1 << 7, 0, 0}
	s := &u.strips[0]
	s.zeros, s.blocks[0] = 1<<2, zeroBlock
	s.crcs[2] = checksumOf(sampleAddress(0), 2, zeroBlock)
	return u
}

// sampleXXH3 is sampleUpdate of an array with the other checksums.
func sampleXXH3() *Update {
	u := sampleUpdate()
	u.sums = ChecksumsXXH3
	for n := range u.strips {
		s := &u.strips[n]
		at := sampleAddress(s.strip)
		at.sums = ChecksumsXXH3
		s.crcs[2], s.crcs[31] = checksumOf(at, 2, s.blocks[0]), checksumOf(at, 31, s.blocks[1])
	}
	return u
}

func TestGolden(t *testing.T) {
	b := make([]byte, BlockBytes)
	sampleLabel().encode(b)
	l, err := decodeLabel(golden(t, "label.golden", b))
	if err != nil {
		t.Fatal(err)
	}
	again := make([]byte, BlockBytes)
	if l.encode(again); !bytes.Equal(again, b) {
		t.Fatal("label does not round-trip")
	}
	growing := sampleLabel()
	growing.N, growing.GrowFrom, growing.GrowSlots, growing.GrowDone, growing.GrowStaged = 13, 12, 990, 40, 42
	growing.encode(b)
	if l, err = decodeLabel(golden(t, "label-grow.golden", b)); err != nil || l.GrowFrom != 12 || l.GrowStaged != 42 {
		t.Fatal(l, err)
	}
	if l.encode(again); !bytes.Equal(again, b) {
		t.Fatal("label of a growth does not round-trip")
	}
	for name, l := range map[string]*Label{"label-xxh3.golden": sampleLabel(), "label-xxh3-grow.golden": growing} {
		l.Checksums = ChecksumsXXH3
		l.encode(b)
		got, err := decodeLabel(golden(t, name, b))
		if err != nil || got.Checksums != ChecksumsXXH3 || got.GrowFrom != l.GrowFrom {
			t.Fatal(got, err)
		}
		if got.encode(again); !bytes.Equal(again, b) {
			t.Fatalf("%s does not round-trip", name)
		}
	}
	sum := &stripSum{gen: 9, gens: []uint64{9, 4, 5, 9, 9}}
	for c := range sum.crcs {
		sum.crcs[c] = checksumOf(sampleAddress(4), c, pattern(BlockBytes, byte(c)))
	}
	sum.encode(b, sampleAddress(4))
	s, err := decodeSum(golden(t, "checksum.golden", b), sampleAddress(4))
	if err != nil {
		t.Fatal(err)
	}
	if s.encode(again, sampleAddress(4)); !bytes.Equal(again, b) {
		t.Fatal("checksum block does not round-trip")
	}
	sum.losts = []uint32{1 << 2, 0, 1 << 7, 0, 0}
	sum.encode(b, sampleAddress(4))
	if s, err = decodeSum(golden(t, "checksum-lost.golden", b), sampleAddress(4)); err != nil {
		t.Fatal(err)
	}
	if s.encode(again, sampleAddress(4)); !bytes.Equal(again, b) {
		t.Fatal("checksum block with lost blocks does not round-trip")
	}
	for name, u := range map[string]*Update{"update.golden": sampleUpdate(), "update-lost.golden": sampleLoss(), "update-xxh3.golden": sampleXXH3()} {
		enc := bytes.Join(u.Encode(), nil)
		u, err := DecodeUpdate([][]byte{golden(t, name, enc[:BlockBytes]), enc[BlockBytes:]})
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(bytes.Join(u.Encode(), nil), enc) || u.Blocks()*BlockBytes != len(enc) {
			t.Fatal("update does not round-trip")
		}
	}
}

// A checksum block is believed only where it belongs, and every single flipped bit of the formats is noticed.
func TestDecodersRefuse(t *testing.T) {
	b := golden(t, "checksum.golden", nil)
	for _, at := range []address{sampleAddress(3), {UUID{3, 4}, 124, 4, 3, 2, 0}, {UUID{3, 5}, 123, 4, 3, 2, 0}, {UUID{3, 4}, 123, 4, 4, 2, 0}} {
		if _, err := decodeSum(b, at); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%+v: %v", at, err)
		}
	}
	for _, u := range []*Update{sampleUpdate(), sampleLoss(), sampleXXH3()} {
		enc := bytes.Join(u.Encode(), nil)
		for i := 0; i < len(enc)*8; i += 61 {
			enc[i/8] ^= 1 << (i % 8)
			if _, err := DecodeUpdate([][]byte{enc}); !errors.Is(err, ErrCorrupt) {
				t.Fatalf("update, bit %d: %v", i, err)
			}
			enc[i/8] ^= 1 << (i % 8)
		}
		for n := 0; n < len(enc); n += BlockBytes {
			if _, err := DecodeUpdate([][]byte{enc[:n]}); !errors.Is(err, ErrCorrupt) {
				t.Fatalf("update cut at %d: %v", n, err)
			}
		}
	}
	for _, b := range [][]byte{b, golden(t, "checksum-lost.golden", nil)} {
		for i := 0; i < BlockBytes*8; i += 13 {
			b[i/8] ^= 1 << (i % 8)
			if _, err := decodeSum(b, sampleAddress(4)); !errors.Is(err, ErrCorrupt) {
				t.Fatalf("checksum block, bit %d: %v", i, err)
			}
			b[i/8] ^= 1 << (i % 8)
		}
	}
	l := golden(t, "label.golden", nil)
	for i := 0; i < BlockBytes*8; i += 13 {
		l[i/8] ^= 1 << (i % 8)
		if _, err := decodeLabel(l); !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrBlank) {
			t.Fatalf("label, bit %d: %v", i, err)
		}
		l[i/8] ^= 1 << (i % 8)
	}
}

// The fuzzers repair the checksum, so that what is behind it is reached.
func FuzzLabel(f *testing.F) {
	f.Add(golden(f, "label.golden", nil))
	f.Add(golden(f, "label-grow.golden", nil))
	f.Add(golden(f, "label-xxh3.golden", nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) == BlockBytes {
			le32(b[12:], blockSum(b, 12))
		}
		l, err := decodeLabel(b)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrBlank) {
				t.Fatal(err)
			}
			return
		}
		again := make([]byte, BlockBytes)
		l.encode(again)
		if m, err := decodeLabel(again); err != nil || m.newer(l) || l.newer(m) || m.Failed != l.Failed {
			t.Fatalf("%+v, then %+v, %v", l, m, err)
		}
	})
}

func FuzzChecksum(f *testing.F) {
	f.Add(golden(f, "checksum.golden", nil))
	f.Add(golden(f, "checksum-lost.golden", nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) == BlockBytes {
			le32(b[48:], blockSum(b, 48))
		}
		if _, err := decodeSum(b, sampleAddress(4)); err != nil && !errors.Is(err, ErrCorrupt) {
			t.Fatal(err)
		}
	})
}

func FuzzUpdate(f *testing.F) {
	f.Add(golden(f, "update.golden", nil), uint8(6))
	f.Add(golden(f, "update-lost.golden", nil), uint8(5))
	f.Fuzz(func(t *testing.T, b []byte, blocks uint8) {
		b = bytes.Clone(b)
		if len(b)%BlockBytes == 0 && len(b) > 0 {
			n := min(max(int(b[12]), 1)*BlockBytes, len(b))
			le32(b[16:], blockSum(b[:n], 16))
		}
		u, err := DecodeUpdate([][]byte{b, make([]byte, int(blocks)*BlockBytes)})
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		if n := u.Blocks(); n*BlockBytes != len(b)+int(blocks)*BlockBytes {
			t.Fatalf("%d blocks", n)
		}
	})
}

func le32(b []byte, v uint32) { b[0], b[1], b[2], b[3] = byte(v), byte(v>>8), byte(v>>16), byte(v>>24) }

// TestBlockChecksum: the checksum of a block is what the format says, for every strip and block that an array can have.
func TestBlockChecksum(t *testing.T) {
	data := pattern(BlockBytes, 7)
	for strip := range maxWidth {
		for block := range StripBlocks {
			at := address{array: UUID{1, 2, 3, 15: 9}, stripe: 1<<40 + 77, strip: strip}
			var a [32]byte
			copy(a[:], at.array[:])
			binary.LittleEndian.PutUint64(a[16:], at.stripe)
			a[24], a[25] = byte(strip), byte(block)
			if got, want := checksumOf(at, block, data), crc32.Checksum(append(a[:], data...), castagnoli); got != want {
				t.Fatalf("strip %d block %d: %#x, want %#x", strip, block, got, want)
			}
			at.sums = ChecksumsXXH3
			if got, want := checksumOf(at, block, data), uint32(xxh3.HashSeed(data, xxh3.Hash(a[:]))); got != want {
				t.Fatalf("strip %d block %d: %#x, want %#x", strip, block, got, want)
			}
		}
	}
}
