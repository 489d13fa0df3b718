package control

import (
	"fmt"
	"strings"
	"testing"
)

// TestClaims: each claim gives a name of its own and takes the last one's place; numbers never fall, and nobody can
// ask for a name that a claim gives.
func TestClaims(t *testing.T) {
	f := &fake{}
	h := newServer(t, f)
	const plain = `{"initiator":"iqn.2026-11.io.ledge:h1","journal_bytes":16777216,"store_bytes":67108864}`
	claim := strings.Replace(plain, "}", `,"claim":true}`, 1)
	for n := 1; n <= 3; n++ {
		want := fmt.Sprintf("iqn.2026-11.io.ledge:h1:e%d", n)
		if _, g := call(t, h, "PUT", "/v1/hosts/h1", claim, nil); g["initiator"] != want || len(f.hosts) != 1 || f.hosts[0].Initiator != want {
			t.Fatalf("claim %d: granted %v, hosts %v", n, g, f.hosts)
		} else if chap, _ := g["chap"].(map[string]any); chap["user"] != want || chap["secret"] != "of "+want || chap["target_secret"] != "target's of "+want {
			t.Fatalf("claim %d: secrets %v", n, chap)
		}
	}
	if _, g := call(t, h, "PUT", "/v1/hosts/h1", plain, nil); g["initiator"] != "iqn.2026-11.io.ledge:h1:e3" {
		t.Fatalf("a request without a claim: %v", g)
	} else if g["chap"] != nil {
		t.Fatal("a request without a claim gets the secrets of one")
	}
	if _, g := call(t, h, "GET", "/v1/hosts", "", nil); strings.Contains(fmt.Sprint(g), "of iqn") {
		t.Fatalf("the list of hosts has secrets: %v", g)
	}
	if s := fmt.Sprintf("%v %+v %#v %s", f.Secrets("x"), Grant{CHAP: &CHAP{Secret: "of x"}}, f.Secrets("x"), f.Secrets("x")); strings.Contains(s, "of x") {
		t.Fatalf("printed: %s", s)
	}
	if code, g := call(t, h, "PUT", "/v1/hosts/h2", claim, nil); code != 409 {
		t.Fatalf("the initiator of another host: %d %v", code, g)
	}
	if code, g := call(t, h, "PUT", "/v1/hosts/h2", strings.Replace(claim, ":h1", ":h1:e3", 1), nil); code != 400 {
		t.Fatalf("a name that a claim gave: %d %v", code, g)
	}
}

func TestClaimNames(t *testing.T) {
	for name, want := range map[string]uint64{"iqn.x:a": 0, "iqn.x:a:e1": 1, "iqn.x:a:e01": 0, "iqn.x:a:e": 0, "iqn.x:a:e0": 0, "iqn.x:a:e5:e7": 7,
		"iqn.x:a:e18446744073709551615": 1<<64 - 1, "iqn.x:a:e18446744073709551616": 0, "": 0} {
		base, n := splitClaim(name)
		if n != want || joinClaim(base, n) != name {
			t.Errorf("%q: %q, %d", name, base, n)
		}
	}
}

// TestStoreCapacity: what others have, and what journals will have, is not the store's; nothing left is not unlimited.
func TestStoreCapacity(t *testing.T) {
	const gib = 1 << 30
	st := Status{Pool: &Pool{CapacityBytes: 10 * gib}, LUNs: []LUN{
		{ID: 1, Kind: "journal", SizeBytes: gib, AllocatedBytes: 8 << 20}, {ID: 2, Kind: "store", SizeBytes: 1 << 46, AllocatedBytes: 3 * gib},
		{ID: 3, Kind: "plain", SizeBytes: 5 * gib, AllocatedBytes: 2 * gib},
	}}
	if got := storeCapacity(st, 2); got != 7*gib-capacitySlack {
		t.Errorf("%d", got)
	}
	st.Pool.CapacityBytes = gib
	if got := storeCapacity(st, 2); got != 8<<20 {
		t.Errorf("nothing left: %d", got)
	}
	if got := storeCapacity(Status{}, 2); got != 0 {
		t.Errorf("no pool known: %d", got)
	}
}
