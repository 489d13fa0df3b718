package qcow2

import (
	"bytes"
	"compress/flate"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
)

// Image is an image in a file, or whatever can be read anywhere. It implements Source. It is for one goroutine.
type Image struct {
	r     io.ReaderAt
	bytes int64 // of the file
	h     header
	l1    []uint64
	// table is the L2 table that was used last.
	table   []uint64
	tableOf int64
	cluster []byte // scratch: a compressed cluster
	plain   []byte // its content,
	plainOf uint64 // by its entry
	zstd    *zstd.Decoder
}

// Open reads the header and the L1 table of the image that the size bytes of r are.
func Open(r io.ReaderAt, size int64) (*Image, error) {
	head := make([]byte, headerBytes+8)
	if n, err := r.ReadAt(head, 0); n < v2Bytes {
		if errors.Is(err, io.EOF) {
			err = fmt.Errorf("%w: %d bytes", ErrFormat, n)
		}
		return nil, err
	}
	h, err := parseHeader(head)
	if err != nil {
		return nil, err
	}
	m := &Image{r: r, bytes: size, h: h, tableOf: -1}
	if h.l1Offset > uint64(size) || 8*h.tables() > uint64(size)-h.l1Offset { // before memory is taken for it
		return nil, fmt.Errorf("%w: L1 table at %d is beyond the end of the file (%d bytes)", ErrFormat, h.l1Offset, size)
	}
	raw := make([]byte, 8*h.tables())
	if err := m.read(raw, h.l1Offset, "L1 table"); err != nil {
		return nil, err
	}
	for i := range h.tables() {
		m.l1 = append(m.l1, be.Uint64(raw[8*i:])&offsetMask)
	}
	return m, nil
}

// Size implements Source.
func (m *Image) Size() int64 { return int64(m.h.size) }

// read reads len(p) bytes of the file.
func (m *Image) read(p []byte, off uint64, what string) error {
	if off > uint64(m.bytes) || uint64(len(p)) > uint64(m.bytes)-off {
		return fmt.Errorf("%w: %s at %d is beyond the end of the file (%d bytes)", ErrFormat, what, off, m.bytes)
	}
	if n, err := m.r.ReadAt(p, int64(off)); n < len(p) {
		return fmt.Errorf("qcow2: read %s at %d: %w", what, off, err)
	}
	return nil
}

// entry is the L2 entry of a cluster; 0: nothing there.
func (m *Image) entry(cluster int64) (uint64, error) {
	per := int64(1) << (m.h.clusterBits - 3)
	t := cluster / per
	if t >= int64(len(m.l1)) || m.l1[t] == 0 {
		return 0, nil
	}
	if m.tableOf != t {
		raw := make([]byte, 8*per)
		if m.l1[t]%(1<<m.h.clusterBits) != 0 {
			return 0, fmt.Errorf("%w: L2 table at %d", ErrFormat, m.l1[t])
		}
		if err := m.read(raw, m.l1[t], "L2 table"); err != nil {
			return 0, err
		}
		m.table = m.table[:0]
		for i := range per {
			m.table = append(m.table, be.Uint64(raw[8*i:]))
		}
		m.tableOf = t
	}
	e := m.table[cluster%per]
	if e&compressed == 0 && (e&offsetMask == 0 || e&zeroFlag != 0 && m.h.version == 3) {
		return 0, nil
	}
	return e, nil
}

// Next implements Source.
func (m *Image) Next(_ context.Context, off int64) (data bool, n int64, err error) {
	size := int64(1) << m.h.clusterBits
	first := off / size
	e, err := m.entry(first)
	if err != nil {
		return false, 0, err
	}
	last := first + 1
	for end := (m.Size() + size - 1) / size; last < end && last-first < 1<<16; last++ {
		next, err := m.entry(last)
		if err != nil || (next != 0) != (e != 0) {
			break // an error shows when it is come to
		}
	}
	return e != 0, min(last*size, m.Size()) - off, nil
}

// ReadAt implements Source.
func (m *Image) ReadAt(_ context.Context, p []byte, off int64) error {
	size := int64(1) << m.h.clusterBits
	for len(p) > 0 {
		c, at := off/size, off%size
		part := p[:min(int64(len(p)), size-at)]
		e := uint64(0)
		if off < m.Size() {
			var err error
			if e, err = m.entry(c); err != nil {
				return err
			}
		}
		switch {
		case e == 0:
			clear(part)
		case e&compressed != 0:
			if err := m.inflate(e); err != nil {
				return err
			}
			copy(part, m.plain[at:])
		default:
			host := e & offsetMask
			if host%uint64(size) != 0 {
				return fmt.Errorf("%w: cluster %d at %d", ErrFormat, c, host)
			}
			if err := m.data(part, host+uint64(at)); err != nil {
				return err
			}
		}
		p, off = p[len(part):], off+int64(len(part))
	}
	return nil
}

// data reads a part of a cluster; the file may end within its last one.
func (m *Image) data(p []byte, off uint64) error {
	if off < uint64(m.bytes) && uint64(m.bytes)-off < uint64(len(p)) {
		n := uint64(m.bytes) - off
		clear(p[n:])
		p = p[:n]
	}
	return m.read(p, off, "cluster")
}

// inflate makes plain the content of a compressed cluster.
func (m *Image) inflate(e uint64) error {
	if m.plainOf == e && m.plain != nil {
		return nil
	}
	size := 1 << m.h.clusterBits
	x := 62 - (m.h.clusterBits - 8)
	off := e & (1<<x - 1)
	n := (e>>x&(1<<(m.h.clusterBits-8)-1)+1)*512 - off&511
	if off >= uint64(m.bytes) {
		return fmt.Errorf("%w: compressed cluster at %d is beyond the end of the file (%d bytes)", ErrFormat, off, m.bytes)
	}
	n = min(n, uint64(m.bytes)-off)
	if m.plain == nil {
		m.plain = make([]byte, size)
	}
	m.plainOf = 0
	m.cluster = append(m.cluster[:0], make([]byte, n)...)
	if err := m.read(m.cluster, off, "compressed cluster"); err != nil {
		return err
	}
	var in io.Reader = flate.NewReader(bytes.NewReader(m.cluster))
	if m.h.zstd {
		if m.zstd == nil {
			d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(64<<20))
			if err != nil {
				return err
			}
			m.zstd = d
		}
		if err := m.zstd.Reset(bytes.NewReader(m.cluster)); err != nil {
			return err
		}
		in = m.zstd
	}
	if _, err := io.ReadFull(in, m.plain); err != nil {
		return fmt.Errorf("%w: compressed cluster at %d: %w", ErrFormat, off, err)
	}
	m.plainOf = e
	return nil
}

// Close frees what decompressing took; not the file.
func (m *Image) Close() {
	if m.zstd != nil {
		m.zstd.Close()
	}
}
