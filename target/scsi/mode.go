package scsi

import "encoding/binary"

// The bits of unit.mode.
const (
	modeWriteProtect    = 1 << iota // SWP of the control page
	modeDescriptorSense             // D_SENSE of the control page
	modeStopped                     // START STOP UNIT
	modeTaskAborted                 // TAS of the control page
)

// Page codes.
const (
	pageRecovery      = 0x01
	pageCaching       = 0x08
	pageControl       = 0x0A
	pageInformational = 0x1C
	pageAll           = 0x3F
)

// modePage appends one page. Control 1 asks for what can be changed, 2 for the defaults.
func (t *Task) modePage(b []byte, page, sub, control byte) []byte {
	bits := t.unit.mode.Load()
	switch control {
	case 1:
		bits = ^uint32(0)
	case 2:
		bits = 0
	}
	switch {
	case page == pageRecovery && sub == 0:
		p := make([]byte, 12)
		p[0], p[1] = pageRecovery, 10
		if t.unit.pool != nil && control != 1 {
			p[7] = 0x80 // LBPERE: crossing a threshold is told
		}
		return append(b, p...)
	case page == pageCaching && sub == 0:
		p := make([]byte, 20)
		p[0], p[1] = pageCaching, 18
		return append(b, p...) // WCE clear: what was acknowledged is durable
	case page == pageControl && sub == 0:
		p := make([]byte, 12)
		p[0], p[1] = pageControl, 10
		if control != 1 {
			p[2] = 0x20 // TST: a task set for each nexus
			p[3] = 0x10 // unrestricted reordering
			p[8], p[9] = 0xFF, 0xFF
		}
		if bits&modeDescriptorSense != 0 {
			p[2] |= 0x04
		}
		if bits&modeWriteProtect != 0 {
			p[4] |= 0x08
		}
		if bits&modeTaskAborted != 0 {
			p[5] |= 0x40
		}
		return append(b, p...)
	case page == pageControl && sub == 1:
		p := make([]byte, 32)
		p[0], p[1], p[3] = pageControl|0x40, 1, 28
		if control != 1 {
			p[4] = 0x01 // IALUAE: the target changes access states
			p[6] = maxSense
		}
		return append(b, p...)
	case page == pageInformational && sub == 0:
		p := make([]byte, 12)
		p[0], p[1] = pageInformational, 10
		return append(b, p...) // MRIE 0: there is no exception that could be reported
	case page == pageInformational && sub == 2 && t.unit.pool != nil:
		return t.thresholdPage(b, control)
	}
	return nil
}

// thresholdPage is the logical block provisioning page (SBC-3 6.5.9), which cannot be changed:
// one descriptor, of the available resources falling below the device's threshold.
func (t *Task) thresholdPage(b []byte, control byte) []byte {
	p := make([]byte, 24)
	p[0], p[1], p[3] = pageInformational|0x40, 2, byte(len(p)-4)
	if sets := thresholdSets(t.unit.pool.Space().ThresholdBytes); control != 1 && sets > 0 {
		p[16] = 0x80 // enabled, soft threshold, armed decrease
		p[17] = logAvailable
		binary.BigEndian.PutUint32(p[20:], sets)
	}
	return append(b, p...)
}

// modeSense is MODE SENSE(6) and (10) (SPC-4 6.13).
func modeSense(t *Task) error {
	ten := t.CDB[0] == 0x5A
	control, page, sub := t.CDB[2]>>6, t.CDB[2]&0x3F, t.CDB[3]
	noDescriptor, long := t.CDB[1]&0x08 != 0, ten && t.CDB[1]&0x10 != 0
	if control == 3 {
		return illegal(ascSavingNotSupported)
	}
	deviceSpecific := byte(0x10) // DPOFUA
	if t.info.ReadOnly || t.unit.mode.Load()&modeWriteProtect != 0 {
		deviceSpecific |= 0x80
	}
	var b []byte
	var allocation uint64
	if ten {
		allocation = t.be16(7)
		b = append(t.reply[:0], 0, 0, 0, deviceSpecific, 0, 0, 0, 0)
	} else {
		allocation = uint64(t.CDB[4])
		b = append(t.reply[:0], 0, 0, deviceSpecific, 0)
	}
	if !noDescriptor {
		before := len(b)
		if long {
			b[4] |= 0x01
			b = binary.BigEndian.AppendUint64(b, t.info.Blocks)
			b = append(b, 0, 0, 0, 0)
			b = binary.BigEndian.AppendUint32(b, t.info.BlockBytes)
		} else {
			b = binary.BigEndian.AppendUint32(b, uint32(min(t.info.Blocks, 1<<32-1)))
			b = binary.BigEndian.AppendUint32(b, t.info.BlockBytes)
		}
		if ten {
			b[7] = byte(len(b) - before)
		} else {
			b[3] = byte(len(b) - before)
		}
	}
	if page == pageAll {
		if sub != 0 && sub != 0xFF {
			return badCDB(3, 7)
		}
		b = t.modePage(b, pageRecovery, 0, control)
		b = t.modePage(b, pageCaching, 0, control)
		b = t.modePage(b, pageControl, 0, control)
		if sub == 0xFF {
			b = t.modePage(b, pageControl, 1, control)
		}
		b = t.modePage(b, pageInformational, 0, control)
		if sub == 0xFF && t.unit.pool != nil {
			b = t.modePage(b, pageInformational, 2, control)
		}
	} else {
		if sub == 0xFF {
			first := t.modePage(b, page, 0, control)
			if first == nil {
				return badCDB(2, 5)
			}
			b = first
			for other := byte(1); other <= 2; other++ {
				if next := t.modePage(b, page, other, control); next != nil {
					b = next
				}
			}
		} else {
			next := t.modePage(b, page, sub, control)
			if next == nil {
				if sub != 0 && t.modePage(b, page, 0, control) != nil {
					return badCDB(3, 7)
				}
				return badCDB(2, 5)
			}
			b = next
		}
	}
	if ten {
		binary.BigEndian.PutUint16(b, uint16(len(b)-2))
	} else {
		b[0] = byte(len(b) - 1)
	}
	t.reply = b
	return t.answer(b, allocation)
}

