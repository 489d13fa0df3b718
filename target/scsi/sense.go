package scsi

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/ledge-storage/ledge/target"
)

// Status codes (SAM-5 5.3.1).
const (
	StatusGood                = 0x00
	StatusCheckCondition      = 0x02
	StatusConditionMet        = 0x04
	StatusBusy                = 0x08
	StatusReservationConflict = 0x18
	StatusTaskSetFull         = 0x28
	StatusTaskAborted         = 0x40
)

// Sense keys (SPC-4 4.5.6).
const (
	keyNoSense        = 0x0
	keyRecovered      = 0x1
	keyNotReady       = 0x2
	keyMediumError    = 0x3
	keyHardwareError  = 0x4
	keyIllegalRequest = 0x5
	keyUnitAttention  = 0x6
	keyDataProtect    = 0x7
	keyCopyAborted    = 0xA
	keyAbortedCommand = 0xB
	keyMiscompare     = 0xE
)

// asc is an additional sense code and its qualifier.
type asc uint16

const (
	ascNone                   asc = 0x0000
	ascOperationInProgress    asc = 0x0016
	ascBecomingReady          asc = 0x0401
	ascNeedsStart             asc = 0x0402
	ascFormatting             asc = 0x0404
	ascTransition             asc = 0x040A
	ascStandby                asc = 0x040B
	ascUnavailable            asc = 0x040C
	ascSanitizing             asc = 0x041B
	ascWriteError             asc = 0x0C00
	ascCopyTargetUnreachable  asc = 0x0D02
	ascReadError              asc = 0x1100
	ascParameterListLength    asc = 0x1A00
	ascMiscompare             asc = 0x1D00
	ascInvalidOpcode          asc = 0x2000
	ascRange                  asc = 0x2100
	ascTokenType              asc = 0x2301
	ascTokenUnknown           asc = 0x2304
	ascTokenCorrupt           asc = 0x2305
	ascTokenRevoked           asc = 0x2306
	ascTokenExpired           asc = 0x2307
	ascTokenDeleted           asc = 0x2309
	ascTokenLength            asc = 0x230A
	ascInvalidFieldCDB        asc = 0x2400
	ascUnsupportedLUN         asc = 0x2500
	ascInvalidFieldParameter  asc = 0x2600
	ascInvalidReleasePR       asc = 0x2604
	ascTooManyTargets         asc = 0x2606
	ascUnsupportedTarget      asc = 0x2607
	ascTooManySegments        asc = 0x2608
	ascUnsupportedSegment     asc = 0x2609
	ascInlineDataLength       asc = 0x260B
	ascWriteProtected         asc = 0x2700
	ascSoftwareWriteProtected asc = 0x2702
	ascSpaceAllocationFailed  asc = 0x2707
	ascMediumFormatCorrupted  asc = 0x3100
	ascFormatFailed           asc = 0x3101
	ascSanitizeFailed         asc = 0x3103
	ascSavingNotSupported     asc = 0x3900
	ascInternal               asc = 0x4400
	ascDataPhase              asc = 0x4B00
	ascInsufficientResources  asc = 0x5503
	ascInsufficientRegister   asc = 0x5504
	ascNoTokenResources       asc = 0x550D
	ascSetGroupsFailed        asc = 0x670A

	uaPowerOn                asc = 0x2900
	uaReset                  asc = 0x2903
	uaNexusLoss              asc = 0x2907
	uaModeChanged            asc = 0x2A01
	uaReservationsPreempted  asc = 0x2A03
	uaReservationsReleased   asc = 0x2A04
	uaRegistrationsPreempted asc = 0x2A05
	uaAccessStateChanged     asc = 0x2A06
	uaCapacityChanged        asc = 0x2A09
	uaLUNsChanged            asc = 0x3F0E
	uaInquiryChanged         asc = 0x3F03
	uaCommandsCleared        asc = 0x2F00
	uaThinThreshold          asc = 0x3807
)

// sense is what a CHECK CONDITION carries.
type sense struct {
	key  byte
	code asc
	// information is the INFORMATION field where hasInfo: an LBA, or an offset of a miscompare.
	information uint64
	hasInfo     bool
	// field, where not zero, is the sense-key specific field pointer (SPC-4 4.5.2.4.2).
	field fieldPointer
}

// fieldPointer names the byte (and bit) at fault: bit 15 valid, bit 14 in the CDB (else in the
// parameter list), bits 13 to 11 reserved, bit 3 of the first byte BPV. Encoded as the three
// bytes of the wire, big-endian, in the low 24 bits.
type fieldPointer uint32

func inCDB(byteNo, bit int) fieldPointer {
	return 0xC80000 | fieldPointer(bit)<<16 | fieldPointer(byteNo)
}
func inList(byteNo int) fieldPointer { return 0x800000 | fieldPointer(byteNo) }

