package nvram

import (
	"math/bits"
	"sync"
)

// Buffer is an aligned buffer from a pool: one pool for each power of two of blocks.
type Buffer struct {
	b     []byte
	class int
}

var buffers [16]sync.Pool

// GetBuffer returns a buffer of so many blocks (1 to 16 MiB's worth) with any content.
func GetBuffer(blocks int) *Buffer {
	class := bits.Len(uint(blocks - 1))
	if b, ok := buffers[class].Get().(*Buffer); ok {
		b.b = b.b[:blocks*BlockBytes]
		return b
	}
	return &Buffer{AlignedBlocks(1 << class)[:blocks*BlockBytes], class}
}

// Bytes are valid until Put.
func (b *Buffer) Bytes() []byte { return b.b }

// Put gives the buffer back.
func (b *Buffer) Put() { buffers[b.class].Put(b) }
