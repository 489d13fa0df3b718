package mirror

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"
)

// always spins, for a time.
func always(limit time.Duration) func() Spinner {
	return func() Spinner { return &spinsAlways{limit: limit} }
}

type spinsAlways struct {
	limit time.Duration
	until time.Time
}

func (s *spinsAlways) Begin() bool {
	s.until = time.Now().Add(s.limit)
	return true
}

func (s *spinsAlways) Over() bool { return time.Now().After(s.until) }
func (s *spinsAlways) End(bool)   {}

// TestSpinReader: what a socket's own Read gives is given while spinning, too: bytes at once and late, the end, a reset, a deadline, and
// a connection that is closed.
func TestSpinReader(t *testing.T) {
	const limit = 20 * time.Millisecond
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for _, c := range []struct {
		name string
		do   func(far *net.TCPConn, near net.Conn)
		want string
		err  func(error) bool
	}{
		{"at once", func(far *net.TCPConn, _ net.Conn) { far.Write([]byte("now")) }, "now", nil},
		{"while it spins", func(far *net.TCPConn, _ net.Conn) { time.Sleep(limit / 4); far.Write([]byte("soon")) }, "soon", nil},
		{"when it sleeps", func(far *net.TCPConn, _ net.Conn) { time.Sleep(3 * limit); far.Write([]byte("late")) }, "late", nil},
		{"the end", func(far *net.TCPConn, _ net.Conn) { far.CloseWrite() }, "", func(err error) bool { return err == io.EOF }},
		{"a reset", func(far *net.TCPConn, _ net.Conn) { far.SetLinger(0); far.Close() }, "", func(err error) bool {
			var ne net.Error
			return errors.Is(err, syscall.ECONNRESET) && errors.As(err, &ne)
		}},
		{"past a deadline", func(_ *net.TCPConn, near net.Conn) { near.SetReadDeadline(time.Unix(1, 0)) }, "", func(err error) bool {
			var ne net.Error
			return errors.Is(err, os.ErrDeadlineExceeded) && errors.As(err, &ne) && ne.Timeout()
		}},
		{"a deadline", func(_ *net.TCPConn, near net.Conn) { near.SetReadDeadline(time.Now().Add(limit / 4)) }, "", func(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }},
		{"closed", func(_ *net.TCPConn, near net.Conn) { time.Sleep(limit / 4); near.Close() }, "", func(err error) bool { return errors.Is(err, net.ErrClosed) }},
	} {
		near, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		far, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		r := spinning(near, always(limit))
		if _, ok := r.(*spinReader); !ok {
			t.Fatalf("%T does not spin", r)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			c.do(far.(*net.TCPConn), near)
		}()
		if c.name == "past a deadline" || c.name == "a reset" || c.name == "at once" {
			<-done
		}
		p := make([]byte, 16)
		n, err := r.Read(p)
		if c.err == nil && (err != nil || !bytes.Equal(p[:n], []byte(c.want))) || c.err != nil && (n != 0 || !c.err(err)) {
			t.Errorf("%s: %q, %v", c.name, p[:n], err)
		}
		<-done
		near.Close()
		far.Close()
	}
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if r := spinning(a, always(limit)); r != any(a) {
		t.Errorf("%T: it is no socket", r)
	}
}
