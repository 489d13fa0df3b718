package shelf

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"

	"github.com/ledge-storage/ledge/target"
)

// device is a LUN as an engine sees it. Read is in read.go, Write in write.go, Unmap in unmap.go. It has no
// volatile cache: what returned nil is durable.
type device struct{ *LUN }

var _ target.Provisioned = device{}

// Space implements target.Provisioned: all LUNs allocate from one pool.
func (d device) Space() target.Space {
	p := d.p
	p.mu.Lock()
	defer p.mu.Unlock()
	eb := uint64(p.sb.ExtentBlocks) * blockBytes
	s := target.Space{AvailableBytes: uint64(max(0, p.sb.capacity()-p.table.used-p.keepFrom(d.id))) * eb, Shared: true,
		ThresholdBytes: uint64(p.sb.capacity()) * eb * uint64(100-p.sb.warnPercent()) / 100}
	if m := p.table.luns[d.id]; m != nil {
		s.UsedBytes = uint64(m.used) * eb
	}
	return s
}

// maxTransferBytes is the largest command that is hinted at; larger ones are taken, piece by piece.
const maxTransferBytes = 8 << 20

// Info implements target.Device.
func (d device) Info() target.Info {
	r, p := d.record(), d.p
	per := blockBytes / r.BlockBytes
	i := target.Info{
		Blocks: r.Blocks * uint64(per), BlockBytes: r.BlockBytes,
		OptimalBlocks: uint32(p.sb.stripeBlocks()) * per, MaxBlocks: maxTransferBytes / r.BlockBytes,
		UnmapGranularityBlocks: p.sb.ExtentBlocks * per,
		Thin:                   true, UUID: r.UUID,
		Vendor: "LEDGE", Product: "SHELF " + r.Kind.String(), Revision: "0001",
		Serial: p.opts.Shelf + "-" + hex.EncodeToString(r.UUID[:8]),
	}
	// What one record of the log carries whole. Sectors may begin and end within a block.
	i.AtomicBlocks = uint32(p.opts.PieceBlocks)
	if r.BlockBytes == 512 {
		i.PhysicalExponent = 3
		i.AtomicBlocks = uint32(p.opts.PieceBlocks-1) * per
	}
	return i
}

// live returns the LUN's record, or why it cannot be used.
func (l *LUN) live() (lunRecord, error) {
	l.p.mu.Lock()
	r, err := l.rec, l.p.err
	l.p.mu.Unlock()
	switch {
	case err != nil:
		return r, l.p.alive()
	case r.State != lunLive:
		return r, fmt.Errorf("shelf: LUN %d is being deleted: %w", l.id, target.ErrUnavailable)
	}
	return r, nil
}

// own returns with blocks [lo, hi) locked. A deletion that came between the check of live and the lock has
// ended the LUN, and its id may be another's.
func (l *LUN) own(ctx context.Context, lo, hi uint64) (*claim, error) {
	a := accessWrite
	if hi-lo > uint64(l.p.opts.PieceBlocks) {
		a = accessLong
	}
	c, err := l.lock.lock(ctx, lo, hi, a)
	if err != nil {
		return nil, fmt.Errorf("shelf: LUN %d: wait for blocks %d to %d: %w", l.id, lo, hi, err)
	}
	if _, err := l.live(); err != nil {
		l.lock.unlock(c)
		return nil, err
	}
	return c, nil
}

// Flush implements target.Device: what was acknowledged is durable already.
func (l *LUN) Flush(ctx context.Context) error {
	_, err := l.live()
	return err
}

// CompareAndWrite implements target.Device. The range lock makes it atomic.
func (l *LUN) CompareAndWrite(ctx context.Context, lba uint64, compare, write []byte) error {
	r, err := l.live()
	if err != nil {
		return err
	}
	s, err := r.span(lba, int64(len(compare)))
	if err != nil || s.n == 0 {
		return err
	}
	if len(compare) != len(write) {
		return fmt.Errorf("shelf: compare and write of %d and %d bytes: %w", len(compare), len(write), target.ErrAlignment)
	}
	c, err := l.own(ctx, s.lo, s.hi)
	if err != nil {
		return err
	}
	defer l.lock.unlock(c)
	f := fetchPool.Get().(*fetched)
	defer f.Return()
	parts, err := l.fetch(ctx, s.lo, s.hi, nil, f)
	if err != nil {
		return err
	}
	if old := bytes.Join(parts, nil)[s.head:][:len(compare)]; !bytes.Equal(old, compare) {
		at := 0
		for old[at] == compare[at] {
			at++
		}
		return &target.MiscompareError{Offset: uint64(at)}
	}
	return l.writeLocked(ctx, &r, s, [][]byte{write})
}

