package raid

import (
	"context"
	"fmt"
	"math/bits"
)

// The path of a read: Read, or Fetch → readStraight (direct.go: read, verify, copy or lend), which is all of it where nothing is
// amiss; else → view.fetch (fetch.go: read, judge, reconstruct) → copy, or lend → repair of what was bad.

// Read fills dst with consecutive data blocks of a stripe, from block on. Each buffer of dst is a multiple of
// BlockBytes long, at any address in memory. Every block was verified; ErrUnrecoverable says that one could not
// be had (which, says a *BlockError), and dst is then undefined; with ErrUnwritten the stripe was never written. Strips found bad on working members are repaired before Read returns;
// that a repair fails is not the reader's error.
func (a *Array) Read(ctx context.Context, stripe uint64, block int, dst [][]byte) error {
	count, whole := blocksOf(dst)
	if !whole {
		return fmt.Errorf("raid: read stripe %d: buffers of broken blocks: %w", stripe, ErrRange)
	}
	return a.access(ctx, stripe, block, count, &sink{dst: dst})
}

// Fetch is Read without the copy: it lends the memory that the members' blocks were read into, in as many pieces as they lie
// in, each a multiple of BlockBytes long and at a multiple of it in memory. It appends them to dst and returns the result; loan
// has them until its Return. With an error dst is returned as it was, and nothing is lent.
func (a *Array) Fetch(ctx context.Context, stripe uint64, block, count int, dst [][]byte, loan *Loan) ([][]byte, error) {
	s := sink{lent: dst, loan: loan}
	if err := a.access(ctx, stripe, block, count, &s); err != nil {
		return dst, err
	}
	return s.lent, nil
}

// Loan is memory that Fetch lends, of as many calls as were given it. Its zero value is one of nothing.
type Loan struct{ bufs []*buffer }

// Return gives the memory back: nobody reads it any more. The loan may be used again.
func (l *Loan) Return() {
	for i, b := range l.bufs {
		b.release()
		l.bufs[i] = nil
	}
	l.bufs = l.bufs[:0]
}

// sink is where a read's blocks go: they are copied into dst, or lent.
type sink struct {
	dst  [][]byte
	loan *Loan // nil: copied
	lent [][]byte
}

// lend takes over one reference to b, of which it lends blocks from to to. What is little of a large buffer is copied after
// all: who lends holds at most four times what was asked for.
func (s *sink) lend(b *buffer, from, to int) {
	if n := to - from; 4*n < len(b.b)/BlockBytes {
		small := newBuffer(n)
		copy(small.b[:n*BlockBytes], b.b[from*BlockBytes:])
		b.release()
		b, from, to = small, 0, n
	}
	s.loan.bufs = append(s.loan.bufs, b)
	s.lent = append(s.lent, b.b[from*BlockBytes:to*BlockBytes:to*BlockBytes])
}

func (a *Array) access(ctx context.Context, stripe uint64, block, count int, to *sink) error {
	if err := a.checkBlocks(stripe, block, count); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := a.enter(); err != nil {
		return err
	}
	defer a.leave()
	if count == 0 {
		return nil
	}
	damaged, err := a.read(stripe, block, count, to)
	if damaged {
		a.repairQuietly(stripe)
	}
	a.sentence()
	return err
}

func (a *Array) read(stripe uint64, block, count int, to *sink) (damaged bool, err error) {
	defer a.stripes.rlock(stripe)()
	a.counters.reads.Add(1)
	straight, late, hedged := a.readStraight(stripe, block, count, to)
	if straight {
		return false, nil
	}
	v := a.newView(stripe)
	defer v.release()
	v.hedged = hedged
	for i := range v.strips {
		v.strips[i].silent = late>>i&1 != 0
	}
	for b := block; b < block+count; b++ {
		v.strips[b/StripBlocks].want |= 1 << (b % StripBlocks)
	}
	err = v.fetch()
	if v.anyComputed() {
		a.counters.degradedReads.Add(1)
	}
	if err == nil {
		err = v.checkLost()
	} else {
		err = v.locate(err)
	}
	if err != nil {
		return v.anyDamaged(), err
	}
	if v.hedged {
		a.counters.hedgeWins.Add(1)
	}
	v.give(to)
	return v.anyDamaged(), nil
}

// give copies or lends what was wanted.
func (v *view) give(to *sink) {
	out := spans{bufs: to.dst}
	for i := range v.strips {
		s := &v.strips[i]
		if s.want == 0 {
			continue
		}
		first, last := bits.TrailingZeros32(s.want), bits.Len32(s.want)
		if to.loan != nil {
			to.lend(s.buf.hold(), 1+first, 1+last)
			continue
		}
		for c := first; c < last; c++ {
			copy(out.next(), v.block(i, c))
		}
	}
}
