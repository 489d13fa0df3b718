package iscsi

import (
	"net"
	"syscall"
	"unsafe"
)

// Sockets are read and written with the readv and writev of this file, not with net.Conn's methods.
// They are non-blocking already, so that the scheduler need not be told of a call as of one that
// may wait; one readv ends a data segment and brings the next headers with it; a read that finds
// nothing is repeated before the goroutine is parked (Options.Spin); and a connection that waits
// holds no read buffer. The descriptor is touched inside syscall.RawConn only, which keeps it open
// and wakes the goroutine when the socket is ready, closed, or past its deadline.

// rawConn returns the access to a connection's descriptor, or nil where it has none (net.Pipe).
func rawConn(c net.Conn) syscall.RawConn {
	s, ok := c.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return nil
	}
	return raw
}

// maxIovecs is what one writev takes (IOV_MAX).
const maxIovecs = 1024

// vectored calls readv or writev once. It returns false where the socket is not ready.
func vectored(trap, fd uintptr, v []syscall.Iovec) (n int, ready bool, err error) {
	for {
		r, _, e := syscall.RawSyscall(trap, fd, uintptr(unsafe.Pointer(unsafe.SliceData(v))), uintptr(len(v)))
		switch e {
		case 0:
			return int(r), true, nil
		case syscall.EINTR:
		case syscall.EAGAIN:
			return 0, false, nil
		default:
			return 0, true, e
		}
	}
}

func iovec(p []byte) (v syscall.Iovec) {
	v.Base = unsafe.SliceData(p)
	v.SetLen(len(p))
	return v
}
