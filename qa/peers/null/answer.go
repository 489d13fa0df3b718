package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"strconv"
)

// Opcodes and bits that it knows (RFC 7143 11.2).
const (
	nopOut, command, login, dataOut, logout               = 0x00, 0x01, 0x03, 0x05, 0x06
	nopIn, response, loginResponse, dataIn, logoutOK, r2t = 0x20, 0x21, 0x23, 0x25, 0x26, 0x31

	immediate                       = 0x40
	final, hasStatus, reads, writes = 0x80, 0x01, 0x40, 0x20
	noTag                           = 0xffffffff
	window                          = 128 // commands that the initiator may have under way
)

// login grants what is asked until the full-feature phase is reached.
func (s *session) login() error {
	var h [bhsBytes]byte
	for {
		if _, err := io.ReadFull(s.conn, h[:]); err != nil {
			return err
		}
		text := make([]byte, padded(segment(&h)))
		if _, err := io.ReadFull(s.conn, text); err != nil {
			return err
		}
		if h[0]&0x3f != login {
			return errProtocol
		}
		keys := "AuthMethod=None\x00TargetPortalGroupTag=1\x00"
		if h[1]&0x0c != 0 { // operational stage
			s.maxSend = min(offered(text, "MaxRecvDataSegmentLength", 8192), maxSegment)
			s.maxBurst = min(offered(text, "MaxBurstLength", 256<<10), 1<<20)
			first := min(offered(text, "FirstBurstLength", 64<<10), 256<<10, s.maxBurst)
			keys = fmt.Sprintf("HeaderDigest=None\x00DataDigest=None\x00InitialR2T=No\x00ImmediateData=Yes\x00MaxOutstandingR2T=1\x00"+
				"MaxRecvDataSegmentLength=%d\x00FirstBurstLength=%d\x00MaxBurstLength=%d\x00", maxSegment, first, s.maxBurst)
		}
		s.expCmdSN = binary.BigEndian.Uint32(h[24:])
		r := s.header(&h, loginResponse, h[1]) // the same stages, the same transit bit
		copy(r[8:14], h[8:14])
		binary.BigEndian.PutUint16(r[14:], 1)
		s.status(r)
		s.data(r, []byte(keys + "\x00\x00\x00")[:padded(len(keys))], len(keys))
		if err := s.flush(); err != nil {
			return err
		}
		if h[1]&0x83 == 0x83 {
			return nil
		}
	}
}

// offered is the number that the login text has for key.
func offered(text []byte, key string, otherwise int) int {
	for _, pair := range bytes.Split(text, []byte{0}) {
		if k, v, ok := bytes.Cut(pair, []byte("=")); ok && string(k) == key {
			if n, err := strconv.Atoi(string(v)); err == nil {
				return n
			}
		}
	}
	return otherwise
}

// answer queues what a target sends for the PDU with header h, whose data of n bytes has come.
func (s *session) answer(h *[bhsBytes]byte, n int) error {
	op := h[0] & 0x3f
	if op != dataOut && h[0]&immediate == 0 {
		s.expCmdSN = binary.BigEndian.Uint32(h[24:]) + 1
	}
	switch op {
	case command:
		return s.command(h, n)
	case dataOut:
		return s.dataOut(h, n)
	case nopOut:
		r := s.header(h, nopIn, final)
		s.status(r)
		binary.BigEndian.PutUint32(r[20:], noTag)
	case logout:
		s.status(s.header(h, logoutOK, final))
	default:
		return errProtocol
	}
	return nil
}

func (s *session) command(h *[bhsBytes]byte, n int) error {
	expected := int(binary.BigEndian.Uint32(h[20:]))
	switch {
	case h[1]&writes != 0 && expected > 0:
		w := write{tag: binary.BigEndian.Uint32(h[16:]), got: n, want: expected}
		w.at, w.stored = s.memory.place(h, expected)
		return s.more(h, w, h[1]&final != 0)
	case h[1]&reads != 0 && expected > 0:
		return s.readCommand(h, expected)
	}
	s.status(s.header(h, response, final))
	return nil
}

