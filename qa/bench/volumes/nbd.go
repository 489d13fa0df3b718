package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
)

// nbd is a client of the NBD protocol (NetworkBlockDevice/nbd, doc/proto.md): fixed newstyle handshake, simple replies.
type nbd struct {
	conn net.Conn

	out     sync.Mutex // of one request
	mu      sync.Mutex
	next    uint64
	waiting map[uint64]*nbdCall
	err     error
	read    sync.WaitGroup
}

type nbdCall struct {
	p    []byte // read into
	done chan error
}

const (
	nbdMagic       = 0x4e42444d41474943 // "NBDMAGIC"
	nbdOption      = 0x49484156454f5054 // "IHAVEOPT"
	nbdOptReply    = 0x3e889045565a9
	nbdRequest     = 0x25609513
	nbdSimpleReply = 0x67446698
	nbdOptGo       = 7
	nbdRead        = 0
	nbdWrite       = 1
	nbdDisconnect  = 2
	nbdFlush       = 3
)

var be = binary.BigEndian

func dialNBD(socket, export string) (_ *nbd, err error) {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			conn.Close()
		}
	}()
	in := bufio.NewReaderSize(conn, 1<<20)
	h := make([]byte, 18)
	if _, err := io.ReadFull(in, h); err != nil {
		return nil, err
	}
	if be.Uint64(h) != nbdMagic || be.Uint64(h[8:]) != nbdOption || be.Uint16(h[16:])&1 == 0 {
		return nil, errors.New("nbd: not the fixed newstyle handshake")
	}
	p := be.AppendUint32(nil, 1|2) // fixed newstyle, no zeroes
	p = be.AppendUint64(p, nbdOption)
	p = be.AppendUint32(p, nbdOptGo)
	p = be.AppendUint32(p, uint32(4+len(export)+2))
	p = be.AppendUint32(p, uint32(len(export)))
	p = append(p, export...)
	p = be.AppendUint16(p, 0)
	if _, err := conn.Write(p); err != nil {
		return nil, err
	}
	for kind := uint32(0); kind != 1; { // up to the acknowledgement
		h := make([]byte, 20)
		if _, err := io.ReadFull(in, h); err != nil {
			return nil, err
		}
		if kind = be.Uint32(h[12:]); be.Uint64(h) != nbdOptReply || kind&(1<<31) != 0 {
			return nil, fmt.Errorf("nbd: export %q: answer %#x", export, kind)
		}
		if _, err := io.CopyN(io.Discard, in, int64(be.Uint32(h[16:]))); err != nil {
			return nil, err
		}
	}
	d := &nbd{conn: conn, waiting: map[uint64]*nbdCall{}}
	d.read.Go(func() { d.reader(in) })
	return d, nil
}

func (d *nbd) reader(in *bufio.Reader) {
	err := func() error {
		h := make([]byte, 16)
		for {
			if _, err := io.ReadFull(in, h); err != nil {
				return err
			}
			if be.Uint32(h) != nbdSimpleReply {
				return fmt.Errorf("nbd: reply %#x", be.Uint32(h))
			}
			d.mu.Lock()
			c := d.waiting[be.Uint64(h[8:])]
			delete(d.waiting, be.Uint64(h[8:]))
			d.mu.Unlock()
			if c == nil {
				return errors.New("nbd: reply to nothing")
			}
			if code := be.Uint32(h[4:]); code != 0 {
				c.done <- fmt.Errorf("nbd: error %d", code)
				continue
			}
			if _, err := io.ReadFull(in, c.p); err != nil {
				c.done <- err
				return err
			}
			c.done <- nil
		}
	}()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.err = err
	for _, c := range d.waiting {
		c.done <- err
	}
}

func (d *nbd) do(kind uint16, off int64, n int, out, in []byte) error {
	c := &nbdCall{p: in, done: make(chan error, 1)}
	d.mu.Lock()
	if d.err != nil {
		defer d.mu.Unlock()
		return d.err
	}
	d.next++
	handle := d.next
	d.waiting[handle] = c
	d.mu.Unlock()
	h := be.AppendUint32(make([]byte, 0, 28), nbdRequest)
	h = be.AppendUint16(h, 0)
	h = be.AppendUint16(h, kind)
	h = be.AppendUint64(h, handle)
	h = be.AppendUint64(h, uint64(off))
	h = be.AppendUint32(h, uint32(n))
	d.out.Lock()
	_, err := (&net.Buffers{h, out}).WriteTo(d.conn)
	d.out.Unlock()
	if err != nil {
		return err
	}
	if kind == nbdDisconnect {
		return nil
	}
	return <-c.done
}

func (d *nbd) ReadAt(_ context.Context, p []byte, off int64) error {
	return d.do(nbdRead, off, len(p), nil, p)
}

func (d *nbd) WriteAt(_ context.Context, p []byte, off int64) error {
	return d.do(nbdWrite, off, len(p), p, nil)
}

func (d *nbd) Flush(context.Context) error { return d.do(nbdFlush, 0, 0, nil, nil) }

func (d *nbd) Close() error {
	err := d.do(nbdDisconnect, 0, 0, nil, nil)
	d.conn.Close()
	d.read.Wait()
	return err
}
