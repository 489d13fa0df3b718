package store

import (
	"bytes"
	"testing"
)

// partsCache is a mapCache that gives parts, and is told what was freed.
type partsCache struct {
	mapCache
	parts, damaged int
	freed          map[uint32]bool
}

func (c *partsCache) ReadAt(_ [16]byte, segment uint32, off int, p []byte) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	l := c.lines[lineKey{segment, off / LineBytes}]
	if l == nil {
		return false
	}
	c.parts++
	if copy(p, l[off%LineBytes:]); c.damaged > 0 {
		p[len(p)/2]++
		c.damaged--
	}
	return true
}

func (c *partsCache) Forget(_ [16]byte, segment uint32) { c.freed[segment] = true }

// A read at random takes a part of a line, one that follows it the whole line; a part that is damaged is read past.
func TestParts(t *testing.T) {
	sh, ctx := newShelf(t, 1), t.Context()
	o := sh.options()
	o.LineBytes = LineBytes
	cache := &partsCache{mapCache: mapCache{lines: map[lineKey][]byte{}}, freed: map[uint32]bool{}}
	o.Cache = cache
	st := open(t, o)
	_, err := st.CreateVolume(ctx, "a", 1<<30)
	must(t, err)
	data := noise(2, 2048)
	must(t, volume(t, st, "a").Write(ctx, 0, data))
	must(t, st.Close(ctx))

	st = open(t, o)
	v := volume(t, st, "a")
	read := func(lba uint64) {
		t.Helper()
		got := make([]byte, BlockBytes)
		must(t, v.Read(ctx, lba, got))
		if !bytes.Equal(got, data[lba*BlockBytes:(lba+1)*BlockBytes]) {
			t.Fatalf("block %d: wrong data", lba)
		}
	}
	for lba := uint64(5); lba < 2048; lba += 100 {
		read(lba)
	}
	if cache.parts < 15 {
		t.Errorf("%d parts of 21 reads at random", cache.parts)
	}
	before := cache.parts
	for lba := uint64(0); lba < 2048; lba++ {
		read(lba)
	}
	if n := cache.parts - before; n > 2048/10 {
		t.Errorf("%d parts of 2048 reads in sequence", n)
	}
	for i := range st.lines.parts {
		st.lines.parts[i] = part{}
	}
	cache.damaged = 1
	read(700)
	if cache.damaged != 0 {
		t.Error("the damaged part was not read")
	}
	// What is freed is forgotten.
	must(t, st.DeleteVolume(ctx, "a"))
	must(t, st.Sync(ctx))
	must(t, st.Close(ctx))
	if st.Stats().SegmentsFreed > 0 != (len(cache.freed) > 0) {
		t.Errorf("%d segments freed, %d told", st.Stats().SegmentsFreed, len(cache.freed))
	}
	t.Log(len(cache.freed), "segments freed")
}
