package iscsi

import (
	"github.com/ledge-storage/ledge/target/scsi"
)

// firstPiece is the buffer that a write's data begin in: as much as unsolicited data may be.
const firstPiece = ourFirstBurst

// cover makes buffers for the first n bytes of the wanted data.
func (t *task) cover(n int64) {
	n = min(n, t.OutWanted)
	for t.covered < n {
		size := min(t.OutWanted-t.covered, scsi.MaxBuffer)
		if t.covered == 0 {
			size = min(size, firstPiece)
		}
		b := scsi.GetBuffer(int(size))
		t.buffers = append(t.buffers, b)
		t.Out = append(t.Out, b.B)
		t.covered += size
	}
}

// receive reads the data segment of a command or Data-Out PDU to its place. What the command does
// not want is read away. It returns false for a wrong digest, which it has rejected.
func (c *conn) receive(t *task, h *header) (ok bool, err error) {
	n := int64(h.dataLen())
	wanted := max(0, min(n, t.OutWanted-t.received))
	t.cover(t.received + wanted)
	var sum digester
	for at, left := t.received, wanted; left > 0; {
		p := t.at(at)
		p = p[:min(int64(len(p)), left)]
		if err := c.rd.read(p); err != nil {
			return false, err
		}
		if c.params.dataDigest {
			sum.add(p)
		}
		at += int64(len(p))
		left -= int64(len(p))
	}
	rest := int64(padded(int(n))) - wanted
	for rest > 0 {
		m := min(rest, 512)
		p, err := c.rd.next(int(m))
		if err != nil {
			return false, err
		}
		if c.params.dataDigest {
			sum.add(p)
		}
		rest -= m
	}
	if c.params.dataDigest && n > 0 {
		p, err := c.rd.next(4)
		if err != nil {
			return false, err
		}
		if sum.sum() != [4]byte(p) {
			return false, c.rejectNow(h, rejectDataDigest)
		}
	}
	t.received += n
	return true, nil
}

// at returns the memory of the wanted data from offset on, up to the end of its buffer.
func (t *task) at(offset int64) []byte {
	for _, b := range t.Out {
		if offset < int64(len(b)) {
			return b[offset:]
		}
		offset -= int64(len(b))
	}
	panic("iscsi: data-out beyond its buffers")
}

// dataOut serves a Data-Out PDU (11.7). One that belongs to no task is read away: the task may
// have been aborted while it was on its way.
func (c *conn) dataOut(h *header) error {
	c.mu.Lock()
	t := c.tasks[h.itt()]
	if t != nil && t.phase == phaseGathering {
		c.receiving = t
	} else {
		t = nil
	}
	c.mu.Unlock()
	if t == nil {
		return c.skipData(h)
	}
	ok, err := c.gather(t, h)
	if err != nil {
		c.mu.Lock()
		c.receiving = nil // from now on whoever aborts the task frees it
		c.mu.Unlock()
		return err
	}
	if !ok && t.failed == 0 {
		// A lost data segment cannot be asked for again at error recovery level 0.
		t.failed = dataDigest
	}
	c.advance(t)
	return nil
}

// gather takes one Data-Out PDU.
func (c *conn) gather(t *task, h *header) (ok bool, err error) {
	n, offset, sn := int64(h.dataLen()), int64(h.u32(40)), h.u32(36)
	limit := int64(-1)
	switch {
	case h.ttt() == noTag && t.unsolicited:
		limit = min(int64(c.params.firstBurst), t.OutLimit)
	case h.ttt() != noTag && len(t.outstanding) > 0 && t.outstanding[0].ttt == h.ttt():
		limit = t.outstanding[0].end
	}
	if limit < 0 || offset != t.received || n > limit-offset || sn != t.dataOutSN {
		if err := c.skipData(h); err != nil {
			return false, err
		}
		c.log.Info("iscsi: Data-Out out of place", "offset", offset, "bytes", n, "datasn", sn)
		t.failed = wrongAmount
		if h.ttt() == noTag && !t.unsolicited {
			t.failed = unexpectedData
		}
		if h.final() {
			t.unsolicited = false
		}
		return false, nil
	}
	if ok, err = c.receive(t, h); !ok {
		if h.final() {
			t.unsolicited = false
		}
		return ok, err
	}
	t.dataOutSN++
	if h.final() {
		t.dataOutSN = 0
		if h.ttt() == noTag {
			t.unsolicited = false
		} else {
			if t.received != t.outstanding[0].end {
				t.failed = wrongAmount
				return false, nil
			}
			copy(t.outstanding, t.outstanding[1:])
			t.outstanding = t.outstanding[:len(t.outstanding)-1]
		}
	}
	return true, nil
}

