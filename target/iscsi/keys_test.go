package iscsi

import (
	"encoding/binary"
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/ledge-storage/ledge/target/scsi"
)

// answers logs in with keys in one stage and returns what was answered, and the status.
func (c *client) answers(flags byte, keys string) (map[string]string, uint16) {
	c.t.Helper()
	if err := c.send(c.loginHeader(flags), []byte(strings.ReplaceAll(keys, " ", "\x00"))); err != nil {
		c.t.Fatal(err)
	}
	p := c.expect(opLoginResp)
	return pairsOf(p.data), binary.BigEndian.Uint16(p.h[36:])
}

func pairsOf(data []byte) map[string]string {
	m := make(map[string]string)
	pairs, _ := parseText(data)
	for _, kv := range pairs {
		m[kv.key] = kv.value
	}
	return m
}

const who = "InitiatorName=" + testInitiator + " TargetName=" + testTarget + " "

// TestLoginKeys holds each key to its answer in each kind of login. "-" is no answer.
func TestLoginKeys(t *testing.T) {
	l := newLab(t, Options{SessionConnections: 3, TargetAlias: func(string) string { return "the shelf" }}, nil)
	for _, x := range []struct {
		key, normal, discovery string
	}{
		{"HeaderDigest=CRC32C", "CRC32C", "CRC32C"},
		{"DataDigest=None,CRC32C", "None", "None"},
		{"HeaderDigest=SHA", "Reject", "Reject"},
		{"MaxConnections=2", "2", "Irrelevant"},
		{"MaxConnections=64", "3", "Irrelevant"},
		{"MaxConnections=0", "Reject", "Irrelevant"},
		{"InitialR2T=No", "No", "Irrelevant"},
		{"ImmediateData=No", "No", "Irrelevant"},
		{"MaxRecvDataSegmentLength=65536", "262144", "262144"}, // ours, which is told, not agreed
		{"MaxRecvDataSegmentLength=511", "Reject", "Reject"},
		{"MaxBurstLength=0x20000", "131072", "Irrelevant"},
		{"MaxBurstLength=16777216", "Reject", "Irrelevant"},
		{"FirstBurstLength=512", "512", "Irrelevant"},
		{"DefaultTime2Wait=0", "2", "2"},
		{"DefaultTime2Wait=3601", "Reject", "Reject"},
		{"DefaultTime2Retain=20", "0", "0"},
		{"MaxOutstandingR2T=16", "4", "Irrelevant"},
		{"MaxOutstandingR2T=65536", "Reject", "Irrelevant"},
		{"DataPDUInOrder=No", "Yes", "Irrelevant"},
		{"DataSequenceInOrder=No", "Yes", "Irrelevant"},
		{"ErrorRecoveryLevel=2", "0", "0"},
		{"ErrorRecoveryLevel=3", "Reject", "Reject"},
		{"TaskReporting=FastAbort,ResponseFence,RFC3720", "ResponseFence", "Irrelevant"},
		{"TaskReporting=FastAbort", "Reject", "Irrelevant"},
		{"iSCSIProtocolLevel=1", "1", "Irrelevant"},
		{"iSCSIProtocolLevel=31", "2", "Irrelevant"},
		{"iSCSIProtocolLevel=32", "Reject", "Irrelevant"},
		{"IFMarker=No", "No", "No"},
		{"OFMarker=Yes", "No", "No"},
		{"IFMarkInt=2048", "Reject", "Reject"},
		{"OFMarkInt=2048~8192", "Reject", "Reject"},
		{"InitiatorAlias=host-7", "-", "-"},
		{"X-com.example.colour=blue", "NotUnderstood", "NotUnderstood"},
		{"Colour=blue", "NotUnderstood", "NotUnderstood"},
		{"SendTargets=All", "Reject", "Reject"},
		{"TargetAlias=mine", "Reject", "Reject"},
		{"TargetAddress=10.0.0.1", "Reject", "Reject"},
		{"TargetPortalGroupTag=7", "Reject", "Reject"},
	} {
		key, _, _ := strings.Cut(x.key, "=")
		for kind, want := range map[string]string{who: x.normal, "InitiatorName=" + testInitiator + " SessionType=Discovery ": x.discovery} {
			c := l.dial()
			if err := c.send(c.loginHeader(0x87), []byte(strings.ReplaceAll(kind+x.key+" ", " ", "\x00"))); err != nil {
				t.Fatal(err)
			}
			p := c.expect(opLoginResp)
			if p.h[36] != 0 {
				t.Errorf("%s in %q: status %x", x.key, kind, p.h[36:38])
				continue
			}
			var got []string
			pairs, _ := parseText(p.data)
			for _, kv := range pairs {
				if kv.key == key {
					got = append(got, kv.value)
				}
			}
			if len(got) == 0 {
				got = []string{"-"}
			}
			// The target's own declarations follow an answer of the same name.
			if got[0] != want && !(got[len(got)-1] == want) {
				t.Errorf("%s in %q: %q, want %q", x.key, kind, got, want)
			}
			c.nc.Close()
		}
	}
	c := l.dial()
	got, status := c.answers(0x87, who+"InitiatorAlias=host-7 ")
	if status != 0 || got["TargetAlias"] != "the shelf" || got["TargetPortalGroupTag"] != "1" {
		t.Errorf("status %04X, %v", status, got)
	}
	eventually(t, "the alias is known", func() bool {
		s := l.srv.Sessions()
		return len(s) == 1 && s[0].Alias == "host-7"
	})
}

