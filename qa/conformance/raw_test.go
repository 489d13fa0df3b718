package conformance

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// raw is an initiator that shares no code with the target: RFC 7143 as these tests read it.
type raw struct {
	t                        testing.TB
	nc                       net.Conn
	isid                     byte
	itt, cmdSN               uint32
	statSN                   uint32 // the next that is due
	headerDigest, dataDigest bool
	corruptHeader            bool // of the next PDU sent, its digest
	corruptData              bool
}

const (
	opNopOut, opCommand, opLogin, opText, opLogout              = 0x00, 0x01, 0x03, 0x04, 0x06
	opNopIn, opResponse, opLoginResp, opTextResp, opDataIn      = 0x20, 0x21, 0x23, 0x24, 0x25
	opR2T, opAsync, opReject                                    = 0x31, 0x32, 0x3F
	opDataOut, opLogoutResp, immediate, final              byte = 0x05, 0x26, 0x40, 0x80
	noTag                                                       = 0xFFFFFFFF
	initiatorName                                               = "iqn.2026-11.test:raw"
)

// frame is a PDU.
type frame struct {
	h    [48]byte
	data []byte
}

func (f *frame) opcode() byte       { return f.h[0] & 0x3F }
func (f *frame) u32(i int) uint32   { return binary.BigEndian.Uint32(f.h[i:]) }
func (f *frame) put(i int, v int64) { binary.BigEndian.PutUint32(f.h[i:], uint32(v)) }

func dial(t testing.TB, portal string) *raw {
	t.Helper()
	nc, err := net.Dial("tcp", portal)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(30 * time.Second))
	return &raw{t: t, nc: nc, isid: 1, itt: 1, cmdSN: 1}
}

