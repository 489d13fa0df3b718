package scsi

import (
	"bytes"
	"encoding/binary"
)

// FORMAT UNIT (SBC-3 5.4): every block is unmapped or zeroed, or holds the initialization pattern
// afterwards. There is no other format to choose (the block size is the device's, protection information
// is not kept) and no defect that an initiator could name. It runs as SANITIZE does: in progress, commands
// get NOT READY, FORMAT IN PROGRESS, and REQUEST SENSE tells how far it is; failed, MEDIUM FORMAT CORRUPTED,
// until a FORMAT UNIT or SANITIZE succeeds.
//
// Parameter list, with FMTDATA only. The header is short, or long with LONGLIST:
//
//	offset size (short, long)
//	0      0    1    bits 2..0 protection field usage
//	1      1    1    bits 7 FOV, 6 DPRY, 5 DCRT, 4 STPF, 3 IP, 1 IMMED
//	-      3    1    bits 7..4 P_I_INFORMATION, 3..0 protection interval exponent
//	2      4    2,4  length of the defect list
//	            with IP: bit 5 SI (1), type (1), length (2), pattern
const (
	formatCode        = 0x04
	formatShortHeader = 4
	formatLongHeader  = 8
	formatPatternHead = 4

	formatData, formatLong = 0x10, 0x20 // of byte 1 of the CDB
)

func decodeFormat(t *Task) error {
	if err := t.checkWritable(); err != nil {
		return err
	}
	if t.CDB[1]&formatData == 0 {
		if t.CDB[1]&^byte(0x07) != 0 {
			return badCDB(1, 5) // CMPLST and LONGLIST are of a list that is not there
		}
		return nil
	}
	// The CDB does not say how long the list is; the initiator offers what it has.
	header := int64(formatShortHeader)
	if t.CDB[1]&formatLong != 0 {
		header = formatLongHeader
	}
	if t.OutLimit < header {
		return illegal(ascParameterListLength)
	}
	t.OutTotal = min(t.OutLimit, header+formatPatternHead+int64(t.info.BlockBytes))
	return nil
}

// formatUnit is FORMAT UNIT. DPRY, DCRT and STPF are of a certification that there is none of.
func formatUnit(t *Task) error {
	s := &sanitize{format: true, passes: [][]byte{nil}}
	if t.OutTotal == 0 {
		return t.startSanitize(s, false)
	}
	list, err := t.list()
	if err != nil {
		return err
	}
	const fov, certify, pattern, immed = 0x80, 0x70, 0x08, 0x02
	header, defects := formatShortHeader, uint32(binary.BigEndian.Uint16(list[2:]))
	if t.CDB[1]&formatLong != 0 {
		header, defects = formatLongHeader, binary.BigEndian.Uint32(list[4:])
		if list[3] != 0 {
			return badList(3)
		}
	}
	switch flags := list[1]; {
	case list[0]&0x07 != 0:
		return badList(0) // no protection information
	case flags&fov == 0 && flags&(certify|pattern) != 0:
		return badList(1)
	case defects != 0:
		return badList(header - 1)
	case flags&pattern != 0:
		if s.passes[0], err = t.initialization(list, header); err != nil {
			return err
		}
	}
	return t.startSanitize(s, list[1]&immed != 0)
}

// initialization returns the block that an initialization pattern descriptor makes; nil: zeros.
func (t *Task) initialization(list []byte, at int) ([]byte, error) {
	if len(list) < at+formatPatternHead {
		return nil, illegal(ascParameterListLength)
	}
	d := list[at:]
	n, size := int(binary.BigEndian.Uint16(d[2:])), int(t.info.BlockBytes)
	switch {
	case d[0] != 0: // SI: all that was ever here; SANITIZE does that
		return nil, badList(at)
	case d[1] > 1:
		return nil, badList(at + 1)
	case (d[1] == 0) != (n == 0) || n > size:
		return nil, badList(at + 2)
	case len(d) < formatPatternHead+n:
		return nil, illegal(ascParameterListLength)
	case n == 0:
		return nil, nil
	}
	return bytes.Repeat(d[formatPatternHead:][:n], (size+n-1)/n)[:size], nil
}
