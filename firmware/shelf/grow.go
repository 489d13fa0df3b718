package shelf

import (
	"context"
	"fmt"

	"github.com/ledge-storage/ledge/nvram"
)

// Growing the pool, when its array has grown.
//
// New stripes become new extents: extent numbers go on where they ended, and so does the arithmetic from an extent to
// its stripes. What has no room is the extent table: it lies at the front, and was sized with the pool. So each growth
// is a region, which has the table of its extents with it, in the first of them; these are the pool's own and never
// given away. Metadata blocks are numbered on, from a whole stripe: metadata stripe numbers beyond DataStripe are
// regions' tables, and metaStripe says where they lie.
//
//	array's stripes  |front|extents …             |table|extents …      |table|extents …
//	region            0                            1                      2
//
// A growth is one record of the log, the superblock that names it:
//
//	1. write    the region's table, empty, in stripes that nothing refers to; flush.
//	2. record   the superblock; from now on its extents are free ones.
//
//	 cut in     the pool is    replay
//	 1          as it was      nothing; the stripes are written again by the next try, with higher generations
//	 2          either         a superblock with more regions than the members' makes the table longer, by free
//	                           extents: the log is not trimmed beyond a superblock that the members have not, so all
//	                           changes of the new region are in it, and follow
//
// A superblock of fewer regions than are known is older, and takes none away.

// maxGrowths bounds the growths of a pool: each costs a region.
const maxGrowths = 8

// region is a run of extents that came to the pool at one time. Region 0 came with it.
type region struct {
	stripes uint64 // of the array then
	first   uint32 // extent; the first own of them hold the table
	own     uint32
	end     uint32 // extent behind the last
	block   uint32 // metadata block with the first entry
	meta    uint32 // metadata stripe of that block; region 0: 0, the front
	stripe  uint64 // where that is on the array
}

// blocks is the number of blocks of the region's table.
func (r *region) blocks() uint32 { return (r.end - r.first + tableEntries - 1) / tableEntries }

// Grow takes in the stripes that the array has gained, and returns when the space is there. It does nothing when there
// is not one extent more. ErrLimit after eight growths.
func (p *Pool) Grow(ctx context.Context) error {
	if err := p.admin.take(ctx); err != nil {
		return err
	}
	defer p.admin.give()
	p.mu.Lock()
	next, was := p.sb, p.sb.extents()
	p.mu.Unlock()
	if err := p.alive(); err != nil {
		return err
	}
	stripes := p.array.Geometry().Stripes
	if next.extentsOf(stripes) <= was {
		return nil
	}
	if err := next.grow(stripes); err != nil {
		return fmt.Errorf("shelf: grow pool: %w", err)
	}
	if err := p.writeRegion(ctx, &next); err != nil {
		return fmt.Errorf("shelf: grow pool: %w", err)
	}
	set := nvram.Set{Kind: setMeta, Extents: []nvram.Extent{{LUN: 0, Blocks: 1, LBA: 0}}, Payload: [][]byte{next.encode()}}
	err := p.append(func(lsn uint64) {
		p.sb.regions, p.sb.growths = next.regions, next.growths
		p.table.extend()
		p.over.touch(0, lsn)
	}, set)
	if err != nil {
		return fmt.Errorf("shelf: grow pool: %w", err)
	}
	p.mu.Lock()
	p.wakeWaiters()
	p.mu.Unlock()
	p.opts.Logger.Info("pool has grown", "extents", next.extents(), "before", was)
	return nil
}

// writeRegion writes the empty table of the last region.
func (p *Pool) writeRegion(ctx context.Context, sb *superblock) error {
	r := &sb.regions[sb.growths]
	n := uint32(sb.stripeBlocks())
	entries := make([]extentEntry, tableEntries)
	for first := uint32(0); first < r.blocks(); first += n {
		data := make([][]byte, n)
		for i := range n {
			data[i] = zeroBlock
			if b := r.block + first + i; first+i < r.blocks() {
				lo, hi, _ := sb.tableRange(b)
				data[i] = encodeTable(entries[:hi-lo], b)
			}
		}
		p.mu.Lock()
		gen := p.nextGen()
		p.mu.Unlock()
		if err := p.array.WriteStripe(ctx, r.stripe+uint64(first/n), gen, data); err != nil {
			return err
		}
	}
	return p.array.Flush(ctx)
}

// takeGrowths takes over the regions that a superblock in the log has more, with empty tables: see above.
func (p *Pool) takeGrowths(s *superblock) error {
	sb := &p.sb
	for i := range min(s.growths, sb.growths) + 1 {
		if s.regions[i] != sb.regions[i] {
			return fmt.Errorf("%w: superblock with another region %d", ErrCorrupt, i)
		}
	}
	if s.growths <= sb.growths {
		return nil
	}
	sb.regions, sb.growths = s.regions, s.growths
	if err := p.checkStripes(); err != nil {
		return err
	}
	p.table.extend()
	return nil
}

// checkStripes refuses a superblock that knows more stripes than the array has.
func (p *Pool) checkStripes() error {
	g, sb := p.array.Geometry(), &p.sb
	if n := sb.regions[sb.growths].stripes; sb.K != g.K || sb.M != g.M || n > g.Stripes {
		return fmt.Errorf("%w: superblock of a %d+%d array of %d stripes on one of %d+%d and %d", ErrCorrupt, sb.K, sb.M, n, g.K, g.M, g.Stripes)
	}
	return nil
}

