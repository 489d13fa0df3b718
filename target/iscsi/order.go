package iscsi

import (
	"errors"
	"sync"
	"sync/atomic"
	"time"
)

// Commands in order, over several connections (RFC 7143 4.2.2.1).
//
// An initiator numbers the commands of a session and spreads them over its connections; they go
// to the SCSI layer by their numbers, whichever comes first. With one connection they come in
// order. With several:
//
//	PDU of CmdSN n ──► n is due: ordering.mu ─► Prepare ─► ExpCmdSN = n+1 ─► n+1 is held? drain
//	       │
//	       └──► n is not due yet: the PDU, and Data-Out that follows it, is held as it came
//	                                  │
//	            drain ◄───────────────┘ serves it as if it came now, on the connection it came by
//
// ordering.mu is held from the moment a command takes its number until Prepare has put it in its
// unit's task set: that is the order of delivery. What follows (its data, the device, the answer)
// runs side by side. conn.turn makes the reader and drain take turns.
//
// A session that agreed on one connection does none of this.
//
// Rejected: a reader that waits for its command's turn. It is simpler, and what is behind that
// command waits too: the ping that must be answered, and the task management function that would
// say the missing command was given up.
//
// A hole that is not filled within Options.OrderTimeout ends the session: at error recovery level
// 0 there is no other way to fill it.

// ordering is the part of a session that puts commands in order.
type ordering struct {
	fences atomic.Int32 // functions that wait for acknowledgements

	mu       sync.Mutex // guards what follows
	moved    *sync.Cond // ExpCmdSN or an ExpStatSN rose, or a connection ended
	early    map[uint32]*early
	draining bool
	waiting  int       // functions that wait for ExpCmdSN to rise
	stuck    time.Time // since when nothing moved that somebody waits for
}

// early is a numbered PDU that came before its turn, and the Data-Out that followed it. Guarded
// by ordering.mu.
type early struct {
	conn    *conn // nil: nothing is to be served, the number is passed over
	sn, itt uint32
	pdus    [][]byte // as they came, header digests and all
	bytes   int64
}

// earlyOverhead is how much more than its unsolicited data an early command may come to.
const earlyOverhead = 64 << 10

func (o *ordering) init() {
	o.moved = sync.NewCond(&o.mu)
	o.early = make(map[uint32]*early)
}

func (o *ordering) wake() {
	o.mu.Lock()
	o.moved.Broadcast()
	o.mu.Unlock()
}

// pduInOrder serves a PDU of a session that may have several connections.
func (c *conn) pduInOrder(h *header) error {
	ss := c.session
	c.acked.Store(h.u32(28))
	if ss.fences.Load() > 0 {
		ss.wake()
	}
	c.turn.Lock()
	defer c.turn.Unlock()
	if c.isGone() {
		return errReplaced // what is in the buffer came too late
	}
	if held, err := c.hold(h); held || err != nil {
		return err
	}
	return c.pdu(h)
}

// hold keeps a PDU whose turn has not come. conn.turn is held.
func (c *conn) hold(h *header) (bool, error) {
	if h.dataLen() > maxReceive {
		return false, nil // pdu says what is wrong
	}
	ss := c.session
	e, fresh := ss.place(c, h)
	if e == nil {
		return false, nil
	}
	raw, err := c.raw(h)
	if err != nil {
		return false, err
	}
	n := int64(len(raw))
	ss.mu.Lock()
	defer ss.mu.Unlock()
	switch {
	case fresh && (ss.early[e.sn] != nil || before(e.sn, ss.expCmdSN.Load())),
		!fresh && c.early[e.itt] != e:
		return true, nil // given up meanwhile
	case e.bytes+n > int64(c.params.firstBurst)+earlyOverhead:
		return false, errors.New("iscsi: too much data for a command whose turn has not come")
	case c.server.memory.Add(n) > c.server.opts.Memory:
		c.server.memory.Add(-n)
		return false, errors.New("iscsi: no memory for a command whose turn has not come")
	}
	e.bytes += n
	e.pdus = append(e.pdus, raw)
	if fresh {
		if len(ss.early) == 0 && ss.waiting == 0 {
			ss.stuck = time.Now()
		}
		ss.early[e.sn] = e
		if h.opcode() == opCommand {
			if c.early == nil {
				c.early = make(map[uint32]*early)
			}
			c.early[e.itt] = e
		}
		ss.kick()
	}
	return true, nil
}

