package cache

import "sync/atomic"

type counters struct {
	hits, misses, bad, written, dropped, hitBytes, mediumBytes atomic.Uint64
	rejected, evicted, kept, forgotten, late, failures, life   atomic.Uint64
	roomy                                                      atomic.Bool
}

type storeCounters struct{ hits, misses, hitBytes atomic.Uint64 }

// Stats of a cache, since it was opened where nothing else is said.
type Stats struct {
	// Hits and Misses count reads; HitBytes were given. Bad counts lines whose checksum or name was
	// wrong, Failures errors of the medium, Late requests that it did not answer in time; all misses.
	Hits, Misses, HitBytes, Bad, Failures, Late uint64
	// Written counts lines that were taken in; Kept those that were written again because they are read
	// often. Of lines that were offered, Rejected were not asked for often enough, and Dropped
	// came faster than the medium takes. Evicted left for others, Forgotten with their segment.
	Written, Kept, Rejected, Dropped, Evicted, Forgotten uint64
	// MediumBytes were written to the medium; WriteAmplification is their part in the bytes of the
	// lines Written (1.06 at least: checksums). LifeBytes were written since it was formatted.
	MediumBytes, LifeBytes uint64
	WriteAmplification     float64
	// Lines are held, which are Bytes, of CapacityBytes.
	Lines                int
	Bytes, CapacityBytes int64
	// Bypasses counts how often the medium was left alone, or taken no more lines. Err is why it is
	// now, or nil. LastFault is the last that went wrong.
	Bypasses       uint64
	Err, LastFault error
	// Stores has each store's part.
	Stores []StoreStats
}

// StoreStats are one store's part in a cache.
type StoreStats struct {
	Store                  [16]byte
	Hits, Misses, HitBytes uint64
	Lines                  int
	Bytes                  int64
}

// Stats returns the figures of now.
func (c *Cache) Stats() Stats {
	s := Stats{Hits: c.hits.Load(), Misses: c.misses.Load(), HitBytes: c.hitBytes.Load(), Bad: c.bad.Load(), Failures: c.failures.Load(), Late: c.late.Load(),
		Written: c.written.Load(), Kept: c.kept.Load(), Rejected: c.rejected.Load(), Dropped: c.dropped.Load(), Evicted: c.evicted.Load(),
		Forgotten: c.forgotten.Load(), MediumBytes: c.mediumBytes.Load()}
	for _, h := range []*health{&c.reading, &c.writing} {
		h.mu.Lock()
		s.Bypasses += h.bypasses
		if s.Err == nil {
			s.Err = h.why
		}
		if s.LastFault == nil {
			s.LastFault = h.lastFault
		}
		h.mu.Unlock()
	}
	c.mu.RLock()
	defer c.mu.RUnlock()
	if c.index == nil {
		return s
	}
	line := int64(c.layout.lineBytes)
	s.Lines, s.Bytes, s.CapacityBytes = c.index.lines, int64(c.index.lines)*line, c.layout.linesBytes()
	if s.Written > 0 {
		s.WriteAmplification = float64(s.MediumBytes) / float64(s.Written*uint64(line))
	}
	s.LifeBytes = c.life.Load() * uint64(c.layout.regionBytes)
	for i, store := range c.stores {
		p := c.perStore[i]
		s.Stores = append(s.Stores, StoreStats{store, p.hits.Load(), p.misses.Load(), p.hitBytes.Load(), c.index.held[i], int64(c.index.held[i]) * line})
	}
	return s
}
