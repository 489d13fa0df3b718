package iscsi

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
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
	late time.Duration // how much later than its context it ends
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
			time.Sleep(b.late)
			return ctx.Err()
		}
	}
	return b.Device.Write(ctx, lba, src, fua)
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for range 12000 { // a minute: it takes long only where it fails
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
				if ss := l.srv.sessionOf(c.tsih); ss.underWay() != 0 {
					t.Errorf("%d commands under way", ss.underWay())
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
