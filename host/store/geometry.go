//go:build !smallstore

package store

// Sizes of the format, and of what is in memory, that the tag smallstore makes small for the simulation: there a store has
// many segments, and maps of several nodes, after a few hundred writes.
const (
	SegmentBytes = 8 << 20
	StripeBytes  = 1 << 20  // the unit in which a segment is written
	LineBytes    = 64 << 10 // the unit in which a segment is read and cached
	maxSlots     = 1 << 14  // blocks stored in a segment

	tableGuess = 192 << 10 // how much is read of a segment's end at first: most tables end here

	pageEntries = 512
	nodePages   = 1024

	leastPages = 64 // of maps, that may be in memory whatever the options say
)