// place says where a PDU is to be held: with a command that is held, or at a number of its own.
// Nil: nowhere.
func (ss *session) place(c *conn, h *header) (e *early, fresh bool) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	switch h.opcode() {
	case opDataOut:
		return c.early[h.itt()], false
	case opCommand, opNopOut, opTaskReq, opTextReq, opLogoutReq:
	default:
		return nil, false
	}
	sn := h.cmdSN()
	if h.immediate() || h.itt() == noTag || !before(ss.expCmdSN.Load(), sn) || before(ss.maxCmdSN.Load(), sn) || ss.early[sn] != nil {
		return nil, false
	}
	return &early{conn: c, sn: sn, itt: h.itt()}, true
}

// raw reads the rest of a PDU as it is, and checks the header digest, without which the number
// may be wrong.
func (c *conn) raw(h *header) ([]byte, error) {
	n := headerBytes + h.ahs()
	if c.params.headerDigest {
		n += 4
	}
	checked := n
	if h.dataLen() > 0 {
		n += padded(h.dataLen())
		if c.params.dataDigest {
			n += 4
		}
	}
	raw := make([]byte, n)
	copy(raw, h[:])
	if err := c.rd.read(raw[headerBytes:]); err != nil {
		return nil, err
	}
	if c.params.headerDigest && digest(raw[:checked-4]) != [4]byte(raw[checked-4:]) {
		return nil, errHeaderDigest
	}
	return raw, nil
}

// admitInOrder is admit. Where it admits a command it leaves ordering.mu locked: delivered is due.
func (c *conn) admitInOrder(h *header) bool {
	if h.immediate() {
		return true
	}
	ss := c.session
	ss.mu.Lock()
	sn := h.cmdSN()
	if sn != ss.expCmdSN.Load() || before(ss.maxCmdSN.Load(), sn) || ss.early[sn] != c.replaying {
		ss.mu.Unlock()
		return false // out of the window, or here already
	}
	ss.take(sn)
	if h.opcode() == opCommand {
		c.delivering = true
		return true
	}
	ss.maxCmdSN.Add(1)
	ss.kick()
	ss.mu.Unlock()
	return true
}

// delivered ends what admitInOrder began: the command is in its task set, or never will be.
func (c *conn) delivered() {
	if !c.delivering {
		return
	}
	c.delivering = false
	c.session.kick()
	c.session.mu.Unlock()
}

// take passes the number that is due. ordering.mu is held.
func (ss *session) take(sn uint32) {
	delete(ss.early, sn)
	ss.expCmdSN.Store(sn + 1)
	if len(ss.early) > 0 || ss.waiting > 0 {
		ss.stuck = time.Now()
		ss.moved.Broadcast()
	}
}

// kick has the PDU served whose turn has come, if it is here. ordering.mu is held.
func (ss *session) kick() {
	if !ss.draining && ss.early[ss.expCmdSN.Load()] != nil {
		ss.draining = true
		ss.server.wg.Add(1)
		go ss.drain()
	}
}

// drain serves held PDUs as long as the next one is here.
func (ss *session) drain() {
	defer ss.server.wg.Done()
	ss.mu.Lock()
	defer ss.mu.Unlock()
	for {
		sn := ss.expCmdSN.Load()
		e := ss.early[sn]
		if e == nil {
			ss.draining = false
			return
		}
		c := e.conn
		if c == nil {
			ss.take(sn)
			ss.maxCmdSN.Add(1)
			continue
		}
		ss.mu.Unlock()
		c.replay(e)
		ss.mu.Lock()
		if ss.early[sn] == e {
			ss.void(sn) // it was not even admitted
		}
	}
}

// replay serves a held PDU and its Data-Out.
func (c *conn) replay(e *early) {
	c.turn.Lock()
	err := c.replayAll(e)
	c.turn.Unlock()
	c.send.flush()
	switch {
	case errors.Is(err, errLogout):
		c.send.drain()
		c.end()
	case err != nil:
		c.log.Warn("iscsi: closing", "error", err)
		c.nc.Close()
	}
}

