package scsi

import "encoding/binary"

// reportOperationCodes is REPORT SUPPORTED OPERATION CODES (SPC-4 6.35).
func reportOperationCodes(t *Task) error {
	options, code, action, allocation := t.CDB[2]&7, t.CDB[3], int(t.be16(4)), t.be32(6)
	timeouts := t.CDB[2]&0x80 != 0
	x := t.Nexus.Target.ops
	b := t.reply[:0]
	switch options {
	case 0:
		b = append(b, 0, 0, 0, 0)
		for i := range x.ops {
			if !t.offers(&x.ops[i]) {
				continue
			}
			b = appendCommand(b, &x.ops[i], timeouts)
		}
		binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	case 1, 2, 3:
		var o *op
		switch {
		case options == 1 && x.hasActions(code):
			return badCDB(2, 2)
		case options == 2 && x.known(code) && !x.hasActions(code):
			return badCDB(2, 2)
		}
		for i := range x.ops {
			c := &x.ops[i]
			plain := c.action == noAction && (options == 1 || options == 3 && action == 0)
			if c.code == code && (plain || c.action == action && options != 1) && t.offers(c) {
				o = c
			}
		}
		b = appendSupport(b, o, timeouts)
	default:
		return badCDB(2, 2)
	}
	t.reply = b
	return t.answer(b, allocation)
}

// serves says whether the unit serves a command of the table.
func (u *unit) serves(o *op) bool {
	switch o.code {
	case sanitizeCode:
		return u.allowSanitize && (o.action != sanitizeCryptoErase || u.eraser != nil)
	case setGroupsCode:
		return u.target.opts.SetPortGroups != nil
	}
	return true
}

// knows says whether the unit serves any command of an operation code.
func (u *unit) knows(code byte) bool {
	x := u.target.ops
	if o := x.plain[code]; o != nil {
		return u.serves(o)
	}
	for _, o := range x.actions[code] {
		if u.serves(o) {
			return true
		}
	}
	return false
}

// offers says of the unit as it is now what serves says: UNMAP is for thin ones.
func (t *Task) offers(o *op) bool { return t.unit.serves(o) && (o.code != 0x42 || t.info.Thin) }

// appendCommand appends a command descriptor (SPC-4 table 215).
func appendCommand(b []byte, o *op, timeouts bool) []byte {
	var flags byte
	action := uint16(0)
	if o.action != noAction {
		flags |= 0x01
		action = uint16(o.action)
	}
	if timeouts {
		flags |= 0x02
	}
	b = append(b, o.code, 0, byte(action>>8), byte(action), 0, flags, 0, byte(len(o.usage)))
	if timeouts {
		b = o.appendTimeouts(b)
	}
	return b
}

// appendSupport appends the one-command format (SPC-4 table 217).
func appendSupport(b []byte, o *op, timeouts bool) []byte {
	if o == nil {
		return append(b, 0, 0x01, 0, 0)
	}
	support := byte(0x03)
	if timeouts {
		support |= 0x80
	}
	b = append(b, 0, support, 0, byte(len(o.usage)))
	start := len(b)
	b = append(b, o.usage...)
	b[start] = o.code
	if o.action != noAction {
		// The service action is not a mask but the value itself.
		b[start+1] = b[start+1]&^0x1F | byte(o.action)
	}
	if timeouts {
		b = o.appendTimeouts(b)
	}
	return b
}

// appendTimeouts appends a command timeouts descriptor (SPC-4 6.35.4), in seconds: how long the command
// takes at most where nothing is wrong (NOMINAL COMMAND PROCESSING TIMEOUT), and how long to wait before
// doing something about it (RECOMMENDED COMMAND TIMEOUT).
func (o *op) appendTimeouts(b []byte) []byte {
	nominal, recommended := o.timeouts()
	b = append(b, 0, 0x0A, 0, 0)
	b = binary.BigEndian.AppendUint32(b, nominal)
	return binary.BigEndian.AppendUint32(b, recommended)
}

func (o *op) timeouts() (nominal, recommended uint32) {
	const day = 24 * 60 * 60
	switch {
	case o.flags&opWhole != 0:
		return 60 * 60, 2 * day // FORMAT UNIT, SANITIZE: all that a unit may hold, several times over
	case o.flags&opSlow != 0 && o.flags&opMedium != 0:
		return 60, 10 * 60 // whole ranges: WRITE SAME, UNMAP, VERIFY, copies
	case o.flags&opMedium != 0 && o.flags&opNoDevice == 0:
		return 1, 60 // blocks; what is recommended outlasts a takeover
	case o.flags&opSlow != 0 || o.flags&opNoDevice == 0:
		return 10, 60 // waits for a store, for tasks, for the partner
	}
	return 1, 10
}

// reportTaskManagement is REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS (SPC-4 6.36): abort task, abort
// task set, clear task set, logical unit reset and target reset always; I_T nexus reset and the query
// functions where the transport has them on this nexus.
func reportTaskManagement(t *Task) error {
	allocation := t.be32(6)
	if allocation < 4 {
		return badCDB(6, 7)
	}
	const ats, atss, ctss, lurs, qts, trs = 0x80, 0x40, 0x10, 0x08, 0x04, 0x02
	const qaes, qtss, itnrs = 0x04, 0x02, 0x01
	b := append(t.reply[:0], ats|atss|ctss|lurs|trs, 0, 0, 0)
	if t.Nexus.Queries.Load() {
		b[0] |= qts
		b[1] |= qaes | qtss | itnrs
	}
	if t.CDB[2]&0x80 != 0 { // REPD: in units of 100 ms, a time-out for long and for short functions
		b[3] = 12
		b = append(b, 0, 0, 0, 1) // TMFTMOV
		b = binary.BigEndian.AppendUint32(b, 600)
		b = binary.BigEndian.AppendUint32(b, 100)
	}
	t.reply = b
	return t.answer(b, allocation)
}
