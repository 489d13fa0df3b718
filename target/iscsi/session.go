package iscsi

import (
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ledge-storage/ledge/target/scsi"
)

// A session and its connections (RFC 7143 6.3):
//
//	login, TSIH 0 ─► open ─► conns {cid} ◄── join ◄─ login, TSIH of the session
//	                            │  a CID in use: its connection ends first (6.3.4)
//	                            ▼ leave
//	    logged out or replaced: its tasks end, the session goes on while it has a connection
//	    anything else:          the session ends, all connections with it
//
// The last line is error recovery level 0 (7.1.4.4, 7.1.5): its only class is session recovery,
// which closes every connection and ends every task. So nothing of a connection outlives it, and
// an initiator that lost one logs in anew.

// session is an I_T nexus over iSCSI.
type session struct {
	server    *Server
	key       sessionKey
	tsih      uint16
	discovery bool
	target    *scsi.Target // nil in a discovery session
	nexus     *scsi.Nexus  // nil in a discovery session
	params    params       // what the leading login agreed for the session
	alias     string       // the initiator's
	// shared says that the session may have several connections, so that commands must be put
	// in order: see order.go. It never changes.
	shared bool

	// The next two are the ends of the command window. Neither ever falls: the first rises as
	// commands come, the second as they end, so that an initiator never has more than
	// Options.Window of them under way.
	expCmdSN atomic.Uint32
	maxCmdSN atomic.Uint32
	memory   atomic.Int64 // what its commands hold of Server.memory

	conns   map[uint16]*conn // by CID; guarded by Server.mu
	joining int              // logins that wait for a connection they replace; as conns
	ending  bool             // no connection may join; as conns

	logouts chan struct{} // holds one: a logout that waits for another connection to end
	ordering

	done chan struct{} // closed when nothing of the session is left
}

var (
	errTooManySessions = errors.New("iscsi: too many sessions")
	errTooManyOfOne    = errors.New("iscsi: too many sessions of the initiator with the target")
	errTooManyConns    = errors.New("iscsi: the session has all its connections")
	errNoSession       = errors.New("iscsi: no such session")
	errOldSession      = errors.New("iscsi: commands of the initiator's former session do not end")
	errTargetGone      = errors.New("iscsi: target removed")
	errReplaced        = errors.New("iscsi: connection ended by its session")
)

// underWay is how many commands of the window have not been answered.
func (ss *session) underWay() int {
	maximum := ss.maxCmdSN.Load()
	return int(int32(ss.expCmdSN.Load() - 1 + uint32(ss.server.opts.Window) - maximum))
}

// finish marks the session as ending and returns its connections.
func (ss *session) finish() []*conn {
	ss.server.mu.Lock()
	defer ss.server.mu.Unlock()
	ss.ending = true
	return ss.connections()
}

// connections lists them. Server.mu is held.
func (ss *session) connections() []*conn {
	all := make([]*conn, 0, len(ss.conns))
	for _, c := range ss.conns {
		all = append(all, c)
	}
	return all
}

// close ends the session's connections; done tells when all is over.
func (ss *session) close() {
	for _, c := range ss.finish() {
		c.end()
	}
}

// drop is close that tells the initiator first (11.9.1). It returns when the connections have been
// told and are closed.
func (ss *session) drop() {
	var told sync.WaitGroup
	for _, c := range ss.finish() {
		told.Add(1)
		go func() {
			defer told.Done()
			late := time.AfterFunc(ss.server.farewell, c.end)
			defer late.Stop()
			c.async(asyncDropAll, 0, uint16(ss.params.time2Wait), 0)
			c.end()
		}()
	}
	told.Wait()
}

// open makes the session of a login. A session of the same name, ISID and target is ended first
// and waited for (session reinstatement, 6.3.5), so that its tasks are over before the first
// command of the new one.
func (s *Server) open(c *conn, l *login) (*session, error) {
	key := sessionKey{l.target, l.initiator, l.isid}
	for {
		s.mu.Lock()
		old := s.sessions[key]
		if old == nil || l.discovery {
			break
		}
		s.mu.Unlock()
		old.close()
		select {
		case <-old.done:
		case <-time.After(s.opts.LoginTimeout):
			return nil, errOldSession
		}
	}
	defer s.mu.Unlock()
	if s.closed {
		return nil, ErrServerClosed
	}
	if len(s.tsihs) >= s.opts.MaxSessions {
		return nil, errTooManySessions
	}
	if s.sessionsOf(l.initiator, l.target) >= s.opts.MaxSessionsPerInitiator {
		return nil, errTooManyOfOne
	}
	ss := &session{
		server: s, key: key, discovery: l.discovery, params: l.params, alias: l.alias,
		shared:  l.params.maxConnections > 1,
		conns:   make(map[uint16]*conn, 1),
		logouts: make(chan struct{}, 1),
		done:    make(chan struct{}),
	}
	if ss.shared {
		ss.ordering.init()
	}
	if !l.discovery {
		if ss.target = s.targets[key.target]; ss.target == nil {
			return nil, errTargetGone
		}
		s.sessions[key] = ss
		ss.nexus = ss.target.Connect(key.initiator, key.isid, s.opts.RelativePort)
		ss.nexus.Queries.Store(l.params.protocolLevel >= levelQueries)
	}
	ss.expCmdSN.Store(c.firstCmdSN)
	ss.maxCmdSN.Store(c.firstCmdSN + uint32(s.opts.Window) - 1)
	for {
		s.lastTSIH++
		if s.lastTSIH != 0 && s.tsihs[s.lastTSIH] == nil {
			break
		}
	}
	ss.tsih = s.lastTSIH
	s.tsihs[ss.tsih] = ss
	c.session = ss
	ss.conns[c.cid] = c
	return ss, nil
}

