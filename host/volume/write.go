package volume

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/ledge-storage/ledge/host/store"
	"github.com/ledge-storage/ledge/target"
)

// The path of a write, in this order:
//
//  1. the blocks it touches are locked against other writes of this device;
//  2. where it begins or ends inside a block, that block is read and merged;
//  3. store.Volume.Stage takes a place in the log, where later readers and writers see it;
//  4. the lock goes, and the request waits until the log is durable there.

// Write stores src from lba on. It is durable on return, with or without fua.
func (d *Device) Write(ctx context.Context, lba uint64, src [][]byte, fua bool) error {
	start := d.meter.Now()
	n, err := d.bytesOf(src)
	if err == nil {
		err = d.write(ctx, lba, n, src)
	}
	d.meter.End(&d.meter.Writes, start, n, err)
	return err
}

// write stores n bytes.
func (d *Device) write(ctx context.Context, lba, n uint64, src [][]byte) error {
	e, err := d.extentOf(lba, n/uint64(d.block))
	if err != nil || n == 0 {
		return err
	}
	return d.locked(ctx, e, func() (*store.Ticket, error) { return d.stage(ctx, e, src) })
}

// locked calls f with the extent's blocks locked, and waits for its ticket without.
func (d *Device) locked(ctx context.Context, e extent, f func() (*store.Ticket, error)) error {
	unlock, waited, err := d.locks.lock(ctx, e.first, e.last)
	if err != nil {
		return err
	}
	t, err := f()
	unlock()
	if err != nil {
		return err
	}
	t.Queued(waited)
	return t.Wait(ctx)
}

// stage writes src to e, whose blocks are locked.
func (d *Device) stage(ctx context.Context, e extent, src [][]byte) (*store.Ticket, error) {
	whole := e.from%store.BlockBytes == 0 && e.to%store.BlockBytes == 0
	if whole && len(src) == 1 {
		return d.vol.Stage(ctx, e.first, src[0])
	}
	p := make([]byte, (e.last-e.first)*store.BlockBytes)
	if !whole {
		if err := d.edges(ctx, e, p); err != nil {
			return nil, err
		}
	}
	at := e.from - e.first*store.BlockBytes
	for _, b := range src {
		at += uint64(copy(p[at:], b))
	}
	return d.vol.Stage(ctx, e.first, p)
}

// edges fills the first and last block of p with what is there, where e covers them in part.
func (d *Device) edges(ctx context.Context, e extent, p []byte) error {
	d.meter.Partial.Add(1)
	if e.from%store.BlockBytes != 0 || e.last-e.first == 1 {
		if err := d.vol.ReadStaged(ctx, e.first, p[:store.BlockBytes]); err != nil {
			return err
		}
	}
	if e.to%store.BlockBytes != 0 && e.last-e.first > 1 {
		return d.vol.ReadStaged(ctx, e.last-1, p[len(p)-store.BlockBytes:])
	}
	return nil
}

// Unmap frees the ranges. Whole 4 KiB blocks take no space afterwards; all of it reads as zeros.
func (d *Device) Unmap(ctx context.Context, ranges []target.Range) error {
	start := d.meter.Now()
	n, err := d.unmap(ctx, ranges)
	d.meter.End(&d.meter.Unmaps, start, n, err)
	return err
}

func (d *Device) unmap(ctx context.Context, ranges []target.Range) (bytes uint64, err error) {
	for _, r := range ranges { // all are checked before the first is touched
		if _, err := d.extentOf(r.LBA, r.Blocks); err != nil {
			return 0, err
		}
	}
	for _, r := range ranges {
		if err := d.zero(ctx, r.LBA, r.Blocks); err != nil {
			return 0, err
		}
		bytes += r.Blocks * uint64(d.block)
	}
	return bytes, nil
}

