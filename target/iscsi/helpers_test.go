package iscsi

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/mem"
	"github.com/ledge-storage/ledge/target/scsi"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	testTarget    = "iqn.2026-11.io.ledge:test"
	testInitiator = "iqn.2026-11.test:client"
)

// lab is a server with one target on loopback.
type lab struct {
	t      testing.TB
	pause  sync.RWMutex // read-locked by bystanders while they have I/O under way
	srv    *Server
	target *scsi.Target
	dev    target.Device
	addr   string
}

func newLab(t testing.TB, o Options, dev target.Device) *lab {
	t.Helper()
	if dev == nil {
		d, err := mem.New(mem.Options{Bytes: 64 << 20, Name: "test"})
		if err != nil {
			t.Fatal(err)
		}
		dev = d
	}
	srv, err := NewServer(o)
	if err != nil {
		t.Fatal(err)
	}
	srv.farewell = time.Minute // however busy the machine, those who listen are told
	tgt := scsi.NewTarget(testTarget, scsi.Options{})
	if err := tgt.Attach(0, dev, scsi.UnitOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := srv.AddTarget(tgt); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(context.Background(), l) }()
	t.Cleanup(func() {
		srv.Close()
		if err := <-done; !errors.Is(err, ErrServerClosed) {
			t.Errorf("Serve returned %v", err)
		}
	})
	return &lab{t: t, srv: srv, target: tgt, dev: dev, addr: l.Addr().String()}
}

// client is a raw initiator: it sends what it is told to.
type client struct {
	t         testing.TB
	nc        net.Conn
	cmdSN     uint32
	expStatSN uint32
	itt       uint32
	tsih      uint16
	isid      byte
	cid       uint16
	hd, dd    bool
	numbers   *atomic.Uint32 // of a session of several connections: the next CmdSN
	quiet     bool           // acknowledges nothing
}

// pdu is a received PDU.
type pdu struct {
	h    header
	data []byte
}

func (l *lab) dial() *client {
	l.t.Helper()
	nc, err := net.Dial("tcp", l.addr)
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(5 * time.Minute))
	return &client{t: l.t, nc: nc, cmdSN: 1, itt: 1, isid: 1}
}

// session logs in.
func (l *lab) session(keys ...string) *client {
	l.t.Helper()
	c := l.dial()
	if status := c.login(keys...); status != 0 {
		l.t.Fatalf("login: status %04X", status)
	}
	return c
}

func (c *client) send(h *header, data []byte) error {
	h.setDataLen(len(data))
	if h.opcode() != opLoginReq && h.opcode() != opDataOut && !c.quiet {
		h.put32(28, c.expStatSN)
	}
	b := append([]byte(nil), h[:]...)
	if c.hd {
		d := digest(h[:])
		b = append(b, d[:]...)
	}
	start := len(b)
	b = append(b, data...)
	for (len(b)-start)%4 != 0 {
		b = append(b, 0)
	}
	if c.dd && len(data) > 0 {
		d := digest(b[start:])
		b = append(b, d[:]...)
	}
	_, err := c.nc.Write(b)
	return err
}

func (c *client) recv() (*pdu, error) {
	p := new(pdu)
	if _, err := io.ReadFull(c.nc, p.h[:]); err != nil {
		return nil, err
	}
	switch op := p.h.opcode(); {
	case op == opDataIn && p.h[1]&1 == 0, op == opR2T, op == opNopIn && p.h.itt() == noTag:
	default:
		c.expStatSN = p.h.u32(24) + 1
	}
	if c.hd {
		var d [4]byte
		if _, err := io.ReadFull(c.nc, d[:]); err != nil {
			return nil, err
		}
		if d != digest(p.h[:]) {
			return nil, errors.New("header digest of the target is wrong")
		}
	}
	if n := p.h.dataLen(); n > 0 {
		b := make([]byte, padded(n))
		if _, err := io.ReadFull(c.nc, b); err != nil {
			return nil, err
		}
		if c.dd {
			var d [4]byte
			if _, err := io.ReadFull(c.nc, d[:]); err != nil {
				return nil, err
			}
			if d != digest(b) {
				return nil, errors.New("data digest of the target is wrong")
			}
		}
		p.data = b[:n]
	}
	return p, nil
}

