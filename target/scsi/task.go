package scsi

import (
	"encoding/binary"
	"sync/atomic"
	"time"

	"github.com/ledge-storage/ledge/target"
)

// Sink takes a command's data-in.
type Sink interface {
	// DataIn takes the next piece, and the buffer with it. It may wait for the initiator to
	// take earlier data. It is called during Run only.
	DataIn(b *Buffer)
}

// Aborter is told of tasks that end before they run.
type Aborter interface {
	// Aborted says that the task with that tag was aborted while it waited for data: no data
	// is wanted, no response is due. The tag may have been used anew meanwhile: the
	// transport looks at Task.WasAborted.
	Aborted(tag uint64)
}

// MaxCDB is the longest command descriptor block that is looked at (SPC-4 4.2.3 allows 260).
const MaxCDB = 32

// ReadPiece is the most that a READ holds in memory at a time; a transport may hold another.
const ReadPiece = 256 << 10

type taskState uint8

const (
	taskIdle    taskState = iota // not in a task set
	taskWaiting                  // prepared, waiting for data-out
	taskRunning                  // the device may be at work
)

// Attribute is a task attribute (SAM-5 8.9).
type Attribute uint8

// The attributes, as RFC 7143 11.3.1 numbers them.
const (
	Untagged Attribute = iota
	Simple
	Ordered
	HeadOfQueue
	ACA
)

// Task is one command. A transport keeps them pooled: each use begins with
// Reset.
type Task struct {
	// Set by the transport before Prepare.
	Sink      Sink
	Aborter   Aborter
	Nexus     *Nexus
	LUN       uint64 // the eight bytes of the wire, big-endian
	Tag       uint64 // names the task on its nexus, for task management
	CDB       [MaxCDB]byte
	Attribute Attribute
	// InLimit and OutLimit are the bytes of data-in and data-out that the initiator has
	// room for, or offers.
	InLimit, OutLimit int64

	// Set by Prepare: how many bytes of data-out Run wants, at most OutLimit.
	OutWanted int64
	// Out is the data-out, OutWanted bytes in all. Each slice but the last is a multiple of
	// 4096 long.
	Out [][]byte

	// The outcome, valid when Prepare returned false or after Run.
	Status byte
	Sense  []byte
	// InTotal and OutTotal are what the command would move without the limits, from which a
	// transport tells residuals; InSent is what DataIn was given.
	InTotal, OutTotal, InSent int64

	op     *op
	unit   *unit
	itl    *itl
	state  taskState
	info   target.Info
	lba    uint64
	blocks uint64
	vec    [][]byte
	reply  []byte
	sense  [maxSense]byte
	ctx    *taskContext

	started time.Duration // of Target.clock

	turn       uint64 // of unit.turns
	waits      bool   // was put in the task set behind a task that must end first
	forwards   bool   // is carried out by another target
	aborted    atomic.Bool
	answered   atomic.Bool // is answered with TASK ABORTED although it was aborted
	prev, next *Task       // guarded by unit.mu
}

// Reset makes t as good as new. It must not be in a task set.
func (t *Task) Reset() {
	if t.ctx == nil || t.ctx.used() {
		if t.ctx != nil {
			t.ctx.cancel() // ends what a device derived from it and left
		}
		t.ctx = new(taskContext)
	}
	t.Sink, t.Aborter, t.Nexus, t.unit, t.itl, t.op = nil, nil, nil, nil, nil, nil
	t.OutWanted, t.InTotal, t.OutTotal, t.InSent = 0, 0, 0, 0
	clear(t.Out)
	t.Out = t.Out[:0]
	clear(t.vec)
	t.vec = t.vec[:0]
	t.Sense = nil
	t.Status = 0
	t.lba, t.blocks = 0, 0
	t.waits, t.forwards = false, false
	t.Attribute = Untagged
	t.aborted.Store(false)
	if t.answered.Load() {
		t.answered.Store(false)
	}
	if cap(t.reply) > 64<<10 {
		t.reply = nil
	}
}

