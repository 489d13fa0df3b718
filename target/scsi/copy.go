package scsi

import (
	"bytes"
	"encoding/binary"
	"sync"
)

// EXTENDED COPY(LID1) (SPC-4 6.3), block to block, between units of this target.
//
// Parameter list:
//
//	offset size
//	0      1    list identifier
//	1      1    bits 4..3 list id usage, bit 5 STR, bits 2..0 priority
//	2      2    length of the CSCD descriptors
//	8      4    length of the segment descriptors
//	12     4    length of the inline data
//	16          CSCD descriptors, segment descriptors, inline data
//
// CSCD descriptor, 32 bytes, type E4h: byte 4 code set, 5 designator type and association,
// 7 designator length, 8 designator (20), 29 disk block length (3).
//
// Segment descriptor, 28 bytes, type 02h: byte 1 bit 1 DC, 2 length (2, always 24), 4 source,
// 6 destination, 10 blocks, 12 source LBA, 20 destination LBA.
const (
	copyHeaderBytes  = 16
	copyTargetBytes  = 32
	copySegmentBytes = 28
	maxCopyTargets   = 16
	maxCopySegments  = 64
	maxCopyBytes     = copyHeaderBytes + maxCopyTargets*copyTargetBytes + maxCopySegments*copySegmentBytes
	// maxCopySegmentBytes is what the 16 bits of a segment's length name in 4096-byte blocks.
	maxCopySegmentBytes = 0xFFFF * 4096
	copyStatuses        = 16

	copyTargetType  = 0xE4
	copySegmentType = 0x02
)

// copyStatus is what RECEIVE COPY RESULTS tells of a copy that has ended.
type copyStatus struct {
	nexus    *Nexus
	list     byte
	failed   bool
	segments uint16
	bytes    uint64
}

// copyLog keeps the last copies of a unit.
type copyLog struct {
	mu   sync.Mutex
	last [copyStatuses]copyStatus
	next int
}

func (l *copyLog) add(s copyStatus) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range l.last {
		if l.last[i].nexus == s.nexus && l.last[i].list == s.list {
			l.last[i] = s
			return
		}
	}
	l.last[l.next] = s
	l.next = (l.next + 1) % copyStatuses
}

func (l *copyLog) find(n *Nexus, list byte) (copyStatus, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.last {
		if s.nexus == n && s.list == list {
			return s, true
		}
	}
	return copyStatus{}, false
}

func decodeCopy(t *Task) error {
	t.OutTotal = int64(t.be32(10))
	if t.OutTotal > 0 && t.OutTotal < copyHeaderBytes {
		return illegal(ascParameterListLength)
	}
	if t.OutTotal > maxCopyBytes {
		return illegal(ascParameterListLength)
	}
	return nil
}

// copySegment is one segment descriptor, resolved.
type copySegment struct {
	from, to       *unit
	fromLBA, toLBA uint64
	blocks         uint64
	blockBytes     uint64
}

func extendedCopy(t *Task) error {
	if t.OutTotal == 0 {
		return nil
	}
	list, err := t.list()
	if err != nil {
		return err
	}
	usage := list[1] >> 3 & 3
	if usage == 1 || usage == 3 && list[0] != 0 {
		return badList(1)
	}
	segments, err := t.parseCopy(list)
	if err != nil {
		return err
	}
	status := copyStatus{nexus: t.Nexus, list: list[0]}
	for _, s := range segments {
		if err = t.copyOne(s); err != nil {
			status.failed = true
			break
		}
		status.segments++
		status.bytes += s.blocks * s.blockBytes
	}
	if usage != 3 {
		t.unit.copies.add(status)
	}
	return err
}

func (t *Task) parseCopy(list []byte) ([]copySegment, error) {
	targetsLen := int(binary.BigEndian.Uint16(list[2:]))
	segmentsLen := int64(binary.BigEndian.Uint32(list[8:]))
	inline := binary.BigEndian.Uint32(list[12:])
	switch {
	case targetsLen > maxCopyTargets*copyTargetBytes:
		return nil, illegal(ascTooManyTargets)
	case segmentsLen > maxCopySegments*copySegmentBytes:
		return nil, illegal(ascTooManySegments)
	case inline != 0:
		return nil, illegal(ascInlineDataLength)
	case targetsLen%copyTargetBytes != 0:
		return nil, badList(2)
	case int64(copyHeaderBytes+targetsLen)+segmentsLen > int64(len(list)):
		return nil, illegal(ascParameterListLength)
	}
	var units []*unit
	var sizes []uint32
	rest := list[copyHeaderBytes:]
	for d := rest[:targetsLen]; len(d) > 0; d = d[copyTargetBytes:] {
		u, size, err := t.copyTarget(d[:copyTargetBytes], len(list)-len(rest))
		if err != nil {
			return nil, err
		}
		units, sizes = append(units, u), append(sizes, size)
	}
	var segments []copySegment
	at := copyHeaderBytes + targetsLen
	for d := rest[targetsLen:][:segmentsLen]; len(d) > 0; d, at = d[copySegmentBytes:], at+copySegmentBytes {
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
		s := copySegment{
			from: units[from], to: units[to],
			blocks:  uint64(binary.BigEndian.Uint16(d[10:])),
			fromLBA: binary.BigEndian.Uint64(d[12:]), toLBA: binary.BigEndian.Uint64(d[20:]),
			blockBytes: uint64(sizes[from]),
		}
		if sizes[from] != sizes[to] {
			return nil, badList(at + 4)
		}
		segments = append(segments, s)
	}
	return segments, nil
}

