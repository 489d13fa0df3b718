package scsi

// What a transport asks beyond tmf.go: functions that end only some tasks, because those behind
// the function in the order of the session are none of its business, and the queries of SAM-5
// 7.8 to 7.11. A match function is called under the unit's lock: it looks at the task and returns.

// EndTasks ends those of the nexus's tasks on a unit that match picks (ABORT TASK SET, CLEAR TASK
// SET). It returns false where there is no such unit.
func (n *Nexus) EndTasks(lun uint64, match func(*Task) bool) bool {
	u := n.find(lun)
	if u == nil {
		return false
	}
	u.abort(func(t *Task) bool { return t.Nexus == n && match(t) })
	return true
}

// EndTasksEverywhere ends those of the nexus's tasks that match picks, on every unit, because the
// transport lost what they came by. Where the nexus goes on, it is told so by a unit attention on
// each unit that lost a task: SOME COMMANDS CLEARED BY ISCSI PROTOCOL EVENT (RFC 7143 7.5).
func (n *Nexus) EndTasksEverywhere(match func(*Task) bool, tell bool) {
	for u, i := range *n.itls.Load() {
		if u.abort(func(t *Task) bool { return t.Nexus == n && match(t) }) > 0 && tell {
			i.add(uaProtocolEvent)
		}
	}
}

// uaProtocolEvent is SOME COMMANDS CLEARED BY ISCSI PROTOCOL EVENT.
const uaProtocolEvent asc = 0x477F

// ResetUnitSparing is LOGICAL UNIT RESET that leaves the tasks which spare picks: they came after
// the function.
func (n *Nexus) ResetUnitSparing(lun uint64, spare func(*Task) bool) bool {
	u := n.find(lun)
	if u == nil {
		return false
	}
	u.reset(n, spare)
	return true
}

// ResetTargetSparing is ResetUnitSparing of every unit that the nexus sees.
func (n *Nexus) ResetTargetSparing(spare func(*Task) bool) {
	for lun := range *n.Target.units.Load() {
		if u, _ := n.unit(lun); u != nil {
			u.reset(n, spare)
		}
	}
}

// Lose is I_T NEXUS RESET (SAM-5 7.6): the nexus's tasks that match picks end, its RESERVE(6) is
// dropped, and each unit has a unit attention for it, I_T NEXUS LOSS OCCURRED.
func (n *Nexus) Lose(match func(*Task) bool) {
	for u, i := range *n.itls.Load() {
		u.abort(func(t *Task) bool { return t.Nexus == n && match(t) })
		u.evict(func(o *Nexus) bool { return o == n })
		u.mu.Lock()
		if u.reserved == n {
			u.reserved = nil
			u.updateRestricted()
		}
		u.mu.Unlock()
		i.add(uaNexusLoss)
	}
}

// Attentions is QUERY ASYNCHRONOUS EVENT (SAM-5 7.10): the sense key and code of the unit
// attention that the next command would get, and how many there are. None: zeros. They stay.
func (n *Nexus) Attentions(lun uint64) (key byte, code uint16, count int) {
	u := n.find(lun)
	if u == nil {
		return 0, 0, 0
	}
	i := n.itl(u)
	if i == nil {
		return 0, 0, 0
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if count = int(i.pending.Load()); count == 0 {
		return 0, 0, 0
	}
	return keyUnitAttention, uint16(i.queue[0]), count
}

// Fail ends a task that has not run with a sense key and code of the transport (RFC 7143
// 11.4.7.2).
func (t *Task) Fail(key byte, code uint16) { t.end(&sense{key: key, code: asc(code)}) }
