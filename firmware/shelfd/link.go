package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"github.com/ledge-storage/ledge/firmware/control"
	"github.com/ledge-storage/ledge/firmware/ha"
	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/nvram/mirror"
	"github.com/ledge-storage/ledge/nvram/mirror/fallback"
	"github.com/ledge-storage/ledge/nvram/mirror/window"
)

// link is what the backend needs of the mirror link (*mirror.Link, through linkTo).
type link interface {
	// Replicator is the owner's side.
	Replicator() nvram.Replicator
	// Receive makes this controller the standby: owners of epoch or newer may fill m. StopReceiving returns when
	// nothing writes m any more.
	Receive(m *nvram.Mirror, epoch uint64)
	StopReceiving()
	Connected() bool
	// Partner is what is known of the link: all but the state of the mirror.
	Partner() control.Partner
	Send(ctx context.Context, kind string, body []byte) error
}

// linkTo adapts *mirror.Link. transport is nil where there is no window.
type linkTo struct {
	*mirror.Link
	transport *fallback.Transport
}

func (l linkTo) Connected() bool { return l.Peer().Connected }

func (l linkTo) Partner() control.Partner {
	pe := l.Peer()
	p := control.Partner{Connected: pe.Connected, Transport: pe.Transport}
	if pe.Connected {
		p.TransportSince = &pe.Since
	}
	if l.transport != nil {
		if f := l.transport.Fallback(); !f.At.IsZero() {
			p.Fallback = &control.Fallback{At: f.At, Reason: f.Reason}
		}
	}
	return p
}

// connections says in o how the connections to the partner are made: over TCP or a unix socket, through a window, or through the
// window with the other standing in. t, if not nil, is to be closed after the link.
func connections(ctx context.Context, c *Config, o *mirror.Options) (t *fallback.Transport, err error) {
	m := c.Mirror
	path := m.Window
	if only, ok := strings.CutPrefix(m.Listen+m.Dial, "window:"); ok {
		path = only
	} else if m.Listen != "" {
		if o.Listener, err = listen(ctx, m.Listen); err != nil {
			return nil, fmt.Errorf("mirror: %w", err)
		}
	} else {
		network, address := splitAddr(m.Dial)
		o.Dial = func(ctx context.Context) (net.Conn, error) { return (&net.Dialer{}).DialContext(ctx, network, address) }
	}
	if path == "" {
		return nil, nil
	}
	t = fallback.New(fallback.Options{Window: window.Options{Path: path, Side: o.Self, Create: m.WindowCreate}, Listener: o.Listener, Dial: o.Dial, Logger: o.Logger})
	o.Watch = t
	if m.Listen != "" {
		o.Listener = t.Listen()
	} else {
		o.Dial, o.Better = t.Dial, t.Better()
	}
	return t, nil
}

// haLink is the link as the driver sees it. Freeze and Thaw are called by the driver's worker alone.
type haLink struct {
	b         *backend
	receiving bool
}

func (l *haLink) Freeze() {
	l.b.link.StopReceiving()
	l.receiving = false
}

// Thaw while thawed changes nothing: a change of role costs the connection.
func (l *haLink) Thaw(seen ha.View) {
	if !l.receiving {
		l.b.link.Receive(l.b.mirror, seen.Epoch)
		l.receiving = true
	}
}

func (l *haLink) Connected() bool { return l.b.link.Connected() }

func (l *haLink) Send(ctx context.Context, kind string, body []byte) error {
	return l.b.link.Send(ctx, kind, body)
}

// secretKey makes the mirror link's key of the configured secret: bound to its use.
func secretKey(secret string) []byte {
	sum := sha256.Sum256([]byte("ledge mirror link\x00" + secret))
	return sum[:]
}

// splitAddr gives network and address of host:port or unix:/path.
func splitAddr(addr string) (network, address string) {
	if path, ok := strings.CutPrefix(addr, "unix:"); ok {
		return "unix", path
	}
	return "tcp", addr
}

// listen listens on host:port or unix:/path. A socket file that nobody answers at is of a dead process, and is
// replaced.
func listen(ctx context.Context, addr string) (net.Listener, error) {
	network, address := splitAddr(addr)
	if network == "unix" {
		c, err := net.DialTimeout(network, address, time.Second)
		if err == nil {
			c.Close()
			return nil, fmt.Errorf("listen %s: another process answers there", addr)
		}
		if err := os.Remove(address); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, network, address)
	if err != nil {
		return nil, err
	}
	if network == "unix" {
		if err := os.Chmod(address, 0o600); err != nil {
			l.Close()
			return nil, err
		}
	}
	return l, nil
}
