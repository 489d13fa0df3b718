package store

import (
	"context"
	"slices"
)

// Segments beside the log (kindAside) hold blocks that are overwritten rarely: those that the cleaner moves, and those that
// a user overwrites after a long time. The log's own segments are left to what is overwritten soon; they empty by themselves then, and the others
// stay full, so that the cleaner has little to move.
//
// The log of the open segment says where a user's block lies (logPut), so that the order of changes is that of the log alone. A segment
// of the log may become durable before one beside it that it refers to, which fills slowly. Until that one is durable, too,
// the first is as if it were not: recovery ends the log before it (refersToWhole), and the journal keeps what is in it (reach). When half of
// the ring is kept so, or asideKeeps of it, which the next opening would have to replay, the segment beside the log is sealed as it is.

// coldTimes is how many times the mean age of blocks that are overwritten one must have to be stored beside the log. Of 90 % of overwrites
// in 10 % of the blocks, cold ones are nine times as old as the mean, hot ones a ninth. Written for each user's block there: 1.57 with 1.5, 1.55 with 2, 1.44 with
// 3, 1.51 with 4, and 1.74 without.
const coldTimes = 3

const asideKeeps = 256 << 20 // beside what waits to be packed

// meanAge is the mean of the last ages, about.
type meanAge struct{ mean, n float64 }

const agesMean = 4096

func (m *meanAge) add(age float64) {
	m.n = min(m.n+1, agesMean)
	m.mean += (age - m.mean) / m.n
}

// await is a segment of the log that is durable, and what it needs.
type await struct {
	number uint32
	cover  position
	needs  []uint32
}

// need notes that b refers to segment n. mu is held.
func (st *Store) need(b *builder, n uint32) {
	if x := st.inMemory[n]; x != nil && x.aside && !slices.Contains(b.needs, n) {
		b.needs = append(b.needs, n)
	}
}

// reach moves sealedTo behind the segments of the log that have all that they need. mu is held.
func (st *Store) reach() {
	for len(st.awaiting) > 0 && !slices.ContainsFunc(st.awaiting[0].needs, func(n uint32) bool { return st.inMemory[n] != nil }) {
		st.sealedTo, st.logTo = st.awaiting[0].cover, st.awaiting[0].number
		st.awaiting = st.awaiting[1:]
	}
}

// lockToPlace takes mu when the map's page for it is in memory, and what is to be stored beside the log has room there.
func (st *Store) lockToPlace(ctx context.Context, it *packItem) error {
	if err := st.lockForBlock(ctx, it.v, it.lba); err != nil || it.stored == nil {
		return err
	}
	it.aside = st.judge(it)
	if !it.aside || st.aside != nil && st.aside.fits(len(it.stored), 0) {
		return nil
	}
	st.mu.Unlock()
	if err := st.roomAside(ctx, len(it.stored), 0); err != nil {
		return err
	}
	return st.lockForBlock(ctx, it.v, it.lba)
}

// judge estimates when the block that it overwrites was written: between the last update but one of the segment it lies in, and
// now. Of one that overwrites nothing it is the beginning. It says whether that is so long ago that it will not be overwritten soon; of
// new blocks nobody knows. mu is held.
func (st *Store) judge(it *packItem) (cold bool) {
	old := it.v.m.get(it.lba)
	s := st.segs[old.segment()]
	if old == 0 || s == nil {
		it.updated = 0
		return false
	}
	it.updated = (s.updated + st.clock) / 2
	age := st.clock - it.updated
	cold = age > st.opt.coldTimes*st.age.mean && st.age.n > 0 && !st.recovering
	st.age.add(age)
	return cold
}

// roomAside makes sure that the open segment beside the log takes n bytes of block and entry bytes of log, sealing
// it and opening the next if not.
func (st *Store) roomAside(ctx context.Context, n, entry int) error {
	if st.aside != nil && st.aside.fits(n, entry) {
		return nil
	}
	if err := st.sealAside(ctx); err != nil {
		return err
	}
	b, err := st.begin(ctx)
	if err != nil {
		return err
	}
	b.aside, st.aside = true, b
	return nil
}

// sealAside gives the open segment beside the log to the sealer, if there is one.
func (st *Store) sealAside(ctx context.Context) error {
	b := st.aside
	if b == nil {
		return nil
	}
	st.aside = nil
	return st.hand(ctx, b)
}

// sealInTime does that when half of the ring waits for it.
func (st *Store) sealInTime(ctx context.Context) error {
	st.mu.Lock()
	st.counters.asideInTime++
	st.mu.Unlock()
	return st.sealAside(ctx)
}

// refersToWhole says whether all segments exist that the log of segment n refers to. Where one is missing it was not durable when the
// host stopped, and the log ends: what is in n is in the journal still. What it finds in the log is but a hint.
func (st *Store) refersToWhole(n uint32, f *found) bool {
	whole := true
	_ = decodeLog(n, f.slots, f.log, func(c *change) error {
		if c.kind == logRef || c.kind == logPut {
			whole = whole && !slices.ContainsFunc(c.places, func(l loc) bool { return l.segment() != n && st.segs[l.segment()] == nil })
		}
		return nil
	})
	if !whole {
		st.counters.shortSegments++
	}
	return whole
}
