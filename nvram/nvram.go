// Package nvram is the controller's log of acknowledged writes: atomic sets of block writes,
// appended with group commit to a persistent region and, through a Replicator, to the partner's.
package nvram

import (
	"context"
	"errors"
)

// BlockBytes is the unit of everything in the log.
const BlockBytes = 4096

// Region is a persistent byte range: a pmem block device, a DAX mapping, an SSD, a file. Offsets and
// lengths are multiples of BlockBytes and buffers are aligned for O_DIRECT (AlignedBlocks).
type Region interface {
	ReadAt(p []byte, off int64) (int, error)
	// WriteAt returns when p is durable.
	WriteAt(p []byte, off int64) (int, error)
	Size() int64
	Close() error
}

// Extent is a run of 4 KiB blocks of one LUN. LUN and Kind are opaque to the log.
type Extent struct {
	LUN    uint32
	Blocks uint32
	LBA    uint64 // in blocks of BlockBytes
	// Zero: the blocks become zeros, and no payload is carried for them.
	Zero bool
}

// Set is what Append makes durable as one: all of its extents, or none. Payload holds
// BlockBytes for each block of each extent that is not Zero, in order, in one or more buffers.
type Set struct {
	// Kind is 0 for block writes; other values are the caller's (a stripe update, say).
	Kind    uint8
	Extents []Extent
	// Payload is owned by the caller, and not kept after Append returned.
	Payload [][]byte
}

// Replicator is the partner's side of an append (nvram/mirror implements it). Frames arrive in
// order of their LSN.
type Replicator interface {
	// Replicate sends one encoded record, destined to byte offset off of the mirror's log, and calls
	// done once, when it is durable there or cannot be.
	Replicate(lsn uint64, off int64, frame []byte, done func(error))
	// Trim tells that the log now starts at lsn, offset off. No answer is awaited.
	Trim(lsn uint64, off int64)
}

// Witness records on the pool's members who may know all acknowledged writes (promise P1).
type Witness interface {
	// EnterSolo records on a majority of the members that from lsn on only this controller has
	// the writes. Nothing is acknowledged solo before it returned nil.
	EnterSolo(ctx context.Context, lsn uint64) error
	// LeaveSolo records that the mirror is complete again.
	LeaveSolo(ctx context.Context) error
}

var (
	// ErrCorrupt: bytes in the region are not what this package wrote.
	ErrCorrupt = errors.New("nvram: corrupt")
	// ErrForeign: the region belongs to another shelf, controller or log.
	ErrForeign = errors.New("nvram: region belongs to another log")
	// ErrEmpty: the region carries no log.
	ErrEmpty = errors.New("nvram: region carries no log")
	// ErrTooLarge: a set larger than the log ever takes.
	ErrTooLarge = errors.New("nvram: set too large for the log")
	// ErrClosed: the log was closed, or failed and takes nothing more.
	ErrClosed = errors.New("nvram: log closed")
	// ErrStale: the mirror is not complete, or the epoch is older than one seen.
	ErrStale = errors.New("nvram: mirror is stale")
)
