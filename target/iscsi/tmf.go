package iscsi

import (
	"github.com/ledge-storage/ledge/target/scsi"
)

// Task management (11.5, 11.6; RFC 7144 4).
//
// A function acts on the commands before it in the order of the session, which its CmdSN tells,
// and on no other: one that came right behind it goes on. Functions on a set of tasks wait until
// all of those have come (4.2.3.3 b); those on the whole target give up what has not come. The
// response is the last thing that the initiator hears of the tasks that ended: they are waited for
// in package scsi, an answer that was on its way is queued first (settle), and what other
// connections sent has been acknowledged (fence).
//
// A task that waits for Data-Out is ended at once. 4.2.3.3 a would have the target wait for the
// data of every R2T; but Linux sends no data for a task that it resets, and would wait for ever.
// Data that come later name a transfer tag that is used no more, and are read away.

// Functions (11.5.1; RFC 7144 4.1) and responses (11.6.1; RFC 7144 4.2).
const (
	tmfAbortTask    = 1
	tmfAbortTaskSet = 2
	tmfClearACA     = 3
	tmfClearTaskSet = 4
	tmfResetUnit    = 5
	tmfWarmReset    = 6
	tmfColdReset    = 7
	tmfReassign     = 8
	tmfQueryTask    = 9
	tmfQueryTaskSet = 10
	tmfNexusReset   = 11
	tmfQueryEvent   = 12

	tmrDone        = 0
	tmrNoTask      = 1
	tmrNoLUN       = 2
	tmrNoReassign  = 4
	tmrUnsupported = 5
	tmrSucceeded   = 7 // a query's yes; tmrDone is its no
	tmrRejected    = 255
)

// levelQueries is the iSCSIProtocolLevel from which on functions 9 to 12 are served.
const levelQueries = 2

// taskManagement serves 11.5. Functions wait for tasks to end, so they run on a worker.
func (c *conn) taskManagement(h *header) error {
	if err := c.skipData(h); err != nil {
		return err
	}
	if ok, err := c.admit(h); !ok {
		return err
	}
	if c.controls.Add(1) > maxControls {
		c.controls.Add(-1)
		if h.immediate() {
			return c.rejectNow(h, rejectImmediate)
		}
		c.answerControl(h, tmrRejected, nil)
		return nil
	}
	f := function{conn: c, header: *h, upTo: c.scope(h)}
	c.workers.Add(1)
	go func() {
		defer c.workers.Done()
		defer c.controls.Add(-1)
		response, ok := f.run()
		if !ok {
			return // the connection has ended
		}
		c.settle()
		if f.many() {
			c.session.fence(c)
		}
		c.answerControl(&f.header, response, f.info[:])
		c.send.flush()
		if f.header[1]&0x7F == tmfColdReset && response == tmrDone {
			c.server.endSessions(c.session.key.target)
		}
	}()
	return nil
}

// scope is the number before which commands belong to a function's scope: its own, where that is
// one that an initiator may have reached.
func (c *conn) scope(h *header) uint32 {
	exp, maximum := c.session.expCmdSN.Load(), c.session.maxCmdSN.Load()
	if sn := h.cmdSN(); h.immediate() && c.session.shared && before(exp, sn) && !before(maximum+1, sn) {
		return sn
	}
	if !h.immediate() {
		return h.cmdSN()
	}
	return exp
}

func (c *conn) answerControl(h *header, response byte, info []byte) {
	var r header
	r[0], r[1], r[2] = opTaskResp, 0x80, response
	r.put32(16, h.itt())
	copy(r[36:39], info)
	c.sendPDU(&r, nil, true)
}

// settle returns when the answers of all tasks of the connection that have ended are queued.
func (c *conn) settle() {
	c.answering.Lock()
	c.answering.Unlock() //nolint:staticcheck // what it waited for is over
}

// endSessions ends every session with a target (TARGET COLD RESET, 11.5.1). It does not wait.
func (s *Server) endSessions(target string) {
	for _, ss := range s.sessionsWith(target) {
		ss.close()
	}
}

// function is a task management function under way.
type function struct {
	conn   *conn
	header header
	upTo   uint32
	info   [3]byte // additional response information (RFC 7144 4.2)
}