func crc(b []byte) []byte {
	return binary.LittleEndian.AppendUint32(nil, crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
}

func (c *raw) send(f *frame) {
	c.t.Helper()
	n := len(f.data)
	f.h[5], f.h[6], f.h[7] = byte(n>>16), byte(n>>8), byte(n)
	b := append([]byte(nil), f.h[:]...)
	if c.headerDigest {
		b = append(b, crc(b)...)
		if c.corruptHeader {
			b[len(b)-1] ^= 1
		}
	}
	if n > 0 {
		data := append(append([]byte(nil), f.data...), make([]byte, -n&3)...)
		b = append(b, data...)
		if c.dataDigest {
			b = append(b, crc(data)...)
			if c.corruptData {
				b[len(b)-1] ^= 1
			}
		}
	}
	if _, err := c.nc.Write(b); err != nil {
		c.t.Fatal(err)
	}
}

// recv takes a PDU, and holds its digests and StatSN to what they must be.
func (c *raw) recv() (*frame, error) {
	f := new(frame)
	if _, err := io.ReadFull(c.nc, f.h[:]); err != nil {
		return nil, err
	}
	part := func(n int) ([]byte, error) {
		b := make([]byte, n)
		_, err := io.ReadFull(c.nc, b)
		return b, err
	}
	if c.headerDigest {
		if d, err := part(4); err != nil || !bytes.Equal(d, crc(f.h[:])) {
			return nil, fmt.Errorf("header digest % x of % x: %v", d, f.h, err)
		}
	}
	if n := int(f.h[5])<<16 | int(f.h[6])<<8 | int(f.h[7]); n > 0 {
		data, err := part((n + 3) &^ 3)
		if err != nil {
			return nil, err
		}
		if c.dataDigest {
			if d, err := part(4); err != nil || !bytes.Equal(d, crc(data)) {
				return nil, fmt.Errorf("data digest % x: %v", d, err)
			}
		}
		f.data = data[:n]
	}
	takes := f.opcode() != opR2T && !(f.opcode() == opDataIn && f.h[1]&1 == 0) && !(f.opcode() == opNopIn && f.u32(16) == noTag)
	if c.statSN != 0 && f.u32(24) != c.statSN && (takes || f.opcode() == opNopIn) {
		return nil, fmt.Errorf("StatSN %d of opcode %#x, %d is due", f.u32(24), f.opcode(), c.statSN)
	}
	if takes {
		c.statSN = f.u32(24) + 1
	}
	return f, nil
}

func (c *raw) must() *frame {
	c.t.Helper()
	f, err := c.recv()
	if err != nil {
		c.t.Fatal(err)
	}
	return f
}

// text is keys as they travel.
func text(keys ...string) []byte { return []byte(strings.Join(keys, "\x00") + "\x00") }

// parse is text taken apart; a key that comes several times keeps all values, with \n between.
func parse(b []byte) map[string]string {
	m := make(map[string]string)
	for s := range strings.SplitSeq(strings.TrimRight(string(b), "\x00"), "\x00") {
		k, v, _ := strings.Cut(s, "=")
		if old, ok := m[k]; ok {
			v = old + "\n" + v
		}
		m[k] = v
	}
	return m
}

// step is one login request; flags are T, C, CSG and NSG.
func (c *raw) step(flags byte, keys ...string) (status uint16, answer map[string]string, f *frame) {
	c.t.Helper()
	r := new(frame)
	r.h[0], r.h[1] = opLogin|immediate, flags
	r.h[8], r.h[13] = 0x80, c.isid
	r.put(16, int64(c.itt))
	r.put(24, int64(c.cmdSN))
	if len(keys) > 0 {
		r.data = text(keys...)
	}
	c.send(r)
	f = c.must()
	if f.opcode() != opLoginResp {
		c.t.Fatalf("opcode %#x answers a login", f.opcode())
	}
	return binary.BigEndian.Uint16(f.h[36:]), parse(f.data), f
}

func normal(keys ...string) []string {
	return append([]string{"InitiatorName=" + initiatorName, "TargetName=" + targetName}, keys...)
}

// login goes to the full feature phase at once, and takes the digests that were agreed.
func (c *raw) login(keys ...string) *raw {
	c.t.Helper()
	status, answer, _ := c.step(0x87, keys...)
	if status != 0 {
		c.t.Fatalf("login: status %04X", status)
	}
	c.headerDigest, c.dataDigest = answer["HeaderDigest"] == "CRC32C", answer["DataDigest"] == "CRC32C"
	return c
}

// command is a SCSI command; flags are R (0x40) and W (0x20).
func (c *raw) command(flags byte, edtl int64, data []byte, cdb ...byte) uint32 {
	c.t.Helper()
	f := &frame{data: data}
	f.h[0], f.h[1] = opCommand, final|flags|1
	c.itt++
	f.put(16, int64(c.itt))
	f.put(20, edtl)
	f.put(24, int64(c.cmdSN))
	f.put(28, int64(c.statSN))
	c.cmdSN++
	copy(f.h[32:], cdb)
	c.send(f)
	return c.itt
}

// status is how a command ended.
type status struct {
	code, key byte
	asc       uint16
	data      []byte
}

func (c *raw) do(flags byte, edtl int64, data []byte, cdb ...byte) (s status) {
	c.t.Helper()
	s, err := c.result(c.command(flags, edtl, data, cdb...))
	if err != nil {
		c.t.Fatal(err)
	}
	return s
}

func (c *raw) result(itt uint32) (s status, err error) {
	for {
		f, err := c.recv()
		switch {
		case err != nil:
			return s, err
		case f.opcode() == opReject:
			return s, fmt.Errorf("rejected, reason %#x", f.h[2])
		case f.u32(16) != itt:
			return s, fmt.Errorf("opcode %#x of task %#x", f.opcode(), f.u32(16))
		case f.opcode() == opDataIn:
			s.data = append(s.data, f.data...)
			if f.h[1]&1 == 0 {
				continue
			}
		case f.opcode() != opResponse:
			return s, fmt.Errorf("opcode %#x", f.opcode())
		case len(f.data) >= 16:
			s.key, s.asc = f.data[4]&0xF, binary.BigEndian.Uint16(f.data[14:])
		}
		s.code = f.h[3]
		return s, nil
	}
}

// ready takes the unit attentions of a new session.
func (c *raw) ready() *raw {
	c.t.Helper()
	for range 4 {
		if c.do(0, 0, nil, 0, 0, 0, 0, 0, 0).code == 0 {
			return c
		}
	}
	c.t.Fatal("the unit does not become ready")
	return nil
}

// text is a text exchange, followed to its end.
func (c *raw) text(keys ...string) map[string]string {
	c.t.Helper()
	var all []byte
	f := &frame{data: text(keys...)}
	ttt := int64(noTag)
	for {
		f.h[0], f.h[1] = opText|immediate, final
		f.put(16, 77)
		f.put(20, ttt)
		f.put(24, int64(c.cmdSN))
		c.send(f)
		a := c.must()
		if a.opcode() != opTextResp {
			c.t.Fatalf("opcode %#x answers a text request", a.opcode())
		}
		all = append(all, a.data...)
		if a.h[1]&final != 0 {
			return parse(all)
		}
		ttt = int64(a.u32(20))
		f = new(frame)
	}
}

// closed wants the target to end the connection.
func (c *raw) closed() {
	c.t.Helper()
	_, err := c.recv()
	var late net.Error
	if err == nil || errors.As(err, &late) && late.Timeout() {
		c.t.Errorf("the connection stays open (%v)", err)
	}
}
