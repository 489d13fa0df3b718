package store

import (
	"bytes"
	"errors"
	"slices"
	"testing"

	"github.com/klauspost/compress/s2"
)

// Each block is what was written whatever it is compressed with; Zstandard is smallest, and what does not compress costs no more than it does
// raw.
func TestCompressions(t *testing.T) {
	sizes := map[Compression]int{}
	for c := range compressions {
		for _, data := range [][]byte{text(1, 50), noise(1, 5), make([]byte, BlockBytes), bytes.Repeat([]byte{7}, BlockBytes)} {
			for ; len(data) > 0; data = data[BlockBytes:] {
				p := make([]byte, encodeScratch)
				p = p[:encodeBlock(p, data[:BlockBytes], c)]
				if len(p) > blockHeader+BlockBytes {
					t.Fatalf("%v: %d bytes", c, len(p))
				}
				sizes[c] += len(p)
				sealBlock(5, 4096, p)
				got := make([]byte, BlockBytes)
				if err := decodeBlock(makeLoc(5, 4096, len(p)), got, p); err != nil || !bytes.Equal(got, data[:BlockBytes]) {
					t.Fatalf("%v: %v", c, err)
				}
			}
		}
	}
	if sizes[CompressZstd] >= sizes[CompressS2] || sizes[CompressS2] >= sizes[CompressOff] {
		t.Errorf("%v", sizes)
	}
	t.Logf("%v", sizes)
}

// A block that ends in equal bytes, however many, is one that S2 itself reads, and hardly longer than S2 makes it, whose tables are smaller
// for less than 4 KiB.
func TestEqualTails(t *testing.T) {
	plain, p, got := make([]byte, encodeScratch), make([]byte, encodeScratch), make([]byte, BlockBytes)
	for i, head := range [][]byte{noise(1, 1), text(1, 1), bytes.Repeat([]byte{1, 2, 3}, BlockBytes)[:BlockBytes]} {
		for tail := range BlockBytes + 1 {
			block := append(slices.Clip(head[:BlockBytes-tail]), bytes.Repeat([]byte{byte(255 * i)}, tail)...)
			n, most := encodeS2(p, block), len(s2.Encode(plain, block))
			if tail >= longTail {
				most += 32 + most/16
			}
			if n > most {
				t.Fatalf("tail of %d: %d bytes, S2 needs %d", tail, n, most)
			}
			if got, err := s2.Decode(got, p[:n]); err != nil || !bytes.Equal(got, block) {
				t.Fatalf("tail of %d: %v", tail, err)
			}
		}
	}
}

