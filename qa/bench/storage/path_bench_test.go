package main

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/raid"
)

// BenchmarkPath is the path of an acknowledged 4 KiB write alone, for a profile: it stops before destage begins.
func BenchmarkPath(b *testing.B) {
	for name, depth := range map[string]int{"qd1": 1, "qd32": pathDepth} {
		b.Run(name, func(b *testing.B) {
			ctx := b.Context()
			const lunBytes = 64 << 20
			r, err := newRig(ctx, b.TempDir(), 512<<20, lunBytes, overTCP, 0, nil)
			if err != nil {
				b.Fatal(err)
			}
			block := randomBytes(raid.BlockBytes, 1)
			writes, took := 0., time.Duration(0)
			was := r.log.Stats()
			for b.Loop() {
				if err := r.settle(ctx); err != nil {
					b.Fatal(err)
				}
				b.ResetTimer()
				begin := time.Now()
				v, err := pump(ctx, depth, 400*time.Millisecond, func(int, int) (int, error) {
					return 1, r.lun.Write(ctx, rand.Uint64N(lunBytes/raid.BlockBytes), [][]byte{block}, false)
				})
				if err != nil {
					b.Fatal(err)
				}
				took += time.Since(begin)
				writes += v * time.Since(begin).Seconds()
			}
			b.ReportMetric(float64(took.Nanoseconds())/writes, "ns/write")
			is := r.log.Stats()
			b.ReportMetric(float64(is.Sets-was.Sets)/float64(is.Records-was.Records), "sets/record")
			if err := r.close(); err != nil {
				b.Fatal(err)
			}
		})
	}
}
