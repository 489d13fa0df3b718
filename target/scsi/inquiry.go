package scsi

import (
	"encoding/binary"
	"encoding/hex"
	"strconv"

	"github.com/ledge-storage/ledge/target"
)

// What a unit says of itself where its device says nothing.
const (
	defaultVendor   = "LEDGE"
	defaultProduct  = "VIRTUAL DISK"
	defaultRevision = "0001"
)

// inquiry is INQUIRY (SPC-4 6.6).
func inquiry(t *Task) error {
	vital, page, allocation := t.CDB[1]&1 != 0, t.CDB[2], t.be16(3)
	if !vital && page != 0 {
		return badCDB(2, 7)
	}
	if t.unit == nil {
		if vital {
			return badCDB(2, 7)
		}
		// Peripheral qualifier 3: no device can be here.
		b := make([]byte, 36)
		b[0], b[2], b[3], b[4] = 0x7F, 0x06, 0x02, 31
		return t.answer(b, allocation)
	}
	var b []byte
	if vital {
		if b = t.vital(page); b == nil {
			return badCDB(2, 7)
		}
	} else {
		b = t.standardInquiry()
	}
	t.reply = b
	return t.answer(b, allocation)
}

// padded appends s in exactly n bytes, filled up with spaces.
func padded(b []byte, s, fallback string, n int) []byte {
	if s == "" {
		s = fallback
	}
	for i := range n {
		c := byte(' ')
		if i < len(s) && s[i] >= 0x20 && s[i] < 0x7F {
			c = s[i]
		}
		b = append(b, c)
	}
	return b
}

func (t *Task) standardInquiry() []byte {
	b := append(t.reply[:0],
		0x00,       // direct access block device
		0x00,       // not removable
		0x06,       // SPC-4
		0x12,       // HISUP, response data format 2
		0,          // additional length
		0x18,       // implicit ALUA (TPGS 01), third party copy
		0x00, 0x02) // command queuing
	if t.Nexus.Target.opts.SetPortGroups != nil {
		b[5] |= 0x20 // explicit too (TPGS 11)
	}
	if t.Nexus.Target.ports() > 1 {
		b[6] |= 0x10 // MULTIP
	}
	b = padded(b, t.info.Vendor, defaultVendor, 8)
	b = padded(b, t.info.Product, defaultProduct, 16)
	b = padded(b, t.info.Revision, defaultRevision, 4)
	b = append(b, make([]byte, 22)...)
	// SAM-5, iSCSI, SPC-4, SBC-3.
	for _, v := range [8]uint16{0x00A0, 0x0960, 0x0460, 0x04C0} {
		b = binary.BigEndian.AppendUint16(b, v)
	}
	b = append(b, make([]byte, 22)...)
	b[4] = byte(len(b) - 5)
	return b
}

// vitalPages are the vital product data pages, in order.
var vitalPages = []byte{0x00, 0x80, 0x83, 0x86, 0x87, 0x88, 0x8F, 0xB0, 0xB1, 0xB2}

// vital returns a vital product data page with its header, or nil.
func (t *Task) vital(page byte) []byte {
	b := append(t.reply[:0], 0, page, 0, 0)
	switch page {
	case 0x00:
		for _, p := range vitalPages {
			if p == 0xB2 && !t.info.Thin {
				continue
			}
			b = append(b, p)
		}
	case 0x80:
		b = append(b, serial(t.info)...)
	case 0x83:
		b = t.identification(b)
	case 0x86:
		b = t.extendedInquiry(b)
	case 0x87: // mode page policy: every page, shared
		b = append(b, 0x3F, 0xFF, 0x00, 0x00)
	case 0x88:
		b = t.scsiPorts(b)
	case 0x8F:
		b = t.thirdPartyCopyPage(b)
	case 0xB0:
		b = t.blockLimits(b)
	case 0xB1:
		b = append(b, make([]byte, 60)...)
		b[5] = 1 // non-rotating
		if t.unit.allowSanitize {
			b[7] = 0x40 // WABEREQ 01b: after BLOCK ERASE blocks can be read
			if t.unit.eraser != nil {
				b[7] |= 0x10 // WACEREQ 01b: after CRYPTOGRAPHIC ERASE too
			}
		}
	case 0xB2:
		if !t.info.Thin {
			return nil
		}
		// LBPU, LBPWS, LBPWS10, LBPRZ; thin.
		exponent := byte(0)
		if t.unit.pool != nil {
			exponent = thresholdExponent(t.info)
		}
		b = append(b, exponent, 0x80|0x40|0x20|0x04, 0x02, 0)
	default:
		return nil
	}
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)-4))
	return b
}

// extendedInquiry is the extended INQUIRY data page (SPC-4 7.8.7). Fields that stay zero, and why:
// protection information is not kept (SPT, GRD_CHK, APP_CHK, REF_CHK, P_I_I_SUP); there is no microcode
// that an initiator could load (ACTIVATE MICROCODE, POA_SUP, HRA_SUP, VSA_SUP); no correction or write
// uncorrectable function (CRD_SUP, WU_SUP); V_SUP and NV_SUP, as no cache shows: what was acknowledged
// is durable; the default self-test is the only one, so that no long one has a time (EXTENDED SELF-TEST
// COMPLETION MINUTES).
func (t *Task) extendedInquiry(b []byte) []byte {
	b = append(b, make([]byte, 60)...)
	b[5] = 0x07 // SIMPSUP, ORDSUP, HEADSUP
	b[7] = 0x01 // LUICLR: REPORT LUNS clears its attention in all units
	b[13] = maxSense
	return b
}

