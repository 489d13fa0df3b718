package scsi

// reserve is RESERVE(6) and (10) (SPC-2 7.21): the whole unit for one nexus.
func reserve(t *Task) error {
	u := t.unit
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.pr.registered() || u.reserved != nil && u.reserved != t.Nexus {
		return errReservationConflict
	}
	u.reserved = t.Nexus
	u.updateRestricted()
	return nil
}

// release is RELEASE(6) and (10). From a nexus that holds nothing it does nothing.
func release(t *Task) error {
	u := t.unit
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.pr.registered() {
		return errReservationConflict
	}
	if u.reserved == t.Nexus {
		u.reserved = nil
		u.updateRestricted()
	}
	return nil
}

// checkReservations refuses a command that a reservation of another nexus forbids.
func (u *unit) checkReservations(t *Task) error {
	flags := t.op.flags
	u.mu.Lock()
	defer u.mu.Unlock()
	if h := u.reserved; h != nil && h != t.Nexus {
		switch t.op.code {
		case 0x03, 0x12, 0xA0, 0x17, 0x57:
			return nil
		}
		return errReservationConflict
	}
	if flags&opAnyHolder != 0 {
		return nil
	}
	return u.pr.check(t.Nexus, flags)
}
