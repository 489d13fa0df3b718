package iscsi

import (
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/scsi"
)

// manage sends a function and returns its response and additional information. What comes before
// the response is returned too.
func (c *client) manage(h *header) (response byte, info [3]byte, before []*pdu) {
	c.t.Helper()
	if err := c.send(h, nil); err != nil {
		c.t.Fatal(err)
	}
	for {
		p, err := c.recv()
		if err != nil {
			c.t.Fatal(err)
		}
		switch {
		case p.h.opcode() == opNopIn && p.h.itt() == noTag:
			c.pong(p)
		case p.h.opcode() == opTaskResp:
			return p.h[2], [3]byte(p.h[36:39]), before
		default:
			before = append(before, p)
		}
	}
}

// ack acknowledges what has been read.
func (c *client) ack() {
	c.t.Helper()
	h := c.immediate(opNopOut, 0, noTag)
	h.put32(20, noTag)
	if err := c.send(h, nil); err != nil {
		c.t.Fatal(err)
	}
}

// write starts a write of one block.
func (c *client) write(lba uint32) *header {
	c.t.Helper()
	h := c.command(0xA0, 512, write10(lba, 1)...)
	if err := c.send(h, fill(lba)); err != nil {
		c.t.Fatal(err)
	}
	return h
}

// TestFunctionsAcross: functions that come by one connection end what came by another.
func TestFunctionsAcross(t *testing.T) {
	for _, which := range []byte{tmfAbortTask, tmfAbortTaskSet, tmfClearTaskSet, tmfResetUnit, tmfWarmReset, tmfNexusReset} {
		t.Run(fmt.Sprint(which), func(t *testing.T) {
			dev := newBlocking(t, make(chan struct{}))
			l := newLab(t, Options{}, dev)
			all := l.group(2, "iSCSIProtocolLevel=2")
			w := all[1].write(0)
			eventually(t, "the write runs", func() bool { return dev.in.Load() == 1 })
			if which != tmfAbortTask {
				waiting := all[1].command(0xA0, 4096, write10(8, 8)...)
				if err := all[1].send(waiting, nil); err != nil {
					t.Fatal(err)
				}
				all[1].expect(opR2T)
			}
			// The second connection has acknowledged all it got; else the function would wait.
			all[1].pingPong()
			all[1].ack()
			if response, _, _ := all[0].manage(all[0].function(which, 0, w.itt(), w.cmdSN())); response != tmrDone {
				t.Fatalf("response %d", response)
			}
			if dev.in.Load() != 0 {
				t.Error("the write still runs")
			}
			if got := all[1].pingPong(); len(got) != 0 {
				t.Errorf("opcode %#x for a task that was ended", got[0].h.opcode())
			}
			if n := l.srv.Sessions()[0].UnderWay; n != 0 {
				t.Errorf("%d commands under way", n)
			}
			close(dev.hold)
			for _, c := range all {
				c.ready()
			}
		})
	}
}

// TestAbortOfWhatHasNotCome: a command whose number was used counts as received and aborted
// (11.6.1 b): the session goes on past it, and when it comes it is ignored. So does one that is
// held.
func TestAbortOfWhatHasNotCome(t *testing.T) {
	l := newLab(t, Options{}, nil)
	all := l.group(2)
	a, b := all[0], all[1]
	missing := a.command(0xA0, 512, write10(0, 1)...)
	next := b.write(5)
	held := b.write(6)
	b.pingPong()
	if response, _, _ := b.manage(b.function(tmfAbortTask, 0, held.itt(), held.cmdSN())); response != tmrDone {
		t.Errorf("held: response %d", response)
	}
	if response, _, before := b.manage(b.function(tmfAbortTask, 0, missing.itt(), missing.cmdSN())); response != tmrDone || len(before) > 1 {
		t.Errorf("missing: response %d after %d others", response, len(before))
	} else if len(before) == 0 {
		if p := b.expect(opResponse); p.h.itt() != next.itt() {
			t.Errorf("task %d was answered", p.h.itt())
		}
	}
	if err := a.send(missing, fill(1)); err != nil {
		t.Fatal(err)
	}
	if got := a.pingPong(); len(got) != 0 {
		t.Errorf("opcode %#x for a command that was aborted before it came", got[0].h.opcode())
	}
	for lba, want := range []byte{0: 0, 5: 5, 6: 0} {
		if lba == 0 || lba >= 5 {
			if r := a.must(a.command(0xC0, 512, read10(uint32(lba), 1)...), nil, nil); r.data[3] != want {
				t.Errorf("block %d holds %d, want %d", lba, r.data[3], want)
			}
		}
	}
	// Outside of the window, and of the function's scope, there is no such task.
	for _, ref := range []uint32{a.next() - 10, a.next(), a.next() + 1000} {
		if response, _, _ := a.manage(a.function(tmfAbortTask, 0, 424242, ref)); response != tmrNoTask {
			t.Errorf("RefCmdSN %d where %d is next: response %d", ref, a.next(), response)
		}
	}
}

