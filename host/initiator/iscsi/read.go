package iscsi

import (
	"encoding/binary"
	"fmt"
	"time"
)

// read is the reader goroutine: it takes one PDU after the other until the connection or the
// target's sanity ends.
func (s *Session) read() {
	var h Header
	for {
		err := readHeader(s.br, &h, s.par.digests, maxRecvBytes)
		if err == nil {
			s.received.Store(int64(time.Since(s.start)))
			err = s.take(&h)
		}
		if err != nil {
			s.Kill(fmt.Errorf("receive: %w", err))
			return
		}
	}
}

// take handles one PDU whose data is still to be read.
func (s *Session) take(h *Header) error {
	if h.Opcode() == OpDataIn {
		return s.takeDataIn(h)
	}
	n := h.DataLength()
	if n > maxControlBytes {
		return fmt.Errorf("%w: opcode %#02x with %d bytes of data", ErrProtocol, h.Opcode(), n)
	}
	data := s.scratch[:min(n, len(s.scratch))]
	if n > len(data) {
		data = make([]byte, n)
	}
	if err := readData(s.br, data, s.par.digests); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if h.Opcode() != OpR2T && !(h.Opcode() == OpNopIn && h.TaskTag() == reservedTag) {
		if err := s.checkStatSN(h.Word(24)); err != nil {
			return err
		}
	}
	s.openWindow(h.Word(28), h.Word(32))
	switch h.Opcode() {
	case OpResponse:
		return s.takeResponse(h, data)
	case OpR2T:
		return s.takeR2T(h)
	case OpNopIn:
		return s.takeNopIn(h, data)
	case OpTaskResponse, OpLogoutResponse:
		t := s.lookup(h.TaskTag())
		if t == nil || t.expect != h.Opcode() {
			return fmt.Errorf("%w: response %#02x to nothing", ErrProtocol, h.Opcode())
		}
		t.result = h[2]
		s.finish(t, nil)
		return nil
	case OpAsync:
		if event := h[36]; event != 0 { // 0: SCSI event, which the next command's sense tells too
			return fmt.Errorf("%w: target ends the session, event %d", ErrSessionLost, event)
		}
		return nil
	case OpReject:
		return fmt.Errorf("%w: target rejects a PDU, reason %#02x", ErrProtocol, h[2])
	}
	return fmt.Errorf("%w: opcode %#02x", ErrProtocol, h.Opcode())
}

// checkStatSN refuses a gap: at error recovery level 0 a lost status cannot be asked for. mu is held.
func (s *Session) checkStatSN(sn uint32) error {
	if sn != s.expStatSN {
		return fmt.Errorf("%w: StatSN %d, expected %d", ErrProtocol, sn, s.expStatSN)
	}
	s.expStatSN++
	return nil
}

// openWindow takes over ExpCmdSN and MaxCmdSN (RFC 7143 4.2.2.1). mu is held.
func (s *Session) openWindow(exp, max uint32) {
	if serialLess(max, exp-1) {
		return
	}
	if serialLess(s.expCmdSN, exp) {
		s.expCmdSN = exp
	}
	if serialLess(s.maxCmdSN, max) {
		s.maxCmdSN = max
		close(s.window)
		s.window = make(chan struct{})
	}
}

