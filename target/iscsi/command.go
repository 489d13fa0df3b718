package iscsi

import (
	"encoding/binary"
	"fmt"
	"runtime"
	"sync"

	"github.com/ledge-storage/ledge/target/scsi"
)

// The way of a command:
//
//	command PDU ─► command ─► Prepare ──refused──────────────────────────────────────┐
//	                             │ wants data-out                                    │
//	                             ├────────► gathering: immediate data, unsolicited    │
//	                             │          Data-Out, R2T and solicited Data-Out      │
//	                             │                 │ complete                         ▼
//	                             └────────► running: Task.Run, here or in a worker ─► complete
//
// A gathering task belongs to the reader; whoever aborts it frees it under conn.mu, unless the
// reader is filling it at that moment, which then does. A running task belongs to whoever runs
// it, and is freed by complete.

// Sense data of the transport's own (11.4.7.2; SPC-4 annex D).
const (
	illegalRequest = 0x5
	abortedCommand = 0xB

	unexpectedData = 0x0C0C
	wrongAmount    = 0x0C0D
	invalidInUnit  = 0x0E03
	dataDigest     = 0x4705
)

type phase uint8

const (
	phaseGathering phase = iota
	phaseRunning
)

// task is a command and how its data travel.
type task struct {
	scsi.Task
	conn      *conn
	itt       uint32
	cmdSN     uint32
	edtl      uint32
	bidi      uint32 // the read length that a bidirectional command expects
	flags     byte   // of the command PDU
	phase     phase
	listed    bool // in conn.tasks
	immediate bool // took no CmdSN
	inWorker  bool

	// Data-in.
	held   *scsi.Buffer // the piece that may yet carry the status
	dataSN uint32
	offset uint32

	// Data-out.
	buffers     []*scsi.Buffer
	covered     int64 // bytes that buffers have room for
	received    int64 // bytes of the command's data that came, wanted or not
	dataOutSN   uint32
	unsolicited bool   // unsolicited Data-Out PDUs are still to come
	refused     bool   // the outcome is known; unsolicited data are only read away
	failed      uint16 // additional sense code of what was wrong with its Data-Out
	solicited   int64  // bytes asked for by R2Ts
	r2tSN       uint32
	outstanding []burst
	reserved    int64 // of conn.writeBytes
	memory      int64 // of Server.memory
}

// burst is an R2T that is not answered yet.
type burst struct {
	ttt        uint32
	start, end int64
}

var taskPool = sync.Pool{New: func() any { return new(task) }}

func (c *conn) newTask() *task {
	t := taskPool.Get().(*task)
	t.Task.Reset()
	t.conn = c
	t.Sink, t.Aborter = t, c
	t.Nexus = c.session.nexus
	return t
}

// recycle returns a task that nobody knows any more.
func (t *task) recycle() {
	if t.memory > 0 {
		t.conn.server.memory.Add(-t.memory)
		t.conn.session.memory.Add(-t.memory)
		t.memory = 0
	}
	for i, b := range t.buffers {
		b.Release()
		t.buffers[i] = nil
	}
	t.buffers = t.buffers[:0]
	t.outstanding = t.outstanding[:0]
	t.covered, t.received, t.solicited, t.reserved, t.bidi = 0, 0, 0, 0, 0
	t.dataOutSN, t.dataSN, t.offset, t.r2tSN = 0, 0, 0, 0
	t.unsolicited, t.refused, t.listed, t.inWorker = false, false, false, false
	t.failed = 0
	t.phase = phaseGathering
	t.conn = nil
	taskPool.Put(t)
}

// command serves a SCSI command PDU (11.3).
func (c *conn) command(h *header, ahs []byte) error {
	const read, write = 0x40, 0x20
	if ok, err := c.admit(h); !ok {
		if err == nil {
			err = c.skipData(h)
		}
		return err
	}
	if h.immediate() && c.immediates.Add(1) > maxImmediates {
		c.immediates.Add(-1)
		return c.reject(h, rejectImmediate)
	}
	t := c.newTask()
	t.itt, t.cmdSN, t.edtl, t.flags = h.itt(), h.cmdSN(), h.u32(20), h[1]
	t.Tag = uint64(t.itt)
	t.LUN = h.lun()
	t.Attribute = scsi.Attribute(h[1] & 7)
	clear(t.CDB[:])
	copy(t.CDB[:16], h[32:])
	t.InLimit, t.OutLimit = 0, 0
	if t.flags&read != 0 {
		t.InLimit = int64(t.edtl)
	}
	if t.flags&write != 0 {
		t.OutLimit = int64(t.edtl)
	}
	n := h.dataLen()
	t.immediate = h.immediate()
	reason := t.check(h, ahs)
	if reason == 0 && !t.Prepare() {
		t.refused = true
	}
	c.delivered()
	if reason != 0 {
		c.drop(t, h.immediate())
		return c.reject(h, reason)
	}
	if !t.refused {
		if t.memory = t.OutWanted + min(t.InTotal, 2*scsi.ReadPiece); !c.account(t.memory) {
			t.Busy()
			t.refused = true
		}
	}
	if !t.refused && t.flags&(read|write) == read|write {
		t.Fail(illegalRequest, invalidInUnit) // there are no bidirectional commands
		t.refused = true
	}
	if t.refused {
		t.OutWanted = 0
	}
	t.unsolicited = !h.final()
	if n == 0 && t.OutWanted == 0 && !t.unsolicited {
		c.start(t)
		return nil
	}
	if n > 0 {
		ok, err := c.receive(t, h)
		if err != nil {
			t.Finish()
			c.drop(t, h.immediate())
			return err
		}
		if !ok {
			// Rejected (7.8). Linux's initiator does not send such a command again, and would wait for its
			// time-out of half a minute: its status lets it repeat the command at once.
			t.failed = dataDigest
		}
	}
	c.advance(t)
	return nil
}

