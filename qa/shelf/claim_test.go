package shelf

import (
	"context"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/host/initiator"
)

// TestClaim: a host that claims again shuts out whoever used the claim before, on both controllers and over a
// takeover (P5): what the earlier one writes afterwards is never acknowledged and never there.
func TestClaim(t *testing.T) {
	r := start(t)
	open := func() *initiator.Device {
		t.Helper()
		var g struct {
			Initiator  string   `json:"initiator"`
			Target     string   `json:"target"`
			Portals    []string `json:"portals"`
			JournalLUN uint16   `json:"journal_lun"`
		}
		body := map[string]any{"claim": true, "initiator": "iqn.2026-11.io.ledge:h1", "journal_bytes": 16 << 20, "store_bytes": 64 << 20}
		owner := "A"
		if st, err := r.Wait(r.ctx, "B", "known", func(st Status) bool { return st.Role == "owner" || st.Role == "standby" }); err == nil && st.Role == "owner" {
			owner = "B"
		}
		if _, err := r.Call(r.ctx, owner, "PUT", "/v1/hosts/h1", body, &g); err != nil {
			t.Fatal(err)
		}
		d, err := initiator.Open(r.ctx, initiator.Config{Portals: g.Portals, Target: g.Target, LUN: g.JournalLUN, Initiator: g.Initiator,
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
}