// WasAborted says that task management ended the task: no response is due.
func (t *Task) WasAborted() bool { return t.aborted.Load() }

// AbortStatus is for tasks that WasAborted: whether a response is due all the same, and its status,
// which carries no sense data. It is due where another nexus ended the task and the unit's control mode
// page has TAS set (SAM-5 5.3.1).
func (t *Task) AbortStatus() (status byte, respond bool) {
	return StatusTaskAborted, t.answered.Load()
}

// NeverBlocks says that Run waits for nothing but Sink.DataIn.
func (t *Task) NeverBlocks() bool {
	if t.op.flags&opSlow != 0 || t.waits {
		return false
	}
	return t.op.flags&opNoDevice != 0 || t.unit == nil || t.unit.neverBlocks()
}

// Prepare looks at the CDB. It returns true when the task shall run after OutWanted bytes have
// been gathered; false when it has ended, with Status and Sense. Either way Finish is due.
func (t *Task) Prepare() bool {
	t.started = t.Nexus.Target.clock()
	t.op = t.Nexus.Target.ops.lookup(t.CDB[0], t.CDB[1])
	if err := t.prepare(); err != nil {
		t.end(err)
		return false
	}
	return true
}

func (t *Task) prepare() error {
	lun, ok := DecodeLUN(t.LUN)
	if ok {
		t.unit, t.itl = t.Nexus.unit(lun)
	}
	u := t.unit
	t.unit = nil // until it is in the task set
	if u == nil {
		return t.prepareWithoutUnit()
	}
	u.enter(t)
	if t.op != nil && !u.serves(t.op) {
		t.op = nil
	}
	if t.op == nil {
		if i := t.itl; i.pending.Load() > 0 {
			if a, ok := i.take(); ok {
				return &sense{key: keyUnitAttention, code: a}
			}
		}
		return t.unknownOperation()
	}
	flags := t.op.flags
	if flags&opNoAttention == 0 && t.itl.pending.Load() > 0 {
		if a, ok := t.itl.take(); ok {
			return &sense{key: keyUnitAttention, code: a}
		}
	}
	// The state before the reservations: those of a unit that another target serves are not known here, and a
	// command that finds the unit served finds them reloaded.
	if flags&opStandby == 0 && !t.Nexus.proxied {
		state := t.Nexus.Target.state(t.Nexus.RelativePort)
		t.forwards = state == target.Standby && flags&opReservation != 0 && u.proxy != nil
		if err := stateError(state); err != nil && !t.forwards && !(flags&opInStandby != 0 && state == target.Standby) {
			return err
		}
	}
	if u.restricted.Load() {
		if err := u.checkReservations(t); err != nil {
			return err
		}
	}
	if err := u.sanitizeError(t.op); err != nil {
		return err
	}
	if err := t.checkUsage(); err != nil {
		return err
	}
	t.info = u.dev.Info()
	if flags&opMedium != 0 && u.mode.Load()&modeStopped != 0 {
		return &sense{key: keyNotReady, code: ascNeedsStart}
	}
	if t.op.decode != nil {
		if err := t.op.decode(t); err != nil {
			return err
		}
	}
	t.OutWanted = min(t.OutTotal, t.OutLimit)
	return nil
}

// prepareWithoutUnit serves the few commands that a number without a unit answers (SPC-4 table 38).
func (t *Task) prepareWithoutUnit() error {
	if t.op == nil || t.op.flags&opNoUnit == 0 {
		return illegal(ascUnsupportedLUN)
	}
	return t.checkUsage()
}

// checkUsage refuses a CDB with a bit set that its usage map (SPC-4 6.35.3) does not know.
func (t *Task) checkUsage() error {
	usage := t.op.usage
	for i := 1; i < len(usage); i++ {
		if extra := t.CDB[i] &^ usage[i]; extra != 0 && i != len(usage)-1 {
			bit := 7
			for extra>>bit&1 == 0 {
				bit--
			}
			return badCDB(i, bit)
		}
	}
	// CONTROL: NACA is not supported; the vendor and reserved bits are ignored.
	if control := t.CDB[len(usage)-1]; len(usage) >= 6 && control&0x04 != 0 {
		return badCDB(len(usage)-1, 2)
	}
	return nil
}

