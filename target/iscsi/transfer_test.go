package iscsi

import (
	"bytes"
	"testing"
)

// withAHS sends a command with additional header segments.
func (c *client) withAHS(h *header, ahs, data []byte) {
	c.t.Helper()
	h[4] = byte(len(ahs) / 4)
	h.setDataLen(len(data))
	b := append(append(append([]byte(nil), h[:]...), ahs...), data...)
	if _, err := c.nc.Write(append(b, make([]byte, padded(len(data))-len(data))...)); err != nil {
		c.t.Fatal(err)
	}
}

// TestAdditionalHeaders: extended CDBs, the read length of a bidirectional command, and what is
// neither.
func TestAdditionalHeaders(t *testing.T) {
	l := newLab(t, Options{}, nil)
	c := l.session().ready()
	bidi := []byte{0, 5, 2, 0, 0, 0, 2, 0}
	for _, x := range []struct {
		name   string
		flags  byte
		edtl   uint32
		cdb    []byte
		ahs    []byte
		opcode byte
		sense  uint16
		h1     byte // flags of the response
		read   uint32
		write  uint32
	}{
		{"bidirectional", 0xE0, 512, write10(0, 1), bidi, opResponse, 0x0E03, 0x80 | 0x08 | 0x02, 512, 512},
		{"bidirectional without a length", 0xE0, 512, write10(0, 1), nil, opResponse, 0x0E03, 0x80 | 0x02, 0, 512},
		{"a read length for a write", 0xA0, 512, write10(0, 1), bidi, opReject, 0, 0, 0, 0},
		{"an extended CDB", 0x80, 0, []byte{0x7F}, []byte{0, 17, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}, opResponse, 0x2000, 0x80, 0, 0},
		{"an unknown type", 0x80, 0, []byte{0}, []byte{0, 5, 9, 0, 0, 0, 0, 0}, opReject, 0, 0, 0, 0},
		{"a length beyond the header", 0x80, 0, []byte{0}, []byte{0, 50, 1, 0}, opReject, 0, 0, 0, 0},
		{"no length", 0x80, 0, []byte{0}, []byte{0, 0, 1, 0}, opReject, 0, 0, 0, 0},
	} {
		h := c.command(x.flags, x.edtl, x.cdb...)
		c.withAHS(h, x.ahs, nil)
		p, err := c.recv()
		if err != nil {
			t.Fatalf("%s: %v", x.name, err)
		}
		if p.h.opcode() != x.opcode {
			t.Errorf("%s: opcode %#x, want %#x", x.name, p.h.opcode(), x.opcode)
			continue
		}
		if x.opcode != opResponse {
			continue
		}
		if len(p.data) < 16 {
			t.Errorf("%s: no sense data", x.name)
			continue
		}
		if code := uint16(p.data[14])<<8 | uint16(p.data[15]); code != x.sense || p.h[1] != x.h1 || p.h.u32(40) != x.read || p.h.u32(44) != x.write {
			t.Errorf("%s: sense %04X, flags %02X, residuals %d and %d", x.name, code, p.h[1], p.h.u32(40), p.h.u32(44))
		}
	}
	c.ready()
}

// TestDataOutRules: each breach of the rules of data-out has its sense code (11.4.7.2), and the
// connection goes on.
func TestDataOutRules(t *testing.T) {
	for _, x := range []struct {
		name string
		send func(c *client, h *header, ttt uint32) (*header, int)
		code uint16
	}{
		{"nothing wrong", func(c *client, h *header, ttt uint32) (*header, int) { return dataOut(h, ttt, 0, 0), 1024 }, 0},
		{"a DataSN too far", func(c *client, h *header, ttt uint32) (*header, int) { return dataOut(h, ttt, 1, 0), 1024 }, wrongAmount},
		{"an offset too far", func(c *client, h *header, ttt uint32) (*header, int) { return dataOut(h, ttt, 0, 512), 512 }, wrongAmount},
		{"too little", func(c *client, h *header, ttt uint32) (*header, int) { return dataOut(h, ttt, 0, 0), 512 }, wrongAmount},
		{"too much", func(c *client, h *header, ttt uint32) (*header, int) { return dataOut(h, ttt, 0, 0), 2048 }, wrongAmount},
		{"a transfer tag of nobody", func(c *client, h *header, ttt uint32) (*header, int) { return dataOut(h, ttt+1, 0, 0), 1024 }, wrongAmount},
		{"what nobody asked for", func(c *client, h *header, ttt uint32) (*header, int) { return dataOut(h, noTag, 0, 0), 1024 }, unexpectedData},
	} {
		l := newLab(t, Options{}, nil)
		c := l.session("InitialR2T=Yes", "ImmediateData=No").ready()
		h := c.command(0xA0, 1024, write10(0, 2)...)
		if err := c.send(h, nil); err != nil {
			t.Fatal(err)
		}
		r2t := c.expect(opR2T)
		if r2t.h.u32(36) != 0 || r2t.h.u32(40) != 0 || r2t.h.u32(44) != 1024 {
			t.Errorf("R2T %x", r2t.h)
		}
		d, n := x.send(c, h, r2t.h.ttt())
		if err := c.send(d, make([]byte, n)); err != nil {
			t.Fatal(err)
		}
		r, err := c.finish(h, nil)
		if err != nil || r.asc != x.code || x.code != 0 && r.key != abortedCommand {
			t.Errorf("%s: %+v %v, want %04X", x.name, r, err, x.code)
		}
		c.ready()
	}
}

