package conformance

import (
	"context"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/qa/peers"
)

var withPeers = flag.Bool("peers", false, "run the suite against tgtd and gotgt too, test by test: a quarter of an hour")

// testNames asks the suite for its tests, as Suite.Test.
func testNames(t *testing.T) (names []string) {
	t.Helper()
	out, err := exec.Command(Tool, "-l").CombinedOutput()
	if err != nil {
		t.Fatalf("%s -l: %v\n%s", Tool, err, out)
	}
	for line := range strings.Lines(string(out)) {
		name, all := strings.CutPrefix(strings.TrimSpace(line), "ALL.")
		if all && strings.Count(name, ".") == 1 {
			names = append(names, name)
		}
	}
	return names
}

// TestPeers fills the lines of tgtd and gotgt in README.md's table. Each test is run by itself, so
// that one which ends the target or hangs costs no other; the target is then started anew. It judges nobody.
func TestPeers(t *testing.T) {
	if !*withPeers {
		t.Skip("no -args -peers")
	}
	names := testNames(t)
	dir := t.TempDir()
	binary := filepath.Join(dir, "gotgt-peer")
	if out, err := exec.Command("go", "build", "-o", binary, "../peers/gotgt").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	for name, start := range map[string]func(file string) (*peers.Peer, error){
		"tgtd":  func(file string) (*peers.Peer, error) { return peers.Tgtd(t.Context(), dir, file) },
		"gotgt": func(file string) (*peers.Peer, error) { return peers.Gotgt(t.Context(), dir, binary, file) },
	} {
		t.Run(name, func(t *testing.T) {
			shm, err := os.MkdirTemp("/dev/shm", "conformance-")
			if err != nil {
				t.Fatal(err)
			}
			defer os.RemoveAll(shm)
			file := filepath.Join(shm, name)
			if err := os.WriteFile(file, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(file, 1<<30); err != nil {
				t.Fatal(err)
			}
			p, err := start(file)
			if err != nil {
				t.Fatal(err)
			}
			stop := func() {
				if err := p.Stop(); err != nil {
					t.Error(err)
				}
			}
			defer func() { stop() }()
			var failed, hung, died []string
			passed, skipped := 0, 0
			for _, test := range names {
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				results, err := Run(ctx, p.URL, "ALL."+test)
				timeout := ctx.Err() != nil
				cancel()
				switch {
				case !p.Alive():
					died = append(died, test)
				case timeout || len(results) == 0 || results[0].Outcome == Unfinished:
					hung = append(hung, test)
				case results[0].Outcome == Failed:
					failed = append(failed, test)
				case results[0].Outcome == Skipped:
					skipped++
				default:
					passed++
				}
				if !p.Alive() || timeout || err != nil {
					stop()
					if p, err = start(file); err != nil {
						t.Fatal(err)
					}
				}
			}
			slices.Sort(failed)
			t.Logf("%s: %d tests: %d passed, %d failed, %d skipped, %d hung, %d ended the target\nfailed %v\nhung %v\nended it %v",
				name, len(names), passed, len(failed), skipped, len(hung), len(died), failed, hung, died)
		})
	}
}
