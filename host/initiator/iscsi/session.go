package iscsi

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Session is one logged-in session. All methods may be called concurrently.
type Session struct {
	cfg         Config
	par         params
	conn        net.Conn
	br          *bufio.Reader
	portalGroup int

	slots    chan struct{} // one token for each command in flight
	kick     chan struct{} // asks the sender goroutine to write
	closing  chan struct{} // closed by the first failure
	dead     chan struct{} // closed when no goroutine is left and every task was failed
	received atomic.Int64  // when anything last came, in nanoseconds of time.Since(start)
	start    time.Time
	scratch  [512]byte // the reader's: sense data, reject headers
	batch    batch     // of whoever set writing

	mu        sync.Mutex
	idle      sync.Cond // on mu: writing became false
	err       error     // why the session ended
	cmdSN     uint32
	expCmdSN  uint32
	maxCmdSN  uint32
	expStatSN uint32
	window    chan struct{} // closed and replaced when MaxCmdSN rises
	tasks     []*task       // by the low half of the task tag
	free      []uint16      // unused entries of tasks
	turn      uint16        // high half of the next tag: tells a reused entry from its former task
	queue     []outPDU
	spare     []outPDU
	writing   bool
	answers   int // queued answers to the target's NOP-Ins
}

// Dial connects and logs in. It returns *LoginError where the target refuses, and ErrProtocol,
// ErrAuth, ErrTimeout or the network's error otherwise.
func Dial(ctx context.Context, cfg Config) (*Session, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg.setDefaults()
	if cfg.ISID == ([6]byte{}) {
		cfg.ISID = newISID()
	}
	l, err := dial(ctx, &cfg)
	if err != nil {
		return nil, err
	}
	s := &Session{
		cfg: cfg, par: l.par, conn: l.conn, br: l.br, portalGroup: l.portalGroup,
		slots: make(chan struct{}, cfg.QueueDepth), kick: make(chan struct{}, 1),
		closing: make(chan struct{}), dead: make(chan struct{}), window: make(chan struct{}),
		start: time.Now(), cmdSN: l.cmdSN, expCmdSN: l.expCmdSN, maxCmdSN: l.maxCmdSN, expStatSN: l.statSN,
		// One entry for a command, one for its abort, and some for pings and resets.
		tasks: make([]*task, 2*cfg.QueueDepth+8),
	}
	s.idle.L = &s.mu
	for i := range s.tasks {
		s.free = append(s.free, uint16(len(s.tasks)-1-i))
	}
	var wg sync.WaitGroup
	wg.Go(s.read)
	wg.Go(s.send)
	wg.Go(s.keep)
	go func() {
		<-s.closing
		wg.Wait()
		s.bury()
	}()
	return s, nil
}

// PortalGroup is the TargetPortalGroupTag of the login, -1 where the target gave none.
func (s *Session) PortalGroup() int { return s.portalGroup }

// Dead is closed when the session ended and everything in flight was failed.
func (s *Session) Dead() <-chan struct{} { return s.dead }

// Err is why the session ended; nil while it lives.
func (s *Session) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Kill ends the session without a logout: the commands in flight fail with ErrSessionLost. It does
// not wait; Dead tells.
func (s *Session) Kill(cause error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kill(cause)
}

// kill is Kill under mu. Closing the socket wakes whoever reads or writes it.
func (s *Session) kill(cause error) {
	if s.err != nil {
		return
	}
	s.err = cause
	close(s.closing)
	s.conn.Close()
}

// bury runs once, when reader, sender and keeper are gone: it waits for a caller that still
// writes, and then nothing touches any command's buffers.
func (s *Session) bury() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.writing {
		s.idle.Wait()
	}
	s.queue = nil
	lost := fmt.Errorf("%w: %s: %w", ErrSessionLost, s.cfg.Portal, s.err)
	for _, t := range s.tasks {
		if t != nil {
			t.refs = 0
			s.finish(t, lost)
		}
	}
	close(s.dead)
}

// Close logs out, which lets the target forget the session at once, and waits for the end.
// Commands in flight fail with ErrSessionLost.
func (s *Session) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	var h Header
	h[0], h[1] = OpLogout|flagImmediate, flagFinal // reason 0: close the session
	s.manage(ctx, &h, OpLogoutResponse)
	s.Kill(ErrClosed)
	<-s.dead
	return nil
}

// keep watches over the target: silence and commands that never end.
func (s *Session) keep() {
	tick := time.NewTicker(max(min(s.cfg.PingInterval, s.cfg.PingTimeout)/4, time.Millisecond))
	defer tick.Stop()
	var pinged time.Duration // when; zero: no ping is out
	for {
		select {
		case <-s.closing:
			return
		case <-tick.C:
		}
		now, heard := time.Since(s.start), time.Duration(s.received.Load())
		switch silent := now - heard; {
		case pinged != 0 && heard > pinged:
			pinged = 0
		case pinged != 0 && now-pinged > s.cfg.PingTimeout:
			s.Kill(fmt.Errorf("%w: silent for %v", ErrTimeout, silent.Round(time.Millisecond)))
			return
		case pinged == 0 && silent > s.cfg.PingInterval:
			pinged = now
			s.ping()
		}
		s.mu.Lock()
		for _, t := range s.tasks {
			if t != nil && now-t.since > s.cfg.CommandTimeout {
				s.kill(fmt.Errorf("%w: a command took over %v", ErrTimeout, s.cfg.CommandTimeout))
				break
			}
		}
		s.mu.Unlock()
	}
}

// ping queues a NOP-Out that asks for an answer. It leaves the writing to the sender: the keeper must
// not block on the socket that it watches.
func (s *Session) ping() {
	var h Header
	h[0], h[1] = OpNopOut|flagImmediate, flagFinal
	h.SetWord(20, reservedTag)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return
	}
	if t := s.newTask(OpNopIn); t != nil {
		h.SetWord(16, t.tag)
		s.enqueue(&h, nil, nil)
		s.wakeSender()
	}
}
