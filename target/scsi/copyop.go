package scsi

import (
	"context"
	"errors"
	"sync"
)

// The copy manager (SPC-4 5.17.2) of a unit: it runs what EXTENDED COPY, POPULATE TOKEN and WRITE USING
// TOKEN ask for, in the command or (IMMED) behind it, and remembers how each ended for the commands
// that ask by list identifier.
//
//	        begin                 the body returns
//	(none) ───────► in progress ─────────────────────► completed, or completed with errors (sense kept)
//	                     │ COPY OPERATION ABORT, the end of the session, a reset, a reservation,
//	                     │ Detach, or (in the command) task management
//	                     └───────────────────────────► terminated
//
// An operation is known by its nexus and its list identifier, whose one byte (LID1) and four (LID4) are
// one space. It is remembered until the identifier is used anew, the nexus ends, or more than
// maxCopyOps came after it.

// Values of COPY OPERATION STATUS (SPC-4 table 199).
const (
	copyDone       = 0x01
	copyFailed     = 0x02
	copyPartial    = 0x03 // the token ended before the ranges did
	copyForeground = 0x11
	copyBackground = 0x12
	copyTerminated = 0x60
)

const (
	maxCopyOps    = 64 // remembered by a unit, those in progress included
	maxBackground = 16 // of them in progress behind their commands

	// The units of TRANSFER COUNT (SPC-4 table 203).
	countBytes  = 0x00
	countKBytes = 0x01
	countBlocks = 0xF1
)

// copyOp is one operation.
type copyOp struct {
	unit       *unit // whose copy manager runs it
	nexus      *Nexus
	list       uint32
	listed     bool // has a list identifier
	action     byte // service action that began it
	background bool
	ctx        context.Context
	cancel     context.CancelFunc
	done       chan struct{}

	mu       sync.Mutex // guards what follows
	status   byte
	sense    []byte
	segments uint16
	count    uint64 // bytes, or blocks where units says so
	units    byte
	steps    uint16 // OPERATION COUNTER
	token    []byte // that POPULATE TOKEN made
}

// copyLog keeps the operations of a unit, oldest first.
type copyLog struct {
	mu  sync.Mutex
	ops []*copyOp
}

// operate carries an operation out: in the command, or behind it.
func (t *Task) operate(o *copyOp, body func(*copyOp) error) error {
	o.unit, o.nexus, o.done = t.unit, t.Nexus, make(chan struct{})
	parent := context.Context(t.ctx)
	o.status = copyForeground
	if o.background {
		parent, o.status = context.Background(), copyBackground
	}
	o.ctx, o.cancel = context.WithCancel(parent)
	if err := t.unit.copies.begin(o); err != nil {
		o.cancel()
		return err
	}
	if !o.background {
		return o.run(body)
	}
	go o.run(body)
	return nil
}

func (o *copyOp) run(body func(*copyOp) error) error {
	defer close(o.done)
	defer o.cancel()
	err := body(o)
	if err != nil && errors.Is(o.ctx.Err(), context.Canceled) {
		// Who ended it without ending its command must be able to tell from the status.
		err = &sense{key: keyCopyAborted, code: ascNone}
		o.end(copyTerminated, err)
	} else if err != nil {
		o.end(copyFailed, err)
	} else {
		o.end(copyDone, nil)
	}
	return err
}

func (o *copyOp) end(status byte, err error) {
	o.mu.Lock()
	if o.status != copyPartial {
		o.status = status
	}
	if err != nil {
		o.status = status
		if _, s := toStatus(err); s != nil {
			o.sense = s.encode(nil, false)
		}
	}
	o.mu.Unlock()
	if !o.listed {
		o.unit.copies.drop(func(x *copyOp) bool { return x == o })
	}
}

// add tells of progress.
func (o *copyOp) add(n uint64) {
	o.mu.Lock()
	o.count += n
	o.steps++
	o.mu.Unlock()
}

func (o *copyOp) segmentDone() {
	o.mu.Lock()
	o.segments++
	o.mu.Unlock()
}

func (o *copyOp) partial() {
	o.mu.Lock()
	o.status = copyPartial
	o.mu.Unlock()
}

func (o *copyOp) running() bool {
	select {
	case <-o.done:
		return false
	default:
		return true
	}
}

// begin enters o. A list identifier in use is refused as SPC-4 5.17.4.2 asks, too many operations with
// TASK SET FULL.
func (l *copyLog) begin(o *copyOp) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if o.nexus.done.Load() || o.unit.gone() {
		return errAborted // whoever ends them looked here before
	}
	background, victim := 0, -1
	for i, x := range l.ops {
		running := x.running()
		switch {
		case running && x.background:
			background++
		case !running && victim < 0:
			victim = i
		}
		if o.listed && x.listed && x.nexus == o.nexus && x.list == o.list {
			if running {
				return illegal(ascOperationInProgress)
			}
			victim = i
		}
	}
	full := len(l.ops) >= maxCopyOps && victim < 0
	if full || o.background && background >= maxBackground {
		return statusError(StatusTaskSetFull)
	}
	if victim >= 0 && (len(l.ops) >= maxCopyOps || l.ops[victim].is(o.nexus, o.list)) {
		l.ops = append(l.ops[:victim], l.ops[victim+1:]...)
	}
	l.ops = append(l.ops, o)
	return nil
}

func (o *copyOp) is(n *Nexus, list uint32) bool { return o.listed && o.nexus == n && o.list == list }

// find returns the operation of a nexus with a list identifier, or nil.
func (l *copyLog) find(n *Nexus, list uint32) *copyOp {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, o := range l.ops {
		if o.is(n, list) {
			return o
		}
	}
	return nil
}

func (l *copyLog) drop(match func(*copyOp) bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	kept := l.ops[:0]
	for _, o := range l.ops {
		if !match(o) {
			kept = append(kept, o)
		}
	}
	clear(l.ops[len(kept):])
	l.ops = kept
}

// stop ends the operations that match picks and waits for them.
func (l *copyLog) stop(match func(*copyOp) bool) {
	l.mu.Lock()
	var stopped []*copyOp
	for _, o := range l.ops {
		if match(o) {
			o.cancel()
			stopped = append(stopped, o)
		}
	}
	l.mu.Unlock()
	for _, o := range stopped {
		<-o.done
	}
}

// copyOperationAbort is COPY OPERATION ABORT (SPC-4 6.3): it ends an operation of this nexus.
func copyOperationAbort(t *Task) error {
	o := t.unit.copies.find(t.Nexus, uint32(t.be32(2)))
	if o == nil || !o.running() {
		return badCDB(2, 7)
	}
	o.cancel()
	select {
	case <-o.done:
	case <-t.ctx.Done():
		return errAborted
	}
	return nil
}
