package main

import (
	"errors"
	"io"
	"net"
	"syscall"
	"time"
)

const (
	bhsBytes   = 48
	maxSegment = 256 << 10 // of a data segment to us: MaxRecvDataSegmentLength
	maxAnswers = 1024      // headers of answers held until they are written
)

var errProtocol = errors.New("null: not what it knows")

// A session is one connection's. Its buffers are made once.
type session struct {
	conn net.Conn
	size uint64

	maxSend, maxBurst int // negotiated: of one Data-In, of one sequence
	stat, expCmdSN    uint32

	headers [maxAnswers][bhsBytes]byte // of the answers in out
	used    int
	store   [2 * maxAnswers][]byte // out's array: WriteTo eats a net.Buffers from its front
	out     net.Buffers
	socket  *socket // nil: the answers leave with out.WriteTo
	iov     [2 * maxAnswers]syscall.Iovec
	zeros   []byte
	memory  memory  // nil: reads are answered with zeros, writes forgotten
	writes  []write // under way, in no order
}

// A write is one whose data has not all come.
type write struct {
	tag       uint32
	got, want int
	sn        uint32 // of the next R2T
	at        uint64 // in the memory, where stored says so
	stored    bool
}

func newSession(c net.Conn, size uint64) *session {
	s := &session{conn: c, size: size, maxSend: 8192, maxBurst: 256 << 10, zeros: make([]byte, maxSegment)}
	s.out = s.store[:0]
	return s
}

// serveOneByOne takes a header and its data with a read each, as a plain server does, and writes each answer at once.
func (s *session) serveOneByOne() error {
	var h [bhsBytes]byte
	data := make([]byte, maxSegment)
	for {
		if _, err := io.ReadFull(s.conn, h[:]); err != nil {
			return err
		}
		n := segment(&h)
		if padded(n) > len(data) {
			return errProtocol
		}
		if _, err := io.ReadFull(s.conn, data[:padded(n)]); err != nil {
			return err
		}
		if err := s.answer(&h, n); err != nil {
			return err
		}
		if err := s.flush(); err != nil {
			return err
		}
	}
}

// serveBatches takes what has come with one read, and writes all answers to it with one writev. Data is
// passed over where it lies: only headers are looked at.
func (s *session) serveBatches(spin time.Duration) error {
	var from io.Reader = s.conn
	if s.socket = newSocket(s.conn, spin); s.socket != nil {
		from = s.socket
	}
	in := make([]byte, maxSegment)
	var h [bhsBytes]byte
	have, skip := 0, 0 // of h; of the data that belongs to h
	var into []byte    // where that data goes
	for {
		n, err := from.Read(in)
		if err != nil {
			return err
		}
		for b := in[:n]; len(b) > 0; {
			if have < bhsBytes {
				k := copy(h[have:], b)
				have, b = have+k, b[k:]
				if have < bhsBytes {
					break
				}
				skip = padded(segment(&h))
				into = s.into(&h)
			}
			k := min(skip, len(b))
			into = into[copy(into, b[:k]):]
			skip, b = skip-k, b[k:]
			if skip > 0 {
				break
			}
			have = 0
			if err := s.answer(&h, segment(&h)); err != nil {
				return err
			}
		}
		if err := s.flush(); err != nil {
			return err
		}
	}
}

// flush writes what is queued.
func (s *session) flush() (err error) {
	switch {
	case s.used == 0:
		return nil
	case s.socket != nil:
		err = s.socket.writeAll(s.out, s.iov[:])
	default:
		_, err = s.out.WriteTo(s.conn)
	}
	s.out, s.used = s.store[:0], 0
	return err
}

func segment(h *[bhsBytes]byte) int { return int(h[5])<<16 | int(h[6])<<8 | int(h[7]) }

func padded(n int) int { return (n + 3) &^ 3 }