// many says that the function is one on several tasks.
func (f *function) many() bool {
	switch f.header[1] & 0x7F {
	case tmfAbortTaskSet, tmfClearTaskSet, tmfResetUnit, tmfWarmReset, tmfColdReset, tmfNexusReset:
		return true
	}
	return false
}

// mine picks the tasks of the session that are in the function's scope.
func (f *function) mine(t *scsi.Task) bool {
	x := t.Sink.(*task)
	return before(x.cmdSN, f.upTo) || x.immediate && x.cmdSN == f.upTo
}

// spared picks the tasks that came after the function.
func (f *function) spared(t *scsi.Task) bool {
	return t.Nexus == f.conn.session.nexus && !f.mine(t)
}

// run carries the function out. False: its connection has ended.
func (f *function) run() (response byte, ok bool) {
	c, h := f.conn, &f.header
	ss := c.session
	n, lun := ss.nexus, h.lun()
	which := h[1] & 0x7F
	if which >= tmfQueryTask && ss.params.protocolLevel < levelQueries {
		return tmrUnsupported, true
	}
	switch which {
	case tmfAbortTask, tmfAbortTaskSet, tmfClearTaskSet, tmfResetUnit, tmfQueryTask, tmfQueryTaskSet, tmfQueryEvent:
		if !n.HasUnit(lun) {
			return tmrNoLUN, true
		}
	}
	if ss.shared && f.many() {
		if which == tmfWarmReset || which == tmfColdReset || which == tmfNexusReset {
			ss.plug(f.upTo)
		}
		if !ss.await(c, f.upTo) {
			return 0, false
		}
	}
	switch which {
	case tmfAbortTask:
		return f.abortTask(), true
	case tmfAbortTaskSet, tmfClearTaskSet:
		// Each nexus has a task set of its own (TST 001b): clearing ends no other's tasks.
		return has(n.EndTasks(lun, f.mine)), true
	case tmfResetUnit:
		return has(n.ResetUnitSparing(lun, f.spared)), true
	case tmfWarmReset, tmfColdReset:
		n.ResetTargetSparing(f.spared)
		return tmrDone, true
	case tmfReassign:
		return tmrNoReassign, true
	case tmfQueryTask:
		return yes(n.HasTask(lun, func(tag uint64) bool { return tag == uint64(h.u32(20)) })), true
	case tmfQueryTaskSet:
		return yes(n.HasTask(lun, func(uint64) bool { return true })), true
	case tmfNexusReset:
		n.Lose(f.mine)
		return tmrDone, true
	case tmfQueryEvent:
		return f.queryEvent(), true
	}
	return tmrUnsupported, true // CLEAR ACA among them: there is no ACA
}

func has(ok bool) byte {
	if ok {
		return tmrDone
	}
	return tmrNoLUN
}

func yes(ok bool) byte {
	if ok {
		return tmrSucceeded
	}
	return tmrDone
}

// abortTask ends one task, whichever connection it came by. One that has not come, but whose
// number the initiator has used, counts as received and aborted (11.6.1 b).
func (f *function) abortTask() byte {
	ss, h := f.conn.session, &f.header
	tag := h.u32(20)
	if ss.nexus.AbortTask(h.lun(), uint64(tag)) {
		return tmrDone
	}
	if ss.shared && (ss.giveUp(tag, h.u32(32), f.upTo) || ss.nexus.AbortTask(h.lun(), uint64(tag))) {
		return tmrDone // the second look is for one that was delivered between the two
	}
	return tmrNoTask
}

// queryEvent is QUERY ASYNCHRONOUS EVENT: byte 0 of the information holds the depth in bits 5..4
// and the sense key, bytes 1 and 2 the additional sense code and qualifier (SAM-5 7.10).
func (f *function) queryEvent() byte {
	key, code, count := f.conn.session.nexus.Attentions(f.header.lun())
	if count == 0 {
		return tmrDone
	}
	f.info = [3]byte{byte(min(count, 2))<<4 | key, byte(code >> 8), byte(code)}
	return tmrSucceeded
}
