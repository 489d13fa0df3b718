package iscsi

import (
	"bytes"
	"testing"
)

// server is the target's side of a client's connection.
func (l *lab) server(c *client) *conn {
	ss := l.srv.sessionOf(c.tsih)
	l.srv.mu.Lock()
	defer l.srv.mu.Unlock()
	return ss.conns[c.cid]
}

// TestDuplicateOfHeld: a number that is held and due is not taken by a copy that another
// connection brings before the held one is served.
func TestDuplicateOfHeld(t *testing.T) {
	l := newLab(t, Options{}, nil)
	all := l.group(2)
	a, b := all[0], all[1]
	hole := a.command(0x80, 0, 0, 0, 0, 0, 0, 0)
	held := b.command(0x80, 0, 0, 0, 0, 0, 0, 0)
	if err := b.send(held, nil); err != nil {
		t.Fatal(err)
	}
	b.pingPong()
	turn := &l.server(b).turn
	turn.Lock() // nobody serves it for now
	a.must(hole, nil, nil)
	again := *held
	again.put32(16, 4242)
	if err := a.send(&again, nil); err != nil {
		t.Fatal(err)
	}
	got := a.pingPong()
	turn.Unlock()
	if len(got) != 0 {
		t.Errorf("opcode %#x for a number that is another's", got[0].h.opcode())
	}
	if p := b.expect(opResponse); p.h.itt() != held.itt() || p.h[3] != 0 {
		t.Errorf("task %d, status %02X", p.h.itt(), p.h[3])
	}
}

// TestBufferedWhenEnded: a command that was read, and not served when its connection was ended by
// its session, is never carried out.
func TestBufferedWhenEnded(t *testing.T) {
	l := newLab(t, Options{}, nil)
	all := l.group(2)
	a, b := all[0], all[1]
	of := l.server(b)
	before := of.heard.Load()
	of.turn.Lock()
	w := b.write(7)
	eventually(t, "the write has been read", func() bool { return of.heard.Load() != before })
	of.end()
	of.turn.Unlock()
	<-of.done
	plug := a.immediate(opCommand, 0, 4242) // its number was not used up
	plug[0] &^= 0x40
	plug.put32(24, w.cmdSN())
	a.must(plug, nil, nil)
	if r := a.must(a.command(0xC0, 512, read10(7, 1)...), nil, nil); !bytes.Equal(r.data, make([]byte, 512)) {
		t.Error("the write was carried out")
	}
}
