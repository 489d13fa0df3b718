// Package volume is the virtual disk that the target engine exports: target.Device over a volume
// of host/store.
//
// It owns what initiators may ask beyond whole 4 KiB blocks: 512-byte logical blocks over the
// store's 4 KiB (the partial block at either end of a write is read, merged and written),
// COMPARE AND WRITE, WRITE SAME, and the order between requests that touch the same block. It
// promises that a write of up to AtomicBlocks is atomic, through a power cut and to readers, that a partial write changes nothing of
// its neighbours, whatever runs beside it, and that what it acknowledged is durable (the store's
// promise). It keeps no data; the volumes' persistent reservations it keeps in the store (reservations.go).
//
// write.go holds the path of a write, read.go that of a read.
package volume

import (
	"fmt"

	"github.com/ledge-storage/ledge/host/meter"
	"github.com/ledge-storage/ledge/host/store"
	"github.com/ledge-storage/ledge/target"
)

// Options of Open.
type Options struct {
	// BlockBytes is the logical block size, 512 or 4096; zero: 512.
	BlockBytes uint32
}

// Device is one volume. It follows the volume's size.
type Device struct {
	vol   *store.Volume
	shift uint // log2 of the logical blocks in one of the store's
	block uint32
	locks rangeLock
	meter *meter.Volume
}

var _ target.Provisioned = (*Device)(nil)

// lowPercent is the part of the store's capacity below which initiators are warned that space runs out.
const lowPercent = 10

// Open returns the device of the volume of that name.
func Open(st *store.Store, name string, o Options) (*Device, error) {
	if o.BlockBytes == 0 {
		o.BlockBytes = 512
	}
	if o.BlockBytes != 512 && o.BlockBytes != store.BlockBytes {
		return nil, fmt.Errorf("volume %s: logical blocks of %d bytes", name, o.BlockBytes)
	}
	v, err := st.Volume(name)
	if err != nil {
		return nil, err
	}
	d := &Device{vol: v, block: o.BlockBytes, meter: v.Meter()}
	for o.BlockBytes<<d.shift < store.BlockBytes {
		d.shift++
	}
	return d, nil
}

// Info describes the unit as initiators see it.
func (d *Device) Info() target.Info {
	id := d.vol.UUID()
	// A journal record carries a write whole. Sectors may begin and end within a block.
	atomic := uint32(d.vol.AtomicBlocks())
	if d.shift > 0 {
		atomic = (atomic - 1) << d.shift
	}
	return target.Info{
		AtomicBlocks: max(atomic, 1),
		Blocks:       uint64(d.vol.Size()) / uint64(d.block), BlockBytes: d.block, PhysicalExponent: uint8(d.shift),
		OptimalBlocks: (128 << 10) / d.block, MaxBlocks: (4 << 20) / d.block, UnmapGranularityBlocks: store.BlockBytes / d.block,
		Thin: true, UUID: id, Vendor: "LEDGE", Product: "VOLUME", Revision: "1", Serial: fmt.Sprintf("%x", id[:8]),
	}
}

// Space implements target.Provisioned: all volumes of a store write to the same segments.
func (d *Device) Space() target.Space {
	used, available, capacity := d.vol.Space()
	return target.Space{UsedBytes: uint64(used), AvailableBytes: uint64(available), Shared: true, ThresholdBytes: uint64(capacity) / 100 * lowPercent}
}

// extent is a range of bytes, and the store's blocks that hold it.
type extent struct {
	from, to    uint64 // bytes
	first, last uint64 // blocks; last is behind the range
}

// extentOf checks a range of logical blocks against the volume.
func (d *Device) extentOf(lba, blocks uint64) (extent, error) {
	size := uint64(d.vol.Size()) / uint64(d.block)
	if lba > size || blocks > size-lba {
		return extent{}, fmt.Errorf("volume: blocks %d+%d of %d: %w", lba, blocks, size, target.ErrRange)
	}
	from, to := lba*uint64(d.block), (lba+blocks)*uint64(d.block)
	return extent{from, to, from / store.BlockBytes, (to + store.BlockBytes - 1) / store.BlockBytes}, nil
}

// bytesOf is the length of the buffers, which must be whole logical blocks.
func (d *Device) bytesOf(bufs [][]byte) (uint64, error) {
	n := uint64(0)
	for _, b := range bufs {
		if len(b)%int(d.block) != 0 {
			return 0, fmt.Errorf("volume: buffer of %d bytes: %w", len(b), target.ErrAlignment)
		}
		n += uint64(len(b))
	}
	return n, nil
}
