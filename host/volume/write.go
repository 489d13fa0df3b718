package volume

import (
	"bytes"
	"context"
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
	n, err := d.bytesOf(src)
	if err != nil {
		return d.failed(err)
	}
	e, err := d.extentOf(lba, n/uint64(d.block))
	if err != nil || n == 0 {
		return d.failed(err)
	}
	d.stats.writes.Add(1)
	d.stats.writeBytes.Add(n)
	return d.failed(d.locked(ctx, e, func() (*store.Ticket, error) { return d.stage(ctx, e, src) }))
}

// locked calls f with the extent's blocks locked, and waits for its ticket without.
func (d *Device) locked(ctx context.Context, e extent, f func() (*store.Ticket, error)) error {
	unlock, err := d.locks.lock(ctx, e.first, e.last)
	if err != nil {
		return err
	}
	t, err := f()
	unlock()
	if err != nil {
		return err
	}
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
	d.stats.partial.Add(1)
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
	for _, r := range ranges { // all are checked before the first is touched
		if _, err := d.extentOf(r.LBA, r.Blocks); err != nil {
			return d.failed(err)
		}
	}
	d.stats.unmaps.Add(1)
	for _, r := range ranges {
		if err := d.zero(ctx, r.LBA, r.Blocks); err != nil {
			return d.failed(err)
		}
		d.stats.unmapBytes.Add(r.Blocks * uint64(d.block))
	}
	return nil
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

// WriteSame stores block in each of blocks logical blocks; nil and zeros free them.
func (d *Device) WriteSame(ctx context.Context, lba, blocks uint64, block []byte) error {
	if _, err := d.extentOf(lba, blocks); err != nil {
		return d.failed(err)
	}
	if block != nil && len(block) != int(d.block) {
		return d.failed(fmt.Errorf("volume: block of %d bytes: %w", len(block), target.ErrAlignment))
	}
	d.stats.writes.Add(1)
	if len(bytes.Trim(block, "\x00")) == 0 {
		d.stats.unmapBytes.Add(blocks * uint64(d.block))
		return d.failed(d.zero(ctx, lba, blocks))
	}
	d.stats.writeBytes.Add(blocks * uint64(d.block))
	const atOnce = 1 << 20
	p := bytes.Repeat(block, int(min(blocks, atOnce/uint64(d.block))))
	for blocks > 0 {
		n := min(blocks, uint64(len(p))/uint64(d.block))
		e, err := d.extentOf(lba, n)
		if err == nil {
			err = d.locked(ctx, e, func() (*store.Ticket, error) { return d.stage(ctx, e, [][]byte{p[:n*uint64(d.block)]}) })
		}
		if err != nil {
			return d.failed(err)
		}
		lba, blocks = lba+n, blocks-n
	}
	return nil
}

// CompareAndWrite writes write at lba if what is there equals compare, atomically against all
// other writes of the device.
func (d *Device) CompareAndWrite(ctx context.Context, lba uint64, compare, write []byte) error {
	if len(compare) != len(write) || len(compare)%int(d.block) != 0 {
		return d.failed(fmt.Errorf("volume: compare %d bytes, write %d: %w", len(compare), len(write), target.ErrAlignment))
	}
	e, err := d.extentOf(lba, uint64(len(compare))/uint64(d.block))
	if err != nil || len(compare) == 0 {
		return d.failed(err)
	}
	d.stats.compares.Add(1)
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
		return differs // an answer, not a failure
	}
	return d.failed(err)
}

// Flush has nothing to do: what was acknowledged is durable.
func (d *Device) Flush(ctx context.Context) error {
	d.stats.flushes.Add(1)
	return ctx.Err()
}
