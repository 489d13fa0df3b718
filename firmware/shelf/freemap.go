package shelf

import "math/bits"

// freeMap is the set of free extents: a bit each, and above it levels in which a bit says that a word of the level
// below is not zero. To find a free extent among 12 million takes a handful of words, however full the pool is.
type freeMap struct {
	levels [][]uint64 // levels[0] has a bit an extent; the last one is one word
	n      int        // set bits
}

func newFreeMap(size int) freeMap {
	var f freeMap
	for {
		size = (size + 63) / 64
		f.levels = append(f.levels, make([]uint64, max(size, 1)))
		if size <= 1 {
			return f
		}
	}
}

// grow makes room for size extents; the new ones are not in.
func (f *freeMap) grow(size int) {
	bigger := newFreeMap(size)
	for i, l := range f.levels {
		copy(bigger.levels[i], l)
	}
	// What was the top has a word above it now.
	for i := len(f.levels); i < len(bigger.levels); i++ {
		for w, below := range bigger.levels[i-1] {
			if below != 0 {
				bigger.levels[i][w/64] |= 1 << (w % 64)
			}
		}
	}
	bigger.n = f.n
	*f = bigger
}

func (f *freeMap) has(x uint32) bool { return f.levels[0][x/64]&(1<<(x%64)) != 0 }

// add adds x, which is not in.
func (f *freeMap) add(x uint32) {
	f.n++
	for _, l := range f.levels {
		w := l[x/64]
		l[x/64] |= 1 << (x % 64)
		if w != 0 {
			return
		}
		x /= 64
	}
}

// remove takes x out, which is in.
func (f *freeMap) remove(x uint32) {
	f.n--
	for _, l := range f.levels {
		if l[x/64] &^= 1 << (x % 64); l[x/64] != 0 {
			return
		}
		x /= 64
	}
}

// next is the first member from x on; without one, the first of all.
func (f *freeMap) next(x uint32) (uint32, bool) {
	if f.n == 0 {
		return 0, false
	}
	for i := range f.levels {
		l := f.levels[i]
		if x/64 >= uint32(len(l)) {
			break
		}
		if w := l[x/64] >> (x % 64) << (x % 64); w != 0 {
			return f.descend(i, x/64*64+uint32(bits.TrailingZeros64(w))), true
		}
		x = x/64 + 1 // the words behind, seen from the level above
	}
	top := len(f.levels) - 1
	return f.descend(top, uint32(bits.TrailingZeros64(f.levels[top][0]))), true
}

// descend is the first member below bit x of a level.
func (f *freeMap) descend(level int, x uint32) uint32 {
	for level > 0 {
		level--
		x = x*64 + uint32(bits.TrailingZeros64(f.levels[level][x]))
	}
	return x
}
