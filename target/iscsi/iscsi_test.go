package iscsi

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/mem"
	"github.com/ledge-storage/ledge/target/scsi"
)

// blocking makes a memory device one that engines call from workers.
type blocking struct {
	target.Device
	hold chan struct{} // nil: does not hold; else Write waits for it or for its context
	in   atomic.Int32
}

func newBlocking(t testing.TB, hold chan struct{}) *blocking {
	d, err := mem.New(mem.Options{Bytes: 64 << 20, Name: "blocking"})
	if err != nil {
		t.Fatal(err)
	}
	return &blocking{Device: d, hold: hold}
}

func (b *blocking) Write(ctx context.Context, lba uint64, src [][]byte, fua bool) error {
	b.in.Add(1)
	defer b.in.Add(-1)
	if b.hold != nil {
		select {
		case <-b.hold:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return b.Device.Write(ctx, lba, src, fua)
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for range 2000 {
		if f() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("never: %s", what)
}

// TestReadWrite moves data in every way that a login can ask for, on devices of both kinds.
func TestReadWrite(t *testing.T) {
	for _, keys := range [][]string{
		nil,
		{"InitialR2T=No", "ImmediateData=Yes", "FirstBurstLength=65536", "MaxBurstLength=65536"},
		{"InitialR2T=Yes", "ImmediateData=No", "MaxOutstandingR2T=3", "MaxBurstLength=4096"},
		{"HeaderDigest=CRC32C,None", "DataDigest=CRC32C"},
		{"MaxRecvDataSegmentLength=512"},
	} {
		for _, dev := range []target.Device{nil, newBlocking(t, nil)} {
			t.Run(fmt.Sprint(keys, dev != nil), func(t *testing.T) {
				l := newLab(t, Options{}, dev)
				c := l.session(keys...).ready()
				random := rand.NewChaCha8([32]byte{1})
				for _, blocks := range []int{1, 7, 8, 128, 2048} {
					data := make([]byte, blocks*512)
					random.Read(data)
					c.must(c.command(0xA0, uint32(len(data)), write10(3, uint16(blocks))...), nil, data)
					r := c.must(c.command(0xC0, uint32(len(data)), read10(3, uint16(blocks))...), nil, nil)
					if !bytes.Equal(r.data, data) {
						t.Fatalf("%d blocks read back other data", blocks)
					}
				}
			})
		}
	}
}

// TestImmediateAndUnsolicited sends a write's first bytes with the command, the next unasked, and
// the rest when asked.
func TestImmediateAndUnsolicited(t *testing.T) {
	l := newLab(t, Options{}, nil)
	c := l.session("InitialR2T=No", "ImmediateData=Yes", "FirstBurstLength=4096").ready()
	data := make([]byte, 8192)
	rand.NewChaCha8([32]byte{2}).Read(data)
	h := c.command(0x20, 8192, write10(0, 16)...)
	if err := c.send(h, data[:1024]); err != nil {
		t.Fatal(err)
	}
	d := new(header)
	d[0], d[1] = opDataOut, 0x80
	d.put32(16, h.itt())
	d.put32(20, noTag)
	d.put32(40, 1024)
	if err := c.send(d, data[1024:4096]); err != nil {
		t.Fatal(err)
	}
	if r, err := c.finish(h, data); err != nil || r.status != 0 {
		t.Fatal(r, err)
	}
	if r := c.must(c.command(0xC0, 8192, read10(0, 16)...), nil, nil); !bytes.Equal(r.data, data) {
		t.Fatal("other data came back")
	}
}

func TestResiduals(t *testing.T) {
	l := newLab(t, Options{}, nil)
	c := l.session().ready()
	for _, x := range []struct {
		flags    byte
		edtl     uint32
		cdb      []byte
		want     byte
		residual uint32
	}{
		{0xC0, 512, read10(0, 1), 0, 0},
		{0xC0, 1024, read10(0, 1), 2, 512},
		{0xC0, 512, read10(0, 4), 4, 1536},
		{0xC0, 0, read10(0, 1), 4, 512},
		{0xC0, 0xFFFFFFFF, read10(0, 1), 2, 0xFFFFFFFF - 512},
		{0xA0, 512, write10(0, 4), 4, 1536},
		{0xA0, 4096, write10(0, 1), 2, 3584},
	} {
		r := c.must(c.command(x.flags, x.edtl, x.cdb...), nil, make([]byte, 4096))
		if r.flags != x.want || r.residual != x.residual {
			t.Errorf("edtl %d, cdb %x: flags %x residual %d, want %x %d", x.edtl, x.cdb, r.flags, r.residual, x.want, x.residual)
		}
	}
}

// TestLogin holds the login to its answers, good and bad.
func TestLogin(t *testing.T) {
	l := newLab(t, Options{}, nil)
	for _, x := range []struct {
		name   string
		change func(h *header, text *string)
		status uint16
	}{
		{"good", func(*header, *string) {}, 0},
		{"unknown key", func(_ *header, s *string) { *s += "X-com.example.key=1\x00" }, 0},
		{"no initiator", func(_ *header, s *string) { *s = "TargetName=" + testTarget + "\x00" }, 0x0207},
		{"no target", func(_ *header, s *string) { *s = "InitiatorName=" + testInitiator + "\x00" }, 0x0207},
		{"unknown target", func(_ *header, s *string) { *s = strings.Replace(*s, ":test", ":nothing", 1) }, 0x0203},
		{"not a name", func(_ *header, s *string) { *s = strings.Replace(*s, testInitiator, "../../etc", 1) }, 0x0200},
		{"session type", func(_ *header, s *string) { *s += "SessionType=Strange\x00" }, 0x0209},
		{"version", func(h *header, _ *string) { h[3] = 9 }, 0x0205},
		{"tsih of nobody", func(h *header, _ *string) { h[15] = 77 }, 0x020A},
		{"stage 2", func(h *header, _ *string) { h[1] = 0x8B }, 0x0200},
		{"backwards", func(h *header, _ *string) { h[1] = 0x84 }, 0x0200},
		{"no equals sign", func(_ *header, s *string) { *s += "rubbish\x00" }, 0x0200},
		{"a key twice", func(_ *header, s *string) { *s += "MaxBurstLength=512\x00MaxBurstLength=512\x00" }, 0x0200},
		{"CHAP in the wrong stage", func(_ *header, s *string) { *s += "CHAP_A=5\x00" }, 0x0200},
	} {
		c := l.dial()
		h := c.loginHeader(0x87)
		text := "InitiatorName=" + testInitiator + "\x00TargetName=" + testTarget + "\x00"
		x.change(h, &text)
		if err := c.send(h, []byte(text)); err != nil {
			t.Fatal(err)
		}
		p, err := c.recv()
		if err != nil {
			t.Errorf("%s: %v", x.name, err)
			continue
		}
		if s := binary.BigEndian.Uint16(p.h[36:]); s != x.status {
			t.Errorf("%s: status %04X, want %04X", x.name, s, x.status)
		}
	}
	l.alive()
}

func TestNegotiate(t *testing.T) {
	for _, x := range []struct{ key, value, want string }{
		{"HeaderDigest", "CRC32C,None", "CRC32C"},
		{"HeaderDigest", "None", "None"},
		{"HeaderDigest", "MD5", "Reject"},
		{"InitialR2T", "No", "No"},
		{"InitialR2T", "Yes", "Yes"},
		{"InitialR2T", "Perhaps", "Reject"},
		{"ImmediateData", "No", "No"},
		{"MaxBurstLength", "16776192", "1048576"},
		{"MaxBurstLength", "0x10000", "65536"},
		{"MaxBurstLength", "100", "Reject"},
		{"MaxBurstLength", "-1", "Reject"},
		{"MaxBurstLength", "99999999999999999999", "Reject"},
		{"FirstBurstLength", "65536", "65536"},
		{"MaxOutstandingR2T", "0", "Reject"},
		{"MaxConnections", "8", "1"},
		{"ErrorRecoveryLevel", "2", "0"},
		{"DefaultTime2Wait", "0", "2"},
		{"DataPDUInOrder", "No", "Yes"},
		{"OFMarker", "Yes", "No"},
		{"MaxRecvDataSegmentLength", "262144", ""},
		{"MaxRecvDataSegmentLength", "1", "Reject"},
		{"Nonsense", "", "NotUnderstood"},
	} {
		p := defaultParams()
		if got := p.negotiate(x.key, x.value); got != x.want {
			t.Errorf("%s=%s: %q, want %q", x.key, x.value, got, x.want)
		}
	}
}

func TestDiscovery(t *testing.T) {
	l := newLab(t, Options{Portals: func(string) []string { return []string{"10.0.0.1:3260", "10.0.0.2:3260,2"} }}, nil)
	hidden := scsi.NewTarget("iqn.2026-11.io.ledge:hidden", scsi.Options{})
	d, _ := mem.New(mem.Options{Bytes: 1 << 20, Name: "hidden"})
	if err := hidden.Attach(0, d, scsi.UnitOptions{Initiators: []string{"iqn.2026-11.test:other"}}); err != nil {
		t.Fatal(err)
	}
	if err := l.srv.AddTarget(hidden); err != nil {
		t.Fatal(err)
	}
	c := l.dial()
	h := c.loginHeader(0x87)
	if err := c.send(h, []byte("InitiatorName="+testInitiator+"\x00SessionType=Discovery\x00")); err != nil {
		t.Fatal(err)
	}
	if p, err := c.recv(); err != nil || p.h[36] != 0 {
		t.Fatal(p, err)
	}
	r := new(header)
	r[0], r[1] = opTextReq, 0x80
	r.put32(16, 5)
	r.put32(20, noTag)
	r.put32(24, c.cmdSN)
	if err := c.send(r, []byte("SendTargets=All\x00")); err != nil {
		t.Fatal(err)
	}
	p, err := c.recv()
	if err != nil {
		t.Fatal(err)
	}
	want := "TargetName=" + testTarget + "\x00TargetAddress=10.0.0.1:3260,1\x00TargetAddress=10.0.0.2:3260,2\x00"
	if string(p.data) != want {
		t.Errorf("answer %q, want %q", p.data, want)
	}
}

// TestCHAP proves that only the right secret opens the door, and that the target proves its own.
func TestCHAP(t *testing.T) {
	secret := &CHAP{User: "host", Secret: "correct horse", MutualUser: "shelf", MutualSecret: "battery staple"}
	l := newLab(t, Options{Auth: func(string, string) *CHAP { return secret }}, nil)
	for _, x := range []struct {
		user, secret string
		algorithm    int
		mutual       bool
		status       uint16
	}{
		{"host", "correct horse", chapSHA256, false, 0},
		{"host", "correct horse", chapMD5, true, 0},
		{"host", "wrong", chapMD5, false, 0x0201},
		{"nobody", "correct horse", chapMD5, false, 0x0201},
	} {
		c := l.dial()
		exchange := func(flags byte, text string) (map[string]string, uint16) {
			t.Helper()
			if err := c.send(c.loginHeader(flags), []byte(text)); err != nil {
				t.Fatal(err)
			}
			p, err := c.recv()
			if err != nil {
				t.Fatal(err)
			}
			m := make(map[string]string)
			pairs, _ := parseText(p.data)
			for _, kv := range pairs {
				m[kv.key] = kv.value
			}
			return m, binary.BigEndian.Uint16(p.h[36:])
		}
		exchange(0, "InitiatorName="+testInitiator+"\x00TargetName="+testTarget+"\x00AuthMethod=CHAP,None\x00")
		m, _ := exchange(0, fmt.Sprintf("CHAP_A=%d\x00", x.algorithm))
		challenge, ok := parseBinary(m["CHAP_C"])
		id, _ := parseNumber(m["CHAP_I"])
		if !ok || len(challenge) == 0 {
			t.Fatalf("no challenge in %v", m)
		}
		answer := fmt.Sprintf("CHAP_N=%s\x00CHAP_R=0x%x\x00", x.user, chapResponse(x.algorithm, byte(id), x.secret, challenge))
		if x.mutual {
			answer += "CHAP_I=9\x00CHAP_C=0x00112233445566778899\x00"
		}
		m, status := exchange(0x83, answer)
		if status != x.status {
			t.Errorf("%s/%s: status %04X, want %04X", x.user, x.secret, status, x.status)
		}
		if x.mutual {
			mine, _ := parseBinary("0x00112233445566778899")
			if got, _ := parseBinary(m["CHAP_R"]); m["CHAP_N"] != "shelf" || !bytes.Equal(got, chapResponse(x.algorithm, 9, "battery staple", mine)) {
				t.Errorf("the target did not prove itself: %v", m)
			}
		}
	}
	c := l.dial()
	if status := c.login(); status != 0x0201 {
		t.Errorf("login without authentication: status %04X", status)
	}
}

// TestReinstatement logs in again while a write of the first session is held: the new session
// begins when the write has ended, and the old one is gone.
func TestReinstatement(t *testing.T) {
	dev := newBlocking(t, make(chan struct{}))
	l := newLab(t, Options{}, dev)
	old := l.session().ready()
	if err := old.send(old.command(0xA0, 512, write10(0, 1)...), make([]byte, 512)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the write runs", func() bool { return dev.in.Load() == 1 })
	c := l.session()
	if dev.in.Load() != 0 {
		t.Error("the old session's write runs in the new session")
	}
	c.ready()
	if _, err := old.recv(); err == nil {
		t.Error("the old session was answered")
	}
	if n := l.srv.Stats().Sessions; n != 1 {
		t.Errorf("%d sessions", n)
	}
}

// TestTaskManagement acts on commands that are really in flight.
func TestTaskManagement(t *testing.T) {
	for _, x := range []struct {
		name     string
		function byte
	}{{"abort task", tmfAbortTask}, {"abort task set", tmfAbortTaskSet}, {"clear task set", tmfClearTaskSet}, {"reset unit", tmfResetUnit}, {"reset target", tmfWarmReset}} {
		for _, waiting := range []bool{false, true} {
			t.Run(fmt.Sprint(x.name, waiting), func(t *testing.T) {
				dev := newBlocking(t, make(chan struct{}))
				l := newLab(t, Options{}, dev)
				c := l.session("InitialR2T=Yes", "ImmediateData=Yes").ready()
				w := c.command(0xA0, 512, write10(0, 1)...)
				var data []byte
				if !waiting {
					data = make([]byte, 512)
				}
				if err := c.send(w, data); err != nil {
					t.Fatal(err)
				}
				if waiting {
					if p, err := c.recv(); err != nil || p.h.opcode() != opR2T {
						t.Fatal(p, err)
					}
				} else {
					eventually(t, "the write runs", func() bool { return dev.in.Load() == 1 })
				}
				m := new(header)
				m[0], m[1] = opTaskReq|0x40, 0x80|x.function
				m.put32(16, 1000)
				m.put32(20, w.itt())
				m.put32(24, c.cmdSN)
				if err := c.send(m, nil); err != nil {
					t.Fatal(err)
				}
				p, err := c.recv()
				if err != nil {
					t.Fatal(err)
				}
				if p.h.opcode() != opTaskResp || p.h[2] != tmrDone {
					t.Fatalf("opcode %#x, response %d", p.h.opcode(), p.h[2])
				}
				if dev.in.Load() != 0 {
					t.Error("the write still runs")
				}
				c.ready()
				if ss := l.srv.sessionOf(c.tsih); ss.underWay.Load() != 0 {
					t.Errorf("%d commands under way", ss.underWay.Load())
				}
			})
		}
	}
}

// TestOrdered: an ORDERED command begins when the older ones have ended, a SIMPLE one after it.
func TestOrdered(t *testing.T) {
	hold := make(chan struct{})
	dev := newBlocking(t, hold)
	l := newLab(t, Options{}, dev)
	c := l.session().ready()
	one, two := bytes.Repeat([]byte{1}, 512), bytes.Repeat([]byte{2}, 512)
	first := c.command(0xA0, 512, write10(0, 1)...)
	ordered := c.command(0xA0, 512, write10(0, 1)...)
	ordered[1] = 0xA0 | byte(scsi.Ordered)
	last := c.command(0xC0, 512, read10(0, 1)...)
	for _, x := range []struct {
		h    *header
		data []byte
	}{{first, one}, {ordered, two}, {last, nil}} {
		if err := c.send(x.h, x.data); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the first write runs", func() bool { return dev.in.Load() == 1 })
	time.Sleep(20 * time.Millisecond) // for the others to overtake, if they do
	if n := dev.in.Load(); n != 1 {
		t.Errorf("%d writes at once", n)
	}
	close(hold)
	r, err := c.finish(last, nil)
	if err != nil || !bytes.Equal(r.data, two) {
		t.Errorf("the read overtook the ordered write: %v", err)
	}
	c.ready()
}

// TestAbortOfNothing: a task that is not there, a unit that is not there.
func TestAbortOfNothing(t *testing.T) {
	l := newLab(t, Options{}, nil)
	c := l.session().ready()
	for _, x := range []struct{ function, lun, want byte }{
		{tmfAbortTask, 0, tmrNoTask}, {tmfAbortTask, 7, tmrNoLUN}, {tmfAbortTaskSet, 7, tmrNoLUN}, {tmfReassign, 0, tmrNoReassign}, {42, 0, tmrUnsupported},
	} {
		m := new(header)
		m[0], m[1], m[9] = opTaskReq|0x40, 0x80|x.function, x.lun
		m.put32(16, 1000)
		m.put32(20, 12345)
		m.put32(24, c.cmdSN)
		if err := c.send(m, nil); err != nil {
			t.Fatal(err)
		}
		p, err := c.recv()
		if err != nil || p.h.opcode() != opTaskResp || p.h[2] != x.want {
			t.Errorf("function %d: %v %v", x.function, p, err)
		}
	}
}

// TestQueueDepth has a window of commands in flight on a device that blocks, and gets them all back.
func TestQueueDepth(t *testing.T) {
	hold := make(chan struct{})
	dev := newBlocking(t, hold)
	l := newLab(t, Options{Window: 64}, dev)
	c := l.session().ready()
	for range 64 {
		if err := c.send(c.command(0xA0, 512, write10(0, 1)...), make([]byte, 512)); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "64 writes at once", func() bool { return dev.in.Load() == 64 })
	// One more is beyond the window: it is ignored, as RFC 7143 4.2.2.1 asks.
	extra := c.command(0x80, 0, 0, 0, 0, 0, 0, 0)
	if err := c.send(extra, nil); err != nil {
		t.Fatal(err)
	}
	c.cmdSN--
	ping := new(header)
	ping[0], ping[1] = opNopOut|0x40, 0x80
	ping.put32(16, 7777)
	ping.put32(20, noTag)
	ping.put32(24, c.cmdSN)
	if err := c.send(ping, []byte("ping")); err != nil {
		t.Fatal(err)
	}
	if p, err := c.recv(); err != nil || p.h.opcode() != opNopIn || string(p.data) != "ping" {
		t.Fatal(p, err)
	}
	close(hold)
	for range 64 {
		p, err := c.recv()
		if err != nil || p.h.opcode() != opResponse || p.h[3] != 0 {
			t.Fatal(p, err)
		}
	}
	c.ready()
}

// TestLimits: connections, sessions, a login that never comes.
func TestLimits(t *testing.T) {
	l := newLab(t, Options{MaxSessions: 2, MaxConnections: 4, LoginTimeout: 200 * time.Millisecond}, nil)
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
	eventually(t, "two connections", func() bool { return l.srv.Stats().Connections == 2 })
	silent := []*client{l.dial(), l.dial()}
	eventually(t, "four connections", func() bool { return l.srv.Stats().Connections == 4 })
	if _, err := l.dial().recv(); err == nil {
		t.Error("a fifth connection is served")
	}
	for _, c := range silent {
		if _, err := c.recv(); !errors.Is(err, io.EOF) {
			t.Errorf("a login that never comes: %v", err)
		}
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
	l := newLab(t, Options{PingAfter: 100 * time.Millisecond}, nil)
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

// TestLoginsRacingIO: logins of the same and of other names, during I/O, with memory that stays flat.
func TestLoginsRacingIO(t *testing.T) {
	n := 3000
	if testing.Short() {
		n = 300
	}
	l := newLab(t, Options{}, nil)
	stop := make(chan struct{})
	var io sync.WaitGroup
	io.Add(1)
	go func() {
		defer io.Done()
		c := l.dial()
		c.nc.SetDeadline(time.Now().Add(5 * time.Minute))
		c.isid = 50
		if c.login() != 0 {
			t.Error("login of the I/O session")
			return
		}
		c.ready()
		for {
			select {
			case <-stop:
				return
			default:
			}
			if r, err := c.do(c.command(0xC0, 4096, read10(8, 8)...), nil, nil); err != nil || r.status != 0 {
				t.Errorf("I/O: %v %v", r, err)
				return
			}
		}
	}()
	var before runtime.MemStats
	var logins sync.WaitGroup
	for w := range 4 {
		logins.Add(1)
		go func() {
			defer logins.Done()
			for i := range n / 4 {
				c := l.dial()
				c.isid = byte(w/2 + 1) // two workers share each name and reinstate each other
				if err := c.send(c.loginHeader(0x87), []byte("InitiatorName="+testInitiator+"\x00TargetName="+testTarget+"\x00")); err == nil {
					c.recv()
				}
				c.nc.Close()
				if w == 0 && i == n/8 {
					runtime.GC()
					runtime.ReadMemStats(&before)
				}
			}
		}()
	}
	logins.Wait()
	close(stop)
	io.Wait()
	eventually(t, "no session is left", func() bool { return l.srv.Stats().Sessions <= 1 })
	var after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&after)
	if after.HeapAlloc > before.HeapAlloc+8<<20 {
		t.Errorf("heap %d kB at half, %d kB at the end", before.HeapAlloc>>10, after.HeapAlloc>>10)
	}
	l.alive()
}

// TestAsync: initiators are asked to log out, and told that their target goes.
func TestAsync(t *testing.T) {
	l := newLab(t, Options{}, nil)
	c := l.session().ready()
	if s := l.srv.Sessions(); len(s) != 1 || s[0].Initiator != testInitiator || s[0].Target != testTarget {
		t.Errorf("sessions %+v", s)
	}
	l.srv.RequestLogout(testTarget, 10*time.Second)
	if p, err := c.recv(); err != nil || p.h.opcode() != opAsync || p.h[36] != asyncLogout || p.h[43] != 10 {
		t.Fatal(p, err)
	}
	c.ready()
	l.srv.RemoveTarget(testTarget)
	if p, err := c.recv(); err != nil || p.h.opcode() != opAsync || p.h[36] != asyncDropAll {
		t.Fatal(p, err)
	}
	if _, err := c.recv(); err == nil {
		t.Error("the connection stays")
	}
	if n := len(l.srv.Sessions()); n != 0 {
		t.Errorf("%d sessions", n)
	}
}

// TestManyLogins: the 16 bits of a TSIH go round, past those in use.
func TestManyLogins(t *testing.T) {
	l := newLab(t, Options{}, nil)
	kept := l.dial()
	kept.isid = 200
	if kept.login() != 0 {
		t.Fatal("login")
	}
	l.srv.mu.Lock()
	l.srv.lastTSIH = 65533
	l.srv.mu.Unlock()
	for range 5 {
		c := l.session()
		if c.tsih == 0 || c.tsih == kept.tsih {
			t.Errorf("TSIH %d", c.tsih)
		}
	}
	kept.ready()
}

// TestGarbage sends 10,000 random and mutated PDUs, from a seed, before and after login, while
// another session goes on.
func TestGarbage(t *testing.T) {
	seed := uint64(20261123)
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	l := newLab(t, Options{LoginTimeout: 2 * time.Second, SendTimeout: 2 * time.Second}, nil)
	other := l.dial()
	other.nc.SetDeadline(time.Now().Add(2 * time.Minute))
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
	return h, data
}

// TestDetach takes a unit away under load: its device is not called afterwards.
func TestDetach(t *testing.T) {
	dev := newBlocking(t, make(chan struct{}))
	l := newLab(t, Options{}, dev)
	c := l.session().ready()
	h := c.command(0xA0, 512, write10(0, 1)...)
	if err := c.send(h, make([]byte, 512)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the write runs", func() bool { return dev.in.Load() == 1 })
	if err := l.target.Detach(0); err != nil {
		t.Fatal(err)
	}
	if dev.in.Load() != 0 {
		t.Error("Detach returned while the device was at work")
	}
	if r, err := c.do(c.command(0x80, 0, 0, 0, 0, 0, 0, 0), nil, nil); err != nil || r.asc != 0x2500 {
		t.Fatal(r, err)
	}
}

// TestIdleMemory holds 1,000 idle sessions to 64 KiB each.
func TestIdleMemory(t *testing.T) {
	n := 1000
	if testing.Short() {
		n = 100
	}
	l := newLab(t, Options{}, nil)
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
