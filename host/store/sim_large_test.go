//go:build !smallstore

package store

const (
	simSeeds  = 12
	simBlocks = 3000
	simOps    = 150
	simLeast  = 24 // segments of capacity

	cleanSegments = 192
)
