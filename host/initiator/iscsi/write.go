package iscsi

import (
	"context"
	"fmt"
)

// Statuses of SAM-5 5.3.1 that callers branch on.
const (
	StatusGood                = 0x00
	StatusCheckCondition      = 0x02
	StatusBusy                = 0x08
	StatusReservationConflict = 0x18
	StatusTaskSetFull         = 0x28
	StatusTaskAborted         = 0x40
)

// Do executes c and returns nil when the target answered, whatever the status. Otherwise the error
// is ErrSessionLost (the outcome is unknown), ErrReset, ctx's (the command was aborted; a write may be done
// in part), or ErrConfig. A cancelled ctx makes Do abort the command and wait for the answer, for
// PingTimeout at most; then it ends the session.
func (s *Session) Do(ctx context.Context, c *Command) error {
	if len(c.In) > 0 && len(c.Out) > 0 || len(c.In) > maxTransferBytes || len(c.Out) > maxTransferBytes {
		return fmt.Errorf("%w: a command that moves %d bytes out and %d in", ErrConfig, len(c.Out), len(c.In))
	}
	c.Status, c.Sense, c.Transferred = 0, nil, 0
	select {
	case s.slots <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	case <-s.closing:
		return s.lost()
	}
	defer func() { <-s.slots }()
	t, err := s.submit(ctx, c)
	if err != nil {
		return err
	}
	select {
	case <-t.done:
	case <-ctx.Done():
		s.abort(ctx, t)
	}
	err = t.err
	taskPool.Put(t)
	return err
}

// lost waits until the session is really over, so that the caller's next step does not meet its remains.
func (s *Session) lost() error {
	<-s.dead
	return fmt.Errorf("%w: %s: %w", ErrSessionLost, s.cfg.Portal, s.Err())
}

// submit numbers the command when the window allows it, and sends it.
func (s *Session) submit(ctx context.Context, c *Command) (*task, error) {
	s.mu.Lock()
	for s.err == nil && serialLess(s.maxCmdSN, s.cmdSN) {
		window := s.window
		s.mu.Unlock()
		select {
		case <-window:
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-s.closing:
		}
		s.mu.Lock()
	}
	if s.err != nil {
		s.mu.Unlock()
		return nil, s.lost()
	}
	t := s.newTask(OpResponse)
	if t == nil { // the table holds an entry for each slot and its abort
		panic("iscsi: task table exhausted")
	}
	t.cmd, t.sn = c, s.cmdSN
	s.enqueueCommand(t)
	s.cmdSN++
	s.flush(inlineRounds)
	s.mu.Unlock()
	return t, nil
}

// enqueueCommand queues the command PDU with immediate data, and the unsolicited data after it
// (RFC 7143 4.2.5.2). mu is held.
func (s *Session) enqueueCommand(t *task) {
	c := t.cmd
	var h Header
	h[0], h[1] = OpCommand, flagFinal|attrSimple
	h.SetLUN(c.LUN)
	h.SetWord(16, t.tag)
	h.SetWord(20, uint32(len(c.In)+len(c.Out)))
	h.SetWord(24, t.sn)
	copy(h[32:], c.CDB[:])
	if len(c.In) > 0 {
		h[1] |= flagRead
	}
	if len(c.Out) == 0 {
		s.enqueue(&h, nil, nil)
		return
	}
	h[1] |= flagWrite
	burst := min(len(c.Out), s.par.firstBurst)
	immediate := 0
	if s.par.immediate {
		immediate = min(burst, s.par.maxSend)
	}
	if s.par.initialR2T {
		burst = immediate
	}
	if immediate < burst {
		h[1] &^= flagFinal // unsolicited Data-Out follows
	}
	s.enqueue(&h, c.Out[:immediate], t)
	s.enqueueData(t, reservedTag, immediate, burst)
}

