package iscsi

import (
	"io"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
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
	spin spinner

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

func newReader(c net.Conn, idle func(), spin spinner) reader {
	return reader{conn: c, raw: rawConn(c), idle: idle, spin: spin}
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
	if d.spin.begin() {
		d.stay = true
		for {
			err := d.raw.Read(d.attempt)
			if err != nil || d.ready {
				d.spin.end(true)
				return d.outcome(err)
			}
			if d.spin.over() {
				break
			}
			runtime.Gosched()
		}
		d.spin.end(false)
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

// A spinner decides whether to look at a socket again and again for a while before the goroutine is
// parked. Parking costs a sleeping core's wake-up, tens of microseconds in a virtual machine, when
// the initiator's next command is only a few microseconds away; but a core that spins is a core
// that nobody else has. So: never longer than the limit; never more spinners at a time than there
// are processors but one (or one); and when maxMisses in a row found nothing the next ones become
// rarer, up to one in maxSpinSkip, so that an initiator that is slow costs next to nothing. (One that
// is idle costs one spin, whatever the rule.) Not after the first miss: where commands come just as
// far apart as the limit, each miss that is not repeated is a hit.
type spinner struct {
	limit   time.Duration
	running *atomic.Int32 // of all connections of the server
	most    int32
	until   time.Time
	skip    int // attempts to let pass
	misses  int // successive spins that found nothing
}

const (
	maxMisses   = 8
	maxSpinSkip = 64
)

func newSpinner(limit time.Duration, running *atomic.Int32) spinner {
	return spinner{limit: limit, running: running, most: int32(max(1, runtime.GOMAXPROCS(0)-1))}
}

func (s *spinner) begin() bool {
	if s.limit == 0 {
		return false
	}
	if s.skip > 0 {
		s.skip--
		return false
	}
	if s.running.Add(1) > s.most {
		s.running.Add(-1)
		return false
	}
	s.until = time.Now().Add(s.limit)
	return true
}

func (s *spinner) over() bool { return !time.Now().Before(s.until) }

func (s *spinner) end(found bool) {
	s.running.Add(-1)
	if found {
		s.misses = 0
		return
	}
	if s.misses++; s.misses >= maxMisses {
		s.skip = min(1<<min(s.misses-maxMisses, 6), maxSpinSkip)
	}
}
