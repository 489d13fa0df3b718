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
	// vector is drive, where it is one; else nil.
	vector VectorWriter
	state  MemberState
	// queue bounds the I/Os in flight.
	queue chan struct{}
	// stuck counts I/Os that were given up on and have not come back. While there are any, reads go round the
	// member where parity allows.
	stuck atomic.Int32
	// waiting counts the I/Os that wait for a place in the queue, or have one.
	waiting atomic.Int32
	// suspect: reads go round it; see suspect.go, which has the account.
	suspect atomic.Bool
	account account
	// late counts reads that were hedged and have not come back.
	late atomic.Int32
	// latencies of reads.
	latencies latencies

	readErrors, writeErrors, timeouts, checksumErrors, staleStrips, repairs, hedges atomic.Uint64
}

func newMember(index int, drive Drive, depth int) *member {
	m := &member{index: index, drive: drive, state: Missing, queue: make(chan struct{}, depth)}
	m.vector, _ = drive.(VectorWriter)
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
	opVector
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
	bufs   [][]byte          // opVector
	call   func(Drive) error // opCall

	result  error // the drive's; valid in opDone
	outcome atomic.Int32
	tardy   tardy
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
	// hedge: what is given up on is late, not stuck.
	hedge bool
}

func (a *Array) newBatch() *batch { return &batch{a: a} }

// read plans a read of len(b) bytes, a part of buf.
func (t *batch) read(m *member, strip int, buf *buffer, b []byte, off int64) {
	t.ops = append(t.ops, &op{kind: opRead, member: m, strip: strip, buf: buf.hold(), b: b, off: off})
}

func (t *batch) write(m *member, strip int, buf *buffer, b []byte, off int64) {
	t.ops = append(t.ops, &op{kind: opWrite, member: m, strip: strip, buf: buf.hold(), b: b, off: off})
}

// writeVector plans a write of several buffers; buf, held for them, is one of them.
func (t *batch) writeVector(m *member, strip int, buf *buffer, bufs [][]byte, off int64) {
	t.ops = append(t.ops, &op{kind: opVector, member: m, strip: strip, buf: buf.hold(), bufs: bufs, off: off})
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
		o.member.waiting.Add(1)
		go func() {
			defer t.a.ios.Done()
			defer o.member.waiting.Add(-1)
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
		o.tardy.abandon(o.member, &o.outcome, t.hedge, t.a.opts.ReadTimeout-limit)
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
		o.tardy.answered(o.member)
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
		bytes = len(o.b)
		n     = bytes
		err   error
		did   string
	)
	switch o.kind {
	case opRead:
		return o.member.read(o.b, o.off)
	case opWrite:
		did = "write"
		n, err = d.WriteAt(o.b, o.off)
	case opVector:
		did, bytes = "write", 0
		for _, b := range o.bufs {
			bytes += len(b)
		}
		n, err = o.member.vector.WriteVAt(o.bufs, o.off)
	case opFlush:
		did = "flush"
		err = d.Flush()
	case opCall:
		return o.call(d)
	}
	if err == nil && n != bytes {
		err = fmt.Errorf("%d bytes of %d", n, bytes)
	}
	if err != nil {
		return fmt.Errorf("raid: %v: %s %d bytes at %d: %w", o.member, did, bytes, o.off, err)
	}
	return nil
}

// read fills p, or says which member did not.
func (m *member) read(p []byte, off int64) error {
	n, err := m.drive.ReadAt(p, off)
	if err == nil && n != len(p) {
		err = fmt.Errorf("%d bytes of %d", n, len(p))
	}
	if err != nil {
		return fmt.Errorf("raid: %v: read %d bytes at %d: %w", m, len(p), off, err)
	}
	return nil
}

// tardy is what becomes of an I/O that is given up on. Its member is stuck until it answers; of a read that was hedged only if
// it does not answer for ReadTimeout, and late before.
type tardy struct {
	hedged bool // set before opAbandoned
	state  atomic.Int32
}

// States of a tardy read that was hedged.
const (
	tardyLate = iota
	tardyStuck
	tardyAnswered
)

// abandon gives an I/O up, unless it is through. rest is what is left of ReadTimeout.
func (t *tardy) abandon(m *member, outcome *atomic.Int32, hedge bool, rest time.Duration) bool {
	// The count rises before the outcome is set, so that it never falls below zero.
	count := &m.stuck
	if hedge {
		count = &m.late
	}
	count.Add(1)
	t.hedged = hedge
	if !outcome.CompareAndSwap(opPending, opAbandoned) {
		count.Add(-1)
		return false
	}
	if !hedge {
		m.timeouts.Add(1)
		return true
	}
	m.hedges.Add(1)
	time.AfterFunc(rest, func() {
		m.stuck.Add(1)
		if t.state.CompareAndSwap(tardyLate, tardyStuck) {
			m.timeouts.Add(1)
		} else {
			m.stuck.Add(-1)
		}
	})
	return true
}

// answered drops an answer that nobody waits for any more.
func (t *tardy) answered(m *member) {
	if t.hedged {
		m.late.Add(-1)
		if t.state.CompareAndSwap(tardyLate, tardyAnswered) {
			return
		}
	}
	m.stuck.Add(-1)
}