// TestSetFunctionWaits: a function on a task set waits for the commands before it (4.2.3.3 b); one
// on the target gives them up.
func TestSetFunctionWaits(t *testing.T) {
	for _, x := range []struct {
		which byte
		waits bool
	}{{tmfAbortTaskSet, true}, {tmfClearTaskSet, true}, {tmfResetUnit, true}, {tmfWarmReset, false}} {
		t.Run(fmt.Sprint(x.which), func(t *testing.T) {
			dev := newBlocking(t, make(chan struct{}))
			l := newLab(t, Options{}, dev)
			all := l.group(2)
			a, b := all[0], all[1]
			missing := a.command(0xA0, 512, write10(0, 1)...)
			a.ack()
			f := b.function(x.which, 0, noTag, 0)
			if err := b.send(f, nil); err != nil {
				t.Fatal(err)
			}
			if x.waits {
				if got := b.pingPong(); len(got) != 0 {
					t.Errorf("opcode %#x before the command came", got[0].h.opcode())
				}
			} else {
				b.expect(opTaskResp)
			}
			if err := a.send(missing, fill(1)); err != nil {
				t.Fatal(err)
			}
			if x.waits {
				b.expect(opTaskResp)
			}
			if got := a.pingPong(); len(got) != 0 || dev.in.Load() != 0 {
				t.Errorf("the command outlived the function")
			}
			close(dev.hold)
			a.ready()
		})
	}
}

// TestScope: a command behind a function in the order of the session is not ended by it, with one
// connection and with two, whatever the function. It is run here and not sent, so that the command
// is there when it looks.
func TestScope(t *testing.T) {
	for _, n := range []int{1, 2} {
		for _, which := range []byte{tmfAbortTaskSet, tmfClearTaskSet, tmfResetUnit, tmfWarmReset, tmfNexusReset} {
			t.Run(fmt.Sprint(n, which), func(t *testing.T) {
				dev := newBlocking(t, make(chan struct{}))
				l := newLab(t, Options{}, dev)
				var c *client
				if n == 1 {
					c = l.session("iSCSIProtocolLevel=2").ready()
				} else {
					c = l.group(2, "iSCSIProtocolLevel=2")[1]
				}
				c.write(0)
				h := c.function(which, 0, noTag, 0)
				after := c.write(1)
				eventually(t, "both writes run", func() bool { return dev.in.Load() == 2 })
				ss := l.srv.sessionOf(c.tsih)
				l.srv.mu.Lock()
				mine := ss.conns[c.cid]
				l.srv.mu.Unlock()
				f := function{conn: mine, header: *h, upTo: h.cmdSN()}
				if response, ok := f.run(); !ok || response != tmrDone {
					t.Errorf("response %d, %t", response, ok)
				}
				if in := dev.in.Load(); in != 1 {
					t.Errorf("%d writes run", in)
				}
				close(dev.hold)
				if p := c.expect(opResponse); p.h.itt() != after.itt() || p.h[3] != 0 {
					t.Errorf("task %d, status %02X", p.h.itt(), p.h[3])
				}
				if got := c.pingPong(); len(got) != 0 {
					t.Errorf("opcode %#x", got[0].h.opcode())
				}
			})
		}
	}
}

// TestScopeOnTheWire: what a function's scope is taken from.
func TestScopeOnTheWire(t *testing.T) {
	for _, x := range []struct {
		shared, immediate bool
		sn, want          uint32
	}{
		{false, true, 100, 100}, {false, true, 105, 100}, {false, true, 0, 100}, {false, false, 99, 99},
		{true, true, 100, 100}, {true, true, 105, 105}, {true, true, 116, 116}, {true, true, 117, 100}, {true, true, 50, 100}, {true, false, 99, 99},
	} {
		ss := &session{shared: x.shared}
		ss.expCmdSN.Store(100)
		ss.maxCmdSN.Store(115)
		h := new(header)
		if x.immediate {
			h[0] = 0x40
		}
		h.put32(24, x.sn)
		if got := (&conn{session: ss}).scope(h); got != x.want {
			t.Errorf("%+v: %d", x, got)
		}
	}
}

