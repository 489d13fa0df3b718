package iscsi

import (
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/target/scsi"
)

// TestLimits: sessions, connections, a login that never comes.
func TestLimits(t *testing.T) {
	l := newLab(t, Options{MaxSessions: 2, MaxConnections: 3, LoginTimeout: time.Hour}, nil)
	for i := range 2 {
		c := l.dial()
		c.isid = byte(i + 1)
		if status := c.login(); status != 0 {
			t.Fatalf("status %04X", status)
		}
	}
	c := l.dial()
	c.isid = 3
	if status := c.login(); status != 0x0302 {
		t.Errorf("third session: status %04X", status)
	}
	c.nc.Close()
	eventually(t, "two connections", func() bool { return l.srv.Stats().Connections == 2 })
	silent := l.dial()
	eventually(t, "three connections", func() bool { return l.srv.Stats().Connections == 3 })
	l.dial()
	if _, err := silent.recv(); !errors.Is(err, io.EOF) {
		t.Errorf("one that logs in makes no room for the next: %v", err)
	}

	l = newLab(t, Options{MaxSessions: 1, MaxConnections: 1, LoginTimeout: time.Hour}, nil)
	l.session().ready()
	if _, err := l.dial().recv(); err == nil {
		t.Error("a connection too many is served")
	}
	if n := l.srv.Stats().RefusedConnections; n != 1 {
		t.Errorf("%d connections were refused", n)
	}

	l = newLab(t, Options{LoginTimeout: 100 * time.Millisecond}, nil)
	if _, err := l.dial().recv(); !errors.Is(err, io.EOF) {
		t.Errorf("a login that never comes: %v", err)
	}
}

// TestMemory: beyond the server's memory commands get TASK SET FULL, and all of it comes back.
func TestMemory(t *testing.T) {
	hold := make(chan struct{})
	dev := newBlocking(t, hold)
	l := newLab(t, Options{Memory: 1 << 20}, dev)
	c := l.session("FirstBurstLength=262144").ready()
	for range 2 {
		if err := c.send(c.command(0xA0, 512<<9, write10(0, 512)...), make([]byte, 512<<9)); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "two writes run", func() bool { return dev.in.Load() == 2 })
	r, err := c.do(c.command(0xA0, 2048<<9, write10(0, 2048)...), nil, nil)
	if err != nil || r.status != scsi.StatusTaskSetFull {
		t.Errorf("%+v %v", r, err)
	}
	close(hold)
	for range 2 {
		if p, err := c.recv(); err != nil || p.h[3] != 0 {
			t.Fatal(p, err)
		}
	}
	c.ready()
	if m := l.srv.Stats().Memory; m != 0 {
		t.Errorf("%d bytes are still counted", m)
	}
}

// TestPing: a silent initiator is pinged, then dropped; one that answers is kept.
func TestPing(t *testing.T) {
	l := newLab(t, Options{PingAfter: 500 * time.Millisecond}, nil)
	c := l.session()
	for range 3 {
		p, err := c.recv()
		if err != nil || p.h.opcode() != opNopIn || p.h.itt() != noTag {
			t.Fatal(p, err)
		}
		a := new(header)
		a[0], a[1] = opNopOut|0x40, 0x80
		a.put32(16, noTag)
		a.put32(20, p.h.ttt())
		a.put32(24, c.cmdSN)
		if err := c.send(a, nil); err != nil {
			t.Fatal(err)
		}
	}
	for {
		if _, err := c.recv(); err != nil {
			break
		}
	}
	eventually(t, "the session ends", func() bool { return l.srv.Stats().Sessions == 0 })
}

// TestStoppedProcess: a server that was stopped for hours, as a paused virtual machine is, takes its
// own absence for nobody's silence. It pings after silence that it lived through, once, and closes
// after as much again.
func TestStoppedProcess(t *testing.T) {
	o := Options{PingAfter: time.Hour, OrderTimeout: time.Hour}
	l := newLab(t, o, nil)
	c := l.session().ready()
	var at *conn
	l.srv.mu.Lock()
	for at = range l.srv.conns {
	}
	l.srv.mu.Unlock()
	now := time.Now()
	tick := func(later time.Duration) {
		now = now.Add(later)
		at.tick(now, o.PingAfter/4)
	}
	tick(0)
	for range 3 {
		tick(24 * time.Hour)
	}
	if got := c.pingPong(); len(got) != 0 {
		t.Fatalf("opcode %#x", got[0].h.opcode())
	}
	tick(0) // it was heard
	for range 7 {
		tick(o.PingAfter / 4)
	}
	if p := c.expect(opNopIn); p.h.itt() != noTag {
		t.Fatalf("%x", p.h)
	}
	tick(o.PingAfter / 4)
	if got := c.closed(); len(got) != 0 {
		t.Errorf("opcode %#x after the ping", got[0].h.opcode())
	}
	l.over()
}

