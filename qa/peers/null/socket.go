package main

import (
	"io"
	"net"
	"syscall"
	"time"
	"unsafe"
)

// A socket is a connection with bare system calls: net.Conn's own tell the scheduler of each call as of one that may
// wait, which the descriptor, non-blocking already, never does. That is worth some percent, and a floor should have them.
type socket struct {
	raw  syscall.RawConn
	spin time.Duration

	read, write func(fd uintptr) bool // made once: a method value is an allocation
	buf         []byte                // what read reads into, and what came of it
	n           int
	iov         []syscall.Iovec // what write has yet to write
	err         error
}

// maxIovecs is what one writev takes (IOV_MAX).
const maxIovecs = 1024

// newSocket returns nil for a connection without a descriptor (in tests).
func newSocket(c net.Conn, spin time.Duration) *socket {
	t, ok := c.(*net.TCPConn)
	if !ok {
		return nil
	}
	raw, err := t.SyscallConn()
	if err != nil {
		return nil
	}
	s := &socket{raw: raw, spin: spin}
	s.read, s.write = s.tryRead, s.tryWrite
	return s
}

// Read is net.Conn's, but looks for s.spin before it sleeps.
func (s *socket) Read(b []byte) (int, error) {
	s.buf, s.err = b, nil
	if err := s.raw.Read(s.read); err != nil {
		return 0, err
	}
	if s.err == nil && s.n == 0 {
		return 0, io.EOF
	}
	return s.n, s.err
}

func (s *socket) tryRead(fd uintptr) bool {
	var begin time.Time
	for {
		n, _, e := syscall.RawSyscall(syscall.SYS_READ, fd, uintptr(unsafe.Pointer(unsafe.SliceData(s.buf))), uintptr(len(s.buf)))
		switch {
		case e == 0:
			s.n = int(n)
			return true
		case e == syscall.EINTR:
		case e != syscall.EAGAIN:
			s.n, s.err = 0, e
			return true
		case s.spin == 0:
			return false
		case begin.IsZero():
			begin = time.Now()
		case time.Since(begin) > s.spin:
			return false
		}
	}
}

// writeAll writes pieces, which stay as they are.
func (s *socket) writeAll(pieces [][]byte, iov []syscall.Iovec) error {
	s.iov, s.err = iov[:0], nil
	for _, p := range pieces {
		v := syscall.Iovec{Base: unsafe.SliceData(p)}
		v.SetLen(len(p))
		s.iov = append(s.iov, v)
	}
	if err := s.raw.Write(s.write); err != nil {
		return err
	}
	return s.err
}

func (s *socket) tryWrite(fd uintptr) bool {
	for len(s.iov) > 0 {
		n, _, e := syscall.RawSyscall(syscall.SYS_WRITEV, fd, uintptr(unsafe.Pointer(unsafe.SliceData(s.iov))), uintptr(min(len(s.iov), maxIovecs)))
		switch {
		case e == syscall.EINTR:
		case e == syscall.EAGAIN:
			return false
		case e != 0:
			s.err = e
			return true
		default:
			s.written(int(n))
		}
	}
	return true
}

// written takes n bytes off the front of what is to be written.
func (s *socket) written(n int) {
	for n > 0 {
		v := &s.iov[0]
		if n < int(v.Len) {
			v.Base = (*byte)(unsafe.Add(unsafe.Pointer(v.Base), n))
			v.SetLen(int(v.Len) - n)
			return
		}
		n -= int(v.Len)
		s.iov = s.iov[1:]
	}
}
