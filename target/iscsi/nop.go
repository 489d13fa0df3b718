package iscsi

import (
	"time"
)

// What a connection says without being asked, and how it learns that nobody listens: pings in
// both directions (11.18, 11.19) and asynchronous messages (11.9).
//
// A connection that is silent for Options.PingAfter is pinged once; silent for as long again, it is
// closed, and its session with it (error recovery level 0). Any PDU is a sign of life: an
// initiator whose answer to the ping waits behind megabytes of its own data is not dead.
//
// Silence is counted in the pinger's own ticks, of which a process that was stopped (a virtual
// machine that was paused, a machine with more work than it has cores) gets one for all the time
// that it missed. By the clock it would take its own absence for that of every initiator, and
// close connections whose data wait in their sockets, without having pinged them.

// nopOut answers a ping, or takes the answer to ours: that it came is all there is to it.
func (c *conn) nopOut(h *header) error {
	data, ok, err := c.data(h, maxReceive)
	if !ok {
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

// ping asks the initiator for an answer, which acknowledges what it has received.
func (c *conn) ping() {
	var r header
	r[0], r[1] = opNopIn, 0x80
	r.put32(16, noTag)
	r.put32(20, 1)
	c.sendUrgent(&r)
}

// tick looks after a connection that is silent, or has been asked to log out. The server's pinger
// calls it each time that another while of its own has passed, and waits for no socket.
func (c *conn) tick(now time.Time, while time.Duration) {
	if !c.full.Load() {
		return // the login's own deadline
	}
	if by := c.leaveBy.Load(); by != 0 && now.UnixNano() > by {
		c.leaveBy.Store(0)
		c.inBackground(func() {
			c.log.Warn("iscsi: initiator was asked to log out and did not, closing")
			c.async(asyncDrop, c.cid, uint16(c.params.time2Wait), 0)
			c.end()
		})
		return
	}
	if heard := c.heard.Load(); heard != c.heardThen {
		c.heardThen, c.silent = heard, 0
		return
	}
	was := c.silent
	c.silent += while
	switch after := c.server.opts.PingAfter; {
	case was >= 2*after:
		// It is closed already, and ends.
	case c.silent >= 2*after:
		c.log.Warn("iscsi: initiator is silent, closing")
		c.nc.Close()
	case c.silent >= after && was < after:
		c.inBackground(c.ping)
	}
}

// inBackground runs f, which may wait for the socket, beside the pinger. There are never more than
// two of a connection, a ping and its end, and one for each RequestLogout.
func (c *conn) inBackground(f func()) {
	c.server.wg.Add(1)
	go func() {
		defer c.server.wg.Done()
		f()
	}()
}

// Events of asynchronous messages (11.9.1). The others have no use here: SCSI events go as unit
// attentions, and there is nothing to negotiate anew.
const (
	asyncLogout  = 1 // the target asks for a logout; third parameter: within how many seconds
	asyncDrop    = 2 // a connection ends: its CID, Time2Wait, Time2Retain
	asyncDropAll = 3 // all connections of the session end: nothing, Time2Wait, Time2Retain
)

// async sends an asynchronous message with its three parameters. It returns when the message has
// been written, so that the caller may close the connection.
func (c *conn) async(event byte, p1, p2, p3 uint16) {
	if !c.full.Load() {
		return
	}
	var h header
	h[0], h[1] = opAsync, 0x80
	h.put32(16, noTag)
	h[36] = event
	h.put16(38, p1)
	h.put16(40, p2)
	h.put16(42, p3)
	q := c.send
	q.mu.Lock()
	c.put(&h, true)
	q.mu.Unlock()
	q.flush()
	q.drain()
}
