package store

import "context"

// Device is what the store needs of a LUN: the journal LUN and the segment LUN are one each. All
// offsets and lengths are multiples of 4 KiB. A call that returned nil is durable. Calls may be
// concurrent. A device on a network retries by itself until ctx ends; an error that it returns
// is definite, and those of package target are known by errors.Is.
type Device interface {
	ReadAt(ctx context.Context, p []byte, off int64) error
	WriteAt(ctx context.Context, p []byte, off int64) error
	// Unmap frees the range, which reads as zeros afterwards.
	Unmap(ctx context.Context, off, n int64) error
	Flush(ctx context.Context) error
	Size() int64
}

// Cache keeps lines of segments on this host. It may lose any line at any time, and it gives
// only what it has verified against its own checksum. Its methods don't fail and don't block on
// a slow medium longer than a read takes. host/cache implements it.
type Cache interface {
	// Read fills p (LineBytes long) and returns true, or returns false.
	Read(store [16]byte, segment uint32, line int, p []byte) bool
	// Write may keep a copy of p.
	Write(store [16]byte, segment uint32, line int, p []byte)
}

// partCache is a Cache that can read less than a line: what stands at off in the segment, within one line. Who
// gets false asks for the line, so that it is no miss yet.
type partCache interface {
	ReadAt(store [16]byte, segment uint32, off int, p []byte) bool
}

// forgetfulCache is a Cache that wants to know which segments were freed.
type forgetfulCache interface {
	Forget(store [16]byte, segment uint32)
}

// noCache is the cache of a host without one.
type noCache struct{}

func (noCache) Read([16]byte, uint32, int, []byte) bool { return false }
func (noCache) Write([16]byte, uint32, int, []byte)     {}
