package meter

import (
	"math/bits"
	"sync/atomic"
	"time"
)

// Buckets of a histogram: below 4 µs one for each microsecond, then four for each power of two, so that a bucket is at most a
// quarter wider than its beginning; the last holds all from 2^octaves µs (67 s) on.
const (
	octaves = 26
	Buckets = 4*(octaves-1) + 1
)

// bucket is where so many microseconds are counted.
func bucket(us uint64) int {
	if us < 4 {
		return int(us)
	}
	e := bits.Len64(us) - 1
	if e >= octaves {
		return Buckets - 1
	}
	return 4*(e-1) + int(us>>(e-2)&3)
}

// Bound is where bucket i begins, in microseconds; it ends where the next begins.
func Bound(i int) uint64 {
	if i < 4 {
		return uint64(i)
	}
	return uint64(4+i%4) << (i/4 - 1)
}

// Histogram of durations. All its methods may be called concurrently. The sum is beside the buckets of what is fast, where a
// cache line more would count.
type Histogram struct {
	nanos   atomic.Uint64
	buckets [Buckets]atomic.Uint64
}

// Add counts d.
func (h *Histogram) Add(d time.Duration) {
	n := uint64(max(d, 0))
	h.buckets[bucket(n/1000)].Add(1)
	h.nanos.Add(n)
}

// Counts returns what was counted. Beside calls of Add it is no instant, but no bucket ever falls.
func (h *Histogram) Counts() (c Counts) {
	c.Nanos = h.nanos.Load()
	for i := range h.buckets {
		c.Buckets[i] = h.buckets[i].Load()
	}
	return c
}

// Counts are a histogram at one time, or the difference of two.
type Counts struct {
	Buckets [Buckets]uint64
	Nanos   uint64 // sum of the durations
}

// N is how many durations were counted.
func (c *Counts) N() (n uint64) {
	for _, b := range c.Buckets {
		n += b
	}
	return n
}

// Merge adds what o counted.
func (c *Counts) Merge(o *Counts) {
	for i, b := range o.Buckets {
		c.Buckets[i] += b
	}
	c.Nanos += o.Nanos
}

// Since is what came after before, an earlier state of the same histogram.
func (c *Counts) Since(before *Counts) (d Counts) {
	for i, b := range c.Buckets {
		d.Buckets[i] = b - min(b, before.Buckets[i])
	}
	d.Nanos = c.Nanos - min(c.Nanos, before.Nanos)
	return d
}

// Percentile is what p in a hundred took at most: as exact as a bucket is narrow, with its durations taken as evenly
// spread. What is beyond the last bound counts as the bound. Zero of nothing.
func (c *Counts) Percentile(p float64) time.Duration {
	rank := p / 100 * float64(c.N())
	below := 0.0
	for i, b := range c.Buckets {
		if b == 0 || below+float64(b) < rank {
			below += float64(b)
			continue
		}
		from := float64(Bound(i))
		if i < Buckets-1 {
			from += (float64(Bound(i+1)) - from) * (rank - below) / float64(b)
		}
		return time.Duration(from * 1000)
	}
	return 0
}
