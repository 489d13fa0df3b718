package iscsi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ledge-storage/ledge/target/scsi"
)

// Errors of a Server.
var (
	// ErrServerClosed is returned by Serve after Close.
	ErrServerClosed = errors.New("iscsi: server closed")
	// ErrTargetExists: AddTarget of a name that is served.
	ErrTargetExists = errors.New("iscsi: target name is in use")
)

// CHAP holds the secrets of one initiator and target (RFC 7143 12.1.3).
type CHAP struct {
	// User and Secret are what the initiator must prove to know.
	User, Secret string
	// MutualUser and MutualSecret are what the target proves when the initiator asks; an empty
	// MutualSecret refuses to.
	MutualUser, MutualSecret string
}

// Options of a Server. The zero value is usable.
type Options struct {
	// Logger; nil: nothing is logged.
	Logger *slog.Logger
	// PortalGroupTag of all portals of this server; zero: 1.
	PortalGroupTag uint16
	// RelativePort is the relative target port identifier; zero: PortalGroupTag.
	RelativePort uint16
	// Portals returns the addresses (host:port, or host:port,tag for another group's) at which
	// initiators reach a target; nil: the address at which the question came.
	Portals func(target string) []string
	// Auth returns what an initiator must prove to log in to target (empty: to discover); nil,
	// or a nil function: nothing.
	Auth func(initiator, target string) *CHAP
	// Ready is asked at each login to target, when all else is in order: an error refuses it with "service unavailable"
	// (0301h), after which initiators try again. It is for a target whose units are not known yet: one without them
	// would be scanned and found empty, and a command to a unit that is to come would be an I/O error. nil: ready.
	Ready func(target string) error
	// MaxSessions and MaxConnections bound what is held at once, logins included; zero: 1024
	// and MaxSessions + 256. A connection beyond takes the place of the one that has been
	// logging in for longest, where there is one.
	MaxSessions, MaxConnections int
	// MaxSessionsPerInitiator bounds the sessions of one initiator name with one target; zero:
	// 64. It must not exceed MaxSessions.
	MaxSessionsPerInitiator int
	// SessionConnections is how many connections a session may have, where the initiator wants
	// several, 1 to 16; zero: 4.
	SessionConnections int
	// OrderTimeout is how long a session of several connections waits for a command when later
	// ones have come already, or for an acknowledgement that a task management response must
	// follow; zero: 30 s.
	OrderTimeout time.Duration
	// TargetAlias returns the alias of a target, told at login; nil, or empty: none.
	TargetAlias func(target string) string
	// LoginTimeout bounds a whole login; zero: 15 s.
	LoginTimeout time.Duration
	// SendTimeout is how long an initiator may take no data that it asked for; zero: 30 s.
	SendTimeout time.Duration
	// PingAfter is how long a connection may be silent before it is pinged; zero: 30 s. Twice
	// that, and it is closed, and its session with it.
	PingAfter time.Duration
	// Spin is how long a connection's goroutine looks for the next command before it is parked;
	// zero: not at all. It halves the latency of one command after another where a core is free,
	// and takes up to that long of a core for each command that then does not come. A connection
	// that is idle does not spin.
	Spin time.Duration
	// Window is how many commands of a session may be under way; zero: 128.
	Window int
	// WriteMemory bounds the memory in which one session's writes beyond their first burst are
	// gathered; zero: 64 MiB. It must hold one command of the largest transfer.
	WriteMemory int64
	// Memory bounds the data of all commands under way on the server; a command beyond it gets
	// TASK SET FULL, unless its session holds less than Memory/MaxSessions: that much nobody
	// can take from it. Zero: 1 GiB. Answers on their way to initiators come on top: 1 MiB a
	// connection, and what Window commands add while they wait for room there.
	Memory int64
}

