package scsi

import "encoding/binary"

// The commands that ask for the state of a copy: RECEIVE COPY STATUS, RECEIVE COPY DATA, RECEIVE COPY
// FAILURE DETAILS, RECEIVE COPY OPERATING PARAMETERS (SPC-4 6.21 to 6.26), RECEIVE ROD TOKEN INFORMATION.

// copyParameters is RECEIVE COPY OPERATING PARAMETERS (SPC-4 6.22).
func copyParameters(t *Task) error {
	b := append(t.reply[:0], make([]byte, 44)...)
	b[4] = 1 // SNLID
	binary.BigEndian.PutUint16(b[8:], maxCopyTargets)
	binary.BigEndian.PutUint16(b[10:], maxCopySegments)
	binary.BigEndian.PutUint32(b[12:], maxCopyDescriptors)
	binary.BigEndian.PutUint32(b[16:], maxCopySegmentBytes)
	binary.BigEndian.PutUint16(b[34:], maxCopyOps) // concurrent copies
	b[36] = maxCopyOps
	b[37] = 9 // granularity of a segment: 512 bytes
	b[43] = 2
	b = append(b, copySegmentType, copyTargetType)
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	t.reply = b
	return t.answer(b, t.be32(10))
}

// copyStatus1 is RECEIVE COPY STATUS(LID1) (SPC-4 6.25): status (1), segments (2), units (1), count (4).
func copyStatus1(t *Task) error {
	o := t.unit.copies.find(t.Nexus, uint32(t.CDB[2]))
	if o == nil {
		return badCDB(2, 7)
	}
	o.mu.Lock()
	status, segments, count, units := o.status, o.segments, o.count, o.units
	o.mu.Unlock()
	switch {
	case status == copyForeground || status == copyBackground:
		status = 0
	case status != copyDone:
		status = copyFailed
	}
	if units == countBytes && count > 1<<32-1 {
		units, count = countKBytes, count>>10
	}
	b := append(t.reply[:0], 0, 0, 0, 8, status, byte(segments>>8), byte(segments), units)
	b = binary.BigEndian.AppendUint32(b, uint32(min(count, 1<<32-1)))
	t.reply = b
	return t.answer(b, t.be32(10))
}

// copyFailure is RECEIVE COPY FAILURE DETAILS(LID1) (SPC-4 6.23): the status at byte 56, the sense data
// of a copy that failed from byte 58 on. What is told is forgotten.
func copyFailure(t *Task) error {
	o := t.unit.copies.find(t.Nexus, uint32(t.CDB[2]))
	if o == nil || o.running() {
		return badCDB(2, 7)
	}
	o.mu.Lock()
	status, sense := o.status, o.sense
	o.mu.Unlock()
	if status == copyDone || status == copyPartial {
		return badCDB(2, 7) // no details of a failure
	}
	b := append(t.reply[:0], make([]byte, 60)...)
	b[56] = copyFailed
	binary.BigEndian.PutUint16(b[58:], uint16(len(sense)))
	b = append(b, sense...)
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	t.reply = b
	t.unit.copies.drop(func(x *copyOp) bool { return x == o })
	return t.answer(b, t.be32(10))
}

// status4 appends what the LID4 commands share (SPC-4 table 198):
//
//	offset size
//	0      4    length of what follows
//	4      1    service action that is reported on
//	5      1    COPY OPERATION STATUS
//	6      2    OPERATION COUNTER
//	8      4    milliseconds until asking again makes sense
//	12     1    EXTENDED COPY COMPLETION STATUS: the status of the command
//	13     1    length of the sense data field
//	14     1    length of the sense data
//	15     1    units of the count
//	16     8    TRANSFER COUNT
//	24     2    segments
//	32          sense data
func (t *Task) status4() ([]byte, *copyOp, error) {
	o := t.unit.copies.find(t.Nexus, uint32(t.be32(2)))
	if o == nil {
		return nil, nil, badCDB(2, 7)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	b := append(t.reply[:0], make([]byte, 32)...)
	b[4], b[5] = o.action, o.status
	binary.BigEndian.PutUint16(b[6:], o.steps)
	if o.status == copyForeground || o.status == copyBackground {
		binary.BigEndian.PutUint32(b[8:], copyPollMillis)
	} else if len(o.sense) > 0 {
		b[12] = StatusCheckCondition
	}
	b[13], b[14], b[15] = byte(len(o.sense)), byte(len(o.sense)), o.units
	binary.BigEndian.PutUint64(b[16:], o.count)
	binary.BigEndian.PutUint16(b[24:], o.segments)
	return append(b, o.sense...), o, nil
}

const copyPollMillis = 100

func (t *Task) answerStatus4(b []byte) error {
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	t.reply = b
	return t.answer(b, t.be32(10))
}

// copyStatus4 is RECEIVE COPY STATUS(LID4) (SPC-4 6.26).
func copyStatus4(t *Task) error {
	b, _, err := t.status4()
	if err != nil {
		return err
	}
	return t.answerStatus4(b)
}

// copyData4 is RECEIVE COPY DATA(LID4) (SPC-4 6.21): no segment type that is served holds data, so
// that the length of the held data is always zero.
func copyData4(t *Task) error {
	b, _, err := t.status4()
	if err != nil {
		return err
	}
	return t.answerStatus4(append(b, 0, 0, 0, 0))
}

// rodTokenInformation is RECEIVE ROD TOKEN INFORMATION (SPC-4 6.27, SBC-3 5.20): the status, then the
// length of the descriptors (4) and, of POPULATE TOKEN, one: reserved (2), token (512).
func rodTokenInformation(t *Task) error {
	b, o, err := t.status4()
	if err != nil {
		return err
	}
	o.mu.Lock()
	token := o.token
	o.mu.Unlock()
	if token == nil {
		return t.answerStatus4(append(b, 0, 0, 0, 0))
	}
	b = binary.BigEndian.AppendUint32(b, 2+tokenBytes)
	b = append(b, 0, 0)
	return t.answerStatus4(append(b, token...))
}
