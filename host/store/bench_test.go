package store

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"

	"github.com/ledge-storage/ledge/host/cache"
	"github.com/ledge-storage/ledge/host/dedup"
	"golang.org/x/sys/unix"
)

// sink is a LUN that takes everything and keeps only what a bench reads back.
type sink struct {
	memory
	keep bool
}

func (s *sink) WriteAt(ctx context.Context, p []byte, off int64) error {
	if s.keep || off < ringOffset {
		return s.memory.WriteAt(ctx, p, off)
	}
	return nil
}

func benchStore(b *testing.B, keep bool) (*Store, *Volume) {
	p := &power{}
	j, s := &sink{*newMemory(b, p, 256<<20, false), false}, &sink{*newMemory(b, p, 1<<50, false), keep}
	st := open(b, Options{Journal: j, Segments: s, MapBytes: 4 << 30, IndexBytes: 256 << 20})
	_, err := st.CreateVolume(b.Context(), "a", 64<<40)
	must(b, err)
	return st, volume(b, st, "a")
}

// BenchmarkWrite is the whole inline path but for the LUNs: journal record, fingerprint, index, codec,
// segment, map. Compare "unique" with BenchmarkBound, which only fingerprints, encodes and copies.
func BenchmarkWrite(b *testing.B) {
	for _, c := range []struct {
		name   string
		unique bool
		data   []byte
	}{{"unique text", true, text(1, 256)}, {"unique noise", true, noise(1, 256)}, {"duplicates", false, text(1, 256)}} {
		b.Run(c.name, func(b *testing.B) {
			st, v := benchStore(b, false)
			b.SetBytes(int64(len(c.data)))
			lba := uint64(0)
			for b.Loop() {
				if c.unique {
					for i := 0; i < len(c.data); i += BlockBytes {
						le.PutUint64(c.data[i:], lba*256+uint64(i))
					}
				}
				must(b, v.Write(b.Context(), lba, c.data))
				lba += 256
			}
			must(b, st.Sync(b.Context()))
			b.StopTimer()
			s := st.Stats()
			b.ReportMetric(float64(s.StoredBytes)/float64(s.LogicalBytes), "stored/logical")
			st.stop()
		})
	}
}

func BenchmarkBound(b *testing.B) {
	data, h := text(1, 256), dedup.NewHasher(dedup.Key{})
	blocks, sums := make([][]byte, 256), make([]dedup.Fingerprint, 256)
	for i := range blocks {
		blocks[i] = data[i*BlockBytes : (i+1)*BlockBytes]
	}
	dst, out := make([]byte, encodeScratch), make([]byte, 256*BlockBytes)
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		copy(out, data)
		h.Sum(sums, blocks)
		at := 0
		for _, p := range blocks {
			at += copy(out[at:], dst[:encodeBlock(dst, p, CompressS2)])
		}
	}
}

// BenchmarkRead4K reads blocks that are in the line cache: lookup, checksum, decoding.
func BenchmarkRead4K(b *testing.B) {
	st, v := benchStore(b, true)
	data := text(1, 4096)
	must(b, v.Write(b.Context(), 0, data))
	must(b, st.Checkpoint(b.Context()))
	p := make([]byte, BlockBytes)
	b.SetBytes(BlockBytes)
	lba := uint64(0)
	for b.Loop() {
		must(b, v.Read(b.Context(), lba%4096, p))
		lba += 7
	}
	b.StopTimer()
	st.stop()
}

// BenchmarkCacheHit reads 4 KiB at random through the flash cache, beside a bare read of as many bytes of the same
// file, with checksum and decoding: in the page cache, where what is measured is our part, and past it (O_DIRECT, as a cache
// is read), by one reader and by eight.
func BenchmarkCacheHit(b *testing.B) {
	for _, bed := range []struct {
		name     string
		buffered bool
	}{{"memory", true}, {"direct", false}} {
		b.Run(bed.name, func(b *testing.B) { cacheHit(b, bed.buffered) })
	}
}

