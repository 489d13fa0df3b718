package iscsi

import (
	"errors"
	"fmt"
)

var (
	// ErrSessionLost: the session ended before the command was answered. Whether the target
	// executed it, or still will, is unknown until the session is reinstated.
	ErrSessionLost = errors.New("iscsi: session lost")
	// ErrProtocol: the target sent what RFC 7143 does not allow it to.
	ErrProtocol = errors.New("iscsi: protocol error")
	// ErrDigest: a checksum of a PDU is wrong.
	ErrDigest = errors.New("iscsi: digest mismatch")
	// ErrTimeout: the target was silent for too long, or held a command for too long.
	ErrTimeout = errors.New("iscsi: no answer in time")
	// ErrClosed: the session was closed by its owner.
	ErrClosed = errors.New("iscsi: session closed")
	// ErrAuth: the target refused the name or the secret, or could not prove its own.
	ErrAuth = errors.New("iscsi: authentication failed")
	// ErrNoTarget: the portal does not know the target.
	ErrNoTarget = errors.New("iscsi: target not found")
	// ErrConfig: a field of Config is outside its limits.
	ErrConfig = errors.New("iscsi: bad configuration")
	// ErrReset: a reset of the LUN on this session ended the command; the target runs it no more.
	ErrReset = errors.New("iscsi: command ended by a reset")
	// ErrTask: the target refused a task management function.
	ErrTask = errors.New("iscsi: task management function refused")
)

// LoginError is a login response that is not success (RFC 7143 11.13.5).
type LoginError struct{ Class, Detail byte }

func (e *LoginError) Error() string {
	return fmt.Sprintf("iscsi: login refused: %s (status %02x%02x)", loginStatusText(e.Class, e.Detail), e.Class, e.Detail)
}

// Is lets a caller branch on the two that an operator can mend.
func (e *LoginError) Is(target error) bool {
	switch {
	case e.Class == 2 && (e.Detail == 1 || e.Detail == 2):
		return target == ErrAuth
	case e.Class == 2 && (e.Detail == 3 || e.Detail == 4):
		return target == ErrNoTarget
	}
	return false
}

func loginStatusText(class, detail byte) string {
	switch uint16(class)<<8 | uint16(detail) {
	case 0x0101:
		return "target moved for now"
	case 0x0102:
		return "target moved for good"
	case 0x0200:
		return "initiator error"
	case 0x0201:
		return "authentication failure"
	case 0x0202:
		return "this initiator may not use the target"
	case 0x0203:
		return "target not found"
	case 0x0204:
		return "target removed"
	case 0x0205:
		return "unsupported version"
	case 0x0206:
		return "too many connections"
	case 0x0207:
		return "missing parameter"
	case 0x0208:
		return "cannot include the connection in a session"
	case 0x0209:
		return "session type not supported"
	case 0x020a:
		return "session does not exist"
	case 0x020b:
		return "invalid during login"
	case 0x0300:
		return "target error"
	case 0x0301:
		return "service unavailable"
	case 0x0302:
		return "out of resources"
	}
	return "unknown status"
}
