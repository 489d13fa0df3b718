package scsi

import (
	"encoding/binary"

	"github.com/ledge-storage/ledge/target"
)

// LOG SENSE (SPC-4 6.8). The pages: supported pages (00h, and with subpages 00h/FFh), logical
// block provisioning (0Ch, where the device knows its pool), informational exceptions (2Fh).
// A temperature (0Dh) is not listed: a logical unit has none.
//
// Page: code and bits DS, SPF (1), subpage (1), length of what follows (2), parameters. Parameter:
// code (2), control (1), length (1), value.
const (
	logSupported     = 0x00
	logProvisioning  = 0x0C
	logInformational = 0x2F

	// logBinaryList is the control byte of a parameter that is a list in binary (DU 0).
	logBinaryList = 0x03

	logAvailable = 0x0001 // LBA mapping resources, in threshold sets
	logUsed      = 0x0002

	scopeDedicated, scopeShared = 0x01, 0x02
)

// thresholdSetBytes is the size of a threshold set (SBC-3 4.7.3.7), the unit in which mapping
// resources are told: 1 MiB.
const thresholdSetBytes = 1 << 20

// thresholdExponent is log2 of a threshold set in logical blocks.
func thresholdExponent(i target.Info) byte {
	if i.BlockBytes == 4096 {
		return 8
	}
	return 11
}

// thresholdSets converts bytes, rounding down, as far as the field goes.
func thresholdSets(bytes uint64) uint32 { return uint32(min(bytes/thresholdSetBytes, 1<<32-1)) }

func logSense(t *Task) error {
	if t.CDB[1]&0x01 != 0 {
		return badCDB(1, 0) // SP: nothing is saved
	}
	page, sub, pointer := t.CDB[2]&0x3F, t.CDB[3], t.be16(5)
	b := append(t.reply[:0], page, sub, 0, 0)
	if sub != 0 {
		b[0] |= 0x40 // SPF
	}
	head := len(b)
	switch {
	case page == logSupported && sub == 0:
		for _, p := range t.logPages() {
			b = append(b, p)
		}
	case page == logSupported && sub == 0xFF:
		b = append(b, logSupported, 0, logSupported, 0xFF)
		for _, p := range t.logPages()[1:] {
			b = append(b, p, 0)
		}
	case sub != 0:
		return badCDB(3, 7)
	case page == logProvisioning && t.unit.pool != nil:
		s, scope := t.unit.pool.Space(), byte(scopeDedicated)
		if s.Shared {
			scope = scopeShared
		}
		b = logResource(b, logAvailable, pointer, s.AvailableBytes, scope)
		b = logResource(b, logUsed, pointer, s.UsedBytes, scopeDedicated)
	case page == logInformational:
		if pointer == 0 {
			// No exception, and FFh: no temperature.
			b = append(b, 0, 0, logBinaryList, 4, 0, 0, 0xFF, 0)
		}
	default:
		return badCDB(2, 5)
	}
	if pointer != 0 && (page == logSupported || len(b) == head) {
		return badCDB(5, 7) // beyond the last parameter
	}
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)-head))
	t.reply = b
	return t.answer(b, t.be16(7))
}

// logPages are the pages without subpage, in order.
func (t *Task) logPages() []byte {
	if t.unit.pool == nil {
		return []byte{logSupported, logInformational}
	}
	return []byte{logSupported, logProvisioning, logInformational}
}

// logResource appends a parameter of the logical block provisioning page (SBC-3 6.4.4), unless
// the parameter pointer is beyond it.
func logResource(b []byte, code uint16, pointer, bytes uint64, scope byte) []byte {
	if uint64(code) < pointer {
		return b
	}
	b = binary.BigEndian.AppendUint16(b, code)
	b = append(b, logBinaryList, 8)
	b = binary.BigEndian.AppendUint32(b, thresholdSets(bytes))
	return append(b, scope, 0, 0, 0)
}

// checkThreshold warns every initiator when the pool falls below the unit's threshold: once, and
// again only after it was above it (SBC-3 4.7.3.7.5).
func (u *unit) checkThreshold() {
	s := u.pool.Space()
	low := s.ThresholdBytes != 0 && s.AvailableBytes < s.ThresholdBytes
	if u.low.Load() == low || u.low.Swap(low) == low {
		return
	}
	if low {
		u.attention(uaThinThreshold, nil)
	}
}
