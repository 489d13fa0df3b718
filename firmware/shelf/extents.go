package shelf

import (
	"math/bits"

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
	entries []extentEntry
	luns    map[uint32]*lunMap
	free    []uint64 // bit set: free
	nfree   int
	used    int // allocated by a logged record
	cursor  int // word of free at which the next search starts
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

// lunMap is one LUN's extents, two levels so that a sparse LUN of petabytes costs what it uses.
type lunMap struct {
	pages map[uint32]*mapPage
	used  int
}

const pageExtents = 512

type mapPage struct {
	slots [pageExtents]uint32 // pool extent + 1; 0: not allocated
	used  int
}

func newExtentTable(sb *superblock) *extentTable {
	return &extentTable{sb: sb, entries: make([]extentEntry, sb.Extents), luns: map[uint32]*lunMap{},
		free: make([]uint64, (sb.Extents+63)/64), pins: map[uint32]int{}, limbo: map[uint32]bool{}, pending: map[extentKey]*pendingExtent{}}
}

// block returns the entries of a block of the table.
func (t *extentTable) block(i uint32) []extentEntry {
	lo := int(i) * tableEntries
	return t.entries[lo:min(lo+tableEntries, len(t.entries))]
}

// tableBlock is the metadata block with the entry of an extent.
func (t *extentTable) tableBlock(extent uint32) uint32 {
	return t.sb.tableBlock() + extent/tableEntries
}

// stripe is the array's stripe of an extent's stripe.
func (t *extentTable) stripe(extent uint32, index int) uint64 {
	return t.sb.DataStripe + uint64(extent)*uint64(t.sb.ExtentStripes) + uint64(index)
}

// build makes the derived maps from the entries. Two extents that claim one place are corruption.
func (t *extentTable) build() error {
	for i := range t.entries {
		e := &t.entries[i]
		if e.lun == 0 {
			t.free[i/64] |= 1 << (i % 64)
			t.nfree++
			continue
		}
		if _, ok := t.lookup(extentKey{e.lun, e.ext}); ok {
			return ErrCorrupt
		}
		t.used++
		t.enter(extentKey{e.lun, e.ext}, uint32(i))
	}
	return nil
}

func (t *extentTable) lookup(k extentKey) (extent uint32, ok bool) {
	m := t.luns[k.lun]
	if m == nil {
		return 0, false
	}
	pg := m.pages[k.ext/pageExtents]
	if pg == nil || pg.slots[k.ext%pageExtents] == 0 {
		return 0, false
	}
	return pg.slots[k.ext%pageExtents] - 1, true
}

func (t *extentTable) enter(k extentKey, extent uint32) {
	m := t.luns[k.lun]
	if m == nil {
		m = &lunMap{pages: map[uint32]*mapPage{}}
		t.luns[k.lun] = m
	}
	pg := m.pages[k.ext/pageExtents]
	if pg == nil {
		pg = &mapPage{}
		m.pages[k.ext/pageExtents] = pg
	}
	pg.slots[k.ext%pageExtents] = extent + 1
	pg.used++
	m.used++
}

func (t *extentTable) leave(k extentKey) {
	m := t.luns[k.lun]
	pg := m.pages[k.ext/pageExtents]
	pg.slots[k.ext%pageExtents] = 0
	m.used--
	if pg.used--; pg.used == 0 {
		delete(m.pages, k.ext/pageExtents)
	}
	if m.used == 0 {
		delete(t.luns, k.lun)
	}
}

// reserve makes sure that a write to k will find an extent: nothing for one that is mapped, else a free one
// that unreserve gives back when no write logged it. The caller has blocks of k locked until unreserve, so that
// k is not freed in between.
func (t *extentTable) reserve(k extentKey, birth func() uint64) error {
	if pe := t.pending[k]; pe != nil {
		pe.writes++
		return nil
	}
	pe := &pendingExtent{writes: 1}
	if x, ok := t.lookup(k); ok {
		pe.extent = x
	} else {
		x, ok := t.take()
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
// extent rests.
func (t *extentTable) take() (uint32, bool) {
	if t.nfree == 0 {
		return 0, false
	}
	for i := 0; ; i++ {
		w := (t.cursor + i) % len(t.free)
		if t.free[w] != 0 {
			bit := bits.TrailingZeros64(t.free[w])
			t.free[w] &^= 1 << bit
			t.nfree--
			t.cursor = w
			return uint32(w*64 + bit), true
		}
	}
}

func (t *extentTable) release(extent uint32) {
	if t.pins[extent] > 0 {
		t.limbo[extent] = true
		return
	}
	t.free[extent/64] |= 1 << (extent % 64)
	t.nfree++
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
