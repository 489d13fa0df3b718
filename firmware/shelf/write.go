package shelf

import (
	"context"
	"errors"
	"fmt"

	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/target"
)

// The path of a write:
//
//	1. Write         checks the range and owns the blocks (range lock): overlapping writes go one by one, so
//	                 that the log and the overlay see them in the same order.
//	2. gather        copies the caller's bytes into blocks that the overlay will keep. A 512-byte write is
//	                 completed from the block's present content (read.go), under the same lock.
//	3. reserve       makes sure of an extent for every block, or ErrNoSpace before anything is logged.
//	4. admit         waits for room in log and overlay (admit.go).
//	5. append        makes the blocks, and the map change where an extent is new, durable as one record.
//	6. insert        puts the blocks into the overlay with the record's LSN. Reads see them from here on.
//	7. return        the engine acknowledges (P1).
//
// Steps 4 to 6 are done for each piece of at most PieceBlocks, so that a write of no more is one record: all of it is
// there after a power cut, or nothing (target.Info.AtomicBlocks). destage.go does the rest.

// Write implements target.Device. What it returned nil for is durable, whatever fua says.
func (l *LUN) Write(ctx context.Context, lba uint64, src [][]byte, fua bool) error {
	r, err := l.live()
	if err != nil {
		return err
	}
	s, err := r.span(lba, byteLen(src))
	if err != nil || s.n == 0 {
		return err
	}
	c, err := l.own(ctx, s.lo, s.hi)
	if err != nil {
		return err
	}
	defer l.lock.unlock(c)
	return l.writeLocked(ctx, &r, s, src)
}

// writeLocked stores src in a span that the caller has locked.
func (l *LUN) writeLocked(ctx context.Context, r *lunRecord, s span, src [][]byte) error {
	blocks, err := l.gather(ctx, s, src)
	if err != nil {
		return err
	}
	if r.Kind == KindStore {
		return l.writeOnce(ctx, s.lo, blocks)
	}
	return l.store(ctx, s.lo, blocks)
}

// span is a run of bytes in blocks of 4 KiB: [lo, hi) are touched, head and tail bytes of them are not meant.
type span struct {
	lo, hi     uint64
	n          int64 // bytes
	head, tail int
}

func byteLen(bufs [][]byte) (n int64) {
	for _, b := range bufs {
		n += int64(len(b))
	}
	return n
}

// span checks a run of n bytes from logical block lba on against the LUN's capacity.
func (r *lunRecord) span(lba uint64, n int64) (span, error) {
	bb := uint64(r.BlockBytes)
	per := blockBytes / bb
	if uint64(n)%bb != 0 {
		return span{}, fmt.Errorf("shelf: %d bytes in %d-byte blocks: %w", n, bb, target.ErrAlignment)
	}
	count := uint64(n) / bb
	if most := r.Blocks * per; lba > most || count > most-lba {
		return span{}, fmt.Errorf("shelf: blocks %d+%d of %d: %w", lba, count, most, target.ErrRange)
	}
	end := lba + count
	return span{lo: lba / per, hi: (end + per - 1) / per, n: n,
		head: int(lba % per * bb), tail: int((per - end%per) % per * bb)}, nil
}

// gather copies src into whole blocks.
func (l *LUN) gather(ctx context.Context, s span, src [][]byte) ([][]byte, error) {
	blocks := make([][]byte, s.hi-s.lo)
	for i := range blocks {
		blocks[i] = make([]byte, blockBytes)
	}
	last := len(blocks) - 1
	if s.head > 0 {
		if err := l.readBlocks(ctx, s.lo, blocks[:1]); err != nil {
			return nil, err
		}
	}
	if s.tail > 0 && (last > 0 || s.head == 0) {
		if err := l.readBlocks(ctx, s.hi-1, blocks[last:]); err != nil {
			return nil, err
		}
	}
	at := s.head
	for _, b := range src {
		for len(b) > 0 {
			n := copy(blocks[at/blockBytes][at%blockBytes:], b)
			b, at = b[n:], at+n
		}
	}
	return blocks, nil
}