// copyTarget finds the unit that a CSCD descriptor names by one of its designators.
func (t *Task) copyTarget(d []byte, at int) (*unit, uint32, error) {
	if d[0] != copyTargetType {
		return nil, 0, illegal(ascUnsupportedTarget)
	}
	// LU ID TYPE is not looked at: the designator below says it all, and libiscsi's suite sends
	// reserved values that it wants served.
	if d[1]&0x1F != 0 {
		return nil, 0, illegal(ascUnsupportedTarget) // no disk
	}
	if d[1]&0x20 != 0 { // NUL: stands for no unit
		return nil, 0, &sense{key: keyCopyAborted, code: ascCopyTargetUnreachable}
	}
	n := int(d[7])
	if n > 20 {
		return nil, 0, badList(at + 7)
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
			return nil, 0, badList(at + 29)
		}
		return u, info.BlockBytes, nil
	}
	return nil, 0, &sense{key: keyCopyAborted, code: ascCopyTargetUnreachable}
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

// copyOne copies a segment, a piece at a time. Where the ranges overlap upwards it begins at the end.
func (t *Task) copyOne(s copySegment) error {
	for _, end := range []struct {
		u   *unit
		lba uint64
		op  opFlags
	}{{s.from, s.fromLBA, opReads}, {s.to, s.toLBA, opWrites}} {
		info := end.u.dev.Info()
		if end.lba > info.Blocks || s.blocks > info.Blocks-end.lba {
			return &sense{key: keyCopyAborted, code: ascNone}
		}
		if end.op == opWrites && (info.ReadOnly || end.u.mode.Load()&modeWriteProtect != 0) {
			return &sense{key: keyDataProtect, code: ascWriteProtected}
		}
		end.u.mu.Lock()
		err := end.u.pr.check(t.Nexus, end.op)
		if h := end.u.reserved; h != nil && h != t.Nexus {
			err = errReservationConflict
		}
		end.u.mu.Unlock()
		if err != nil {
			return err
		}
	}
	for _, u := range []*unit{s.from, s.to} {
		if u == t.unit {
			continue // is waited for as its task
		}
		if err := u.visit(); err != nil {
			return err
		}
		defer u.leaveVisit()
	}
	b := GetBuffer(MaxBuffer)
	defer b.Release()
	step := uint64(len(b.B)) / s.blockBytes
	backwards := s.from == s.to && s.toLBA > s.fromLBA
	for done := uint64(0); done < s.blocks; {
		n := min(step, s.blocks-done)
		at := done
		if backwards {
			at = s.blocks - done - n
		}
		v := [][]byte{b.B[:n*s.blockBytes]}
		if err := s.from.dev.Read(t.ctx, s.fromLBA+at, v); err != nil {
			return err
		}
		if err := s.to.dev.Write(t.ctx, s.toLBA+at, v, false); err != nil {
			return err
		}
		if t.aborted.Load() {
			return errAborted
		}
		done += n
	}
	return nil
}

// RECEIVE COPY RESULTS (SPC-4 6.18 and 6.19).

func copyParameters(t *Task) error {
	b := append(t.reply[:0], make([]byte, 44)...)
	b[4] = 1 // SNLID
	binary.BigEndian.PutUint16(b[8:], maxCopyTargets)
	binary.BigEndian.PutUint16(b[10:], maxCopySegments)
	binary.BigEndian.PutUint32(b[12:], maxCopyBytes-copyHeaderBytes)
	binary.BigEndian.PutUint32(b[16:], maxCopySegmentBytes)
	binary.BigEndian.PutUint16(b[34:], 0xFFFF) // concurrent copies
	b[36] = 0xFF
	b[37] = 9 // granularity of a segment: 512 bytes
	b[43] = 2
	b = append(b, copySegmentType, copyTargetType)
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	t.reply = b
	return t.answer(b, t.be32(10))
}

func copyResult(t *Task) error {
	s, ok := t.unit.copies.find(t.Nexus, t.CDB[2])
	if !ok {
		return badCDB(2, 7)
	}
	b := append(t.reply[:0], 0, 0, 0, 8, 0x01, 0, 0, 0)
	if s.failed {
		b[4] = 0x02
	}
	binary.BigEndian.PutUint16(b[5:], s.segments)
	b[7] = 0 // in bytes
	b = binary.BigEndian.AppendUint32(b, uint32(min(s.bytes, 1<<32-1)))
	t.reply = b
	return t.answer(b, t.be32(10))
}

// thirdPartyCopyPage appends the body of the third-party copy page (SPC-4 7.8.17).
func thirdPartyCopyPage(b []byte) []byte {
	one := func(kind uint16, body []byte) {
		for len(body)%4 != 0 {
			body = append(body, 0)
		}
		b = binary.BigEndian.AppendUint16(b, kind)
		b = binary.BigEndian.AppendUint16(b, uint16(len(body)))
		b = append(b, body...)
	}
	one(0x0001, []byte{7, 0x83, 1, 0x00, 0x84, 2, 0x00, 0x03}) // supported commands
	p := make([]byte, 28)                                      // parameter data
	binary.BigEndian.PutUint16(p[4:], maxCopyTargets)
	binary.BigEndian.PutUint16(p[6:], maxCopySegments)
	binary.BigEndian.PutUint32(p[8:], maxCopyBytes-copyHeaderBytes)
	one(0x0004, p)
	one(0x0008, []byte{2, copySegmentType, copyTargetType}) // supported descriptors
	one(0x000C, []byte{0, 0})                               // supported CSCD ids: none but those of the list
	g := make([]byte, 32)                                   // general copy operations
	binary.BigEndian.PutUint32(g, 0xFFFF)
	binary.BigEndian.PutUint32(g[4:], 0xFF)
	binary.BigEndian.PutUint32(g[8:], maxCopySegmentBytes)
	g[12] = 9
	one(0x8001, g)
	return b
}
