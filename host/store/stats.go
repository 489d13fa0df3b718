package store

import (
	"slices"
	"strings"

	"github.com/ledge-storage/ledge/host/meter"
)

// counters only grow; they begin with the opening of the store. Guarded by Store.mu.
type counters struct {
	duplicates, uniques int64
	absorbed            int64 // blocks overwritten before they were packed
	aside               int64 // of the uniques, stored beside the log
	beside              int64 // of the duplicates, found by the table of a segment that had another
	segmentsWritten     int64
	segmentsFreed       int64
	blocksMoved         int64
	checkpoints         int64
	journalBytes        int64
	badLines, badBlocks int64
	// Of maps. pagesAgain are written because little of their segment counted, latePages taken apart when they were read.
	pagesRead, pagesWritten, pagesAgain, latePages int64
	asideInTime                                    int64 // segments beside the log that were sealed as they were, for the journal's sake
	copiesRead                                     int64 // checkpoints whose first copy could not be
	// Of the recovery. replayedAside are segments beside the log; shortSegments of the log were durable, and something that they refer to not.
	replayedSegments, replayedAside, replayedRecords, shortSegments int64
}

// Stats are figures of the store: what it holds now, and what happened since it was opened.
type Stats struct {
	// LogicalBytes: blocks of all volumes that hold data, snapshots not counted. UniqueBytes: different blocks among them,
	// uncompressed; of a segment with both shared and overwritten blocks too many may be counted.
	LogicalBytes, UniqueBytes int64
	// StoredBytes: bytes in use in segments: blocks, tables, logs, checkpoint, and what is
	// acknowledged and not packed yet. AllocatedBytes: whole segments on the shelf.
	StoredBytes, AllocatedBytes int64
	// PendingBytes are acknowledged and not packed.
	PendingBytes int64
	// JournalBytes and JournalUsedBytes are the ring's size and what of it is needed.
	JournalBytes, JournalUsedBytes int64
	// DedupRatio is LogicalBytes/UniqueBytes; CompressionRatio UniqueBytes/StoredBytes. 1 when empty.
	DedupRatio, CompressionRatio float64
	// CacheHits and CacheMisses count lines that were asked of the flash cache.
	CacheHits, CacheMisses int64
	// Segments, MapBytes of MapLimit, IndexEntries: what is in use of the stated limits. Of the maps' pages MapResident are in memory.
	Segments     int
	MapBytes     int64
	MapLimit     int64
	MapPages     int64
	MapResident  int64
	IndexEntries int
	IndexBytes   int64
	IndexReady   bool
	IndexSampled bool // there was no room for all of it
	// Since the opening: blocks found stored before, and blocks stored; segments written and
	// freed; blocks moved by the cleaner; bytes written to the journal; lines that failed a block's checksum
	// and read well from the shelf; blocks that could not be read; pages of maps read and written.
	Duplicates, Uniques, SegmentsWritten, SegmentsFreed, BlocksMoved, Checkpoints, JournalWritten, BadLines, BadBlocks int64
	Beside                                                                                                             int64 // of Duplicates, by what lies beside another
	PagesRead, PagesWritten                                                                                            int64
	Absorbed                                                                                                           int64 // blocks never stored, since they were overwritten before
	// Full says that the shelf refused a segment for lack of space, and writes are refused.
	Full bool
	// Epoch of this opening, and the fingerprint engine in use.
	Epoch       uint64
	Fingerprint string
}

// Stats returns the figures of now.
func (st *Store) Stats() Stats {
	st.mu.RLock()
	defer st.mu.RUnlock()
	c := &st.counters
	s := Stats{
		AllocatedBytes: int64(len(st.segs)+st.ckptSegments) * SegmentBytes, StoredBytes: st.ckptBytes,
		JournalBytes: int64(st.ringSize), JournalUsedBytes: int64(st.head - st.tail),
		CacheHits: st.cacheHits.Load(), CacheMisses: st.cacheMisses.Load(), Segments: len(st.segs) + st.ckptSegments, MapBytes: st.maps.bytes(), MapLimit: st.maps.limit, MapPages: st.maps.pages, MapResident: st.maps.resident,
		IndexEntries: st.index.Load().Len(), IndexBytes: st.index.Load().Bytes(), IndexSampled: st.index.Load().Forgot(), IndexReady: st.indexReady,
		Duplicates: c.duplicates, Uniques: c.uniques, SegmentsWritten: c.segmentsWritten, SegmentsFreed: c.segmentsFreed,
		BlocksMoved: c.blocksMoved, Checkpoints: c.checkpoints, JournalWritten: c.journalBytes, BadLines: c.badLines, BadBlocks: c.badBlocks,
		Beside: c.beside, Absorbed: c.absorbed, PagesRead: c.pagesRead, PagesWritten: c.pagesWritten,
		Full: st.full, Epoch: st.epoch, Fingerprint: st.hasher.Engine().String(),
	}
	for _, g := range st.segs {
		s.UniqueBytes += min(g.live, int64(g.slots)) * BlockBytes
		s.StoredBytes += int64(g.bytes)
	}
	for _, v := range st.volumes {
		i := v.info()
		if !v.snapshot {
			s.LogicalBytes += i.LogicalBytes
		}
		s.PendingBytes += i.PendingBytes
	}
	s.UniqueBytes += s.PendingBytes
	s.StoredBytes += s.PendingBytes
	s.DedupRatio, s.CompressionRatio = ratio(s.LogicalBytes, s.UniqueBytes), ratio(s.UniqueBytes, s.StoredBytes)
	return s
}

func ratio(a, b int64) float64 {
	if a == 0 || b == 0 {
		return 1
	}
	return float64(a) / float64(b)
}

// Metered is a volume that has a handle, and what counts its requests since the first one was given out.
type Metered struct {
	VolumeInfo
	Meter *meter.Volume
}

// Metered lists the volumes that are metered, by name.
func (st *Store) Metered() []Metered {
	st.mu.RLock()
	defer st.mu.RUnlock()
	var list []Metered
	for _, v := range st.byName {
		if v.metered != nil {
			list = append(list, Metered{v.info(), v.metered})
		}
	}
	slices.SortFunc(list, func(a, b Metered) int { return strings.Compare(a.Name, b.Name) })
	return list
}