func (o *Options) setDefaults() error {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.PortalGroupTag == 0 {
		o.PortalGroupTag = 1
	}
	if o.RelativePort == 0 {
		o.RelativePort = o.PortalGroupTag
	}
	setDefault(&o.MaxSessions, 1024)
	setDefault(&o.MaxConnections, o.MaxSessions+256)
	setDefault(&o.MaxSessionsPerInitiator, min(64, o.MaxSessions))
	setDefault(&o.SessionConnections, 4)
	setDefault(&o.OrderTimeout, 30*time.Second)
	setDefault(&o.LoginTimeout, 15*time.Second)
	setDefault(&o.SendTimeout, 30*time.Second)
	setDefault(&o.PingAfter, 30*time.Second)
	setDefault(&o.Window, 128)
	setDefault(&o.WriteMemory, 64<<20)
	setDefault(&o.Memory, 1<<30)
	switch {
	case o.MaxSessions < 1 || o.MaxSessions > 65535:
		return fmt.Errorf("iscsi: MaxSessions %d is not in [1, 65535]", o.MaxSessions)
	case o.MaxConnections < 1:
		return fmt.Errorf("iscsi: MaxConnections %d is not positive", o.MaxConnections)
	case o.MaxSessionsPerInitiator < 1 || o.MaxSessionsPerInitiator > o.MaxSessions:
		return fmt.Errorf("iscsi: MaxSessionsPerInitiator %d is not in [1, %d]", o.MaxSessionsPerInitiator, o.MaxSessions)
	case o.SessionConnections < 1 || o.SessionConnections > 16:
		return fmt.Errorf("iscsi: SessionConnections %d is not in [1, 16]", o.SessionConnections)
	case o.Window < 1 || o.Window > 1024:
		return fmt.Errorf("iscsi: Window %d is not in [1, 1024]", o.Window)
	case o.Spin < 0 || o.Spin > MaxSpin:
		return fmt.Errorf("iscsi: Spin %v is not in [0, %v]", o.Spin, MaxSpin)
	case o.LoginTimeout < 0 || o.SendTimeout < 0 || o.PingAfter < 0 || o.OrderTimeout < 0 || o.WriteMemory < 0 || o.Memory < 0:
		return errors.New("iscsi: a limit is negative")
	}
	return nil
}

// MaxSpin bounds Options.Spin: beyond it a parked goroutine is cheaper in every way.
const MaxSpin = time.Millisecond

func setDefault[T ~int | ~int64](p *T, v T) {
	if *p == 0 {
		*p = v
	}
}

// Server serves targets on any number of portals. All methods may be called at any time.
type Server struct {
	opts     Options
	log      *slog.Logger
	farewell time.Duration // farewellTime; tests have other patience

	mu        sync.Mutex // guards what follows
	targets   map[string]*scsi.Target
	listeners map[net.Listener]struct{}
	conns     map[*conn]struct{}
	sessions  map[sessionKey]*session
	tsihs     map[uint16]*session
	lastTSIH  uint16
	closed    bool

	wg       sync.WaitGroup // connections and the pinger
	work     chan *task
	idle     atomic.Int32 // workers waiting for work
	spinning atomic.Int32 // readers that spin
	stop     chan struct{}
	memory   atomic.Int64 // of Options.Memory in use
	counters counters
}

// sessionKey is what RFC 7143 identifies a session by on one target port.
type sessionKey struct {
	target, initiator string
	isid              [6]byte
}

type counters struct {
	logins, failedLogins, rejects    atomic.Uint64
	reads, writes, others            atomic.Uint64
	readBytes, writeBytes, refusedAt atomic.Uint64
}

// Stats is a snapshot of a Server's counts since its start.
type Stats struct {
	Connections, Sessions         int
	Logins, FailedLogins, Rejects uint64
	// RefusedConnections were over MaxConnections, or had to make room while they logged in.
	RefusedConnections uint64
	// Memory is the data of commands under way, in bytes.
	Memory int64
	// Commands by direction of data, and bytes.
	Reads, Writes, Others uint64
	ReadBytes, WriteBytes uint64
}

// NewServer returns a server without targets and portals.
func NewServer(o Options) (*Server, error) {
	if err := o.setDefaults(); err != nil {
		return nil, err
	}
	s := &Server{
		opts: o, log: o.Logger, farewell: farewellTime,
		targets:   make(map[string]*scsi.Target),
		listeners: make(map[net.Listener]struct{}),
		conns:     make(map[*conn]struct{}),
		sessions:  make(map[sessionKey]*session),
		tsihs:     make(map[uint16]*session),
		work:      make(chan *task),
		stop:      make(chan struct{}),
	}
	s.wg.Add(1)
	go s.pinger()
	return s, nil
}

