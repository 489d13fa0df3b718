package iscsi

import (
	"encoding/binary"
	"hash/crc32"
)

// Opcodes (RFC 7143 11.2.1.2).
const (
	opNopOut     = 0x00
	opCommand    = 0x01
	opTaskReq    = 0x02
	opLoginReq   = 0x03
	opTextReq    = 0x04
	opDataOut    = 0x05
	opLogoutReq  = 0x06
	opSNACK      = 0x10
	opNopIn      = 0x20
	opResponse   = 0x21
	opTaskResp   = 0x22
	opLoginResp  = 0x23
	opTextResp   = 0x24
	opDataIn     = 0x25
	opLogoutResp = 0x26
	opR2T        = 0x31
	opAsync      = 0x32
	opReject     = 0x3F
)

// Reasons of Reject (11.17.1).
const (
	rejectDataDigest   = 0x02
	rejectSNACK        = 0x03
	rejectProtocol     = 0x04
	rejectNotSupported = 0x05
	rejectImmediate    = 0x06
	rejectBadField     = 0x09
)

const (
	headerBytes = 48
	noTag       = 0xFFFFFFFF
	// maxAHS is the longest additional header segment that the length byte can name.
	maxAHS = 255 * 4
)

// header is a basic header segment. The fields that every PDU has:
//
//	0      immediate bit (0x40) and opcode
//	1      final bit (0x80) and what the opcode says
//	4      AHS length in words
//	5..7   data segment length
//	8..15  LUN, or what the opcode says
//	16..19 initiator task tag
//	20..23 target transfer tag, or what the opcode says
//	24..27 CmdSN from an initiator, StatSN from a target
//	28..31 ExpStatSN from an initiator, ExpCmdSN from a target
//	32..35 MaxCmdSN from a target
type header [headerBytes]byte

func (h *header) opcode() byte    { return h[0] & 0x3F }
func (h *header) immediate() bool { return h[0]&0x40 != 0 }
func (h *header) final() bool     { return h[1]&0x80 != 0 }
func (h *header) ahs() int        { return int(h[4]) * 4 }
func (h *header) dataLen() int    { return int(h[5])<<16 | int(h[6])<<8 | int(h[7]) }
func (h *header) lun() uint64     { return binary.BigEndian.Uint64(h[8:]) }
func (h *header) itt() uint32     { return h.u32(16) }
func (h *header) ttt() uint32     { return h.u32(20) }
func (h *header) cmdSN() uint32   { return h.u32(24) }

func (h *header) u32(i int) uint32      { return binary.BigEndian.Uint32(h[i:]) }
func (h *header) u16(i int) uint16      { return binary.BigEndian.Uint16(h[i:]) }
func (h *header) put16(i int, v uint16) { binary.BigEndian.PutUint16(h[i:], v) }
func (h *header) put32(i int, v uint32) { binary.BigEndian.PutUint32(h[i:], v) }
func (h *header) put64(i int, v uint64) { binary.BigEndian.PutUint64(h[i:], v) }
func (h *header) setDataLen(n int)      { h[5], h[6], h[7] = byte(n>>16), byte(n>>8), byte(n) }

// padded is n rounded up to whole words.
func padded(n int) int { return (n + 3) &^ 3 }

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// digest is the CRC32C of RFC 7143 12.1, as it stands on the wire: little-endian.
func digest(parts ...[]byte) (d [4]byte) {
	c := uint32(0)
	for _, p := range parts {
		c = crc32.Update(c, castagnoli, p)
	}
	binary.LittleEndian.PutUint32(d[:], c)
	return d
}

// before compares serial numbers (RFC 1982 with 32 bits): a comes before b.
func before(a, b uint32) bool { return int32(a-b) < 0 }

// digester computes a digest over several parts.
type digester uint32

func (d *digester) add(p []byte) { *d = digester(crc32.Update(uint32(*d), castagnoli, p)) }

func (d *digester) sum() (b [4]byte) {
	binary.LittleEndian.PutUint32(b[:], uint32(*d))
	return b
}
