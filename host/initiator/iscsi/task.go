package iscsi

import (
	"sync"
	"time"
)

// Command is one SCSI command and what became of it. It may be used again after Do returned.
type Command struct {
	LUN uint16
	CDB [16]byte
	// Out is the data that the command sends, In where the data that it asks for goes. A command
	// has one of them at most.
	Out, In []byte

	// Status is the SCSI status (SAM-5 5.3.1), Sense the sense data of a CHECK CONDITION.
	Status byte
	Sense  []byte
	// Transferred is how much of In was filled.
	Transferred int

	senseBuf [maxSenseBytes]byte
}

// maxSenseBytes is the most that SPC-4 4.5.1 lets sense data have.
const maxSenseBytes = 252

// task is an entry of the task table: a command, a task management request, a ping, a logout.
type task struct {
	tag    uint32
	sn     uint32 // CmdSN of a command
	expect byte   // opcode that ends it
	cmd    *Command
	since  time.Duration
	over   bool // answered; it is done when refs is 0 too
	refs   int  // queued PDUs that refer to cmd.Out
	err    error
	result byte // response code of a task management function or logout

	in     int    // bytes of Data-In received
	dataSN uint32 // next Data-In
	r2tSN  uint32 // next R2T
	out    int    // bytes of Out queued or sent: where the next R2T must begin

	done chan struct{}
}

var taskPool = sync.Pool{New: func() any { return &task{done: make(chan struct{}, 1)} }}

// newTask takes an entry; nil when there is none. mu is held.
func (s *Session) newTask(expect byte) *task {
	n := len(s.free)
	if n == 0 {
		return nil
	}
	i := s.free[n-1]
	s.free = s.free[:n-1]
	s.turn = (s.turn + 1) & 0x7fff // never makes the reserved tag
	t := taskPool.Get().(*task)
	*t = task{tag: uint32(s.turn)<<16 | uint32(i), expect: expect, since: time.Since(s.start), done: t.done}
	s.tasks[i] = t
	return t
}

// lookup finds the task of a tag that the target sent; nil when there is none. mu is held.
func (s *Session) lookup(tag uint32) *task {
	if i := int(tag & 0xffff); i < len(s.tasks) && s.tasks[i] != nil && s.tasks[i].tag == tag {
		return s.tasks[i]
	}
	return nil
}

// finish marks t as over. Its owner is woken when no queued PDU refers to its data. mu is held.
func (s *Session) finish(t *task, err error) {
	if !t.over {
		t.over, t.err = true, err
	}
	if t.refs > 0 {
		return
	}
	i := uint16(t.tag)
	s.tasks[i] = nil
	s.free = append(s.free, i)
	if t.expect == OpNopIn { // nobody waits for a ping
		taskPool.Put(t)
		return
	}
	t.done <- struct{}{}
}

// release drops t's reference by one queued PDU. mu is held.
func (s *Session) release(t *task) {
	t.refs--
	if t.over && t.refs == 0 {
		s.finish(t, t.err)
	}
}
