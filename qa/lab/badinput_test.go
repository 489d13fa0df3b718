package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/ledge-storage/ledge/host/initiator"
	"github.com/ledge-storage/ledge/qa/hostile"
	"github.com/ledge-storage/ledge/target"
)

// hostileSeed replays an attack; hostilePDUs go to each port.
const (
	hostileSeed = 0xbad1
	hostilePDUs = 10_000
)

// testBadInput attacks every listening port while a writer goes on; no process may die, and the writer may not
// notice.
func testBadInput(t *testing.T, ctx context.Context, l *Lab) {
	l.must(t, ctx, "volume", "create", "bystander", "1GiB")
	v := l.show(t, ctx, "bystander")
	w := newWriter(t, ctx, v, 0xb57, 0, 16<<20)
	defer w.dev.Close()
	w.begin()
	w.advance("before the attacks", someWrites)
	pids := map[string]int{"agent": l.Agent.PID(), "A": l.A.PID(), "B": l.B.PID()}
	starts := consoleStarts(t, l)

	request := func(host string) [][]byte {
		return [][]byte{
			[]byte("GET /v1/status HTTP/1.1\r\nHost: " + host + "\r\n\r\n"),
			[]byte("POST /v1/takeover HTTP/1.1\r\nHost: " + host + "\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"),
			[]byte("PUT /v1/hosts/x HTTP/1.1\r\nHost: " + host + "\r\nAuthorization: Bearer x\r\nContent-Length: 15\r\n\r\n{\"initiator\":1}"),
			[]byte("POST /v1/volumes HTTP/1.1\r\nHost: " + host + "\r\nContent-Length: 30\r\n\r\n{\"name\":\"\",\"size_bytes\":\"many\"}"),
		}
	}
	shelfTarget := "iqn.2026-11.io.ledge:shelf.lab"
	for _, port := range []struct {
		name string
		run  func(o hostile.Options) (hostile.Report, error)
		at   hostile.Options
	}{
		{"agent's portal", iscsi(ctx, v.IQN), hostile.Options{Network: "tcp", Address: l.AgentPortal()}},
		{"A's portal", iscsi(ctx, shelfTarget), hostile.Options{Network: "tcp", Address: l.A.Portal()}},
		{"B's portal", iscsi(ctx, shelfTarget), hostile.Options{Network: "tcp", Address: l.B.Portal()}},
		{"agent's API", messages(ctx, request("agent")), hostile.Options{Network: "unix", Address: l.AgentSocket()}},
		{"A's API", messages(ctx, request("a")), hostile.Options{Network: "tcp", Address: strings.TrimPrefix(l.A.API(), "http://")}},
		{"B's API", messages(ctx, request("b")), hostile.Options{Network: "tcp", Address: strings.TrimPrefix(l.B.API(), "http://")}},
	} {
		began := time.Now()
		port.at.Seed, port.at.PDUs, port.at.Workers = hostileSeed, hostilePDUs, 8
		r, err := port.run(port.at)
		if err != nil {
			t.Errorf("%s: seed %#x: %v", port.name, hostileSeed, err)
		}
		t.Logf("%s: %+v in %.1f s", port.name, r, time.Since(began).Seconds())
		w.advance("during the attack on "+port.name, 1)
	}
	w.check("after the attacks")
	for _, p := range []*Part{l.Agent, l.A.Part, l.B.Part} {
		if p.PID() != pids[p.Name] {
			t.Errorf("%s died: %s", p.Name, p.Ended())
		}
	}
	if now := consoleStarts(t, l); now != starts {
		t.Errorf("shelfd was started again on a controller: %v starts before, %v after", starts, now)
	}
	// Good logins still work on each portal.
	for _, url := range []string{l.AgentPortal(), l.A.Portal(), l.B.Portal()} {
		command(t, ctx, "iscsi-ls", "iscsi://"+url)
	}
	if err := checkRoles(ctx, l); err != nil {
		t.Error(err)
	}
}

func iscsi(ctx context.Context, target string) func(hostile.Options) (hostile.Report, error) {
	return func(o hostile.Options) (hostile.Report, error) { return hostile.ISCSI(ctx, o, target) }
}

