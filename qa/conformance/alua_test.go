package conformance

import (
	"encoding/binary"
	"fmt"
	"slices"
	"testing"

	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/iscsi"
	"github.com/ledge-storage/ledge/target/mem"
)

// group is a target port group as REPORT TARGET PORT GROUPS tells it (SPC-4 table 248).
type group struct {
	id        uint16
	state     byte
	preferred bool
	ports     []uint16
}

// portGroups asks for them, in either format, and takes the answer apart.
func (c *raw) portGroups(extended bool) (groups []group) {
	c.t.Helper()
	cdb := []byte{0xA3, 0x0A, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0}
	skip := 4
	if extended {
		cdb[1] |= 0x20
		skip = 8
	}
	s := c.do(0x40, 1024, nil, cdb...)
	if s.code != 0 {
		c.t.Fatalf("REPORT TARGET PORT GROUPS: status %02X, sense %X/%04X", s.code, s.key, s.asc)
	}
	if n := int(binary.BigEndian.Uint32(s.data)); n != len(s.data)-4 {
		c.t.Fatalf("return data length %d of %d bytes", n, len(s.data))
	}
	if extended && s.data[4]>>4&7 != 1 {
		c.t.Errorf("format %d", s.data[4]>>4&7)
	}
	for b := s.data[skip:]; len(b) > 0; {
		g := group{id: binary.BigEndian.Uint16(b[2:]), state: b[0] & 0xF, preferred: b[0]&0x80 != 0}
		for i := range int(b[7]) {
			g.ports = append(g.ports, binary.BigEndian.Uint16(b[8+4*i+2:]))
		}
		groups = append(groups, g)
		b = b[8+4*int(b[7]):]
	}
	return groups
}

// TestPortGroups: two controllers, each with a portal and a target port group of its own, serve one
// target. What REPORT TARGET PORT GROUPS says on either path is what was set; a change is told by
// one unit attention on every nexus; what a state does not allow is refused with its sense code.
func TestPortGroups(t *testing.T) {
	tgt := newTarget(t, targetName, unit{mem: mem.Options{Bytes: 16 << 20, Name: "alua"}})
	set := func(a, b target.AccessState) {
		tgt.SetPortGroups([]target.PortGroup{{ID: 1, State: a, Preferred: true, Ports: []uint16{1}}, {ID: 2, State: b, Ports: []uint16{2}}})
	}
	set(target.Optimized, target.NonOptimized)
	var paths [2]*raw
	for i := range paths {
		srv := server(t, iscsi.Options{PortalGroupTag: uint16(i + 1)})
		if err := srv.AddTarget(tgt); err != nil {
			t.Fatal(err)
		}
		c := dial(t, listen(t, srv, "127.0.0.1:0"))
		_, answer, _ := c.step(0x87, normal()...)
		if answer["TargetPortalGroupTag"] != fmt.Sprint(i+1) {
			t.Errorf("path %d: %v", i, answer)
		}
		paths[i] = c.ready()
		// Which port and group this is (SPC-4 7.8.6.7, 7.8.6.8).
		page := c.do(0x40, 1024, nil, 0x12, 1, 0x83, 4, 0, 0).data
		found := map[byte]uint16{}
		for b := page[4:]; len(b) >= 8; b = b[4+int(b[3]):] {
			if b[1]>>4&3 == 1 && (b[1]&0xF == 4 || b[1]&0xF == 5) {
				found[b[1]&0xF] = binary.BigEndian.Uint16(b[6:])
			}
		}
		if found[4] != uint16(i+1) || found[5] != uint16(i+1) {
			t.Errorf("path %d: relative port and group %v", i, found)
		}
		if std := c.do(0x40, 36, nil, 0x12, 0, 0, 0, 36, 0).data; std[5]>>4&3 == 0 {
			t.Error("INQUIRY says nothing of asymmetric access (TPGS)")
		}
	}
	want := func(a, b target.AccessState) {
		t.Helper()
		for i, c := range paths {
			for _, extended := range []bool{false, true} {
				got := c.portGroups(extended)
				if !slices.EqualFunc(got, []group{{1, byte(a), true, []uint16{1}}, {2, byte(b), false, []uint16{2}}}, func(x, y group) bool {
					return x.id == y.id && x.state == y.state && x.preferred == y.preferred && slices.Equal(x.ports, y.ports)
				}) {
					t.Errorf("path %d, extended %v: %+v, want %v and %v", i, extended, got, a, b)
				}
			}
		}
	}
	want(target.Optimized, target.NonOptimized)
	write := func(c *raw) status {
		return c.do(0x20, 512, make([]byte, 512), 0x2A, 0, 0, 0, 0, 0, 0, 0, 1, 0)
	}
	refusal := map[target.AccessState]uint16{target.Standby: 0x040B, target.Unavailable: 0x040C, target.Transitioning: 0x040A, target.Offline: 0x040C}
	states := [2]target.AccessState{target.Optimized, target.NonOptimized}
	for _, next := range [][2]target.AccessState{
		{target.NonOptimized, target.Optimized}, // the group moves to the partner
		{target.Standby, target.Optimized},
		{target.Transitioning, target.Transitioning},
		{target.Unavailable, target.Optimized},
		{target.Optimized, target.Offline},
		{target.Optimized, target.NonOptimized},
	} {
		if next == states {
			continue
		}
		states = next
		set(states[0], states[1])
		for i, c := range paths {
			// 2A06h: ASYMMETRIC ACCESS STATE CHANGED, once.
			if s := write(c); s.code != 2 || s.key != 6 || s.asc != 0x2A06 {
				t.Errorf("path %d, %v: the first command: status %02X, sense %X/%04X", i, states[i], s.code, s.key, s.asc)
			}
			s := write(c)
			if asc, refused := refusal[states[i]]; refused {
				if s.code != 2 || s.key != 2 || s.asc != asc {
					t.Errorf("path %d, %v: status %02X, sense %X/%04X, want 2/%04X", i, states[i], s.code, s.key, s.asc, asc)
				}
			} else if s.code != 0 {
				t.Errorf("path %d, %v: status %02X, sense %X/%04X", i, states[i], s.code, s.key, s.asc)
			}
			// In every state it says what it is.
			if s := c.do(0x40, 36, nil, 0x12, 0, 0, 0, 36, 0); s.code != 0 {
				t.Errorf("path %d, %v: INQUIRY: status %02X", i, states[i], s.code)
			}
		}
		want(states[0], states[1])
	}
	set(states[0], states[1]) // no change, no attention
	for i, c := range paths {
		if s := write(c); s.code != 0 {
			t.Errorf("path %d after no change: status %02X, sense %X/%04X", i, s.code, s.key, s.asc)
		}
	}
}
