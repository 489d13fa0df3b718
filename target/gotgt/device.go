// Package gotgt adapts the backing stores of gotgt (github.com/gostor/gotgt, api.BackingStore) to
// target.Device and back: what was written for gotgt is served by our engine, and a Device of ours
// can be served by gotgt, for comparison. It is the only importer of gotgt outside qa.
//
// It takes nothing of gotgt but the interface: none of gotgt's engine is linked in.
package gotgt

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/gostor/gotgt/pkg/api"

	"github.com/ledge-storage/ledge/target"
)

// Options of a Device.
type Options struct {
	// Path is given to the store's Open.
	Path string
	// Init is given to the store's Init.
	Init string
	// BlockBytes is 512 (zero means it) or 4096.
	BlockBytes uint32
	// Thin says that the store's Unmap makes the range read as zeros. gotgt does not ask that of a
	// store (its own file store ignores Unmap), so that without Thin zeros are written.
	Thin bool
	// Volatile leaves writes to the store's cache until Flush. Without it each write is followed by
	// DataSync.
	Volatile bool
	// UUID identifies the unit.
	UUID [16]byte
}

// Device is a target.Device on a backing store. The store's methods are called concurrently, as
// gotgt does with several connections.
type Device struct {
	store api.BackingStore
	lu    *api.SCSILu
	opts  Options
	info  target.Info
	whole sync.RWMutex // exclusive: compare and write
}

// unmapStep is the longest range of one descriptor, whose length has 32 bits.
const unmapStep = 1 << 30

// Open opens the store and makes it a Device.
func Open(store api.BackingStore, o Options) (*Device, error) {
	if o.BlockBytes == 0 {
		o.BlockBytes = 512
	}
	shift := uint(9)
	switch o.BlockBytes {
	case 512:
	case 4096:
		shift = 12
	default:
		return nil, fmt.Errorf("gotgt: block size %d is neither 512 nor 4096", o.BlockBytes)
	}
	d := &Device{store: store, opts: o, lu: &api.SCSILu{Path: o.Path, BlockShift: shift, Storage: store}}
	if err := store.Init(d.lu, o.Init); err != nil {
		return nil, fmt.Errorf("gotgt: init %s: %w", o.Path, err)
	}
	if err := store.Open(d.lu, o.Path); err != nil {
		return nil, fmt.Errorf("gotgt: open %s: %w", o.Path, err)
	}
	d.lu.Size = store.Size(d.lu)
	blocks := d.lu.Size / uint64(o.BlockBytes)
	if blocks == 0 {
		store.Close(d.lu)
		return nil, fmt.Errorf("gotgt: open %s: smaller than a block", o.Path)
	}
	d.info = target.Info{Blocks: blocks, BlockBytes: o.BlockBytes, Thin: o.Thin, UUID: o.UUID, Product: "GOTGT STORE"}
	return d, nil
}

// Close closes the store.
func (d *Device) Close() error {
	return errors.Join(d.store.Close(d.lu), d.store.Exit(d.lu))
}

// Info implements target.Device.
func (d *Device) Info() target.Info { return d.info }

func (d *Device) offset(lba uint64, n int64) (int64, error) {
	if lba > d.info.Blocks || uint64(n) > (d.info.Blocks-lba)*uint64(d.info.BlockBytes) {
		return 0, fmt.Errorf("gotgt: %d bytes at block %d: %w", n, lba, target.ErrRange)
	}
	return int64(lba) * int64(d.info.BlockBytes), nil
}

func length(v [][]byte) (n int64) {
	for _, p := range v {
		n += int64(len(p))
	}
	return n
}

// Read implements target.Device. The copy is the interface's: a store returns memory of its own.
func (d *Device) Read(_ context.Context, lba uint64, dst [][]byte) error {
	off, err := d.offset(lba, length(dst))
	if err != nil {
		return err
	}
	d.whole.RLock()
	defer d.whole.RUnlock()
	for _, p := range dst {
		if err := d.read(p, off); err != nil {
			return err
		}
		off += int64(len(p))
	}
	return nil
}

