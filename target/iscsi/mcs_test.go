package iscsi

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/scsi"
)

// group logs in a session of n connections, whose units are ready.
func (l *lab) group(n int, keys ...string) []*client {
	l.t.Helper()
	c := l.session(append([]string{"MaxConnections=16"}, keys...)...)
	c.numbers = new(atomic.Uint32)
	c.numbers.Store(c.cmdSN)
	all := []*client{c.ready()}
	for len(all) < n {
		all = append(all, l.join(c, uint16(len(all)), keys...))
	}
	return all
}

// join adds a connection to a session; its digests are negotiated anew.
func (l *lab) join(lead *client, cid uint16, keys ...string) *client {
	l.t.Helper()
	c := l.joiner(lead, cid)
	if status := c.login(keys...); status != 0 {
		l.t.Fatalf("connection %d: status %04X", cid, status)
	}
	return c
}

func (l *lab) joiner(lead *client, cid uint16) *client {
	c := l.dial()
	c.isid, c.tsih, c.cid, c.numbers, c.itt = lead.isid, lead.tsih, cid, lead.numbers, uint32(cid)<<16
	return c
}

func (l *lab) over() {
	l.t.Helper()
	eventually(l.t.(*testing.T), "the session is over", func() bool {
		st := l.srv.Stats()
		return st.Sessions == 0 && st.Connections == 0 && st.Memory == 0
	})
}

// closed checks that the target closes the connection, and returns what came before.
func (c *client) closed() (before []*pdu) {
	c.t.Helper()
	before, _ = c.closedBy()
	return before
}

// closedBy is closed that returns the error as well.
func (c *client) closedBy() (before []*pdu, err error) {
	c.t.Helper()
	for {
		p, err := c.recv()
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) && !isReset(err) {
				c.t.Errorf("the connection stays: %v", err)
			}
			return before, err
		}
		before = append(before, p)
	}
}

func isReset(err error) bool {
	var timeout interface{ Timeout() bool }
	return !errors.As(err, &timeout) || !timeout.Timeout()
}

// TestJoin: which connections a session takes.
func TestJoin(t *testing.T) {
	l := newLab(t, Options{SessionConnections: 3}, nil)
	lead := l.group(2)[0]
	for _, x := range []struct {
		name   string
		change func(c *client)
		keys   []string
		status uint16
	}{
		{"a TSIH of nobody", func(c *client) { c.tsih += 7 }, nil, 0x020A},
		{"another ISID", func(c *client) { c.isid++ }, nil, 0x020A},
		{"another initiator", nil, []string{"InitiatorName=" + testInitiator + "2"}, 0x020A},
		{"another target", nil, []string{"TargetName=" + testTarget + "2"}, 0x020A},
		{"another session type", nil, []string{"SessionType=Discovery"}, 0x020A},
	} {
		c := l.joiner(lead, 2)
		if x.change != nil {
			x.change(c)
		}
		if got := c.login(x.keys...); got != x.status {
			t.Errorf("%s: status %04X, want %04X", x.name, got, x.status)
		}
	}
	l.join(lead, 2)
	if got := l.joiner(lead, 3).login(); got != 0x0206 {
		t.Errorf("one too many: status %04X", got)
	}
	if s := l.srv.Sessions(); len(s) != 1 || len(s[0].Peers) != 3 {
		t.Errorf("sessions %+v", s)
	}
	lead.ready()
	single := l.dial()
	single.isid = 9
	if single.login() != 0 {
		t.Fatal("login")
	}
	if got := l.joiner(single, 1).login(); got != 0x0206 {
		t.Errorf("a second connection that was not agreed on: status %04X", got)
	}
	single.ready()
}

// TestJoinAuthenticates: a further connection proves itself as the first does, and one that
// cannot leaves the session, and the connection whose CID it names, alone.
func TestJoinAuthenticates(t *testing.T) {
	var secret atomic.Pointer[CHAP]
	l := newLab(t, Options{Auth: func(string, string) *CHAP { return secret.Load() }}, nil)
	both := l.group(2)
	secret.Store(&CHAP{User: "host", Secret: "correct horse"})
	for _, cid := range []uint16{1, 2} {
		if got := l.joiner(both[0], cid).login(); got != 0x0201 {
			t.Errorf("CID %d without authentication: status %04X", cid, got)
		}
	}
	for _, c := range both {
		c.ready()
	}
}

