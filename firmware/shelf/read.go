package shelf

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/target"
)

// The path of a read:
//
//	1. fetchBytes   checks the range, keeps atomic writes out of it where it is more than a block (rangelock.go), and cuts
//	                it by extents.
//	2. plan         in one critical section: the overlay's copy of each block, else zeros when its stripe was
//	                never written, else the stripe to read. A plan that reads members pins the extent.
//	3. array.Fetch  what is to be read, verified (P4), rebuilt where a member lies. The overlay's blocks never
//	                change, so they are given as they are.
//	4. Fetch lends all that to the engine, which sends it from there; Read copies it.
//
// Why there is no window in which a read returns something old: a block leaves the overlay only after the
// stripe with it was written, so a plan that found no copy reads the members after that write. What is planned
// can only be overtaken by newer: a write that came after the plan, destaged before the read. Both are right
// answers to a read that ran at the same time. And the pin keeps the stripes from being given to another
// LUN between plan and read, were the extent freed meanwhile.

// Read implements target.Device.
func (l *LUN) Read(ctx context.Context, lba uint64, dst [][]byte) error {
	f := fetchPool.Get().(*fetched)
	defer f.Return()
	parts, err := l.fetchBytes(ctx, lba, byteLen(dst), nil, f)
	if err != nil {
		return err
	}
	for _, b := range dst {
		for len(b) > 0 {
			n := copy(b, parts[0])
			b = b[n:]
			if parts[0] = parts[0][n:]; len(parts[0]) == 0 {
				parts = parts[1:]
			}
		}
	}
	return nil
}

// Fetch implements target.Fetcher: what is in the overlay, and the buffers of what was read from the members.
func (l *LUN) Fetch(ctx context.Context, lba uint64, n int, dst [][]byte) ([][]byte, target.Loan, error) {
	f := fetchPool.Get().(*fetched)
	parts, err := l.fetchBytes(ctx, lba, int64(n), dst, f)
	if err != nil {
		f.Return()
		return dst, nil, err
	}
	return parts, f, nil
}

// fetched is what one read borrowed from the array. Blocks of the overlay are nobody's to give back.
type fetched struct {
	loan raid.Loan
	plan plan
}

var fetchPool = sync.Pool{New: func() any { return new(fetched) }}

// Return implements target.Loan.
func (f *fetched) Return() {
	f.loan.Return()
	f.plan.forget()
	fetchPool.Put(f)
}

// fetchBytes appends the n bytes from logical block lba on to dst.
func (l *LUN) fetchBytes(ctx context.Context, lba uint64, n int64, dst [][]byte, f *fetched) (parts [][]byte, err error) {
	r, err := l.live()
	if err != nil {
		return nil, err
	}
	s, err := r.span(lba, n)
	if err != nil || s.n == 0 {
		return dst, err
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
			return nil, fmt.Errorf("shelf: LUN %d: wait for blocks %d to %d: %w", l.id, s.lo, s.hi, err)
		}
		defer l.lock.unlock(c)
	}
	first := len(dst)
	if parts, err = l.fetch(ctx, s.lo, s.hi, dst, f); err != nil {
		return nil, err
	}
	// Sectors may begin and end within a block.
	parts[first] = parts[first][s.head:]
	last := len(parts) - 1
	parts[last] = parts[last][:len(parts[last])-s.tail]
	return parts, nil
}

// readBlocks fills dst, a slice a block, from block lo on.
func (l *LUN) readBlocks(ctx context.Context, lo uint64, dst [][]byte) error {
	f := fetchPool.Get().(*fetched)
	defer f.Return()
	parts, err := l.fetch(ctx, lo, lo+uint64(len(dst)), nil, f)
	if err != nil {
		return err
	}
	for _, part := range parts {
		for ; len(part) > 0; part = part[blockBytes:] {
			copy(dst[0], part[:blockBytes])
			dst = dst[1:]
		}
	}
	return nil
}

// fetch appends blocks [lo, hi) to dst, in pieces of whole blocks.
func (l *LUN) fetch(ctx context.Context, lo, hi uint64, dst [][]byte, f *fetched) (_ [][]byte, err error) {
	for lo < hi {
		k, first := l.place(lo)
		n := min(int(min(hi-lo, uint64(l.p.sb.ExtentBlocks))), int(l.p.sb.ExtentBlocks)-first)
		if dst, err = l.fetchExtent(ctx, k, first, n, dst, f); err != nil {
			return nil, fmt.Errorf("shelf: read LUN %d: blocks %d+%d: %w", l.id, lo, n, err)
		}
		lo += uint64(n)
	}
	return dst, nil
}

// plan says where a row of blocks comes from, in order.
type plan struct {
	runs   []run
	extent uint32
}

// run is a row of blocks of one stripe to be read from the members, or, with data, one of the overlay, or of zeros.
type run struct {
	data   []byte
	stripe uint64
	block  int
	first  int // block of the extent
	blocks int
}

// forget drops what the plan refers to.
func (n *plan) forget() {
	clear(n.runs)
	n.runs = n.runs[:0]
}

func (l *LUN) fetchExtent(ctx context.Context, k extentKey, first, n int, dst [][]byte, f *fetched) ([][]byte, error) {
	p := l.p
	p.mu.Lock()
	if p.err != nil {
		p.mu.Unlock()
		return nil, p.alive()
	}
	if l.rec.State != lunLive { // deleted since: the map may speak of another LUN
		p.mu.Unlock()
		return nil, target.ErrUnavailable
	}
	p.stats.Reads++
	members := p.plan(k, first, n, &f.plan)
	if members {
		p.table.pin(f.plan.extent)
	}
	p.mu.Unlock()
	if members {
		defer p.unpin(f.plan.extent)
		p.load.enter()
		defer p.load.leave()
	}
	for i := range f.plan.runs {
		r := &f.plan.runs[i]
		if r.data != nil {
			dst = append(dst, r.data)
			continue
		}
		var err error
		if dst, err = p.array.Fetch(ctx, r.stripe, r.block, r.blocks, dst, &f.loan); err != nil {
			return nil, l.readError(ctx, err, uint64(k.ext)*uint64(p.sb.ExtentBlocks), r)
		}
	}
	return dst, nil
}

// plan says where each of n blocks comes from, and whether members are to be read. Called with mu held.
func (p *Pool) plan(k extentKey, first, n int, out *plan) (members bool) {
	extent, mapped := p.table.lookup(k)
	var written uint64
	if mapped {
		written = p.table.entries[extent].written
	}
	out.forget()
	out.extent = extent
	next := -1 // the block that would continue the last run
	for b := first; b < first+n; b++ {
		if e := p.over.get(k, b); e != nil {
			p.stats.OverlayHits++
			data := e.data
			if data == nil {
				data = zeroBlock
			}
			out.runs = append(out.runs, run{data: data})
			continue
		}
		stripe, within := p.over.locate(b)
		switch {
		case written&(1<<stripe) == 0:
			out.runs = append(out.runs, run{data: zeroBlock})
		case next != b || within == 0:
			out.runs = append(out.runs, run{stripe: p.table.stripe(extent, stripe), block: within, first: b, blocks: 1})
			next, members = b+1, true
		default:
			out.runs[len(out.runs)-1].blocks++
			next = b + 1
		}
	}
	return members
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
