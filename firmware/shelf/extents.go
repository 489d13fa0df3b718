package shelf

import (
	"maps"
	"slices"

	"github.com/ledge-storage/ledge/target"
)

// extentTable is the map from pool extents to LUN extents, the reverse map, and what is free.
//
// A freed extent may not be given to another LUN while anything may still touch its stripes: a read that
// looked the old mapping up, or a destage that captured its blocks. Both pin the extent, and it waits in
// quarantine until the last pin is gone. (Its free record is safe by then: it is freed here only after
// Append returned.) Guarded by Pool.mu.
type extentTable struct {
	sb      *superblock
	built   bool // the derived maps are
	entries []extentEntry
	luns    map[uint32]*lunMap
	free    freeMap
	used    int    // allocated by a logged record
	cursor  uint32 // extent at which the next search starts
	pins    map[uint32]int
	limbo   map[uint32]bool // freed, still pinned
	// pending are extents given to writes whose record is not logged yet.
	pending map[extentKey]*pendingExtent
}

type pendingExtent struct {
	extent uint32
	birth  uint64
	writes int
}

func newExtentTable(sb *superblock) *extentTable {
	n := sb.extents()
	return &extentTable{sb: sb, entries: make([]extentEntry, n), luns: map[uint32]*lunMap{},
		free: newFreeMap(int(n)), pins: map[uint32]int{}, limbo: map[uint32]bool{}, pending: map[extentKey]*pendingExtent{}}
}

// block returns the entries of a metadata block; false: it is no block of the table.
func (t *extentTable) block(block uint32) ([]extentEntry, bool) {
	lo, hi, ok := t.sb.tableRange(block)
	return t.entries[lo:hi], ok
}

// tableBlock is the metadata block with the entry of an extent.
func (t *extentTable) tableBlock(extent uint32) uint32 {
	return t.sb.blockOf(extent)
}

// stripe is the array's stripe of an extent's stripe.
func (t *extentTable) stripe(extent uint32, index int) uint64 {
	return t.sb.DataStripe + uint64(extent)*uint64(t.sb.ExtentStripes) + uint64(index)
}

// build makes the derived maps from the entries, LUNs in parallel. Two extents that claim one place are corruption, and
// so is one of the pool's own that a LUN has.
func (t *extentTable) build(workers int) error {
	counts := map[uint32]int{}
	for i := range t.entries {
		if t.entries[i].lun != 0 {
			counts[t.entries[i].lun]++
		}
	}
	pairs := make(map[uint32][]uint64, len(counts))
	for lun, n := range counts {
		pairs[lun] = make([]uint64, 0, n)
	}
	for i := range t.entries {
		e := &t.entries[i]
		own := t.sb.growths > 0 && t.sb.isOwn(uint32(i))
		if own && e.lun != 0 {
			return ErrCorrupt
		}
		if own {
			continue
		}
		if e.lun == 0 {
			t.free.add(uint32(i))
			continue
		}
		pairs[e.lun] = append(pairs[e.lun], pairOf(e.ext, uint32(i)))
		t.used++
	}
	luns := slices.Sorted(maps.Keys(pairs))
	built := make([]*lunMap, len(luns))
	err := inParallel(workers, len(luns), func(i int) (err error) {
		built[i], err = newLUNMap(pairs[luns[i]])
		return err
	})
	for i, lun := range luns {
		t.luns[lun] = built[i]
	}
	t.built = err == nil
	return err
}

func (t *extentTable) lookup(k extentKey) (extent uint32, ok bool) {
	if m := t.luns[k.lun]; m != nil {
		return m.get(k.ext)
	}
	return 0, false
}

func (t *extentTable) enter(k extentKey, extent uint32) {
	m := t.luns[k.lun]
	if m == nil {
		m = &lunMap{}
		t.luns[k.lun] = m
	}
	m.put(k.ext, extent)
}

func (t *extentTable) leave(k extentKey) {
	m := t.luns[k.lun]
	if m.remove(k.ext); m.used == 0 {
		delete(t.luns, k.lun)
	}
}

// reserve makes sure that a write to k will find an extent: nothing for one that is mapped, else a free one
// that unreserve gives back when no write logged it, but none of the last keep. The caller has blocks of k locked until unreserve, so that
// k is not freed in between.
func (t *extentTable) reserve(k extentKey, keep int, birth func() uint64) error {
	if pe := t.pending[k]; pe != nil {
		pe.writes++
		return nil
	}
	pe := &pendingExtent{writes: 1}
	if x, ok := t.lookup(k); ok {
		pe.extent = x
	} else {
		x, ok := t.take(keep)
		if !ok {
			return target.ErrNoSpace
		}
		pe.extent, pe.birth = x, birth()
	}
	t.pending[k] = pe
	return nil
}

func (t *extentTable) unreserve(k extentKey) {
	pe := t.pending[k]
	if pe.writes--; pe.writes > 0 {
		return
	}
	delete(t.pending, k)
	if _, ok := t.lookup(k); !ok {
		t.release(pe.extent)
	}
}

// take removes a free extent, the next one from where the last was, so that writes spread and a freed
// extent rests; keep of them stay (reserve.go).
func (t *extentTable) take(keep int) (uint32, bool) {
	if t.free.n <= keep {
		return 0, false
	}
	x, ok := t.free.next(t.cursor)
	if ok {
		t.free.remove(x)
		t.cursor = x + 1
	}
	return x, ok
}

func (t *extentTable) release(extent uint32) {
	if t.pins[extent] > 0 {
		t.limbo[extent] = true
		return
	}
	t.free.add(extent)
}

func (t *extentTable) pin(extent uint32) { t.pins[extent]++ }

func (t *extentTable) unpin(extent uint32) {
	if t.pins[extent]--; t.pins[extent] > 0 {
		return
	}
	delete(t.pins, extent)
	if t.limbo[extent] {
		delete(t.limbo, extent)
		t.release(extent)
	}
}

// alter applies a logged delta to the entries alone, and tells whether it changed them. It is idempotent, and
// also right on entries that are ahead of the log already (they were destaged, and the log not trimmed
// so far): births only rise, so whatever belongs to an earlier allocation is recognised.
func (t *extentTable) alter(d *delta) (changed bool) {
	e := &t.entries[d.extent]
	switch d.op {
	case opAlloc:
		if d.birth <= e.birth {
			return false
		}
		*e = extentEntry{lun: d.lun, ext: d.ext, birth: d.birth}
	case opFree:
		if d.birth < e.birth || e.lun == 0 && d.birth == e.birth {
			return false
		}
		*e = extentEntry{birth: d.birth}
	case opWritten:
		if d.birth != e.birth || e.lun == 0 || e.written&d.written == d.written {
			return false
		}
		e.written |= d.written
	}
	return true
}

// apply applies a delta to a table that serves: entries and derived maps.
func (t *extentTable) apply(d *delta) (changed bool) {
	if !t.alter(d) {
		return false
	}
	k := extentKey{d.lun, d.ext}
	switch d.op {
	case opAlloc:
		t.enter(k, d.extent)
		t.used++
	case opFree:
		t.leave(k)
		t.used--
		t.release(d.extent)
	}
	return true
}