// extentsOf is how many extents an array of that many stripes has.
func (s *superblock) extentsOf(stripes uint64) uint32 {
	if stripes <= s.DataStripe {
		return 0
	}
	return uint32(min((stripes-s.DataStripe)/uint64(s.ExtentStripes), 1<<32-2))
}

// grow adds a region, of an array that has stripes now.
func (s *superblock) grow(stripes uint64) error {
	if s.growths == maxGrowths {
		return fmt.Errorf("%w: a pool grows %d times", ErrLimit, maxGrowths)
	}
	last := &s.regions[s.growths]
	r := region{stripes: stripes, first: last.end, end: s.extentsOf(stripes)}
	n := uint32(s.stripeBlocks())
	if s.growths == 0 {
		r.meta = uint32(s.DataStripe)
	} else {
		r.meta = last.meta + (last.blocks()+n-1)/n
	}
	if stripes <= last.stripes || stripes > 1<<40 || r.end <= r.first || uint64(r.meta)*uint64(n) >= 1<<32-uint64(r.blocks())-uint64(n) {
		return fmt.Errorf("%w: from %d to %d stripes", ErrSize, last.stripes, stripes)
	}
	r.block = r.meta * n
	r.stripe = s.DataStripe + uint64(r.first)*uint64(s.ExtentStripes)
	r.own = ((r.blocks()+n-1)/n + uint32(s.ExtentStripes) - 1) / uint32(s.ExtentStripes)
	if r.own >= r.end-r.first {
		return fmt.Errorf("%w: %d extents more, their table needs %d", ErrSize, r.end-r.first, r.own)
	}
	s.growths++
	s.regions[s.growths] = r
	return nil
}

// extents is the number of extents, the pool's own included; capacity is what LUNs can have of them.
func (s *superblock) extents() uint32 { return s.regions[s.growths].end }

func (s *superblock) capacity() int {
	n := int(s.extents())
	for i := range s.growths + 1 {
		n -= int(s.regions[i].own)
	}
	return n
}

// isOwn tells whether an extent holds a region's table.
func (s *superblock) isOwn(extent uint32) bool {
	for i := 1; i <= s.growths; i++ {
		if r := &s.regions[i]; extent >= r.first && extent < r.first+r.own {
			return true
		}
	}
	return false
}

// blockOf is the metadata block with the entry of an extent.
func (s *superblock) blockOf(extent uint32) uint32 {
	i := s.growths
	for extent < s.regions[i].first {
		i--
	}
	r := &s.regions[i]
	return r.block + (extent-r.first)/tableEntries
}

// tableRange returns the extents whose entries a metadata block holds; false: it is no block of a table.
func (s *superblock) tableRange(block uint32) (lo, hi uint32, ok bool) {
	for i := range s.growths + 1 {
		r := &s.regions[i]
		if block >= r.block && block-r.block < r.blocks() {
			lo = r.first + (block-r.block)*tableEntries
			return lo, min(lo+tableEntries, r.end), true
		}
	}
	return 0, 0, false
}

// metaStripe is the array's stripe of a metadata stripe.
func (s *superblock) metaStripe(meta uint32) uint64 {
	for i := s.growths; i > 0; i-- {
		if r := &s.regions[i]; meta >= r.meta {
			return r.stripe + uint64(meta-r.meta)
		}
	}
	return uint64(meta)
}

// metaOf is the inverse of metaStripe; false: the stripe is none of the metadata's.
func (s *superblock) metaOf(stripe uint64) (meta uint32, ok bool) {
	if stripe < s.DataStripe {
		return uint32(stripe), true
	}
	for i := 1; i <= s.growths; i++ {
		if r := &s.regions[i]; stripe >= r.stripe && stripe < r.stripe+uint64(r.own)*uint64(s.ExtentStripes) {
			return r.meta + uint32(stripe-r.stripe), true
		}
	}
	return 0, false
}

// encodeGrowths and decodeGrowths are the superblock's fields from 84 on. Stripes and extents of each growth are kept,
// the rest follows.
func (s *superblock) encodeGrowths(b []byte) {
	le.PutUint32(b[84:], uint32(s.growths))
	for i := range s.growths {
		r := &s.regions[i+1]
		le.PutUint64(b[88+16*i:], r.stripes)
		le.PutUint32(b[96+16*i:], r.end)
	}
}

func (s *superblock) decodeGrowths(b []byte) error {
	n := le.Uint32(b[84:])
	if n == 0 || n > maxGrowths {
		return fmt.Errorf("%w: superblock of %d growths", ErrCorrupt, n)
	}
	for i := range int(n) {
		if err := s.grow(le.Uint64(b[88+16*i:])); err != nil {
			return fmt.Errorf("%w: superblock: growth %d: %v", ErrCorrupt, i, err)
		}
		if s.extents() != le.Uint32(b[96+16*i:]) {
			return fmt.Errorf("%w: superblock: growth %d does not add up", ErrCorrupt, i)
		}
	}
	return nil
}

// extend makes the table as long as the superblock says. In a table that serves, the new extents are free from then on.
func (t *extentTable) extend() {
	was := len(t.entries)
	n := int(t.sb.extents())
	t.entries = append(t.entries, make([]extentEntry, n-was)...)
	t.free.grow(n)
	if !t.built {
		return
	}
	for x := was; x < n; x++ {
		if !t.sb.isOwn(uint32(x)) {
			t.free.add(uint32(x))
		}
	}
}
