package iscsi

import (
	"errors"
	"io"
	"net"
)

const (
	readBufferMin = 4 << 10
	readBufferMax = 256 << 10
)

// reader reads a connection with as few system calls as it can: what the socket has is taken at
// once. Before it waits it calls idle, which is where answers are flushed.
type reader struct {
	conn net.Conn
	idle func()
	buf  []byte
	r, w int // buf[r:w] is unread
	full int // successive reads that filled the buffer
}

// next returns the following n bytes, n <= readBufferMin, valid until the next call.
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

// fill reads more, having made room for n bytes in all.
func (d *reader) fill(n int) error {
	if d.r == d.w {
		d.r, d.w = 0, 0
		if d.full >= 2 && len(d.buf) < readBufferMax {
			d.buf = make([]byte, min(len(d.buf)*8, readBufferMax))
			d.full = 0
		}
	}
	if d.buf == nil {
		d.buf = make([]byte, readBufferMin)
	}
	if len(d.buf)-d.r < n {
		d.w = copy(d.buf, d.buf[d.r:d.w])
		d.r = 0
	}
	d.idle()
	m, err := d.conn.Read(d.buf[d.w:])
	d.w += m
	if d.w == len(d.buf) {
		d.full++
	} else if m > 0 {
		d.full = 0
	}
	if m > 0 {
		return nil
	}
	return err
}

// read fills p.
func (d *reader) read(p []byte) error {
	n := copy(p, d.buf[d.r:d.w])
	d.r += n
	p = p[n:]
	for len(p) > 0 {
		if len(p) < len(d.buf)/2 {
			if err := d.fill(1); err != nil {
				return err
			}
			n := copy(p, d.buf[d.r:d.w])
			d.r += n
			p = p[n:]
			continue
		}
		d.idle()
		n, err := d.conn.Read(p)
		p = p[n:]
		if n == 0 && err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
	return nil
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
