package scsi

import "sync"

// MaxBuffer is the largest Buffer; more data is several of them.
const MaxBuffer = 1 << 20

// bufferClasses are the sizes of pooled buffers.
var bufferClasses = [...]int{4 << 10, 16 << 10, 64 << 10, 256 << 10, MaxBuffer}

var bufferPools [len(bufferClasses)]sync.Pool

// Buffer is pooled memory of the data path. Whoever holds it releases it, once.
type Buffer struct {
	// B is the memory, of the length that was asked for; its content is undefined.
	B     []byte
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

// Release gives the buffer back; it may not be used afterwards.
func (b *Buffer) Release() {
	bufferPools[b.class].Put(b)
}
