package region

import "unsafe"

// How bytes of a DAX mapping become durable. A store sits in the CPU's cache, which the power supply does not keep
// alive; what reached the memory controller's write queue is durable (ADR). Two ways lead there, and each ends
// with a store fence, before which nothing may be acknowledged:
//
//	copy past the cache   non-temporal stores of whole cache lines, for large pieces: no line is read first
//	copy, then write back plain stores, then CLWB of each line (CLFLUSHOPT, CLFLUSH on older CPUs)
//
// The destination's first and last line, where they are not whole, are always written back.

// lineBytes is the cache line of every amd64 CPU; CPUID is checked against it.
const lineBytes = 64

// streamBytes is the size from which on a copy goes past the cache. Below, the line written back is cheaper than
// the stall of the write-combining buffers (BenchmarkStore).
const streamBytes = 1024

// instructions are the CPU's. Tests put others in to see what is called.
type instructions struct {
	name string
	// writeBack writes the cache lines back that hold n bytes from p on, p at a line's start.
	writeBack func(p unsafe.Pointer, n uintptr)
	// stream copies n bytes past the cache: dst at a line's start, n a multiple of lineBytes.
	stream func(dst, src unsafe.Pointer, n uintptr)
	// fence waits until what was streamed or written back before is durable.
	fence func()
}

// store copies src to dst, which is part of a DAX mapping, and returns when it is durable there.
func (in *instructions) store(dst, src []byte) {
	n := min(len(dst), len(src))
	if n == 0 {
		return
	}
	if n >= streamBytes {
		head := int(-uintptr(unsafe.Pointer(&dst[0])) % lineBytes)
		body := (n - head) / lineBytes * lineBytes
		in.stream(unsafe.Pointer(&dst[head]), unsafe.Pointer(&src[head]), uintptr(body))
		in.plain(dst[:head], src[:head])
		in.plain(dst[head+body:n], src[head+body:n])
	} else {
		in.plain(dst[:n], src[:n])
	}
	in.fence()
}

// plain copies and writes back.
func (in *instructions) plain(dst, src []byte) {
	if len(dst) == 0 {
		return
	}
	copy(dst, src)
	into := uintptr(unsafe.Pointer(&dst[0])) % lineBytes
	in.writeBack(unsafe.Add(unsafe.Pointer(&dst[0]), -int(into)), into+uintptr(len(dst)))
}
