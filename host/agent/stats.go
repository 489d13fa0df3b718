package agent

import (
	"net/http"
	"time"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/ledge-storage/ledge/host/meter"
	"github.com/ledge-storage/ledge/host/store"
)

// Metered is an engine that counts what requests to its volumes do.
type Metered interface {
	Metered() []store.Metered
}

// stats are of one volume, or of all: "".
func (a *Agent) stats(volume string) (s api.Stats, err error) {
	e, err := a.current()
	if err != nil {
		return s, err
	}
	m, ok := e.(Metered)
	if !ok {
		return s, refuse(http.StatusNotImplemented, "", "this agent's engine has no statistics")
	}
	if volume != "" {
		if _, err := a.volume(volume); err != nil {
			return s, err
		}
	}
	s = api.Stats{At: time.Now().UTC(), BoundsMicros: make([]uint64, meter.Buckets), Volumes: []api.VolumeStats{}}
	for i := range s.BoundsMicros {
		s.BoundsMicros[i] = meter.Bound(i)
	}
	for _, v := range m.Metered() {
		if !own(v.Name) && (volume == "" || volume == v.Name) {
			s.Volumes = append(s.Volumes, describeStats(v))
		}
	}
	if volume != "" && len(s.Volumes) == 0 {
		return s, refuse(http.StatusConflict, "see the agent's log", "volume %q is not open: it could not be exported", clip(volume))
	}
	return s, nil
}

func describeStats(v store.Metered) (s api.VolumeStats) {
	m := v.Meter
	s.Name, s.UUID, s.LogicalBytes = v.Name, formatUUID(v.UUID), v.LogicalBytes
	s.Since, s.Seconds = m.Since().UTC(), m.Now().Seconds()
	s.Reads.Operations, s.Writes.Operations, s.Unmaps = operations(&m.Reads), operations(&m.Writes), operations(&m.Unmaps)
	for _, x := range []struct {
		to   *api.Latency
		from *meter.Histogram
	}{{&s.Reads.Queue, &m.ReadQueue}, {&s.Reads.Cache, &m.Cache}, {&s.Reads.Miss, &m.Miss}, {&s.Reads.Shelf, &m.Shelf}, {&s.Reads.Decode, &m.Decode}, {&s.Writes.Queue, &m.WriteQueue}, {&s.Writes.Journal, &m.Journal}} {
		*x.to = api.LatencyOf(x.from.Counts())
	}
	s.Cache = api.ReadCache{Hits: m.Hits.Load(), Misses: s.Reads.Shelf.Count, HitBytes: m.CacheBytes.Load(), MissBytes: m.ShelfBytes.Load(), Memory: m.Memory.Load()}
	if n := s.Cache.Hits + s.Cache.Misses; n > 0 {
		s.Cache.HitRate = float64(s.Cache.Hits) / float64(n)
	}
	duplicates, uniques := m.Duplicates.Load(), m.Uniques.Load()
	s.Packed = api.Packed{Blocks: duplicates + uniques, Duplicates: duplicates, StoredBytes: m.StoredBytes.Load()}
	if uniques > 0 && s.Packed.StoredBytes > 0 {
		dedup, compression := float64(s.Packed.Blocks)/float64(uniques), float64(uniques*store.BlockBytes)/float64(s.Packed.StoredBytes)
		s.Packed.DedupRatio, s.Packed.CompressionRatio = &dedup, &compression
	}
	return s
}

func operations(c *meter.Command) api.Operations {
	l := api.LatencyOf(c.Counts())
	return api.Operations{Ops: l.Count, Bytes: c.Bytes.Load(), Errors: c.Errors.Load(), Latency: l}
}
