package shelf

import (
	"context"
	"errors"
	"fmt"

	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/target"
)

// The path of a read:
//
//	1. Read        checks the range, keeps atomic writes out of it where it is more than a block (rangelock.go), cuts
//	               it by extents, and makes of the caller's buffers one slice a block.
//	2. plan        in one critical section: the overlay's copy of each block, else zeros when its stripe was
//	               never written, else the stripe to read. A plan that reads members pins the extent.
//	3. copy        the overlay's blocks. Their buffers never change, so this needs no lock.
//	4. array.Read  the rest, verified (P4), rebuilt where a member lies.
//
// Why there is no window in which a read returns something old: a block leaves the overlay only after the
// stripe with it was written, so a plan that found no copy reads the members after that write. What is planned
// can only be overtaken by newer: a write that came after the plan, destaged before the read. Both are right
// answers to a read that ran at the same time. And the pin keeps the stripes from being given to another
// LUN between plan and read, were the extent freed meanwhile.

// Read implements target.Device.
func (l *LUN) Read(ctx context.Context, lba uint64, dst [][]byte) (err error) {
	r, err := l.live()
	if err != nil {
		return err
	}
	s, err := r.span(lba, byteLen(dst))
	if err != nil || s.n == 0 {
		return err
	}
	defer func() {
		// A block of 4 KiB may begin before the first of the sectors asked for.
		if me := (*target.MediumError)(nil); errors.As(err, &me) {
			me.LBA = max(me.LBA, lba)
		}
	}()
	if s.hi-s.lo > 1 {
		c, err := l.lock.lock(ctx, s.lo, s.hi, accessRead)
		if err != nil {
			return fmt.Errorf("shelf: LUN %d: wait for blocks %d to %d: %w", l.id, s.lo, s.hi, err)
		}
		defer l.lock.unlock(c)
	}
	if blocks := splitBlocks(dst); s.head == 0 && s.tail == 0 && blocks != nil {
		return l.readBlocks(ctx, s.lo, blocks)
	}
	blocks := make([][]byte, s.hi-s.lo)
	for i := range blocks {
		blocks[i] = make([]byte, blockBytes)
	}
	if err := l.readBlocks(ctx, s.lo, blocks); err != nil {
		return err
	}
	at := s.head
	for _, b := range dst {
		for len(b) > 0 {
			n := copy(b, blocks[at/blockBytes][at%blockBytes:])
			b, at = b[n:], at+n
		}
	}
	return nil
}

// splitBlocks cuts buffers into blocks, or returns nil when a block would lie in two.
func splitBlocks(bufs [][]byte) [][]byte {
	var blocks [][]byte
	for _, b := range bufs {
		if len(b)%blockBytes != 0 {
			return nil
		}
		for ; len(b) > 0; b = b[blockBytes:] {
			blocks = append(blocks, b[:blockBytes:blockBytes])
		}
	}
	return blocks
}

// readBlocks fills dst, a slice a block, from block lo on.
func (l *LUN) readBlocks(ctx context.Context, lo uint64, dst [][]byte) error {
	for len(dst) > 0 {
		k, first := l.place(lo)
		n := min(len(dst), int(l.p.sb.ExtentBlocks)-first)
		if err := l.readExtent(ctx, k, first, dst[:n]); err != nil {
			return fmt.Errorf("shelf: read LUN %d: blocks %d+%d: %w", l.id, lo, n, err)
		}
		lo, dst = lo+uint64(n), dst[n:]
	}
	return nil
}

// run is a row of blocks of one stripe to be read from the members.
type run struct {
	stripe uint64
	block  int
	first  int // block of the extent
	dst    [][]byte
}

func (l *LUN) readExtent(ctx context.Context, k extentKey, first int, dst [][]byte) error {
	p := l.p
	hits := make([][]byte, len(dst)) // the overlay's copies; nil: read, or zeros when in zero
	p.mu.Lock()
	if p.err != nil {
		p.mu.Unlock()
		return p.alive()
	}
	if l.rec.State != lunLive { // deleted since: the map may speak of another LUN
		p.mu.Unlock()
		return target.ErrUnavailable
	}
	p.stats.Reads++
	runs, extent := p.plan(k, first, dst, hits)
	if runs != nil {
		p.table.pin(extent)
	}
	p.mu.Unlock()
	for i, h := range hits {
		if h != nil {
			copy(dst[i], h)
		}
	}
	if runs == nil {
		return nil
	}
	defer p.unpin(extent)
	p.load.enter()
	defer p.load.leave()
	for _, r := range runs {
		if err := p.array.Read(ctx, r.stripe, r.block, r.dst); err != nil {
			return l.readError(ctx, err, uint64(k.ext)*uint64(p.sb.ExtentBlocks), &r)
		}
	}
	return nil
}

// plan says where each block comes from. Called with mu held.
func (p *Pool) plan(k extentKey, first int, dst, hits [][]byte) (runs []run, extent uint32) {
	extent, mapped := p.table.lookup(k)
	var written uint64
	if mapped {
		written = p.table.entries[extent].written
	}
	next := -1 // the block that would continue the last run
	for i := range dst {
		b := first + i
		if e := p.over.get(k, b); e != nil {
			p.stats.OverlayHits++
			hits[i] = e.data
			if e.data == nil {
				hits[i] = zeroBlock
			}
			continue
		}
		stripe, within := p.over.locate(b)
		if written&(1<<stripe) == 0 {
			hits[i] = zeroBlock
			continue
		}
		if next != b || within == 0 {
			runs = append(runs, run{stripe: p.table.stripe(extent, stripe), block: within, first: b})
		}
		r := &runs[len(runs)-1]
		r.dst = append(r.dst, dst[i])
		next = b + 1
	}
	return runs, extent
}

func (p *Pool) unpin(extent uint32) {
	p.mu.Lock()
	p.table.unpin(extent)
	p.wakeWaiters()
	p.mu.Unlock()
}

// readError translates an error of the array for the engines. r is the run that was read, of the extent at block base.
func (l *LUN) readError(ctx context.Context, err error, base uint64, r *run) error {
	p := l.p
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, raid.ErrReservation), errors.Is(err, raid.ErrStaleEpoch):
		p.fail(err)
		return p.alive()
	}
	return l.lostAt(err, base+uint64(r.first), r)
}