func messages(ctx context.Context, valid [][]byte) func(hostile.Options) (hostile.Report, error) {
	return func(o hostile.Options) (hostile.Report, error) { return hostile.Messages(ctx, o, valid) }
}

// consoleStarts counts how often PID 1 started shelfd, on each controller.
func consoleStarts(t *testing.T, l *Lab) (n [2]int) {
	t.Helper()
	for i, c := range []*Controller{l.A, l.B} {
		text, err := os.ReadFile(c.ConsoleLog())
		if err != nil {
			t.Fatal(err)
		}
		n[i] = strings.Count(string(text), "ledge init: shelfd: started")
	}
	return n
}

// TestWrongConfiguration runs the daemons themselves, each with one field wrong: they must name it, and end
// with the code that says so.
func TestWrongConfiguration(t *testing.T) {
	needMachine(t)
	l := newLab(t, Options{Local: true, DriveBytes: 64 << 20})
	if _, err := l.localController("A"); err != nil {
		t.Fatal(err)
	}
	if err := writeJSON(l.path("hostd.json"), 0o600, l.agentConfig()); err != nil {
		t.Fatal(err)
	}
	for _, daemon := range []struct {
		program string
		code    int // of its contract: wrong configuration, do not restart
		config  string
		wrong   map[string]any
	}{
		{"shelfd", 1, l.path("A", "shelf.json"), map[string]any{
			"shelf": "Not A Name", "controller": "C", "secret": "short", "api_token": "", "api_listen": "nowhere",
			"portal_listen": "x", "portals": map[string]any{"A": []string{}}, "drives": []string{"sd*"},
			"nvram": map[string]any{"path": "pmem0"}, "mirror": map[string]any{}, "log_level": "loud", "colour": "red",
		}},
		{"hostd", 2, l.path("hostd.json"), map[string]any{
			"name": "Not A Name", "initiator": "me", "shelf": map[string]any{"apis": []string{"gopher://x"}}, "listen": "x",
			"api": "", "cache": map[string]any{"path": "/x", "size": 1}, "journal_bytes": 1, "store_bytes": "many",
			"log_level": "loud", "colour": "red",
		}},
	} {
		good := map[string]any{}
		if err := readJSON(daemon.config, &good); err != nil {
			t.Fatal(err)
		}
		if out, code := check(t, daemon.program, good); code != 0 {
			t.Fatalf("%s refuses the lab's own configuration: %d\n%s", daemon.program, code, out)
		}
		for field := range good {
			if _, ok := daemon.wrong[field]; !ok {
				t.Errorf("%s: no wrong value for field %s", daemon.program, field)
			}
		}
		for field, value := range daemon.wrong {
			bad := map[string]any{}
			for k, v := range good {
				bad[k] = v
			}
			bad[field] = value
			out, code := check(t, daemon.program, bad)
			if code != daemon.code || !strings.Contains(out, field) {
				t.Errorf("%s with %s = %v: code %d, output does not name it:\n%s", daemon.program, field, value, code, out)
			}
		}
	}
	for name, text := range map[string]string{"empty": "", "no JSON": "shelf: lab", "a list": "[]", "binary": "\x00\x01\x02"} {
		for program, want := range map[string]int{"shelfd": 1, "hostd": 2} {
			if out, code := checkText(t, program, []byte(text)); code != want || strings.TrimSpace(out) == "" {
				t.Errorf("%s with %s: code %d, %q", program, name, code, out)
			}
		}
	}
}

func check(t *testing.T, program string, config map[string]any) (string, int) {
	t.Helper()
	text, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	return checkText(t, program, text)
}

func checkText(t *testing.T, program string, text []byte) (string, int) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.json")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, filepath.Join(build, "bin", program), "--config", path, "--check").CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	code := 0
	if exit != nil {
		code = exit.ExitCode()
	}
	return string(out), code
}