// sessionsOf counts what one initiator holds of one target (empty: of discovery). Server.mu is
// held.
func (s *Server) sessionsOf(initiator, target string) (n int) {
	for _, ss := range s.tsihs {
		if ss.key.initiator == initiator && ss.key.target == target {
			n++
		}
	}
	return n
}

// join adds a connection to the session that a login names. One with the same CID is ended first
// and waited for (connection reinstatement, 6.3.4), so that none of its tasks is left.
func (s *Server) join(c *conn, l *login) (*session, error) {
	key := sessionKey{l.target, l.initiator, l.isid}
	late := time.NewTimer(s.opts.LoginTimeout)
	defer late.Stop()
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		ss := s.tsihs[l.tsih]
		switch {
		case s.closed:
			return nil, ErrServerClosed
		case ss == nil || ss.ending || ss.key != key:
			return nil, errNoSession
		case ss.discovery:
			return nil, errTooManyConns
		}
		old := ss.conns[c.cid]
		if old == nil {
			if len(ss.conns) >= ss.params.maxConnections {
				return nil, errTooManyConns
			}
			c.session = ss
			ss.conns[c.cid] = c
			return ss, nil
		}
		ss.joining++ // or the session would end with its last connection
		s.mu.Unlock()
		old.end()
		var err error
		select {
		case <-old.done:
		case <-late.C:
			err = errOldSession
		}
		s.mu.Lock()
		ss.joining--
		if (err != nil || ss.ending) && ss.abandoned() {
			s.mu.Unlock()
			s.forget(ss)
			s.mu.Lock()
		}
		if err != nil {
			return nil, err
		}
	}
}

// abandoned says that the session has come to its end, which the caller then owes it. Server.mu
// is held.
func (ss *session) abandoned() bool {
	if len(ss.conns) > 0 || ss.joining > 0 {
		return false
	}
	ss.ending = true
	return true
}

// leave takes a connection whose reader has ended out of its session. It returns when none of its
// tasks is left.
func (c *conn) leave(err error) {
	ss, s := c.session, c.server
	if !errors.Is(err, errLogout) && !c.isGone() {
		for _, o := range ss.finish() {
			if o == c {
				continue
			}
			s.wg.Add(1)
			go func() {
				defer s.wg.Done()
				o.async(asyncDropAll, 0, uint16(ss.params.time2Wait), 0)
				o.end()
			}()
		}
	}
	c.end()
	if ss.shared {
		c.turn.Lock() // a held PDU that is being served ends first
		ss.forsake(c)
		c.turn.Unlock()
	}
	c.endTasks()
	c.workers.Wait()
	s.mu.Lock()
	if ss.conns[c.cid] == c {
		delete(ss.conns, c.cid)
	}
	last := ss.abandoned()
	s.mu.Unlock()
	if last {
		s.forget(ss)
	}
}

// endTasks ends the tasks that came by the connection (7.5), and tells the initiator where the
// session goes on.
func (c *conn) endTasks() {
	ss := c.session
	if ss.nexus == nil {
		return
	}
	c.server.mu.Lock()
	tell := !ss.ending
	c.server.mu.Unlock()
	ss.nexus.EndTasksEverywhere(func(t *scsi.Task) bool { return t.Sink.(*task).conn == c }, tell)
}

// end closes the connection from the session's side: that is no failure of it.
func (c *conn) end() {
	c.goneOnce.Do(func() { close(c.gone) })
	c.nc.Close()
	if ss := c.session; ss.shared {
		ss.wake()
	}
}

func (c *conn) isGone() bool {
	select {
	case <-c.gone:
		return true
	default:
		return false
	}
}

// forget ends a session that has no connection.
func (s *Server) forget(ss *session) {
	if ss.nexus != nil {
		ss.nexus.Close()
	}
	s.mu.Lock()
	delete(s.tsihs, ss.tsih)
	if s.sessions[ss.key] == ss {
		delete(s.sessions, ss.key)
	}
	s.mu.Unlock()
	close(ss.done)
}

// sessionOf finds a session by the TSIH that a login names.
func (s *Server) sessionOf(tsih uint16) *session {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.tsihs[tsih]
}
