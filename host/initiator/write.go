package initiator

import (
	"context"
	"fmt"

	"github.com/ledge-storage/ledge/host/initiator/iscsi"
)

// WriteAt stores p from byte off on; both are multiples of BlockBytes. The blocks are durable when it
// returns nil, if the LUN has no volatile cache; see Flush. After an error each block holds the old
// or the new bytes. p must not change before the return.
func (d *Device) WriteAt(ctx context.Context, p []byte, off int64) error {
	return d.transfer(ctx, "write", opWrite16, p, off)
}

// Flush returns when all writes that returned before are durable.
func (d *Device) Flush(ctx context.Context) error {
	return d.exec(ctx, "flush", &iscsi.Command{CDB: cdbSynchronize()})
}

// Unmap frees n bytes from off on; both are multiples of BlockBytes. They read as zeros afterwards, where
// the target frees such small pieces as were asked for.
func (d *Device) Unmap(ctx context.Context, off, n int64) error {
	s := d.currentShape()
	if err := d.check("unmap", s, off, n); err != nil {
		return err
	}
	bs := int64(s.blockBytes)
	lba, left := uint64(off/bs), uint64(n/bs)
	most := uint64(1<<32 - 1)
	if m := uint64(s.limits.unmapBlocks); m > 0 {
		most = m
	}
	if g := uint64(s.limits.unmapGranularity); g > 0 && g < most {
		most -= most % g // a cut inside a granule would free neither half
	}
	for left > 0 {
		blocks := min(left, most)
		list := unmapList([]blockRange{{lba, blocks}})
		if err := d.exec(ctx, "unmap", &iscsi.Command{CDB: cdbUnmap(len(list)), Out: list}); err != nil {
			return fmt.Errorf("%d blocks at %d: %w", blocks, lba, err)
		}
		lba, left = lba+blocks, left-blocks
	}
	return nil
}
