package volume

import (
	"context"

	"github.com/ledge-storage/ledge/host/store"
)

// Read fills dst from lba on. Where the request is whole blocks in one buffer, the store decodes
// into it; else through a buffer of its own. The rest of the path is store/read.go.
func (d *Device) Read(ctx context.Context, lba uint64, dst [][]byte) error {
	start := d.meter.Now()
	n, err := d.bytesOf(dst)
	if err == nil {
		err = d.read(ctx, lba, n, dst)
	}
	d.meter.End(&d.meter.Reads, start, n, err)
	return err
}

func (d *Device) read(ctx context.Context, lba, n uint64, dst [][]byte) error {
	e, err := d.extentOf(lba, n/uint64(d.block))
	if err != nil || n == 0 {
		return err
	}
	if e.last-e.first > 1 {
		unlock, waited, err := d.locks.share(ctx, e.first, e.last)
		if waited > 0 {
			d.meter.ReadQueue.Add(waited)
		}
		if err != nil {
			return err
		}
		defer unlock()
	}
	if len(dst) == 1 && e.from%store.BlockBytes == 0 && e.to%store.BlockBytes == 0 {
		return d.vol.Read(ctx, e.first, dst[0])
	}
	p := make([]byte, (e.last-e.first)*store.BlockBytes)
	if err := d.vol.Read(ctx, e.first, p); err != nil {
		return err
	}
	at := e.from - e.first*store.BlockBytes
	for _, b := range dst {
		at += uint64(copy(b, p[at:]))
	}
	return nil
}

// Mapped tells whether the block at lba holds data, and how many logical blocks from lba on are alike.
func (d *Device) Mapped(ctx context.Context, lba, blocks uint64) (mapped bool, n uint64, err error) {
	e, err := d.extentOf(lba, max(blocks, 1))
	if err != nil {
		return false, 0, err
	}
	mapped, whole := d.vol.Mapped(e.first, e.last-e.first)
	n = (e.first+whole)<<d.shift - lba
	return mapped, min(n, max(blocks, 1)), nil
}
