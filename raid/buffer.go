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

var (
	blockPool = newBufferPool(BlockBytes)
	slotPool  = newBufferPool(SlotBytes)
)

func newBufferPool(bytes int) *sync.Pool {
	p := new(sync.Pool)
	p.New = func() any { return &buffer{b: alignedBytes(bytes), pool: p} }
	return p
}

// newBlock and newSlot return a buffer of one block, of a whole slot, with one reference. Its content is
// whatever was there.
func newBlock() *buffer { return take(blockPool) }
func newSlot() *buffer  { return take(slotPool) }

func take(p *sync.Pool) *buffer {
	b := p.Get().(*buffer)
	b.refs.Store(1)
	return b
}

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
