package iscsi

import (
	"encoding/binary"
	"hash/crc32"
	"net"
)

// outPDU is a PDU that waits to be written. data belongs to t's caller, who does not get it back
// before the PDU was written or the session is dead.
type outPDU struct {
	header Header
	data   []byte
	t      *task // nil: no reference
	answer bool  // to a NOP-In
}

// inlineRounds is how many batches a caller writes before it hands over to the sender goroutine,
// so that a busy session does not keep one caller for ever.
const inlineRounds = 4

// enqueue appends a PDU and counts its reference to t. Its size is bounded by what is bounded
// elsewhere: slots, a command's data are asked for once, maxPendingAnswers. mu is held.
func (s *Session) enqueue(h *Header, data []byte, t *task) {
	h.SetDataLength(len(data))
	if h.Opcode() != OpDataOut && h[0]&flagImmediate != 0 {
		h.SetWord(24, s.cmdSN)
	}
	h.SetWord(28, s.expStatSN)
	if t != nil {
		t.refs++
	}
	s.queue = append(s.queue, outPDU{header: *h, data: data, t: t})
}

// wakeSender asks the sender goroutine to write the queue.
func (s *Session) wakeSender() {
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

// flush writes the queue unless somebody does already. mu is held; it is released while writing.
func (s *Session) flush(rounds int) {
	if s.writing {
		return
	}
	s.writing = true
	for ; len(s.queue) > 0 && s.err == nil; rounds-- {
		if rounds == 0 {
			s.wakeSender()
			break
		}
		q := s.queue
		s.queue, s.spare = s.spare[:0], nil
		s.mu.Unlock()
		err := s.batch.write(s.conn, q, s.par.digests)
		s.mu.Lock()
		if err != nil {
			s.kill(err)
		}
		for i := range q {
			if q[i].t != nil {
				s.release(q[i].t)
			}
			if q[i].answer {
				s.answers--
			}
			q[i] = outPDU{}
		}
		s.spare = q[:0]
	}
	s.writing = false
	s.idle.Broadcast()
}

// send is the sender goroutine: it writes what the reader and the keeper queue, and what callers
// hand over.
func (s *Session) send() {
	for {
		select {
		case <-s.closing:
			return
		case <-s.kick:
		}
		s.mu.Lock()
		s.flush(1 << 30)
		s.mu.Unlock()
	}
}

// batch turns queued PDUs into one writev.
type batch struct {
	bufs net.Buffers
	tail []byte // paddings and digests, one run for each PDU
}

var zeros [4]byte

func (b *batch) write(conn net.Conn, q []outPDU, d digests) error {
	b.bufs = b.bufs[:0]
	if need := len(q) * 12; cap(b.tail) < need && (d.header || d.data) {
		b.tail = make([]byte, 0, need) // never grows below: bufs point into it
	}
	b.tail = b.tail[:0]
	sum := func(crc uint32) []byte {
		n := len(b.tail)
		b.tail = binary.LittleEndian.AppendUint32(b.tail, crc)
		return b.tail[n:]
	}
	for i := range q {
		p := &q[i]
		b.bufs = append(b.bufs, p.header[:])
		if d.header {
			b.bufs = append(b.bufs, sum(crc32.Checksum(p.header[:], castagnoli)))
		}
		if len(p.data) == 0 {
			continue
		}
		b.bufs = append(b.bufs, p.data)
		pad := zeros[:-len(p.data)&3]
		if len(pad) > 0 {
			b.bufs = append(b.bufs, pad)
		}
		if d.data {
			b.bufs = append(b.bufs, sum(crc32.Update(crc32.Checksum(p.data, castagnoli), castagnoli, pad)))
		}
	}
	all := b.bufs // WriteTo consumes the slice; keep its array for the next batch
	_, err := b.bufs.WriteTo(conn)
	clear(all)
	b.bufs = all[:0]
	return err
}
