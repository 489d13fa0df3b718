package scsi

import (
	"bytes"
	"encoding/binary"
)

// EXTENDED COPY (SPC-4 6.4, 6.5), block to block, between units of this target, LID1 and LID4.
//
// Parameter list of LID1:
//
//	offset size
//	0      1    list identifier
//	1      1    bits 4..3 list id usage, bit 5 STR, bits 2..0 priority
//	2      2    length of the CSCD descriptors
//	8      4    length of the segment descriptors
//	12     4    length of the inline data
//	16          CSCD descriptors, segment descriptors, inline data
//
// Parameter list of LID4:
//
//	0      1    format: 1
//	1      1    as of LID1
//	2      2    length of the header CSCD descriptor: 32
//	15     1    bit 1 G_SENSE, bit 0 IMMED
//	16     1    type of the header CSCD descriptor: FFh
//	20     4    list identifier
//	42     2    length of the CSCD descriptors
//	44     2    length of the segment descriptors
//	46     2    length of the inline data
//	48          CSCD descriptors, segment descriptors, inline data
//
// CSCD descriptor, 32 bytes, type E4h: byte 4 code set, 5 designator type and association,
// 7 designator length, 8 designator (20), 29 disk block length (3).
//
// Segment descriptor, 28 bytes, type 02h: byte 1 bit 1 DC, 2 length (2, always 24), 4 source,
// 6 destination, 10 blocks, 12 source LBA, 20 destination LBA.
const (
	copyHeaderBytes    = 16
	copyHeader4Bytes   = 48
	copyTargetBytes    = 32
	copySegmentBytes   = 28
	maxCopyTargets     = 16
	maxCopySegments    = 64
	maxCopyDescriptors = maxCopyTargets*copyTargetBytes + maxCopySegments*copySegmentBytes
	// maxCopySegmentBytes is what the 16 bits of a segment's length name in 4096-byte blocks.
	maxCopySegmentBytes = 0xFFFF * 4096

	copyTargetType  = 0xE4
	copySegmentType = 0x02

	actionCopy1    = 0x00
	actionCopy4    = 0x01
	actionPopulate = 0x10
	actionUseToken = 0x11
	actionAbort    = 0x1C

	// Values of LIST ID USAGE (SPC-4 table 150).
	usageHold, usageReserved, usageNone = 0, 1, 3
)

func decodeCopy(t *Task) error {
	header := int64(copyHeaderBytes)
	if t.CDB[1]&0x1F == actionCopy4 {
		header = copyHeader4Bytes
	}
	t.OutTotal = int64(t.be32(10))
	if t.OutTotal > 0 && t.OutTotal < header || t.OutTotal > header+maxCopyDescriptors {
		return illegal(ascParameterListLength)
	}
	return nil
}

// copySegment is one segment descriptor, resolved.
type copySegment struct {
	from, to extent
	blocks   uint64
}

// copyList is a parameter list in the form that LID1 and LID4 share.
type copyList struct {
	whole             []byte
	header            int
	targets, segments int // bytes
	inline            uint32
	usage             byte
	list              uint32
	immed             bool
	targetsAt         int // of the field, for field pointers
}

func extendedCopy1(t *Task) error {
	return t.extendedCopy(func(b []byte) (copyList, error) {
		return copyList{
			whole: b, header: copyHeaderBytes, list: uint32(b[0]), usage: b[1] >> 3 & 3,
			targets: int(binary.BigEndian.Uint16(b[2:])), targetsAt: 2,
			segments: int(min(binary.BigEndian.Uint32(b[8:]), 1<<30)), inline: binary.BigEndian.Uint32(b[12:]),
		}, nil
	})
}

func extendedCopy4(t *Task) error {
	return t.extendedCopy(func(b []byte) (copyList, error) {
		switch {
		case b[0] != 1:
			return copyList{}, badList(0)
		case binary.BigEndian.Uint16(b[2:]) != 32:
			return copyList{}, badList(2)
		case b[16] != 0xFF:
			return copyList{}, badList(16)
		}
		return copyList{
			whole: b, header: copyHeader4Bytes, list: binary.BigEndian.Uint32(b[20:]), usage: b[1] >> 3 & 3,
			targets: int(binary.BigEndian.Uint16(b[42:])), targetsAt: 42,
			segments: int(binary.BigEndian.Uint16(b[44:])), inline: uint32(binary.BigEndian.Uint16(b[46:])),
			immed: b[15]&1 != 0,
		}, nil
	})
}