// advance does what a gathering task needs next: run it, ask for more, or wait.
func (c *conn) advance(t *task) {
	switch {
	case t.failed != 0:
		t.Fail(abortedCommand, t.failed)
		t.refused = true
		c.start(t)
		return
	case t.unsolicited:
	case t.refused || t.received >= t.OutWanted:
		c.start(t)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.receiving = nil
	if t.WasAborted() {
		// The abort came when the task was in no list, or ours: so it is ours to free.
		c.freeGathering(t)
		return
	}
	if !t.listed {
		t.listed = true
		c.tasks[t.itt] = t
	}
	if !t.unsolicited {
		c.solicit(t)
	}
}

// solicit sends R2Ts (11.8) as the session's limits allow. conn.mu is held.
func (c *conn) solicit(t *task) {
	if t.reserved == 0 {
		need := t.OutWanted - t.covered
		if need > 0 {
			if c.writeBytes > 0 && c.writeBytes+need > c.server.opts.WriteMemory {
				c.waiting = append(c.waiting, t)
				return
			}
			c.writeBytes += need
			t.reserved = need
			t.cover(t.OutWanted)
		}
	}
	t.solicited = max(t.solicited, t.received)
	for len(t.outstanding) < c.params.maxOutstandingR2T && t.solicited < t.OutWanted {
		n := min(t.OutWanted-t.solicited, int64(c.params.maxBurst))
		c.nextTTT++
		if c.nextTTT == noTag {
			c.nextTTT = 1
		}
		b := burst{c.nextTTT, t.solicited, t.solicited + n}
		t.outstanding = append(t.outstanding, b)
		t.solicited += n
		var h header
		h[0], h[1] = opR2T, 0x80
		h.put64(8, t.LUN)
		h.put32(16, t.itt)
		h.put32(20, b.ttt)
		h.put32(36, t.r2tSN)
		h.put32(40, uint32(b.start))
		h.put32(44, uint32(n))
		t.r2tSN++
		q := c.send
		q.mu.Lock()
		c.put(&h, false)
		q.mu.Unlock()
	}
}

// unreserve gives a task's share of the write memory to those who wait for it. conn.mu is held.
func (c *conn) unreserve(t *task) {
	if t.reserved == 0 {
		return
	}
	c.writeBytes -= t.reserved
	t.reserved = 0
	waiting := c.waiting
	c.waiting = nil
	for _, w := range waiting {
		c.solicit(w) // puts it back in the list where there is no room yet
	}
}

// Aborted implements scsi.Aborter.
func (c *conn) Aborted(tag uint64) {
	c.mu.Lock()
	t := c.tasks[uint32(tag)]
	answered := false
	if t != nil && t.WasAborted() && t.phase == phaseGathering && c.receiving != t {
		_, answered = t.AbortStatus()
		c.freeGathering(t)
	}
	c.mu.Unlock()
	if answered {
		c.send.flush()
	}
}

// freeGathering frees an aborted task. conn.mu is held.
func (c *conn) freeGathering(t *task) {
	for i, w := range c.waiting {
		if w == t {
			c.waiting = append(c.waiting[:i], c.waiting[i+1:]...)
			break
		}
	}
	if t.listed {
		delete(c.tasks, t.itt)
	}
	c.unreserve(t)
	c.over(t.immediate)
	t.Finish()
	if status, respond := t.AbortStatus(); respond {
		t.Status, t.Sense = status, nil
		q := c.send
		q.mu.Lock()
		c.putResponse(t) // whoever called writes it, without conn.mu
		q.mu.Unlock()
	}
	t.recycle()
}
