package shelf

import "container/heap"

// overlay holds the acknowledged blocks that are not on the members: what reads must see first, and what
// destage has yet to write. It is grouped by stripe, since a stripe is what destage writes.
// Guarded by Pool.mu; the data of an entry is never changed once it is in, so it is read without the lock.
type overlay struct {
	sb      *superblock
	refs    *lsnRefs
	extents map[extentKey]*dirtyExtent
	entries int
	// full are stripes that became whole, oldest first; some may have been destaged since (inFull is false).
	full []*dirtyStripe
	// oldest orders all dirty stripes by a lower bound of their oldest entry's LSN.
	oldest stripeHeap
	serial uint64
}

// extentKey names an extent of a LUN. Of LUN 0 it names a stripe of the metadata.
type extentKey struct{ lun, ext uint32 }

type dirtyExtent struct {
	stripes []*dirtyStripe // by stripe of the extent; nil: clean
	dirty   int
}

type dirtyStripe struct {
	key    extentKey
	index  int // stripe of the extent
	usable int // blocks of the stripe that the extent uses
	blocks map[int]*entry
	// bound is not above the lowest LSN of blocks; serial breaks ties in order of arrival.
	bound, serial uint64
	heapIndex     int
	inFull        bool
	// stuck: its old blocks cannot be read now, and are not given up so far (lost.go). It is tried again in pick
	// retryAt, or when failed members count as gone and did not when it was tried (forced).
	stuck, forced bool
	retryAt       uint64
}

// entry is the newest acknowledged copy of a block, or a metadata block that differs from the members' copy.
type entry struct {
	data []byte // nil: zeros (metadata: rendered when destaged)
	lsn  uint64
	// since is, of a metadata block that is being destaged, the lowest LSN of its changes since; 0: none.
	since uint64
}

func newOverlay(sb *superblock, refs *lsnRefs) *overlay {
	return &overlay{sb: sb, refs: refs, extents: map[extentKey]*dirtyExtent{}}
}

// locate maps a block of an extent to its stripe.
func (o *overlay) locate(block int) (stripe, within int) {
	sb := o.sb.stripeBlocks()
	return block / sb, block % sb
}

func (o *overlay) stripe(k extentKey, index int) *dirtyStripe {
	if e := o.extents[k]; e != nil {
		return e.stripes[index]
	}
	return nil
}

// get returns the newest copy of a block of an extent, or nil.
func (o *overlay) get(k extentKey, block int) *entry {
	i, w := o.locate(block)
	if s := o.stripe(k, i); s != nil {
		return s.blocks[w]
	}
	return nil
}

// put makes data (nil: zeros) the newest copy of a block, logged in lsn.
func (o *overlay) put(k extentKey, block int, data []byte, lsn uint64) {
	i, w := o.locate(block)
	s := o.dirty(k, i, lsn)
	o.refs.add(lsn, 1)
	if old := s.blocks[w]; old != nil {
		o.refs.drop(old.lsn)
		o.entries--
	}
	s.blocks[w] = &entry{data: data, lsn: lsn}
	o.entries++
	o.enlist(s)
}

// touch notes that a metadata block changed with lsn.
func (o *overlay) touch(block uint32, lsn uint64) {
	sb := uint32(o.sb.stripeBlocks())
	s := o.dirty(extentKey{0, block / sb}, 0, lsn)
	w := int(block % sb)
	e := s.blocks[w]
	switch {
	case e == nil:
		s.blocks[w] = &entry{lsn: lsn, since: lsn}
		o.refs.add(lsn, 1)
		o.entries++
	default:
		if e.since == 0 || lsn < e.since {
			e.since = lsn
		}
		if lsn < e.lsn {
			o.refs.add(lsn, 1)
			o.refs.drop(e.lsn)
			e.lsn = lsn
		}
	}
}

// dirty returns the stripe, made when it was clean.
func (o *overlay) dirty(k extentKey, index int, lsn uint64) *dirtyStripe {
	x := o.extents[k]
	if x == nil {
		n := o.sb.ExtentStripes
		if k.lun == 0 {
			n = 1
		}
		x = &dirtyExtent{stripes: make([]*dirtyStripe, n)}
		o.extents[k] = x
	}
	s := x.stripes[index]
	if s == nil {
		o.serial++
		s = &dirtyStripe{key: k, index: index, blocks: map[int]*entry{}, bound: lsn, serial: o.serial}
		s.usable = o.sb.usable(index)
		if k.lun == 0 {
			s.usable = o.sb.stripeBlocks()
		}
		x.stripes[index] = s
		x.dirty++
		heap.Push(&o.oldest, s)
	}
	if lsn < s.bound {
		s.bound = lsn
		heap.Fix(&o.oldest, s.heapIndex)
	}
	return s
}