// AddTarget serves t on every portal. One target may be served by several servers.
func (s *Server) AddTarget(t *scsi.Target) error {
	if !validName(t.Name()) {
		return fmt.Errorf("iscsi: %q is no iSCSI name", t.Name())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrServerClosed
	}
	if _, ok := s.targets[t.Name()]; ok {
		return fmt.Errorf("iscsi: add %s: %w", t.Name(), ErrTargetExists)
	}
	s.targets[t.Name()] = t
	return nil
}

// farewellTime is how long an initiator may take to be told of what the target wants of it.
const farewellTime = time.Second

// RemoveTarget ends the sessions of a target, whose initiators are told, and serves it no more. It
// returns when none of its commands runs on this server. It does not wait for an initiator that
// takes no data.
func (s *Server) RemoveTarget(name string) {
	s.mu.Lock()
	delete(s.targets, name)
	s.mu.Unlock()
	gone := s.sessionsWith(name)
	var told sync.WaitGroup
	for _, ss := range gone {
		told.Add(1)
		go func() {
			defer told.Done()
			ss.drop()
		}()
	}
	told.Wait()
	for _, ss := range gone {
		<-ss.done
	}
}

// RequestLogout asks the initiators of a target to log out within a time (RFC 7143 11.9.1), as
// before a giveback. It does not wait for them to do so. A connection that is still there when the
// time is over is told that it is dropped, and closed.
func (s *Server) RequestLogout(name string, within time.Duration) {
	within = max(within, 0)
	seconds := uint16(min(within/time.Second, 0xFFFF))
	sessions := s.sessionsWith(name)
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return
	}
	var told sync.WaitGroup
	for _, ss := range sessions {
		for _, c := range ss.connections() {
			told.Add(1)
			c.inBackground(func() {
				defer told.Done()
				c.leaveBy.Store(time.Now().Add(within).UnixNano())
				c.async(asyncLogout, 0, 0, seconds)
			})
		}
	}
	all := make(chan struct{})
	s.wg.Add(1)
	s.mu.Unlock()
	go func() {
		defer s.wg.Done()
		defer close(all)
		told.Wait()
	}()
	select {
	case <-all:
	case <-time.After(s.farewell): // the others are told, or closed, without us
	}
}

// sessionsWith lists the normal sessions with a target.
func (s *Server) sessionsWith(target string) (all []*session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for k, ss := range s.sessions {
		if k.target == target {
			all = append(all, ss)
		}
	}
	return all
}

// Session describes a session for those who ask.
type Session struct {
	Target, Initiator string
	// Alias is what the initiator calls itself, for people.
	Alias string
	// Peers are the initiator's addresses, one a connection, in no order.
	Peers []string
	TSIH  uint16
	// UnderWay is how many of its commands have not been answered.
	UnderWay int
	// Stats is what it has done so far.
	Stats scsi.Stats
}

// Sessions returns the normal sessions, in no order.
func (s *Server) Sessions() []Session {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]Session, 0, len(s.sessions))
	for k, ss := range s.sessions {
		x := Session{
			Target: k.target, Initiator: k.initiator, Alias: ss.alias,
			TSIH: ss.tsih, UnderWay: ss.underWay(), Stats: ss.nexus.Stats(),
		}
		for _, c := range ss.conns {
			x.Peers = append(x.Peers, c.nc.RemoteAddr().String())
		}
		all = append(all, x)
	}
	return all
}

