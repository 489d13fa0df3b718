package drive

import (
	"encoding/binary"
	"fmt"
)

// PERSISTENT RESERVE IN and OUT (SPC-4 6.15, 6.16), byte by byte, as pure functions.

const (
	opReserveIn  = 0x5E
	opReserveOut = 0x5F

	// Service actions of PERSISTENT RESERVE IN.
	prReadKeys        = 0x00
	prReadReservation = 0x01
	// Service actions of PERSISTENT RESERVE OUT.
	prRegister       = 0x00
	prReserve        = 0x01
	prRelease        = 0x02
	prPreempt        = 0x04
	prRegisterIgnore = 0x06

	// typeWERO is Write Exclusive – Registrants Only (SPC-4 table 212); scope 0 is the logical unit.
	typeWERO = 0x5

	prOutBytes = 24
	// prInBytes holds the keys of 511 registrants.
	prInBytes = 4096

	statusGood                = 0x00
	statusCheckCondition      = 0x02
	statusBusy                = 0x08
	statusReservationConflict = 0x18
	statusTaskSetFull         = 0x28

	senseNotReady       = 0x2
	senseIllegalRequest = 0x5
	senseUnitAttention  = 0x6
)

// reserveInCDB: byte 1 service action, bytes 7–8 allocation length.
func reserveInCDB(action byte, allocation int) []byte {
	c := make([]byte, 10)
	c[0], c[1] = opReserveIn, action
	binary.BigEndian.PutUint16(c[7:], uint16(allocation))
	return c
}

// reserveOutCDB: byte 1 service action, byte 2 scope and type, bytes 5–8 parameter list length. Scope and type are
// ignored by the registering actions.
func reserveOutCDB(action byte) []byte {
	c := make([]byte, 10)
	c[0], c[1] = opReserveOut, action
	if action != prRegister && action != prRegisterIgnore {
		c[2] = typeWERO
	}
	binary.BigEndian.PutUint32(c[5:], prOutBytes)
	return c
}

// reserveOutData is the basic parameter list: bytes 0–7 our key, 8–15 the service action's key, byte 20 bit 0 APTPL.
func reserveOutData(key, actionKey uint64, aptpl bool) []byte {
	d := make([]byte, prOutBytes)
	binary.BigEndian.PutUint64(d, key)
	binary.BigEndian.PutUint64(d[8:], actionKey)
	if aptpl {
		d[20] = 1
	}
	return d
}

// decodeKeys parses READ KEYS: bytes 4–7 additional length, then 8 bytes a key. The drive may have more keys than
// fit; then what fits is returned.
func decodeKeys(d []byte) ([]uint64, error) {
	if len(d) < 8 {
		return nil, fmt.Errorf("drive: READ KEYS answered %d bytes", len(d))
	}
	n := int64(binary.BigEndian.Uint32(d[4:]))
	n = min(n, int64(len(d)-8))
	var keys []uint64
	for at := int64(8); at+8 <= 8+n; at += 8 {
		keys = append(keys, binary.BigEndian.Uint64(d[at:]))
	}
	return keys, nil
}

// decodeReservation parses READ RESERVATION: additional length 0 means none, else bytes 8–15 are the holder's key.
// A reservation of another type than ours does not fence as we need, and is an error.
func decodeReservation(d []byte) (holder uint64, err error) {
	if len(d) < 8 {
		return 0, fmt.Errorf("drive: READ RESERVATION answered %d bytes", len(d))
	}
	n := binary.BigEndian.Uint32(d[4:])
	if n == 0 {
		return 0, nil
	}
	if n < 16 || len(d) < 24 {
		return 0, fmt.Errorf("drive: READ RESERVATION answered %d bytes, length %d", len(d), n)
	}
	if t := d[21] & 0x0F; t != typeWERO {
		return 0, fmt.Errorf("drive: a reservation of type %d is held by key %#x", t, binary.BigEndian.Uint64(d[8:]))
	}
	return binary.BigEndian.Uint64(d[8:]), nil
}

// SenseError is CHECK CONDITION.
type SenseError struct {
	Key, ASC, ASCQ byte
}

func (e *SenseError) Error() string {
	return fmt.Sprintf("check condition, sense %x/%02x/%02x", e.Key, e.ASC, e.ASCQ)
}

// decodeSense parses fixed (70h, 71h) and descriptor (72h, 73h) sense data (SPC-4 4.5).
func decodeSense(s []byte) *SenseError {
	if len(s) < 4 {
		return &SenseError{}
	}
	switch s[0] & 0x7F {
	case 0x70, 0x71:
		e := &SenseError{Key: s[2] & 0x0F}
		if len(s) >= 14 {
			e.ASC, e.ASCQ = s[12], s[13]
		}
		return e
	case 0x72, 0x73:
		return &SenseError{Key: s[1] & 0x0F, ASC: s[2], ASCQ: s[3]}
	}
	return &SenseError{}
}