// login goes straight to the full feature phase and returns the status.
func (c *client) login(keys ...string) uint16 {
	c.t.Helper()
	text := []byte(nil)
	for _, k := range []string{"InitiatorName=" + testInitiator, "TargetName=" + testTarget, "SessionType=Normal"} {
		key, _, _ := strings.Cut(k, "=")
		if !slices.ContainsFunc(keys, func(k string) bool { return strings.HasPrefix(k, key+"=") }) {
			text = append(append(text, k...), 0)
		}
	}
	for _, k := range keys {
		text = append(append(text, k...), 0)
	}
	h := c.loginHeader(0x87)
	if err := c.send(h, text); err != nil {
		c.t.Fatal(err)
	}
	p, err := c.recv()
	if err != nil {
		c.t.Fatal(err)
	}
	if p.h.opcode() != opLoginResp {
		c.t.Fatalf("opcode %#x answers a login", p.h.opcode())
	}
	c.tsih = binary.BigEndian.Uint16(p.h[14:])
	pairs, _ := parseText(p.data)
	for _, p := range pairs {
		switch p {
		case pair{"HeaderDigest", "CRC32C"}:
			c.hd = true
		case pair{"DataDigest", "CRC32C"}:
			c.dd = true
		}
	}
	return binary.BigEndian.Uint16(p.h[36:])
}

func (c *client) loginHeader(flags byte) *header {
	h := new(header)
	h[0], h[1] = opLoginReq|0x40, flags
	h[8], h[13] = 0x80, c.isid
	binary.BigEndian.PutUint16(h[14:], c.tsih)
	h.put32(16, c.itt)
	h.put16(20, c.cid)
	h.put32(24, c.next())
	return h
}

// next is the CmdSN that comes next.
func (c *client) next() uint32 {
	if c.numbers != nil {
		return c.numbers.Load()
	}
	return c.cmdSN
}

// number takes the next CmdSN.
func (c *client) number() uint32 {
	if c.numbers != nil {
		return c.numbers.Add(1) - 1
	}
	c.cmdSN++
	return c.cmdSN - 1
}

// immediate builds an immediate PDU.
func (c *client) immediate(opcode, flags byte, itt uint32) *header {
	h := new(header)
	h[0], h[1] = opcode|0x40, 0x80|flags
	h.put32(16, itt)
	h.put32(24, c.next())
	return h
}

// function builds a task management function.
func (c *client) function(which byte, lun byte, itt, ref uint32) *header {
	h := c.immediate(opTaskReq, which, 5000)
	h[9] = lun
	h.put32(20, itt)
	h.put32(32, ref)
	return h
}

// expect reads on to a PDU with that opcode, answers pings meanwhile, and fails at what it did not
// expect.
func (c *client) expect(opcode byte) *pdu {
	c.t.Helper()
	for {
		p, err := c.recv()
		if err != nil {
			c.t.Fatalf("instead of opcode %#x: %v", opcode, err)
		}
		if p.h.opcode() == opNopIn && p.h.itt() == noTag && opcode != opNopIn {
			c.pong(p)
			continue
		}
		if p.h.opcode() != opcode {
			c.t.Fatalf("opcode %#x instead of %#x:\n%x %x", p.h.opcode(), opcode, p.h, p.data)
		}
		return p
	}
}

// pong answers a ping of the target.
func (c *client) pong(p *pdu) {
	h := c.immediate(opNopOut, 0, noTag)
	h.put32(20, p.h.ttt())
	c.send(h, nil)
}

// pingPong has the target answer a ping: what it sent before has been read, and is returned.
func (c *client) pingPong() (before []*pdu) {
	c.t.Helper()
	h := c.immediate(opNopOut, 0, 0x77777777)
	h.put32(20, noTag)
	if err := c.send(h, nil); err != nil {
		c.t.Fatal(err)
	}
	for {
		p, err := c.recv()
		if err != nil {
			c.t.Fatal(err)
		}
		switch {
		case p.h.opcode() == opNopIn && p.h.itt() == h.itt():
			return before
		case p.h.opcode() == opNopIn:
			if !c.quiet {
				c.pong(p)
			}
			continue
		}
		before = append(before, p)
	}
}