// BenchmarkDecode reads stored blocks: half noise and half zeros, as load generators make what compresses to a half, and text.
func BenchmarkDecode(b *testing.B) {
	halves := noise(1, 1)
	clear(halves[BlockBytes/2:])
	for _, c := range []struct {
		name  string
		block []byte
	}{{"zeros-behind", halves}, {"text", text(1, 1)}} {
		p, dst := make([]byte, encodeScratch), make([]byte, BlockBytes)
		p = p[:encodeBlock(p, c.block, CompressS2)]
		sealBlock(5, 4096, p)
		b.Run(c.name, func(b *testing.B) {
			b.SetBytes(BlockBytes)
			for b.Loop() {
				if err := decodeBlock(makeLoc(5, 4096, len(p)), dst, p); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// A volume's compression is kept, with it and by its clones, and is what is written from then on is stored with.
func TestVolumeCompression(t *testing.T) {
	sh, ctx := newShelf(t, 1), t.Context()
	st := open(t, sh.options())
	want := map[string]Compression{"a": CompressZstd, "b": CompressS2, "c": CompressOff, "d": CompressZstd, "clone": CompressZstd}
	for _, name := range []string{"a", "b", "c"} {
		_, err := st.CreateCompressed(ctx, name, 1<<30, want[name])
		must(t, err)
	}
	_, err := st.CreateVolume(ctx, "d", 1<<30)
	must(t, err)
	if _, err := st.CreateCompressed(ctx, "e", 1<<30, compressions); !errors.Is(err, ErrCompression) {
		t.Error(err)
	}
	if err := st.SetCompression(ctx, "a", compressions); !errors.Is(err, ErrCompression) {
		t.Error(err)
	}
	if err := st.SetCompression(ctx, "nothing", CompressOff); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	codec := func(name string, lba uint64) byte {
		t.Helper()
		must(t, st.Checkpoint(ctx))
		p, err := st.readStored(ctx, placeOf(t, volume(t, st, name), lba))
		must(t, err)
		return p[4]
	}
	for i, name := range []string{"a", "b", "c", "d"} {
		must(t, volume(t, st, name).Write(ctx, 0, text(uint64(i), 1)))
	}
	if a, b, c, d := codec("a", 0), codec("b", 0), codec("c", 0), codec("d", 0); a != codecZstd || b != codecS2 || c != codecRaw || d != codecS2 {
		t.Errorf("codecs %d %d %d %d", a, b, c, d)
	}
	must(t, st.SetCompression(ctx, "d", CompressZstd))
	must(t, volume(t, st, "d").Write(ctx, 1, text(9, 1)))
	_, err = st.Snapshot(ctx, "s", "d")
	must(t, err)
	_, err = st.Clone(ctx, "d", "s", "clone")
	must(t, err)
	if old, now := codec("d", 0), codec("d", 1); old != codecS2 || now != codecZstd {
		t.Errorf("codecs %d and %d", old, now)
	}
	must(t, volume(t, st, "clone").Write(ctx, 2, text(10, 1)))
	if got := codec("clone", 2); got != codecZstd {
		t.Errorf("the clone has codec %d", got)
	}
	must(t, st.RenameVolume(ctx, "c", "cc"))
	want["cc"] = want["c"]
	delete(want, "c")
	for _, well := range []bool{false, true, true} {
		must(t, st.Promote(ctx, map[bool]string{false: "clone", true: "d"}[volume(t, st, "clone").Info().Origin == ""]))
		st = reopen(t, st, sh, well)
		for name, c := range want {
			if got := volume(t, st, name).Info().Compression; got != c {
				t.Errorf("volume %s has %v, not %v", name, got, c)
			}
		}
		wantBlocks(t, volume(t, st, "d"), 1, text(9, 1))
		wantBlocks(t, volume(t, st, "clone"), 2, text(10, 1))
		wantBlocks(t, volume(t, st, "a"), 0, text(0, 1))
	}
	must(t, st.Close(ctx))
}

func TestParseCompression(t *testing.T) {
	for c := range compressions {
		if got, err := ParseCompression(c.String()); err != nil || got != c {
			t.Errorf("%v: %v, %v", c, got, err)
		}
	}
	if got, err := ParseCompression(""); err != nil || got != CompressS2 {
		t.Error(got, err)
	}
	if _, err := ParseCompression("lz4"); !errors.Is(err, ErrCompression) {
		t.Error(err)
	}
}

func BenchmarkCompression(b *testing.B) {
	data, dst, out := text(1, 256), make([]byte, encodeScratch), make([]byte, BlockBytes)
	for c := range compressions {
		b.Run(c.String(), func(b *testing.B) {
			b.SetBytes(BlockBytes)
			i, total := 0, 0
			for b.Loop() {
				total += encodeBlock(dst, data[i%256*BlockBytes:][:BlockBytes], c)
				i++
			}
			b.ReportMetric(float64(total)/float64(i)/BlockBytes, "of-1")
		})
		b.Run(c.String()+" decode", func(b *testing.B) {
			p := append([]byte(nil), dst[:encodeBlock(dst, data[:BlockBytes], c)]...)
			sealBlock(1, 0, p)
			b.SetBytes(BlockBytes)
			for b.Loop() {
				must(b, decodeBlock(makeLoc(1, 0, len(p)), out, p))
			}
		})
	}
}
