package shelf

import (
	"bytes"
	"context"
	"errors"
	"os"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/ledge-storage/ledge/host/initiator"
	"github.com/ledge-storage/ledge/host/initiator/iscsi"
)

// TestClaim: a host that claims again shuts out whoever used the claim before, on both controllers and over a
// takeover (P5): what the earlier one writes afterwards is never acknowledged and never there.
func TestClaim(t *testing.T) {
	r := start(t)
	var g api.Grant // the last
	open := func() *initiator.Device {
		t.Helper()
		body := map[string]any{"claim": true, "initiator": "iqn.2026-11.io.ledge:h1", "journal_bytes": 16 << 20, "store_bytes": 64 << 20}
		owner := "A"
		if st, err := r.Wait(r.ctx, "B", "known", func(st Status) bool { return st.Role == "owner" || st.Role == "standby" }); err == nil && st.Role == "owner" {
			owner = "B"
		}
		if _, err := r.Call(r.ctx, owner, "PUT", "/v1/hosts/h1", body, &g); err != nil {
			t.Fatal(err)
		}
		d, err := initiator.Open(r.ctx, initiator.Config{Portals: g.Portals, Target: g.Target, LUN: uint16(g.JournalLUN), Initiator: g.Initiator, CHAP: chapOf(g),
			PingInterval: 500 * time.Millisecond, PingTimeout: time.Second, ProbeInterval: 200 * time.Millisecond, MaxBackoff: 500 * time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	write := func(d *initiator.Device, b byte, limit time.Duration) error {
		ctx, cancel := context.WithTimeout(r.ctx, limit)
		defer cancel()
		p := make([]byte, 4096)
		p[0] = b
		return d.WriteAt(ctx, p, 0)
	}
	holds := func(d *initiator.Device, want byte) {
		t.Helper()
		p := make([]byte, 4096)
		if err := d.ReadAt(r.ctx, p, 0); err != nil || p[0] != want {
			t.Fatalf("block holds %d, not %d: %v", p[0], want, err)
		}
	}
	first := open()
	defer first.Close()
	if err := write(first, 1, time.Minute); err != nil {
		t.Fatal(err)
	}
	second := open()
	defer second.Close()
	if write(first, 2, time.Second) == nil {
		t.Fatal("the earlier claim's write was acknowledged")
	}
	holds(second, 1)
	r.inSync("A")
	r.Kill("A")
	r.call("B", "POST", "/v1/takeover", nil)
	if write(first, 3, time.Second) == nil {
		t.Fatal("the earlier claim's write was acknowledged after a takeover")
	}
	holds(second, 1)
	if err := write(second, 4, time.Minute); err != nil {
		t.Fatal(err)
	}
	holds(second, 4)

	// The claim's name alone opens nothing, nor does another claim's secret: on the owner, and on the standby.
	r.up("A")
	r.inSync("B")
	session := iscsi.Config{Target: g.Target, InitiatorName: g.Initiator}
	foreign := *chapOf(g)
	foreign.Secret = "another claim's secret"
	for _, c := range []string{"A", "B"} {
		for what, chap := range map[string]*iscsi.CHAP{"no secret": nil, "a wrong secret": &foreign} {
			session.Portal, session.CHAP = r.Portals[c], chap
			s, err := iscsi.Dial(r.ctx, session)
			if err == nil {
				s.Close()
			}
			if !errors.Is(err, iscsi.ErrAuth) {
				t.Errorf("a stranger logs in to %s by the name of a claim and %s: %v", c, what, err)
			}
		}
		session.CHAP = chapOf(g)
		s, err := iscsi.Dial(r.ctx, session)
		if err != nil {
			t.Fatalf("the claim's own secret at %s: %v", c, err)
		}
		s.Close()
		session.CHAP.TargetSecret = "another target's secret"
		if s, err := iscsi.Dial(r.ctx, session); !errors.Is(err, iscsi.ErrAuth) {
			if err == nil {
				s.Close()
			}
			t.Errorf("a target without the secret is believed: %v", err)
		}
	}
	for _, c := range []string{"A", "B"} {
		text, err := os.ReadFile(r.Log(c))
		if err != nil {
			t.Fatal(err)
		}
		for _, secret := range []string{g.CHAP.Secret, g.CHAP.TargetSecret} {
			if bytes.Contains(text, []byte(secret)) {
				t.Errorf("the log of %s has a secret", c)
			}
		}
	}
}

func chapOf(g api.Grant) *iscsi.CHAP {
	return &iscsi.CHAP{User: g.CHAP.User, Secret: g.CHAP.Secret, TargetUser: g.CHAP.TargetUser, TargetSecret: g.CHAP.TargetSecret}
}
