// Package fallback connects the two controllers through a window (package window) where both have it, and over TCP where
// the window is not there, the partner does not answer on it, or it died.
//
// It owns the choice and nothing else: nvram/mirror authenticates what comes over either transport alike, and of two
// connections the newest authenticated one stays. It never waits for the window for longer than Options.Answer, and half of it once more.
//
// # The choice
//
// The controller that dials chooses; the one that listens is there on both.
//
//	dial:  the window, unless it rests ──answered──► it is used
//	          │ not there, no answer in time
//	          ▼
//	       TCP ──────────────connected─────────────► the window once more: the partner may have come between the two tries,
//	          │                                     and would stay on TCP; else TCP is used, and the window has a strike
//	          │ nobody there either
//	          ▼
//	       the partner is away: nothing is learned of the window
//
// A window that cannot hold a connection must not cost one every few seconds, each with a resync. So it has a strike
// when TCP had to stand in for it, and when its connection ended within Options.Stable by a fault. A first short one is
// forgiven. That the partner left or died is no fault of the window's: whether it answers there, the next dial finds. From then on it rests, for Options.Rest, twice as long with each
// further strike, at most Options.MostRest; while it rests TCP is tried first. A connection that lasted clears the strikes.
//
// While TCP is in use, who dials asks on the window every Options.Back whether the partner is there again, and offers that connection as
// a better one (mirror.Options.Better). It takes the other's place when it is authenticated: the writes under way wait for a resume of the session,
// which is some milliseconds. Each time that one does not last six times as long as Options.Back, by a fault, doubles the time to the next, up to Options.MostBack.
//
// # Decisions
//
// 2026-11-28. At first TCP was kept until a connection had to be made anew, which may be months: a window that was away for a second,
// or a partner that came between two tries, left the shelf with twice the latency, and nobody looked.
package fallback

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/ledge-storage/ledge/nvram/mirror/window"
)

// errAnswer: nobody was there in time.
var errAnswer = errors.New("the partner does not answer on it")

// Options of New.
type Options struct {
	Window window.Options
	// Listener or Dial is TCP's; with neither there is the window only.
	Listener net.Listener
	Dial     func(ctx context.Context) (net.Conn, error)

	Answer         time.Duration // how long the partner may take to answer on the window; 0 means 700 ms
	Stable         time.Duration // a connection that lasted so long was no failure of the window; 0 means 5 s
	Rest, MostRest time.Duration // 0 means 1 s and 1 min
	Back, MostBack time.Duration // 0 means 10 s and 10 min
	Logger         *slog.Logger
}

// Transport makes the connections of a mirror.Link: its Dial, or its Listener, and its Watcher.
type Transport struct {
	o        Options
	ctx      context.Context
	cancel   context.CancelFunc
	done     sync.WaitGroup
	incoming chan incoming
	better   chan net.Conn

	mu      sync.Mutex
	w       *window.Window // nil: not open
	up      *conn          // the window's, where it is in use
	since   time.Time      // when it came into use
	why     error          // the last failure of the window; nil once it is in use
	tried   bool           // it failed since the last Up
	strikes int
	rest    time.Time // until then it rests
	back    *backing  // while a connection is up that is not the window's, at who dials
	relapse int       // connections that it went back to and that did not last
	last    Fallback
	unsaid  bool // why that was is not known
}

type incoming struct {
	nc  net.Conn
	err error
}

// Fallback is the last time that another transport stood in for the window.
type Fallback struct {
	At     time.Time // zero: never
	Reason string
}

// conn is a connection through the window.
type conn struct {
	*window.Conn
	once sync.Once
	over chan struct{}
}

func (c *conn) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() { close(c.over) })
	return err
}

// New makes a transport. It opens the window when it is first needed.
func New(o Options) *Transport {
	for d, v := range map[*time.Duration]time.Duration{&o.Answer: 700 * time.Millisecond, &o.Stable: 5 * time.Second, &o.Rest: time.Second, &o.MostRest: time.Minute,
		&o.Back: 10 * time.Second, &o.MostBack: 10 * time.Minute} {
		if *d <= 0 {
			*d = v
		}
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	t := &Transport{o: o, incoming: make(chan incoming), better: make(chan net.Conn)}
	t.ctx, t.cancel = context.WithCancel(context.Background())
	return t
}

// Close closes the window, and TCP's listener. The link is closed before.
func (t *Transport) Close() error {
	t.cancel()
	var err error
	if t.o.Listener != nil {
		if err = t.o.Listener.Close(); errors.Is(err, net.ErrClosed) {
			err = nil
		}
	}
	t.done.Wait()
	t.mu.Lock()
	w := t.w
	t.w = nil
	t.mu.Unlock()
	if w != nil {
		err = errors.Join(err, w.Close())
	}
	return err
}

// Fallback is the last one.
func (t *Transport) Fallback() Fallback {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.last
}

// Dial is for mirror.Options.
func (t *Transport) Dial(ctx context.Context) (net.Conn, error) {
	t.stopBack()
	rests := t.resting()
	if !rests {
		c, err := t.dialWindow(ctx, t.o.Answer)
		if err == nil {
			return c, nil
		}
		if t.o.Dial == nil {
			return nil, err
		}
		t.failed(err)
	}
	nc, err := t.o.Dial(ctx)
	switch {
	case err != nil && rests: // better a window that rests than nothing
		if c, werr := t.dialWindow(ctx, t.o.Answer); werr == nil {
			return c, nil
		}
	case err == nil && !rests: // it may have come up between the two tries
		if c, werr := t.dialWindow(ctx, t.o.Answer/2); werr == nil {
			nc.Close()
			return c, nil
		}
	}
	return nc, err
}

func (t *Transport) resting() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.o.Dial != nil && time.Now().Before(t.rest)
}

