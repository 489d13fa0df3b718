package nvram

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"unsafe"
)

// BlockBytes is the unit of everything in the log.
const BlockBytes = 4096

// Region is a persistent byte range: a pmem block device, a DAX mapping, an SSD, a file. Offsets and
// lengths are multiples of BlockBytes and buffers are aligned for O_DIRECT (AlignedBlocks).
// ReadAt and WriteAt may be called concurrently.
type Region interface {
	ReadAt(p []byte, off int64) (int, error)
	// WriteAt returns when p is durable.
	WriteAt(p []byte, off int64) (int, error)
	Size() int64
	Close() error
}

// AlignedBlocks returns n blocks of zeros, aligned to BlockBytes.
func AlignedBlocks(n int) []byte {
	b := make([]byte, (n+1)*BlockBytes)
	skip := int(-uintptr(unsafe.Pointer(unsafe.SliceData(b))) & (BlockBytes - 1))
	return b[skip : skip+n*BlockBytes : skip+n*BlockBytes]
}

// ID names one log from its Format to the next: a fresh one for each Format, also kept in the pool's labels.
type ID [16]byte

// NewID returns a random ID.
func NewID() ID {
	var id ID
	rand.Read(id[:])
	return id
}

func (id ID) String() string { return hex.EncodeToString(id[:]) }

// Area is the part of a region that one log, or one mirror, owns.
type Area struct {
	Off, Size int64
}

// Areas divides a region of size bytes: the first half for the controller's own log, the second for the
// mirror of its partner's.
func Areas(size int64) (own, mirror Area) {
	half := size / 2 / BlockBytes * BlockBytes
	return Area{0, half}, Area{half, half}
}

// The kinds of sets. A kind is the caller's own; its range decides where the set lives, and all sets of
// one Append are of one lane.
const (
	// KindWrite: block writes of a host. Append waits while only the reserve is left.
	KindWrite uint8 = 0
	// KindInternal, up to KindUpdate-1: sets that destage itself needs (a change of the map). They share the
	// data lane with KindWrite, and may use its reserve.
	KindInternal uint8 = 1
	// KindUpdate and above: redo images that are needed for moments (a stripe update, until it is applied and
	// flushed). They have a lane of their own, released by TrimUpdates, so that a log full of data leaves
	// them their room.
	KindUpdate uint8 = 128
)

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
	Kind    uint8
	Extents []Extent
	// Payload is owned by the caller, and not kept after Append returned. Replay gives one buffer,
	// valid until its callback returns.
	Payload [][]byte
}

// Witness records on the pool's members who may know all acknowledged writes (promise P1).
// Its calls may block; the log makes one at a time, without a lock held.
type Witness interface {
	// EnterSolo records on a majority of the members that from lsn on only this controller has
	// the writes. Nothing is acknowledged solo before it returned nil. When solo is recorded already, it
	// keeps the lower lsn. An error fails the log: nothing more is acknowledged.
	EnterSolo(ctx context.Context, lsn uint64) error
	// LeaveSolo records that the mirror is complete again, and the log not fresh (Options.Fresh); nothing to do when neither
	// is recorded. It is
	// called after each resync, also when it was an earlier run that went solo, and again after an error.
	LeaveSolo(ctx context.Context) error
}

var (
	// ErrCorrupt: bytes in the region, or of a frame, are not what this package wrote; or acknowledged records
	// are damaged.
	ErrCorrupt = errors.New("nvram: corrupt")
	// ErrForeign: the region belongs to another shelf, controller or log.
	ErrForeign = errors.New("nvram: region belongs to another log")
	// ErrEmpty: the region carries no log.
	ErrEmpty = errors.New("nvram: region carries no log")
	// ErrTooLarge: an Append larger than the log ever takes (Log.MaxAppendBlocks).
	ErrTooLarge = errors.New("nvram: set too large for the log")
	// ErrInvalid: a set whose payload and extents disagree, or sets of two lanes in one Append.
	ErrInvalid = errors.New("nvram: invalid set")
	// ErrClosed: the log was closed, or failed and takes nothing more.
	ErrClosed = errors.New("nvram: log closed")
	// ErrStale: the mirror is not complete, or the epoch is older than one seen.
	ErrStale = errors.New("nvram: mirror is stale")
)
