package qcow2

import (
	"bufio"
	"errors"
	"fmt"
	"io"
)

// Stream reads an image front to back: one that Plan.Write made, or laid out like it.
type Stream struct {
	in   *bufio.Reader
	pos  uint64
	h    header
	used []*bitmap // of each L2 table; nil: none
	base uint64    // of the first data cluster
	left int64     // data clusters to come
	next int64     // cluster of the disk to look at
}

// NewStream reads the tables of the image that r gives. ErrOrder: they are not in front of the data; ErrFormat, ErrUnsupported.
func NewStream(r io.Reader) (*Stream, error) {
	s := &Stream{in: bufio.NewReaderSize(r, 1<<20)}
	head := make([]byte, headerBytes+8)
	if err := s.full(head); err != nil {
		return nil, err
	}
	h, err := parseHeader(head)
	if err != nil {
		return nil, err
	}
	if h.clusterBits != clusterBits {
		return nil, fmt.Errorf("%w: clusters of %d bytes", ErrOrder, 1<<h.clusterBits)
	}
	s.h = h
	if err := s.skipTo(h.l1Offset); err != nil {
		return nil, err
	}
	l1 := make([]byte, 8*h.tables())
	if err := s.full(l1); err != nil {
		return nil, err
	}
	s.used = make([]*bitmap, h.tables())
	table := make([]byte, clusterBytes)
	for i := range s.used {
		e := be.Uint64(l1[8*i:])
		off := e & offsetMask
		if off == 0 {
			continue
		}
		if err := s.skipTo(off); err != nil {
			return nil, err
		}
		if err := s.full(table); err != nil {
			return nil, err
		}
		if s.used[i], err = s.take(i, table); err != nil {
			return nil, err
		}
	}
	if s.left > 0 {
		if err := s.skipTo(s.base); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// take notes what an L2 table says. Its data must be where the stream comes to it.
func (s *Stream) take(i int, table []byte) (*bitmap, error) {
	b := new(bitmap)
	last := (int64(s.h.size) + clusterBytes - 1) / clusterBytes
	for k := range tableEntries {
		e := be.Uint64(table[8*k:])
		off := e & offsetMask
		switch {
		case e&compressed != 0:
			return nil, fmt.Errorf("%w (a compressed cluster)", ErrOrder)
		case off == 0 || e&zeroFlag != 0 && s.h.version == 3:
			continue
		case int64(i)*tableEntries+int64(k) >= last:
			return nil, fmt.Errorf("%w: data behind the disk's end", ErrFormat)
		case s.left == 0:
			s.base = off
		case off != s.base+uint64(s.left)*clusterBytes:
			return nil, ErrOrder
		}
		b.add(k)
		s.left++
	}
	return b, nil
}

// Size of the disk in bytes.
func (s *Stream) Size() int64 { return int64(s.h.size) }

// DataBytes is how much data is to come.
func (s *Stream) DataBytes() int64 { return s.left * clusterBytes }

// Next reads the next data into p, a multiple of 64 KiB, and says where on the disk it belongs; n is within the disk.
// io.EOF: that was all, and everything else reads as zeros.
func (s *Stream) Next(p []byte) (off int64, n int, err error) {
	if len(p) < clusterBytes {
		return 0, 0, fmt.Errorf("qcow2: buffer of %d bytes", len(p))
	}
	if s.left == 0 {
		return 0, 0, io.EOF
	}
	has := func(c int64) bool {
		t := c / tableEntries
		return t < int64(len(s.used)) && s.used[t] != nil && s.used[t].has(int(c%tableEntries))
	}
	for !has(s.next) {
		if s.next%tableEntries == 0 && s.used[s.next/tableEntries] == nil {
			s.next += tableEntries
		} else {
			s.next++
		}
	}
	first := s.next
	for n+clusterBytes <= len(p) && has(s.next) {
		n += clusterBytes
		s.next++
		s.left--
	}
	off = first * clusterBytes
	if err := s.full(p[:n]); err != nil {
		return 0, 0, err
	}
	return off, int(min(int64(n), int64(s.h.size)-off)), nil
}

// full fills p.
func (s *Stream) full(p []byte) error {
	n, err := io.ReadFull(s.in, p)
	s.pos += uint64(n)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: it ends at byte %d: %w", ErrFormat, s.pos, io.ErrUnexpectedEOF)
	}
	return err
}

// skipTo goes forward to a place.
func (s *Stream) skipTo(to uint64) error {
	if to < s.pos {
		return ErrOrder
	}
	n, err := io.CopyN(io.Discard, s.in, int64(min(to-s.pos, 1<<62)))
	s.pos += uint64(n)
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: it ends at byte %d: %w", ErrFormat, s.pos, io.ErrUnexpectedEOF)
	}
	return err
}
