package scsi

// Task management (SAM-5 section 7). Each function returns when none of the tasks that it ends
// runs any more; a transport calls them where waiting is allowed.

// AbortTask ends one task of the nexus. It returns false where there is none with that tag.
func (n *Nexus) AbortTask(lun uint64, tag uint64) bool {
	u := n.find(lun)
	return u != nil && u.abort(func(t *Task) bool { return t.Nexus == n && t.Tag == tag }) > 0
}

// AbortTaskSet ends the nexus's tasks on a unit. It returns false where there is no such unit.
func (n *Nexus) AbortTaskSet(lun uint64) bool {
	u := n.find(lun)
	if u == nil {
		return false
	}
	u.abort(func(t *Task) bool { return t.Nexus == n })
	return true
}

// ClearTaskSet is as AbortTaskSet, because each nexus has a task set of its own (TST 001b).
func (n *Nexus) ClearTaskSet(lun uint64) bool { return n.AbortTaskSet(lun) }

// ResetUnit is LOGICAL UNIT RESET.
func (n *Nexus) ResetUnit(lun uint64) bool {
	u := n.find(lun)
	if u == nil {
		return false
	}
	u.reset(n, nil)
	return true
}

// ResetTarget is LOGICAL UNIT RESET of every unit that the nexus sees.
func (n *Nexus) ResetTarget() {
	for lun := range *n.Target.units.Load() {
		if u, _ := n.unit(lun); u != nil {
			u.reset(n, nil)
		}
	}
}

// HasUnit says whether the nexus sees a unit at the wire's number.
func (n *Nexus) HasUnit(lun uint64) bool { return n.find(lun) != nil }

// HasTask says whether a task is in the unit's task set (QUERY TASK).
func (n *Nexus) HasTask(lun uint64, match func(tag uint64) bool) bool {
	u := n.find(lun)
	if u == nil {
		return false
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	for t := u.first; t != nil; t = t.next {
		if t.Nexus == n && match(t.Tag) {
			return true
		}
	}
	return false
}

func (n *Nexus) find(wire uint64) *unit {
	lun, ok := DecodeLUN(wire)
	if !ok {
		return nil
	}
	u, _ := n.unit(lun)
	return u
}

// AbortAll ends the nexus's tasks on every unit.
func (n *Nexus) AbortAll() {
	for u := range *n.itls.Load() {
		u.abort(func(t *Task) bool { return t.Nexus == n })
	}
}
