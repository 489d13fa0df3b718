package meter

import (
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"
)

// Every duration is in the bucket whose bounds hold it, and bounds grow by a quarter at most.
func TestBounds(t *testing.T) {
	if Bound(Buckets-1) != 1<<octaves {
		t.Errorf("the last bucket begins at %d", Bound(Buckets-1))
	}
	for i := range Buckets - 1 {
		from, to := Bound(i), Bound(i+1)
		if to <= from || i >= 4 && 4*(to-from) > from {
			t.Errorf("bucket %d is from %d to %d", i, from, to)
		}
		if bucket(from) != i || bucket(to-1) != i || bucket(to) != i+1 {
			t.Errorf("bucket %d, from %d to %d: its ends are in %d and %d, what follows in %d", i, from, to, bucket(from), bucket(to-1), bucket(to))
		}
	}
	for us := uint64(1) << octaves; us > 0; us <<= 1 {
		if bucket(us) != Buckets-1 || bucket(us-1+us) != Buckets-1 {
			t.Errorf("%d µs is in bucket %d, not in the last", us, bucket(us))
		}
	}
	var h Histogram
	h.Add(-time.Second)
	h.Add(999)
	h.Add(time.Microsecond)
	if c := h.Counts(); c.Buckets[0] != 2 || c.Buckets[1] != 1 || c.N() != 3 || c.Nanos != 1999 {
		t.Errorf("%v", c)
	}
}

// Percentiles are within a bucket of the exact ones.
func TestPercentiles(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for name, draw := range map[string]func() float64{
		"uniform": func() float64 { return rng.Float64() * 1e6 }, "exponential": func() float64 { return rng.ExpFloat64() * 300 },
		"two humps": func() float64 { return float64(100+rng.IntN(20)) + float64(rng.IntN(2))*5e4 }, "one value": func() float64 { return 77 },
	} {
		var h Histogram
		var exact []float64
		for range 20_000 {
			us := math.Floor(draw())
			h.Add(time.Duration(us) * time.Microsecond)
			exact = append(exact, us)
		}
		slices.Sort(exact)
		c := h.Counts()
		for _, p := range []float64{1, 45, 90, 95, 99, 99.9} {
			want, got := exact[int(p/100*float64(len(exact)))-1], float64(c.Percentile(p))/1000
			if i := bucket(uint64(want)); got < float64(Bound(i)) || got > float64(Bound(i+1)) {
				t.Errorf("%s: percentile %v is %v, want about %v", name, p, got, want)
			}
		}
	}
	var c Counts
	if c.Percentile(50) != 0 {
		t.Error("nothing has a percentile")
	}
	c.Buckets[10] = 4 // evenly spread over it
	if from, to := Bound(10), Bound(11); c.Percentile(50) != time.Duration(from+to)*time.Microsecond/2 {
		t.Errorf("half of one bucket is %v", c.Percentile(50))
	}
	c.Buckets[Buckets-1] = 100
	if got := c.Percentile(99); got != 1<<octaves*time.Microsecond {
		t.Errorf("beyond the last bound: %v", got)
	}
}

// Two histograms merged are one of all durations, and the difference to an earlier state is one of what came since.
func TestMergeAndSince(t *testing.T) {
	rng := rand.New(rand.NewPCG(2, 2))
	var a, b, both Histogram
	draw := func(h *Histogram, n int) {
		for range n {
			d := time.Duration(rng.Int64N(int64(100 * time.Second)))
			h.Add(d)
			both.Add(d)
		}
	}
	draw(&a, 1000)
	first := a.Counts()
	draw(&b, 500)
	sum, part := a.Counts(), b.Counts()
	if sum.Merge(&part); sum != both.Counts() {
		t.Error("merged is not what was counted")
	}
	if d := sum.Since(&first); d != part {
		t.Error("the difference is not what came since")
	}
	if d := first.Since(&sum); d != (Counts{}) {
		t.Error("a counter went back") // a volume that was opened anew between two looks
	}
}

func TestConcurrentAdds(t *testing.T) {
	v := New()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for i := range 1000 {
				v.End(&v.Reads, v.Now(), 4096, nil)
				if i%10 == 0 {
					v.End(&v.Reads, v.Now(), 4096, errors.New("no"))
				}
			}
		})
	}
	wg.Wait()
	c := v.Reads.Counts()
	if c.N() != 8000 || v.Reads.Bytes.Load() != 8000*4096 || v.Reads.Errors.Load() != 800 {
		t.Errorf("%d reads of %d bytes, %d errors", c.N(), v.Reads.Bytes.Load(), v.Reads.Errors.Load())
	}
}

func TestNoAllocations(t *testing.T) {
	v := New()
	if n := testing.AllocsPerRun(1000, func() {
		start := v.Now()
		if v.Sample() {
			v.Decoded(start)
		}
		v.FromCache(start, 4096)
		v.FromShelf(start, 4096)
		v.End(&v.Reads, start, 4096, nil)
	}); n != 0 {
		t.Errorf("%v allocations a request", n)
	}
}

func BenchmarkRequest(b *testing.B) {
	v := New()
	for b.Loop() {
		start := v.Now()
		v.Sample()
		v.Memory.Add(1)
		v.End(&v.Reads, start, 4096, nil)
	}
}
