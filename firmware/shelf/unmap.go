package shelf

import (
	"context"
	"fmt"

	"github.com/ledge-storage/ledge/target"
)

// The path of an UNMAP, and of a WRITE SAME of zeros. Afterwards the blocks read as zeros; that is a
// promise here, not a hint.
//
//	1. Unmap       checks all ranges before it touches one, then locks each.
//	2. whole       extents that lie in the range as a whole are freed: one delta each, up to 101 in one record.
//	3. the rest    becomes zero blocks in the overlay, logged as zero extents without payload, where it is not
//	               zero already: nothing of an UNMAP takes an extent. Destage writes them like other blocks.
//
// A freed extent's blocks leave the overlay together with the map entry, after the record is durable. Its
// stripes are given to others only when nothing can touch them any more (extents.go).

// Unmap implements target.Device. A store LUN frees whole extents only (ErrAlignment).
func (l *LUN) Unmap(ctx context.Context, ranges []target.Range) error {
	r, err := l.live()
	if err != nil {
		return err
	}
	eb := uint64(l.p.sb.ExtentBlocks)
	for _, x := range ranges {
		if err := r.inRange(x); err != nil {
			return err
		}
		if r.Kind == KindStore && (x.LBA%eb != 0 || x.Blocks%eb != 0 && x.LBA+x.Blocks != r.Blocks) {
			return fmt.Errorf("shelf: unmap LUN %d: blocks %d+%d: a store LUN frees whole extents of %d blocks: %w", l.id, x.LBA, x.Blocks, eb, target.ErrAlignment)
		}
	}
	for _, x := range ranges {
		if x.Blocks == 0 {
			continue
		}
		if err := l.unmap(ctx, &r, x); err != nil {
			return fmt.Errorf("shelf: unmap LUN %d: blocks %d+%d: %w", l.id, x.LBA, x.Blocks, err)
		}
	}
	return nil
}

func (l *LUN) unmap(ctx context.Context, r *lunRecord, x target.Range) error {
	per := uint64(blockBytes / r.BlockBytes)
	start, end := x.LBA, x.LBA+x.Blocks
	c, err := l.own(ctx, start/per, (end+per-1)/per)
	if err != nil {
		return err
	}
	defer l.lock.unlock(c)
	// Parts of blocks at either end (512-byte LUNs) are written as zeros.
	lo, hi := (start+per-1)/per, end/per
	if lo > hi {
		return l.zeroPart(ctx, r, start, end)
	}
	if start < lo*per {
		if err := l.zeroPart(ctx, r, start, lo*per); err != nil {
			return err
		}
	}
	if end > hi*per {
		if err := l.zeroPart(ctx, r, hi*per, end); err != nil {
			return err
		}
	}
	return l.unmapBlocks(ctx, r, lo, hi)
}

// zeroPart writes zeros to logical blocks within one block of 4 KiB, unless the block is zeros: an UNMAP must not need space.
func (l *LUN) zeroPart(ctx context.Context, r *lunRecord, start, end uint64) error {
	k, b := l.place(start / uint64(blockBytes/r.BlockBytes))
	l.p.mu.Lock()
	zero := l.p.readsZero(k, b)
	l.p.mu.Unlock()
	if zero {
		return nil
	}
	n := int(end-start) * int(r.BlockBytes)
	s, err := r.span(start, int64(n))
	if err != nil {
		return err
	}
	return l.writeLocked(ctx, r, s, [][]byte{make([]byte, n)})
}

// unmapBlocks frees and zeroes blocks [lo, hi).
func (l *LUN) unmapBlocks(ctx context.Context, r *lunRecord, lo, hi uint64) error {
	eb := uint64(l.p.sb.ExtentBlocks)
	next := lo / eb
	for next*eb < hi {
		keys := l.p.extentsFrom(l.id, uint32(next), uint32((hi-1)/eb), maxDeltas)
		if len(keys) == 0 {
			return nil
		}
		var whole []extentKey
		for _, k := range keys {
			from, to := uint64(k.ext)*eb, min(uint64(k.ext+1)*eb, r.Blocks)
			if lo <= from && to <= hi {
				whole = append(whole, k)
				continue
			}
			if err := l.zero(ctx, k, max(lo, from), min(hi, to)); err != nil {
				return err
			}
		}
		if len(whole) > 0 {
			if err := l.p.free(ctx, whole); err != nil {
				return err
			}
		}
		next = uint64(keys[len(keys)-1].ext) + 1
	}
	return nil
}

// zero makes blocks [lo, hi) of one extent zeros, those that are not.
func (l *LUN) zero(ctx context.Context, k extentKey, lo, hi uint64) error {
	for lo < hi {
		var from uint64
		n := 0
		l.p.mu.Lock()
		for ; lo < hi && n < l.p.opts.PieceBlocks; lo++ {
			_, b := l.place(lo)
			if l.p.readsZero(k, b) {
				if n > 0 {
					break
				}
				continue
			}
			if n == 0 {
				from = lo
			}
			n++
		}
		l.p.mu.Unlock()
		if n > 0 {
			if err := l.store(ctx, from, make([][]byte, n)); err != nil {
				return err
			}
		}
	}
	return nil
}

// readsZero tells whether the block is known to be zeros. Called with mu held.
func (p *Pool) readsZero(k extentKey, block int) bool {
	if e := p.over.get(k, block); e != nil {
		return e.data == nil
	}
	i, _ := p.over.locate(block)
	x, ok := p.table.lookup(k)
	return !ok || p.table.entries[x].written&(1<<i) == 0
}

// extentsFrom returns the allocated extents lo to hi of a LUN, in order, most at most.
func (p *Pool) extentsFrom(lun, lo, hi uint32, most int) []extentKey {
	p.mu.Lock()
	defer p.mu.Unlock()
	m := p.table.luns[lun]
	if m == nil {
		return nil
	}
	return m.appendRange(nil, lun, lo, hi, most)
}

// free frees extents, maxDeltas at most, as one: the map entries go durably, then their blocks from the
// overlay. The caller has their blocks locked.
func (p *Pool) free(ctx context.Context, keys []extentKey) error {
	if err := p.admit(ctx, 1, 0); err != nil {
		return err
	}
	defer p.release(1)
	ds := make([]delta, 0, len(keys))
	p.mu.Lock()
	for _, k := range keys {
		if x, ok := p.table.lookup(k); ok {
			ds = append(ds, delta{op: opFree, extent: x, lun: k.lun, ext: k.ext, birth: p.table.entries[x].birth})
		}
	}
	p.mu.Unlock()
	return p.append(func(lsn uint64) {
		for i := range ds {
			p.change(&ds[i], lsn)
		}
		p.inserts++
	}, p.deltaSet(ds))
}
