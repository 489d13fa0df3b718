package raid

import "github.com/ledge-storage/ledge/raid/layout"

// LayoutOf is for tests that must know where strips lie.
func LayoutOf(a *Array) *layout.Layout { return a.at }

// ForgetSums forgets all checksum blocks.
func ForgetSums(a *Array) { a.cache.clear() }

// LostStrips counts the strips of a stripe that have no place now.
func (a *Array) LostStrips(stripe uint64) (lost int) {
	for _, p := range a.places(stripe) {
		if p.member == nil {
			lost++
		}
	}
	return lost
}

// LostOn tells whether a strip of the stripe has its home on a member and has no place now.
func (a *Array) LostOn(stripe uint64, member int) bool {
	for i, p := range a.places(stripe) {
		if home, _ := a.at.Strip(stripe, i); home == member && p.member == nil {
			return true
		}
	}
	return false
}

// PlacesOn counts the strips of a stripe that lie on a member that is online.
func (a *Array) PlacesOn(stripe uint64, member int) (n int) {
	for _, p := range a.places(stripe) {
		if p.member != nil && p.member.index == member {
			n++
		}
	}
	return n
}

// Known tells what is in memory of a stripe: its checksum blocks, or the generations alone.
func Known(a *Array, stripe uint64) (sums, gens bool) {
	a.cache.mu.Lock()
	defer a.cache.mu.Unlock()
	return a.cache.entries[stripe] != nil, a.cache.gens.find(stripe) != nil
}

// LRUStripes is how many stripes' checksum blocks are kept at least.
const LRUStripes = leastStripes
