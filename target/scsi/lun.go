package scsi

import (
	"encoding/binary"
	"slices"
)

// DecodeLUN takes the eight bytes of a logical unit number apart (SAM-5 4.7): single-level
// peripheral, flat and extended flat addressing.
func DecodeLUN(wire uint64) (lun uint64, ok bool) {
	if wire&0xFFFFFFFF_FFFF != 0 && wire>>62 != 3 {
		return 0, false // a second level
	}
	switch wire >> 62 {
	case 0: // peripheral: bus 0
		return wire >> 48 & 0xFF, wire>>56&0x3F == 0
	case 1: // flat
		return wire >> 48 & 0x3FFF, true
	case 3: // extended flat, two bytes more: D2
		if wire>>56 == 0xD2 && wire&0xFFFFFFFF == 0 {
			return wire >> 32 & 0xFFFFFF, true
		}
	}
	return 0, false
}

// EncodeLUN is the form in which REPORT LUNS names a unit.
func EncodeLUN(lun uint64) uint64 {
	if lun < 256 {
		return lun << 48
	}
	return lun<<48 | 1<<62
}

// reportLUNs is REPORT LUNS (SPC-4 6.33). Only the units that the nexus sees are named.
func reportLUNs(t *Task) error {
	selectReport, allocation := t.CDB[2], t.be32(6)
	if allocation < 16 {
		return badCDB(6, 7)
	}
	var luns []uint64
	switch selectReport {
	case 0x00, 0x02, 0x11:
		for n := range *t.Nexus.Target.units.Load() {
			if u, i := t.Nexus.unit(n); u != nil {
				luns = append(luns, n)
				i.drop(uaLUNsChanged)
			}
		}
	case 0x01, 0x10, 0x12: // well-known and administrative units: none
	default:
		return badCDB(2, 7)
	}
	slices.Sort(luns)
	b := binary.BigEndian.AppendUint32(t.reply[:0], uint32(len(luns)*8))
	b = append(b, 0, 0, 0, 0)
	for _, n := range luns {
		b = binary.BigEndian.AppendUint64(b, EncodeLUN(n))
	}
	t.reply = b
	return t.answer(b, allocation)
}