func decodeModeSelect(t *Task) error {
	if t.CDB[1]&0x10 == 0 && t.CDB[0] == 0x55 {
		return badCDB(1, 4) // PF: pages of another format than this standard's
	}
	if t.CDB[1]&0x01 != 0 {
		return badCDB(1, 0) // SP: nothing is saved
	}
	if t.CDB[0] == 0x15 {
		t.OutTotal = int64(t.CDB[4])
	} else {
		t.OutTotal = int64(t.be16(7))
	}
	return nil
}

// modeSelect is MODE SELECT(6) and (10) (SPC-4 6.11). What can be changed is SWP, TAS and D_SENSE.
func modeSelect(t *Task) error {
	if t.OutTotal == 0 {
		return nil
	}
	list, err := t.list()
	if err != nil {
		return err
	}
	header, descriptors := 4, 0
	if t.CDB[0] == 0x55 {
		header = 8
	}
	if len(list) < header {
		return illegal(ascParameterListLength)
	}
	if header == 4 {
		descriptors = int(list[3])
	} else {
		descriptors = int(binary.BigEndian.Uint16(list[6:]))
	}
	if descriptors > len(list)-header {
		return illegal(ascParameterListLength)
	}
	at := header + descriptors
	bits := t.unit.mode.Load()
	next := bits
	for at < len(list) {
		p := list[at:]
		if len(p) < 2 {
			return illegal(ascParameterListLength)
		}
		sub, size, head := byte(0), int(p[1])+2, 2
		if p[0]&0x40 != 0 {
			if len(p) < 4 {
				return illegal(ascParameterListLength)
			}
			sub, size, head = p[1], int(binary.BigEndian.Uint16(p[2:]))+4, 4
		}
		page := p[0] & 0x3F
		current := t.modePage(nil, page, sub, 0)
		mask := t.modePage(nil, page, sub, 1)
		if current == nil {
			return badList(at)
		}
		if size != len(current) {
			return badList(at + 1)
		}
		if size > len(p) {
			return illegal(ascParameterListLength)
		}
		for i := head; i < size; i++ {
			if (p[i]^current[i])&^mask[i] != 0 {
				return badList(at + i)
			}
		}
		if page == pageControl && sub == 0 {
			next = next &^ (modeDescriptorSense | modeWriteProtect | modeTaskAborted)
			if p[2]&0x04 != 0 {
				next |= modeDescriptorSense
			}
			if p[4]&0x08 != 0 {
				next |= modeWriteProtect
			}
			if p[5]&0x40 != 0 {
				next |= modeTaskAborted
			}
		}
		at += size
	}
	for next != bits && !t.unit.mode.CompareAndSwap(bits, bits&modeStopped|next&^modeStopped) {
		bits = t.unit.mode.Load()
	}
	if next != bits {
		t.unit.attention(uaModeChanged, t.Nexus)
	}
	return nil
}

// startStop is START STOP UNIT (SBC-3 5.25). A stopped unit refuses medium access.
func startStop(t *Task) error {
	condition, loadEject, start := t.CDB[4]>>4, t.CDB[4]&0x02 != 0, t.CDB[4]&0x01 != 0
	if condition != 0 {
		return nil
	}
	if loadEject {
		return badCDB(4, 1) // the medium is not removable
	}
	if start {
		t.unit.mode.And(^uint32(modeStopped))
		return nil
	}
	if t.CDB[4]&0x04 == 0 { // NO_FLUSH
		if err := t.unit.dev.Flush(t.ctx); err != nil {
			return err
		}
	}
	t.unit.mode.Or(modeStopped)
	return nil
}

// sendDiagnostic is SEND DIAGNOSTIC: the default self-test, which always passes.
func sendDiagnostic(t *Task) error {
	if t.CDB[1]&0xE0 != 0 {
		return badCDB(1, 7)
	}
	if t.be16(3) != 0 {
		return badCDB(3, 7)
	}
	return nil
}

// requestSense is REQUEST SENSE (SPC-4 6.39): a queued attention, else the unit's state.
func requestSense(t *Task) error {
	s := &sense{key: keyNoSense}
	switch {
	case t.unit == nil:
		s = illegal(ascUnsupportedLUN)
	default:
		if a, ok := t.itl.take(); ok {
			s = &sense{key: keyUnitAttention, code: a}
		} else if z := t.unit.sanitizing.Load(); z != nil {
			s = z.sense()
		} else if t.unit.mode.Load()&modeStopped != 0 {
			s = &sense{key: keyNotReady, code: ascNeedsStart}
		}
	}
	b := s.encode(t.reply[:0], t.CDB[1]&1 != 0)
	t.reply = b
	return t.answer(b, uint64(t.CDB[4]))
}