// TestLeadingKeys: what the leading connection agreed on holds for all; its own digests and
// segment length each connection agrees on.
func TestLeadingKeys(t *testing.T) {
	l := newLab(t, Options{}, nil)
	lead := l.group(1, "InitialR2T=No", "MaxBurstLength=65536")[0]
	c := l.joiner(lead, 1)
	if err := c.send(c.loginHeader(0x87), []byte("InitiatorName="+testInitiator+"\x00TargetName="+testTarget+"\x00"+
		"MaxConnections=9\x00InitialR2T=Yes\x00ErrorRecoveryLevel=2\x00MaxRecvDataSegmentLength=4096\x00HeaderDigest=None\x00")); err != nil {
		t.Fatal(err)
	}
	p := c.expect(opLoginResp)
	got := make(map[string]string)
	pairs, _ := parseText(p.data)
	for _, kv := range pairs {
		got[kv.key] = kv.value
	}
	for k, want := range map[string]string{"MaxConnections": "Reject", "InitialR2T": "Reject", "ErrorRecoveryLevel": "Reject", "HeaderDigest": "None", "TargetPortalGroupTag": "1"} {
		if got[k] != want {
			t.Errorf("%s=%q, want %q", k, got[k], want)
		}
	}
	if p.h[36] != 0 || p.h[37] != 0 {
		t.Fatalf("status %x", p.h[36:38])
	}
	// InitialR2T=No still holds, here too.
	h := c.command(0x20, 1024, write10(0, 2)...)
	d := dataOut(h, noTag, 0, 0)
	if err := c.send(h, nil); err != nil {
		t.Fatal(err)
	}
	if err := c.send(d, make([]byte, 1024)); err != nil {
		t.Fatal(err)
	}
	if p := c.expect(opResponse); p.h[3] != 0 {
		t.Errorf("status %02X", p.h[3])
	}
	// And so does the segment length of this connection alone.
	for _, x := range []struct {
		c *client
		n int
	}{{c, 4096}, {lead, 8192}} {
		r := x.c.command(0xC0, 16384, read10(0, 32)...)
		if err := x.c.send(r, nil); err != nil {
			t.Fatal(err)
		}
		for at := 0; at < 16384; at += x.n {
			if p := x.c.expect(opDataIn); len(p.data) != x.n {
				t.Fatalf("a segment of %d bytes, not %d", len(p.data), x.n)
			}
		}
	}
}

func dataOut(h *header, ttt, sn, offset uint32) *header {
	d := new(header)
	d[0], d[1] = opDataOut, 0x80
	d.put32(16, h.itt())
	d.put32(20, ttt)
	d.put32(36, sn)
	d.put32(40, offset)
	return d
}

// TestHole: a command that comes before its turn waits, and what is behind it on its connection
// and needs no turn does not. Its data, digests and all, are kept. Both orders of connections.
func TestHole(t *testing.T) {
	for _, keys := range [][]string{{"InitialR2T=No"}, {"InitialR2T=No", "HeaderDigest=CRC32C", "DataDigest=CRC32C"}} {
		for _, first := range []int{0, 1} {
			for name, dev := range map[string]target.Device{"inline": nil, "in workers": newBlocking(t, nil)} {
				t.Run(fmt.Sprint(keys, first, name), func(t *testing.T) {
					l := newLab(t, Options{}, dev)
					both := l.group(2, keys...)
					a, b := both[first], both[1-first]
					one, two := bytes.Repeat([]byte{1}, 1024), bytes.Repeat([]byte{2}, 1024)
					w1 := a.command(0xA0, 1024, write10(0, 2)...)
					w2 := b.command(0x20, 1024, write10(0, 2)...)
					w1[1] |= byte(scsi.Ordered) // so that the order of delivery shows in the data
					w2[1] = w2[1]&^7 | byte(scsi.Ordered)
					w1[1] = w1[1]&^7 | byte(scsi.Ordered)
					if err := b.send(w2, two[:512]); err != nil {
						t.Fatal(err)
					}
					if err := b.send(dataOut(w2, noTag, 0, 512), two[512:]); err != nil {
						t.Fatal(err)
					}
					if early := b.pingPong(); len(early) != 0 {
						t.Fatalf("opcode %#x came before its turn", early[0].h.opcode())
					}
					if err := a.send(w1, one); err != nil {
						t.Fatal(err)
					}
					for _, c := range []*client{a, b} {
						if p := c.expect(opResponse); p.h[3] != 0 {
							t.Fatalf("status %02X, sense %x", p.h[3], p.data)
						}
					}
					if r := a.must(a.command(0xC0, 1024, read10(0, 2)...), nil, nil); !bytes.Equal(r.data, two) {
						t.Errorf("the later command was delivered first")
					}
					if m := l.srv.Stats().Memory; m != 0 {
						t.Errorf("%d bytes are still counted", m)
					}
				})
			}
		}
	}
}

