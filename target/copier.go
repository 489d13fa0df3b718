package target

import "context"

// Copier is implemented by a Device that can take blocks from another device without their passing
// through the engine: a clone of extents, a copy within one file system.
type Copier interface {
	Device
	// CopyFrom makes blocks blocks at dstLBA what src has at srcLBA. src is a Device of any kind, of
	// the same block size, perhaps this one. It returns false where it cannot do it and has changed
	// nothing: the engine then reads and writes. A nil error with true is as durable as Write's; with
	// an error some of the blocks may be copied.
	CopyFrom(ctx context.Context, src Device, srcLBA, dstLBA, blocks uint64) (done bool, err error)
}
