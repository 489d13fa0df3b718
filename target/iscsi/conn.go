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

	"github.com/ledge-storage/ledge/target/spin"
)

// conn is a TCP connection. Its reader goroutine owns what no comment says otherwise of.
type conn struct {
	server  *Server
	nc      net.Conn
	log     *slog.Logger
	socket  reader
	rd      *reader // what PDUs are read from: socket, or the memory of one that was held
	send    *sendQueue
	evicted bool     // guarded by Server.mu
	session *session // set by login, which precedes all who read it
	params  params   // as session
	full    atomic.Bool

	firstCmdSN uint32
	cid        uint16
	text       textState
	heard      atomic.Int64  // when a PDU came last, in nanoseconds of time.Now().UnixNano()
	heardThen  int64         // heard at the pinger's last tick; the pinger's
	silent     time.Duration // of the pinger's ticks, since it was heard; the pinger's
	leaveBy    atomic.Int64  // when the initiator was asked to have logged out; zero: it was not
	workers    sync.WaitGroup
	working    atomic.Int32 // commands in workers, before their answers
	controls   atomic.Int32 // task management functions under way
	immediates atomic.Int32 // immediate commands under way, which no window bounds
	answering  sync.RWMutex // read-locked from where a task has ended until its answer is queued

	gone     chan struct{} // closed by end
	goneOnce sync.Once
	done     chan struct{} // closed when nothing of the connection is left

	// Only in a session that may have several connections; see order.go.
	acked      atomic.Uint32     // the initiator's ExpStatSN
	turn       sync.Mutex        // held while a PDU is served
	replaying  *early            // the held PDU that is being served
	delivering bool              // ordering.mu is held for a command
	early      map[uint32]*early // held commands by task tag; guarded by ordering.mu

	mu         sync.Mutex // guards what follows
	tasks      map[uint32]*task
	receiving  *task // the task whose data-out the reader is reading
	waiting    []*task
	writeBytes int64 // of Options.WriteMemory in use
	nextTTT    uint32
}

// maxControls and maxImmediates bound the task management functions and the immediate commands
// under way on a connection: the command window bounds neither (RFC 7143 4.2.2.1).
const (
	maxControls   = 16
	maxImmediates = 32
)

func newConn(s *Server, nc net.Conn) *conn {
	c := &conn{
		server: s, nc: nc,
		log:   s.log.With("peer", nc.RemoteAddr().String()),
		send:  newSendQueue(nc, s.opts.SendTimeout),
		tasks: make(map[uint32]*task),
		gone:  make(chan struct{}),
		done:  make(chan struct{}),
	}
	c.socket = newReader(nc, c.send.flush, spin.New(s.opts.Spin, &s.spinning))
	c.rd = &c.socket
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
		c.log.Info("iscsi: connection begins", "tsih", c.session.tsih, "cid", c.cid)
		err = c.fullFeature()
	}
	c.send.flush()
	if errors.Is(err, errLogout) {
		c.send.drain() // another writer may have the answer
	}
	c.nc.Close()
	c.socket.close()
	c.send.fail(errClosed)
	c.send.drain()
	if c.session != nil {
		c.leave(err)
		c.log.Info("iscsi: connection ends", "reason", err)
	}
	close(c.done)
}

func closedByPeer(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed)
}

var (
	// errLogout ends fullFeature in good order.
	errLogout       = errors.New("logout")
	errHeaderDigest = errors.New("iscsi: header digest error")
)

// fullFeature serves PDUs until the connection ends.
func (c *conn) fullFeature() error {
	var h header
	reads := uint64(0)
	serve := c.pdu
	if c.session.shared {
		serve = c.pduInOrder
	}
	for {
		b, err := c.socket.next(headerBytes)
		if err != nil {
			return err
		}
		copy(h[:], b)
		if c.socket.reads != reads { // else it came with one that was timed
			reads = c.socket.reads
			c.heard.Store(time.Now().UnixNano())
		}
		if err := serve(&h); err != nil {
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
			return errHeaderDigest
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
	if ss.shared {
		return c.admitInOrder(h), nil
	}
	exp := ss.expCmdSN.Load()
	sn := h.cmdSN()
	if h.immediate() {
		return true, nil
	}
	if before(sn, exp) || before(ss.maxCmdSN.Load(), sn) {
		return false, nil
	}
	if sn != exp {
		// With one connection, the missing ones can never come.
		return false, fmt.Errorf("iscsi: CmdSN %d where %d is due", sn, exp)
	}
	ss.expCmdSN.Store(exp + 1)
	if h.opcode() != opCommand {
		ss.maxCmdSN.Add(1)
	}
	return true, nil
}

// data reads a small data segment. It returns false for a wrong digest: the PDU has been rejected,
// and is to be ignored.
func (c *conn) data(h *header, limit int) (b []byte, ok bool, err error) {
	n := h.dataLen()
	if n > limit {
		return nil, false, fmt.Errorf("iscsi: opcode %#x with %d bytes of data", h.opcode(), n)
	}
	if n == 0 {
		return nil, true, nil
	}
	b = make([]byte, padded(n))
	if err := c.rd.read(b); err != nil {
		return nil, false, err
	}
	if c.params.dataDigest {
		p, err := c.rd.next(4)
		if err != nil {
			return nil, false, err
		}
		if digest(b) != [4]byte(p) {
			return nil, false, c.rejectNow(h, rejectDataDigest)
		}
	}
	return b[:n], true, nil
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
	h.put32(32, ss.maxCmdSN.Load())
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
	var sum digester
	if c.params.dataDigest {
		sum.add(data)
	}
	c.putPadding(len(data), sum)
}

// putParts queues n bytes of parts, themselves and not a copy, as a data segment. It returns what is
// left of parts. sendQueue.mu is held.
func (c *conn) putParts(parts [][]byte, n int) [][]byte {
	var sum digester
	for left := n; left > 0; {
		p := parts[0]
		if len(p) > left {
			p, parts[0] = p[:left], p[left:]
		} else {
			parts = parts[1:]
		}
		left -= len(p)
		c.send.large(p)
		if c.params.dataDigest {
			sum.add(p)
		}
	}
	c.putPadding(n, sum)
	return parts
}

// putPadding queues what follows a data segment of n bytes. sendQueue.mu is held.
func (c *conn) putPadding(n int, sum digester) {
	pad := zeroes[:padded(n)-n]
	if len(pad) > 0 {
		c.send.small(pad)
	}
	if c.params.dataDigest {
		sum.add(pad)
		d := sum.sum()
		c.send.small(d[:])
	}
}
