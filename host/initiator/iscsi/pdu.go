package iscsi

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
)

// HeaderBytes is the size of a basic header segment.
const HeaderBytes = 48

// Opcodes (RFC 7143 11.2.1.2).
const (
	OpNopOut      = 0x00
	OpCommand     = 0x01
	OpTaskRequest = 0x02
	OpLogin       = 0x03
	OpText        = 0x04
	OpDataOut     = 0x05
	OpLogout      = 0x06

	OpNopIn          = 0x20
	OpResponse       = 0x21
	OpTaskResponse   = 0x22
	OpLoginResponse  = 0x23
	OpTextResponse   = 0x24
	OpDataIn         = 0x25
	OpLogoutResponse = 0x26
	OpR2T            = 0x31
	OpAsync          = 0x32
	OpReject         = 0x3f
)

// Flags of byte 1.
const (
	flagFinal     = 0x80
	flagRead      = 0x40 // command
	flagWrite     = 0x20 // command
	attrSimple    = 0x01 // command
	flagOverflow  = 0x04 // response, Data-In
	flagUnderflow = 0x02 // response, Data-In
	flagStatus    = 0x01 // Data-In: carries the command's status
	flagContinue  = 0x40 // login: the text goes on in the next PDU
	flagImmediate = 0x40 // byte 0
)

// reservedTag is the tag that names no task (RFC 7143 11.2.1.8).
const reservedTag = 0xffffffff

// Header is a basic header segment as it is on the wire; the accessors name the fields that
// more than one opcode shares.
type Header [HeaderBytes]byte

func (h *Header) Opcode() byte       { return h[0] & 0x3f }
func (h *Header) Flags() byte        { return h[1] }
func (h *Header) Final() bool        { return h[1]&flagFinal != 0 }
func (h *Header) DataLength() int    { return int(h[5])<<16 | int(h[6])<<8 | int(h[7]) }
func (h *Header) TaskTag() uint32    { return binary.BigEndian.Uint32(h[16:]) }
func (h *Header) Word(at int) uint32 { return binary.BigEndian.Uint32(h[at:]) }

func (h *Header) SetDataLength(n int) {
	h[5], h[6], h[7] = byte(n>>16), byte(n>>8), byte(n)
}
func (h *Header) SetWord(at int, v uint32) { binary.BigEndian.PutUint32(h[at:], v) }

// SetLUN writes the 8-byte LUN of SAM-5 4.7: peripheral addressing below 256, else flat.
func (h *Header) SetLUN(lun uint16) {
	clear(h[8:16])
	if lun < 256 {
		h[9] = byte(lun)
		return
	}
	h[8], h[9] = 0x40|byte(lun>>8)&0x3f, byte(lun)
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// digests says which digests follow a PDU's header and its data, in one direction.
type digests struct{ header, data bool }

// readHeader reads one header with its additional headers and digest. maxData bounds the data
// segment that follows.
func readHeader(r *bufio.Reader, h *Header, d digests, maxData int) error {
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return err
	}
	if n := int(h[4]) * 4; n > 0 || d.header {
		tail := n
		if d.header {
			tail += 4
		}
		extra, err := r.Peek(tail) // at most 1024 bytes, within the buffer
		if err != nil {
			return cut(err)
		}
		if d.header {
			crc := crc32.Update(crc32.Checksum(h[:], castagnoli), castagnoli, extra[:n])
			if binary.LittleEndian.Uint32(extra[n:]) != crc {
				return fmt.Errorf("%w: header digest of opcode %#02x", ErrDigest, h.Opcode())
			}
		}
		r.Discard(tail)
	}
	if n := h.DataLength(); n > maxData {
		return fmt.Errorf("%w: opcode %#02x with %d bytes of data, %d are allowed", ErrProtocol, h.Opcode(), n, maxData)
	}
	return nil
}

// readData reads a data segment into p, whose length is that of the segment.
func readData(r *bufio.Reader, p []byte, d digests) error {
	if len(p) == 0 {
		return nil
	}
	if _, err := io.ReadFull(r, p); err != nil {
		return cut(err)
	}
	pad := -len(p) & 3
	n := pad
	if d.data {
		n += 4
	}
	if n == 0 {
		return nil
	}
	tail, err := r.Peek(n)
	if err != nil {
		return cut(err)
	}
	if d.data {
		crc := crc32.Update(crc32.Checksum(p, castagnoli), castagnoli, tail[:pad])
		if binary.LittleEndian.Uint32(tail[pad:]) != crc {
			return fmt.Errorf("%w: data of %d bytes", ErrDigest, len(p))
		}
	}
	r.Discard(n)
	return nil
}

// cut makes an end of the stream inside a PDU what it is.
func cut(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// ReadPDU reads one whole PDU without digests: the login, and what stands for a target in tests.
func ReadPDU(r *bufio.Reader, h *Header, maxData int) ([]byte, error) {
	if err := readHeader(r, h, digests{}, maxData); err != nil {
		return nil, err
	}
	p := make([]byte, h.DataLength())
	return p, readData(r, p, digests{})
}

// AppendPDU appends header, data and padding to b, without digests.
func AppendPDU(b []byte, h *Header, data []byte) []byte {
	h.SetDataLength(len(data))
	b = append(append(b, h[:]...), data...)
	return append(b, make([]byte, -len(data)&3)...)
}

// serialLess compares sequence numbers (RFC 1982, 32 bits).
func serialLess(a, b uint32) bool { return int32(a-b) < 0 }