func (d *Device) read(p []byte, off int64) error {
	b, err := d.store.Read(off, int64(len(p)))
	if err == nil && len(b) != len(p) {
		err = fmt.Errorf("%d bytes instead of %d", len(b), len(p))
	}
	if err != nil {
		return fmt.Errorf("gotgt: read at %d: %w: %w", off, target.ErrMediumRead, err)
	}
	copy(p, b)
	return nil
}

// Write implements target.Device.
func (d *Device) Write(_ context.Context, lba uint64, src [][]byte, fua bool) error {
	off, err := d.offset(lba, length(src))
	if err != nil {
		return err
	}
	d.whole.RLock()
	defer d.whole.RUnlock()
	return d.write(off, src, fua)
}

func (d *Device) write(off int64, src [][]byte, fua bool) error {
	start := off
	for _, p := range src {
		if err := d.store.Write(p, off); err != nil {
			return fmt.Errorf("gotgt: write at %d: %w: %w", off, target.ErrMediumWrite, err)
		}
		off += int64(len(p))
	}
	if fua || !d.opts.Volatile {
		return d.sync(start, off-start)
	}
	return nil
}

func (d *Device) sync(off, n int64) error {
	if err := d.store.DataSync(off, n); err != nil {
		return fmt.Errorf("gotgt: sync at %d: %w: %w", off, target.ErrMediumWrite, err)
	}
	return nil
}

// Unmap implements target.Device.
func (d *Device) Unmap(ctx context.Context, ranges []target.Range) error {
	for _, r := range ranges {
		if err := d.WriteSame(ctx, r.LBA, r.Blocks, nil); err != nil {
			return err
		}
	}
	return nil
}

// WriteSame implements target.Device.
func (d *Device) WriteSame(ctx context.Context, lba, blocks uint64, block []byte) error {
	if blocks > d.info.Blocks {
		return fmt.Errorf("gotgt: %d blocks at block %d: %w", blocks, lba, target.ErrRange)
	}
	left := int64(blocks) * int64(d.info.BlockBytes)
	off, err := d.offset(lba, left)
	if err != nil {
		return err
	}
	d.whole.RLock()
	defer d.whole.RUnlock()
	start, all := off, left
	var run []byte
	step := int64(unmapStep)
	if block != nil || !d.opts.Thin {
		step = min(left, 256<<10)
		run = make([]byte, step)
		for at := 0; block != nil && at < len(run); at += len(block) {
			copy(run[at:], block)
		}
	}
	for left > 0 {
		n := min(left, step)
		if run == nil {
			err = d.store.Unmap([]api.UnmapBlockDescriptor{{Offset: uint64(off), TL: uint32(n)}})
		} else {
			err = d.store.Write(run[:n], off)
		}
		if err != nil {
			return fmt.Errorf("gotgt: fill at %d: %w: %w", off, target.ErrMediumWrite, err)
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		off, left = off+n, left-n
	}
	if d.opts.Volatile {
		return nil
	}
	return d.sync(start, all)
}

// CompareAndWrite implements target.Device; gotgt's interface has nothing of the kind.
func (d *Device) CompareAndWrite(_ context.Context, lba uint64, compare, write []byte) error {
	off, err := d.offset(lba, int64(len(compare)))
	if err != nil {
		return err
	}
	d.whole.Lock()
	defer d.whole.Unlock()
	have := make([]byte, len(compare))
	if err := d.read(have, off); err != nil {
		return err
	}
	for i := range have {
		if have[i] != compare[i] {
			return &target.MiscompareError{Offset: uint64(i)}
		}
	}
	return d.write(off, [][]byte{write}, false)
}

// Flush implements target.Device.
func (d *Device) Flush(context.Context) error { return d.sync(0, int64(d.lu.Size)) }

// Mapped implements target.Device: a store does not tell, so all is mapped.
func (d *Device) Mapped(_ context.Context, lba, blocks uint64) (bool, uint64, error) {
	if _, err := d.offset(lba, int64(d.info.BlockBytes)); err != nil {
		return false, 0, err
	}
	return true, min(blocks, d.info.Blocks-lba), nil
}