// enqueueData queues the Data-Out PDUs that carry Out[from:to] as one sequence. mu is held.
func (s *Session) enqueueData(t *task, transferTag uint32, from, to int) {
	t.out = to
	for sn := uint32(0); from < to; sn++ {
		n := min(to-from, s.par.maxSend)
		var h Header
		h[0] = OpDataOut
		if from+n == to {
			h[1] = flagFinal
		}
		h.SetLUN(t.cmd.LUN)
		h.SetWord(16, t.tag)
		h.SetWord(20, transferTag)
		h.SetWord(36, sn)
		h.SetWord(40, uint32(from))
		s.enqueue(&h, t.cmd.Out[from:from+n], t)
		from += n
	}
}

// Task management functions (RFC 7143 11.5.1) and their responses (11.6.1).
const (
	functionAbortTask = 1
	functionLUReset   = 5

	taskComplete = 0
	taskUnknown  = 1
)

// abort ends t whose caller went away, and returns when t is done.
func (s *Session) abort(ctx context.Context, t *task) {
	limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.cfg.PingTimeout)
	defer cancel()
	var h Header
	h[0], h[1] = OpTaskRequest|flagImmediate, flagFinal|functionAbortTask
	h.SetLUN(t.cmd.LUN)
	h.SetWord(20, t.tag)
	h.SetWord(32, t.sn)
	result, err := s.manage(limit, &h, OpTaskResponse)
	if err != nil || result != taskComplete && result != taskUnknown {
		s.Kill(fmt.Errorf("%w: abort of a command: response %d, %v", ErrTask, result, err))
		<-t.done
		return
	}
	// The target answers the command before the abort, or never.
	s.mu.Lock()
	if s.lookup(t.tag) == t {
		s.finish(t, ctx.Err())
	}
	s.mu.Unlock()
	<-t.done
}

// ResetLUN ends every command of every initiator on the LUN (LOGICAL UNIT RESET), and returns when
// the target says that none of them runs any more.
func (s *Session) ResetLUN(ctx context.Context, lun uint16) error {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.CommandTimeout)
	defer cancel()
	var h Header
	h[0], h[1] = OpTaskRequest|flagImmediate, flagFinal|functionLUReset
	h.SetLUN(lun)
	h.SetWord(20, reservedTag)
	s.mu.Lock()
	before := s.cmdSN // on the wire before the reset, or queued before it
	s.mu.Unlock()
	result, err := s.manage(ctx, &h, OpTaskResponse)
	if err != nil {
		return err
	}
	if result != taskComplete {
		return fmt.Errorf("%w: reset of LUN %d: response %d", ErrTask, lun, result)
	}
	// Without TAS the target answers none of the commands that it ended (SAM-5 5.3.1). Those that
	// were numbered while the request was on its way are answered, or time out.
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range s.tasks {
		if t != nil && t.cmd != nil && t.cmd.LUN == lun && serialLess(t.sn, before) {
			s.finish(t, ErrReset)
		}
	}
	return nil
}

// manage sends an immediate request and waits for its response. A request that ctx gives up
// leaves a tag that the target may still answer, so the session ends.
func (s *Session) manage(ctx context.Context, h *Header, expect byte) (result byte, err error) {
	s.mu.Lock()
	if s.err != nil {
		s.mu.Unlock()
		return 0, s.lost()
	}
	t := s.newTask(expect)
	if t == nil {
		s.mu.Unlock()
		return 0, fmt.Errorf("%w: too many requests", ErrTask)
	}
	h.SetWord(16, t.tag)
	s.enqueue(h, nil, nil)
	s.wakeSender()
	s.mu.Unlock()
	select {
	case <-t.done:
	case <-ctx.Done():
		s.Kill(fmt.Errorf("%w: request %#02x: %w", ErrTimeout, h.Opcode(), ctx.Err()))
		<-t.done
	}
	result, err = t.result, t.err
	taskPool.Put(t)
	return result, err
}
