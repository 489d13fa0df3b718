package shelf_test

import (
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/ledge-storage/ledge/firmware/shelf"
	"github.com/ledge-storage/ledge/raid/raidtest"

	"github.com/ledge-storage/ledge/raid"
)

// memberBlocks counts the blocks that reach the members' slots.
type memberBlocks struct {
	mu sync.Mutex
	n  map[[2]int64]int // by disk and block
}

func (m *memberBlocks) watch(s *raidtest.Set) {
	m.n = map[[2]int64]int{}
	for _, d := range s.Disks {
		d.OnWrite(func(w raidtest.Write) raidtest.Verdict {
			m.mu.Lock()
			defer m.mu.Unlock()
			for at := w.Off; at < w.Off+int64(len(w.Data)); at += raid.BlockBytes {
				if at >= raid.DataOffset {
					m.n[[2]int64{int64(w.Disk), at}]++
				}
			}
			return raidtest.Land
		})
	}
}

// A ring of a sixth of what the log holds, an agent's journal, goes round and round and never reaches the members.
func TestRingStaysInNVRAM(t *testing.T) {
	r := newRig(t, 16<<20, shelf.Options{IdleAfter: -1})
	const blocks = 2 * extentBlocks // 1 MiB; with a header each, 2 MiB of 12
	d := r.lun("h.journal", shelf.KindJournal, blocks*4*kib, 4096)
	for i := range 20 * blocks {
		write(t, d, uint64(i%blocks), pattern(uint64(i), 4*kib))
	}
	// The map of the extents is destaged: it holds the tail.
	if s := r.Status().Counters; s.FullStripes != 0 || s.Blocks > 20 {
		t.Fatalf("%d writes: %+v", 20*blocks, s)
	}
	for i := range blocks {
		mustEqual(t, "ring", read(t, d, uint64(i), 4*kib), pattern(uint64(19*blocks+i), 4*kib))
	}
}

// Blocks that are overwritten at random, in a range that the log holds several times: a destage writes each at most once,
// and does not begin before the log is half full. So a block reaches the members at most once for each half of a log
// that is written, and the whole range far less often than it is written.
func TestHotRange(t *testing.T) {
	r := newRig(t, 16<<20, shelf.Options{IdleAfter: -1})
	const blocks = 4 * extentBlocks // 2 MiB
	d := r.lun("v", shelf.KindPlain, blocks*4*kib, 4096)
	log := r.Status().LogBytes
	var m memberBlocks
	m.watch(r.disks)
	rng := rand.New(rand.NewPCG(1, 1))
	written := int64(0)
	put := func() {
		write(t, d, uint64(rng.IntN(blocks)), pattern(rng.Uint64(), 4*kib))
		written += 2 * 4 * kib // a record: a header block and the block
	}
	for written < log*4/10 {
		put()
	}
	if s := r.Status().Counters; s.Rounds != 0 {
		t.Fatalf("destaged before half full: %+v", s)
	}
	for written < 12*log {
		put()
	}
	halves := int(written/(log/2)) + 1
	s := r.Status().Counters
	m.mu.Lock()
	most := 0
	for at, n := range m.n {
		if slot := (at[1] - raid.DataOffset) / raid.BlockBytes; slot%(1+raid.StripBlocks) != 0 { // not a checksum block
			most = max(most, n)
		}
	}
	m.mu.Unlock()
	t.Logf("%d blocks written to %d, %d destaged in %d rounds; the busiest member block %d times, halves %d", written/(8*kib), blocks, s.Blocks, s.Rounds, most, halves)
	if uint64(halves*blocks) < s.Blocks {
		t.Fatalf("%d blocks destaged, of %d in %d halves", s.Blocks, blocks, halves)
	}
}