// TestKeysOutOfStage: operational keys in the security stage and the reverse end the login; what
// may stand in either does not.
func TestKeysOutOfStage(t *testing.T) {
	l := newLab(t, Options{}, nil)
	for _, x := range []struct {
		flags  byte
		keys   string
		status uint16
	}{
		{0x81, "AuthMethod=None ", 0},
		{0x81, "AuthMethod=None InitiatorAlias=x SessionType=Normal ", 0},
		{0x81, "AuthMethod=None MaxRecvDataSegmentLength=4096 ", 0},
		{0x81, "AuthMethod=None X-other=1 ", 0},
		{0x81, "AuthMethod=None SendTargets=All ", 0},
		{0x81, "AuthMethod=None MaxBurstLength=512 ", 0x0200},
		{0x81, "AuthMethod=None HeaderDigest=None ", 0x0200},
		{0x81, "AuthMethod=KRB5 ", 0x0201},
		{0x81, "AuthMethod=None AuthMethod=None ", 0x0200},
		{0x87, "AuthMethod=None ", 0x0200},
		{0x87, "CHAP_A=5 ", 0x0200},
		{0x87, "MaxBurstLength=512 MaxBurstLength=512 ", 0x0200},
	} {
		c := l.dial()
		if _, status := c.answers(x.flags, who+x.keys); status != x.status {
			t.Errorf("%q: status %04X, want %04X", x.keys, status, x.status)
		}
	}
}

