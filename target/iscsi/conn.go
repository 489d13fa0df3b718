package iscsi

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// conn is a TCP connection. Its reader goroutine owns what no comment says otherwise of.
type conn struct {
	server  *Server
	nc      net.Conn
	log     *slog.Logger
	rd      reader
	send    *sendQueue
	session *session // set by login, which precedes all who read it
	params  params   // as session
	full    atomic.Bool

	firstCmdSN uint32
	cid        uint16
	text       textState
	heard      atomic.Int64 // when a PDU came last, in nanoseconds of time.Now().UnixNano()
	workers    sync.WaitGroup
	controls   atomic.Int32 // task management functions under way

	mu         sync.Mutex // guards what follows
	tasks      map[uint32]*task
	receiving  *task // the task whose data-out the reader is reading
	waiting    []*task
	writeBytes int64 // of Options.WriteMemory in use
	nextTTT    uint32
}

// maxControls bounds the task management functions under way on a connection.
const maxControls = 16

func newConn(s *Server, nc net.Conn) *conn {
	c := &conn{
		server: s, nc: nc,
		log:   s.log.With("peer", nc.RemoteAddr().String()),
		send:  newSendQueue(nc, s.opts.SendTimeout),
		tasks: make(map[uint32]*task),
	}
	c.rd = reader{conn: nc, idle: c.send.flush}
	c.heard.Store(time.Now().UnixNano())
	return c
}

// serve is the life of a connection.
func (c *conn) serve() {
	if t, ok := c.nc.(*net.TCPConn); ok {
		t.SetNoDelay(true)
	}
	err := c.login()
	if err != nil {
		if !closedByPeer(err) {
			c.server.counters.failedLogins.Add(1)
			c.log.Warn("iscsi: login failed", "error", err)
		}
	} else {
		c.full.Store(true)
		c.log = c.log.With("initiator", c.session.key.initiator, "target", c.session.key.target)
		c.log.Info("iscsi: session begins", "tsih", c.session.tsih)
		err = c.fullFeature()
	}
	c.send.flush()
	c.nc.Close()
	c.send.fail(errClosed)
	c.send.drain()
	if ss := c.session; ss != nil {
		c.server.forget(ss)
		c.workers.Wait()
		c.log.Info("iscsi: session ends", "reason", err)
	}
}

func closedByPeer(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed)
}

// errLogout ends fullFeature in good order.
var errLogout = errors.New("logout")

// fullFeature serves PDUs until the connection ends.
func (c *conn) fullFeature() error {
	var h header
	for {
		b, err := c.rd.next(headerBytes)
		if err != nil {
			return err
		}
		copy(h[:], b)
		c.heard.Store(time.Now().UnixNano())
		if err := c.pdu(&h); err != nil {
			return err
		}
	}
}

// pdu serves one PDU whose basic header has been read.
func (c *conn) pdu(h *header) error {
	if h.dataLen() > maxReceive {
		return fmt.Errorf("iscsi: data segment of %d bytes", h.dataLen())
	}
	var ahs []byte
	if n := h.ahs(); n > 0 {
		p, err := c.rd.next(n)
		if err != nil {
			return err
		}
		ahs = append(ahs, p...)
	}
	if c.params.headerDigest {
		p, err := c.rd.next(4)
		if err != nil {
			return err
		}
		if digest(h[:], ahs) != [4]byte(p) {
			// Nothing of the header can be trusted, its lengths included (7.7).
			return errors.New("iscsi: header digest error")
		}
	}
	if c.session.discovery {
		switch h.opcode() {
		case opTextReq, opLogoutReq, opNopOut:
		default:
			return c.reject(h, rejectProtocol)
		}
	}
	switch h.opcode() {
	case opCommand:
		return c.command(h, ahs)
	case opDataOut:
		return c.dataOut(h)
	case opNopOut:
		return c.nopOut(h)
	case opTaskReq:
		return c.taskManagement(h)
	case opTextReq:
		return c.textRequest(h)
	case opLogoutReq:
		return c.logout(h)
	case opSNACK:
		return c.reject(h, rejectSNACK)
	case opLoginReq:
		return errors.New("iscsi: login request in full feature phase")
	}
	return c.reject(h, rejectNotSupported)
}