func (t *Transport) dialWindow(ctx context.Context, answer time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, answer)
	defer cancel()
	return t.connect(ctx)
}

// connect waits for the partner on the window until ctx ends. One at a time calls it, and only while no connection is open.
func (t *Transport) connect(ctx context.Context) (*conn, error) {
	w, err := t.open()
	if err != nil {
		return nil, err
	}
	nc, err := w.Dial(ctx)
	switch {
	case err == nil:
		return &conn{Conn: nc.(*window.Conn), over: make(chan struct{})}, nil
	case errors.Is(err, window.ErrFault):
		t.drop(w)
	case errors.Is(err, context.DeadlineExceeded):
		err = fmt.Errorf("window %s: %w: %w", t.o.Window.Path, errAnswer, err)
	}
	return nil, err
}

// open gives the window; one that is not what the path names any more is opened again.
func (t *Transport) open() (*window.Window, error) {
	t.mu.Lock()
	w := t.w
	t.mu.Unlock()
	if w != nil {
		if !w.Replaced() {
			return w, nil
		}
		t.drop(w)
	}
	w, err := window.Open(t.o.Window)
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.w = w
	return w, nil
}

// drop closes the window.
func (t *Transport) drop(w *window.Window) {
	t.mu.Lock()
	t.w = nil
	t.mu.Unlock()
	if err := w.Close(); err != nil {
		t.o.Logger.Debug("window", "err", err)
	}
}

// failed notes why the window is not used.
func (t *Transport) failed(err error) {
	t.mu.Lock()
	same := t.why != nil && t.why.Error() == err.Error()
	t.why, t.tried = err, true
	if t.unsaid && t.up == nil {
		t.last.Reason, t.unsaid = err.Error(), false
	}
	t.mu.Unlock()
	if !same {
		t.o.Logger.Warn("mirror window", "err", err)
	}
}

// Up implements mirror.Watcher: what stands in for the window is told from a stranger's connection here, where it is
// authenticated.
func (t *Transport) Up(nc net.Conn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	if c, ok := nc.(*conn); ok {
		t.up, t.since, t.why, t.tried, t.unsaid = c, now, nil, false, false
		return
	}
	t.last = Fallback{At: now, Reason: "the partner came over " + nc.RemoteAddr().Network()}
	if t.unsaid = t.why == nil; !t.unsaid {
		t.last.Reason = t.why.Error()
	}
	if t.tried {
		t.tried = false
		t.strike(now, 0)
	}
	t.o.Logger.Warn("the mirror link does without its window", "transport", nc.RemoteAddr().Network(), "reason", t.last.Reason)
	if t.o.Dial != nil && t.back == nil && t.ctx.Err() == nil {
		ctx, cancel := context.WithCancel(t.ctx)
		b := &backing{nc: nc, cancel: cancel, ended: make(chan struct{})}
		t.back = b
		t.done.Go(func() {
			defer close(b.ended)
			t.goBack(ctx)
		})
	}
}

// Down implements mirror.Watcher.
func (t *Transport) Down(nc net.Conn, fault error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	c, ok := nc.(*conn)
	if !ok {
		if b := t.back; b != nil && b.nc == nc {
			b.cancel()
		}
		return
	}
	now := time.Now()
	lasted := t.up == c && now.Sub(t.since) >= t.o.Stable
	if t.up == c && now.Sub(t.since) >= 6*t.o.Back {
		t.relapse = 0
	} else if fault != nil && !errors.Is(fault, window.ErrLost) && !errors.Is(fault, window.ErrDead) {
		t.relapse++
	}
	if t.up == c {
		t.up = nil
	}
	if lasted {
		t.strikes = 0
	}
	if fault == nil || errors.Is(fault, window.ErrLost) { // it left, or began anew
		return
	}
	t.why = fmt.Errorf("window %s: %w", t.o.Window.Path, fault)
	if !lasted && !errors.Is(fault, window.ErrDead) {
		t.strike(now, 1)
	}
}

// strike has the window rest, but for the forgiven ones. Called with mu held.
func (t *Transport) strike(now time.Time, forgiven int) {
	t.strikes++
	if n := t.strikes - forgiven; n > 0 {
		t.rest = now.Add(min(t.o.Rest<<min(n-1, 16), t.o.MostRest))
	}
}
