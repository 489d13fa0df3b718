package conformance

import (
	"bytes"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/target/iscsi"
	"github.com/ledge-storage/ledge/target/mem"
)

// nop is a NOP-Out (RFC 7143 11.18).
func (c *raw) nop(first byte, itt, ttt int64, data []byte) {
	c.t.Helper()
	f := &frame{data: data}
	f.h[0], f.h[1] = opNopOut|first, final
	f.h[9] = 5 // a LUN, which comes back
	f.put(16, itt)
	f.put(20, ttt)
	f.put(24, int64(c.cmdSN))
	f.put(28, int64(c.statSN))
	c.send(f)
}

// TestPingEcho: a ping comes back with its data, as far as the initiator can take them, and with
// all its fields as RFC 7143 11.19 says.
func TestPingEcho(t *testing.T) {
	portal := start(t, iscsi.Options{}, unit{mem: mem.Options{Bytes: 1 << 20, Name: "nop"}})
	for _, digests := range []string{"None", "CRC32C"} {
		c := dial(t, portal).login(normal("MaxRecvDataSegmentLength=4096", "HeaderDigest="+digests, "DataDigest="+digests)...).ready()
		for _, first := range []byte{0, immediate} {
			for _, n := range []int{0, 1, 2, 3, 4, 5, 511, 4095, 4096, 4097, 65536} {
				data := bytes.Repeat([]byte{0xA5, byte(n)}, n/2+1)[:n]
				before := c.cmdSN
				c.nop(first, int64(1000+n), noTag, data)
				if first == 0 {
					c.cmdSN++
				}
				f := c.must()
				if f.opcode() != opNopIn || f.u32(16) != uint32(1000+n) || f.u32(20) != noTag || f.h[1] != final || f.h[9] != 5 {
					t.Fatalf("%d bytes: header % X", n, f.h)
				}
				if !bytes.Equal(f.data, data[:min(n, 4096)]) {
					t.Errorf("%d bytes: %d came back, or others", n, len(f.data))
				}
				if first == 0 && f.u32(28) != before+1 || first != 0 && f.u32(28) != before {
					t.Errorf("ExpCmdSN %d after CmdSN %d, immediate %v", f.u32(28), before, first != 0)
				}
				if int32(f.u32(32)-f.u32(28)) < 0 {
					t.Errorf("the window is shut: ExpCmdSN %d, MaxCmdSN %d", f.u32(28), f.u32(32))
				}
			}
		}
		c.nop(immediate, noTag, noTag, []byte("no answer is wanted"))
		c.nop(immediate, 7, noTag, nil)
		if f := c.must(); f.u32(16) != 7 {
			t.Errorf("a NOP-Out without a tag was answered: % X", f.h)
		}
		c.ready()
	}
}

// TestPingFromTheTarget: the target pings an initiator that is silent, keeps one that answers,
// takes its own StatSN for no ping, and closes the connection of one that does not answer.
func TestPingFromTheTarget(t *testing.T) {
	portal := start(t, iscsi.Options{PingAfter: 100 * time.Millisecond}, unit{mem: mem.Options{Bytes: 1 << 20, Name: "ping"}})
	c := dial(t, portal).login(normal()...).ready()
	for range 5 {
		f := c.must() // recv holds its StatSN to be the next one, not taken
		if f.opcode() != opNopIn || f.u32(16) != noTag || f.u32(20) == noTag || len(f.data) != 0 {
			t.Fatalf("header % X", f.h)
		}
		c.nop(immediate, noTag, int64(f.u32(20)), nil)
	}
	// It is still there: a command among pings.
	itt := c.command(0, 0, nil, 0, 0, 0, 0, 0, 0)
	for {
		f := c.must()
		if f.opcode() == opNopIn {
			c.nop(immediate, noTag, int64(f.u32(20)), nil)
			continue
		}
		if f.opcode() != opResponse || f.u32(16) != itt || f.h[3] != 0 {
			t.Fatalf("header % X", f.h)
		}
		break
	}
	pings := 0
	for {
		f, err := c.recv()
		if err != nil {
			break
		}
		if f.opcode() != opNopIn {
			t.Fatalf("header % X", f.h)
		}
		pings++
	}
	if pings == 0 {
		t.Error("it was dropped without a ping")
	}
}
