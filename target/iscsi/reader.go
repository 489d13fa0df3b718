package iscsi

import (
	"io"
	"net"
	"runtime"
	"sync"
	"syscall"

	"github.com/ledge-storage/ledge/target/spin"
)

const (
	// readBufferBytes is what one read takes at most: some thousand commands, or 60 writes of 4 KiB.
	readBufferBytes = 256 << 10
	// maxNext is the most that next returns.
	maxNext = 4 << 10
	// largeBytes is a data segment that is read to its place and not through the buffer: the copy
	// costs more than the system call.
	largeBytes = 16 << 10
	// aheadBytes is how far a read goes on behind a large data segment: to the next few headers,
	// not into data that would have to be copied.
	aheadBytes = 2 << 10
)

type readBuffer [readBufferBytes]byte

var readBuffers = sync.Pool{New: func() any { return new(readBuffer) }}

// reader reads a connection with as few system calls and copies as it can: what the socket has is
// taken at once. Before it waits it calls idle, which is where answers are flushed.
//
// The buffer comes from a pool when the socket has something and goes back before the connection
// waits for more, so that memory for reading is held by connections at work, not by those that
// are logged in. What was unread then, less than a header, waits in rest.
type reader struct {
	conn net.Conn
	raw  syscall.RawConn // nil: conn.Read
	idle func()
	spin spin.Spinner

	own   *readBuffer // nil: none is held
	buf   []byte      // own's memory, or a PDU that was read before
	r, w  int         // buf[r:w] is unread
	rest  []byte      // what was unread when the buffer was given back
	large bool        // the last data segment was large
	reads uint64      // reads that brought something

	// Of the read under way.
	to      []byte // nil: into buf
	ahead   int    // how far into buf, from w on
	stay    bool   // attempt does not ask to be called again when the socket is readable
	n       int
	ready   bool
	err     error
	iov     [2]syscall.Iovec
	attempt func(fd uintptr) bool // readOnce, as a value that is made once
}

// newHeldReader reads a PDU that was read before.
func newHeldReader(pdu []byte) reader { return reader{buf: pdu, w: len(pdu)} }

func newReader(c net.Conn, idle func(), s spin.Spinner) reader {
	return reader{conn: c, raw: rawConn(c), idle: idle, spin: s}
}

// next returns the following n bytes, n <= maxNext, valid until the next call.
func (d *reader) next(n int) ([]byte, error) {
	for d.w-d.r < n {
		if err := d.fill(n); err != nil {
			return nil, err
		}
	}
	p := d.buf[d.r : d.r+n]
	d.r += n
	return p, nil
}

// fill reads more, with room for n unread bytes in all.
func (d *reader) fill(n int) error {
	if d.r == d.w {
		d.r, d.w = 0, 0
	} else if readBufferBytes-d.r < max(n, maxNext) {
		d.w = copy(d.buf, d.buf[d.r:d.w])
		d.r = 0
	}
	d.ahead = readBufferBytes - d.w
	if d.large {
		d.ahead = min(d.ahead, max(aheadBytes, n))
	}
	m, err := d.receive(nil)
	d.w += m
	return err
}

// read fills p.
func (d *reader) read(p []byte) error {
	d.large = len(p) >= largeBytes
	for {
		if d.r < d.w {
			n := copy(p, d.buf[d.r:d.w])
			d.r += n
			p = p[n:]
		}
		if len(p) == 0 {
			return nil
		}
		if len(p) < largeBytes {
			if err := d.fill(1); err != nil {
				return err
			}
			continue
		}
		d.r, d.w, d.ahead = 0, 0, aheadBytes
		n, err := d.receive(p)
		if err != nil {
			return err
		}
		d.w = max(0, n-len(p))
		p = p[min(n, len(p)):]
	}
}

// skip reads n bytes away.
func (d *reader) skip(n int) error {
	for n > 0 {
		if d.r == d.w {
			if err := d.fill(1); err != nil {
				return err
			}
		}
		m := min(n, d.w-d.r)
		d.r += m
		n -= m
	}
	return nil
}

// receive waits until the socket has something and reads it: into to, where it is given, and then
// into buf from w on, ahead bytes at most. It returns at least one byte, or an error.
func (d *reader) receive(to []byte) (int, error) {
	if d.conn == nil {
		return 0, io.ErrUnexpectedEOF // a PDU that was read before ends early
	}
	d.idle()
	d.to = to
	if d.raw == nil {
		return d.plain()
	}
	if d.attempt == nil {
		d.attempt = d.readOnce
	}
	if d.spin.Begin() {
		d.stay = true
		for {
			err := d.raw.Read(d.attempt)
			if err != nil || d.ready {
				d.spin.End(true)
				return d.outcome(err)
			}
			if d.spin.Over() {
				break
			}
			runtime.Gosched()
		}
		d.spin.End(false)
		d.stay = false
	}
	return d.outcome(d.raw.Read(d.attempt))
}

func (d *reader) outcome(err error) (int, error) {
	d.to = nil
	switch {
	case err != nil:
		return 0, err
	case d.err != nil:
		return 0, d.err
	case d.n == 0:
		return 0, io.EOF
	}
	d.reads++
	return d.n, nil
}

// readOnce is the body of a RawConn.Read: it tries once.
func (d *reader) readOnce(fd uintptr) bool {
	d.hold()
	v := d.iov[:0]
	if len(d.to) > 0 {
		v = append(v, iovec(d.to))
	}
	if d.ahead > 0 {
		v = append(v, iovec(d.buf[d.w:d.w+d.ahead]))
	}
	d.n, d.ready, d.err = vectored(syscall.SYS_READV, fd, v)
	if !d.ready && !d.stay {
		d.putBack()
	}
	return d.ready || d.stay
}

// hold takes a buffer.
func (d *reader) hold() {
	if d.buf != nil {
		return
	}
	d.own = readBuffers.Get().(*readBuffer)
	d.buf = d.own[:]
	d.r, d.w = 0, copy(d.buf, d.rest)
	d.rest = d.rest[:0]
}

// putBack gives the buffer back.
func (d *reader) putBack() {
	if d.own == nil {
		return
	}
	d.rest = append(d.rest[:0], d.buf[d.r:d.w]...)
	readBuffers.Put(d.own)
	d.own, d.buf, d.r, d.w = nil, nil, 0, 0
	clear(d.iov[:]) // or it would keep the buffer from being collected
}

// plain reads a connection that has no descriptor.
func (d *reader) plain() (n int, err error) {
	d.hold()
	p := d.to
	if len(p) == 0 {
		p = d.buf[d.w : d.w+d.ahead]
	}
	d.to = nil
	n, err = d.conn.Read(p)
	if n > 0 {
		d.reads++
		err = nil
	}
	return n, err
}

// close gives up what the reader holds.
func (d *reader) close() { d.putBack() }
