package conformance

import (
	"testing"
	"time"

	"github.com/ledge-storage/ledge/target/iscsi"
	"github.com/ledge-storage/ledge/target/mem"
)

// TestAsyncMessages: every session of a target, and none of another, is asked to log out before a
// giveback, within the time that was given, and may; sessions that stay are told when the target
// goes, and end (RFC 7143 11.9).
func TestAsyncMessages(t *testing.T) {
	const other = "iqn.2026-11.io.ledge:other"
	srv := server(t, iscsi.Options{})
	for _, name := range []string{targetName, other} {
		if err := srv.AddTarget(newTarget(t, name, unit{mem: mem.Options{Bytes: 1 << 20, Name: name}})); err != nil {
			t.Fatal(err)
		}
	}
	portal := listen(t, srv, "127.0.0.1:0")
	var sessions []*raw
	for i := range 3 {
		c := dial(t, portal)
		c.isid = byte(i)
		sessions = append(sessions, c.login(normal("HeaderDigest=CRC32C")...).ready())
	}
	bystander := dial(t, portal).login("InitiatorName="+initiatorName, "TargetName="+other).ready()

	srv.RequestLogout(targetName, 30*time.Second)
	for i, c := range sessions {
		f := c.must() // recv holds its StatSN to be a new one
		if f.opcode() != opAsync || f.h[1] != final || f.u32(16) != noTag || f.h[36] != 1 || f.u32(40)&0xFFFF != 30 {
			t.Fatalf("session %d: % X", i, f.h)
		}
		c.do(0, 0, nil, 0, 0, 0, 0, 0, 0) // work goes on meanwhile
	}
	out := new(frame)
	out.h[0], out.h[1] = opLogout|immediate, final
	out.put(16, 99)
	out.put(24, int64(sessions[0].cmdSN))
	sessions[0].send(out)
	if f := sessions[0].must(); f.opcode() != opLogoutResp || f.h[2] != 0 {
		t.Errorf("% X", f.h)
	}
	sessions[0].closed()

	srv.RemoveTarget(targetName)
	for i, c := range sessions[1:] {
		if f := c.must(); f.opcode() != opAsync || f.h[36] != 3 && f.h[36] != 2 {
			t.Errorf("session %d: % X", i, f.h)
		}
		c.closed()
	}
	bystander.ready()
	if status, _, _ := dial(t, portal).step(0x87, normal()...); status != 0x0203 {
		t.Errorf("login to a target that went: status %04X", status)
	}
}
