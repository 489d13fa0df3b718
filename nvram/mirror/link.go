package mirror

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/ledge-storage/ledge/nvram"
)

// Options of a Link. Exactly one of Listener and Dial is set.
type Options struct {
	Shelf  string // at most 200 bytes; the partner's must be the same
	Self   byte   // 'A' or 'B'; the partner's must be the other
	Secret []byte // of the shelf, at least 16 bytes

	Listener net.Listener // closed by Close
	Dial     func(ctx context.Context) (net.Conn, error)
	// Better, with Dial, gives connections that are to take the place of the one in use: each when it is authenticated, and not before.
	Better <-chan net.Conn

	// Watch, if not nil, is told what becomes of the connections.
	Watch Watcher

	Heartbeat time.Duration  // a sign of life at least so often; 0 means 500 ms
	Timeout   time.Duration  // a partner silent for so long is gone; 0 means 2 s
	Spinner   func() Spinner // of each connection; nil: its reader sleeps at once where there is nothing
	Retry     time.Duration  // from one attempt to connect to the next; 0 means 200 ms
	// Window is how many bytes of frames may be on their way; 0 means 8 MiB. One frame always may.
	Window int64

	// OnControl gets the partner's control messages, in order, one at a time; body is its to keep. While it
	// runs others queue (64), then the connection waits. It must not call Close.
	OnControl func(kind string, body []byte)
	// OnPeer gets each change of Peer, in order. The same holds.
	OnPeer func(Peer)
	Logger *slog.Logger
}

// Watcher is who chooses between transports (package fallback). Its methods must not wait.
type Watcher interface {
	// Up: nc is the partner's, authenticated, and the one in use.
	Up(nc net.Conn)
	// Down: nc, which may never have been up, is over. fault is why, where the transport or who is at its other end may be
	// to blame; nil where a side ended it.
	Down(nc net.Conn, fault error)
}

