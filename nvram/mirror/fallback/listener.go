package fallback

import (
	"context"
	"errors"
	"net"
	"time"
)

const (
	// lookEvery is how often who listens looks whether the window is still the one that the path names.
	lookEvery = 2 * time.Second
	// Between attempts to open a window that cannot be.
	firstPause = 200 * time.Millisecond
	mostPause  = 5 * time.Second
)

// listener gives the connections of both transports.
type listener struct{ t *Transport }

// Listen begins to listen on both. Once only.
func (t *Transport) Listen() net.Listener {
	// The window first: a partner that finds TCP answered has had its chance there.
	t.done.Go(t.acceptWindow)
	if t.o.Listener != nil {
		t.done.Go(t.acceptOther)
	}
	return listener{t}
}

// Accept implements net.Listener.
func (l listener) Accept() (net.Conn, error) {
	select {
	case in := <-l.t.incoming:
		return in.nc, in.err
	case <-l.t.ctx.Done():
		return nil, &net.OpError{Op: "accept", Net: "window", Addr: l.Addr(), Err: net.ErrClosed}
	}
}

// Close ends Accept. The window stays for the connection through it, until Transport.Close.
func (l listener) Close() error {
	l.t.cancel()
	if l.t.o.Listener != nil {
		return l.t.o.Listener.Close()
	}
	return nil
}

// Addr is TCP's, where there is one: the one that can be told to somebody else.
func (l listener) Addr() net.Addr {
	if l.t.o.Listener != nil {
		return l.t.o.Listener.Addr()
	}
	return pathAddr(l.t.o.Window.Path)
}

// pathAddr is the window's address, also while it is not open.
type pathAddr string

func (pathAddr) Network() string  { return "window" }
func (a pathAddr) String() string { return "window:" + string(a) }

// give hands a connection to Accept, or closes it where nobody accepts any more.
func (t *Transport) give(in incoming) bool {
	select {
	case t.incoming <- in:
		return true
	case <-t.ctx.Done():
		if in.nc != nil {
			in.nc.Close()
		}
		return false
	}
}

// acceptOther accepts TCP's.
func (t *Transport) acceptOther() {
	for {
		nc, err := t.o.Listener.Accept()
		if errors.Is(err, net.ErrClosed) || !t.give(incoming{nc, err}) {
			return
		}
	}
}

// acceptWindow accepts the window's, one after the other's end. It ends last when the link is closed: its connection is the link's.
func (t *Transport) acceptWindow() {
	pause := firstPause
	for t.ctx.Err() == nil {
		ctx, cancel := context.WithTimeout(t.ctx, lookEvery)
		c, err := t.connect(ctx)
		cancel()
		switch {
		case err == nil:
			pause = firstPause
			if t.give(incoming{nc: c}) {
				<-c.over
			}
			continue
		case errors.Is(err, errAnswer):
			continue
		case t.ctx.Err() != nil:
			return
		}
		t.failed(err)
		select {
		case <-time.After(pause):
		case <-t.ctx.Done():
		}
		pause = min(2*pause, mostPause)
	}
}