// writeOnce is the store LUN's rule: whole stripes, each written once. Writing the same bytes again is a
// repetition (the initiator missed our answer), and succeeds.
func (l *LUN) writeOnce(ctx context.Context, lo uint64, blocks [][]byte) error {
	eb, sb := uint64(l.p.sb.ExtentBlocks), l.p.sb.stripeBlocks()
	type part struct {
		lo uint64
		n  int
	}
	var parts []part
	for at := 0; at < len(blocks); {
		lba := lo + uint64(at)
		within := int(lba % eb)
		n := l.p.sb.usable(within / sb)
		if within%sb != 0 || at+n > len(blocks) {
			return fmt.Errorf("shelf: write LUN %d: blocks %d+%d: a store LUN takes whole stripes of %d blocks: %w", l.id, lo, len(blocks), sb, target.ErrAlignment)
		}
		if l.stripeWritten(lba) {
			if err := l.sameAs(ctx, lba, blocks[at:at+n]); err != nil {
				return err
			}
		} else {
			parts = append(parts, part{lba, n})
		}
		at += n
	}
	keys := l.keys(lo, lo+uint64(len(blocks))) // all or none, over all parts
	if err := l.p.reserve(ctx, keys); err != nil {
		return fmt.Errorf("shelf: write LUN %d: %w", l.id, err)
	}
	defer l.p.unreserve(keys)
	for _, x := range parts {
		if err := l.store(ctx, x.lo, blocks[x.lo-lo:][:x.n]); err != nil {
			return err
		}
	}
	return nil
}

// stripeWritten tells whether the stripe of an extent that holds the block was ever written.
func (l *LUN) stripeWritten(lba uint64) bool {
	p := l.p
	p.mu.Lock()
	defer p.mu.Unlock()
	k, block := l.place(lba)
	i, _ := p.over.locate(block)
	if p.over.stripe(k, i) != nil {
		return true
	}
	x, ok := p.table.lookup(k)
	return ok && p.table.entries[x].written&(1<<i) != 0
}

func (l *LUN) sameAs(ctx context.Context, lba uint64, blocks [][]byte) error {
	old := make([][]byte, len(blocks))
	for i := range old {
		old[i] = make([]byte, blockBytes)
	}
	if err := l.readBlocks(ctx, lba, old); err != nil {
		return err
	}
	for i := range old {
		if string(old[i]) != string(blocks[i]) {
			return fmt.Errorf("shelf: write LUN %d: block %d: %w", l.id, lba+uint64(i), target.ErrOverwrite)
		}
	}
	return nil
}

// store makes blocks durable from block lo on. A nil block means zeros. The overlay keeps the buffers.
func (l *LUN) store(ctx context.Context, lo uint64, blocks [][]byte) error {
	keys := l.keys(lo, lo+uint64(len(blocks)))
	if err := l.p.reserve(ctx, keys); err != nil {
		return fmt.Errorf("shelf: write LUN %d: %w", l.id, err)
	}
	defer l.p.unreserve(keys)
	for len(blocks) > 0 {
		n := min(len(blocks), l.p.opts.PieceBlocks)
		if err := l.storePiece(ctx, lo, blocks[:n]); err != nil {
			return fmt.Errorf("shelf: write LUN %d: blocks %d+%d: %w", l.id, lo, n, err)
		}
		lo, blocks = lo+uint64(n), blocks[n:]
	}
	return nil
}

// storePiece logs the blocks of one record and puts them into the overlay.
func (l *LUN) storePiece(ctx context.Context, lo uint64, blocks [][]byte) error {
	p := l.p
	if err := p.admit(ctx, len(blocks), len(blocks)); err != nil {
		return err
	}
	defer p.release(len(blocks))
	sets := []nvram.Set{l.dataSet(lo, blocks)}
	fresh := p.allocations(l.keys(lo, lo+uint64(len(blocks))))
	if len(fresh) > 0 {
		sets = append(sets, p.deltaSet(fresh))
	}
	return p.append(func(lsn uint64) {
		for i := range fresh {
			p.change(&fresh[i], lsn)
		}
		for i, b := range blocks {
			k, at := l.place(lo + uint64(i))
			p.over.put(k, at, b, lsn)
		}
		p.inserts++
		p.stats.Writes++
	}, sets...)
}