func (o *Options) validate() error {
	switch {
	case o.Shelf == "" || len(o.Shelf) > 200:
		return fmt.Errorf("mirror: shelf name of %d bytes", len(o.Shelf))
	case o.Self != 'A' && o.Self != 'B':
		return fmt.Errorf("mirror: controller %q is neither A nor B", o.Self)
	case len(o.Secret) < 16:
		return fmt.Errorf("mirror: secret of %d bytes, at least 16 needed", len(o.Secret))
	case (o.Listener == nil) == (o.Dial == nil):
		return errors.New("mirror: one of Listener and Dial is needed")
	}
	setDefault(&o.Heartbeat, 500*time.Millisecond)
	setDefault(&o.Timeout, 2*time.Second)
	setDefault(&o.Retry, 200*time.Millisecond)
	if o.Window <= 0 {
		o.Window = 8 << 20
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Heartbeat*2 > o.Timeout {
		return fmt.Errorf("mirror: heartbeat %v is not well below the timeout %v", o.Heartbeat, o.Timeout)
	}
	return nil
}

func setDefault(d *time.Duration, v time.Duration) {
	if *d <= 0 {
		*d = v
	}
}

// Peer is what is known of the partner.
type Peer struct {
	Connected  bool
	Controller string // "A" or "B"
	Role       string // "none", "owner", "standby"
	// Epoch of an owner, or the newest that a standby saw.
	Epoch uint64
	// Transport is the network that the connection is over ("tcp", "unix", "window"), and since when it is up; empty while
	// there is none.
	Transport string
	Since     time.Time
	// Why the connection before ended, for people; empty while connected.
	Lost string
}

// Link is the connection to the partner, made again whenever it breaks.
type Link struct {
	opts Options
	stop context.CancelFunc
	ctx  context.Context
	done sync.WaitGroup

	events  chan func() // OnControl, OnPeer
	dialNow chan struct{}

	mu   sync.Mutex
	role role
	// turn counts changes of role: a connection made in an earlier turn is not used.
	turn   uint64
	feed   *nvram.Feed
	mirror *nvram.Mirror
	epoch  uint64
	conn   *conn
	peer   Peer
	slow   time.Duration // no session with a partner that was too slow before so long
}

// New starts the link. The Listener is the Link's from then on.
func New(o Options) (*Link, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	l := &Link{opts: o, events: make(chan func(), 64), dialNow: make(chan struct{}, 1)}
	l.ctx, l.stop = context.WithCancel(context.Background())
	l.done.Go(l.dispatch)
	if o.Listener != nil {
		l.done.Go(l.accept)
	} else {
		l.done.Go(l.dial)
	}
	return l, nil
}

// Close ends the connection and all that the link runs. A log that is attached is closed first, else it goes solo.
func (l *Link) Close() error {
	l.stop()
	if l.opts.Listener != nil {
		l.opts.Listener.Close()
	}
	l.mu.Lock()
	c := l.conn
	l.mu.Unlock()
	if c != nil {
		c.close(errClosed)
	}
	l.done.Wait()
	return nil
}

var (
	errClosed   = errors.New("mirror: link closed")
	errReplaced = errors.New("mirror: the partner connected anew")
	errRole     = errors.New("mirror: own role changed")
)

// Peer is what is known of the partner now.
func (l *Link) Peer() Peer {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.peer
}

// Send queues a control message: at most 255 bytes of kind, 1 MiB of body. nil says that it is on its way, not
// that it arrived. ErrNotConnected, or the end of ctx while the queue is full.
func (l *Link) Send(ctx context.Context, kind string, body []byte) error {
	if len(kind) > 255 || len(body) > 1<<20 {
		return fmt.Errorf("mirror: control message of %d bytes: %w", len(body), ErrProtocol)
	}
	l.mu.Lock()
	c := l.conn
	l.mu.Unlock()
	if c == nil {
		return ErrNotConnected
	}
	p := append(make([]byte, 0, 1+len(kind)+len(body)), byte(len(kind)))
	p = append(append(p, kind...), body...)
	c.queued.Add(1)
	select {
	case c.out <- outgoing{kind: msgControl, payload: p}:
		return nil
	case <-c.ctx.Done():
		c.queued.Add(-1)
		return ErrNotConnected
	case <-ctx.Done():
		c.queued.Add(-1)
		return fmt.Errorf("mirror: send %s: %w", kind, ctx.Err())
	}
}

// Replicator makes this controller the owner for as long as a log is open with it.
func (l *Link) Replicator() nvram.Replicator { return (*replicator)(l) }

type replicator Link

// Attach implements nvram.Replicator.
func (r *replicator) Attach(f *nvram.Feed) {
	(*Link)(r).setRole(roleOwner, f, nil, f.Epoch())
}

// Detach implements nvram.Replicator.
func (r *replicator) Detach() { (*Link)(r).setRole(roleNone, nil, nil, 0) }

// Receive makes this controller the standby: the partner's log is written to m. Owners of an epoch below the one
// given are refused.
func (l *Link) Receive(m *nvram.Mirror, epoch uint64) {
	l.setRole(roleStandby, nil, m, max(epoch, m.State().Epoch))
}

// StopReceiving ends that. When it returns nothing writes the mirror any more.
func (l *Link) StopReceiving() { l.setRole(roleNone, nil, nil, 0) }

// setRole ends the connection made in another role and waits for its end.
func (l *Link) setRole(r role, f *nvram.Feed, m *nvram.Mirror, epoch uint64) {
	l.mu.Lock()
	if r != roleNone && l.role != roleNone {
		l.mu.Unlock()
		panic("mirror: a second role at once: detach the log, or stop receiving, first")
	}
	l.role, l.feed, l.mirror, l.epoch = r, f, m, epoch
	l.turn++
	l.slow = 0
	c := l.conn
	l.mu.Unlock()
	if c != nil {
		c.close(errRole)
		<-c.over
	}
	select {
	case l.dialNow <- struct{}{}:
	default:
	}
}

// dispatch calls the callbacks.
func (l *Link) dispatch() {
	for {
		select {
		case f := <-l.events:
			f()
		case <-l.ctx.Done():
			return
		}
	}
}

func (l *Link) event(ctx context.Context, f func()) {
	select {
	case l.events <- f:
	case <-ctx.Done():
	case <-l.ctx.Done():
	}
}

// dial keeps one connection.
func (l *Link) dial() {
	for l.ctx.Err() == nil {
		ctx, cancel := context.WithTimeout(l.ctx, l.opts.Timeout)
		nc, err := l.opts.Dial(ctx)
		cancel()
		if err == nil {
			err = l.serveOrBetter(nc)
		}
		l.lost(err)
		pause := time.NewTimer(l.opts.Retry)
		select {
		case <-pause.C:
		case <-l.dialNow:
		case <-l.ctx.Done():
		}
		pause.Stop()
	}
}

// serveOrBetter serves a connection, and those that take its place, to the end of the last.
func (l *Link) serveOrBetter(nc net.Conn) error {
	serve := func(nc net.Conn) chan error {
		ended := make(chan error, 1)
		l.done.Go(func() { ended <- l.serve(nc) })
		return ended
	}
	current, next := serve(nc), chan error(nil) // next: one that is not authenticated yet
	for {
		select {
		case err := <-current:
			if next == nil {
				return err
			}
			l.lost(err)
			current, next = next, nil
		case err := <-next:
			l.opts.Logger.Warn("mirror: what was to be a better connection", "err", err)
			next = nil
		case nc := <-l.opts.Better:
			if next != nil {
				nc.Close()
			} else {
				next = serve(nc)
			}
		}
	}
}

// maxGreeting is how many connections may be in their handshake at once.
const maxGreeting = 8

// accept serves who connects; the newest that proves to be the partner stays.
func (l *Link) accept() {
	var conns sync.WaitGroup
	defer conns.Wait()
	places := make(chan struct{}, maxGreeting)
	for {
		nc, err := l.opts.Listener.Accept()
		if l.ctx.Err() != nil {
			if err == nil {
				nc.Close()
			}
			return
		}
		if err != nil {
			l.opts.Logger.Warn("mirror accept", "err", err)
			select {
			case <-time.After(l.opts.Retry):
			case <-l.ctx.Done():
			}
			continue
		}
		select {
		case places <- struct{}{}:
		default:
			nc.Close() // as many as that are strangers, or will be gone in a moment
			continue
		}
		conns.Go(func() {
			defer func() { <-places }()
			l.lost(l.serve(nc))
		})
	}
}

// lost notes why there is no connection.
func (l *Link) lost(err error) {
	if err == nil || errors.Is(err, errReplaced) || l.ctx.Err() != nil {
		return
	}
	l.mu.Lock()
	same := l.peer.Lost == err.Error()
	if l.conn == nil {
		l.peer.Lost = err.Error()
	}
	l.mu.Unlock()
	if !same {
		l.opts.Logger.Warn("mirror link down", "err", err)
	}
}

// adopt makes c the connection, once the one before is over. False: the role changed since c's Hello.
func (l *Link) adopt(c *conn) bool {
	for {
		l.mu.Lock()
		if c.turn != l.turn || l.ctx.Err() != nil {
			l.mu.Unlock()
			return false
		}
		old := l.conn
		if old == nil {
			l.conn = c
			l.peer = Peer{Connected: true, Controller: string(c.peer.controller), Role: c.peer.role.String(), Epoch: c.peer.epoch,
				Transport: c.nc.RemoteAddr().Network(), Since: time.Now()}
			if l.opts.Watch != nil {
				l.opts.Watch.Up(c.nc)
			}
			l.notify()
			l.mu.Unlock()
			l.opts.Logger.Info("mirror link up", "transport", c.nc.RemoteAddr().Network(), "partner", string(c.peer.controller), "role", c.peer.role, "epoch", c.peer.epoch)
			return true
		}
		l.mu.Unlock()
		old.close(errReplaced)
		<-old.over
	}
}

// abandon takes c away.
func (l *Link) abandon(c *conn, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conn == c {
		l.conn = nil
		l.peer.Connected, l.peer.Lost = false, err.Error()
		l.peer.Transport, l.peer.Since = "", time.Time{}
		l.notify()
	}
}

// notify queues OnPeer. Called with mu held, so it must not wait: a change that finds the queue full is dropped, and
// the next one carries the state.
func (l *Link) notify() {
	if l.opts.OnPeer == nil {
		return
	}
	select {
	case l.events <- func() { l.opts.OnPeer(l.Peer()) }:
	default:
	}
}
