package conformance

import (
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/ledge-storage/ledge/target/iscsi"
	"github.com/ledge-storage/ledge/target/mem"
)

// TestSendTargets asks with raw PDUs what there is (RFC 7143 appendix C): every portal of both
// families with its portal group tag, every target that the initiator may see and no other.
func TestSendTargets(t *testing.T) {
	const open, mine, hidden = "iqn.2026-11.io.ledge:open", "iqn.2026-11.io.ledge:mine", "iqn.2026-11.io.ledge:hidden"
	portals := []string{"192.0.2.1:3260", "[2001:db8::1]:3260", "192.0.2.2:3260,2", "[2001:db8::2]:3260,2"}
	srv := server(t, iscsi.Options{PortalGroupTag: 1, Portals: func(target string) []string {
		if target == mine {
			return nil // where the question came
		}
		return portals
	}})
	for name, initiators := range map[string][]string{open: nil, mine: {initiatorName}, hidden: {"iqn.2026-11.test:other"}} {
		if err := srv.AddTarget(newTarget(t, name, unit{mem: mem.Options{Bytes: 1 << 20, Name: name}, initiators: initiators})); err != nil {
			t.Fatal(err)
		}
	}
	v4, v6 := listen(t, srv, "127.0.0.1:0"), listen(t, srv, "[::1]:0")
	all := "192.0.2.1:3260,1\n[2001:db8::1]:3260,1\n192.0.2.2:3260,2\n[2001:db8::2]:3260,2"
	discover := func(portal, initiator string) *raw {
		return dial(t, portal).login("InitiatorName="+initiator, "SessionType=Discovery")
	}
	for _, portal := range []string{v4, v6} {
		for _, x := range []struct{ initiator, which, names, addresses string }{
			{initiatorName, "All", mine + "\n" + open, portal + ",1\n" + all},
			{initiatorName, open, open, all},
			{initiatorName, mine, mine, portal + ",1"},
			{initiatorName, hidden, "", ""},
			{initiatorName, "iqn.2026-11.io.ledge:nothing", "", ""},
			{"iqn.2026-11.test:other", "All", hidden + "\n" + open, all + "\n" + all},
			{"iqn.2026-11.test:other", mine, "", ""},
			{"iqn.2026-11.test:third", "All", open, all},
			{strings.ToUpper(initiatorName[4:]), "All", "", ""}, // no iSCSI name: not let in
		} {
			if !strings.HasPrefix(x.initiator, "iqn.") {
				if status, _, _ := dial(t, portal).step(0x87, "InitiatorName="+x.initiator, "SessionType=Discovery"); status != 0x0200 {
					t.Errorf("%s: status %04X", x.initiator, status)
				}
				continue
			}
			got := discover(portal, x.initiator).text("SendTargets=" + x.which)
			if got["TargetName"] != x.names || got["TargetAddress"] != x.addresses {
				t.Errorf("%s asks %s for %s: %q", x.initiator, portal, x.which, got)
			}
		}
	}
	if got := discover(v4, initiatorName).text("SendTargets="); got["SendTargets"] != "Reject" || got["TargetName"] != "" {
		t.Errorf("of a discovery session without a target: %q", got)
	}
	// A normal session may ask for its own target, by an empty value or by name.
	c := dial(t, v4).login("InitiatorName="+initiatorName, "TargetName="+open)
	for which, names := range map[string]string{"": open, open: open, mine: mine, hidden: "", "All": ""} {
		if got := c.text("SendTargets=" + which); got["TargetName"] != names {
			t.Errorf("a normal session asks for %q: %q", which, got)
		}
	}
	// A hidden target cannot be logged in to, nor can one that is not there.
	for name, want := range map[string]uint16{hidden: 0x0202, "iqn.2026-11.io.ledge:nothing": 0x0203} {
		if status, _, _ := dial(t, v4).step(0x87, "InitiatorName="+initiatorName, "TargetName="+name); status != want {
			t.Errorf("login to %s: status %04X, want %04X", name, status, want)
		}
	}
	// The login response names the portal group (RFC 7143 13.9).
	if _, answer, _ := dial(t, v6).step(0x87, "InitiatorName="+initiatorName, "TargetName="+open); answer["TargetPortalGroupTag"] != "1" {
		t.Errorf("login answer %v", answer)
	}
	// A discovery session serves no commands.
	d := discover(v4, initiatorName)
	if _, err := d.result(d.command(0, 0, nil, 0, 0, 0, 0, 0, 0)); err == nil || !strings.Contains(err.Error(), "rejected") {
		t.Errorf("a command in a discovery session: %v", err)
	}
}

// TestBothFamiliesWithLibiscsi: libiscsi's programs discover and log in over IPv4 and IPv6.
func TestBothFamiliesWithLibiscsi(t *testing.T) {
	srv := server(t, iscsi.Options{})
	if err := srv.AddTarget(newTarget(t, targetName, unit{lun: 1, mem: mem.Options{Bytes: 64 << 20, Name: "families"}})); err != nil {
		t.Fatal(err)
	}
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		portal := listen(t, srv, address)
		out := program(t, false, "iscsi-ls", "-s", "iscsi://"+portal)
		if !strings.Contains(out, "Target:"+targetName) || !strings.Contains(out, "Portal:"+portal+",1") || !strings.Contains(out, "Lun:1") {
			t.Errorf("iscsi-ls on %s:\n%s", portal, out)
		}
		url := fmt.Sprintf("iscsi://%s/%s/1", portal, targetName)
		if out := program(t, false, "iscsi-readcapacity16", url); !strings.Contains(out, fmt.Sprint(64<<20)) {
			t.Errorf("iscsi-readcapacity16 on %s:\n%s", portal, out)
		}
		if out := program(t, false, "iscsi-inq", "-e", "1", "-c", "131", url); !strings.Contains(out, targetName) {
			t.Errorf("iscsi-inq of page 83h on %s:\n%s", portal, out)
		}
	}
}

// TestDiscoveryWithCHAP: where discovery asks for a secret, libiscsi finds targets with it only.
func TestDiscoveryWithCHAP(t *testing.T) {
	portal := start(t, iscsi.Options{Auth: func(string, string) *iscsi.CHAP { return &iscsi.CHAP{User: "host1", Secret: "a long secret"} }},
		unit{mem: mem.Options{Bytes: 1 << 20, Name: "found"}})
	if out := program(t, false, "iscsi-ls", "iscsi://host1%a long secret@"+portal); !strings.Contains(out, "Target:"+targetName) {
		t.Errorf("with the secret: %s", out)
	}
	program(t, true, "iscsi-ls", "iscsi://host1%another@"+portal)
	program(t, true, "iscsi-ls", "iscsi://"+portal)
}

// TestIPv6Addresses: an address is told in brackets, as RFC 7143 13.8 asks.
func TestIPv6Addresses(t *testing.T) {
	srv := server(t, iscsi.Options{})
	if err := srv.AddTarget(newTarget(t, targetName, unit{mem: mem.Options{Bytes: 1 << 20, Name: "v6"}})); err != nil {
		t.Fatal(err)
	}
	portal := listen(t, srv, "[::1]:0")
	got := dial(t, portal).login("InitiatorName="+initiatorName, "SessionType=Discovery").text("SendTargets=All")["TargetAddress"]
	address, tag, _ := strings.Cut(got, ",")
	host, _, err := net.SplitHostPort(address)
	if err != nil || host != "::1" || !strings.HasPrefix(got, "[") || tag != "1" {
		t.Errorf("address %q: %v", got, err)
	}
}
