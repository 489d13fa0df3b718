package main

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"testing"
	"time"
)

// sink takes what a session writes, and has nothing to read.
type sink struct {
	net.Conn
	got  bytes.Buffer
	keep bool
}

func (s *sink) Write(b []byte) (int, error) {
	if s.keep {
		s.got.Write(b)
	}
	return len(b), nil
}

// pdus cuts what was written into headers, each with its data's length checked to be there.
func (s *sink) pdus(t *testing.T) [][]byte {
	t.Helper()
	var headers [][]byte
	for b := s.got.Bytes(); len(b) > 0; {
		h := b[:bhsBytes]
		n := padded(segment((*[bhsBytes]byte)(h)))
		headers = append(headers, h)
		b = b[bhsBytes+n:]
	}
	return headers
}

func request(op, flags byte, tag, expected uint32) *[bhsBytes]byte {
	h := &[bhsBytes]byte{0: op, 1: flags}
	binary.BigEndian.PutUint32(h[16:], tag)
	binary.BigEndian.PutUint32(h[20:], expected)
	binary.BigEndian.PutUint32(h[24:], 7)
	return h
}

func word(h []byte, at int) uint32 { return binary.BigEndian.Uint32(h[at:]) }

// TestRead: a read comes in pieces that the initiator takes, with the status in the last.
func TestRead(t *testing.T) {
	c := &sink{keep: true}
	s := newSession(c, 1<<30)
	s.maxSend, s.maxBurst = 64<<10, 128<<10
	if err := s.answer(request(command, final|reads, 5, 200<<10), 0); err != nil {
		t.Fatal(err)
	}
	if err := s.flush(); err != nil {
		t.Fatal(err)
	}
	headers := c.pdus(t)
	if len(headers) != 4 {
		t.Fatalf("%d PDUs, want 4", len(headers))
	}
	for i, want := range []struct {
		flags, bytes, offset int
	}{{0, 64 << 10, 0}, {final, 64 << 10, 64 << 10}, {0, 64 << 10, 128 << 10}, {final | hasStatus, 8 << 10, 192 << 10}} {
		h := headers[i]
		if h[0] != dataIn || int(h[1]) != want.flags || segment((*[bhsBytes]byte)(h)) != want.bytes || int(word(h, 40)) != want.offset || int(word(h, 36)) != i {
			t.Errorf("PDU %d: % x", i, h)
		}
		if word(h, 16) != 5 || word(h, 28) != 8 || word(h, 32) != 8+window-1 {
			t.Errorf("PDU %d: tag %d, ExpCmdSN %d, MaxCmdSN %d", i, word(h, 16), word(h, 28), word(h, 32))
		}
	}
}

// TestWrite: a write is answered when all of it has come, and asked for burst by burst; the floor must not be spared data.
func TestWrite(t *testing.T) {
	c := &sink{keep: true}
	s := newSession(c, 1<<30)
	s.maxBurst = 256 << 10
	step := func(h *[bhsBytes]byte, n int) [][]byte {
		t.Helper()
		c.got.Reset()
		if err := s.answer(h, n); err != nil {
			t.Fatal(err)
		}
		if err := s.flush(); err != nil {
			t.Fatal(err)
		}
		return c.pdus(t)
	}
	if got := step(request(command, writes, 9, 1<<20), 128<<10); len(got) != 0 {
		t.Fatalf("unsolicited data is to follow, and it answered % x", got)
	}
	for at := 256 << 10; at < 1<<20; at += 256 << 10 {
		if got := step(request(dataOut, 0, 9, noTag), 64<<10); len(got) != 0 {
			t.Fatalf("in a sequence: % x", got)
		}
		got := step(request(dataOut, final, 9, noTag), 64<<10)
		if len(got) != 1 || got[0][0] != r2t || int(word(got[0], 40)) != at || word(got[0], 44) != 256<<10 {
			t.Fatalf("after %d bytes: % x", at, got)
		}
		step(request(dataOut, 0, 9, noTag), 64<<10)
		step(request(dataOut, 0, 9, noTag), 64<<10)
	}
	step(request(dataOut, 0, 9, noTag), 64<<10)
	got := step(request(dataOut, final, 9, noTag), 64<<10)
	if len(got) != 1 || got[0][0] != response || got[0][3] != 0 {
		t.Fatalf("at the end: % x", got)
	}
	if len(s.writes) != 0 {
		t.Errorf("%d writes are still under way", len(s.writes))
	}
}

// TestNoAllocations: a floor that allocates is a floor that a better one beats.
func TestNoAllocations(t *testing.T) {
	s := newSession(&sink{}, 1<<30)
	s.maxSend = 256 << 10
	read, write := request(command, final|reads, 1, 4096), request(command, final|writes, 2, 8192)
	last := request(dataOut, final, 2, noTag)
	one := func() {
		for range 8 {
			if s.answer(read, 0) != nil || s.answer(write, 4096) != nil || s.answer(last, 4096) != nil {
				t.Fatal("refused")
			}
		}
		if err := s.flush(); err != nil {
			t.Fatal(err)
		}
	}
	if n := testing.AllocsPerRun(100, one); n != 0 {
		t.Errorf("%v allocations for 16 commands", n)
	}
}

