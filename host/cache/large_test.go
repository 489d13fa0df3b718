package cache

import (
	"flag"
	"runtime"
	"runtime/debug"
	"testing"
	"time"
)

var large = flag.Bool("large", false, "TestLarge with 2 and 8 TB too (40 s, 2 GB of memory)")

// tablesOf answers for a drive of any size that is full: its head, state and tables come from a function, and
// nothing of it is stored.
func tablesOf(size int64) (*fakeDisk, layout) {
	h := head{[16]byte{3}, idealRegion(size), LineBytes}
	l, err := layoutOf(&h, size)
	if err != nil {
		panic(err)
	}
	d := newDisk(size)
	t := table{stores: [][16]byte{storeA}, entries: make([]entry, l.perRegion)}
	group := l.regionBytes * int64(l.perGroup+1)
	d.synth = func(at int64, p []byte) {
		switch {
		case at == 0 || at == copyAt:
			copy(p, h.encode())
			return
		case at == stateAt:
			copy(p, (&state{h.id, true, 1 << 40, 0}).encode())
			return
		}
		in := (at - l.regionBytes) % group
		r := (at-l.regionBytes)/group*int64(l.perGroup) + in/blockBytes
		if at < l.regionBytes || in >= int64(l.perGroup)*blockBytes || r >= int64(l.regions) {
			return
		}
		t.region, t.sequence = uint32(r), uint64(r+1)
		for i := range t.entries {
			n := uint32(r)*l.perRegion + uint32(i)
			t.entries[i] = entry{n/segmentLines + 1, uint8(n % segmentLines), 0, 0}
		}
		copy(p, t.encode(h.id))
	}
	return d, l
}

// liveBytes are on the heap and can't be freed.
func liveBytes() int64 {
	runtime.GC()
	debug.FreeOSMemory()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

const tb = 1e12

// startLarge starts a full cache of a size, and checks what it read and what it holds in memory.
func startLarge(t testing.TB, size int64) {
	d, l := tablesOf(size)
	o := Options{open: d.open, ReadTimeout: time.Hour, slowTimeout: time.Hour, inline: true}
	before := liveBytes()
	c := openWith(t, o)
	// What fills while it runs is counted too: the ghost, and the lines that wait.
	for i := range c.ghost.rows {
		c.ghost.rows[i][0] = 1
	}
	heap := liveBytes() - before + queueLines*LineBytes
	s := c.Stats()
	if s.Lines != int(l.slots()) || s.Err != nil || s.CapacityBytes < size*92/100 {
		t.Fatalf("%d lines of %d: %+v", s.Lines, l.slots(), s)
	}
	if most := size/int64(l.regionBytes)/groupRegions + 10; int64(d.reads) > most || int64(d.readBytes) > size/6000 {
		t.Errorf("%.0f TB: started with %d reads of %d bytes", float64(size)/tb, d.reads, d.readBytes)
	}
	if heap > size/1000 {
		t.Errorf("%.0f TB: %d bytes of memory", float64(size)/tb, heap)
	}
	t.Logf("%.3f TB: %d lines; start: %d reads of %.0f MB; memory %.0f MB, %.1f bytes a line", float64(size)/tb, s.Lines, d.reads, float64(d.readBytes)/1e6,
		float64(heap)/1e6, float64(heap)/float64(s.Lines))
	for _, n := range []uint32{0, 12345, l.slots() - 1} {
		if _, ok := c.index.find(nameOf(0, n/segmentLines+1, uint8(n%segmentLines))); !ok {
			t.Errorf("line %d is not found", n)
		}
	}
	if _, ok := c.index.find(nameOf(0, l.slots()/segmentLines+5, 0)); ok {
		t.Error("a line that is not there is found")
	}
	runtime.KeepAlive(c)
}

// At most 1 GB of memory for each TB, and a start that reads little: for 1, 2 and 8 TB of flash that is full
// (the larger ones with -large).
func TestLarge(t *testing.T) {
	sizes := []int64{tb}
	if *large {
		sizes = append(sizes, 2*tb, 8*tb)
	}
	for _, size := range sizes {
		startLarge(t, size)
	}
}

// All sizes have a layout whose parts don't overlap and whose slots can be numbered.
func TestLayout(t *testing.T) {
	for size := int64(64 << 20); size <= maxBytes; size += size/3 + 4097 {
		h := head{regionBytes: idealRegion(size), lineBytes: LineBytes}
		l, err := layoutOf(&h, size)
		if err != nil {
			t.Fatal(err)
		}
		last := l.regions - 1
		if l.slots() >= slotMask || l.endBytes() > size || l.endBytes() < size-3*l.regionBytes || l.linesBytes() < size*3/4 {
			t.Errorf("%d: %+v", size, l)
		}
		for _, r := range []uint32{0, 1, last / 2, last} {
			if g := l.groupAt(r); l.tableAt(r) < g || l.tableAt(r)+blockBytes > g+l.regionBytes || l.regionAt(r) < g+l.regionBytes ||
				l.slotAt(r*l.perRegion+l.perRegion-1)+int64(l.slotBytes) > l.regionAt(r)+l.regionBytes {
				t.Errorf("%d: region %d overlaps", size, r)
			}
			if r > 0 && l.regionAt(r) < l.regionAt(r-1)+l.regionBytes {
				t.Errorf("%d: region %d overlaps the one before", size, r)
			}
		}
	}
}
