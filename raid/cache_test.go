package raid

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

// TestCacheIsCurrent: what the cache gives of a stripe is what it was given last, whole or its generations alone, or nothing.
func TestCacheIsCurrent(t *testing.T) {
	const k, m, stripes = 3, 2, 60
	rng := rand.New(rand.NewPCG(1, 2))
	c := newSumCache(2*genWays*4*4*(4+k), k, m) // four sets of generations
	model := map[uint64]*stripeMeta{}
	whole, alone := 0, 0
	for i := range 200_000 {
		stripe := rng.Uint64N(stripes)
		switch rng.IntN(20) {
		case 0:
			c.put(stripe, nil)
			delete(model, stripe)
		case 1, 2, 3, 4:
			meta := &stripeMeta{gens: make([]uint64, k+m), sums: make([]*stripSum, k+m), parity: rng.IntN(8) != 0}
			newest := uint64(i) + 1<<40
			for j := range meta.gens {
				meta.gens[j] = newest
				if j < k {
					meta.gens[j] -= rng.Uint64N([]uint64{1, 1000, 1 << 39}[rng.IntN(3)])
				}
			}
			meta.sums[rng.IntN(k)] = &stripSum{}
			c.put(stripe, meta)
			model[stripe] = meta
		case 5:
			if rng.IntN(1000) == 0 {
				c.clear()
				clear(model)
			}
		default:
			got, want := c.get(stripe), model[stripe]
			switch {
			case got == nil:
			case want == nil:
				t.Fatalf("%d: stripe %d is known, and was forgotten", i, stripe)
			case got == want:
				whole++
			case !want.parity || !got.parity || !slices.Equal(got.gens, want.gens) || len(got.sums) != k+m || slices.ContainsFunc(got.sums, func(s *stripSum) bool { return s != nil }):
				t.Fatalf("%d: stripe %d is %+v, known as %+v", i, stripe, want, got)
			default:
				alone++
				if slices.Min(want.gens)+math.MaxUint32 < want.newest() {
					t.Fatalf("%d: stripe %d: %v do not fit", i, stripe, want.gens)
				}
			}
		}
	}
	if whole < 1000 || alone < 1000 {
		t.Errorf("%d times whole, %d times the generations", whole, alone)
	}
}
