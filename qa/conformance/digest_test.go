package conformance

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/ledge-storage/ledge/target/iscsi"
	"github.com/ledge-storage/ledge/target/mem"
)

// TestDigests: header and data digests, each alone and both, on every PDU of either side. Each of
// the target's is checked by this initiator; a wrong one of the initiator's is noticed: of a header,
// the connection ends (RFC 7143 7.7); of data, the PDU is rejected with its header, and the blocks
// are not written (7.8).
func TestDigests(t *testing.T) {
	portal := start(t, iscsi.Options{}, unit{mem: mem.Options{Bytes: 16 << 20, Name: "digests"}})
	old, fresh := bytes.Repeat([]byte{1}, 4096), bytes.Repeat([]byte{2}, 4096)
	write := []byte{0x2A, 0, 0, 0, 0, 0, 0, 0, 8, 0}
	read := []byte{0x28, 0, 0, 0, 0, 0, 0, 0, 8, 0}
	for _, x := range []struct{ header, data string }{{"None", "None"}, {"CRC32C", "None"}, {"None", "CRC32C"}, {"CRC32C", "CRC32C"}, {"CRC32C,None", "None,CRC32C"}} {
		t.Run(fmt.Sprint(x), func(t *testing.T) {
			session := func(keys ...string) *raw {
				t.Helper()
				c := dial(t, portal).login(normal(append(keys, "HeaderDigest="+x.header, "DataDigest="+x.data)...)...)
				if c.headerDigest != (x.header[:4] == "CRC3") || c.dataDigest != (x.data == "CRC32C") {
					t.Fatalf("agreed on header %v, data %v", c.headerDigest, c.dataDigest)
				}
				return c.ready()
			}
			c := session()
			for n := range 8 { // lengths with every padding
				c.nop(immediate, 9, noTag, old[:n])
				if f := c.must(); !bytes.Equal(f.data, old[:n]) {
					t.Errorf("a ping of %d bytes: % x", n, f.data)
				}
			}
			if s := c.do(0x20, 4096, old, write...); s.code != 0 {
				t.Fatalf("status %02X", s.code)
			}
			if s := c.do(0x40, 4096, nil, read...); s.code != 0 || !bytes.Equal(s.data, old) {
				t.Errorf("status %02X, or other data", s.code)
			}
			if s := c.do(0x40, 255, nil, 0x12, 1, 0x83, 0, 255, 0); s.code != 0 {
				t.Errorf("status %02X", s.code)
			}
			if s := c.do(0x40, 512, nil, 0x28, 0, 0xFF, 0, 0, 0, 0, 0, 1, 0); s.code != 2 || s.asc != 0x2100 { // with sense data
				t.Errorf("status %02X, sense %04X", s.code, s.asc)
			}
			c.text("SendTargets=")
			unwritten := func(c *raw) {
				t.Helper()
				if s := c.do(0x40, 4096, nil, read...); s.code != 0 || !bytes.Equal(s.data, old) {
					t.Errorf("status %02X, or blocks that were written", s.code)
				}
			}
			if c.dataDigest {
				c.corruptData = true
				itt := c.command(0x20, 4096, fresh, write...)
				c.corruptData = false
				f := c.must()
				if f.opcode() != opReject || f.h[2] != 0x02 || len(f.data) != 48 || f.data[0]&0x3F != opCommand || f.data[19] != byte(itt) {
					t.Fatalf("a wrong data digest: % X %X", f.h, f.data)
				}
				if s, err := c.result(itt); err != nil || s.code != 2 || s.key != 0xB || s.asc != 0x4705 {
					t.Errorf("its command: status %02X, sense %X/%04X, %v", s.code, s.key, s.asc, err)
				}
				unwritten(c)
				// In a solicited Data-Out: the PDU is rejected and its command fails.
				c = session("ImmediateData=No", "InitialR2T=Yes")
				itt = c.command(0x20, 4096, nil, write...)
				r2t := c.must()
				if r2t.opcode() != opR2T {
					t.Fatalf("% X", r2t.h)
				}
				d := &frame{data: fresh}
				d.h[0], d.h[1] = opDataOut, final
				d.put(16, int64(itt))
				d.put(20, int64(r2t.u32(20)))
				c.corruptData = true
				c.send(d)
				c.corruptData = false
				if f := c.must(); f.opcode() != opReject || f.h[2] != 0x02 {
					t.Fatalf("% X", f.h)
				}
				if s, err := c.result(itt); err != nil || s.code != 2 || s.key != 0xB {
					t.Errorf("status %02X, sense %X/%04X, %v", s.code, s.key, s.asc, err)
				}
				unwritten(c)
				c.corruptData = true
				c.nop(immediate, 9, noTag, []byte("ping"))
				c.corruptData = false
				if f := c.must(); f.opcode() != opReject || f.h[2] != 0x02 {
					t.Errorf("a ping with a wrong data digest: % X", f.h)
				}
			}
			if c.headerDigest {
				c.corruptHeader = true
				c.command(0x20, 4096, fresh, write...)
				c.closed()
				unwritten(session())
			}
		})
	}
}

// TestRejectedCommandCounts: a rejected command has used up its number and gets a status, and those behind it are served.
// RFC 7143 7.3 has the number stay due instead, and the initiator fill the gap; with commands on their
// way, that ends the session of an initiator that does not.
func TestRejectedCommandCounts(t *testing.T) {
	portal := start(t, iscsi.Options{}, unit{mem: mem.Options{Bytes: 16 << 20, Name: "gap"}})
	c := dial(t, portal).login(normal("DataDigest=CRC32C")...).ready()
	sn := c.cmdSN
	c.corruptData = true
	itt := c.command(0x20, 512, make([]byte, 512), 0x2A, 0, 0, 0, 0, 0, 0, 0, 1, 0)
	c.corruptData = false
	f := c.must()
	if f.opcode() != opReject || f.u32(28) != sn+1 {
		t.Errorf("opcode %#x, ExpCmdSN %d, not %d", f.opcode(), f.u32(28), sn+1)
	}
	if s, err := c.result(itt); err != nil || s.code != 2 || s.asc != 0x4705 {
		t.Errorf("the rejected command: status %02X, sense %04X, %v", s.code, s.asc, err)
	}
	if s, err := c.result(c.command(0x20, 512, make([]byte, 512), 0x2A, 0, 0, 0, 0, 0, 0, 0, 1, 0)); err != nil || s.code != 0 {
		t.Errorf("the next command: status %02X, %v", s.code, err)
	}
}