// account counts the data of a command. It says whether there is room for them: in the server's
// memory, or in the share of it that no other session can take from this one.
func (c *conn) account(n int64) bool {
	s := c.server
	own, all := c.session.memory.Add(n), s.memory.Add(n)
	return all <= s.opts.Memory || own <= s.opts.Memory/int64(s.opts.MaxSessions)
}

// check looks for what makes a command PDU malformed, and returns the reason of its rejection.
func (t *task) check(h *header, ahs []byte) byte {
	const read, write = 0x40, 0x20
	c, n := t.conn, h.dataLen()
	if err := t.additional(ahs); err != nil || t.Attribute > scsi.ACA {
		return rejectBadField
	}
	switch {
	case t.flags&write == 0 && n > 0,
		n > 0 && (!c.params.immediateData || n > c.params.firstBurst || int64(n) > t.OutLimit),
		!h.final() && (t.flags&write == 0 || c.params.initialR2T),
		t.bidi > 0 && t.flags&(read|write) != read|write,
		c.listed(t.itt):
		return rejectProtocol
	}
	return 0
}

// Types of additional header segments (11.2.2.2).
const (
	ahsExtendedCDB = 1
	ahsReadLength  = 2
)

// additional looks at the additional header segments (11.2.2): an extended CDB is taken as far as
// it fits, the expected read length of a bidirectional command is remembered for its residual.
func (t *task) additional(ahs []byte) error {
	for len(ahs) > 0 {
		if len(ahs) < 4 {
			return fmt.Errorf("iscsi: additional header of %d bytes", len(ahs))
		}
		n := int(binary.BigEndian.Uint16(ahs))
		size := padded(n + 3)
		if n == 0 || size > len(ahs) {
			return fmt.Errorf("iscsi: additional header names %d bytes", n)
		}
		switch kind := ahs[2]; {
		case kind == ahsExtendedCDB:
			copy(t.CDB[16:], ahs[4:3+n])
		case kind == ahsReadLength && n == 5:
			t.bidi = binary.BigEndian.Uint32(ahs[4:])
		default:
			return fmt.Errorf("iscsi: additional header of type %d with %d bytes", kind, n)
		}
		ahs = ahs[size:]
	}
	return nil
}

// drop forgets a task that never came to anything.
func (c *conn) drop(t *task, immediate bool) {
	c.over(immediate)
	t.recycle()
}

// over counts a command that has ended.
func (c *conn) over(immediate bool) {
	if immediate {
		c.immediates.Add(-1)
	} else {
		c.session.maxCmdSN.Add(1)
	}
}

func (c *conn) listed(itt uint32) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, ok := c.tasks[itt]
	return ok || itt == noTag
}

// start runs a task whose data are complete, here or in a worker.
func (c *conn) start(t *task) {
	here := t.refused || t.NeverBlocks()
	if !here || t.listed {
		c.mu.Lock()
		c.receiving = nil
		t.phase = phaseRunning
		if !t.listed {
			t.listed = true
			c.tasks[t.itt] = t
		}
		c.mu.Unlock()
	}
	if here {
		c.execute(t)
		return
	}
	c.workers.Add(1)
	c.working.Add(1)
	t.inWorker = true
	c.server.run(t)
}

// execute runs a task and answers it.
func (c *conn) execute(t *task) {
	worker := t.inWorker
	if !t.refused {
		t.Run()
	}
	c.complete(t)
	if worker {
		if c.working.Add(-1) > 0 {
			runtime.Gosched()
		}
		c.send.flush()
		c.workers.Done()
	}
}

// DataIn implements scsi.Sink: a piece is held back until it is known whether it is the
// last one, which carries the status.
func (t *task) DataIn(b *scsi.Buffer) {
	if t.held != nil {
		held := t.held
		t.held = b
		t.conn.sendData(t, held, false)
		return
	}
	t.held = b
}

