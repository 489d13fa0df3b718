package scsi

import (
	"testing"
	"time"
)

func TestLatencyBuckets(t *testing.T) {
	for _, x := range []struct {
		d      time.Duration
		bucket int
	}{{-1, 0}, {0, 0}, {4095, 0}, {4096, 1}, {8191, 1}, {8192, 2}, {time.Second, 18}, {2 * time.Second, 19}, {time.Hour, 19}} {
		got := latencyBucket(x.d)
		if got != x.bucket || x.d >= LatencyBound(got) || got > 0 && x.d < LatencyBound(got-1) {
			t.Errorf("%v in bucket %d, want %d", x.d, got, x.bucket)
		}
	}
}

// TestStats: what sessions did is counted for the unit and for each, and is not forgotten when
// a session ends or a unit goes.
func TestStats(t *testing.T) {
	tgt, _ := newUnitFor(t, UnitOptions{})
	a, b := connect(tgt, "a", 1), connect(tgt, "b", 1)
	base, _ := tgt.Stats(0)
	own := a.Stats()
	for range 3 {
		run(a, 0, 512, nil, readOne...)
	}
	run(b, 0, 0, block, wrOne...)
	run(b, 0, 512, nil, 0x28, 0, 0xFF, 0, 0, 0, 0, 0, 1, 0) // beyond the end
	run(b, 0, 0, nil, 0xFF)
	check := func(when string) {
		t.Helper()
		s, ok := tgt.Stats(0)
		if !ok || s.Reads != 4 || s.Writes != 1 || s.Others-base.Others != 1 || s.Failed-base.Failed != 2 || s.ReadBytes != 1536 || s.WriteBytes != 512 {
			t.Errorf("%s the unit has %+v, began with %+v", when, s, base)
		}
		reads, writes := uint64(0), uint64(0)
		for i := range LatencyBuckets {
			reads += s.ReadLatency[i]
			writes += s.WriteLatency[i]
		}
		if reads != 4 || writes != 1 {
			t.Errorf("%s the histograms hold %d and %d", when, reads, writes)
		}
		if s := a.Stats(); s.Reads != 3 || s.Writes != 0 || s.Others != own.Others || s.Failed != own.Failed {
			t.Errorf("%s the session has %+v", when, s)
		}
	}
	check("with sessions")
	b.Close()
	check("after one ended")
	a.Close()
	check("after both ended")
	c := connect(tgt, "c", 1)
	run(c, 0, 512, nil, readOne...)
	if err := tgt.Detach(0); err != nil {
		t.Fatal(err)
	}
	if s := c.Stats(); s.Reads != 1 {
		t.Errorf("a detached unit takes the session's counts along: %+v", s)
	}
	if _, ok := tgt.Stats(0); ok {
		t.Error("a unit that is gone has statistics")
	}
}