// admit applies the command window to a PDU that carries a CmdSN. False: ignore the PDU.
func (c *conn) admit(h *header) (ok bool, err error) {
	ss := c.session
	exp := ss.expCmdSN.Load()
	sn := h.cmdSN()
	if h.immediate() {
		return true, nil
	}
	if before(sn, exp) || before(ss.maxCmdSN(), sn) {
		return false, nil
	}
	if sn != exp {
		// With one connection, the missing ones can never come.
		return false, fmt.Errorf("iscsi: CmdSN %d where %d is due", sn, exp)
	}
	ss.expCmdSN.Store(exp + 1)
	return true, nil
}

// data reads a small data segment, or nil for a wrong digest.
func (c *conn) data(h *header, limit int) ([]byte, error) {
	n := h.dataLen()
	if n > limit {
		return nil, fmt.Errorf("iscsi: opcode %#x with %d bytes of data", h.opcode(), n)
	}
	if n == 0 {
		return nil, nil
	}
	b := make([]byte, padded(n))
	if err := c.rd.read(b); err != nil {
		return nil, err
	}
	if c.params.dataDigest {
		p, err := c.rd.next(4)
		if err != nil {
			return nil, err
		}
		if digest(b) != [4]byte(p) {
			return nil, c.rejectNow(h, rejectDataDigest)
		}
	}
	return b[:n], nil
}

// skipData reads a data segment away.
func (c *conn) skipData(h *header) error {
	n := h.dataLen()
	if n == 0 {
		return nil
	}
	n = padded(n)
	if c.params.dataDigest {
		n += 4
	}
	return c.rd.skip(n)
}

// reject skips the PDU's data and answers Reject.
func (c *conn) reject(h *header, reason byte) error {
	if err := c.skipData(h); err != nil {
		return err
	}
	return c.rejectNow(h, reason)
}

func (c *conn) rejectNow(h *header, reason byte) error {
	c.server.counters.rejects.Add(1)
	c.log.Info("iscsi: PDU rejected", "opcode", h.opcode(), "reason", reason)
	var r header
	r[0], r[1], r[2] = opReject, 0x80, reason
	r.put32(16, noTag)
	r.setDataLen(headerBytes)
	c.sendPDU(&r, h[:], true)
	return nil
}

// nopOut answers a ping (11.18), or takes the answer to ours.
func (c *conn) nopOut(h *header) error {
	data, err := c.data(h, maxReceive)
	if err != nil {
		return err
	}
	if h.itt() == noTag {
		return nil
	}
	if ok, err := c.admit(h); !ok {
		return err
	}
	data = data[:min(len(data), c.params.maxSend)]
	var r header
	r[0], r[1] = opNopIn, 0x80
	r.put64(8, h.lun())
	r.put32(16, h.itt())
	r.put32(20, noTag)
	r.setDataLen(len(data))
	c.sendPDU(&r, data, true)
	return nil
}

// tick pings a connection that is silent, and closes it when it stays so. The server's pinger
// calls it.
func (c *conn) tick() {
	if !c.full.Load() {
		return // the login's own deadline
	}
	silent := time.Duration(time.Now().UnixNano() - c.heard.Load())
	switch {
	case silent >= 2*c.server.opts.PingAfter:
		c.log.Warn("iscsi: initiator is silent, closing")
		c.nc.Close()
	case silent >= c.server.opts.PingAfter:
		var r header
		r[0], r[1] = opNopIn, 0x80
		r.put32(16, noTag)
		r.put32(20, 1)
		c.sendUrgent(&r)
	}
}

// Events of asynchronous messages (11.9.1).
const (
	asyncLogout  = 1 // the target asks for a logout
	asyncDropAll = 3 // all connections of the session end
)

// async sends an asynchronous message; within is the third parameter, in seconds.
func (c *conn) async(event byte, within time.Duration) {
	if !c.full.Load() {
		return
	}
	var h header
	h[0], h[1] = opAsync, 0x80
	h.put32(16, noTag)
	h[36] = event
	seconds := uint16(min(max(within/time.Second, 0), 0xFFFF))
	h[42], h[43] = byte(seconds>>8), byte(seconds)
	q := c.send
	q.mu.Lock()
	c.put(&h, true)
	q.mu.Unlock()
	q.flush()
}