// TestFullPool fills a small pool (form local: the pool and the agent are the same programs) until a write is
// refused: the error is precise, nothing dies, what was acknowledged in another volume reads back, and a deletion makes room.
func TestFullPool(t *testing.T) {
	needMachine(t)
	ctx := testContext(t, 8*time.Minute)
	l := newLab(t, Options{Local: true, DriveBytes: 128 << 20, NVRAMBytes: 64 << 20, CacheBytes: 64 << 20})
	fatal(t, l.Start(ctx))
	l.must(t, ctx, "volume", "create", "kept", "1GiB")
	w := newWriter(t, ctx, l.show(t, ctx, "kept"), 0xfa11, 0, 16<<20)
	defer w.dev.Close()
	w.begin()
	w.advance("in a roomy pool", someWrites)
	w.check("in a roomy pool")

	l.must(t, ctx, "volume", "create", "filler", "16GiB")
	v := l.show(t, ctx, "filler")
	dev, err := initiator.Open(ctx, initiator.Config{Portals: []string{v.Portal}, Target: v.IQN, LUN: v.LUN, Initiator: "iqn.2026-11.lab:filler"})
	fatal(t, err)
	defer dev.Close()
	written, err := fill(ctx, dev, 8<<30)
	t.Logf("full after %d MiB: %v", written>>20, err)
	if !errors.Is(err, target.ErrNoSpace) {
		t.Fatalf("a full pool answered: %v", err)
	}
	for _, p := range []*Part{l.A.Part, l.B.Part, l.Agent} {
		if !p.Running() {
			t.Errorf("%s died of a full pool: %s", p.Name, p.Ended())
		}
	}
	st, err := l.A.Status(ctx)
	fatal(t, err)
	t.Logf("pool: %s, %d of %d MiB allocated", st.Pool.State, st.Pool.AllocatedBytes>>20, st.Pool.CapacityBytes>>20)
	if r, err := w.w.Check(ctx, w.dev); err != nil {
		t.Errorf("another volume after the pool was full: %+v, %v", r, err)
	}
	if err := checkRoles(ctx, l); err != nil {
		t.Error(err)
	}
	var host api.Status
	fatal(t, json.Unmarshal([]byte(l.must(t, ctx, "host", "status", "--json")), &host))
	t.Logf("host: phase %s, trouble %q", host.Phase, host.Trouble)

	// Room comes back when the filler goes: the agent stopped early enough to write the checkpoint that frees it.
	fatal(t, dev.Close())
	l.must(t, ctx, "volume", "delete", "filler", "--force", "--yes")
	room, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	fatal(t, poll(room, func() error { return w.dev.WriteAt(room, bytes.Repeat([]byte{1}, 1<<20), 512<<20) }))
	w.begin()
	w.advance("after the filler was deleted", someWrites)
	w.check("after the filler was deleted")
}

// fill writes blocks that neither dedup nor compression shrinks, until an error or limit bytes.
func fill(ctx context.Context, dev *initiator.Device, limit int64) (written int64, err error) {
	const chunk = 1 << 20
	buf := make([]byte, chunk)
	rng := uint64(0x9e3779b97f4a7c15)
	for off := int64(0); off < limit; off += chunk {
		for i := 0; i < chunk; i += 8 {
			rng ^= rng << 13
			rng ^= rng >> 7
			rng ^= rng << 17
			for b := range 8 {
				buf[i+b] = byte(rng >> (8 * b))
			}
		}
		try, cancel := context.WithTimeout(ctx, time.Minute)
		err := dev.WriteAt(try, buf, off)
		cancel()
		if err != nil {
			return written, fmt.Errorf("write at %d: %w", off, err)
		}
		written += chunk
	}
	return written, nil
}

// TestHostileMirrorLink attacks the one port that the other tests cannot reach, as it listens on the partner
// link only: form local has it on a unix socket. The controllers must stay in step.
func TestHostileMirrorLink(t *testing.T) {
	needMachine(t)
	ctx := testContext(t, 4*time.Minute)
	l := newLab(t, Options{Local: true, DriveBytes: 128 << 20, NVRAMBytes: 64 << 20})
	fatal(t, l.StartShelf(ctx))
	pids := [2]int{l.A.PID(), l.B.PID()}
	r, err := hostile.Messages(ctx, hostile.Options{Network: "unix", Address: l.path("partner.sock"), Seed: hostileSeed, PDUs: hostilePDUs}, nil)
	fatal(t, err)
	t.Logf("%+v", r)
	fatal(t, l.WaitMirrored(ctx))
	if now := [2]int{l.A.PID(), l.B.PID()}; now != pids {
		t.Errorf("a controller died: %v, then %v", pids, now)
	}
	if err := checkRoles(ctx, l); err != nil {
		t.Error(err)
	}
}