func cacheHit(b *testing.B, buffered bool) {
	const blocks = 32768
	path := filepath.Join(b.TempDir(), "cache")
	c, err := cache.Open(b.Context(), cache.Options{Path: path, SizeBytes: 512 << 20, Buffered: buffered})
	must(b, err)
	defer c.Close()
	p := &power{}
	j, s := &sink{*newMemory(b, p, 256<<20, false), false}, &sink{*newMemory(b, p, 1<<50, false), true}
	st := open(b, Options{Journal: j, Segments: s, MapBytes: 4 << 30, IndexBytes: 256 << 20, LineBytes: LineBytes, Cache: c})
	defer st.stop()
	_, err = st.CreateVolume(b.Context(), "a", 1<<40)
	must(b, err)
	v := volume(b, st, "a")
	must(b, v.Write(b.Context(), 0, noise(1, blocks)))
	must(b, st.Checkpoint(b.Context()))
	first := make([]byte, BlockBytes)
	for range 3 {
		for lba := range uint64(blocks) {
			must(b, v.Read(b.Context(), lba, first))
		}
	}
	l := placeOf(b, v, 5)
	stored, err := st.readStored(b.Context(), l)
	must(b, err)
	flags, unit := 0, 1
	if !buffered {
		flags, unit = unix.O_DIRECT, BlockBytes
	}
	f, err := os.OpenFile(path, flags, 0)
	must(b, err)
	defer f.Close()
	if !buffered {
		unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	}
	for _, x := range []struct {
		name string
		read func(rng *rand.Rand, dst, got []byte) error
	}{
		{"store", func(rng *rand.Rand, dst, _ []byte) error {
			return v.Read(b.Context(), uint64(rng.IntN(blocks)), dst)
		}},
		{"bare", func(rng *rand.Rand, dst, got []byte) error {
			if _, err := f.ReadAt(got, (16<<20+rng.Int64N(100<<20))/int64(unit)*int64(unit)); err != nil {
				return err
			}
			return decodeBlock(l, dst, stored)
		}},
	} {
		for _, readers := range []int{1, 8} {
			b.Run(fmt.Sprintf("%s-%d", x.name, readers), func(b *testing.B) {
				before := c.Stats()
				var wg sync.WaitGroup
				var left atomic.Int64
				left.Store(int64(b.N))
				b.ResetTimer()
				for r := range readers {
					wg.Go(func() {
						rng := rand.New(rand.NewPCG(uint64(r), uint64(b.N)))
						dst, buf := make([]byte, BlockBytes), make([]byte, roundUp(l.len(), unit)+BlockBytes)
						skip := -int(uintptr(unsafe.Pointer(unsafe.SliceData(buf)))) & (BlockBytes - 1) & -unit
						got := buf[skip : skip+roundUp(l.len(), unit)]
						for left.Add(-1) >= 0 {
							if err := x.read(rng, dst, got); err != nil {
								b.Error(err)
								return
							}
						}
					})
				}
				wg.Wait()
				if after := c.Stats(); after.Hits > before.Hits {
					b.ReportMetric(float64(after.HitBytes-before.HitBytes)/float64(b.N), "flashbytes/op")
				}
			})
		}
	}
}

// BenchmarkMapMiss reads 4 KiB at random, from the shelf, with maps of 16 MiB in memory or a tenth of them, and writes likewise. Each page
// is full and its blocks lie anywhere, so that it takes 4 KiB. (So small a limit no agent has; it makes writes dearer: each checkpoint
// writes pages again up to a segment's worth, here for one tenth of that.)
func BenchmarkMapMiss(b *testing.B) {
	const blocks, different = 4096 * pageEntries, 8192
	p := &power{}
	j, s := &sink{*newMemory(b, p, 256<<20, false), false}, &sink{*newMemory(b, p, 1<<50, false), true}
	o := Options{Journal: j, Segments: s, IndexBytes: 256 << 20, LineBytes: 1 << 20, CapacityBytes: 1 << 40}
	st := open(b, o)
	_, err := st.CreateVolume(b.Context(), "a", 1<<40)
	must(b, err)
	v := volume(b, st, "a")
	data := noise(1, different)
	rng := rand.New(rand.NewPCG(1, 1))
	for lba := uint64(0); lba < blocks; lba += 256 {
		var p []byte
		for range 256 {
			p = append(p, data[rng.IntN(different)*BlockBytes:][:BlockBytes]...)
		}
		must(b, v.Write(b.Context(), lba, p))
	}
	must(b, st.Close(b.Context()))
	dst := make([]byte, BlockBytes)
	for _, bed := range []struct {
		name  string
		bytes int64
	}{{"all", 1 << 30}, {"a tenth", 4096 * (pageBytes/10 + stubBytes)}} {
		o.MapBytes = bed.bytes
		st := open(b, o)
		v := volume(b, st, "a")
		for lba := uint64(0); lba < blocks; lba += pageEntries {
			must(b, v.Read(b.Context(), lba, dst))
		}
		b.Run("read "+bed.name, func(b *testing.B) {
			before := st.Stats()
			reads := s.reads
			for b.Loop() {
				must(b, v.Read(b.Context(), rng.Uint64N(blocks), dst))
			}
			after := st.Stats()
			b.ReportMetric(float64(s.reads-reads)/float64(b.N), "reads/op")
			b.ReportMetric(float64(after.PagesRead-before.PagesRead)/float64(b.N), "pages/op")
			b.ReportMetric(float64(after.MapBytes)/(1<<20), "MiB")
		})
		b.Run("write "+bed.name, func(b *testing.B) {
			before := st.Stats()
			for b.Loop() {
				must(b, v.Write(b.Context(), rng.Uint64N(blocks), data[rng.IntN(different)*BlockBytes:][:BlockBytes]))
			}
			must(b, st.Sync(b.Context()))
			after := st.Stats()
			b.ReportMetric(float64(after.PagesWritten-before.PagesWritten)/float64(b.N), "pages/op")
			b.ReportMetric(float64(after.Checkpoints-before.Checkpoints)/float64(b.N), "checkpoints/op")
		})
		must(b, st.Close(b.Context()))
	}
}
