package mem

import (
	"context"
	"sync"

	"github.com/ledge-storage/ledge/target"
)

var _ target.Copier = (*Device)(nil)

var copyBuffers = sync.Pool{New: func() any { return new([pageBytes]byte) }}

// CopyFrom implements target.Copier, for another unit in memory: what is not mapped there is not
// mapped here. A copy within one unit whose ranges overlap is left to the engine.
func (d *Device) CopyFrom(ctx context.Context, src target.Device, srcLBA, dstLBA, blocks uint64) (bool, error) {
	s, ok := src.(*Device)
	if !ok || s.info.BlockBytes != d.info.BlockBytes || blocks > min(d.info.Blocks, s.info.Blocks) ||
		s == d && srcLBA < dstLBA+blocks && dstLBA < srcLBA+blocks {
		return false, nil
	}
	left := int64(blocks) * int64(d.info.BlockBytes)
	from, err := s.check(srcLBA, left)
	if err != nil {
		return true, err
	}
	to, err := d.writable(dstLBA, left)
	if err != nil {
		return true, err
	}
	b := copyBuffers.Get().(*[pageBytes]byte)
	defer copyBuffers.Put(b)
	for left > 0 {
		// Up to the next end of a page on either side, so that no lock of one is held with another's.
		n := min(left, pageBytes-from%pageBytes, pageBytes-to%pageBytes)
		if err := d.copyPiece(s, from, to, b[:n]); err != nil {
			return true, err
		}
		if err := ctx.Err(); err != nil {
			return true, err
		}
		from, to, left = from+n, to+n, left-n
	}
	return true, nil
}

func (d *Device) copyPiece(s *Device, from, to int64, b []byte) error {
	s.whole.RLock()
	mapped := s.mapped(from / pageBytes)
	if mapped {
		s.read(from, b)
	}
	s.whole.RUnlock()
	block := int64(d.info.BlockBytes)
	if !mapped {
		return d.zero(uint64(to/block), uint64(int64(len(b))/block))
	}
	d.whole.RLock()
	defer d.whole.RUnlock()
	return d.write(to, b)
}