// TestResponseComesLast aborts writes that are about to end by themselves. Either the abort wins,
// and the write is never answered, or the write does, and its answer comes first.
func TestResponseComesLast(t *testing.T) {
	for _, n := range []int{1, 2} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			l := newLab(t, Options{}, newBlocking(t, nil))
			var c, o *client
			if n == 1 {
				c = l.session().ready()
				o = c
			} else {
				all := l.group(2)
				c, o = all[0], all[1]
			}
			won := 0
			for i := range 1000 {
				w := o.write(uint32(i))
				if i%3 == 0 {
					runtime.Gosched()
				}
				which := byte(tmfAbortTask)
				if n == 2 {
					which = tmfAbortTaskSet // of which the fence is a part
				}
				if n == 1 {
					response, _, before := c.manage(c.function(which, 0, w.itt(), w.cmdSN()))
					if after := c.pingPong(); len(after) > 0 {
						t.Fatalf("round %d: opcode %#x after response %d", i, after[0].h.opcode(), response)
					}
					if response == tmrDone {
						won++
					}
					if (response == tmrDone) != (len(before) == 0) {
						t.Fatalf("round %d: response %d after %d answers", i, response, len(before))
					}
					continue
				}
				// Over two connections, the answer must be acknowledged before the response.
				type reply struct {
					answered bool
					err      error
				}
				replies := make(chan reply, 1)
				stop := make(chan struct{})
				go func() {
					var r reply
					for {
						p, err := o.recv()
						if err != nil {
							r.err = err
							break
						}
						if p.h.opcode() == opNopIn && p.h.itt() == noTag {
							o.pong(p)
							continue
						}
						if p.h.opcode() == opNopIn {
							break
						}
						select {
						case <-stop:
							r.err = fmt.Errorf("opcode %#x after the response", p.h.opcode())
						default:
							r.answered = true
						}
					}
					replies <- r
				}()
				c.manage(c.function(which, 0, w.itt(), w.cmdSN()))
				close(stop)
				ping := c.immediate(opNopOut, 0, 1)
				ping.put32(20, noTag)
				o.send(ping, nil)
				r := <-replies
				if r.err != nil {
					t.Fatalf("round %d: %v", i, r.err)
				}
				if !r.answered {
					won++
				}
			}
			t.Logf("the function won %d of 1000", won)
		})
	}
}

// TestSettle: a write that has ended and whose answer is not queued yet is answered before the
// function that finds it gone.
func TestSettle(t *testing.T) {
	dev := newBlocking(t, make(chan struct{}))
	l := newLab(t, Options{}, dev)
	c := l.session().ready()
	w := c.write(0)
	eventually(t, "the write runs", func() bool { return dev.in.Load() == 1 })
	ss := l.srv.sessionOf(c.tsih)
	l.srv.mu.Lock()
	mine := ss.conns[c.cid]
	l.srv.mu.Unlock()
	mine.mu.Lock() // between its end and its answer, the write wants this
	close(dev.hold)
	eventually(t, "the write has ended", func() bool { return !ss.nexus.HasTask(0, func(uint64) bool { return true }) })
	if err := c.send(c.function(tmfAbortTask, 0, w.itt(), 0), nil); err != nil {
		t.Fatal(err)
	}
	early := c.pingPong()
	mine.mu.Unlock()
	if len(early) != 0 {
		t.Fatalf("opcode %#x before the answer", early[0].h.opcode())
	}
	if p := c.expect(opResponse); p.h.itt() != w.itt() {
		t.Errorf("task %d", p.h.itt())
	}
	if p := c.expect(opTaskResp); p.h[2] != tmrNoTask {
		t.Errorf("response %d", p.h[2])
	}
}

// TestFence: the response of a function on many tasks waits until what other connections sent has
// been acknowledged (4.2.2.3).
func TestFence(t *testing.T) {
	l := newLab(t, Options{}, nil)
	all := l.group(2)
	a, b := all[0], all[1]
	b.quiet = true
	b.ready()
	if err := a.send(a.function(tmfAbortTaskSet, 0, noTag, 0), nil); err != nil {
		t.Fatal(err)
	}
	p := b.expect(opNopIn)
	if p.h.itt() != noTag || p.h.ttt() == noTag {
		t.Fatalf("no ping: %x", p.h)
	}
	if got := a.pingPong(); len(got) != 0 {
		t.Errorf("opcode %#x before the acknowledgement", got[0].h.opcode())
	}
	b.quiet = false
	b.pong(p)
	a.expect(opTaskResp)
}