// TestTextKeys: the keys of the full feature phase, and those that have no place there.
func TestTextKeys(t *testing.T) {
	l := newLab(t, Options{}, nil)
	c := l.session().ready()
	text := func(keys string) *pdu {
		t.Helper()
		h := c.immediate(opTextReq, 0, 9)
		h.put32(20, noTag)
		if err := c.send(h, []byte(strings.ReplaceAll(keys, " ", "\x00"))); err != nil {
			t.Fatal(err)
		}
		p, err := c.recv()
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	for _, x := range []struct{ key, want string }{
		{"HeaderDigest=CRC32C ", "Reject"}, {"MaxConnections=2 ", "Reject"}, {"ErrorRecoveryLevel=0 ", "Reject"},
		{"AuthMethod=None ", "Reject"}, {"CHAP_A=5 ", "Reject"}, {"InitiatorName=iqn.x ", "Reject"},
		{"SessionType=Discovery ", "Reject"}, {"TargetAlias=x ", "Reject"}, {"IFMarkInt=1 ", "Reject"},
		{"SendTargets=All ", "Reject"}, {"InitiatorAlias=x ", "-"}, {"X-y=1 ", "NotUnderstood"},
		{"MaxRecvDataSegmentLength=5 ", "Reject"},
	} {
		p := text(x.key)
		key, _, _ := strings.Cut(x.key, "=")
		got, ok := pairsOf(p.data)[key]
		if !ok {
			got = "-"
		}
		if p.h.opcode() != opTextResp || got != x.want {
			t.Errorf("%s: opcode %#x, %q, want %q", x.key, p.h.opcode(), got, x.want)
		}
	}
	for _, bad := range []string{"X-y=1 X-y=1 ", "rubbish ", "SendTargets= SendTargets= "} {
		if p := text(bad); p.h.opcode() != opReject {
			t.Errorf("%q: opcode %#x", bad, p.h.opcode())
		}
	}
	for _, which := range []string{"SendTargets= ", "SendTargets=" + testTarget + " "} {
		p := text(which)
		want := fmt.Sprintf("TargetName=%s\x00TargetAddress=%s,1\x00", testTarget, l.addr)
		if string(p.data) != want {
			t.Errorf("%s: %q, want %q", which, p.data, want)
		}
	}
	// The segment length holds from its declaration on.
	text("MaxRecvDataSegmentLength=1024 ")
	if err := c.send(c.command(0xC0, 4096, read10(0, 8)...), nil); err != nil {
		t.Fatal(err)
	}
	for range 4 {
		if p := c.expect(opDataIn); len(p.data) != 1024 {
			t.Fatalf("a segment of %d bytes", len(p.data))
		}
	}
	ping := c.immediate(opNopOut, 0, 10)
	ping.put32(20, noTag)
	if err := c.send(ping, make([]byte, 4096)); err != nil {
		t.Fatal(err)
	}
	if p := c.expect(opNopIn); len(p.data) != 1024 {
		t.Errorf("%d bytes of a ping come back", len(p.data))
	}
}

// TestIPv6: a portal on [::1], whose address is told in brackets.
func TestIPv6(t *testing.T) {
	l := newLab(t, Options{PortalGroupTag: 7}, nil)
	listener, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		t.Skipf("no IPv6: %v", err)
	}
	served := make(chan error, 1)
	go func() { served <- l.srv.Serve(t.Context(), listener) }()
	l.addr = listener.Addr().String()
	all := l.group(2)
	h := all[1].immediate(opTextReq, 0, 9)
	h.put32(20, noTag)
	if err := all[1].send(h, []byte("SendTargets=\x00")); err != nil {
		t.Fatal(err)
	}
	want := "TargetName=" + testTarget + "\x00TargetAddress=" + l.addr + ",7\x00"
	if p := all[1].expect(opTextResp); string(p.data) != want || !strings.HasPrefix(l.addr, "[::1]:") {
		t.Errorf("answer %q, want %q", p.data, want)
	}
	for _, c := range all {
		c.must(c.command(0xC0, 512, read10(0, 1)...), nil, nil)
	}
	l.srv.Close()
	<-served
}

// TestSessionsPerInitiator bounds one initiator's sessions with one target, and nobody else's.
func TestSessionsPerInitiator(t *testing.T) {
	l := newLab(t, Options{MaxSessionsPerInitiator: 2}, nil)
	other := scsi.NewTarget("iqn.2026-11.io.ledge:other", scsi.Options{})
	if err := l.srv.AddTarget(other); err != nil {
		t.Fatal(err)
	}
	for i, x := range []struct {
		keys   []string
		status uint16
	}{
		{nil, 0}, {nil, 0}, {nil, 0x0302},
		{[]string{"InitiatorName=" + testInitiator + "2"}, 0},
		{[]string{"TargetName=iqn.2026-11.io.ledge:other"}, 0},
	} {
		c := l.dial()
		c.isid = byte(i + 1)
		if got := c.login(x.keys...); got != x.status {
			t.Errorf("session %d: status %04X, want %04X", i, got, x.status)
		}
	}
	c := l.dial() // one that it has already is replaced, not one more
	if got := c.login(); got != 0 {
		t.Errorf("reinstatement: status %04X", got)
	}
}
