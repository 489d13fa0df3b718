package scsi

import (
	"math/bits"
	"sync"
	"sync/atomic"
	"time"
)

// Statistics. Each pair of nexus and unit has counters of its own, so that sessions never share a
// cache line, made when the first command of the pair ends. A unit and a nexus each keep a tally
// of the pairs they belong to; what they say is the sum. A command costs two looks at the
// monotonic clock and four atomic additions, and no allocation.

// LatencyBuckets is how many buckets a Histogram has.
const LatencyBuckets = 20

// firstLatencyBits is the width of the nanoseconds that bucket 0 holds: less than 4.096 µs.
const firstLatencyBits = 12

// Histogram counts durations. Bucket i holds those shorter than LatencyBound(i) that no bucket
// before it holds; the last holds all others.
type Histogram [LatencyBuckets]uint64

// LatencyBound is the upper bound of bucket i, exclusive: 4.096 µs times 2 to the i. The last
// bucket has none: its bound is the longest duration.
func LatencyBound(i int) time.Duration {
	if i >= LatencyBuckets-1 {
		return 1<<63 - 1
	}
	return 1 << (firstLatencyBits + i)
}

func latencyBucket(d time.Duration) int {
	return min(max(bits.Len64(uint64(max(d, 0)))-firstLatencyBits, 0), LatencyBuckets-1)
}

// Stats are counts since a unit was attached, or since a session began. Commands that task
// management aborted are not counted.
type Stats struct {
	// Reads and Writes are the READ and WRITE commands and their kin that move blocks; Others
	// is every other command. Failed ones, in any of these, did not end with GOOD or
	// CONDITION MET.
	Reads, Writes, Others, Failed uint64
	ReadBytes, WriteBytes         uint64
	// ReadLatency and WriteLatency count from the CDB's arrival to the status, the wait for
	// data-out included.
	ReadLatency, WriteLatency Histogram
}

func (s *Stats) add(o *Stats) {
	s.Reads += o.Reads
	s.Writes += o.Writes
	s.Others += o.Others
	s.Failed += o.Failed
	s.ReadBytes += o.ReadBytes
	s.WriteBytes += o.WriteBytes
	for i := range LatencyBuckets {
		s.ReadLatency[i] += o.ReadLatency[i]
		s.WriteLatency[i] += o.WriteLatency[i]
	}
}

// counters of one nexus and unit. The number of reads and writes is the sum of their histogram.
type counters struct {
	others, failed        atomic.Uint64
	readBytes, writeBytes atomic.Uint64
	reads, writes         [LatencyBuckets]atomic.Uint64
}

func (c *counters) stats() (s Stats) {
	s.Others, s.Failed = c.others.Load(), c.failed.Load()
	s.ReadBytes, s.WriteBytes = c.readBytes.Load(), c.writeBytes.Load()
	for i := range LatencyBuckets {
		s.ReadLatency[i], s.WriteLatency[i] = c.reads[i].Load(), c.writes[i].Load()
		s.Reads += s.ReadLatency[i]
		s.Writes += s.WriteLatency[i]
	}
	return s
}

// tally is the sum of counters that come and go.
type tally struct {
	mu   sync.Mutex
	live map[*counters]struct{}
	past Stats
}

func (y *tally) join(c *counters) {
	y.mu.Lock()
	defer y.mu.Unlock()
	if y.live == nil {
		y.live = make(map[*counters]struct{})
	}
	y.live[c] = struct{}{}
}

// leave takes c out and keeps what it counted.
func (y *tally) leave(c *counters) {
	y.mu.Lock()
	defer y.mu.Unlock()
	if _, ok := y.live[c]; !ok {
		return
	}
	delete(y.live, c)
	s := c.stats()
	y.past.add(&s)
}

func (y *tally) stats() Stats {
	y.mu.Lock()
	defer y.mu.Unlock()
	sum := y.past
	for c := range y.live {
		s := c.stats()
		sum.add(&s)
	}
	return sum
}

// counts returns the pair's counters, which the first call makes.
func (i *itl) counts() *counters {
	if c := i.counters.Load(); c != nil {
		return c
	}
	c := new(counters)
	if !i.counters.CompareAndSwap(nil, c) {
		return i.counters.Load()
	}
	i.unit.tally.join(c)
	i.nexus.tally.join(c)
	return c
}

// opClass is how a command is counted.
type opClass uint8

const (
	classOther opClass = iota
	classRead
	classWrite
)

// classOf sorts commands by what they do with blocks that travel.
func classOf(code byte) opClass {
	switch code {
	case 0x08, 0x28, 0xA8, 0x88:
		return classRead
	case 0x0A, 0x2A, 0xAA, 0x8A, 0x2E, 0xAE, 0x8E, 0x8B, 0x9C, 0x89:
		return classWrite
	}
	return classOther
}

// count counts a task that ends.
func (t *Task) count() {
	if t.itl == nil || t.aborted.Load() {
		return
	}
	c := t.itl.counts()
	switch classOf(t.CDB[0]) {
	case classRead:
		c.reads[latencyBucket(t.Nexus.Target.clock()-t.started)].Add(1)
		c.readBytes.Add(uint64(t.InSent))
	case classWrite:
		c.writes[latencyBucket(t.Nexus.Target.clock()-t.started)].Add(1)
		if t.Status == StatusGood {
			c.writeBytes.Add(uint64(t.OutWanted))
		}
	default:
		c.others.Add(1)
	}
	if t.Status != StatusGood && t.Status != StatusConditionMet {
		c.failed.Add(1)
	}
}

// clock is the time since the target was made.
func (t *Target) clock() time.Duration { return time.Since(t.made) }

// Stats returns the counts of a unit, by all sessions that are and were; false where there is none.
func (t *Target) Stats(lun uint64) (Stats, bool) {
	u := (*t.units.Load())[lun]
	if u == nil {
		return Stats{}, false
	}
	return u.tally.stats(), true
}

// Stats returns the counts of the nexus, on all units that are and were.
func (n *Nexus) Stats() Stats { return n.tally.stats() }