// zero makes a range read as zeros.
func (d *Device) zero(ctx context.Context, lba, blocks uint64) error {
	e, err := d.extentOf(lba, blocks)
	if err != nil || blocks == 0 {
		return err
	}
	// Whole blocks in the middle, and at most one partial block at each end.
	first := (e.from + store.BlockBytes - 1) / store.BlockBytes
	last := e.to / store.BlockBytes
	if first >= last {
		if e.last-e.first == 1 {
			return d.locked(ctx, e, func() (*store.Ticket, error) { return d.stage(ctx, e, zeros(e.to-e.from)) })
		}
		first, last = e.last-1, e.last-1 // two partial blocks, nothing between
	}
	parts := []extent{{e.from, first * store.BlockBytes, e.first, first}, {first * store.BlockBytes, last * store.BlockBytes, first, last}, {last * store.BlockBytes, e.to, last, e.last}}
	for i, part := range parts {
		if part.from >= part.to {
			continue
		}
		err := d.locked(ctx, part, func() (*store.Ticket, error) {
			if i == 1 {
				return d.vol.StageZeros(ctx, part.first, part.last-part.first)
			}
			return d.stage(ctx, part, zeros(part.to-part.from))
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func zeros(n uint64) [][]byte { return [][]byte{make([]byte, n)} }

// WriteSame stores block in each of blocks logical blocks; nil and zeros free them, and count as an unmap.
func (d *Device) WriteSame(ctx context.Context, lba, blocks uint64, block []byte) error {
	start, kind, f := d.meter.Now(), &d.meter.Writes, d.writeSame
	if len(bytes.Trim(block, "\x00")) == 0 {
		kind, f = &d.meter.Unmaps, func(ctx context.Context, lba, blocks uint64, _ []byte) error { return d.zero(ctx, lba, blocks) }
	}
	_, err := d.extentOf(lba, blocks)
	if err == nil && block != nil && len(block) != int(d.block) {
		err = fmt.Errorf("volume: block of %d bytes: %w", len(block), target.ErrAlignment)
	}
	if err == nil {
		err = f(ctx, lba, blocks, block)
	}
	d.meter.End(kind, start, blocks*uint64(d.block), err)
	return err
}

// writeSame is WriteSame of what is not zeros.
func (d *Device) writeSame(ctx context.Context, lba, blocks uint64, block []byte) error {
	const atOnce = 1 << 20
	p := bytes.Repeat(block, int(min(blocks, atOnce/uint64(d.block))))
	for blocks > 0 {
		n := min(blocks, uint64(len(p))/uint64(d.block))
		e, err := d.extentOf(lba, n)
		if err == nil {
			err = d.locked(ctx, e, func() (*store.Ticket, error) { return d.stage(ctx, e, [][]byte{p[:n*uint64(d.block)]}) })
		}
		if err != nil {
			return err
		}
		lba, blocks = lba+n, blocks-n
	}
	return nil
}

// CompareAndWrite writes write at lba if what is there equals compare, atomically against all
// other writes of the device.
func (d *Device) CompareAndWrite(ctx context.Context, lba uint64, compare, write []byte) error {
	start := d.meter.Now()
	err := d.compareAndWrite(ctx, lba, compare, write)
	if differs := (*target.MiscompareError)(nil); errors.As(err, &differs) { // an answer, not a failure
		d.meter.End(&d.meter.Writes, start, 0, nil)
		return err
	}
	d.meter.End(&d.meter.Writes, start, uint64(len(write)), err)
	return err
}

func (d *Device) compareAndWrite(ctx context.Context, lba uint64, compare, write []byte) error {
	if len(compare) != len(write) || len(compare)%int(d.block) != 0 {
		return fmt.Errorf("volume: compare %d bytes, write %d: %w", len(compare), len(write), target.ErrAlignment)
	}
	e, err := d.extentOf(lba, uint64(len(compare))/uint64(d.block))
	if err != nil || len(compare) == 0 {
		return err
	}
	var differs *target.MiscompareError
	err = d.locked(ctx, e, func() (*store.Ticket, error) {
		p := make([]byte, (e.last-e.first)*store.BlockBytes)
		// What decides must be durable: the answer tells the initiator what is there.
		if err := d.vol.Read(ctx, e.first, p); err != nil {
			return nil, err
		}
		there := p[e.from-e.first*store.BlockBytes:][:len(compare)]
		for i := range compare {
			if there[i] != compare[i] {
				differs = &target.MiscompareError{Offset: uint64(i)}
				return new(store.Ticket), nil
			}
		}
		copy(there, write)
		return d.vol.Stage(ctx, e.first, p)
	})
	if err == nil && differs != nil {
		return differs
	}
	return err
}

// Flush has nothing to do: what was acknowledged is durable.
func (d *Device) Flush(ctx context.Context) error {
	return ctx.Err()
}
