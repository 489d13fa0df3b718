package window

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

const (
	longestNap   = 500 * time.Microsecond // where nobody can ring
	longestSleep = 50 * time.Millisecond  // where the other may have died between a look and the bell
	longestWait  = 20 * time.Millisecond  // for a partner that is not there yet, where nobody can ring
	// lingerFor is how long Close waits for the other side to take what was written.
	lingerFor = 100 * time.Millisecond
)

// Conn is a connection. It implements net.Conn.
type Conn struct {
	w           *Window
	self, peer  uint64 // sessions
	closed      atomic.Bool
	closing     sync.Mutex
	read, write end
}

// end is one direction.
type end struct {
	mu       sync.Mutex
	at       uint64       // bytes so far
	deadline atomic.Int64 // nanoseconds after the window was opened; 0: none
}

// connect begins a session and waits until the other side has one.
func (w *Window) connect(ctx context.Context) (*Conn, error) {
	if !w.busy.CompareAndSwap(false, true) {
		return nil, ErrBusy
	}
	c := &Conn{w: w}
	for c.self == 0 {
		c.self = rand.Uint64()
	}
	err := w.guard(func() error {
		store(w.own, offSession, 0)
		store(w.own, offPeer, 0)
		store(w.own, offPut, 0)
		store(w.own, offTaken, 0)
		store(w.own, offSession, c.self)
		w.ringBell()
		return nil
	})
	stop := context.AfterFunc(ctx, w.wakeOwn)
	defer stop()
	nap := 20 * time.Microsecond
	for err == nil {
		done := false
		err = w.guard(func() error {
			rung := atomic.LoadUint32(half(w.other, offBell))
			if p := load(w.other, offSession); p != 0 && p != c.peer {
				if err := w.layout(); err != nil {
					return err
				}
				c.peer = p
				store(w.own, offPeer, p)
				w.ringBell()
			}
			if done = c.standing(); !done && ctx.Err() == nil {
				w.sleep(rung, nap)
			}
			return nil
		})
		if done && err == nil {
			w.peer.answered(time.Now()) // nobody else knows c.self
			return c, nil
		}
		nap = min(2*nap, longestWait)
		if err == nil {
			err = ctx.Err()
		}
	}
	c.leave()
	return nil, err
}

// layout checks that the other side has the same.
func (w *Window) layout() error {
	var head [16]byte
	copy(head[:], w.other)
	if string(head[:8]) != magic || binary.LittleEndian.Uint32(head[8:]) != version || uint64(binary.LittleEndian.Uint32(head[12:])) != w.ring {
		return fmt.Errorf("%w: version %d, rings of %d bytes; here version %d, %d bytes", ErrLayout, binary.LittleEndian.Uint32(head[8:]),
			binary.LittleEndian.Uint32(head[12:]), version, w.ring)
	}
	return nil
}

// standing says whether each side has the other's session accepted. The window is in use.
func (c *Conn) standing() bool {
	w := c.w
	return c.peer != 0 && load(w.other, offSession) == c.peer && load(w.other, offPeer) == c.self && load(w.own, offSession) == c.self
}

// leave ends the session.
func (c *Conn) leave() {
	w := c.w
	_ = w.guard(func() error {
		if load(w.own, offSession) == c.self {
			store(w.own, offSession, 0)
			w.ringBell()
		}
		return nil
	})
	w.busy.Store(false)
}

// await calls ready, which tells how many bytes may be moved, until there are some. The window is in use.
func (c *Conn) await(e *end, ready func() (uint64, error)) (uint64, error) {
	w := c.w
	var began time.Time
	pause := 20 * time.Microsecond
	for i := 0; ; i++ {
		rung := atomic.LoadUint32(half(w.other, offBell))
		now := time.Now()
		if i == 0 {
			began = now
		}
		left := time.Hour
		if d := e.deadline.Load(); d != 0 {
			left = time.Duration(d) - now.Sub(w.began)
		}
		n, err := ready()
		switch {
		case c.closed.Load():
			return 0, net.ErrClosed
		case w.closed.Load():
			return 0, os.ErrClosed
		case left <= 0:
			return 0, os.ErrDeadlineExceeded
		case n > 0 || err != nil:
			return n, err
		case !c.standing():
			return 0, ErrLost
		case w.peer.dead.Load():
			return 0, ErrDead
		}
		if now.Sub(began) < w.opts.Spin {
			runtime.Gosched()
			continue
		}
		if w.file {
			pause = longestSleep
		}
		w.sleep(rung, min(pause, left))
		pause = min(2*pause, longestNap)
	}
}

// Read implements net.Conn. What the other side wrote before it left is read first; then io.EOF.
func (c *Conn) Read(p []byte) (n int, err error) {
	if len(p) == 0 {
		return 0, nil
	}
	c.read.mu.Lock()
	defer c.read.mu.Unlock()
	w := c.w
	err = w.guard(func() error {
		have, err := c.await(&c.read, func() (uint64, error) {
			put := load(w.other, offPut)
			if !c.standing() {
				return 0, io.EOF // put may be another session's
			}
			if put-c.read.at > w.ring {
				return 0, fmt.Errorf("%w: %d bytes in a ring of %d", ErrProtocol, put-c.read.at, w.ring)
			}
			return put - c.read.at, nil
		})
		if err != nil {
			return err
		}
		p = p[:min(uint64(len(p)), have)]
		at := c.read.at % w.ring
		n = copy(p, w.in[at:])
		n += copy(p[n:], w.in)
		c.read.at += uint64(n)
		store(w.own, offTaken, c.read.at)
		w.ringBell()
		return nil
	})
	return n, c.wrap("read", err)
}

