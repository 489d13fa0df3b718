package nvram

import (
	"math/bits"
	"sync"
)

// buffer is an aligned buffer from a pool: one pool for each power of two of blocks.
type buffer struct {
	b     []byte
	class int
}

var buffers [16]sync.Pool

func getBuffer(blocks int) *buffer {
	class := bits.Len(uint(blocks - 1))
	if b, ok := buffers[class].Get().(*buffer); ok {
		b.b = b.b[:blocks*BlockBytes]
		return b
	}
	return &buffer{AlignedBlocks(1 << class)[:blocks*BlockBytes], class}
}

func (b *buffer) put() { buffers[b.class].Put(b) }