// shutOut says whether the nexus does not see the unit any more (SetInitiators).
func (t *Task) shutOut() bool { return t.itl != nil && !t.itl.allowed.Load() }

func (t *Task) unknownOperation() error {
	if t.unit.knows(t.CDB[0]) {
		return badCDB(1, 4) // the opcode is there, its service action is not
	}
	return illegal(ascInvalidOpcode)
}

// Run carries the command out.
func (t *Task) Run() {
	if t.unit != nil {
		if err := t.unit.begin(t); err != nil {
			t.end(err)
			return
		}
	}
	if t.forwards {
		t.end(t.forward())
		return
	}
	t.end(t.op.run(t))
	if t.unit != nil && t.unit.pool != nil && t.op.flags&(opWrites|opMedium) == opWrites|opMedium {
		t.unit.checkThreshold()
	}
}

// Finish ends the task's life in its unit's task set. Data given to DataIn may still be on the way.
func (t *Task) Finish() {
	if t.unit != nil {
		t.count()
		t.unit.leave(t)
		t.unit = nil
	}
}

func (t *Task) end(err error) {
	if err == nil {
		t.Status = StatusGood
		return
	}
	if a, ok := err.(foreignAnswer); ok {
		t.endForeign(a)
		return
	}
	status, s := toStatus(err)
	t.Status = status
	if s != nil {
		descriptor := t.unit != nil && t.unit.mode.Load()&modeDescriptorSense != 0
		t.Sense = s.encode(t.sense[:0], descriptor)
	}
}

// Busy ends a prepared task with TASK SET FULL.
func (t *Task) Busy() { t.end(statusError(StatusTaskSetFull)) }

// answer gives parameter data to the initiator, as far as its allocation length goes.
func (t *Task) answer(data []byte, allocation uint64) error {
	n := int64(min(uint64(len(data)), allocation))
	t.InTotal = n
	data = data[:min(n, t.InLimit)]
	for len(data) > 0 {
		b := GetBuffer(min(len(data), MaxBuffer))
		n := copy(b.B, data)
		data = data[n:]
		t.give(b)
	}
	return nil
}

// give hands over a piece of data-in, no more than the initiator has room for.
func (t *Task) give(b *Buffer) {
	room := t.InLimit - t.InSent
	if int64(b.Len()) > room {
		b.truncate(int(room))
	}
	t.InSent += int64(b.Len())
	t.Sink.DataIn(b)
}

// list returns the parameter list, contiguous, or an error where the initiator sent less than the
// CDB announced.
func (t *Task) list() ([]byte, error) {
	if t.OutWanted < t.OutTotal {
		return nil, illegal(ascParameterListLength)
	}
	if len(t.Out) == 1 {
		return t.Out[0], nil
	}
	b := t.reply[:0]
	for _, s := range t.Out {
		b = append(b, s...)
	}
	t.reply = b
	return b, nil
}

// bytes of the CDB.
func (t *Task) be16(i int) uint64 { return uint64(binary.BigEndian.Uint16(t.CDB[i:])) }
func (t *Task) be24(i int) uint64 { return uint64(t.CDB[i])<<16 | t.be16(i+1) }
func (t *Task) be32(i int) uint64 { return uint64(binary.BigEndian.Uint32(t.CDB[i:])) }
func (t *Task) be64(i int) uint64 { return binary.BigEndian.Uint64(t.CDB[i:]) }

// DataPhaseError ends a prepared task whose data-out broke the transport's rules.
func (t *Task) DataPhaseError() { t.end(&sense{key: keyAbortedCommand, code: ascDataPhase}) }