// whole tells whether every block of the stripe is in the overlay, so that it can be written without a read.
// Metadata never counts as whole: its log records are changes, not blocks, so that a torn full write
// of it could not be made good by replay.
func (s *dirtyStripe) whole() bool { return s.key.lun != 0 && len(s.blocks) == s.usable }

func (o *overlay) enlist(s *dirtyStripe) {
	if !s.inFull && s.whole() {
		s.inFull = true
		o.full = append(o.full, s)
	}
}

// remove drops a block of s.
func (o *overlay) remove(s *dirtyStripe, within int) {
	e := s.blocks[within]
	o.refs.drop(e.lsn)
	delete(s.blocks, within)
	o.entries--
	s.inFull = false
	if len(s.blocks) == 0 {
		o.forget(s)
	}
}

func (o *overlay) forget(s *dirtyStripe) {
	x := o.extents[s.key]
	x.stripes[s.index] = nil
	heap.Remove(&o.oldest, s.heapIndex)
	if x.dirty--; x.dirty == 0 {
		delete(o.extents, s.key)
	}
}

// dropExtent forgets all blocks of an extent: it was freed.
func (o *overlay) dropExtent(k extentKey) {
	x := o.extents[k]
	if x == nil {
		return
	}
	for _, s := range x.stripes {
		if s == nil {
			continue
		}
		for _, e := range s.blocks {
			o.refs.drop(e.lsn)
			o.entries--
		}
		clear(s.blocks)
		s.inFull = false
		o.forget(s)
	}
}

// nextFull returns the stripe that has been whole for longest, of those with a block at or below LSN upTo, or nil, and
// takes it from the list. It looks at so many at most: those that are younger go to the end of the list.
func (o *overlay) nextFull(upTo uint64, looks *int) *dirtyStripe {
	for len(o.full) > 0 && *looks > 0 {
		s := o.full[0]
		o.full = o.full[1:]
		if !s.inFull || len(s.blocks) == 0 {
			continue
		}
		*looks--
		if s.lowest() > upTo {
			o.full = append(o.full, s)
			continue
		}
		s.inFull = false
		return s
	}
	return nil
}

// lowest is the LSN of the oldest block.
func (s *dirtyStripe) lowest() uint64 {
	low := ^uint64(0)
	for _, e := range s.blocks {
		low = min(low, e.lsn)
	}
	return low
}

// nextOldest takes the stripe with the oldest entry out of the heap; the caller puts it back with
// heap.Push. A bound that overwrites have made too low is corrected first, so that a hot stripe is not
// destaged for the sake of copies that nobody needs.
func (o *overlay) nextOldest() *dirtyStripe {
	for len(o.oldest) > 0 {
		s := o.oldest[0]
		if low := s.lowest(); low > s.bound {
			s.bound = low
			heap.Fix(&o.oldest, 0)
			continue
		}
		return heap.Pop(&o.oldest).(*dirtyStripe)
	}
	return nil
}

// stuckStripes counts the dirty stripes that cannot be destaged now.
func (o *overlay) stuckStripes() (n int) {
	for _, s := range o.oldest {
		if s.stuck && !s.whole() {
			n++
		}
	}
	return n
}

// stripeHeap is a heap of dirty stripes by bound, then by arrival.
type stripeHeap []*dirtyStripe

func (h stripeHeap) Len() int { return len(h) }
func (h stripeHeap) Less(i, j int) bool {
	if h[i].bound != h[j].bound {
		return h[i].bound < h[j].bound
	}
	return h[i].serial < h[j].serial
}
func (h stripeHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].heapIndex, h[j].heapIndex = i, j
}
func (h *stripeHeap) Push(x any) {
	s := x.(*dirtyStripe)
	s.heapIndex = len(*h)
	*h = append(*h, s)
}
func (h *stripeHeap) Pop() any {
	old := *h
	s := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	s.heapIndex = -1
	return s
}