func (c *conn) replayAll(e *early) error {
	ss := c.session
	ss.mu.Lock()
	pdus := e.pdus
	ss.mu.Unlock()
	c.replaying = e
	defer func() {
		c.replaying, c.rd = nil, &c.socket
		ss.mu.Lock()
		c.release(e)
		ss.mu.Unlock()
	}()
	for _, raw := range pdus {
		held := newHeldReader(raw)
		c.rd = &held
		b, err := held.next(headerBytes)
		if err != nil {
			return err
		}
		h := header(b)
		if err := c.pdu(&h); err != nil {
			return err
		}
	}
	return nil
}

// release lets go of what a held PDU took. ordering.mu is held.
func (c *conn) release(e *early) {
	if c.early[e.itt] == e {
		delete(c.early, e.itt)
	}
	c.server.memory.Add(-e.bytes)
	e.bytes, e.pdus = 0, nil
}

// void has a number passed over: what it stood for has been given up. ordering.mu is held.
func (ss *session) void(sn uint32) {
	if e := ss.early[sn]; e != nil && e.conn != nil {
		e.conn.release(e)
	}
	if len(ss.early) == 0 && ss.waiting == 0 {
		ss.stuck = time.Now()
	}
	ss.early[sn] = &early{sn: sn}
	ss.kick()
}

// forsake gives up what a connection that ends has held. The numbers count as received, or the
// commands of the other connections would wait for them.
func (ss *session) forsake(c *conn) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	for sn, e := range ss.early {
		if e.conn == c {
			ss.void(sn)
		}
	}
	ss.moved.Broadcast()
}

// await returns when every number before sn has come, or, false, when c has ended.
func (ss *session) await(c *conn, sn uint32) bool {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if len(ss.early) == 0 && ss.waiting == 0 {
		ss.stuck = time.Now()
	}
	ss.waiting++
	for before(ss.expCmdSN.Load(), sn) && !c.isGone() {
		ss.moved.Wait()
	}
	ss.waiting--
	return !c.isGone()
}

// plug gives up every number before sn that has not come.
func (ss *session) plug(sn uint32) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	for n := ss.expCmdSN.Load(); before(n, sn); n++ {
		if ss.early[n] == nil {
			ss.void(n)
		}
	}
}

// giveUp gives up a command that has not been delivered: the one held with that task tag, or the
// number ref, where it is in the window before the function's own and has not come (11.6.1).
func (ss *session) giveUp(itt, ref, upTo uint32) bool {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	for sn, e := range ss.early {
		if e.conn != nil && e.itt == itt {
			ss.void(sn)
			return true
		}
	}
	if before(ref, ss.expCmdSN.Load()) || !before(ref, upTo) || before(ss.maxCmdSN.Load(), ref) {
		return false
	}
	if ss.early[ref] == nil {
		ss.void(ref)
	}
	return true
}

// overdue says that the session waits for a command that does not come.
func (ss *session) overdue(now time.Time) bool {
	if !ss.shared {
		return false
	}
	ss.mu.Lock()
	defer ss.mu.Unlock()
	ss.moved.Broadcast() // fences look at their time
	return (len(ss.early) > 0 || ss.waiting > 0) && now.Sub(ss.stuck) > ss.server.opts.OrderTimeout
}

// fence returns when the initiator has acknowledged what was sent on the session's connections
// other than c, so that the response which follows on c comes to it last (4.2.2.3).
func (ss *session) fence(c *conn) {
	if !ss.shared {
		return
	}
	type mark struct {
		conn *conn
		sn   uint32
	}
	var marks []mark
	ss.server.mu.Lock()
	others := ss.connections()
	ss.server.mu.Unlock()
	ss.fences.Add(1)
	defer ss.fences.Add(-1)
	for _, o := range others {
		if o == c || !o.full.Load() {
			continue
		}
		o.settle()
		o.send.mu.Lock()
		sn := o.send.statSN
		o.send.mu.Unlock()
		if before(o.acked.Load(), sn) {
			marks = append(marks, mark{o, sn})
			o.ping()
		}
	}
	until := time.Now().Add(ss.server.opts.OrderTimeout)
	ss.mu.Lock()
	defer ss.mu.Unlock()
	for len(marks) > 0 && !c.isGone() && time.Now().Before(until) {
		if m := marks[0]; m.conn.isGone() || !before(m.conn.acked.Load(), m.sn) {
			marks = marks[1:]
			continue
		}
		ss.moved.Wait()
	}
}
