// Package raid turns drives into an array of Reed–Solomon stripes, verified on every read.
//
// It owns the members' bytes: labels, checksum blocks, data and parity. It promises that what Read
// returns is what was written last, or an error (P4); that a stripe update, once its encoded image is
// in the caller's log, can be applied again after any crash and with members missing (P3); and that a
// member which missed a write is recorded as failed on a majority of the members before that write is
// reported as done. It never logs, never decides who owns the array, and never acknowledges anything
// to a host: firmware/shelf and firmware/ha do.
//
// # Words
//
// A stripe holds K data strips and M parity strips, each on another member; a strip is StripBlocks
// blocks and lies, behind its checksum block, in a slot of a member. Data blocks of a stripe are
// numbered 0 to K*StripBlocks-1: block b is block b%StripBlocks of strip b/StripBlocks. A column is
// the blocks with one number within their strips: the unit of Reed–Solomon arithmetic here, so that
// one rotten block costs one column, never a strip.
//
// # Member layout
//
//	offset         size       what
//	0              4096       label, slot 0 (label.go)
//	4096           4096       label, slot 1
//	8192           7 × 135168 staging slots of a growth (grow.go); no bytes that count while there is none
//	954368         94208      reserved
//	1 MiB          135168     slot 0: checksum block (checksum.go), then StripBlocks data blocks
//	1 MiB + 135168 135168     slot 1 …
//
// Which strip of which stripe lies in which slot of which member is raid/layout's arithmetic.
//
// # Generations
//
// Every write of a stripe carries a generation that the caller makes rise for each stripe (a log sequence
// number will do). The strips that a write touches take it, the parity strips always; the checksum block of
// a parity strip also repeats the generation of every strip. A strip whose generation is lower than what
// any parity strip says of it lost a write, and is repaired like rot; so is a parity strip that is older
// than another. The highest is true: it can be only what was written last.
//
// # Lost blocks
//
// A stripe with more bad strips than parity mends can be written again only when what cannot be had is given up:
// PrepareLoss (lost.go) marks those blocks as lost, in the checksum blocks. They read as errors until they are
// overwritten; all else of the stripe is whole again.
//
// # Durability
//
// Writes may stay in the members' caches until Flush. The caller keeps its log until Flush has returned nil.
//
// # Locks
//
// Pins (grow.go), which keep a stripe in place from PrepareUpdate to Release; Array.life, held for reading by every call;
// per stripe a read/write lock, held by an operation from its first to its last I/O on that stripe
// (it is a range lock, not a latch: what it guards is on the media); Array.rebuildMu, held for a whole rebuild
// or growth, comes before all of them; then Array.labelMu, which serialises
// label changes and is also held across their I/O, for the same reason; then Array.mu, which guards fields
// and is never held across I/O. That is the order.
package raid

import (
	"errors"
)

const (
	// BlockBytes is the unit of addresses, checksums and updates.
	BlockBytes = 4096
	// StripBlocks data blocks, and a checksum block before them, are one member's part of a stripe.
	StripBlocks = 32
	// StripBytes is the data of one strip.
	StripBytes = StripBlocks * BlockBytes
	// SlotBytes is what a strip occupies on its member.
	SlotBytes = (1 + StripBlocks) * BlockBytes
	// DataOffset is where slot 0 starts on a member.
	DataOffset = 1 << 20
)

// Drive is one port to one drive. Offsets and lengths are multiples of BlockBytes; buffers are aligned to
// BlockBytes. raid/drive opens block devices and files; raid/raidtest has drives that lie and crash.
type Drive interface {
	ReadAt(p []byte, off int64) (int, error)
	// WriteAt may leave data in the drive's cache until Flush.
	WriteAt(p []byte, off int64) (int, error)
	Flush() error
	Size() int64
	// Name is for people: a path.
	Name() string
	Close() error
}

// VectorWriter is implemented by a Drive that writes several buffers, one behind the other, in one request: the array then
// does not copy them into one. Each buffer is as Drive says.
type VectorWriter interface {
	WriteVAt(bufs [][]byte, off int64) (int, error)
}

// Reserver is the drive's persistent reservation (SPC-4 5.14): Write Exclusive – Registrants Only.
type Reserver interface {
	// Register makes key this port's registration, replacing whatever it had (REGISTER AND IGNORE EXISTING KEY).
	Register(key uint64) error
	// Reserve takes the Write Exclusive – Registrants Only reservation; nil if held by us already.
	Reserve(key uint64) error
	// Preempt removes the registration of victim, and takes the reservation if victim held it.
	Preempt(key, victim uint64) error
	// Release gives the reservation back; Unregister also drops the registration.
	Release(key uint64) error
	Unregister(key uint64) error
	// Keys returns the registered keys and the holder's (0: no reservation).
	Keys() (registered []uint64, holder uint64, err error)
}

// What an operation on the array may answer.
var (
	// ErrReservation: the drive answered RESERVATION CONFLICT: another controller owns it. The array writes
	// nothing more.
	ErrReservation = errors.New("raid: reservation conflict")
	// ErrUnrecoverable: more strips are missing or rotten than parity can rebuild.
	ErrUnrecoverable = errors.New("raid: too many strips lost")
	// ErrUnwritten: the stripe was never written. Reads of it are ErrUnrecoverable too.
	ErrUnwritten = errors.New("raid: stripe was never written")
	// ErrNotLost: what cannot be read may come back, so that it is not to be declared lost.
	ErrNotLost = errors.New("raid: not lost for good")
	// ErrCorrupt: bytes on a member, or of an encoded update, are not what this package wrote.
	ErrCorrupt = errors.New("raid: corrupt")
	// ErrNoMajority: fewer than a majority of the members could be read or written.
	ErrNoMajority = errors.New("raid: no majority of members")
	// ErrDegraded: too many members are missing to accept writes. The array writes nothing more: what
	// it could not write is still in the caller's log, and reopening may find the member again.
	ErrDegraded = errors.New("raid: too many members missing")
	// ErrStaleEpoch: the members carry a label of a higher epoch than this array was opened with.
	ErrStaleEpoch = errors.New("raid: epoch is stale")
	// ErrReadOnly: the array was opened to look only.
	ErrReadOnly = errors.New("raid: opened read-only")
	// ErrClosed: the array was closed.
	ErrClosed = errors.New("raid: closed")
	// ErrRange: a stripe or block beyond the array, or lengths that do not fit.
	ErrRange = errors.New("raid: out of range")
	// ErrGeneration: a write whose generation is not above the stripe's.
	ErrGeneration = errors.New("raid: generation does not rise")
	// ErrNoReservations: a member's drive has no persistent reservations.
	ErrNoReservations = errors.New("raid: drive has no persistent reservations")
	// ErrTimeout: a drive did not answer in time.
	ErrTimeout = errors.New("raid: drive does not answer")
)

// Why Create or Open refuses a drive (Status.Refused).
var (
	// ErrForeign: a member of another pool or array.
	ErrForeign = errors.New("raid: foreign member")
	// ErrNotBlank: Create found something on the drive.
	ErrNotBlank = errors.New("raid: drive is not blank")
	// ErrBlank: the drive carries no label.
	ErrBlank = errors.New("raid: drive carries no label")
	// ErrStaleMember: the array went on without this member; what it holds is old.
	ErrStaleMember = errors.New("raid: member is stale")
	// ErrDuplicate: another drive carries the same member's label.
	ErrDuplicate = errors.New("raid: duplicate member")
	// ErrSize: the drive is smaller than its label says.
	ErrSize = errors.New("raid: drive too small")
)
