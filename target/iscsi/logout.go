package iscsi

// Reasons of a logout request, and responses (11.14.1, 11.15.1).
const (
	logoutSession    = 0
	logoutConnection = 1
	logoutRecovery   = 2

	logoutDone       = 0
	logoutNoCID      = 1
	logoutNoRecovery = 2 // connection recovery needs a higher error recovery level
)

// logout serves 11.14. What it ends has ended when it answers: no command of a connection that
// the initiator believes gone may still write.
func (c *conn) logout(h *header) error {
	if err := c.skipData(h); err != nil {
		return err
	}
	if ok, err := c.admit(h); !ok {
		return err
	}
	ss := c.session
	cid := h.u16(20)
	switch reason := h[1] & 0x7F; {
	case reason > logoutRecovery:
		return c.rejectNow(h, rejectBadField)
	case reason == logoutRecovery:
		return c.answerLogout(h, logoutNoRecovery)
	case reason == logoutConnection && cid != c.cid:
		return c.logoutOther(h, cid)
	case reason == logoutSession && ss.shared:
		if err := c.endOthers(func(*conn) bool { return true }); err != nil {
			return err
		}
	}
	c.endTasks()
	c.answerLogout(h, logoutDone)
	c.send.flush()
	return errLogout
}

func (c *conn) answerLogout(h *header, response byte) error {
	var r header
	r[0], r[1], r[2] = opLogoutResp, 0x80, response
	r.put32(16, h.itt())
	r.put16(40, uint16(c.params.time2Wait))
	r.put16(42, 0) // nothing is retained
	c.sendPDU(&r, nil, true)
	return nil
}

// logoutOther ends another connection of the session.
func (c *conn) logoutOther(h *header, cid uint16) error {
	found := false
	if c.session.shared {
		err := c.endOthers(func(o *conn) bool {
			found = found || o.cid == cid
			return o.cid == cid
		})
		if err != nil {
			return err
		}
	}
	if !found {
		return c.answerLogout(h, logoutNoCID)
	}
	return c.answerLogout(h, logoutDone)
}

// endOthers ends those of the session's other connections that match picks, and waits for them.
// One logout of a session does so at a time, and one whose own connection is ended gives up, so
// that no two wait for each other.
func (c *conn) endOthers(match func(*conn) bool) error {
	ss := c.session
	select {
	case ss.logouts <- struct{}{}:
		defer func() { <-ss.logouts }()
	case <-c.gone:
		return errReplaced
	}
	ss.server.mu.Lock()
	all := ss.connections()
	ss.server.mu.Unlock()
	var ended []*conn
	for _, o := range all {
		if o != c && match(o) {
			o.end()
			ended = append(ended, o)
		}
	}
	for _, o := range ended {
		<-o.done
	}
	return nil
}
