package raid

import (
	"context"
	"fmt"
)

// The path of a read: Read → readStraight (direct.go: read, verify, copy), which is all of it where nothing is amiss; else
// → view.fetch (fetch.go: read, judge, reconstruct) → copy → repair of what was bad.

// Read fills dst with consecutive data blocks of a stripe, from block on. Each buffer of dst is a multiple of
// BlockBytes long, at any address in memory. Every block was verified; ErrUnrecoverable says that one could not
// be had (which, says a *BlockError), and dst is then undefined; with ErrUnwritten the stripe was never written. Strips found bad on working members are repaired before Read returns;
// that a repair fails is not the reader's error.
func (a *Array) Read(ctx context.Context, stripe uint64, block int, dst [][]byte) error {
	count, whole := blocksOf(dst)
	if !whole {
		return fmt.Errorf("raid: read stripe %d: buffers of broken blocks: %w", stripe, ErrRange)
	}
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
	damaged, err := a.read(stripe, block, count, dst)
	if damaged {
		a.repairQuietly(stripe)
	}
	a.sentence()
	return err
}

func (a *Array) read(stripe uint64, block, count int, dst [][]byte) (damaged bool, err error) {
	defer a.stripes.rlock(stripe)()
	a.counters.reads.Add(1)
	straight, late, hedged := a.readStraight(stripe, block, count, dst)
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
	out := spans{bufs: dst}
	for b := block; b < block+count; b++ {
		copy(out.next(), v.block(b/StripBlocks, b%StripBlocks))
	}
	return v.anyDamaged(), nil
}
