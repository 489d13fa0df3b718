package shelf

import (
	"errors"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

// A LUN's map answers as Go's map does, in order, and keeps its leaves filled.
func TestLUNMap(t *testing.T) {
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 1))
		m, want := &lunMap{}, map[uint32]uint32{}
		span := []uint32{300, 5000, math.MaxUint32}[seed%3]
		pick := func() uint32 {
			if rng.IntN(50) == 0 {
				return []uint32{0, math.MaxUint32, span}[rng.IntN(3)]
			}
			return rng.Uint32N(span)
		}
		if seed%4 == 1 { // start from a built one
			var pairs []uint64
			for range 2000 {
				k := pick()
				if _, ok := want[k]; !ok {
					want[k] = rng.Uint32()
					pairs = append(pairs, pairOf(k, want[k]))
				}
			}
			var err error
			if m, err = newLUNMap(pairs); err != nil {
				t.Fatal(err)
			}
		}
		for step := range 40000 {
			k := pick()
			if step > 30000 || step%2000 > 1200 { // shrink
				for k = range want {
					break
				}
			}
			got, ok := m.get(k)
			if x, in := want[k]; ok != in || got != x {
				t.Fatalf("seed %d: extent %d is %d, %t; want %d, %t", seed, k, got, ok, x, in)
			}
			if !ok {
				want[k] = rng.Uint32()
				m.put(k, want[k])
			} else if step > 30000 || step%2000 > 1200 || rng.IntN(3) == 0 {
				delete(want, k)
				m.remove(k)
			}
			if step%997 == 0 {
				checkLUNMap(t, m, want)
			}
		}
		checkLUNMap(t, m, want)
	}
	if _, err := newLUNMap([]uint64{pairOf(3, 9), pairOf(1, 4), pairOf(3, 2)}); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("an extent of the LUN twice: %v", err)
	}
}

func checkLUNMap(t *testing.T, m *lunMap, want map[uint32]uint32) {
	t.Helper()
	keys := slices.Sorted(maps.Keys(want))
	var got []uint32
	for lo := uint64(0); lo <= math.MaxUint32; {
		part := m.appendRange(nil, 7, uint32(lo), math.MaxUint32, 101)
		if len(part) == 0 {
			break
		}
		for _, k := range part {
			got = append(got, k.ext)
		}
		lo = uint64(part[len(part)-1].ext) + 1
	}
	if m.used != len(want) || !slices.Equal(got, keys) {
		t.Fatalf("%d extents listed, %d counted, want %d", len(got), m.used, len(want))
	}
	if len(keys) > 3 {
		lo, hi := keys[len(keys)/3], keys[len(keys)*2/3]
		if n := len(m.appendRange(nil, 7, lo, hi, math.MaxInt)); n != len(keys)*2/3-len(keys)/3+1 {
			t.Fatalf("extents %d to %d: %d of them", lo, hi, n)
		}
	}
	if len(m.leaves) > 8 && m.used*3 < len(m.leaves)*leafPairs {
		t.Fatalf("%d extents in %d leaves", m.used, len(m.leaves))
	}
}

// The free map gives every member, in order from a cursor on, and goes round.
func TestFreeMap(t *testing.T) {
	for _, size := range []int{1, 63, 64, 65, 4096, 4097, 300000} {
		rng := rand.New(rand.NewPCG(uint64(size), 1))
		f, want := newFreeMap(size), map[uint32]bool{}
		for range 3000 {
			x := uint32(rng.IntN(size))
			if f.has(x) != want[x] {
				t.Fatalf("size %d: %d is in: %t", size, x, f.has(x))
			}
			if want[x] {
				f.remove(x)
				delete(want, x)
			} else {
				f.add(x)
				want[x] = true
			}
		}
		for len(want) > 40 { // thin
			for x := range want {
				f.remove(x)
				delete(want, x)
				break
			}
		}
		for {
			all := slices.Sorted(maps.Keys(want))
			for range 50 {
				from := uint32(rng.IntN(size + 70))
				got, ok := f.next(from)
				if i, _ := slices.BinarySearch(all, from); len(all) == 0 {
					if ok {
						t.Fatalf("size %d: found %d in an empty map", size, got)
					}
				} else if !ok || got != all[i%len(all)] {
					t.Fatalf("size %d: from %d on it is %d, want %d", size, from, got, all[i%len(all)])
				}
			}
			if f.n != len(want) {
				t.Fatalf("%d counted, %d there", f.n, len(want))
			}
			if len(all) == 0 {
				break
			}
			f.remove(all[0])
			delete(want, all[0])
		}
	}
}
