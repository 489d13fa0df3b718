//go:build smallstore

package store

const (
	simSeeds  = 20000
	simBlocks = 320
	simOps    = 30
	simLeast  = 13 // segments of capacity
)
