package shelf

import (
	"errors"
	"math/rand/v2"
	"testing"
)

// However a pool grows, no two metadata blocks and no extent of a LUN share a stripe, every extent has exactly one
// entry, and what is read back is what was computed.
func TestRegions(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 60 {
		k := 1 + rng.IntN(10)
		stripes := 4000 + rng.Uint64N(4000)
		s, err := layOut(stripes, k, 2, uint32(1+rng.IntN(2048)), uint32(1+rng.IntN(100)), 4, 10)
		if err != nil {
			continue
		}
		for range maxGrowths {
			stripes += 1 + rng.Uint64N(3000)
			was := s
			if err := s.grow(stripes); err != nil {
				if !errors.Is(err, ErrSize) || s != was {
					t.Fatal(err)
				}
			}
		}
		got, err := decodeSuperblock(s.encode())
		if err != nil || got != s {
			t.Fatalf("%+v came back as %+v, %v", s, got, err)
		}
		checkRegions(t, &s, stripes)
	}
	s, err := layOut(4000, 2, 2, 128, 8, 4, 10)
	if err != nil {
		t.Fatal(err)
	}
	for i := range uint64(maxGrowths) {
		if err := s.grow(5000 + 1000*i); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.grow(50000); !errors.Is(err, ErrLimit) {
		t.Fatal(err)
	}
}

func checkRegions(t *testing.T, s *superblock, stripes uint64) {
	t.Helper()
	used := make(map[uint64]string)
	claim := func(stripe uint64, who string) {
		if used[stripe] != "" && used[stripe] != who || stripe >= stripes {
			t.Fatalf("%+v: stripe %d of %d is %s and %s", s, stripe, stripes, used[stripe], who)
		}
		used[stripe] = who
	}
	for i := range s.DataStripe {
		claim(i, "front")
	}
	table := extentTable{sb: s}
	seen := make(map[uint32]bool)
	own := 0
	for x := range s.extents() {
		b := s.blockOf(x)
		lo, hi, ok := s.tableRange(b)
		if !ok || x < lo || x >= hi || hi-lo > tableEntries {
			t.Fatalf("extent %d is in block %d, which has %d to %d", x, b, lo, hi)
		}
		stripe := s.metaStripe(b / uint32(s.stripeBlocks()))
		if b < s.tableBlock()+s.tableBlocks() && stripe != uint64(b)/uint64(s.stripeBlocks()) {
			t.Fatalf("block %d of the front in stripe %d", b, stripe)
		}
		if b >= s.tableBlock()+s.tableBlocks() && !seen[b/uint32(s.stripeBlocks())] {
			seen[b/uint32(s.stripeBlocks())] = true
			claim(stripe, "table")
		}
		if s.isOwn(x) {
			own++
			continue
		}
		claim(table.stripe(x, 0), "data")
		claim(table.stripe(x, s.ExtentStripes-1), "data")
	}
	if s.capacity() != int(s.extents())-own {
		t.Fatalf("%d extents of %d for LUNs, %d own", s.capacity(), s.extents(), own)
	}
}
