package raid

import (
	"context"
	"fmt"
	"math/bits"
)

// The path of a full-stripe write: WriteStripe → lay out → parity → checksum blocks → all members at once →
// settle (labels.go: who missed it is recorded). It never reads. A crash in the middle leaves a stripe of two
// generations; the caller still has all of its data in its log, and writes it again.

// WriteStripe writes a whole stripe: data holds K*StripBytes in buffers of whole blocks, at any address in memory. Data
// at addresses that are multiples of BlockBytes is written from where it is: a member that hangs may read it long after
// WriteStripe has returned, so nobody but the collector may take that memory back, or a part of the member, which is
// failed then, holds what its checksums deny. It returns nil when every member has it that is not recorded as failed. It is durable after Flush.
func (a *Array) WriteStripe(ctx context.Context, stripe, gen uint64, data [][]byte) error {
	k := a.layout.Data()
	count, whole := blocksOf(data)
	if !whole || count != k*StripBlocks {
		return fmt.Errorf("raid: write stripe %d: %d blocks, not %d: %w", stripe, count, k*StripBlocks, ErrRange)
	}
	if err := a.beginWrite(ctx, stripe, gen); err != nil {
		return err
	}
	defer a.leave()
	defer a.stripes.lock(stripe)()
	if meta := a.cache.get(stripe); meta != nil && meta.newest() >= gen {
		return fmt.Errorf("raid: write stripe %d: generation %d after %d: %w", stripe, gen, meta.newest(), ErrGeneration)
	}
	places := a.places(stripe)
	if err := a.writable(stripe, places); err != nil {
		return err
	}
	w := a.layOut(stripe, gen, data, places)
	defer w.release()
	if err := w.encode(); err != nil {
		return fmt.Errorf("raid: write stripe %d: encode: %w", stripe, err)
	}
	t, meta := w.plan(places)
	a.counters.fullWrites.Add(1)
	return a.finishWrite(t, stripe, meta)
}

// beginWrite is what every write does first. On nil the caller owes a leave.
func (a *Array) beginWrite(ctx context.Context, stripe, gen uint64) error {
	if err := a.checkBlocks(stripe, 0, 0); err != nil {
		return err
	}
	if gen == 0 {
		return fmt.Errorf("raid: write stripe %d: generation 0: %w", stripe, ErrGeneration)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := a.enter(); err != nil {
		return err
	}
	if err := a.prepareToWrite(); err != nil {
		a.leave()
		return err
	}
	return nil
}

// writable refuses to write a stripe of which parity could not bring back what cannot be written.
func (a *Array) writable(stripe uint64, places []place) error {
	absent := 0
	for _, p := range places {
		if p.member == nil {
			absent++
		}
	}
	if absent > a.layout.Parity() {
		return fmt.Errorf("raid: write stripe %d: %d strips absent: %w", stripe, absent, ErrDegraded)
	}
	return nil
}

// finishWrite runs the planned writes and records who missed them; meta is what the stripe is then. From the
// first I/O on nothing in memory is true of the stripe until all have succeeded.
func (a *Array) finishWrite(t *batch, stripe uint64, meta *stripeMeta) error {
	a.cache.put(stripe, nil)
	t.run(a.opts.WriteTimeout)
	if err := a.settle(t); err != nil {
		return fmt.Errorf("raid: write stripe %d: %w", stripe, err)
	}
	a.cache.put(stripe, meta)
	a.pins.written(stripe)
	return nil
}

// newest is the highest generation of the stripe.
func (m *stripeMeta) newest() (g uint64) {
	for _, x := range m.gens {
		g = max(g, x)
	}
	return g
}

// Flush makes every write that was reported as done durable on all members. A member that cannot flush is recorded
// as failed: what its cache held may be gone.
func (a *Array) Flush(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := a.enter(); err != nil {
		return err
	}
	defer a.leave()
	return a.flush()
}

func (a *Array) flush() error {
	if a.opts.ReadOnly {
		return ErrReadOnly
	}
	if err := a.Err(); err != nil {
		return err
	}
	t := a.newBatch()
	a.mu.Lock()
	for _, m := range a.members {
		if m.state == Online || m.state == Restoring {
			t.flush(m)
		}
	}
	a.mu.Unlock()
	t.run(a.opts.WriteTimeout)
	if err := a.settle(t); err != nil {
		return fmt.Errorf("raid: flush: %w", err)
	}
	return a.Err()
}

// writeBlocks plans the writes of some blocks of a slot buffer, bit 0 the checksum block: one I/O for each run.
func (t *batch) writeBlocks(p place, strip int, buf *buffer, blocks uint64) {
	for from := 0; blocks>>from != 0; {
		from += bits.TrailingZeros64(blocks >> from)
		to := from + bits.TrailingZeros64(^(blocks >> from))
		t.writePlace(p, strip, buf, buf.b[from*BlockBytes:to*BlockBytes], int64(from)*BlockBytes)
		from = to
	}
}

// writePlace plans a write at a distance from where a strip lies, if it lies anywhere, and at its twin.
func (t *batch) writePlace(p place, strip int, buf *buffer, b []byte, at int64) {
	if p.member != nil {
		t.write(p.member, strip, buf, b, p.off+at)
	}
	if p.twin != nil {
		t.write(p.twin, strip, buf, b, p.twinOff+at)
	}
}