// takeDataIn reads the data straight into the caller's buffer. That is safe without mu: the task
// is over only by this goroutine, or after it ended.
func (s *Session) takeDataIn(h *Header) error {
	n, offset := h.DataLength(), h.Word(40)
	s.mu.Lock()
	t := s.lookup(h.TaskTag())
	switch {
	case t == nil || t.cmd == nil || t.over:
		s.mu.Unlock()
		return fmt.Errorf("%w: Data-In for nothing", ErrProtocol)
	case offset != uint32(t.in) || n > len(t.cmd.In)-t.in || h.Word(36) != t.dataSN:
		s.mu.Unlock()
		return fmt.Errorf("%w: Data-In %d of %d bytes at %d; expected %d at %d, %d bytes are left", ErrProtocol, h.Word(36), n, offset, t.dataSN, t.in, len(t.cmd.In)-t.in)
	}
	t.dataSN++
	dst := t.cmd.In[t.in : t.in+n]
	s.mu.Unlock()

	if err := readData(s.br, dst, s.par.digests); err != nil {
		return err
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	t.in += n
	s.openWindow(h.Word(28), h.Word(32))
	if h[1]&flagStatus == 0 {
		return nil
	}
	if err := s.checkStatSN(h.Word(24)); err != nil {
		return err
	}
	return s.complete(t, h, h[3])
}

// takeResponse ends a command. data is its sense, after a length of 2 bytes. mu is held.
func (s *Session) takeResponse(h *Header, data []byte) error {
	t := s.lookup(h.TaskTag())
	if t == nil || t.cmd == nil || t.over {
		return fmt.Errorf("%w: response to nothing", ErrProtocol)
	}
	if h[2] != 0 {
		return fmt.Errorf("%w: command failed at the target, response %#02x", ErrProtocol, h[2])
	}
	if len(data) >= 2 {
		n := min(int(binary.BigEndian.Uint16(data)), len(data)-2, maxSenseBytes)
		t.cmd.Sense = t.cmd.senseBuf[:copy(t.cmd.senseBuf[:], data[2:2+n])]
	}
	return s.complete(t, h, h[3])
}

// complete checks that a good read is whole: what the target did not send it must have declared as
// residual, else the caller would take its old buffer for data. mu is held.
func (s *Session) complete(t *task, h *Header, status byte) error {
	c := t.cmd
	c.Status, c.Transferred = status, t.in
	if status == StatusGood && len(c.In) > 0 {
		missing := len(c.In) - t.in
		if h[1]&flagUnderflow != 0 {
			missing -= int(min(h.Word(44), 1<<30))
		}
		if missing != 0 {
			return fmt.Errorf("%w: good read of %d bytes with %d, flags %#02x, residual %d", ErrProtocol, len(c.In), t.in, h[1], h.Word(44))
		}
	}
	s.finish(t, nil)
	return nil
}

// takeR2T queues the data that the target asks for; the sender writes it. Data sequences in order were
// negotiated, so each R2T begins where the one before ended: no byte is asked for twice, and what a
// command may queue is bounded by its length. Whether the one before was served cannot be asked here: its
// answer may come before the writer is back from the socket. mu is held.
func (s *Session) takeR2T(h *Header) error {
	t := s.lookup(h.TaskTag())
	offset, length := int(h.Word(40)), int(h.Word(44))
	switch {
	case t == nil || t.cmd == nil:
		return fmt.Errorf("%w: R2T for nothing", ErrProtocol)
	case t.over:
		return nil
	case h.Word(36) != t.r2tSN || h.Word(20) == reservedTag:
		return fmt.Errorf("%w: R2T %d, expected %d", ErrProtocol, h.Word(36), t.r2tSN)
	case length == 0 || length > s.par.maxBurst || offset != t.out || length > len(t.cmd.Out)-offset:
		return fmt.Errorf("%w: R2T for %d bytes at %d of a command with %d, %d of them sent", ErrProtocol, length, offset, len(t.cmd.Out), t.out)
	}
	t.r2tSN++
	s.enqueueData(t, h.Word(20), offset, offset+length)
	s.wakeSender()
	return nil
}

// takeNopIn takes the answer to a ping, or answers the target's. mu is held.
func (s *Session) takeNopIn(h *Header, data []byte) error {
	if tag := h.TaskTag(); tag != reservedTag {
		t := s.lookup(tag)
		if t == nil || t.expect != OpNopIn {
			return fmt.Errorf("%w: NOP-In to nothing", ErrProtocol)
		}
		s.finish(t, nil)
		return nil
	}
	if h.Word(20) == reservedTag {
		return nil // it tells MaxCmdSN, and asks for nothing
	}
	if s.answers == maxPendingAnswers {
		return fmt.Errorf("%w: %d NOP-Ins wait for an answer", ErrProtocol, s.answers)
	}
	s.answers++
	var out Header
	out[0], out[1] = OpNopOut|flagImmediate, flagFinal
	copy(out[8:16], h[8:16])
	out.SetWord(16, reservedTag)
	out.SetWord(20, h.Word(20))
	s.enqueue(&out, nil, nil)
	s.queue[len(s.queue)-1].answer = true
	s.wakeSender()
	return nil
}
