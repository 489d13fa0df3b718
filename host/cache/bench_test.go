package cache

import (
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"path/filepath"
	"testing"
	"time"
)

// benchCache is a warm cache of 64 MiB on a file.
func benchCache(b *testing.B, buffered bool) (*Cache, int) {
	c := openFileAt(b, filepath.Join(b.TempDir(), "cache"), 96<<20, buffered)
	b.Cleanup(func() { c.Close() })
	const lines = 1000
	p := make([]byte, LineBytes)
	for i := range lines {
		before := c.Stats().Written
		c.Write(storeA, uint32(i/segmentLines+1), i%segmentLines, p)
		until(b, "a line is taken", func() bool { return c.Stats().Written > before })
	}
	until(b, "the lines are on the medium", func() bool { return c.drained() })
	return c, lines - 30 // the last are in memory
}

// BenchmarkHit is a hit, beside what it can't be faster than: as many bytes read from the same file and their
// checksum taken, by who needs them. They begin anywhere, as the store's blocks do.
func BenchmarkHit(b *testing.B) {
	for _, buffered := range []bool{false, true} {
		mode := map[bool]string{false: "direct", true: "buffered"}[buffered]
		for _, n := range []int{4096, LineBytes} {
			c, lines := benchCache(b, buffered)
			b.Run(fmt.Sprintf("%s/%d/cache", mode, n), func(b *testing.B) {
				b.SetBytes(int64(n))
				rng, p := rand.New(rand.NewPCG(1, 1)), make([]byte, n)
				for b.Loop() {
					line := rng.IntN(lines)
					if !c.ReadAt(storeA, uint32(line/segmentLines+1), line%segmentLines*LineBytes+rng.IntN(LineBytes-n+1), p) {
						b.Fatal("a miss", c.Stats())
					}
				}
			})
			b.Run(fmt.Sprintf("%s/%d/bare", mode, n), func(b *testing.B) {
				b.SetBytes(int64(n))
				rng, p := rand.New(rand.NewPCG(1, 1)), alignedBytes(n+2*blockBytes)
				for b.Loop() {
					line, at, m := rng.IntN(lines), rng.IntN(LineBytes-n+1), n
					skip := 0
					if !buffered { // whole blocks
						skip = at % blockBytes
						m = (skip + n + blockBytes - 1) / blockBytes * blockBytes
					}
					if err := readFull(c.medium, p[:m], c.layout.slotAt(uint32(line))+int64(at-skip)); err != nil {
						b.Fatal(err)
					}
					crc32.Checksum(p[skip:skip+n], castagnoli)
				}
			})
		}
	}
}

// zeroFile has all its blocks, so that the file system has nothing to find.
func zeroFile(b *testing.B, size int64) string {
	path := filepath.Join(b.TempDir(), "cache")
	m, _, err := openFile(&Options{Path: path, SizeBytes: size})
	if err != nil {
		b.Fatal(err)
	}
	defer m.Close()
	for p, at := alignedBytes(pieceSize), int64(0); at < size; at += pieceSize {
		if _, err := m.WriteAt(p, at); err != nil {
			b.Fatal(err)
		}
	}
	return path
}

// BenchmarkPut writes lines round a cache that is full, beside the same bytes in the same pieces without a cache, both with a
// barrier after each region: the shortest, and the one of caches from 256 GiB on.
func BenchmarkPut(b *testing.B) {
	const size = 1 << 30
	for _, region := range []uint32{minRegionBytes, maxRegionBytes} {
		b.Run(fmt.Sprintf("%dMiB/cache", region>>20), func(b *testing.B) {
			b.SetBytes(LineBytes)
			c := openWith(b, Options{Path: zeroFile(b, size), SizeBytes: size, regionBytes: region, slowTimeout: time.Minute})
			p, n := make([]byte, LineBytes), uint64(0)
			for b.Loop() {
				n++
				for len(c.queue) > queueLines/2 {
					time.Sleep(100 * time.Microsecond)
				}
				for before := c.Stats().Rejected; ; before++ { // all comers
					c.roomy.Store(true)
					if c.Write(storeA, uint32(n/segmentLines+1), int(n%segmentLines), p); c.Stats().Rejected == before {
						break
					}
				}
			}
			until(b, "all is taken", func() bool { s := c.Stats(); return s.Dropped+s.Written == n })
			if s := c.Stats(); s.Dropped > n/100 {
				b.Error("lines were dropped: ", s.Dropped, " of ", n)
			} else {
				b.ReportMetric(s.WriteAmplification, "written/line")
			}
			c.Close()
		})
		b.Run(fmt.Sprintf("%dMiB/bare", region>>20), func(b *testing.B) {
			b.SetBytes(LineBytes)
			m, _, err := openFile(&Options{Path: zeroFile(b, size), SizeBytes: size})
			if err != nil {
				b.Fatal(err)
			}
			defer m.Close()
			p, at, n := alignedBytes(pieceSize), int64(0), 0
			for b.Loop() {
				if n++; n%(pieceSize/LineBytes) > 0 {
					continue
				}
				if _, err := m.WriteAt(p, at); err != nil {
					b.Fatal(err)
				}
				if at = (at + pieceSize) % size; at%int64(region) == 0 {
					m.Sync()
				}
			}
		})
	}
}

// BenchmarkStart1TB starts a full cache of 1 TB on a drive that answers from a function (whose work, making
// tables, is about a third of it).
func BenchmarkStart1TB(b *testing.B) {
	d, _ := tablesOf(tb)
	for b.Loop() {
		c := openWith(b, Options{open: d.open, inline: true})
		if c.Stats().Lines == 0 {
			b.Fatal("cold")
		}
	}
	b.ReportMetric(float64(d.reads)/float64(b.N), "reads/start")
	b.ReportMetric(float64(d.readBytes)/float64(b.N)/1e6, "MB/start")
}