// readCommand sends expected bytes in as few Data-In as the initiator takes; the last carries the status.
func (s *session) readCommand(h *[bhsBytes]byte, expected int) error {
	from, step := s.zeros, 0 // step 1: from a place of its own
	if at, ok := s.memory.place(h, expected); ok {
		from, step = s.memory[at:], 1
	}
	switch h[32] {
	case 0x25: // READ CAPACITY(10)
		from = make([]byte, expected+8)
		binary.BigEndian.PutUint32(from, uint32(s.size/512-1))
		binary.BigEndian.PutUint32(from[4:], 512)
	case 0x9e: // READ CAPACITY(16)
		from = make([]byte, expected+12)
		binary.BigEndian.PutUint64(from, s.size/512-1)
		binary.BigEndian.PutUint32(from[8:], 512)
	}
	sn := uint32(0)
	for at := 0; at < expected; sn++ {
		k := min(expected-at, s.maxSend, s.maxBurst-at%s.maxBurst, len(from))
		if s.used == maxAnswers {
			if err := s.flush(); err != nil {
				return err
			}
		}
		r := s.header(h, dataIn, 0)
		if binary.BigEndian.PutUint32(r[40:], uint32(at)); at+k == expected {
			r[1] = final | hasStatus
			s.status(r)
		} else if (at+k)%s.maxBurst == 0 {
			r[1] = final
		}
		binary.BigEndian.PutUint32(r[20:], noTag)
		binary.BigEndian.PutUint32(r[36:], sn)
		s.data(r, from[:padded(k)], k)
		from = from[step*k:]
		at += k
	}
	return nil
}

func (s *session) dataOut(h *[bhsBytes]byte, n int) error {
	tag := binary.BigEndian.Uint32(h[16:])
	for i, w := range s.writes {
		if w.tag != tag {
			continue
		}
		last := len(s.writes) - 1
		s.writes[i] = s.writes[last]
		s.writes = s.writes[:last]
		w.got += n
		return s.more(h, w, h[1]&final != 0)
	}
	return errProtocol
}

// more answers a write of which data has come: with its status, or, at the end of a sequence, with the next R2T.
func (s *session) more(h *[bhsBytes]byte, w write, end bool) error {
	if s.used == maxAnswers {
		if err := s.flush(); err != nil {
			return err
		}
	}
	if w.got >= w.want {
		s.status(s.header(h, response, final))
		return nil
	}
	if end {
		r := s.header(h, r2t, final)
		binary.BigEndian.PutUint32(r[20:], w.tag)
		binary.BigEndian.PutUint32(r[24:], s.stat)
		binary.BigEndian.PutUint32(r[36:], w.sn)
		binary.BigEndian.PutUint32(r[40:], uint32(w.got))
		binary.BigEndian.PutUint32(r[44:], uint32(min(w.want-w.got, s.maxBurst)))
		w.sn++
	}
	s.writes = append(s.writes, w)
	return nil
}

// header queues the header of an answer to h, and returns it to be filled in.
func (s *session) header(h *[bhsBytes]byte, op, flags byte) *[bhsBytes]byte {
	r := &s.headers[s.used]
	s.used++
	*r = [bhsBytes]byte{0: op, 1: flags}
	copy(r[16:20], h[16:20]) // initiator task tag
	binary.BigEndian.PutUint32(r[28:], s.expCmdSN)
	binary.BigEndian.PutUint32(r[32:], s.expCmdSN+window-1)
	s.out = append(s.out, r[:])
	return r
}

// data queues the data segment of r: n bytes, padded.
func (s *session) data(r *[bhsBytes]byte, padded []byte, n int) {
	r[5], r[6], r[7] = byte(n>>16), byte(n>>8), byte(n)
	s.out = append(s.out, padded)
}

// status gives r the next StatSN.
func (s *session) status(r *[bhsBytes]byte) {
	binary.BigEndian.PutUint32(r[24:], s.stat)
	s.stat++
}
