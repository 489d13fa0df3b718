package store

import (
	"context"
	"math/rand/v2"
	"testing"
	"time"
)

// distant is a LUN whose reads take that long.
type distant struct {
	Device
	time time.Duration
}

func (d *distant) ReadAt(ctx context.Context, p []byte, off int64) error {
	time.Sleep(d.time)
	return d.Device.ReadAt(ctx, p, off)
}

// BenchmarkRecovery opens a store whose agent was killed after it had written one block in each of many pages of a map, in no order, since
// the last checkpoint. The pages are full, and reads of the shelf take 200 µs.
func BenchmarkRecovery(b *testing.B) {
	const pages = 4096
	ctx := b.Context()
	p := &power{}
	j, s := &sink{*newMemory(b, p, 256<<20, false), true}, &sink{*newMemory(b, p, 1<<50, false), true}
	o := Options{Journal: j, Segments: s, IndexBytes: 64 << 20, CapacityBytes: 1 << 40, LineBytes: 1 << 20}
	st := open(b, o)
	_, err := st.CreateVolume(b.Context(), "a", 1<<40)
	must(b, err)
	data := noise(1, 8192)
	rng := rand.New(rand.NewPCG(1, 1))
	v := volume(b, st, "a")
	for lba := uint64(0); lba < pages*pageEntries; lba += 256 {
		var p []byte
		for range 256 {
			p = append(p, data[rng.IntN(8192)*BlockBytes:][:BlockBytes]...)
		}
		must(b, v.Write(ctx, lba, p))
	}
	must(b, st.Close(ctx))
	o.CheckpointSegments = 1 << 20
	st = open(b, o)
	v = volume(b, st, "a")
	for n, i := range rng.Perm(pages) {
		t, err := v.Stage(ctx, uint64(i)*pageEntries+rng.Uint64N(pageEntries), noise(uint64(n), 1))
		must(b, err)
		if n%256 == 0 {
			must(b, t.Wait(ctx))
		}
	}
	must(b, st.Sync(ctx))
	st.stop() // as kill -9 does
	o.Journal, o.Segments = &distant{j, 200 * time.Microsecond}, &distant{s, 200 * time.Microsecond}
	b.ResetTimer()
	st = open(b, o)
	b.StopTimer()
	b.ReportMetric(float64(st.counters.replayedSegments), "segments")
	b.ReportMetric(float64(st.counters.replayedRecords), "records")
	b.ReportMetric(float64(st.counters.pagesRead), "pages")
	st.stop()
}