// complete answers a task that has run, and frees it.
func (c *conn) complete(t *task) {
	status := t.Status
	if t.inWorker || c.session.shared {
		// The answer follows at once: no task management response may come before it.
		c.answering.RLock()
		defer c.answering.RUnlock()
	}
	t.Finish()
	aborted := t.WasAborted() // after Finish, nobody ends it any more
	c.mu.Lock()
	if t.listed {
		delete(c.tasks, t.itt)
	}
	c.unreserve(t)
	c.mu.Unlock()
	c.over(t.immediate)
	c.count(t)
	if aborted {
		if t.held != nil {
			t.held.Release()
			t.held = nil
		}
		if status, respond := t.AbortStatus(); respond {
			t.Status, t.Sense = status, nil
			c.sendResponse(t)
		}
		t.recycle()
		return
	}
	if held := t.held; held != nil {
		t.held = nil
		last := status == scsi.StatusGood && held.Len() > 0
		c.sendData(t, held, last)
		if last {
			t.recycle()
			return
		}
	}
	c.sendResponse(t)
	t.recycle()
}

func (c *conn) count(t *task) {
	k := &c.server.counters
	switch {
	case t.flags&0x40 != 0:
		k.reads.Add(1)
		k.readBytes.Add(uint64(t.InSent))
	case t.flags&0x20 != 0:
		k.writes.Add(1)
		k.writeBytes.Add(uint64(t.OutWanted))
	default:
		k.others.Add(1)
	}
}

// residual returns the flags and count of what the command would have moved beyond, or did not
// move of, the expected data transfer length (11.4.5).
func (t *task) residual() (flags byte, count uint32) {
	const overflow, underflow = 0x04, 0x02
	total := t.InTotal
	if t.flags&0x20 != 0 {
		total = t.OutTotal
	} else if t.OutTotal > 0 {
		total = t.OutTotal
	}
	if t.Status == scsi.StatusCheckCondition {
		if t.flags&0x20 != 0 {
			total = t.OutWanted
		} else {
			total = t.InSent
		}
	}
	switch d := total - int64(t.edtl); {
	case d > 0:
		return overflow, uint32(min(d, 1<<32-1))
	case d < 0:
		return underflow, uint32(-d)
	}
	return 0, 0
}

// sendData queues a piece of data-in as Data-In PDUs (11.7), the last with the status if it is to
// carry it. It takes the buffer.
func (c *conn) sendData(t *task, b *scsi.Buffer, status bool) {
	q := c.send
	q.mu.Lock()
	defer q.mu.Unlock()
	q.room()
	parts := b.Lent
	if b.B != nil {
		q.whole[0] = b.B
		parts = q.whole[:]
	}
	h := &q.scratch
	for left := b.Len(); left > 0; {
		n := min(left, c.params.maxSend)
		burstLeft := c.params.maxBurst - int(t.offset)%c.params.maxBurst
		n = min(n, burstLeft)
		left -= n
		*h = header{}
		h[0] = opDataIn
		last := left == 0
		if n == burstLeft || last {
			h[1] = 0x80
		}
		if last && status {
			h[1] |= 0x81
			flags, count := t.residual()
			h[1] |= flags
			h[3] = t.Status
			h.put32(44, count)
		}
		h.setDataLen(n)
		h.put32(16, t.itt)
		h.put32(20, noTag)
		h.put32(36, t.dataSN)
		h.put32(40, t.offset)
		c.put(h, last && status)
		parts = c.putParts(parts, n)
		t.dataSN++
		t.offset += uint32(n)
	}
	q.whole[0] = nil
	q.release(b)
	if q.queued >= sendSoon && !q.writing {
		q.write()
	}
}

// sendResponse queues a SCSI response (11.4).
func (c *conn) sendResponse(t *task) {
	q := c.send
	q.mu.Lock()
	defer q.mu.Unlock()
	q.room()
	c.putResponse(t)
}

// putResponse is sendResponse with the queue's lock held, whether there is room or not.
func (c *conn) putResponse(t *task) {
	h := &c.send.scratch
	*h = header{}
	h[0], h[1] = opResponse, 0x80
	flags, count := t.residual()
	h[1] |= flags
	h[3] = t.Status
	h.put32(16, t.itt)
	h.put32(36, t.dataSN)
	h.put32(44, count)
	if t.bidi > 0 {
		h[1] |= 0x08 // nothing was read (11.4.5.2)
		h.put32(40, t.bidi)
	}
	if len(t.Sense) > 0 {
		var data [2 + 64]byte
		binary.BigEndian.PutUint16(data[:], uint16(len(t.Sense)))
		n := 2 + copy(data[2:], t.Sense)
		h.setDataLen(n)
		c.put(h, true)
		c.putData(data[:n])
		return
	}
	c.put(h, true)
}
