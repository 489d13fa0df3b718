package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/ledge-storage/ledge/target"
)

// The path of a read, in this order, for each block:
//
//  1. the dirty map: what is in no segment yet (after waiting until it is durable);
//  2. the map, and there a segment that is in memory still;
//  3. the line cache in RAM, the flash cache, the segment LUN (lines.go), a line at a time; a small read that does not
//     go on where one ended lately gets no more than it needs from the flash cache (part.go);
//  4. the block's checksum, which covers its address; then it is decoded.
//
// A block whose line fails the checksum is read again from the LUN, past the caches; then the map is
// asked again, because the cleaner may have moved the block and freed the segment meanwhile.

// where is what step 1 and 2 found out about a block.
type where struct {
	lba   uint64
	place loc    // on the LUN; zero: done
	wait  *batch // not durable yet
	page  *page  // of the map, and not in memory
}

// Read fills dst, whole blocks, from block lba on.
func (v *Volume) Read(ctx context.Context, lba uint64, dst []byte) error {
	return v.read(ctx, lba, dst, true)
}

// ReadStaged is Read for who goes on to stage a write of what was read: it doesn't wait for
// writes that are staged and not durable, because what follows comes after them in the log.
func (v *Volume) ReadStaged(ctx context.Context, lba uint64, dst []byte) error {
	return v.read(ctx, lba, dst, false)
}

func (v *Volume) read(ctx context.Context, lba uint64, dst []byte, durable bool) error {
	st, n := v.st, uint64(len(dst)/BlockBytes)
	if len(dst)%BlockBytes != 0 {
		return fmt.Errorf("store: read of %d bytes: %w", len(dst), target.ErrAlignment)
	}
	m := v.Meter()
	if err := v.ready(ctx); err != nil {
		return err
	}
	st.mu.RLock()
	err := st.err
	switch blocks := uint64(v.size) / BlockBytes; {
	case err != nil:
	case v.deleted:
		err = fmt.Errorf("store: volume %s is deleted: %w", v.name, target.ErrUnavailable)
	case lba > blocks || n > blocks-lba:
		err = fmt.Errorf("store: volume %s: blocks %d+%d of %d: %w", v.name, lba, n, blocks, target.ErrRange)
	}
	st.mu.RUnlock()
	if err != nil {
		return err
	}
	var far []where
	paged := false
	for i := range n {
		w, brought, err := v.find(ctx, lba+i, dst[i*BlockBytes:(i+1)*BlockBytes], durable)
		if err != nil {
			return err
		}
		if paged = paged || brought; w.place != 0 {
			far = append(far, w)
		}
	}
	if len(far) == 0 {
		if !paged {
			m.Memory.Add(1)
		}
		return nil
	}
	return v.readFar(ctx, lba, dst, far)
}

// find is steps 1 and 2, and waits for what they need: paged says that this was a page of the map.
func (v *Volume) find(ctx context.Context, lba uint64, dst []byte, durable bool) (w where, paged bool, err error) {
	m := v.Meter()
	for {
		switch w, err = v.near(lba, dst, durable); {
		case err != nil:
		case w.wait != nil:
			start := m.Now()
			err = (&Ticket{batches: []*batch{w.wait}}).Wait(ctx)
			m.ReadQueue.Add(m.Now() - start)
		case w.page != nil:
			err, paged = v.st.want(ctx, m, w.page), true
		default:
			return w, paged, nil
		}
		if err != nil {
			return w, paged, err
		}
	}
}

// near fills dst, or says where the block is, or what to wait for.
func (v *Volume) near(lba uint64, dst []byte, durable bool) (where, error) {
	st := v.st
	st.mu.RLock()
	defer st.mu.RUnlock()
	if p := v.newest(lba); p != nil {
		if durable && !p.b.durable {
			return where{wait: p.b}, nil
		}
		if p.data == nil {
			clear(dst)
		} else {
			copy(dst, p.data)
		}
		return where{}, nil
	}
	if p := v.m.absent(lba); p != nil {
		return where{page: p}, nil
	}
	l := v.m.get(lba)
	if l == 0 {
		clear(dst)
		return where{}, nil
	}
	if l == lost {
		return where{}, fmt.Errorf("store: volume %s block %d: it was given up with a page of the map: %w", v.name, lba, target.ErrMediumRead)
	}
	if b := st.inMemory[l.segment()]; b != nil {
		return where{}, decodeBlock(l, dst, b.buf[l.off():l.off()+l.len()])
	}
	return where{lba: lba, place: l}, nil
}

