package raid

import (
	"fmt"
	"sync/atomic"
	"time"
)

// member is one drive of the array. state is guarded by Array.mu.
type member struct {
	index int
	id    UUID
	drive Drive // nil: absent
	state MemberState
	// queue bounds the I/Os in flight.
	queue chan struct{}
	// stuck counts I/Os that were given up on and have not come back. While there are any, reads go round the
	// member where parity allows.
	stuck atomic.Int32

	readErrors, writeErrors, timeouts, checksumErrors, staleStrips, repairs atomic.Uint64
}

func newMember(index int, drive Drive, depth int) *member {
	m := &member{index: index, drive: drive, state: Missing, queue: make(chan struct{}, depth)}
	return m
}

func (m *member) String() string {
	if m.drive == nil {
		return fmt.Sprintf("member %d", m.index)
	}
	return fmt.Sprintf("member %d (%s)", m.index, m.drive.Name())
}

type opKind uint8

const (
	opRead opKind = iota
	opWrite
	opFlush
	opCall
)

// Outcomes of an op. It leaves opPending once, by whoever is first: the drive, or the waiter's patience.
const (
	opPending = iota
	opDone
	opAbandoned
)

// op is one I/O of one member. A batch of them runs in parallel; see batch.
type op struct {
	kind   opKind
	member *member
	strip  int     // for the caller
	buf    *buffer // holds b; the op has its own reference
	b      []byte
	off    int64
	call   func(Drive) error // opCall

	result  error // the drive's; valid in opDone
	outcome atomic.Int32
}

// err is the op's result after its batch ran.
func (o *op) err() error {
	if o.outcome.Load() == opAbandoned {
		return fmt.Errorf("raid: %v: %w", o.member, ErrTimeout)
	}
	return o.result
}

// batch runs I/Os of several members in parallel and waits for them, but no longer than a limit: a drive that
// hangs must not hang the array. An op that is given up on keeps its goroutine and its buffer until the drive
// answers; Array.Close waits for those too. Their number is bounded: by queue, and because an op that has not
// got its place in the queue yet leaves when it is given up on.
type batch struct {
	a   *Array
	ops []*op
}

func (a *Array) newBatch() *batch { return &batch{a: a} }

// read plans a read of len(b) bytes, a part of buf.
func (t *batch) read(m *member, strip int, buf *buffer, b []byte, off int64) {
	t.ops = append(t.ops, &op{kind: opRead, member: m, strip: strip, buf: buf.hold(), b: b, off: off})
}

func (t *batch) write(m *member, strip int, buf *buffer, b []byte, off int64) {
	t.ops = append(t.ops, &op{kind: opWrite, member: m, strip: strip, buf: buf.hold(), b: b, off: off})
}

func (t *batch) flush(m *member) {
	t.ops = append(t.ops, &op{kind: opFlush, member: m})
}

func (t *batch) call(m *member, f func(Drive) error) {
	t.ops = append(t.ops, &op{kind: opCall, member: m, call: f})
}

func (t *batch) run(limit time.Duration) {
	if len(t.ops) == 0 {
		return
	}
	var (
		left atomic.Int32
		done = make(chan struct{})
		quit = make(chan struct{})
	)
	left.Store(int32(len(t.ops)))
	t.a.ios.Add(len(t.ops))
	for _, o := range t.ops {
		go func() {
			defer t.a.ios.Done()
			o.perform(quit)
			if left.Add(-1) == 0 {
				close(done)
			}
		}()
	}
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-done:
		return
	case <-timer.C:
	}
	for _, o := range t.ops {
		// stuck rises before the outcome is set, so that it never falls below zero.
		o.member.stuck.Add(1)
		if o.outcome.CompareAndSwap(opPending, opAbandoned) {
			o.member.timeouts.Add(1)
		} else {
			o.member.stuck.Add(-1)
		}
	}
	close(quit)
}

func (o *op) perform(quit <-chan struct{}) {
	err := func() error {
		select {
		case o.member.queue <- struct{}{}:
			defer func() { <-o.member.queue }()
		case <-quit:
			return ErrTimeout
		}
		return o.drive()
	}()
	if o.buf != nil {
		defer o.buf.release()
	}
	o.result = err
	if !o.outcome.CompareAndSwap(opPending, opDone) {
		o.member.stuck.Add(-1)
		return
	}
	if err == nil {
		return
	}
	if o.kind == opRead {
		o.member.readErrors.Add(1)
	} else {
		o.member.writeErrors.Add(1)
	}
}

func (o *op) drive() error {
	d := o.member.drive
	var (
		n   = len(o.b)
		err error
		did string
	)
	switch o.kind {
	case opRead:
		did = "read"
		n, err = d.ReadAt(o.b, o.off)
	case opWrite:
		did = "write"
		n, err = d.WriteAt(o.b, o.off)
	case opFlush:
		did = "flush"
		err = d.Flush()
	case opCall:
		return o.call(d)
	}
	if err == nil && n != len(o.b) {
		err = fmt.Errorf("%d bytes of %d", n, len(o.b))
	}
	if err != nil {
		return fmt.Errorf("raid: %v: %s %d bytes at %d: %w", o.member, did, len(o.b), o.off, err)
	}
	return nil
}
