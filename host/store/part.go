package store

import (
	"sync"
	"time"

	"github.com/ledge-storage/ledge/host/meter"
)

// partBytes is the most that is worth reading apart from its line.
const partBytes = 16 << 10

// partBuffers are of reads under way: to make and clear one took a tenth of a read.
var partBuffers = sync.Pool{New: func() any { return new([partBytes]byte) }}

// readPart is step 3 and 4 for a small read at random: a line is sixteen times what a block needs of the flash.
// Where a part goes on where one ended a moment ago, or is the same, the line is read whole: then reads are in sequence, or it is
// wanted in RAM. It returns false if it did nothing that counts. sample says to time it.
func (st *Store) readPart(m *meter.Volume, sample bool, lba uint64, dst []byte, far []where) bool {
	cache, ok := st.opt.Cache.(partCache)
	if !ok {
		return false
	}
	segment, from, to := far[0].place.segment(), SegmentBytes, 0
	for _, w := range far {
		if w.place.segment() != segment {
			return false
		}
		from, to = min(from, w.place.off()), max(to, w.place.off()+w.place.len())
	}
	if to-from > partBytes {
		return false
	}
	buf := partBuffers.Get().(*[partBytes]byte)
	defer partBuffers.Put(buf)
	p, start := buf[:to-from], time.Duration(0)
	for at := from; at < to; { // in one line or two
		n := min(to, (at/LineBytes+1)*LineBytes) - at
		if !st.lines.wantsPart(lineKey{segment, at / LineBytes}, at, at+n) {
			return false
		}
		if sample && at == from {
			start = m.Now()
		}
		if !cache.ReadAt(st.uuid, segment, at, p[at-from:at-from+n]) {
			if sample {
				m.Miss.Add(m.Now() - start)
			}
			return false
		}
		at += n
	}
	m.Hit(len(p))
	if sample {
		now := m.Now()
		m.Cache.Add(now - start)
		start = now
	}
	for _, w := range far {
		at := w.place.off() - from
		if decodeBlock(w.place, dst[(w.lba-lba)*BlockBytes:(w.lba-lba+1)*BlockBytes], p[at:at+w.place.len()]) != nil {
			return false
		}
	}
	if sample {
		m.Decoded(start)
	}
	st.cacheHits.Add(1)
	return true
}