// TestNoAllocationsOnSockets: nor does reading and writing.
func TestNoAllocationsOnSockets(t *testing.T) {
	client, c := connected(t)
	defer client.Close()
	defer c.Close()
	s := newSession(c, 1<<30)
	s.socket = newSocket(c, 0)
	read, in, out := request(command, final|reads, 1, 4096), make([]byte, 100), make([]byte, bhsBytes+4096)
	if n := testing.AllocsPerRun(100, func() {
		client.Write(in[:48])
		if n, err := s.socket.Read(in); n != 48 || err != nil {
			t.Fatal(n, err)
		}
		if s.answer(read, 0) != nil || s.flush() != nil {
			t.Fatal("refused")
		}
		if _, err := io.ReadFull(client, out); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations a command", n)
	}
}

// TestLongWrites: a socket that takes less than is written gets the rest, in order, once.
func TestLongWrites(t *testing.T) {
	client, c := connected(t)
	defer client.Close()
	defer c.Close()
	var pieces [][]byte
	var all []byte
	for i := range 1500 { // more than one writev takes, more than a socket holds
		p := bytes.Repeat([]byte{byte(i), byte(i >> 8)}, 1+i*7)
		pieces, all = append(pieces, p), append(all, p...)
	}
	wrote := make(chan error, 1)
	go func() { wrote <- newSocket(c, 0).writeAll(pieces, nil) }()
	got := make([]byte, len(all))
	if _, err := io.ReadFull(client, got); err != nil {
		t.Fatal(err)
	}
	if err := <-wrote; err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, all) {
		t.Error("other bytes arrived than were written")
	}
}

// TestBatches: requests that come in pieces, cut anywhere, are answered all the same, by each of the servers.
func TestBatches(t *testing.T) {
	var in bytes.Buffer
	for tag := range uint32(20) {
		w := request(command, final|writes, 2*tag, 4096)
		w[6] = 0x10 // 4096 bytes of immediate data
		in.Write(w[:])
		in.Write(make([]byte, 4096))
		in.Write(request(command, final|reads, 2*tag+1, 4096)[:])
	}
	for name, serve := range map[string]func(*session) error{
		"one by one":           (*session).serveOneByOne,
		"batches":              func(s *session) error { return s.serveBatches(0) },
		"batches and spinning": func(s *session) error { return s.serveBatches(20 * time.Microsecond) },
	} {
		for _, piece := range []int{7, 4096, in.Len()} {
			client, c := connected(t)
			served := make(chan error, 1)
			go func() { served <- serve(newSession(c, 1<<30)) }()
			go func() {
				for b := in.Bytes(); len(b) > 0; {
					n, _ := client.Write(b[:min(piece, len(b))])
					b = b[n:]
				}
			}()
			out := make([]byte, 20*(2*bhsBytes+4096))
			if _, err := io.ReadFull(client, out); err != nil {
				t.Fatalf("%s, pieces of %d: %v", name, piece, err)
			}
			s := sink{keep: true}
			s.got.Write(out)
			for i, h := range s.pdus(t) {
				if want := []byte{response, dataIn}[i%2]; h[0] != want || word(h, 16) != uint32(i) || word(h, 24) != uint32(i) {
					t.Fatalf("%s, pieces of %d: answer %d is % x", name, piece, i, h)
				}
			}
			client.Close()
			if err := <-served; err != io.EOF {
				t.Errorf("%s: ended with %v", name, err)
			}
			c.Close()
		}
	}
}

// TestMemory: with a memory, what was written is what is read, wherever the pieces are cut.
func TestMemory(t *testing.T) {
	data := make([]byte, 200<<10)
	for i := range data {
		data[i] = byte(i*7 + i>>8)
	}
	var in bytes.Buffer
	pdu := func(h *[bhsBytes]byte, data []byte) {
		h[5], h[6], h[7] = byte(len(data)>>16), byte(len(data)>>8), byte(len(data))
		in.Write(h[:])
		in.Write(data)
	}
	w := request(command, writes, 1, uint32(len(data))) // its first half comes with it, the rest behind
	w[32], w[37] = 0x2a, 8                              // WRITE(10) at block 8
	pdu(w, data[:100<<10])
	d := request(dataOut, final, 1, 0)
	binary.BigEndian.PutUint32(d[40:], 100<<10)
	pdu(d, data[100<<10:])
	r := request(command, final|reads, 2, uint32(len(data)))
	r[32], r[37] = 0x28, 8
	in.Write(r[:])
	for _, piece := range []int{4099, in.Len()} {
		client, c := connected(t)
		s := newSession(c, 1<<20)
		var err error
		if s.memory, err = newMemory(1 << 20); err != nil {
			t.Fatal(err)
		}
		s.maxSend = 64 << 10
		served := make(chan error, 1)
		go func() { served <- s.serveBatches(0) }()
		go func() {
			for b := in.Bytes(); len(b) > 0; {
				n, _ := client.Write(b[:min(piece, len(b))])
				b = b[n:]
			}
		}()
		out := make([]byte, bhsBytes+4*bhsBytes+len(data))
		if _, err := io.ReadFull(client, out); err != nil {
			t.Fatalf("pieces of %d: %v", piece, err)
		}
		got := out[bhsBytes:]
		for at := 0; at < len(data); at += 64 << 10 {
			n := min(64<<10, len(data)-at)
			if !bytes.Equal(got[bhsBytes:bhsBytes+n], data[at:at+n]) {
				t.Errorf("pieces of %d: other data at %d", piece, at)
			}
			got = got[bhsBytes+n:]
		}
		client.Close()
		if err := <-served; err != io.EOF {
			t.Errorf("ended with %v", err)
		}
		c.Close()
	}
}

func connected(t *testing.T) (client, server net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if client, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if server, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	return client, server
}
