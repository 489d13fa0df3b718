package api

import (
	"slices"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/host/meter"
)

// A Latency has the histogram's figures, and the difference of two those of what came between.
func TestLatency(t *testing.T) {
	var h meter.Histogram
	for us := range 100 {
		h.Add(time.Duration(us) * time.Microsecond)
	}
	first := LatencyOf(h.Counts())
	if first.Count != 100 || first.SumMicros != 99*50 || first.P50Micros < 48 || first.P50Micros > 52 || first.P99Micros < 96 || first.P99Micros > 112 {
		t.Errorf("%+v", first)
	}
	if n := len(first.Buckets); first.Buckets[n-1] == 0 || slices.Max(first.Buckets) == 0 {
		t.Errorf("%v", first.Buckets)
	}
	h.Add(time.Second)
	if d := LatencyOf(h.Counts()).Since(first); d.Count != 1 || d.SumMicros != 1e6 || d.P50Micros < 0.9e6 || d.P50Micros > 1.1e6 {
		t.Errorf("%+v", d)
	}
	if none := LatencyOf(meter.Counts{}); none.Buckets == nil || len(none.Buckets) != 0 {
		t.Errorf("%+v", none)
	}
}