// WriteSame implements target.Device.
func (l *LUN) WriteSame(ctx context.Context, lba, blocks uint64, block []byte) error {
	r, err := l.live()
	if err != nil {
		return err
	}
	if len(block) != 0 && len(block) != int(r.BlockBytes) {
		return fmt.Errorf("shelf: write same of %d bytes: %w", len(block), target.ErrAlignment)
	}
	if err := r.inRange(target.Range{LBA: lba, Blocks: blocks}); err != nil {
		return err
	}
	if len(block) == 0 || isZero(block) && r.Kind != KindStore {
		return l.Unmap(ctx, []target.Range{{LBA: lba, Blocks: blocks}})
	}
	return l.fill(ctx, &r, lba, blocks, block)
}

// fill stores a block that is not zeros in each of blocks blocks.
func (l *LUN) fill(ctx context.Context, r *lunRecord, lba, blocks uint64, block []byte) error {
	s, err := r.span(lba, int64(blocks)*int64(r.BlockBytes))
	if err != nil || s.n == 0 {
		return err
	}
	l.p.mu.Lock()
	capacity := uint64(l.p.sb.capacity())
	l.p.mu.Unlock()
	if n := (s.hi - s.lo) / uint64(l.p.sb.ExtentBlocks); n > capacity {
		return fmt.Errorf("shelf: write same of %d extents: %w", n, target.ErrNoSpace)
	}
	c, err := l.own(ctx, s.lo, s.hi)
	if err != nil {
		return err
	}
	defer l.lock.unlock(c)
	keys := l.keys(s.lo, s.hi) // space for all of it, before the first piece
	if err := l.p.reserve(ctx, keys); err != nil {
		return fmt.Errorf("shelf: write same LUN %d: %w", l.id, err)
	}
	defer l.p.unreserve(keys)
	most := uint64(l.p.sb.stripeBlocks()) * uint64(blockBytes/r.BlockBytes)
	for blocks > 0 {
		// Pieces end where stripes do, so that a store LUN takes them.
		n := min(blocks, most-lba%most)
		src := bytes.Repeat(block, int(n))
		piece, err := r.span(lba, int64(len(src)))
		if err != nil {
			return err
		}
		if err := l.writeLocked(ctx, r, piece, [][]byte{src}); err != nil {
			return err
		}
		lba, blocks = lba+n, blocks-n
	}
	return nil
}

func isZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// Mapped implements target.Device, by extents.
func (l *LUN) Mapped(ctx context.Context, lba, blocks uint64) (mapped bool, n uint64, err error) {
	r, err := l.live()
	if err != nil {
		return false, 0, err
	}
	if err := r.inRange(target.Range{LBA: lba, Blocks: max(blocks, 1)}); err != nil {
		return false, 0, err
	}
	per := uint64(blockBytes / r.BlockBytes)
	size := uint64(l.p.sb.ExtentBlocks) * per
	l.p.mu.Lock()
	defer l.p.mu.Unlock()
	for n < blocks {
		_, ok := l.p.table.lookup(extentKey{l.id, uint32((lba + n) / size)})
		if n > 0 && ok != mapped || n/size > 4096 {
			break
		}
		mapped = ok
		n = min(blocks, n+size-(lba+n)%size)
	}
	return mapped, n, nil
}

// inRange checks a run of logical blocks against the capacity.
func (r *lunRecord) inRange(x target.Range) error {
	most := r.Blocks * uint64(blockBytes/r.BlockBytes)
	if x.LBA > most || x.Blocks > most-x.LBA {
		return fmt.Errorf("shelf: blocks %d+%d of %d: %w", x.LBA, x.Blocks, most, target.ErrRange)
	}
	return nil
}
