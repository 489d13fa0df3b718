package file

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"

	"github.com/ledge-storage/ledge/target"
)

var _ target.Copier = (*Device)(nil)

// copyStepBytes bounds what one call of the kernel copies, so that a copy can be ended.
const copyStepBytes = 64 << 20

// CopyFrom implements target.Copier, from another file or this one, by copy_file_range(2): file
// systems that can share extents do, others copy in the kernel. Ranges that overlap, and file systems
// that refuse, are left to the engine.
func (d *Device) CopyFrom(ctx context.Context, src target.Device, srcLBA, dstLBA, blocks uint64) (bool, error) {
	s, ok := src.(*Device)
	if !ok || s.info.BlockBytes != d.info.BlockBytes || blocks > min(d.info.Blocks, s.info.Blocks) ||
		s == d && srcLBA < dstLBA+blocks && dstLBA < srcLBA+blocks {
		return false, nil
	}
	left := int64(blocks) * int64(d.info.BlockBytes)
	from, err := s.offset(srcLBA, left)
	if err != nil {
		return true, err
	}
	to, err := d.writable(dstLBA, left)
	if err != nil {
		return true, err
	}
	for first := true; left > 0; first = false {
		n, err := d.copyRange(s, from, to, min(left, copyStepBytes))
		switch {
		case err != nil && first && refused(err):
			return false, nil
		case err != nil:
			return true, failed("copy", dstLBA, err, target.ErrMediumWrite)
		case n == 0 && first:
			return false, nil // a file that the kernel takes for empty
		case n == 0:
			return true, failed("copy", dstLBA, errors.New("source is shorter than it was"), target.ErrMediumRead)
		}
		from, to, left = from+n, to+n, left-n
		if err := ctx.Err(); err != nil {
			return true, err
		}
	}
	if d.fua {
		if err := unix.Fdatasync(int(d.f.Fd())); err != nil {
			return true, failed("sync", dstLBA, err, target.ErrMediumWrite)
		}
	}
	return true, nil
}

// copyRange copies once. Only the destination's lock is held: a compare and write on the source is one
// write(2), of which the kernel's page locks show no half of a block.
func (d *Device) copyRange(s *Device, from, to, n int64) (int64, error) {
	d.whole.RLock()
	defer d.whole.RUnlock()
	m, err := unix.CopyFileRange(int(s.f.Fd()), &from, int(d.f.Fd()), &to, int(n), 0)
	return int64(m), err
}

func refused(err error) bool {
	for _, e := range []error{unix.EXDEV, unix.EINVAL, unix.ENOSYS, unix.EOPNOTSUPP, unix.EBADF, unix.ETXTBSY, unix.EPERM} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
