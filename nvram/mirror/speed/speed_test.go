package speed

import (
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestMeasure(t *testing.T) {
	r, err := Measure(t.Context(), Options{Dir: t.TempDir(), Rounds: 1, Time: 20 * time.Millisecond, RegionBytes: 16 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if r.Latency() <= 0 || r.Throughput() <= 0 {
		t.Fatal(&r)
	}
	t.Log(&r)
}

// BenchmarkMirroredAppend prints the ratios on tmpfs and on the temporary directory's disk.
func BenchmarkMirroredAppend(b *testing.B) {
	for name, dir := range map[string]string{"shm": "/dev/shm", "tmp": os.TempDir()} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				r, err := Measure(b.Context(), Options{Dir: dir})
				if err != nil {
					b.Fatal(err)
				}
				b.ReportMetric(r.Latency(), "×floor")
				b.ReportMetric(100*r.Throughput(), "%link")
				b.Log(&r)
			}
		})
	}
}

// BenchmarkAppend is ours alone, for a profile.
func BenchmarkAppend(b *testing.B) {
	for name, workers := range map[string]int{"qd1": 1, "qd32": depth} {
		b.Run(name, func(b *testing.B) {
			x := bench{ctx: b.Context(), dir: "/dev/shm", size: 64 << 20}
			dir, err := os.MkdirTemp("/dev/shm", "speed")
			if err != nil {
				b.Skip(err)
			}
			defer os.RemoveAll(dir)
			x.dir = dir
			if err := x.open(); err != nil {
				b.Fatal(err)
			}
			b.ResetTimer()
			n, took, err := x.run(workers, 2*time.Second, x.append)
			if err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64(took.Nanoseconds())/float64(n), "ns/append")
			if err := x.close(); err != nil {
				b.Fatal(err)
			}
		})
	}
}
