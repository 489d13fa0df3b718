package target

import (
	"errors"
	"fmt"
)

// The conditions that a Device reports and that initiators can act on. One table in each engine
// turns them into sense data (target/scsi) or NVMe status (target/nvme).
var (
	// ErrNoSpace: the pool behind a thin unit is full; nothing of the command was written.
	ErrNoSpace = errors.New("target: no space left in the pool")
	// ErrReadOnly: the unit or the range refuses writes.
	ErrReadOnly = errors.New("target: write protected")
	// ErrOverwrite: a store LUN's block was written before and may not be written again.
	ErrOverwrite = errors.New("target: block was written before")
	// ErrStandby: this controller does not own the unit; its partner does.
	ErrStandby = errors.New("target: access state is standby")
	// ErrTransition: ownership is on the move; the initiator should ask again soon.
	ErrTransition = errors.New("target: access state is changing")
	// ErrUnavailable: this path cannot serve the unit; another may.
	ErrUnavailable = errors.New("target: access state is unavailable")
	// ErrNotReady: the unit is starting.
	ErrNotReady = errors.New("target: unit is becoming ready")
	// ErrMediumRead: the blocks cannot be read and could not be rebuilt.
	ErrMediumRead = errors.New("target: unrecovered read error")
	// ErrMediumWrite: the blocks could not be made durable.
	ErrMediumWrite = errors.New("target: write error")
	// ErrBusy: a limit is reached; the initiator should try again.
	ErrBusy = errors.New("target: busy")
	// ErrRange: an address beyond the unit's capacity.
	ErrRange = errors.New("target: address out of range")
	// ErrAlignment: a request that the unit takes only in larger units (a store LUN's stripes).
	ErrAlignment = errors.New("target: request not aligned as the unit asks")
)

// MiscompareError is the answer of CompareAndWrite where the data differ.
type MiscompareError struct {
	// Offset of the first differing byte, from the start of the compared data.
	Offset uint64
}

func (e *MiscompareError) Error() string {
	return fmt.Sprintf("target: data differ at byte %d", e.Offset)
}

// MediumError is a failure of one block, which initiators are told by its address.
type MediumError struct {
	// LBA of the first block that failed.
	LBA uint64
	// Write tells which of ErrMediumRead and ErrMediumWrite it is.
	Write bool
	// Err is what happened; it may be nil.
	Err error
}

func (e *MediumError) Error() string {
	what := ErrMediumRead
	if e.Write {
		what = ErrMediumWrite
	}
	if e.Err == nil {
		return fmt.Sprintf("%v at block %d", what, e.LBA)
	}
	return fmt.Sprintf("%v at block %d: %v", what, e.LBA, e.Err)
}

// Unwrap gives ErrMediumRead or ErrMediumWrite, and Err.
func (e *MediumError) Unwrap() []error {
	what := ErrMediumRead
	if e.Write {
		what = ErrMediumWrite
	}
	if e.Err == nil {
		return []error{what}
	}
	return []error{what, e.Err}
}
