package mirror

import (
	"io"
	"net"
	"os"
	"runtime"
	"syscall"
)

// Spinner decides whether the reader of a connection looks at its socket again and again before it sleeps (target/spin has one). Where Begin
// says so, it looks until Over, or until there is something, and then calls End. One goroutine calls it.
type Spinner interface {
	Begin() bool
	Over() bool
	End(found bool)
}

// spinReader reads a socket, and looks at it again and again for a while before it waits (Options.Spinner). Deadlines are those of the
// connection.
type spinReader struct {
	nc   net.Conn
	raw  syscall.RawConn
	spin Spinner

	// Of the read under way.
	to   []byte
	n    int
	err  error
	once func(fd uintptr) bool // attempt, as a value that is made once
}

// spinning returns what reads nc: nc itself where it is no socket, as a window is, which has its own way.
func spinning(nc net.Conn, spinner func() Spinner) io.Reader {
	sc, ok := nc.(syscall.Conn)
	if spinner == nil || !ok {
		return nc
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nc
	}
	s := &spinReader{nc: nc, raw: raw, spin: spinner()}
	s.once = s.attempt
	return s
}

func (s *spinReader) Read(p []byte) (int, error) {
	if len(p) == 0 || !s.spin.Begin() {
		return s.nc.Read(p)
	}
	for {
		s.to = p
		err := s.raw.Read(s.once)
		s.to = nil
		switch {
		case err != nil: // closed, or past the deadline
			s.spin.End(false)
			return 0, err
		case s.n > 0:
			s.spin.End(true)
			return s.n, nil
		case s.err != syscall.EAGAIN && s.err != syscall.EINTR:
			s.spin.End(true)
			if s.err != nil {
				return 0, os.NewSyscallError("read", s.err)
			}
			return s.nc.Read(p) // the end
		case s.spin.Over():
			s.spin.End(false)
			return s.nc.Read(p)
		}
		runtime.Gosched()
	}
}

// attempt is the body of a RawConn.Read that does not wait.
func (s *spinReader) attempt(fd uintptr) bool {
	n, err := syscall.Read(int(fd), s.to)
	s.n, s.err = max(n, 0), err
	return true
}