// TestSequenceNumbers: R2TSN, DataSN and offsets of a long write and a long read, with several
// bursts outstanding.
func TestSequenceNumbers(t *testing.T) {
	l := newLab(t, Options{}, nil)
	c := l.session("InitialR2T=Yes", "ImmediateData=No", "MaxBurstLength=4096", "MaxOutstandingR2T=3", "MaxRecvDataSegmentLength=1024").ready()
	data := bytes.Repeat([]byte("sequence"), 4096)
	h := c.command(0xA0, uint32(len(data)), write10(0, 64)...)
	if err := c.send(h, nil); err != nil {
		t.Fatal(err)
	}
	var asked []*pdu
	sent := 0
	for sn := uint32(0); sent < len(data); {
		for len(asked) < 3 && int(sn)*4096 < len(data) {
			p := c.expect(opR2T)
			if p.h.u32(36) != sn || p.h.u32(40) != sn*4096 || p.h.u32(44) != 4096 {
				t.Fatalf("R2T %d is %x", sn, p.h)
			}
			sn++
			asked = append(asked, p)
		}
		p := asked[0]
		asked = asked[1:]
		for i := range 4 {
			d := dataOut(h, p.h.ttt(), uint32(i), uint32(sent))
			if i < 3 {
				d[1] = 0
			}
			if err := c.send(d, data[sent:sent+1024]); err != nil {
				t.Fatal(err)
			}
			sent += 1024
		}
	}
	if p := c.expect(opResponse); p.h[3] != 0 {
		t.Fatalf("status %02X", p.h[3])
	}
	r := c.command(0xC0, uint32(len(data)), read10(0, 64)...)
	if err := c.send(r, nil); err != nil {
		t.Fatal(err)
	}
	for sn := range uint32(len(data) / 1024) {
		p := c.expect(opDataIn)
		final := p.h[1]&0x80 != 0
		if p.h.u32(36) != sn || p.h.u32(40) != sn*1024 || final != (sn%4 == 3) || !bytes.Equal(p.data, data[sn*1024:][:1024]) {
			t.Fatalf("Data-In %d is %x", sn, p.h)
		}
	}
}

// TestWindowNeverFalls uses every number of the window as soon as it is told of, and reads every
// PDU: ExpCmdSN and MaxCmdSN only rise, and no command is ignored.
func TestWindowNeverFalls(t *testing.T) {
	for _, conns := range []int{1, 2} {
		l := newLab(t, Options{Window: 16}, newBlocking(t, nil))
		var all []*client
		if conns == 1 {
			all = []*client{l.session().ready()}
		} else {
			all = l.group(2)
		}
		seen := make([][2]uint32, len(all))
		left, sent := 2000, 0
		maximum := all[0].next() + 15
		for left > 0 {
			for i := 0; sent < 2000 && !before(maximum, all[0].next()); i++ {
				c := all[i%len(all)]
				if err := c.send(c.command(0xA0, 512, write10(0, 1)...), fill(1)); err != nil {
					t.Fatal(err)
				}
				sent++
			}
			for i, c := range all {
				if left == 0 || len(all) == 2 && c.itt&0xFFFF == 0 {
					break
				}
				p := c.pingPong()
				for _, p := range p {
					exp, m := p.h.u32(28), p.h.u32(32)
					if before(exp, seen[i][0]) && seen[i][0] != 0 || before(m, seen[i][1]) && seen[i][1] != 0 || before(m+1, exp) {
						t.Fatalf("window [%d, %d] after [%d, %d]", exp, m, seen[i][0], seen[i][1])
					}
					seen[i] = [2]uint32{exp, m}
					if before(maximum, m) {
						maximum = m
					}
					left--
				}
			}
		}
	}
}