// TestHoleStays: a session whose missing command does not come ends, and all of it.
func TestHoleStays(t *testing.T) {
	l := newLab(t, Options{OrderTimeout: 100 * time.Millisecond}, nil)
	both := l.group(2)
	both[0].number()
	if err := both[1].send(both[1].command(0xA0, 512, write10(0, 1)...), make([]byte, 512)); err != nil {
		t.Fatal(err)
	}
	for _, c := range both {
		for _, p := range c.closed() {
			if p.h.opcode() == opResponse {
				t.Error("the command was answered")
			}
		}
	}
	l.over()
}

// TestWindowAcross: commands beyond the window, and numbers that came already, are ignored on
// every connection.
func TestWindowAcross(t *testing.T) {
	l := newLab(t, Options{Window: 8}, nil)
	both := l.group(2)
	c := both[1]
	sn := c.numbers.Load()
	for _, bad := range []uint32{sn + 8, sn - 1, sn + 1<<31} {
		h := c.immediate(opCommand, 0, 99)
		h[0] &^= 0x40
		h.put32(24, bad)
		if err := c.send(h, nil); err != nil {
			t.Fatal(err)
		}
	}
	early := c.immediate(opCommand, 0, 100) // the last of the window, twice
	early[0] &^= 0x40
	early.put32(24, sn+7)
	for range 2 {
		if err := c.send(early, nil); err != nil {
			t.Fatal(err)
		}
	}
	if got := c.pingPong(); len(got) != 0 {
		t.Fatalf("opcode %#x", got[0].h.opcode())
	}
	for range 7 {
		both[0].must(both[0].command(0x80, 0, 0, 0, 0, 0, 0, 0), nil, nil)
	}
	if p := c.expect(opResponse); p.h.itt() != 100 {
		t.Errorf("task %d was answered", p.h.itt())
	}
	if got := c.pingPong(); len(got) != 0 {
		t.Errorf("opcode %#x: the same command twice", got[0].h.opcode())
	}
	if n := l.srv.Sessions()[0].UnderWay; n != 0 {
		t.Errorf("%d commands under way", n)
	}
}

// TestLinearizableAcross runs random operations on a few blocks over the connections of one
// session, each of which takes its number first and is sent later, so that numbers come in any
// order; some order must explain all answers.
func TestLinearizableAcross(t *testing.T) {
	for _, n := range []int{2, 4} {
		for name, dev := range map[string]target.Device{"inline": nil, "in workers": newBlocking(t, nil)} {
			t.Run(fmt.Sprint(n, name), func(t *testing.T) {
				const seed, each, blocks = 11, 300, 3
				l := newLab(t, Options{}, dev)
				var (
					mu      sync.Mutex
					history []porcupine.Operation
					wg      sync.WaitGroup
					start   = time.Now()
				)
				for id, c := range l.group(n) {
					wg.Add(1)
					go func() {
						defer wg.Done()
						r := rand.New(rand.NewPCG(seed, uint64(id)))
						for range each {
							in := blockOp{kind: "rwc"[r.IntN(3)], lba: uint32(r.IntN(blocks)), old: uint32(r.IntN(4)), new: uint32(r.IntN(4))}
							call := time.Since(start)
							out, err := c.block(in)
							back := time.Since(start)
							if err != nil {
								t.Errorf("connection %d, %c: %v", id, in.kind, err)
								return
							}
							mu.Lock()
							history = append(history, porcupine.Operation{ClientId: id, Input: in, Call: call.Nanoseconds(), Output: out, Return: back.Nanoseconds()})
							mu.Unlock()
							if r.IntN(8) == 0 {
								runtime.Gosched()
							}
						}
					}()
				}
				wg.Wait()
				if !porcupine.CheckOperations(device, history) {
					t.Errorf("seed %d: no order explains the %d answers", seed, len(history))
				}
			})
		}
	}
}

// recorded notes in which order blocks are written, and whether it is called from readers.
type recorded struct {
	target.Device
	inline bool
	mu     sync.Mutex
	values []uint32
}

func (r *recorded) NeverBlocks() bool { return r.inline }

func (r *recorded) Write(ctx context.Context, lba uint64, src [][]byte, fua bool) error {
	r.mu.Lock()
	r.values = append(r.values, binary.BigEndian.Uint32(src[0]))
	r.mu.Unlock()
	return r.Device.Write(ctx, lba, src, fua)
}

