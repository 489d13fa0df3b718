package initiator

import (
	"context"
	"fmt"
	"sync"

	"github.com/ledge-storage/ledge/host/initiator/iscsi"
	"github.com/ledge-storage/ledge/target"
	"golang.org/x/sync/errgroup"
)

// A read or write of any size, in order:
//
//  1. ReadAt, WriteAt: check that range and buffer are whole blocks inside the LUN.
//  2. pieces: cut it at multiples of the largest transfer (limits of the LUN).
//  3. exec: choose a path, send, judge the answer, retry (device.go).
//  4. iscsi.Session.Do: number, queue, write, wait (iscsi/write.go).

// ReadAt fills p from byte off on. Both are multiples of BlockBytes.
func (d *Device) ReadAt(ctx context.Context, p []byte, off int64) error {
	return d.transfer(ctx, "read", opRead16, p, off)
}

func (d *Device) transfer(ctx context.Context, op string, opcode byte, p []byte, off int64) error {
	s := d.currentShape()
	if err := d.check(op, s, off, int64(len(p))); err != nil {
		return err
	}
	unit := d.unitBytes(s)
	if off/unit == (off+int64(len(p))-1)/unit {
		return d.one(ctx, op, opcode, s, p, off)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(maxParallel)
	for len(p) > 0 {
		n := min(unit-off%unit, int64(len(p)))
		part, at := p[:n], off
		g.Go(func() error { return d.one(ctx, op, opcode, s, part, at) })
		p, off = p[n:], off+n
	}
	return g.Wait()
}

// commands are reused: one holds room for sense data.
var commands = sync.Pool{New: func() any { return new(iscsi.Command) }}

// one moves one piece with one command.
func (d *Device) one(ctx context.Context, op string, opcode byte, s shape, p []byte, off int64) error {
	bs := int64(s.blockBytes)
	c := commands.Get().(*iscsi.Command)
	defer func() { c.In, c.Out = nil, nil; commands.Put(c) }()
	c.CDB = cdbReadWrite(opcode, uint64(off/bs), uint32(int64(len(p))/bs))
	if opcode == opRead16 {
		c.In = p
	} else {
		c.Out = p
	}
	if err := d.exec(ctx, op, c); err != nil {
		return fmt.Errorf("%d bytes at %d: %w", len(p), off, err)
	}
	if c.Transferred != len(c.In) {
		return fmt.Errorf("initiator: %s %d bytes at %d: only %d came: %w", op, len(p), off, c.Transferred, target.ErrMediumRead)
	}
	return nil
}

// check refuses what is no range of whole blocks of the LUN.
func (d *Device) check(op string, s shape, off, n int64) error {
	bs, size := int64(s.blockBytes), int64(s.blocks)*int64(s.blockBytes)
	switch {
	case off%bs != 0 || n%bs != 0 || n > maxCallBytes && op != "unmap":
		return fmt.Errorf("initiator: %s %d bytes at %d, blocks of %d: %w", op, n, off, bs, target.ErrAlignment)
	case off < 0 || n < 0 || off > size || n > size-off:
		return fmt.Errorf("initiator: %s %d bytes at %d of %d: %w", op, n, off, size, target.ErrRange)
	}
	return nil
}

// unitBytes is the size of a whole piece. It is a multiple of the optimal transfer length where that
// fits, so that a store LUN's stripes are never cut.
func (d *Device) unitBytes(s shape) int64 {
	bs := int64(s.blockBytes)
	limit := int64(maxTransferBytes)
	if m := int64(s.limits.maxTransfer) * bs; m > 0 {
		limit = min(limit, m)
	}
	want, optimal := int64(d.cfg.MaxTransfer), int64(s.limits.optimal)*bs
	if want == 0 {
		want = max(defaultTransfer, optimal)
	}
	unit := min(want, limit)
	if optimal > 0 && optimal <= unit {
		return unit / optimal * optimal
	}
	return max(unit/bs*bs, bs)
}
