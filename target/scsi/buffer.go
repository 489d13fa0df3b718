package scsi

import (
	"context"
	"sync"

	"github.com/ledge-storage/ledge/target"
)

// MaxBuffer is the largest Buffer; more data is several of them.
const MaxBuffer = 1 << 20

// bufferClasses are the sizes of pooled buffers.
var bufferClasses = [...]int{4 << 10, 16 << 10, 64 << 10, 256 << 10, MaxBuffer}

var bufferPools [len(bufferClasses)]sync.Pool

// Buffer is memory of the data path, pooled or lent by a device. Whoever holds it releases it, once.
type Buffer struct {
	// B is the memory, of the length that was asked for; its content is undefined. Nil where the
	// memory is lent.
	B []byte
	// Lent is the memory that a device shows, in order. It is read and never written.
	Lent  [][]byte
	loan  target.Loan
	class int8
}

// GetBuffer returns a buffer of n bytes, n in [0, MaxBuffer].
func GetBuffer(n int) *Buffer {
	for class, size := range bufferClasses {
		if n > size {
			continue
		}
		b, _ := bufferPools[class].Get().(*Buffer)
		if b == nil {
			b = &Buffer{B: make([]byte, size), class: int8(class)}
		}
		b.B = b.B[:n]
		return b
	}
	panic("scsi: buffer larger than MaxBuffer")
}

var lentPool = sync.Pool{New: func() any { return new(Buffer) }}

// borrow returns a buffer of the n bytes that dev lends from lba on, or nil where it does not.
func borrow(dev target.Lender, lba uint64, n int) *Buffer {
	b := lentPool.Get().(*Buffer)
	b.Lent, b.loan = dev.Lend(lba, n, b.Lent[:0])
	if b.loan == nil {
		lentPool.Put(b)
		return nil
	}
	return b
}

// fetch returns a buffer of the n bytes that dev reads from lba on.
func fetch(ctx context.Context, dev target.Fetcher, lba uint64, n int) (b *Buffer, err error) {
	b = lentPool.Get().(*Buffer)
	if b.Lent, b.loan, err = dev.Fetch(ctx, lba, n, b.Lent[:0]); err != nil {
		lentPool.Put(b)
		return nil, err
	}
	return b, nil
}

// Len is how many bytes the buffer holds.
func (b *Buffer) Len() int {
	n := len(b.B)
	for _, p := range b.Lent {
		n += len(p)
	}
	return n
}

// truncate leaves the first n bytes of at least as many.
func (b *Buffer) truncate(n int) {
	if b.loan == nil {
		b.B = b.B[:n]
		return
	}
	for i, p := range b.Lent {
		if n <= len(p) {
			b.Lent[i] = p[:n]
			b.Lent = b.Lent[:i+1]
			return
		}
		n -= len(p)
	}
}

// Release gives the buffer back; it may not be used afterwards.
func (b *Buffer) Release() {
	if b.loan == nil {
		bufferPools[b.class].Put(b)
		return
	}
	b.loan.Return()
	b.loan = nil
	clear(b.Lent)
	b.Lent = b.Lent[:0]
	lentPool.Put(b)
}