// Write implements net.Conn.
func (c *Conn) Write(p []byte) (int, error) {
	n, err := c.WriteBuffers([][]byte{p})
	return int(n), err
}

// WriteBuffers writes all of bufs, and tells the other side of them at once, as far as there is room.
func (c *Conn) WriteBuffers(bufs [][]byte) (n int64, err error) {
	c.write.mu.Lock()
	defer c.write.mu.Unlock()
	w, at := c.w, 0 // at in bufs[0]
	for err == nil {
		for len(bufs) > 0 && at == len(bufs[0]) {
			bufs, at = bufs[1:], 0
		}
		if len(bufs) == 0 {
			break
		}
		err = w.guard(func() error {
			room, err := c.await(&c.write, func() (uint64, error) {
				taken := load(w.other, offTaken)
				if !c.standing() {
					return 0, ErrLost
				}
				if w.peer.dead.Load() {
					return 0, ErrDead // though there be room
				}
				if taken > c.write.at || c.write.at-taken > w.ring {
					return 0, fmt.Errorf("%w: %d bytes taken of %d", ErrProtocol, taken, c.write.at)
				}
				return w.ring - (c.write.at - taken), nil
			})
			if err != nil {
				return err
			}
			for len(bufs) > 0 && room > 0 {
				part := bufs[0][at:]
				part = part[:min(uint64(len(part)), room)]
				k := copy(w.out[c.write.at%w.ring:], part)
				copy(w.out, part[k:])
				room -= uint64(len(part))
				c.write.at += uint64(len(part))
				n += int64(len(part))
				if at += len(part); at == len(bufs[0]) {
					bufs, at = bufs[1:], 0
				}
			}
			store(w.own, offPut, c.write.at)
			w.ringBell()
			return nil
		})
	}
	return n, c.wrap("write", err)
}

func (c *Conn) wrap(what string, err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	return &net.OpError{Op: what, Net: "window", Addr: c.RemoteAddr(), Err: err}
}

// Close ends the connection, once the other side has taken what was written, or a moment later.
func (c *Conn) Close() error {
	c.closing.Lock()
	defer c.closing.Unlock()
	if c.closed.Load() {
		return nil
	}
	w := c.w
	for end := time.Now().Add(lingerFor); time.Now().Before(end); {
		waits := false
		err := w.guard(func() error {
			waits = c.standing() && !w.peer.dead.Load() && load(w.other, offTaken) < load(w.own, offPut)
			return nil
		})
		if err != nil || !waits {
			break
		}
		nap(longestNap)
	}
	c.closed.Store(true)
	c.leave()
	_ = w.guard(func() error { w.wakeOwn(); return nil })
	return nil
}

// Addr of either side: the window's path and the side.
type Addr struct {
	Path string
	Side byte
}

func (a Addr) Network() string { return "window" }
func (a Addr) String() string  { return fmt.Sprintf("window:%s#%c", a.Path, a.Side) }

func (c *Conn) LocalAddr() net.Addr  { return c.w.Addr() }
func (c *Conn) RemoteAddr() net.Addr { return Addr{c.w.opts.Path, 'A' + 'B' - c.w.opts.Side} }

// SetDeadline implements net.Conn, as do the others.
func (c *Conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

func (c *Conn) SetReadDeadline(t time.Time) error  { return c.setDeadline(&c.read, t) }
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.setDeadline(&c.write, t) }

func (c *Conn) setDeadline(e *end, t time.Time) error {
	if c.closed.Load() {
		return net.ErrClosed
	}
	ns := int64(0)
	if !t.IsZero() {
		// What has passed already is any time before the window was opened. Sub is by the monotonic clock where t has it.
		if ns = max(t.Sub(c.w.began).Nanoseconds(), -1); ns == 0 {
			ns = -1
		}
	}
	sooner := ns != 0 && (e.deadline.Load() == 0 || ns < e.deadline.Load())
	e.deadline.Store(ns)
	if sooner {
		_ = c.w.guard(func() error { c.w.wakeOwn(); return nil })
	}
	return nil
}

// Dial connects: it waits for the other side until ctx ends.
func (w *Window) Dial(ctx context.Context) (net.Conn, error) {
	c, err := w.connect(ctx)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: "window", Addr: w.Addr(), Err: err}
	}
	return c, nil
}

// Addr is this side's.
func (w *Window) Addr() net.Addr { return Addr{w.opts.Path, w.opts.Side} }

// Listener gives the window's connections, one after the other.
type Listener struct {
	w      *Window
	ctx    context.Context
	cancel context.CancelFunc
}

// Listen makes a listener; it owns the window.
func (w *Window) Listen() *Listener {
	l := &Listener{w: w}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	return l
}

// Accept implements net.Listener. While a connection is open it waits for its end.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		c, err := l.w.connect(l.ctx)
		switch {
		case l.ctx.Err() != nil:
			if err == nil {
				c.Close()
			}
			return nil, &net.OpError{Op: "accept", Net: "window", Addr: l.Addr(), Err: net.ErrClosed}
		case err == nil:
			return c, nil
		case !errors.Is(err, ErrBusy):
			return nil, &net.OpError{Op: "accept", Net: "window", Addr: l.Addr(), Err: err}
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-l.ctx.Done():
		}
	}
}

// Close ends Accept, and the window with the connection that is open.
func (l *Listener) Close() error {
	l.cancel()
	return l.w.Close()
}

func (l *Listener) Addr() net.Addr { return l.w.Addr() }
