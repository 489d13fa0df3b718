package shelf

import (
	enc "encoding/binary"
	"fmt"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/host/initiator/iscsi"
)

const (
	statusGood     = 0x00
	statusConflict = 0x18

	allPorts = 0x04 // ALL_TG_PT: a registration counts on both controllers' ports
)

// port is an initiator port of the test: the same ISID on both controllers, as RFC 7143 10.1.1 asks, so that a
// registration for all target ports is its own on both.
type port struct {
	r    *rig
	name string
	isid [6]byte
	s    map[string]*iscsi.Session
}

func (r *rig) port(name string, id byte) *port {
	return &port{r: r, name: "iqn.2026-11.io.ledge:" + name, isid: [6]byte{0x80, id}, s: map[string]*iscsi.Session{}}
}

// do sends a command through controller c, past unit attentions and not-ready answers, and returns its status.
func (p *port) do(c string, out, in []byte, cdb ...byte) byte {
	p.r.Helper()
	for p.r.ctx.Err() == nil {
		if p.s[c] == nil {
			s, err := iscsi.Dial(p.r.ctx, iscsi.Config{Portal: p.r.Portals[c], Target: target, InitiatorName: p.name, ISID: p.isid})
			if err != nil {
				time.Sleep(50 * time.Millisecond)
				continue
			}
			p.s[c] = s
			p.r.Cleanup(func() { s.Close() })
		}
		cmd := &iscsi.Command{LUN: 1, Out: out, In: in}
		copy(cmd.CDB[:], cdb)
		if err := p.s[c].Do(p.r.ctx, cmd); err != nil {
			p.s[c] = nil
			continue
		}
		if cmd.Status == 2 && len(cmd.Sense) > 2 && (cmd.Sense[2]&0xF == 6 || cmd.Sense[2]&0xF == 2) {
			time.Sleep(10 * time.Millisecond)
			continue
		}
		if cmd.Status == 2 {
			p.r.Logf("%s through %s: sense %x", p.name, c, cmd.Sense)
		}
		return cmd.Status
	}
	p.r.Errorf("%s through %s: %v", p.name, c, p.r.ctx.Err()) // not Fatal: this may be another goroutine
	return 0xFF
}

func (p *port) out(c string, action, kind byte, key, serviceKey uint64, flags byte) byte {
	p.r.Helper()
	list := make([]byte, 24)
	enc.BigEndian.PutUint64(list, key)
	enc.BigEndian.PutUint64(list[8:], serviceKey)
	list[20] = flags
	return p.do(c, list, nil, 0x5F, action, kind, 0, 0, 0, 0, 0, 24, 0)
}

func (p *port) write(c string) byte {
	p.r.Helper()
	return p.do(c, make([]byte, 4096), nil, 0x2A, 0, 0, 0, 0, 0, 0, 0, 1, 0)
}

func (p *port) want(what string, got, want byte) {
	p.r.Helper()
	if got != want {
		p.r.Fatalf("%s: %s: status %02x, want %02x", what, p.name, got, want)
	}
}

// keys is what PERSISTENT RESERVE IN says through c: generation, keys, and the holder's.
func (p *port) keys(c string) string {
	p.r.Helper()
	keys, held := make([]byte, 64), make([]byte, 24)
	p.want("READ KEYS", p.do(c, nil, keys, 0x5E, 0, 0, 0, 0, 0, 0, 0, 64, 0), statusGood)
	p.want("READ RESERVATION", p.do(c, nil, held, 0x5E, 1, 0, 0, 0, 0, 0, 0, 24, 0), statusGood)
	n := enc.BigEndian.Uint32(keys[4:])
	return fmt.Sprintf("%x %x", keys[:8+n], held)
}

// TestReservations: whoever fenced another by a persistent reservation has it fenced through a takeover after the
// owner's death, on the controller that took over, from its first command on, and through a restart of the
// whole shelf; without APTPL, as clusters ask.
func TestReservations(t *testing.T) {
	r := start(t)
	holder, other := r.port("holder", 1), r.port("other", 2)
	holder.want("REGISTER", holder.out("A", 0, 0, 0, 0x11, allPorts), statusGood)
	other.want("REGISTER", other.out("A", 0, 0, 0, 0x22, allPorts), statusGood)
	holder.want("RESERVE", holder.out("A", 1, 5, 0x11, 0, 0), statusGood)
	other.want("a registrant's WRITE", other.write("A"), statusGood)
	holder.want("PREEMPT", holder.out("A", 4, 5, 0x11, 0x22, 0), statusGood)
	other.want("a fenced one's WRITE", other.write("A"), statusConflict)
	// A multipath initiator, as Linux has it: an ISID for each session, a registration on each path, one in standby.
	mpathA, mpathB := r.port("multipath", 3), r.port("multipath", 4)
	mpathA.want("REGISTER", mpathA.out("A", 0, 0, 0, 0x33, 0), statusGood)
	mpathB.want("REGISTER through the standby", mpathB.out("B", 0, 0, 0, 0x33, 0), statusGood)
	mpathB.want("RESERVE through the standby, of what is held", mpathB.out("B", 1, 5, 0x33, 0, 0), statusConflict)
	mpathA.want("a registrant's WRITE", mpathA.write("A"), statusGood)
	before := holder.keys("A")
	if there := mpathB.keys("B"); there != before {
		t.Fatalf("through the standby\n%s, through the owner\n%s", there, before)
	}

	// It knocks at B from before the takeover on, so that the first command that B serves is likely its.
	r.inSync("A")
	knocked := make(chan byte, 1)
	go func() { knocked <- other.write("B") }()
	r.Kill("A")
	r.call("B", "POST", "/v1/takeover", nil)
	other.want("a fenced one's first WRITE through the new owner", <-knocked, statusConflict)
	holder.want("the holder's WRITE through the new owner", holder.write("B"), statusGood)
	mpathB.want("a multipath initiator's WRITE on its other path", mpathB.write("B"), statusGood)
	if after := holder.keys("B"); after != before {
		t.Fatalf("registrations after the takeover\n%s, before\n%s", after, before)
	}

	// The owner alone, then both down: cold start.
	r.Kill("B")
	go func() { knocked <- other.write("B") }() // also before its LUNs are known, when a LUN that is not there would be an I/O error
	r.up("B")
	r.owner("B")
	other.want("a fenced one's first WRITE after a cold start", <-knocked, statusConflict)
	holder.want("the holder's WRITE after a cold start", holder.write("B"), statusGood)
	holder.want("CLEAR", holder.out("B", 3, 0, 0x11, 0, 0), statusGood)

	// And back: what A had in its memory counts no more.
	r.up("A")
	r.inSync("B")
	r.call("A", "POST", "/v1/takeover", nil)
	other.want("WRITE after CLEAR and a takeover", other.write("A"), statusGood)
}
