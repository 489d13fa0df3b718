package iscsi

import (
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ledge-storage/ledge/target/scsi"
)

// session is an I_T nexus over iSCSI. It has one connection.
type session struct {
	server    *Server
	key       sessionKey
	tsih      uint16
	discovery bool
	target    *scsi.Target // nil in a discovery session
	nexus     *scsi.Nexus  // nil in a discovery session
	conn      *conn

	expCmdSN atomic.Uint32
	// underWay counts the commands that took a CmdSN and have not been answered: the window
	// opens as they end, so that an initiator never has more than Options.Window of them.
	underWay atomic.Int32

	closeOnce sync.Once
	done      chan struct{} // closed when nothing of the session is left
}

var (
	errTooManySessions = errors.New("iscsi: too many sessions")
	errOldSession      = errors.New("iscsi: commands of the initiator's former session do not end")
	errTargetGone      = errors.New("iscsi: target removed")
)

// maxCmdSN is the last CmdSN that the initiator may use. It never falls.
func (ss *session) maxCmdSN() uint32 {
	return ss.expCmdSN.Load() - uint32(ss.underWay.Load()) + uint32(ss.server.opts.Window) - 1
}

// close ends the session's connection; done tells when all is over.
func (ss *session) close() {
	ss.closeOnce.Do(func() { ss.conn.nc.Close() })
}

// open makes the session of a login. A session of the same name, ISID and target is ended first
// and waited for (session reinstatement, RFC 7143 6.3.5), so that its tasks are over before the
// first command of the new one.
func (s *Server) open(c *conn, key sessionKey, discovery bool, cmdSN uint32) (*session, error) {
	for {
		s.mu.Lock()
		old := s.sessions[key]
		if old == nil || discovery {
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
	ss := &session{server: s, key: key, discovery: discovery, conn: c, done: make(chan struct{})}
	if !discovery {
		if ss.target = s.targets[key.target]; ss.target == nil {
			return nil, errTargetGone
		}
		s.sessions[key] = ss
		ss.nexus = ss.target.Connect(key.initiator, key.isid, s.opts.RelativePort)
	}
	ss.expCmdSN.Store(cmdSN)
	for {
		s.lastTSIH++
		if s.lastTSIH != 0 && s.tsihs[s.lastTSIH] == nil {
			break
		}
	}
	ss.tsih = s.lastTSIH
	s.tsihs[ss.tsih] = ss
	return ss, nil
}

// forget ends a session whose connection has ended.
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