// serial is the unit serial number: the device's, else its UUID.
func serial(i target.Info) []byte {
	if i.Serial != "" {
		return []byte(i.Serial)[:min(len(i.Serial), 252)]
	}
	return []byte(hex.EncodeToString(i.UUID[:]))
}

// naa is the NAA designator of the unit: IEEE registered extended in form, its remaining 124
// bits those of the UUID.
func naa(i target.Info) (id [16]byte) {
	id = i.UUID
	id[0] = 0x60 | id[0]&0x0F
	return id
}

// identification is the device identification page (SPC-4 7.8.6): the unit by NAA, EUI-64, T10
// vendor and UUID; the port by group, relative identifier and name; the target by name.
func (t *Task) identification(b []byte) []byte {
	const unit, port, device = 0x00, 0x10, 0x20
	id := naa(t.info)
	b = designator(b, 1, unit|3, id[:])
	b = designator(b, 1, unit|2, t.info.UUID[:])
	b = designator(b, 2, unit|1, append(padded(nil, t.info.Vendor, defaultVendor, 8), serial(t.info)...))
	b = designator(b, 1, unit|0xA, append([]byte{0x10, 0}, t.info.UUID[:]...))
	rp, tpg := t.Nexus.RelativePort, t.Nexus.Target.group(t.Nexus.RelativePort)
	b = designator(b, 0x51, 0x80|port|4, []byte{0, 0, byte(rp >> 8), byte(rp)})
	b = designator(b, 0x51, 0x80|port|5, []byte{0, 0, byte(tpg >> 8), byte(tpg)})
	b = designator(b, 0x53, 0x80|port|8, nameString(portName(t.Nexus.Target.name, tpg)))
	b = designator(b, 0x53, 0x80|device|8, nameString(t.Nexus.Target.name))
	return b
}

func portName(name string, group uint16) string {
	return name + ",t,0x" + hex4(group)
}

func hex4(v uint16) string {
	s := strconv.FormatUint(uint64(v), 16)
	return "0000"[:4-len(s)] + s
}

// nameString is a SCSI name string: null-terminated, a multiple of four long.
func nameString(s string) []byte {
	b := append([]byte(s), 0)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func designator(b []byte, protocolAndSet, kind byte, id []byte) []byte {
	id = id[:min(len(id), 255)]
	b = append(b, protocolAndSet, kind, 0, byte(len(id)))
	return append(b, id...)
}

// scsiPorts is the SCSI ports page (SPC-4 7.8.14): every port of every group.
func (t *Task) scsiPorts(b []byte) []byte {
	one := func(rp, group uint16) {
		b = append(b, 0, 0, byte(rp>>8), byte(rp), 0, 0, 0, 0, 0, 0)
		start := len(b)
		b = append(b, 0, 0)
		b = designator(b, 0x53, 0x98, nameString(portName(t.Nexus.Target.name, group)))
		binary.BigEndian.PutUint16(b[start:], uint16(len(b)-start-2))
	}
	groups := t.Nexus.Target.PortGroups()
	if len(groups) == 0 {
		one(t.Nexus.RelativePort, 1)
	}
	for _, g := range groups {
		for _, rp := range g.Ports {
			one(rp, g.ID)
		}
	}
	return b
}

// blockLimits is the block limits page (SBC-3 6.6.4).
func (t *Task) blockLimits(b []byte) []byte {
	start := len(b) - 4
	b = append(b, make([]byte, 60)...)
	p := b[start:]
	bs := t.info.BlockBytes
	p[5] = maxCompareBlocks // MAXIMUM COMPARE AND WRITE LENGTH
	optimal := t.info.OptimalBlocks
	if optimal == 0 {
		optimal = 128 << 10 / bs
	}
	physical := uint16(1) << (t.info.PhysicalExponent & 15)
	binary.BigEndian.PutUint16(p[6:], physical)
	binary.BigEndian.PutUint32(p[8:], uint32(t.maxTransferBlocks()))
	binary.BigEndian.PutUint32(p[12:], optimal)
	binary.BigEndian.PutUint32(p[16:], 0) // MAXIMUM PREFETCH LENGTH
	if t.info.Thin {
		binary.BigEndian.PutUint32(p[20:], maxUnmapBlocks)
		binary.BigEndian.PutUint32(p[24:], maxUnmapDescriptors)
		binary.BigEndian.PutUint32(p[28:], max(t.info.UnmapGranularityBlocks, 1))
		p[32] = 0x80 // alignment 0, valid
	}
	binary.BigEndian.PutUint64(p[36:], maxWriteSameBlocks(t.info))
	// Atomic writes (SBC-4 6.6.4). MAXIMUM ATOMIC TRANSFER LENGTH WITH ATOMIC BOUNDARY and MAXIMUM ATOMIC
	// BOUNDARY SIZE stay zero: a write is atomic as a whole.
	binary.BigEndian.PutUint32(p[44:], uint32(t.atomicBlocks()))
	binary.BigEndian.PutUint32(p[48:], t.info.AtomicAlignmentBlocks)
	binary.BigEndian.PutUint32(p[52:], t.info.AtomicGranularityBlocks)
	return b
}
