// Null is the floor that a target on this machine and under this client cannot beat: it answers iSCSI
// commands with as many bytes as they ask for, and neither keeps nor checks anything.
//
// Usage: null [-batch] PORT BYTES
//
// -batch reads as many requests as have come and answers them with one writev, which is what the best
// target would do; without it, it takes a request at a time and writes each answer by itself.
// It knows just what one well-behaved client sends: never expose it.
package main

import (
	"bufio"
	"encoding/binary"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
)

const bhsBytes = 48

func main() {
	batch := flag.Bool("batch", false, "answer all that has come with one writev")
	flag.Parse()
	if flag.NArg() != 2 {
		fmt.Fprintln(os.Stderr, "usage: null [-batch] PORT BYTES")
		os.Exit(2)
	}
	size, err := strconv.ParseUint(flag.Arg(1), 10, 64)
	if err == nil {
		err = serve("127.0.0.1:"+flag.Arg(0), size, *batch)
	}
	fmt.Fprintln(os.Stderr, "null:", err)
	os.Exit(1)
}

func serve(addr string, size uint64, batch bool) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			s := session{conn: c, size: size, batch: batch, zeros: make([]byte, 1<<20)}
			s.run()
		}()
	}
}

type session struct {
	conn  net.Conn
	size  uint64
	batch bool
	zeros []byte
	stat  uint32
	out   net.Buffers
}

func (s *session) run() {
	in := bufio.NewReaderSize(s.conn, 256<<10)
	var from io.Reader = s.conn // a header and its data with a read each, as a plain server does
	if s.batch {
		from = in
	}
	data := make([]byte, 1<<20)
	var h [bhsBytes]byte
	for {
		if _, err := io.ReadFull(from, h[:]); err != nil {
			return
		}
		n := int(h[5])<<16 | int(h[6])<<8 | int(h[7])
		if n = (n + 3) &^ 3; n > len(data) {
			return
		}
		if _, err := io.ReadFull(from, data[:n]); err != nil {
			return
		}
		s.answer(&h)
		if !s.batch || in.Buffered() < bhsBytes {
			if _, err := s.out.WriteTo(s.conn); err != nil {
				return
			}
			s.out = s.out[:0:0]
		}
	}
}

// answer queues what a target sends for the request header h.
func (s *session) answer(h *[bhsBytes]byte) {
	r := make([]byte, bhsBytes)
	copy(r[16:20], h[16:20]) // initiator task tag
	cmdSN := binary.BigEndian.Uint32(h[24:])
	binary.BigEndian.PutUint32(r[28:], cmdSN+1)
	binary.BigEndian.PutUint32(r[32:], cmdSN+1024)
	r[1] = 0x80
	switch h[0] & 0x3f {
	case 0x03: // login request: whatever is asked is granted
		r[0] = 0x23
		r[1] = h[1]
		copy(r[8:14], h[8:14])
		binary.BigEndian.PutUint16(r[14:], 1)
		binary.BigEndian.PutUint32(r[28:], cmdSN)
		s.status(r)
		keys := "TargetPortalGroupTag=1\x00AuthMethod=None\x00"
		if h[1]&0x0c != 0 {
			keys = "HeaderDigest=None\x00DataDigest=None\x00InitialR2T=No\x00ImmediateData=Yes\x00MaxRecvDataSegmentLength=1048576\x00FirstBurstLength=1048576\x00MaxBurstLength=1048576\x00"
		}
		r[5], r[6], r[7] = 0, byte(len(keys)>>8), byte(len(keys))
		s.out = append(s.out, r, []byte(keys + "\x00\x00\x00")[:(len(keys)+3)&^3])
	case 0x01:
		s.command(h, r)
	case 0x00: // NOP-Out
		r[0] = 0x20
		s.status(r)
		binary.BigEndian.PutUint32(r[20:], 0xffffffff)
		s.out = append(s.out, r)
	case 0x06: // logout
		r[0] = 0x26
		s.status(r)
		s.out = append(s.out, r)
	}
}

func (s *session) command(h *[bhsBytes]byte, r []byte) {
	expected := int(binary.BigEndian.Uint32(h[20:]))
	if h[1]&0x40 == 0 || expected == 0 || expected > len(s.zeros) { // nothing to send: GOOD
		r[0] = 0x21
		s.status(r)
		s.out = append(s.out, r)
		return
	}
	data := s.zeros[:expected]
	if h[32] == 0x9e { // READ CAPACITY(16)
		data = make([]byte, expected)
		if expected >= 12 {
			binary.BigEndian.PutUint64(data, s.size/512-1)
			binary.BigEndian.PutUint32(data[8:], 512)
		}
	}
	r[0] = 0x25 // Data-In that carries the status
	r[1] = 0x81
	s.status(r)
	r[5], r[6], r[7] = byte(expected>>16), byte(expected>>8), byte(expected)
	binary.BigEndian.PutUint32(r[20:], 0xffffffff)
	s.out = append(s.out, r, data)
}

func (s *session) status(r []byte) {
	binary.BigEndian.PutUint32(r[24:], s.stat)
	s.stat++
}
