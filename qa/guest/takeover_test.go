package guest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	qashelf "github.com/ledge-storage/ledge/qa/shelf"
)

// TestTakeover is the same host with a whole shelf: two shelfd processes on files. While fio writes and verifies, the
// owner hands over, loses its power, comes back, and takes the pool again; the host sees one disk all the time.
//
// The shelf has no secrets yet, so the records have none; and they are made by hand, because discovery would name the
// shelf's own addresses, which are not the guest's.
func TestTakeover(t *testing.T) {
	h := sharedHost(t)
	b, err := build()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "ledge-shelf-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	ctx, cancel := context.WithTimeout(context.Background(), 3*patience)
	t.Cleanup(cancel)
	program := filepath.Join(dir, "shelfd")
	if err := goBuild(ctx, filepath.Join(filepath.Dir(b.Forward), "../.."), "./firmware/shelfd", program); err != nil {
		t.Fatal(err)
	}
	s, err := qashelf.New(qashelf.Options{Binary: program, Dir: dir, Drives: 12, DriveBytes: 64 << 20, NVRAMBytes: 64 << 20})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.Close()
		if !t.Failed() {
			return
		}
		for _, c := range []string{"A", "B"} {
			text, err := os.ReadFile(s.Log(c))
			t.Logf("log of %s (%v):\n%s", c, err, text)
			lines := strings.Split(strings.TrimSpace(string(text)), "\n")
			again(t, "the last of %s's log:\n%s", c, strings.Join(lines[max(0, len(lines)-12):], "\n"))
		}
	})
	role := func(c, role string) {
		t.Helper()
		if _, err := s.Wait(ctx, c, role, func(st qashelf.Status) bool { return st.Role == role }); err != nil {
			t.Fatal(err)
		}
	}
	inSync := func(owner string) {
		t.Helper()
		if _, err := s.Wait(ctx, owner, "in sync", func(st qashelf.Status) bool {
			return st.Role == "owner" && st.Partner.Connected && st.Partner.Mirror == "in-sync"
		}); err != nil {
			t.Fatal(err)
		}
	}
	call := func(c, path string, in any) {
		t.Helper()
		if _, err := s.Call(ctx, c, "POST", path, in, nil); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []string{"A", "B"} {
		if err := s.Start(c); err != nil {
			t.Fatal(err)
		}
	}
	role("A", "no-pool")
	call("A", "/v1/pool", nil)
	inSync("A")
	role("B", "standby")
	call("A", "/v1/luns", map[string]any{"name": "v", "size_bytes": 128 << 20, "block_bytes": 4096})

	const name = "iqn.2026-11.io.ledge:shelf.qa"
	t.Cleanup(func() {
		if t.Failed() {
			h.try(t, "multipathd disablequeueing maps; umount /mnt; multipath -F")
		}
		h.try(t, "iscsiadm -m node -T "+name+" -u; iscsiadm -m node -T "+name+" -o delete")
	})
	for i, c := range []string{"A", "B"} {
		h.paths[i].To(s.Portals[c])
		h.record(t, name, i+1, fmt.Sprintf("iscsiadm -m node -T %s -p %s,%d -o new", name, Portal(i), i+1))
	}
	h.sh(t, `for r in /etc/iscsi/nodes/`+name+`/*/default; do grep -v session.auth $r > /run/r && cp /run/r $r || exit 1; done
		iscsiadm -m node -T `+name+` -l && udevadm settle --timeout=120`)
	m := &multipathMap{host: h}
	m.wait(t, "A owns", "50 active ready", "1 active ghost")
	t.Logf("%s", h.sh(t, "multipath -ll"))
	h.sh(t, "mkfs.ext4 -q "+m.device()+" && mount "+m.device()+" /mnt")
	m.startWriter(t)
	m.flows(t, 0)

	call("B", "/v1/takeover", nil) // planned: A hands over
	role("B", "owner")
	m.flows(t, 1)
	m.wait(t, "B owns", "1 active ghost", "50 active ready")
	inSync("B")

	// A machine without power is silent. QEMU would take connections in its name and close them at once, which
	// iscsid 2.1.8 does not always survive ("can't bind conn, retcode -107": it tries no more).
	h.paths[1].Cut()
	s.Kill("B")
	if st, err := s.Call(ctx, "A", "POST", "/v1/takeover", nil, nil); err != nil && st != 409 {
		t.Fatal(err)
	}
	role("A", "owner")
	m.flows(t, 0)
	if err := s.Start("B"); err != nil {
		t.Fatal(err)
	}
	role("B", "standby")
	h.paths[1].Mend()
	inSync("A")
	m.wait(t, "B is back", "50 active ready", "1 active ghost")
	m.flows(t, 0)

	m.endWriter(t)
	before := h.sh(t, "sync && cd /mnt && sha256sum f*")
	h.sh(t, "umount /mnt && e2fsck -fn "+m.device()+" && mount "+m.device()+" /mnt")
	if after := h.sh(t, "cd /mnt && sha256sum f*"); after != before {
		t.Errorf("the files changed; before:\n%safter:\n%s", before, after)
	}
	h.sh(t, "umount /mnt && multipath -f "+m.device())
}
