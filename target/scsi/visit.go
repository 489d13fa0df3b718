package scsi

// A copy uses the devices of units that its command was not sent to. Such a use is a visit: the unit
// knows of it, so that Detach, PREEMPT AND ABORT, SetInitiators and LOGICAL UNIT RESET end it and wait
// for it as they do for the unit's own tasks, and SANITIZE waits for it.

// visit is the use of a range of a unit by a copy.
type visit struct {
	unit  *unit
	by    *copyOp
	write bool
	lba   uint64
	n     uint64 // blocks
}

// enterVisit lets o use n blocks from lba on until leaveVisit, or says why not. A visit that writes
// revokes the tokens of what it is going to change.
func (u *unit) enterVisit(o *copyOp, write bool, lba, n uint64) (*visit, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.removed {
		return nil, &sense{key: keyCopyAborted, code: ascCopyTargetUnreachable}
	}
	if s := u.sanitizing.Load(); s != nil {
		return nil, s.sense()
	}
	v := &visit{u, o, write, lba, n}
	if err := v.allowed(); err != nil {
		return nil, err
	}
	if write {
		u.revoke(lba, n)
	}
	if u.visits == nil {
		u.visits = make(map[*visit]struct{})
	}
	u.visits[v] = struct{}{}
	return v, nil
}

// allowed says whether the nexus may still do what the visit does: it is asked before each piece, so
// that a reservation ends a copy that runs in the background too. unit.mu is held.
func (v *visit) allowed() error {
	u, n, flags := v.unit, v.by.nexus, opFlags(opReads)
	if v.write {
		flags = opWrites
		if u.dev.Info().ReadOnly || u.mode.Load()&modeWriteProtect != 0 {
			return &sense{key: keyDataProtect, code: ascWriteProtected}
		}
	}
	if !u.allows(n.Initiator) {
		return &sense{key: keyCopyAborted, code: ascCopyTargetUnreachable}
	}
	if u.mode.Load()&modeStopped != 0 {
		return &sense{key: keyNotReady, code: ascNeedsStart}
	}
	if h := u.reserved; h != nil && h != n {
		return errReservationConflict
	}
	return u.pr.check(n, flags)
}

// check is allowed, with the lock taken.
func (v *visit) check() error {
	v.unit.mu.Lock()
	defer v.unit.mu.Unlock()
	return v.allowed()
}

func (v *visit) leave() {
	u := v.unit
	u.mu.Lock()
	delete(u.visits, v)
	u.left.Broadcast()
	u.mu.Unlock()
}

// expel ends the visits of the nexuses that match picks, and waits for them.
func (u *unit) expel(match func(*Nexus) bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for v := range u.visits {
		if match(v.by.nexus) {
			v.by.cancel()
		}
	}
	for u.visited(match) {
		u.left.Wait()
	}
}

// visited says whether there is a visit of a nexus that match picks. unit.mu is held.
func (u *unit) visited(match func(*Nexus) bool) bool {
	for v := range u.visits {
		if match(v.by.nexus) {
			return true
		}
	}
	return false
}

func everyNexus(*Nexus) bool { return true }