// logout serves 11.14. The reader ends after the answer; what is under way is aborted.
func (c *conn) logout(h *header) error {
	if err := c.skipData(h); err != nil {
		return err
	}
	if ok, err := c.admit(h); !ok {
		return err
	}
	var r header
	r[0], r[1] = opLogoutResp, 0x80
	r.put32(16, h.itt())
	response := byte(0)
	switch reason, cid := h[1]&0x7F, uint16(h[20])<<8|uint16(h[21]); {
	case reason > 2:
		return c.rejectNow(h, rejectBadField)
	case reason != 0 && cid != c.cid:
		response = 1 // there is no such connection
	case reason == 2:
		response = 2 // connection recovery needs a higher error recovery level
	}
	r[2] = response
	r[41] = byte(c.params.time2Wait)
	if c.session.nexus != nil && response == 0 {
		c.session.nexus.AbortAll()
	}
	c.sendPDU(&r, nil, true)
	if response != 0 {
		return nil
	}
	c.send.flush()
	return errLogout
}

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
		return c.rejectNow(h, rejectImmediate)
	}
	request := *h
	c.workers.Add(1)
	go func() {
		defer c.workers.Done()
		defer c.controls.Add(-1)
		var r header
		r[0], r[1], r[2] = opTaskResp, 0x80, c.control(&request)
		r.put32(16, request.itt())
		c.sendPDU(&r, nil, true)
		c.send.flush()
	}()
	return nil
}

// Task management functions (11.5.1; RFC 7144 4.1) and responses (11.6.1).
const (
	tmfAbortTask    = 1
	tmfAbortTaskSet = 2
	tmfClearACA     = 3
	tmfClearTaskSet = 4
	tmfResetUnit    = 5
	tmfWarmReset    = 6
	tmfColdReset    = 7
	tmfReassign     = 8

	tmrDone        = 0
	tmrNoTask      = 1
	tmrNoLUN       = 2
	tmrNoReassign  = 4
	tmrUnsupported = 5
)

// control carries out a task management function.
func (c *conn) control(h *header) byte {
	n, lun := c.session.nexus, h.lun()
	has := func(ok bool) byte {
		if ok {
			return tmrDone
		}
		return tmrNoLUN
	}
	switch h[1] & 0x7F {
	case tmfAbortTask:
		if !n.HasUnit(lun) {
			return tmrNoLUN
		}
		if n.AbortTask(lun, uint64(h.u32(20))) {
			return tmrDone
		}
		return tmrNoTask
	case tmfAbortTaskSet:
		return has(n.AbortTaskSet(lun))
	case tmfClearTaskSet:
		return has(n.ClearTaskSet(lun))
	case tmfResetUnit:
		return has(n.ResetUnit(lun))
	case tmfWarmReset, tmfColdReset:
		n.ResetTarget()
		return tmrDone
	case tmfReassign:
		return tmrNoReassign
	}
	return tmrUnsupported
}

// sendPDU queues a PDU that takes a StatSN where status is set. Data is copied.
func (c *conn) sendPDU(h *header, data []byte, status bool) {
	q := c.send
	q.mu.Lock()
	defer q.mu.Unlock()
	q.room()
	c.put(h, status)
	c.putData(data)
}

// sendUrgent queues a PDU of the target's own, which takes no StatSN, without waiting for room:
// there are never many.
func (c *conn) sendUrgent(h *header) {
	q := c.send
	q.mu.Lock()
	c.put(h, false)
	q.mu.Unlock()
	q.flush()
}

// sendText queues a login response, which has no digests.
func (c *conn) sendText(h *header, text []byte) {
	q := c.send
	q.mu.Lock()
	defer q.mu.Unlock()
	h.put32(24, q.statSN)
	q.statSN++
	q.small(h[:])
	q.small(text)
	q.small(zeroes[:padded(len(text))-len(text)])
}

var zeroes [4]byte

// put fills in the sequence numbers and queues the header with its digest. sendQueue.mu is held.
func (c *conn) put(h *header, status bool) {
	q := c.send
	h.put32(24, q.statSN)
	if status {
		q.statSN++
	}
	ss := c.session
	h.put32(28, ss.expCmdSN.Load())
	h.put32(32, ss.maxCmdSN())
	q.small(h[:])
	if c.params.headerDigest {
		d := digest(h[:])
		q.small(d[:])
	}
}

// putData queues a copy of a data segment. sendQueue.mu is held.
func (c *conn) putData(data []byte) {
	if len(data) == 0 {
		return
	}
	c.send.small(data)
	c.putPadding(data)
}

// putPadding queues what follows a data segment. sendQueue.mu is held.
func (c *conn) putPadding(data []byte) {
	pad := zeroes[:padded(len(data))-len(data)]
	if len(pad) > 0 {
		c.send.small(pad)
	}
	if c.params.dataDigest {
		d := digest(data, pad)
		c.send.small(d[:])
	}
}