// TestDeliveryOrder sends windows of ordered writes over four connections, each connection's in
// order, the connections in a random one. The device must see their numbers in order.
func TestDeliveryOrder(t *testing.T) {
	const seed, rounds, each = 3, 20, 100
	r := rand.New(rand.NewPCG(seed, 1))
	for _, inline := range []bool{false, true} {
		t.Run(fmt.Sprint(inline), func(t *testing.T) {
			dev := &recorded{Device: newBlocking(t, nil), inline: inline}
			l := newLab(t, Options{}, dev)
			all := l.group(4)
			for range rounds {
				queues := make([][]*header, len(all))
				for range each {
					i := r.IntN(len(all))
					h := all[i].command(0xA0, 512, write10(0, 1)...)
					h[1] = 0xA0 | byte(scsi.Ordered)
					queues[i] = append(queues[i], h)
				}
				var done sync.WaitGroup
				for i, c := range all {
					pause := r.IntN(3)
					done.Add(1)
					go func() {
						defer done.Done()
						for n, h := range queues[i] {
							if pause > 0 && n%(3*pause) == 0 {
								runtime.Gosched()
							}
							if err := c.send(h, fill(h.cmdSN())); err != nil {
								t.Error(err)
								return
							}
						}
						for range queues[i] {
							if p, err := c.recv(); err != nil || p.h.opcode() != opResponse || p.h[3] != 0 {
								t.Errorf("%+v %v", p, err)
								return
							}
						}
					}()
				}
				done.Wait()
			}
			dev.mu.Lock()
			defer dev.mu.Unlock()
			if len(dev.values) != rounds*each {
				t.Fatalf("%d writes, not %d", len(dev.values), rounds*each)
			}
			for i, v := range dev.values {
				if v != dev.values[0]+uint32(i) {
					t.Fatalf("seed %d: number %d comes after %d", seed, v, dev.values[i-1])
				}
			}
		})
	}
}

// TestConnectionReinstatement: a login with the CID of a connection replaces it. Its tasks are
// over when the login is answered, the session goes on and learns of them, and the other
// connection notices nothing else. With one connection, too.
func TestConnectionReinstatement(t *testing.T) {
	for _, n := range []int{1, 2} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			dev := newBlocking(t, make(chan struct{}))
			l := newLab(t, Options{}, dev)
			all := l.group(n)
			old := all[n-1]
			if err := old.send(old.command(0xA0, 512, write10(0, 1)...), make([]byte, 512)); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the write runs", func() bool { return dev.in.Load() == 1 })
			c := l.join(old, old.cid)
			if dev.in.Load() != 0 {
				t.Error("the old connection's write still runs")
			}
			if c.tsih != old.tsih || len(l.srv.Sessions()) != 1 {
				t.Error("it is another session")
			}
			if got := old.closed(); len(got) != 0 {
				t.Errorf("opcode %#x on the old connection", got[0].h.opcode())
			}
			r, err := all[0].do, error(nil)
			if n == 1 {
				r = c.do
			}
			who := all[0]
			if n == 1 {
				who = c
			}
			res, err := r(who.command(0x80, 0, 0, 0, 0, 0, 0, 0), nil, nil)
			if err != nil || res.key != 6 || res.asc != 0x477F {
				t.Errorf("%+v %v, want SOME COMMANDS CLEARED BY ISCSI PROTOCOL EVENT", res, err)
			}
			c.ready()
			who.ready()
		})
	}
}

// TestHeldCommandsOfTheGone: commands that a connection had ahead of their turn end with it, and
// those of the others do not wait for them.
func TestHeldCommandsOfTheGone(t *testing.T) {
	l := newLab(t, Options{}, nil)
	both := l.group(2)
	a, b := both[0], both[1]
	hole := a.command(0x80, 0, 0, 0, 0, 0, 0, 0)
	if err := b.send(b.command(0xA0, 512, write10(0, 1)...), fill(1)); err != nil {
		t.Fatal(err)
	}
	b.pingPong() // it is held
	c := l.join(b, b.cid)
	a.must(hole, nil, nil)
	if r := c.must(c.command(0xC0, 512, read10(0, 1)...), nil, nil); !bytes.Equal(r.data, make([]byte, 512)) {
		t.Error("the command of the connection that is gone was carried out")
	}
}

func (c *client) logout(reason byte, cid uint16) *header {
	h := c.immediate(opLogoutReq, reason, 600)
	h.put16(20, cid)
	return h
}