// Serve accepts connections from l until ctx ends (it then returns nil), Close is called
// (ErrServerClosed) or l fails. It closes l. Connections outlive it.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		l.Close()
		return ErrServerClosed
	}
	s.listeners[l] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.listeners, l)
		s.mu.Unlock()
		l.Close()
	}()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		c, err := l.Accept()
		if err == nil {
			s.accept(c)
			continue
		}
		if ctx.Err() != nil {
			return nil
		}
		if s.isClosed() {
			return ErrServerClosed
		}
		if !temporary(err) {
			return fmt.Errorf("iscsi: accept on %s: %w", l.Addr(), err)
		}
		s.log.Warn("iscsi: accept", "portal", l.Addr().String(), "error", err)
		select {
		case <-ctx.Done():
		case <-s.stop:
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// temporary errors are those of one connection, or of a want of descriptors.
func temporary(err error) bool {
	var t interface{ Temporary() bool }
	return errors.As(err, &t) && t.Temporary()
}

func (s *Server) isClosed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

func (s *Server) accept(nc net.Conn) {
	s.mu.Lock()
	full := len(s.conns) >= s.opts.MaxConnections
	if full {
		s.counters.refusedAt.Add(1)
	}
	if s.closed || full && !s.evict() {
		s.mu.Unlock()
		nc.Close()
		return
	}
	c := newConn(s, nc)
	s.conns[c] = struct{}{}
	s.wg.Add(1)
	s.mu.Unlock()
	go func() {
		defer s.wg.Done()
		c.serve()
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
	}()
}

// maxLeaving is how many evicted connections may be about to end.
const maxLeaving = 64

// evict makes room for a connection at the cost of the one that has been logging in for longest,
// so that strangers who connect and never log in cannot keep out those who do. Server.mu is held.
func (s *Server) evict() bool {
	if len(s.conns) >= s.opts.MaxConnections+maxLeaving {
		return false
	}
	var oldest *conn
	for c := range s.conns {
		if !c.full.Load() && !c.evicted && (oldest == nil || c.heard.Load() < oldest.heard.Load()) {
			oldest = c
		}
	}
	if oldest == nil {
		return false
	}
	oldest.evicted = true
	oldest.nc.Close()
	return true
}

// Close ends every portal, connection and command, and waits for them.
func (s *Server) Close() error {
	s.mu.Lock()
	if !s.closed {
		s.closed = true
		close(s.stop)
	}
	for l := range s.listeners {
		l.Close()
	}
	for c := range s.conns {
		c.nc.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
	return nil
}

// Stats returns the counts so far.
func (s *Server) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := &s.counters
	return Stats{
		Connections: len(s.conns), Sessions: len(s.sessions),
		Logins: k.logins.Load(), FailedLogins: k.failedLogins.Load(), Rejects: k.rejects.Load(),
		RefusedConnections: k.refusedAt.Load(),
		Memory:             s.memory.Load(),
		Reads:              k.reads.Load(), Writes: k.writes.Load(), Others: k.others.Load(),
		ReadBytes: k.readBytes.Load(), WriteBytes: k.writeBytes.Load(),
	}
}

// target returns a served target, or nil.
func (s *Server) target(name string) *scsi.Target {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.targets[name]
}

// pinger looks after silent connections, and sessions that wait for a command.
func (s *Server) pinger() {
	defer s.wg.Done()
	while := max(min(s.opts.PingAfter, s.opts.OrderTimeout)/4, time.Millisecond)
	t := time.NewTicker(while)
	defer t.Stop()
	for {
		select {
		case <-s.stop:
			return
		case <-t.C:
		}
		s.mu.Lock()
		conns := make([]*conn, 0, len(s.conns))
		for c := range s.conns {
			conns = append(conns, c)
		}
		sessions := make([]*session, 0, len(s.sessions))
		for _, ss := range s.sessions {
			sessions = append(sessions, ss)
		}
		s.mu.Unlock()
		now := time.Now()
		for _, c := range conns {
			c.tick(now, while)
		}
		for _, ss := range sessions {
			if ss.overdue(now) {
				s.log.Warn("iscsi: a command does not come, ending its session", "initiator", ss.key.initiator, "target", ss.key.target, "tsih", ss.tsih)
				ss.close()
			}
		}
	}
}

// run gives t to a worker. Workers are as many as commands that block, and stay for a while.
func (s *Server) run(t *task) {
	select {
	case s.work <- t:
	default:
		s.wg.Add(1)
		go s.worker(t)
	}
}

// idleWorkers is how many workers stay for the next command.
const idleWorkers = 64

func (s *Server) worker(t *task) {
	defer s.wg.Done()
	for {
		t.conn.execute(t)
		if s.idle.Add(1) > idleWorkers {
			s.idle.Add(-1)
			return
		}
		select {
		case t = <-s.work:
			s.idle.Add(-1)
		case <-s.stop:
			s.idle.Add(-1)
			return
		}
	}
}
