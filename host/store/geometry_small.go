//go:build smallstore

package store

// The sizes of geometry.go, small. No such store is ever on media.
const (
	SegmentBytes = 256 << 10
	StripeBytes  = 64 << 10
	LineBytes    = 16 << 10
	maxSlots     = 1 << 9

	tableGuess = 16 << 10

	pageEntries = 32
	nodePages   = 4

	leastPages = 8 // of maps, that may be in memory whatever the options say
)