func (t *Task) extendedCopy(header func([]byte) (copyList, error)) error {
	if t.OutTotal == 0 {
		return nil
	}
	list, err := t.list()
	if err != nil {
		return err
	}
	l, err := header(list)
	if err != nil {
		return err
	}
	if l.usage == usageReserved || l.usage == usageNone && (l.list != 0 || l.immed) {
		return badList(1)
	}
	segments, err := t.parseCopy(l)
	if err != nil {
		return err
	}
	o := &copyOp{list: l.list, listed: l.usage != usageNone, action: t.CDB[1] & 0x1F, background: l.immed}
	return t.operate(o, func(o *copyOp) error {
		for _, s := range segments {
			if err := o.transfer(s.from, s.to, s.blocks, nil); err != nil {
				return err
			}
			o.segmentDone()
		}
		return nil
	})
}

func (t *Task) parseCopy(l copyList) ([]copySegment, error) {
	switch {
	case l.targets > maxCopyTargets*copyTargetBytes:
		return nil, illegal(ascTooManyTargets)
	case l.segments > maxCopySegments*copySegmentBytes:
		return nil, illegal(ascTooManySegments)
	case l.inline != 0:
		return nil, illegal(ascInlineDataLength)
	case l.targets%copyTargetBytes != 0:
		return nil, badList(l.targetsAt)
	case l.header+l.targets+l.segments > len(l.whole):
		return nil, illegal(ascParameterListLength)
	}
	var units []*unit
	at := l.header
	for ; at < l.header+l.targets; at += copyTargetBytes {
		u, err := t.copyTarget(l.whole[at:][:copyTargetBytes], at)
		if err != nil {
			return nil, err
		}
		units = append(units, u)
	}
	var segments []copySegment
	for d := l.whole[at:][:l.segments]; len(d) > 0; d, at = d[copySegmentBytes:], at+copySegmentBytes {
		if d[0] != copySegmentType {
			return nil, illegal(ascUnsupportedSegment)
		}
		if len(d) < copySegmentBytes {
			return nil, illegal(ascParameterListLength)
		}
		if binary.BigEndian.Uint16(d[2:]) != copySegmentBytes-4 {
			return nil, badList(at + 2)
		}
		from, to := int(binary.BigEndian.Uint16(d[4:])), int(binary.BigEndian.Uint16(d[6:]))
		if from >= len(units) || to >= len(units) {
			return nil, &sense{key: keyCopyAborted, code: ascCopyTargetUnreachable}
		}
		if units[from].dev.Info().BlockBytes != units[to].dev.Info().BlockBytes {
			return nil, badList(at + 4)
		}
		segments = append(segments, copySegment{
			from:   extent{units[from], binary.BigEndian.Uint64(d[12:])},
			to:     extent{units[to], binary.BigEndian.Uint64(d[20:])},
			blocks: uint64(binary.BigEndian.Uint16(d[10:])),
		})
	}
	return segments, nil
}

// copyTarget finds the unit that a CSCD descriptor names by one of its designators.
func (t *Task) copyTarget(d []byte, at int) (*unit, error) {
	if d[0] != copyTargetType {
		return nil, illegal(ascUnsupportedTarget)
	}
	// LU ID TYPE is not looked at: the designator below says it all, and libiscsi's suite sends
	// reserved values that it wants served.
	if d[1]&0x1F != 0 {
		return nil, illegal(ascUnsupportedTarget) // no disk
	}
	if d[1]&0x20 != 0 { // NUL: stands for no unit
		return nil, &sense{key: keyCopyAborted, code: ascCopyTargetUnreachable}
	}
	n := int(d[7])
	if n > 20 {
		return nil, badList(at + 7)
	}
	id := d[8 : 8+n]
	for lun := range *t.Nexus.Target.units.Load() {
		u, _ := t.Nexus.unit(lun)
		if u == nil {
			continue
		}
		info := u.dev.Info()
		if !isDesignator(info.UUID, naa(info), append(padded(nil, info.Vendor, defaultVendor, 8), serial(info)...), d[5]&0x0F, id) {
			continue
		}
		if size := uint32(d[29])<<16 | uint32(binary.BigEndian.Uint16(d[30:])); size != 0 && size != info.BlockBytes {
			return nil, badList(at + 29)
		}
		return u, nil
	}
	return nil, &sense{key: keyCopyAborted, code: ascCopyTargetUnreachable}
}

func isDesignator(uuid, naa [16]byte, vendor []byte, kind byte, id []byte) bool {
	switch kind {
	case 1:
		return bytes.Equal(id, vendor[:min(len(vendor), 20)])
	case 2:
		return bytes.Equal(id, uuid[:])
	case 3:
		return bytes.Equal(id, naa[:])
	case 0xA:
		return len(id) == 18 && bytes.Equal(id[2:], uuid[:])
	}
	return false
}
