package iscsi

import (
	"bytes"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/target/mem"
	"github.com/ledge-storage/ledge/target/scsi"
)

// TestLiveChanges adds and removes targets and units while a session of two connections does I/O,
// which must notice nothing but that its own target's units changed.
func TestLiveChanges(t *testing.T) {
	l := newLab(t, Options{}, newBlocking(t, nil))
	stop := make(chan struct{})
	var io sync.WaitGroup
	for i, c := range l.group(2) {
		io.Add(1)
		go func() {
			defer io.Done()
			for n := uint32(0); ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				lba := uint32(i)*1000 + n%1000
				for _, x := range []struct {
					flags byte
					cdb   []byte
				}{{0xA0, write10(lba, 1)}, {0xC0, read10(lba, 1)}} {
					r, err := c.do(c.command(x.flags, 512, x.cdb...), nil, fill(n))
					for err == nil && r.key == 6 && r.asc == 0x3F0E {
						r, err = c.do(c.command(x.flags, 512, x.cdb...), nil, fill(n))
					}
					if err != nil || r.status != 0 {
						t.Errorf("connection %d: %+v %v", i, r, err)
						return
					}
					if x.flags == 0xC0 && !bytes.Equal(r.data, fill(n)) {
						t.Errorf("connection %d: block %d holds other data", i, lba)
					}
				}
			}
		}()
	}
	for i := range 30 {
		d, err := mem.New(mem.Options{Bytes: 1 << 20, Name: fmt.Sprint(i)})
		if err != nil {
			t.Fatal(err)
		}
		name := fmt.Sprintf("iqn.2026-11.io.ledge:live-%d", i)
		tgt := scsi.NewTarget(name, scsi.Options{})
		if err := tgt.Attach(0, d, scsi.UnitOptions{}); err != nil {
			t.Fatal(err)
		}
		if err := l.srv.AddTarget(tgt); err != nil {
			t.Fatal(err)
		}
		if err := l.target.Attach(uint64(i+1), d, scsi.UnitOptions{}); err != nil {
			t.Fatal(err)
		}
		c := l.dial()
		if got := c.login("TargetName=" + name); got != 0 {
			t.Fatalf("status %04X", got)
		}
		c.ready()
		l.srv.RemoveTarget(name)
		if got := c.closed(); len(got) != 1 || got[0].h[36] != asyncDropAll {
			t.Errorf("%d PDUs before the end", len(got))
		}
		if err := l.target.Detach(uint64(i + 1)); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	io.Wait()
}

// TestLogoutRequest: initiators are asked to log out; one that does is let go in peace, one that
// does not is told, connection by connection, and dropped.
func TestLogoutRequest(t *testing.T) {
	l := newLab(t, Options{OrderTimeout: 200 * time.Millisecond}, nil)
	all := l.group(2)
	good := l.dial()
	good.isid = 5
	if good.login() != 0 {
		t.Fatal("login")
	}
	good.ready()
	asked := func(seconds uint16, of ...*client) {
		t.Helper()
		l.srv.RequestLogout(testTarget, time.Duration(seconds)*time.Second)
		for _, c := range of {
			if p := c.expect(opAsync); p.h[36] != asyncLogout || p.h.u16(38) != 0 || p.h.u16(40) != 0 || p.h.u16(42) != seconds || p.h.itt() != noTag {
				t.Errorf("%x", p.h)
			}
		}
	}
	asked(600, append(all, good)...)
	if err := good.send(good.logout(logoutSession, 0), nil); err != nil {
		t.Fatal(err)
	}
	good.expect(opLogoutResp)
	if got := good.closed(); len(got) != 0 {
		t.Errorf("opcode %#x after the logout", got[0].h.opcode())
	}
	for _, c := range all {
		c.must(c.command(0xC0, 512, read10(0, 1)...), nil, nil) // until then it is served
	}
	asked(1, all...)
	for _, c := range all {
		if p := c.expect(opAsync); p.h[36] != asyncDrop || p.h.u16(38) != c.cid || p.h.u16(40) != 2 {
			t.Errorf("%x", p.h)
		}
		c.closed()
	}
	l.over()
}

// TestSilentConnection: one connection that answers no ping ends the session of two.
func TestSilentConnection(t *testing.T) {
	l := newLab(t, Options{PingAfter: 300 * time.Millisecond}, nil)
	all := l.group(2)
	p := all[0].expect(opNopIn)
	for p.h.opcode() == opNopIn {
		all[0].pong(p)
		var err error
		if p, err = all[0].recv(); err != nil {
			t.Fatalf("the connection that answers was not told: %v", err)
		}
	}
	if p.h.opcode() != opAsync || p.h[36] != asyncDropAll {
		t.Errorf("opcode %#x, event %d", p.h.opcode(), p.h[36])
	}
	pings := all[1].closed()
	if len(pings) != 1 {
		t.Errorf("the silent connection was pinged %d times", len(pings))
	}
	l.over()
}
