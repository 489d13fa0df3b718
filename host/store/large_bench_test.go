package store

import (
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"
	"time"
)

// BenchmarkTenTerabytes has a volume of 10 TB with something in every page of its map, 1 GiB for maps, and reports what that takes:
// memory in use with what the store has (the LUN, which is in memory here, is not counted), how long opening, a snapshot and deleting take, how
// many reads of the shelf a random read costs, and how long reads of another volume take at most while it is deleted.
func BenchmarkTenTerabytes(b *testing.B) {
	const pages = 10_000_000_000_000 / (pageEntries * BlockBytes)
	ctx := b.Context()
	p := &power{}
	j, s := &sink{*newMemory(b, p, 1<<30, false), false}, &sink{*newMemory(b, p, 1<<50, false), true}
	o := Options{Journal: j, Segments: s, CapacityBytes: 64 << 40, IndexBytes: 64 << 20}
	st := open(b, o)
	for _, name := range []string{"large", "other"} {
		_, err := st.CreateVolume(ctx, name, 64<<40)
		must(b, err)
	}
	data := noise(1, 8192)
	must(b, volume(b, st, "other").Write(ctx, 0, data))
	rng := rand.New(rand.NewPCG(1, 1))
	v := volume(b, st, "large")
	for i := range uint64(pages) {
		t, err := v.Stage(ctx, i*pageEntries+rng.Uint64N(pageEntries), data[rng.IntN(8192)*BlockBytes:][:BlockBytes])
		must(b, err)
		if i%4096 == 0 {
			must(b, t.Wait(ctx))
		}
	}
	must(b, st.Close(ctx))
	heap := func() float64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return float64(m.HeapInuse) / (1 << 20)
	}
	st, v = nil, nil
	j.pages = map[int64][]byte{0: j.pages[0], BlockBytes: j.pages[BlockBytes]} // the ring is empty
	lun := heap()
	b.ResetTimer()
	began := time.Now()
	st = open(b, o)
	b.ReportMetric(time.Since(began).Seconds(), "s-open")
	v = volume(b, st, "large")
	dst := make([]byte, BlockBytes)
	var costs []int64
	for range 50000 {
		before := s.reads
		must(b, v.Read(ctx, rng.Uint64N(pages)*pageEntries, dst))
		costs = append(costs, s.reads-before)
	}
	slices.Sort(costs)
	b.ReportMetric(float64(costs[len(costs)*99/100]), "reads-p99")
	b.ReportMetric(heap()-lun, "MiB")
	b.ReportMetric(float64(st.Stats().MapBytes)/(1<<20), "MiB-maps")
	began = time.Now()
	_, err := st.Snapshot(ctx, "s", "large")
	must(b, err)
	b.ReportMetric(time.Since(began).Seconds()*1000, "ms-snapshot")
	must(b, st.DeleteSnapshot(ctx, "large", "s"))
	began = time.Now()
	must(b, st.DeleteVolume(ctx, "large"))
	b.ReportMetric(time.Since(began).Seconds()*1000, "ms-delete")
	must(b, st.Sync(ctx)) // the packer has come to it
	other, longest := volume(b, st, "other"), time.Duration(0)
	for i := 0; ; i++ {
		start := time.Now()
		must(b, other.Read(ctx, rng.Uint64N(8192), dst))
		longest = max(longest, time.Since(start))
		if i%2000 == 0 {
			st.mu.RLock()
			gone := len(st.dying) == 0
			st.mu.RUnlock()
			if gone {
				break
			}
		}
	}
	b.ReportMetric(time.Since(began).Seconds(), "s-taken-apart")
	b.ReportMetric(longest.Seconds()*1000, "ms-read-max")
	b.ReportMetric(heap()-lun, "MiB-after")
	must(b, st.Close(ctx))
}