// readFar is steps 3 and 4 for the blocks that are on the LUN.
func (v *Volume) readFar(ctx context.Context, lba uint64, dst []byte, far []where) error {
	m := v.Meter()
	sample := m.Sample()
	if v.st.readPart(m, sample, lba, dst, far) {
		return nil
	}
	lines, err := v.st.fetch(ctx, m, far)
	if err != nil {
		return err
	}
	defer v.st.lines.done(lines)
	var start time.Duration
	if sample {
		start = m.Now()
	}
	for _, w := range far {
		p := dst[(w.lba-lba)*BlockBytes : (w.lba-lba+1)*BlockBytes]
		if decodeBlock(w.place, p, lines.block(w.place)) == nil {
			continue
		}
		sample = false // reading again is no decoding
		if err := v.readAgain(ctx, w, p); err != nil {
			return err
		}
	}
	if sample {
		m.Decoded(start)
	}
	return nil
}

// readAgain is for a block whose content was not what it should be.
func (v *Volume) readAgain(ctx context.Context, w where, dst []byte) error {
	st := v.st
	for range 8 { // the block may move again while it is read
		start := v.Meter().Now()
		err := st.readBlock(ctx, w.place, dst)
		v.Meter().FromShelf(start, w.place.len())
		if err == nil {
			st.mu.Lock()
			st.counters.badLines++
			st.mu.Unlock()
			st.lines.drop(lineOf(w.place))
			st.lines.drop(lineOf(w.place).next())
			return nil
		}
		if !errors.Is(err, ErrCorrupt) {
			return err
		}
		now, _, findErr := v.find(ctx, w.lba, dst, true)
		if findErr != nil {
			return errors.Join(findErr, err)
		}
		if now.place == 0 {
			return nil
		}
		if now.place == w.place {
			st.mu.Lock()
			st.counters.badBlocks++
			st.mu.Unlock()
			st.opt.Logger.Error("block not readable", "volume", v.name, "block", w.lba, "err", err)
			return fmt.Errorf("store: volume %s block %d: %w: %w", v.name, w.lba, err, target.ErrMediumRead)
		}
		w = now
	}
	return fmt.Errorf("store: volume %s block %d moves faster than it is read: %w", v.name, w.lba, target.ErrBusy)
}

// readBlock reads one block from the segment LUN, past all caches.
func (st *Store) readBlock(ctx context.Context, l loc, dst []byte) error {
	p, err := st.readStored(ctx, l)
	if err != nil {
		return err
	}
	return decodeBlock(l, dst, p)
}

func (st *Store) readStored(ctx context.Context, l loc) ([]byte, error) {
	from := l.off() / BlockBytes * BlockBytes
	p := make([]byte, roundUp(l.off()+l.len(), BlockBytes)-from)
	if err := st.opt.Segments.ReadAt(ctx, p, int64(l.segment())*SegmentBytes+int64(from)); err != nil {
		return nil, fmt.Errorf("store: read segment %d at %d: %w", l.segment(), from, err)
	}
	return p[l.off()-from : l.off()-from+l.len()], nil
}

// ready returns when the map is that of the volume: one that was just made a copy of another gets it when the log so far is
// packed.
func (v *Volume) ready(ctx context.Context) error {
	st := v.st
	st.mu.RLock()
	is := v.replacing == 0
	st.mu.RUnlock()
	if is {
		return nil
	}
	m := v.Meter()
	defer func(start time.Duration) { m.ReadQueue.Add(m.Now() - start) }(m.Now())
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.wait(ctx, func() bool { return v.replacing == 0 })
}

// Mapped tells whether block lba holds data, and for how many blocks, most at most, that stays so.
func (v *Volume) Mapped(lba, most uint64) (mapped bool, n uint64) {
	const atOnce = 4096 // blocks looked at with the lock held
	if v.ready(v.st.ctx) != nil {
		return true, min(most, atOnce) // the store has ended: a read will say so
	}
	is := func(lba uint64) (mapped bool, absent *page) {
		if p := v.newest(lba); p != nil {
			return p.data != nil, nil
		}
		if p := v.m.absent(lba); p != nil {
			return p.count > 0, p
		}
		return v.m.get(lba) != 0, nil
	}
	v.st.mu.RLock()
	defer v.st.mu.RUnlock()
	for {
		first, absent := is(lba)
		if absent == nil {
			mapped = first
			break
		}
		v.st.mu.RUnlock()
		err := v.st.want(v.st.ctx, v.Meter(), absent)
		v.st.mu.RLock()
		if err != nil {
			return true, min(most, pageEntries-lba%pageEntries) // a read will say so
		}
	}
	for n = 1; n < min(most, atOnce); n++ {
		if next, absent := is(lba + n); absent != nil || next != mapped {
			break
		}
	}
	return mapped, n
}