// TestNoReader: a peer that asks for much and takes nothing is dropped, and holds little memory
// meanwhile.
func TestNoReader(t *testing.T) {
	l := newLab(t, Options{SendTimeout: 300 * time.Millisecond}, newBlocking(t, nil))
	c := l.session().ready()
	c.nc.(*net.TCPConn).SetReadBuffer(4096)
	for range 100 {
		if err := c.send(c.command(0xC0, 16<<20, read10(0, 32768)...), nil); err != nil {
			break
		}
	}
	eventually(t, "the session ends", func() bool { return l.srv.Stats().Sessions == 0 })
	l.alive()
}

// TestLies: lengths and counts that do not fit each other.
func TestLies(t *testing.T) {
	l := newLab(t, Options{}, nil)
	t.Run("mode sense with no room", func(t *testing.T) {
		c := l.session().ready()
		c.must(c.command(0xC0, 0, 0x1A, 0, 0x3F, 0, 0xFF, 0), nil, nil)
	})
	t.Run("data-out beyond the command", func(t *testing.T) {
		c := l.session("InitialR2T=Yes").ready()
		h := c.command(0xA0, 512, write10(0, 1)...)
		if err := c.send(h, nil); err != nil {
			t.Fatal(err)
		}
		p, err := c.recv()
		if err != nil || p.h.opcode() != opR2T {
			t.Fatal(p, err)
		}
		d := new(header)
		d[0], d[1] = opDataOut, 0x80
		d.put32(16, h.itt())
		d.put32(20, p.h.ttt())
		if err := c.send(d, make([]byte, 8192)); err != nil {
			t.Fatal(err)
		}
		if r, err := c.finish(h, nil); err != nil || r.status != scsi.StatusCheckCondition || r.key != 0xB {
			t.Fatal(r, err)
		}
		c.ready()
	})
	t.Run("write with half the data", func(t *testing.T) {
		c := l.session("InitialR2T=Yes", "ImmediateData=No").ready()
		h := c.command(0xA0, 1024, write10(0, 2)...)
		if err := c.send(h, nil); err != nil {
			t.Fatal(err)
		}
		p, _ := c.recv()
		d := new(header)
		d[0], d[1] = opDataOut, 0x80
		d.put32(16, h.itt())
		d.put32(20, p.h.ttt())
		if err := c.send(d, make([]byte, 512)); err != nil {
			t.Fatal(err)
		}
		if r, err := c.finish(h, nil); err != nil || r.status != scsi.StatusCheckCondition {
			t.Fatal(r, err)
		}
	})
	t.Run("transfer of 4 G", func(t *testing.T) {
		c := l.session().ready()
		cdb := []byte{0xA8, 0, 0, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0}
		if r, err := c.do(c.command(0xC0, 0xFFFFFFFF, cdb...), nil, nil); err != nil || r.key != 5 {
			t.Fatal(r, err)
		}
	})
	t.Run("data segment of 16 M", func(t *testing.T) {
		c := l.session().ready()
		h := c.command(0xA0, 1<<24-1, write10(0, 1)...)
		h.setDataLen(1<<24 - 1)
		if _, err := c.nc.Write(h[:]); err != nil {
			t.Fatal(err)
		}
		if _, err := c.recv(); err == nil {
			t.Error("it was answered")
		}
	})
	t.Run("the same tag twice", func(t *testing.T) {
		c := l.session("InitialR2T=Yes", "ImmediateData=No").ready()
		h := c.command(0xA0, 512, write10(0, 1)...)
		if err := c.send(h, nil); err != nil {
			t.Fatal(err)
		}
		if _, err := c.recv(); err != nil {
			t.Fatal(err)
		}
		again := c.command(0xA0, 512, write10(0, 1)...)
		again.put32(16, h.itt())
		if _, err := c.do(again, nil, nil); err == nil || !strings.Contains(err.Error(), "reject") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("wrong digests", func(t *testing.T) {
		c := l.session("HeaderDigest=CRC32C", "DataDigest=CRC32C").ready()
		h := c.command(0xA0, 512, write10(0, 1)...)
		h.setDataLen(512)
		b := append([]byte(nil), h[:]...)
		d := digest(h[:])
		b = append(b, d[:]...)
		b = append(b, make([]byte, 512+4)...) // a digest of zeros is not that of zeros
		if _, err := c.nc.Write(b); err != nil {
			t.Fatal(err)
		}
		if p, err := c.recv(); err != nil || p.h.opcode() != opReject || p.h[2] != rejectDataDigest {
			t.Fatal(p, err)
		}
		c.ready()
		b[3] ^= 1
		if _, err := c.nc.Write(b); err != nil {
			t.Fatal(err)
		}
		if _, err := c.recv(); err == nil {
			t.Error("a PDU with a wrong header digest was answered")
		}
	})
	l.alive()
}

// TestGarbage sends 10,000 random and mutated PDUs, from a seed, before and after login, while
// another session goes on.
func TestGarbage(t *testing.T) {
	seed := uint64(20261123)
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	l := newLab(t, Options{}, nil)
	other := l.dial()
	other.nc.SetDeadline(time.Now().Add(20 * time.Minute))
	other.isid = 77
	if other.login() != 0 {
		t.Fatal("login")
	}
	other.ready()
	var c *client
	var drained sync.WaitGroup
	for i := range 10000 {
		if c == nil {
			c = l.dial()
			c.isid = byte(r.IntN(4))
			if r.IntN(10) != 0 {
				keys := []string{}
				if r.IntN(2) == 0 {
					keys = append(keys, "InitialR2T=No")
				}
				if c.login(keys...) != 0 {
					t.Fatal("login")
				}
			}
			drained.Add(1)
			go func(nc net.Conn) { defer drained.Done(); io.Copy(io.Discard, nc) }(c.nc)
		}
		if err := c.send(mutant(r, c)); err != nil || r.IntN(50) == 0 {
			c.nc.Close()
			c = nil
		}
		if i%500 == 0 {
			// Garbage may well reset or stop the unit: that it answers is what counts.
			if _, err := other.do(other.command(0xC0, 4096, read10(0, 8)...), nil, nil); err != nil {
				t.Fatal(err)
			}
		}
	}
	if c != nil {
		c.nc.Close()
	}
	drained.Wait()
	eventually(t, "one session is left", func() bool { return l.srv.Stats().Sessions == 1 })
	if _, err := other.do(other.command(0xC0, 4096, read10(0, 8)...), nil, nil); err != nil {
		t.Fatal(err)
	}
}

// mutant makes a PDU that is right in some respects.
func mutant(r *rand.Rand, c *client) (*header, []byte) {
	h := new(header)
	data := make([]byte, r.IntN(64)*r.IntN(32))
	for i := range data {
		data[i] = byte(r.Uint32())
	}
	opcodes := []byte{opNopOut, opCommand, opCommand, opCommand, opTaskReq, opTextReq, opDataOut, opDataOut, opSNACK, opLoginReq, opLogoutReq, byte(r.IntN(64))}
	switch r.IntN(4) {
	case 0: // all random
		for i := range h {
			h[i] = byte(r.Uint32())
		}
		h[4] = byte(r.IntN(3))
	default:
		h[0] = opcodes[r.IntN(len(opcodes))]
		if r.IntN(3) == 0 {
			h[0] |= 0x40
		}
		h[1] = byte(r.Uint32()) | 0x80
		if h.opcode() == opCommand {
			h[1] = []byte{0x80, 0xC0, 0xA0, 0x20, 0xE0}[r.IntN(5)]
		}
		if r.IntN(8) == 0 {
			h[9] = byte(r.Uint32())
		}
		h.put32(16, uint32(r.IntN(8)))
		h.put32(20, []uint32{0, 512, 4096, noTag, uint32(r.IntN(8)), r.Uint32()}[r.IntN(6)])
		h.put32(24, c.cmdSN)
		if h[0]&0x40 == 0 && h.opcode() != opDataOut {
			c.cmdSN++
		}
		cdb := make([]byte, 16)
		cdb[0] = byte(r.Uint32())
		for i := 1; i < 16; i++ {
			if r.IntN(3) == 0 {
				cdb[i] = byte(r.Uint32()) >> r.IntN(8)
			}
		}
		copy(h[32:], cdb)
	}
	if h.opcode() == opTaskReq && h[1]&0x7F == tmfColdReset {
		h[1]-- // it ends every session of the target, as it should
	}
	return h, data
}

// TestIdleMemory holds 1,000 idle sessions to 64 KiB each.
func TestIdleMemory(t *testing.T) {
	n := 1000
	if testing.Short() {
		n = 100
	}
	l := newLab(t, Options{MaxSessionsPerInitiator: 1024}, nil)
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc + m.StackInuse
	}
	before := heap()
	for i := range n {
		c := l.dial()
		h := c.loginHeader(0x87)
		h[12], h[13] = byte(i>>8), byte(i)
		if err := c.send(h, []byte("InitiatorName="+testInitiator+"\x00TargetName="+testTarget+"\x00")); err != nil {
			t.Fatal(err)
		}
		if p, err := c.recv(); err != nil || p.h[36] != 0 {
			t.Fatal(p, err)
		}
	}
	if each := (heap() - before) / uint64(n); each > 64<<10 {
		t.Errorf("%d bytes a session", each)
	} else {
		t.Logf("%d bytes a session, the client's share included", each)
	}
}