// progress stands in the field pointer's place under NOT READY and NO SENSE: done of 65536
// (SPC-4 4.5.2.4.4).
func progress(done uint32) fieldPointer { return 0x800000 | fieldPointer(done&0xFFFF) }

func (s *sense) Error() string {
	return fmt.Sprintf("scsi: sense key %X, asc %02X, ascq %02X", s.key, byte(s.code>>8), byte(s.code))
}

// statusError is a status without sense data.
type statusError byte

func (s statusError) Error() string { return fmt.Sprintf("scsi: status %02X", byte(s)) }

const (
	errReservationConflict = statusError(StatusReservationConflict)
	errConditionMet        = statusError(StatusConditionMet)
	errAborted             = statusError(StatusTaskAborted)
)

func illegal(code asc) *sense { return &sense{key: keyIllegalRequest, code: code} }

// badCDB is INVALID FIELD IN CDB, pointing at a byte.
func badCDB(byteNo, bit int) *sense {
	return &sense{key: keyIllegalRequest, code: ascInvalidFieldCDB, field: inCDB(byteNo, bit)}
}

// badList is INVALID FIELD IN PARAMETER LIST, pointing at a byte.
func badList(byteNo int) *sense {
	return &sense{key: keyIllegalRequest, code: ascInvalidFieldParameter, field: inList(byteNo)}
}

// deviceErrors is the one table from a Device's error to sense data.
var deviceErrors = []struct {
	err  error
	key  byte
	code asc
}{
	{target.ErrNoSpace, keyDataProtect, ascSpaceAllocationFailed},
	{target.ErrReadOnly, keyDataProtect, ascWriteProtected},
	{target.ErrOverwrite, keyDataProtect, ascSoftwareWriteProtected},
	{target.ErrStandby, keyNotReady, ascStandby},
	{target.ErrTransition, keyNotReady, ascTransition},
	{target.ErrUnavailable, keyNotReady, ascUnavailable},
	{target.ErrNotReady, keyNotReady, ascBecomingReady},
	{target.ErrMediumRead, keyMediumError, ascReadError},
	{target.ErrMediumWrite, keyMediumError, ascWriteError},
	{target.ErrRange, keyIllegalRequest, ascRange},
	{target.ErrAlignment, keyIllegalRequest, ascInvalidFieldCDB},
}

// toStatus turns what a command returned into a status and, for CHECK CONDITION, sense data.
func toStatus(err error) (status byte, s *sense) {
	if err == nil {
		return StatusGood, nil
	}
	if se, ok := err.(*sense); ok {
		return StatusCheckCondition, se
	}
	if st, ok := err.(statusError); ok {
		return byte(st), nil
	}
	if errors.As(err, &s) {
		return StatusCheckCondition, s
	}
	var miss *target.MiscompareError
	if errors.As(err, &miss) {
		return StatusCheckCondition, &sense{key: keyMiscompare, code: ascMiscompare, information: miss.Offset, hasInfo: true}
	}
	for _, e := range deviceErrors {
		if errors.Is(err, e.err) {
			s = &sense{key: e.key, code: e.code}
			var medium *target.MediumError
			if e.key == keyMediumError && errors.As(err, &medium) {
				s.information, s.hasInfo = medium.LBA, true // SBC-3 4.18.1
			}
			return StatusCheckCondition, s
		}
	}
	if errors.Is(err, target.ErrBusy) {
		return StatusBusy, nil
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return StatusTaskAborted, nil
	}
	return StatusCheckCondition, &sense{key: keyHardwareError, code: ascInternal}
}

// maxSense is the longest sense data that encode makes.
const maxSense = 48

// encode appends sense data in fixed (SPC-4 4.5.3) or descriptor format (4.5.2) to b.
func (s *sense) encode(b []byte, descriptor bool) []byte {
	if !descriptor {
		var f [18]byte
		f[0] = 0x70
		f[2] = s.key
		if s.hasInfo && s.information <= 1<<32-1 {
			f[0] |= 0x80
			binary.BigEndian.PutUint32(f[3:], uint32(s.information))
		}
		f[7] = 10
		binary.BigEndian.PutUint16(f[12:], uint16(s.code))
		f[15], f[16], f[17] = byte(s.field>>16), byte(s.field>>8), byte(s.field)
		return append(b, f[:]...)
	}
	start := len(b)
	b = append(b, 0x72, s.key, byte(s.code>>8), byte(s.code), 0, 0, 0, 0)
	if s.hasInfo {
		b = append(b, 0x00, 0x0A, 0x80, 0)
		b = binary.BigEndian.AppendUint64(b, s.information)
	}
	if s.field != 0 {
		b = append(b, 0x02, 0x06, 0, 0, byte(s.field>>16), byte(s.field>>8), byte(s.field), 0)
	}
	b[start+7] = byte(len(b) - start - 8)
	return b
}
