// Package raid turns drives into an array of Reed–Solomon stripes, verified on every read.
package raid

import (
	"context"
	"errors"
)

const (
	// BlockBytes is the unit of addresses, checksums and updates.
	BlockBytes = 4096
	// StripBlocks data blocks, and a checksum block before them, are one member's part of a stripe.
	StripBlocks = 32
)

// Drive is one port to one drive. Offsets and lengths are multiples of BlockBytes; buffers are aligned to
// BlockBytes. raid/drive opens block devices and files; tests have their own.
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

var (
	// ErrReservation: the drive answered RESERVATION CONFLICT: another controller owns it.
	ErrReservation = errors.New("raid: reservation conflict")
	// ErrUnrecoverable: more strips are missing or rotten than parity can rebuild.
	ErrUnrecoverable = errors.New("raid: too many strips lost")
	// ErrCorrupt: bytes on a member are not what this package wrote.
	ErrCorrupt = errors.New("raid: corrupt")
	// ErrForeign: a member of another pool or array.
	ErrForeign = errors.New("raid: foreign member")
	// ErrNoMajority: fewer than a majority of the members could be read or written.
	ErrNoMajority = errors.New("raid: no majority of members")
	// ErrDegraded: too many members are missing to accept writes.
	ErrDegraded = errors.New("raid: too many members missing")
)

var _ = context.Background