// command builds a SCSI command. Flags: 0x40 read, 0x20 write, 0x80 final.
func (c *client) command(flags byte, edtl uint32, cdb ...byte) *header {
	h := new(header)
	h[0], h[1] = opCommand, flags|1
	c.itt++
	h.put32(16, c.itt)
	h.put32(20, edtl)
	h.put32(24, c.number())
	copy(h[32:], cdb)
	return h
}

// result of a command.
type result struct {
	status   byte
	key      byte
	asc      uint16
	data     []byte
	flags    byte
	residual uint32
}

// do sends a command and follows it to its end, answering R2Ts from data.
func (c *client) do(h *header, immediate, data []byte) (*result, error) {
	if err := c.send(h, immediate); err != nil {
		return nil, err
	}
	return c.finish(h, data)
}

func (c *client) finish(h *header, data []byte) (*result, error) {
	r := new(result)
	for {
		p, err := c.recv()
		if err != nil {
			return nil, err
		}
		if p.h.opcode() == opReject {
			return nil, fmt.Errorf("reject, reason %#x", p.h[2])
		}
		if p.h.opcode() == opNopIn && p.h.itt() == noTag {
			c.pong(p)
		}
		if p.h.itt() != h.itt() {
			continue
		}
		switch p.h.opcode() {
		case opDataIn:
			if int(p.h.u32(40)) != len(r.data) {
				return nil, fmt.Errorf("data-in at %d, not %d", p.h.u32(40), len(r.data))
			}
			r.data = append(r.data, p.data...)
			if p.h[1]&1 == 0 {
				continue
			}
		case opR2T:
			off, n := p.h.u32(40), p.h.u32(44)
			d := new(header)
			d[0], d[1] = opDataOut, 0x80
			d.put32(16, h.itt())
			d.put32(20, p.h.ttt())
			d.put32(40, off)
			if err := c.send(d, data[off:off+n]); err != nil {
				return nil, err
			}
			continue
		case opResponse:
			if len(p.data) >= 16 {
				r.key, r.asc = p.data[4]&0xF, binary.BigEndian.Uint16(p.data[14:])
			}
		default:
			return nil, fmt.Errorf("opcode %#x", p.h.opcode())
		}
		r.status, r.flags, r.residual = p.h[3], p.h[1]&0x06, p.h.u32(44)
		return r, nil
	}
}

// must runs a command that is to end with GOOD.
func (c *client) must(h *header, immediate, data []byte) *result {
	c.t.Helper()
	r, err := c.do(h, immediate, data)
	if err != nil {
		c.t.Fatal(err)
	}
	if r.status != 0 {
		c.t.Fatalf("status %02X, sense %X/%04X", r.status, r.key, r.asc)
	}
	return r
}

// ready clears the unit attention of a new session.
func (c *client) ready() *client {
	c.t.Helper()
	for range 3 {
		r, err := c.do(c.command(0x80, 0, 0, 0, 0, 0, 0, 0), nil, nil)
		if err != nil {
			c.t.Fatal(err)
		}
		if r.status == 0 {
			return c
		}
	}
	c.t.Fatal("the unit does not become ready")
	return nil
}

func read10(lba uint32, blocks uint16) []byte {
	b := []byte{0x28, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	binary.BigEndian.PutUint32(b[2:], lba)
	binary.BigEndian.PutUint16(b[7:], blocks)
	return b
}

func write10(lba uint32, blocks uint16) []byte {
	b := read10(lba, blocks)
	b[0] = 0x2A
	return b
}

// alive checks that another initiator is served.
func (l *lab) alive() {
	l.t.Helper()
	c := l.dial()
	c.isid = 99
	if status := c.login(); status != 0 {
		l.t.Fatalf("login of another initiator: status %04X", status)
	}
	c.ready().must(c.command(0xC0, 4096, read10(0, 8)...), nil, nil)
	c.nc.Close()
}