// TestLogout ends sessions and connections by request, while writes are held by the device.
func TestLogout(t *testing.T) {
	for _, x := range []struct {
		name     string
		reason   byte
		cid      uint16
		response byte
		gone     []bool // by connection; the request comes on the first
	}{
		{"the session", 0, 0, 0, []bool{true, true, true}},
		{"this connection", 1, 0, 0, []bool{true, false, false}},
		{"another connection", 1, 2, 0, []bool{false, false, true}},
		{"a connection of nobody", 1, 9, 1, []bool{false, false, false}},
		{"for recovery", 2, 1, 2, []bool{false, false, false}},
	} {
		t.Run(x.name, func(t *testing.T) {
			dev := newBlocking(t, make(chan struct{}))
			dev.late = 50 * time.Millisecond
			l := newLab(t, Options{}, dev)
			all := l.group(3)
			for i, c := range all {
				if err := c.send(c.command(0xA0, 512, write10(uint32(i), 1)...), fill(1)); err != nil {
					t.Fatal(err)
				}
			}
			eventually(t, "three writes run", func() bool { return dev.in.Load() == 3 })
			if err := all[0].send(all[0].logout(x.reason, x.cid), nil); err != nil {
				t.Fatal(err)
			}
			if p := all[0].expect(opLogoutResp); p.h[2] != x.response {
				t.Errorf("response %d, want %d", p.h[2], x.response)
			}
			left := int32(0)
			for _, gone := range x.gone {
				if !gone {
					left++
				}
			}
			if n := dev.in.Load(); n != left {
				t.Errorf("%d writes run when the logout is answered, want %d", n, left)
			}
			close(dev.hold)
			for i, c := range all {
				if x.gone[i] {
					if got := c.closed(); len(got) != 0 {
						t.Errorf("connection %d: opcode %#x", i, got[0].h.opcode())
					}
				} else if p := c.expect(opResponse); p.h[3] != 0 {
					t.Errorf("connection %d: status %02X", i, p.h[3])
				}
			}
			if left == 0 {
				l.over()
			}
		})
	}
	t.Run("for no reason", func(t *testing.T) {
		l := newLab(t, Options{}, nil)
		c := l.session().ready()
		if err := c.send(c.logout(5, 0), nil); err != nil {
			t.Fatal(err)
		}
		if p := c.expect(opReject); p.h[2] != rejectBadField {
			t.Errorf("reason %d", p.h[2])
		}
		c.ready()
	})
}

// TestLogoutsCross: connections that log each other out at once all come to an end.
func TestLogoutsCross(t *testing.T) {
	l := newLab(t, Options{}, newBlocking(t, nil))
	for round := range 50 {
		all := l.group(3)
		for i, c := range all {
			if err := c.send(c.logout(byte(1-round%2), uint16(i+1)%3), nil); err != nil && round%2 == 0 {
				break // it was quick
			}
		}
		for _, c := range all {
			c.nc.(interface{ CloseWrite() error }).CloseWrite()
			c.closed()
		}
		l.over()
	}
}

// TestConnectionCut cuts one of four loaded connections: the session ends (error recovery level
// 0), the others are told, nothing runs any more and nothing is left.
func TestConnectionCut(t *testing.T) {
	for name, hold := range map[string]chan struct{}{"while the device holds": make(chan struct{}), "under load": nil} {
		t.Run(name, func(t *testing.T) {
			dev := newBlocking(t, hold)
			l := newLab(t, Options{}, dev)
			all := l.group(4)
			for i := range 100 {
				c := all[i%4]
				if err := c.send(c.command(0xA0, 4096, write10(uint32(i*8), 8)...), make([]byte, 4096)); err != nil {
					t.Fatal(err)
				}
			}
			if hold != nil {
				eventually(t, "100 writes run", func() bool { return dev.in.Load() == 100 })
			}
			all[2].nc.Close()
			for i, c := range all {
				if i == 2 {
					continue
				}
				got, err := c.closedBy()
				// The answers of its last commands may come after it.
				told := slices.ContainsFunc(got, func(p *pdu) bool {
					return p.h.opcode() == opAsync && p.h[36] == asyncDropAll && p.h.u16(40) == 2
				})
				// Where the target closes on commands that it has not read, TCP resets the connection,
				// and what waits there for a window is lost.
				if !told && (hold != nil || !errors.Is(err, syscall.ECONNRESET)) {
					t.Errorf("connection %d was not told: %d PDUs, %v", i, len(got), err)
				}
			}
			l.over()
			if n := dev.in.Load(); n != 0 {
				t.Errorf("%d writes run", n)
			}
			l.alive()
		})
	}
}
