package raid

import (
	"sync"
	"sync/atomic"
	"unsafe"
)

// buffer is a BlockBytes-aligned piece of memory, as O_DIRECT wants it, from a pool. It is counted, because an
// I/O that was given up on still owns the memory that the drive may yet read or write.
type buffer struct {
	b    []byte
	pool *sync.Pool
	refs atomic.Int32
}

// bufferClasses are the sizes of buffers in blocks, up to a whole slot.
var bufferClasses = [...]int{1, 2, 4, 8, 16, 1 + StripBlocks}

var bufferPools = func() (pools [len(bufferClasses)]*sync.Pool) {
	for i, blocks := range bufferClasses {
		p := new(sync.Pool)
		p.New = func() any { return &buffer{b: alignedBytes(blocks * BlockBytes), pool: p} }
		pools[i] = p
	}
	return pools
}()

// newBuffer returns a buffer of at least so many blocks, a slot's at most, with one reference. Its content is whatever was there.
func newBuffer(blocks int) *buffer {
	class := 0
	for bufferClasses[class] < blocks {
		class++
	}
	b := bufferPools[class].Get().(*buffer)
	b.refs.Store(1)
	return b
}

func newBlock() *buffer { return newBuffer(1) }
func newSlot() *buffer  { return newBuffer(1 + StripBlocks) }

func (b *buffer) hold() *buffer {
	b.refs.Add(1)
	return b
}

func (b *buffer) release() {
	switch n := b.refs.Add(-1); {
	case n == 0:
		b.pool.Put(b)
	case n < 0:
		panic("raid: buffer released twice")
	}
}

// alignedBytes allocates n bytes that start at a multiple of BlockBytes.
func alignedBytes(n int) []byte {
	b := make([]byte, n+BlockBytes)
	skip := 0
	if r := int(uintptr(unsafe.Pointer(&b[0])) % BlockBytes); r != 0 {
		skip = BlockBytes - r
	}
	return b[skip : skip+n : skip+n]
}

// spans are buffers in a row, read or written as one.
type spans struct {
	bufs [][]byte
	at   int
}

// blocksOf returns how many whole blocks bufs hold, and false when one of them is no multiple of a block.
func blocksOf(bufs [][]byte) (int, bool) {
	n := 0
	for _, b := range bufs {
		if len(b)%BlockBytes != 0 {
			return 0, false
		}
		n += len(b) / BlockBytes
	}
	return n, true
}

// next returns the next block.
func (s *spans) next() []byte {
	for s.at == len(s.bufs[0]) {
		s.bufs, s.at = s.bufs[1:], 0
	}
	b := s.bufs[0][s.at : s.at+BlockBytes]
	s.at += BlockBytes
	return b
}
