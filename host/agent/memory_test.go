package agent

import (
	"runtime"
	"testing"

	"github.com/ledge-storage/ledge/host/dedup"
)

// The index that an agent has by default, and the cache's own memory as host/cache's TestLarge holds it, at most 1 GB a TB with 0.33 GB measured, stay
// within P7 with all else that it keeps. One of 128 MiB is made, told of much, and weighed.
func TestIndexOfFlash(t *testing.T) {
	const plenty = 1 << 50
	for _, c := range []struct {
		flash, memory, want int64
	}{{0, plenty, 64 * mib}, {64 * gib, plenty, 128 * mib}, {64 * gib, 4 * gib, 128 * mib}, {64 * gib, 512 * mib, 64 * mib}, {tb, 8 * gib, gib}, {tb, plenty, 1953125000}, {8 * tb, plenty, 5371093750}, {0, 0, 64 * mib}} {
		if got := defaultIndex(c.flash, c.memory); got/8 != c.want/8 {
			t.Errorf("flash %d, memory %d: %d, want %d", c.flash, c.memory, got, c.want)
		}
	}
	for _, n := range []int64{1, 2, 8, 16} {
		index := dedup.NewIndex(1).Bytes() // of nothing
		for index*2 <= defaultIndex(n*tb, plenty) {
			index *= 2
		}
		cache := n * 330e6
		others := int64(gib) + 3*64*mib + 3*8*mib + 16*mib + 256*mib // maps, lines and tables and buffer, segments, near tables, sessions and code
		if sum, most := index+cache+others, int64(7.5e9)+(n-1)*1e9; sum > most {
			t.Errorf("%d TB: %d bytes, %d are allowed", n, sum, most)
		}
	}
	if testing.Short() {
		return
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	x := dedup.NewIndex(defaultIndex(64*gib, plenty))
	for i := range uint64(1 << 20) {
		var f dedup.Fingerprint
		for j := range 4 {
			v := (i*4 + uint64(j) + 1) * 0x9e3779b97f4a7c15
			v ^= v >> 29
			for k := range 8 {
				f[8*j+k] = byte(v >> (8 * k))
			}
		}
		x.Insert(&f, dedup.Ref{Segment: 1})
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if heap := int64(after.HeapAlloc) - int64(before.HeapAlloc); heap > x.Bytes()+4*mib {
		t.Errorf("an index of %d bytes takes %d", x.Bytes(), heap)
	}
	runtime.KeepAlive(x)
}
