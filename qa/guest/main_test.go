package guest

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/qa/guest/agent"
	"github.com/ledge-storage/ledge/qa/lab"
)

// patience is how long one thing may take on a machine that is loaded; nothing is proved by its length.
const patience = 4 * time.Minute

// The parts, built once, and the initiator's guest that the tests share: a boot costs 20 s and more.
var (
	build = sync.OnceValues(func() (*Built, error) {
		tree, err := filepath.Abs("../..")
		if err != nil {
			return nil, err
		}
		if missing := lab.MissingPackages(); len(missing) > 0 {
			return nil, fmt.Errorf("needed and missing: apt-get install --no-install-recommends %s (make packages)", strings.Join(missing, " "))
		}
		return Build(context.Background(), Options{Tree: tree, Say: func(format string, args ...any) { fmt.Printf("guest: "+format+"\n", args...) }})
	})
	shared = sync.OnceValues(startHost)
	ending []func()
	// failures are said again at the very end: CI keeps the last lines, and a guest's logs are long.
	failures struct {
		sync.Mutex
		said []string
	}
)

// again has what a failed test should be remembered by said at the end.
func again(t *testing.T, format string, args ...any) {
	failures.Lock()
	defer failures.Unlock()
	failures.said = append(failures.said, t.Name()+": "+fmt.Sprintf(format, args...))
}

func TestMain(m *testing.M) {
	flag.Parse()
	code := m.Run()
	for _, f := range ending {
		f()
	}
	for _, why := range failures.said {
		fmt.Println("failed: " + why)
	}
	os.Exit(code)
}

// host is a guest with two paths.
type host struct {
	*Machine
	paths []*Path
}

func startHost() (*host, error) {
	b, err := build()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "ledge-guest-")
	if err != nil {
		return nil, err
	}
	ending = append(ending, func() { os.RemoveAll(dir) })
	h := &host{}
	for range 2 {
		p, err := NewPath()
		if err != nil {
			return nil, err
		}
		ending = append(ending, func() { p.Close() })
		h.paths = append(h.paths, p)
	}
	if h.Machine, err = b.Start(context.Background(), MachineOptions{Dir: dir, Paths: h.paths}); err != nil {
		return nil, err
	}
	// First of all, before what the guest's disks lead to is taken away: it would wait for them.
	ending = append([]func(){func() {
		if err := h.Close(); err != nil {
			fmt.Println(err)
		}
	}}, ending...)
	return h, nil
}

// sharedHost is the guest that all tests of an initiator use, one after the other.
func sharedHost(t *testing.T) *host {
	t.Helper()
	if testing.Short() {
		t.Skip("boots a guest")
	}
	h, err := shared()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			a, err := h.Do(context.Background(), agent.Request{Argv: []string{"sh", "-c", "dmesg | tail -60; tail -n 60 /run/log/*"}, Seconds: 60})
			t.Logf("the guest's logs (%v):\n%s", err, a.Output)
		}
	})
	return h
}

// try runs a shell script in the guest.
func (m *Machine) try(t *testing.T, script string) agent.Answer {
	t.Helper()
	// Not the test's context: what cleans up after a test runs when that has ended.
	ctx, cancel := context.WithTimeout(context.Background(), patience+10*time.Second)
	defer cancel()
	a, err := m.Do(ctx, agent.Request{Argv: []string{"sh", "-c", script}, Seconds: int(patience.Seconds())})
	if err != nil {
		again(t, "%s: %v", script, err)
		t.Fatalf("%s: %v\n%s", script, err, m.Console())
	}
	return a
}

// sh is try, for what must succeed; it returns what was printed.
func (m *Machine) sh(t *testing.T, script string) string {
	t.Helper()
	a := m.try(t, script)
	if a.Code != 0 {
		again(t, "%s: exit %d %s\n%s", script, a.Code, a.Error, a.Output)
		t.Fatalf("%s: exit %d %s\n%s", script, a.Code, a.Error, a.Output)
	}
	return string(a.Output)
}

// eventually asks until why is "".
func eventually(t *testing.T, what string, ask func() (why string)) {
	t.Helper()
	why := "never asked"
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		if why = ask(); why == "" {
			return
		}
	}
	again(t, "%s: not in %s: %s", what, patience, why)
	t.Fatalf("%s: not in %s: %s", what, patience, why)
}
