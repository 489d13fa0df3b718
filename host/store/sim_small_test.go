//go:build smallstore

package store

const (
	simSeeds  = 20000
	simBlocks = 320
	simOps    = 30
	simLeast  = 13 // segments of capacity

	cleanSegments = 4096 // of BenchmarkCleaning: reserves are small beside it, as they are in a large store
)