// dataSet describes blocks from lo on, runs of zeros without payload.
func (l *LUN) dataSet(lo uint64, blocks [][]byte) nvram.Set {
	s := nvram.Set{Kind: setData, Payload: make([][]byte, 0, len(blocks))}
	for i, b := range blocks {
		zero := b == nil
		if !zero {
			s.Payload = append(s.Payload, b)
		}
		if n := len(s.Extents); n > 0 && s.Extents[n-1].Zero == zero {
			s.Extents[n-1].Blocks++
			continue
		}
		s.Extents = append(s.Extents, nvram.Extent{LUN: l.id, Blocks: 1, LBA: lo + uint64(i), Zero: zero})
	}
	return s
}

// deltaSet is the logged form of changes of the extent table, maxDeltas at most.
func (p *Pool) deltaSet(ds []delta) nvram.Set {
	b := deltaBlock{dataStripe: p.sb.DataStripe, extentStripes: p.sb.ExtentStripes, deltas: ds}
	return nvram.Set{Kind: setMap, Extents: []nvram.Extent{{LUN: 0, Blocks: 1, LBA: 0}}, Payload: [][]byte{b.encode()}}
}

// change applies a logged delta. Called with mu held.
func (p *Pool) change(d *delta, lsn uint64) {
	if p.table.apply(d) {
		if d.op == opFree {
			p.over.dropExtent(extentKey{d.lun, d.ext})
		}
		p.over.touch(p.table.tableBlock(d.extent), lsn)
	}
}

// place maps a block of the LUN to its extent.
func (l *LUN) place(lba uint64) (extentKey, int) {
	eb := uint64(l.p.sb.ExtentBlocks)
	return extentKey{l.id, uint32(lba / eb)}, int(lba % eb)
}

// keys are the extents that blocks [lo, hi) touch.
func (l *LUN) keys(lo, hi uint64) []extentKey {
	eb := uint64(l.p.sb.ExtentBlocks)
	var ks []extentKey
	for e := lo / eb; e*eb < hi; e++ {
		ks = append(ks, extentKey{l.id, uint32(e)})
	}
	return ks
}

// allocations are the map changes that a write to keys must log with its blocks: none for a key of which one was
// logged. Writes to a new extent that run side by side all log it, with the same extent and birth, rather than wait
// for each other; applying it again changes nothing. A piece has far fewer extents than a delta block takes.
func (p *Pool) allocations(keys []extentKey) (fresh []delta) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, k := range keys {
		if _, ok := p.table.lookup(k); !ok {
			pe := p.table.pending[k]
			fresh = append(fresh, delta{op: opAlloc, extent: pe.extent, lun: k.lun, ext: k.ext, birth: pe.birth})
		}
	}
	return fresh
}

// reserve makes sure of extents for all keys, or of none. When all that is free is in quarantine, it waits.
func (p *Pool) reserve(ctx context.Context, keys []extentKey) error {
	for {
		p.mu.Lock()
		done := 0
		var err error
		for _, k := range keys {
			if err = p.table.reserve(k, p.keepFrom(k.lun), p.nextGen); err != nil {
				break
			}
			done++
		}
		if err == nil {
			p.mu.Unlock()
			return nil
		}
		for _, k := range keys[:done] {
			p.table.unreserve(k)
		}
		resting := len(p.table.limbo) > 0
		w := make(chan struct{})
		p.waiters = append(p.waiters, w)
		p.mu.Unlock()
		if !errors.Is(err, target.ErrNoSpace) || !resting {
			return err
		}
		if err := p.makeRoom(ctx, w); err != nil {
			return err
		}
	}
}

func (p *Pool) unreserve(keys []extentKey) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, k := range keys {
		p.table.unreserve(k)
	}
}

// nextGen numbers stripe writes and allocations. Called with mu held.
func (p *Pool) nextGen() uint64 {
	p.gen++
	if p.gen >= p.sb.GenCeiling {
		panic("shelf: generations exhausted before the pool was reopened")
	}
	return p.gen
}
