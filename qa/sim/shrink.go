package sim

import "slices"

// Shrink leaves out events of a failing run while it still fails: in halves first, then in ever smaller pieces, each
// of them alone at last. fails runs a seed with the events given. tries bounds its calls.
//
// This is delta debugging (Zeller, Hildebrandt 2002: ddmin) without the test of the pieces by themselves: a
// piece of a run that has to build up state first hardly ever fails alone.
func Shrink(events, tries int, fails func(keep []int) bool) []int {
	keep := make([]int, events)
	for i := range keep {
		keep[i] = i
	}
	for size := (len(keep) + 1) / 2; size > 0; {
		removed := false
		for at := len(keep) - size; at > -size; at -= size { // late ones first: most of them came after the cause
			if tries--; tries < 0 {
				return keep
			}
			lo := max(at, 0)
			less := slices.Delete(slices.Clone(keep), lo, min(at+size, len(keep)))
			if fails(less) {
				keep, removed = less, true
			}
		}
		if size == 1 && !removed {
			break
		}
		size = min((size+1)/2, max(len(keep), 1))
		if size == 1 && len(keep) == 0 {
			break
		}
	}
	return keep
}