// TestQueries: the functions of RFC 7144, where its level was agreed on, and where not.
func TestQueries(t *testing.T) {
	dev := newBlocking(t, make(chan struct{}))
	l := newLab(t, Options{}, dev)
	c := l.session("iSCSIProtocolLevel=2").ready()
	ask := func(which, lun byte, itt uint32, want byte, info [3]byte) {
		t.Helper()
		if got, additional, _ := c.manage(c.function(which, lun, itt, 0)); got != want || additional != info {
			t.Errorf("function %d: response %d, %x, want %d, %x", which, got, additional, want, info)
		}
	}
	none := [3]byte{}
	ask(tmfQueryTaskSet, 0, 0, tmrDone, none)
	w := c.write(0)
	eventually(t, "the write runs", func() bool { return dev.in.Load() == 1 })
	ask(tmfQueryTask, 0, w.itt(), tmrSucceeded, none)
	ask(tmfQueryTask, 0, w.itt()+1, tmrDone, none)
	ask(tmfQueryTask, 5, w.itt(), tmrNoLUN, none)
	ask(tmfQueryTaskSet, 0, 0, tmrSucceeded, none)
	ask(tmfQueryEvent, 0, 0, tmrDone, none)
	l.target.Changed(0)
	ask(tmfQueryEvent, 0, 0, tmrSucceeded, [3]byte{0x16, 0x2A, 0x09})
	ask(tmfNexusReset, 0, 0, tmrDone, none)
	if dev.in.Load() != 0 {
		t.Error("the write outlives the nexus reset")
	}
	ask(tmfQueryEvent, 0, 0, tmrSucceeded, [3]byte{0x26, 0x2A, 0x09})
	var codes []uint16
	for range 2 {
		r, err := c.do(c.command(0x80, 0, 0, 0, 0, 0, 0, 0), nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		codes = append(codes, r.asc)
	}
	if codes[0] != 0x2A09 || codes[1] != 0x2907 {
		t.Errorf("attentions %04X, want 2A09 and 2907", codes)
	}
	c.ready()

	c = l.dial()
	c.isid = 2
	if c.login() != 0 {
		t.Fatal("login")
	}
	for which := byte(tmfQueryTask); which <= tmfQueryEvent; which++ {
		ask(which, 0, 0, tmrUnsupported, none)
	}
	ask(tmfClearACA, 0, 0, tmrUnsupported, none)
	ask(tmfReassign, 0, 0, tmrNoReassign, none)
}

// TestResetTells: a reset ends the tasks of others, who learn of it by a unit attention and by
// nothing else.
func TestResetTells(t *testing.T) {
	for _, which := range []byte{tmfResetUnit, tmfWarmReset} {
		dev := newBlocking(t, make(chan struct{}))
		l := newLab(t, Options{}, dev)
		c := l.session().ready()
		o := l.dial()
		o.isid = 2
		if o.login() != 0 {
			t.Fatal("login")
		}
		o.ready().write(0)
		eventually(t, "the write runs", func() bool { return dev.in.Load() == 1 })
		if response, _, _ := c.manage(c.function(which, 0, noTag, 0)); response != tmrDone || dev.in.Load() != 0 {
			t.Errorf("function %d: response %d, %d writes run", which, response, dev.in.Load())
		}
		for _, x := range []*client{c, o} {
			if r, err := x.do(x.command(0x80, 0, 0, 0, 0, 0, 0, 0), nil, nil); err != nil || r.key != 6 || r.asc != 0x2903 {
				t.Errorf("function %d: %+v %v", which, r, err)
			}
			x.ready()
		}
	}
}

// TestColdReset ends every session with the target, after its response, and no other target's.
func TestColdReset(t *testing.T) {
	l := newLab(t, Options{}, nil)
	other := scsi.NewTarget("iqn.2026-11.io.ledge:other", scsi.Options{})
	var d target.Device = newBlocking(t, nil)
	if err := other.Attach(0, d, scsi.UnitOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := l.srv.AddTarget(other); err != nil {
		t.Fatal(err)
	}
	all := l.group(2)
	o, x := l.dial(), l.dial()
	o.isid, x.isid = 2, 3
	if o.login() != 0 || x.login("TargetName=iqn.2026-11.io.ledge:other") != 0 {
		t.Fatal("login")
	}
	o.ready()
	all[1].ack()
	if response, _, _ := all[0].manage(all[0].function(tmfColdReset, 0, noTag, 0)); response != tmrDone {
		t.Errorf("response %d", response)
	}
	for _, c := range append(all, o) {
		c.closed()
	}
	x.ready()
	eventually(t, "one session is left", func() bool { return l.srv.Stats().Sessions == 1 })
	l.alive()
}

// TestFunctionOfTheGone: a function that waits for a command, or for an acknowledgement, ends with
// its connection.
func TestFunctionOfTheGone(t *testing.T) {
	l := newLab(t, Options{OrderTimeout: time.Hour}, nil)
	all := l.group(3)
	all[0].number()
	if err := all[1].send(all[1].function(tmfAbortTaskSet, 0, noTag, 0), nil); err != nil {
		t.Fatal(err)
	}
	all[1].pingPong()
	if err := all[2].send(all[2].logout(1, 1), nil); err != nil {
		t.Fatal(err)
	}
	if p := all[2].expect(opLogoutResp); p.h[2] != 0 {
		t.Errorf("response %d", p.h[2])
	}
	all[1].closed()
	all[0].nc.Close()
	all[2].closed()
	l.over()
}
