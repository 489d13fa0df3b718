package initiator

import (
	"fmt"

	"github.com/ledge-storage/ledge/host/initiator/iscsi"
	"github.com/ledge-storage/ledge/target"
)

// Sense keys (SPC-4 4.5.6).
const (
	keyNone           = 0x0
	keyRecovered      = 0x1
	keyNotReady       = 0x2
	keyMedium         = 0x3
	keyHardware       = 0x4
	keyIllegalRequest = 0x5
	keyAttention      = 0x6
	keyProtect        = 0x7
	keyAborted        = 0xb
)

// Additional sense codes and qualifiers that are acted on (SPC-4 annex D).
const (
	codeTransition      = 0x040a
	codeStandby         = 0x040b
	codeUnavailable     = 0x040c
	codeNoSuchLUN       = 0x2500
	codeStateChanged    = 0x2a06
	codeCapacityChanged = 0x2a09
)

// SenseError is a CHECK CONDITION that is definite. It unwraps to the sentinel of package target that
// a Device behind the target would have returned, where there is one.
type SenseError struct {
	Op   string
	Key  byte
	Code uint16 // additional sense code and qualifier
	err  error
}

func (e *SenseError) Error() string {
	s := fmt.Sprintf("initiator: %s: sense key %X, code %02X/%02X", e.Op, e.Key, e.Code>>8, e.Code&0xff)
	if e.err != nil {
		s += ": " + e.err.Error()
	}
	return s
}

func (e *SenseError) Unwrap() error { return e.err }

// StatusError is a SCSI status that is neither good nor one to retry.
type StatusError struct {
	Op     string
	Status byte
}

func (e *StatusError) Error() string {
	return fmt.Sprintf("initiator: %s: SCSI status %#02x", e.Op, e.Status)
}

// decodeSense reads fixed (70h, 71h) and descriptor format (72h, 73h) sense data (SPC-4 4.5).
// Sense that is absent or of no known format is key 0 with ok false.
func decodeSense(b []byte) (key byte, code uint16, ok bool) {
	if len(b) < 2 {
		return 0, 0, false
	}
	switch b[0] & 0x7f {
	case 0x70, 0x71:
		if len(b) < 3 {
			return 0, 0, false
		}
		key = b[2] & 0xf
		if len(b) >= 14 {
			code = uint16(b[12])<<8 | uint16(b[13])
		}
		return key, code, true
	case 0x72, 0x73:
		key = b[1] & 0xf
		if len(b) >= 4 {
			code = uint16(b[2])<<8 | uint16(b[3])
		}
		return key, code, true
	}
	return 0, 0, false
}

// definite makes the error of a CHECK CONDITION that a retry does not mend. The table is the
// reverse of target/scsi's.
func definite(op string, key byte, code uint16) error {
	e := &SenseError{Op: op, Key: key, Code: code}
	switch {
	case key == keyProtect && code == 0x2702, code == 0x300c:
		e.err = target.ErrOverwrite
	case key == keyProtect && code == 0x2707:
		e.err = target.ErrNoSpace
	case key == keyProtect:
		e.err = target.ErrReadOnly
	case key == keyMedium && code>>8 == 0x11:
		e.err = target.ErrMediumRead
	case key == keyMedium:
		e.err = target.ErrMediumWrite
	case key == keyIllegalRequest && code == 0x2100:
		e.err = target.ErrRange
	case key == keyIllegalRequest && code == 0x2400:
		e.err = target.ErrAlignment
	case key == keyNotReady:
		e.err = target.ErrNotReady
	}
	return e
}

// verdict is what to do about a command's answer.
type verdict int

const (
	done      verdict = iota
	again             // the same path, or another, after a pause
	attention         // at once: a unit attention tells, and is over
	elsewhere         // this path is not the one: ask it for its state, choose again
	limited           // a pause and again, but not for ever
	failed
)

// judge reads the answer of one command. err is set with failed and limited.
func judge(op string, c *iscsi.Command) (v verdict, code uint16, err error) {
	switch c.Status {
	case iscsi.StatusGood:
		return done, 0, nil
	case iscsi.StatusBusy, iscsi.StatusTaskSetFull, iscsi.StatusTaskAborted:
		return again, 0, nil
	case iscsi.StatusReservationConflict:
		return failed, 0, fmt.Errorf("%s: %w", op, ErrReservation)
	case iscsi.StatusCheckCondition:
	default:
		return failed, 0, &StatusError{Op: op, Status: c.Status}
	}
	key, code, ok := decodeSense(c.Sense)
	if !ok {
		return limited, 0, &StatusError{Op: op, Status: c.Status}
	}
	switch key {
	case keyNone, keyRecovered:
		// The command succeeded, unless data are missing: a read's caller checks Transferred.
		return done, code, nil
	case keyAttention:
		return attention, code, nil
	case keyNotReady:
		if code>>8 == 0x04 {
			return elsewhere, code, nil
		}
		return limited, code, definite(op, key, code)
	case keyIllegalRequest:
		if code == codeNoSuchLUN { // a standby that has not learned of it, or a LUN that is gone
			return elsewhere, code, nil
		}
	case keyAborted, keyHardware:
		// A controller that fails says such things before it is fenced or restarted.
		return limited, code, definite(op, key, code)
	}
	return failed, code, definite(op, key, code)
}
