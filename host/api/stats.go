package api

import (
	"time"

	"github.com/ledge-storage/ledge/host/meter"
)

// Stats are what volumes did, each since this agent opened it. Counters only grow while a volume's Since stays the same, so
// that two of them make a rate: the difference, divided by that of Seconds.
type Stats struct {
	At time.Time `json:"at"`
	// BoundsMicros are where the buckets of every Latency begin; the last has no end.
	BoundsMicros []uint64      `json:"bounds_us"`
	Volumes      []VolumeStats `json:"volumes"`
}

// VolumeStats are one volume's.
type VolumeStats struct {
	Name    string    `json:"name"`
	UUID    string    `json:"uuid"`
	Since   time.Time `json:"since"`
	Seconds float64   `json:"seconds"` // since then, by a clock that nobody sets
	// LogicalBytes hold data now.
	LogicalBytes int64 `json:"logical_bytes"`
	Reads        struct {
		Operations
		// Queue is of reads that waited: for a write of the same blocks, or for the copy that a clone begins as.
		Queue Latency `json:"queue"`
		// Cache is of lines read from the flash cache, and, in one read of sixteen, of parts of lines; Miss of asking it for
		// what it did not have, Shelf of lines read from the shelf.
		Cache Latency `json:"cache"`
		Miss  Latency `json:"miss"`
		Shelf Latency `json:"shelf"`
		// Decode is of checksum and decompression, in one read of sixteen.
		Decode Latency `json:"decode"`
	} `json:"reads"`
	Writes struct {
		Operations
		// Queue is of writes and unmaps, until they are in the log: locks, room, back-pressure. Journal is from there until the
		// log is durable on the shelf.
		Queue   Latency `json:"queue"`
		Journal Latency `json:"journal"`
	} `json:"writes"`
	// Unmaps are also WRITE SAME of zeros.
	Unmaps Operations `json:"unmaps"`
	Cache  ReadCache  `json:"cache"`
	Packed Packed     `json:"packed"`
}

// Operations are commands of one kind. Ops and Bytes are of those that succeeded, as is Latency.
type Operations struct {
	Ops     uint64  `json:"ops"`
	Bytes   uint64  `json:"bytes"`
	Errors  uint64  `json:"errors"`
	Latency Latency `json:"latency"`
}

// Latency is a histogram. Buckets without the empty ones at its end.
type Latency struct {
	Count     uint64   `json:"count"`
	SumMicros uint64   `json:"sum_us"`
	P50Micros float64  `json:"p50_us"`
	P95Micros float64  `json:"p95_us"`
	P99Micros float64  `json:"p99_us"`
	Buckets   []uint64 `json:"buckets"`
}

// ReadCache is where a volume's reads found what is in segments: Hits and Misses are lines, or parts, that the flash cache had, and that
// the shelf had to give; Memory reads that needed neither.
type ReadCache struct {
	Hits      uint64  `json:"hits"`
	Misses    uint64  `json:"misses"`
	HitRate   float64 `json:"hit_rate"` // 0 to 1; 0 before the first
	HitBytes  uint64  `json:"hit_bytes"`
	MissBytes uint64  `json:"miss_bytes"`
	Memory    uint64  `json:"memory_reads"`
}

// Packed is what became of the blocks that were written since the opening and have been packed; zeros are not among them. The
// ratios are of these blocks, not of what the volume holds, and absent while none was stored.
type Packed struct {
	Blocks           uint64   `json:"blocks"`
	Duplicates       uint64   `json:"duplicates"`   // found stored before, by whatever volume
	StoredBytes      uint64   `json:"stored_bytes"` // of the others, compressed
	DedupRatio       *float64 `json:"dedup_ratio,omitempty"`
	CompressionRatio *float64 `json:"compression_ratio,omitempty"`
}

// LatencyOf is c for the API.
func LatencyOf(c meter.Counts) Latency {
	us := func(p float64) float64 { return float64(c.Percentile(p)) / 1000 }
	l := Latency{Count: c.N(), SumMicros: c.Nanos / 1000, P50Micros: us(50), P95Micros: us(95), P99Micros: us(99), Buckets: []uint64{}}
	for i, n := range c.Buckets {
		if n > 0 {
			l.Buckets = append(l.Buckets, c.Buckets[len(l.Buckets):i+1]...)
		}
	}
	return l
}

// Since is l without what was counted before.
func (l Latency) Since(before Latency) Latency {
	c, b := l.counts(), before.counts()
	return LatencyOf(c.Since(&b))
}

func (l Latency) counts() (c meter.Counts) {
	copy(c.Buckets[:], l.Buckets)
	c.Nanos = l.SumMicros * 1000
	return c
}
