package region

import (
	"bytes"
	"math/rand/v2"
	"runtime"
	"testing"
	"unsafe"
)

// cpuModel is a CPU with a cache and a write queue over memory: what was stored is in mem, what would be there after a
// power cut is in durable. Nothing gets there but what is fenced after it was written back or streamed.
type cpuModel struct {
	mem, durable []byte
	queue        map[int]bool // lines on their way
	fences       int
	misuse       string
}

func newCPUModel(mem []byte) *cpuModel {
	return &cpuModel{mem: mem, durable: bytes.Clone(mem), queue: map[int]bool{}}
}

func (m *cpuModel) line(p unsafe.Pointer) int {
	off := int(uintptr(p) - uintptr(unsafe.Pointer(&m.mem[0])))
	if off%lineBytes != 0 || off < 0 || off >= len(m.mem) {
		m.misuse = "address is not a line of the mapping"
	}
	return off / lineBytes
}

func (m *cpuModel) instructions() *instructions {
	return &instructions{
		name: "model",
		writeBack: func(p unsafe.Pointer, n uintptr) {
			for i := uintptr(0); i < n; i += lineBytes {
				m.queue[m.line(unsafe.Add(p, int(i)))] = true
			}
		},
		stream: func(dst, src unsafe.Pointer, n uintptr) {
			if n%lineBytes != 0 {
				m.misuse = "broken lines streamed"
			}
			copy(unsafe.Slice((*byte)(dst), n), unsafe.Slice((*byte)(src), n))
			for i := uintptr(0); i < n; i += lineBytes {
				m.queue[m.line(unsafe.Add(dst, int(i)))] = true
			}
		},
		fence: func() {
			m.fences++
			for l := range m.queue {
				copy(m.durable[l*lineBytes:][:lineBytes], m.mem[l*lineBytes:][:lineBytes])
			}
			clear(m.queue)
		},
	}
}

// pages are n bytes from a page's start, as a mapping is.
func pages(n int) []byte { return aligned((n + blockBytes - 1) / blockBytes)[:n] }

// storeCases calls f for many sizes and alignments of source and destination.
func storeCases(f func(dstAt, srcAt, n int)) {
	sizes := []int{0, 1, 2, 7, 8, 15, 16, 63, 64, 65, 127, 128, 129, 191, 1000, streamBytes - 1, streamBytes, streamBytes + 1, 4095, 4096, 4097, 8192, 12345}
	for _, n := range sizes {
		for _, d := range []int{0, 1, 31, 63, 64, 65, 4096 - 1} {
			for _, s := range []int{0, 1, 8, 63} {
				f(d, s, n)
			}
		}
	}
}

// When store returns, every byte of it would survive a power cut, and no other byte has changed.
func TestStoreIsDurable(t *testing.T) {
	src := make([]byte, 32<<10)
	rng := rand.NewChaCha8([32]byte{1})
	storeCases(func(d, s, n int) {
		m := newCPUModel(pages(32 << 10))
		rng.Read(src)
		want := bytes.Clone(m.mem)
		copy(want[d:d+n], src[s:])
		m.instructions().store(m.mem[d:d+n], src[s:s+n])
		switch {
		case m.misuse != "":
			t.Fatalf("store of %d at %d from %d: %s", n, d, s, m.misuse)
		case !bytes.Equal(m.mem, want):
			t.Fatalf("store of %d at %d from %d: wrong bytes", n, d, s)
		case !bytes.Equal(m.durable, want):
			t.Fatalf("store of %d at %d from %d: some of it is not durable", n, d, s)
		case n > 0 && m.fences != 1:
			t.Fatalf("store of %d: %d fences", n, m.fences)
		}
	})
}

// The assembly copies what it is told to, and touches nothing else, with each of the CPU's instructions.
func TestInstructions(t *testing.T) {
	all := everyInstructions()
	if len(all) == 0 {
		t.Skip("no instructions for this CPU: msync is used")
	}
	src := make([]byte, 32<<10)
	rng := rand.NewChaCha8([32]byte{2})
	for _, in := range all {
		dst := pages(32 << 10)
		storeCases(func(d, s, n int) {
			rng.Read(src)
			rng.Read(dst)
			want := bytes.Clone(dst)
			copy(want[d:d+n], src[s:])
			in.store(dst[d:d+n], src[s:s+n])
			if !bytes.Equal(dst, want) {
				t.Fatalf("%s: store of %d at %d from %d: wrong bytes", in.name, n, d, s)
			}
		})
		// The whole and nothing but it, page by page, while the collector runs.
		for i := range 200 {
			n := 1 + i*37%7
			b := pages(n * blockBytes)
			rng.Read(src)
			in.store(b, src[:len(b)])
			if i%50 == 0 {
				runtime.GC()
			}
			if !bytes.Equal(b, src[:len(b)]) {
				t.Fatalf("%s: %d pages differ", in.name, n)
			}
		}
	}
}

// BenchmarkStore compares the two ways of a store at the sizes of a log's records; streamBytes follows from it.
func BenchmarkStore(b *testing.B) {
	all := everyInstructions()
	if len(all) == 0 {
		b.Skip("no instructions")
	}
	in := all[0]
	dst, src := pages(64<<20), pages(1<<20)
	for _, n := range []int{64, 256, 1024, 4096, 8192, 65536, 1 << 20} {
		name := map[int]string{64: "64", 256: "256", 1024: "1K", 4096: "4K", 8192: "8K", 65536: "64K", 1 << 20: "1M"}[n]
		at := 0
		next := func() []byte { // always cold, as the log's next place is
			if at += n; at+n > len(dst) {
				at = 0
			}
			return dst[at : at+n]
		}
		b.Run("writeback/"+name, func(b *testing.B) {
			b.SetBytes(int64(n))
			for b.Loop() {
				in.plain(next(), src[:n])
				in.fence()
			}
		})
		b.Run("stream/"+name, func(b *testing.B) {
			b.SetBytes(int64(n))
			for b.Loop() {
				in.stream(unsafe.Pointer(&next()[0]), unsafe.Pointer(&src[0]), uintptr(n))
				in.fence()
			}
		})
	}
}
