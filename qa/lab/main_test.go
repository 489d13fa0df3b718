package lab

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/host/api"
)

// build is where the programs and the image are: a directory of this run, so that a build that goes on beside
// it does not exchange them under a running system.
var build string

// TestMain builds the programs and the image, which takes seconds where nothing changed, so that the tests
// never run against yesterday's.
func TestMain(m *testing.M) {
	flag.Parse()
	if testing.Short() {
		os.Exit(m.Run())
	}
	code := 1
	if err := prepareMachine(); err != nil {
		fmt.Fprintln(os.Stderr, err)
	} else {
		code = m.Run()
	}
	os.RemoveAll(build)
	os.Exit(code)
}

func prepareMachine() (err error) {
	root, err := filepath.Abs("../..")
	if err != nil {
		return err
	}
	if build, err = os.MkdirTemp("", "ledge-lab-build-"); err != nil {
		return err
	}
	say := func(format string, args ...any) { fmt.Printf("lab: "+format+"\n", args...) }
	if err := InstallPackages(context.Background(), say); err != nil {
		return err
	}
	for _, args := range [][]string{
		{"build", "-trimpath", "-ldflags", "-s -w -buildid=", "-o", filepath.Join(build, "bin") + "/", "./firmware/shelfd", "./host/hostd", "./host/ledge"},
		{"run", "./image", "-disk", "-o", filepath.Join(build, "image")},
	} {
		if args[0] == "build" {
			if err := os.MkdirAll(filepath.Join(build, "bin"), 0o755); err != nil {
				return err
			}
		}
		cmd := exec.Command("go", args...)
		cmd.Dir, cmd.Env = root, os.Environ()
		if args[0] == "build" {
			cmd.Env = append(cmd.Env, "CGO_ENABLED=0")
		}
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
		}
	}
	return nil
}

// needMachine skips what boots or runs whole systems.
func needMachine(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("boots a whole system")
	}
}

// newLab prepares a system that is closed, and its directory removed, when the test ends. When the test
// failed, the logs stay and are named.
func newLab(t *testing.T, o Options) *Lab {
	t.Helper()
	dir, err := os.MkdirTemp("", "ledge-lab-")
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	o.Dir, o.Image, o.Binaries = dir, filepath.Join(build, "image"), filepath.Join(build, "bin")
	o.Say = func(format string, args ...any) {
		t.Logf("[%6.1f s] %s", time.Since(began).Seconds(), fmt.Sprintf(format, args...))
	}
	l, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		if !t.Failed() {
			os.RemoveAll(dir)
			return
		}
		os.RemoveAll(filepath.Join(dir, "drives"))
		os.RemoveAll(filepath.Join(dir, "nvram"))
		os.Remove(filepath.Join(dir, "cache.img"))
		t.Logf("logs are kept in %s", dir)
		for _, path := range []string{l.A.ConsoleLog(), l.B.ConsoleLog(), l.Agent.Log()} {
			t.Log(tail(path, 25))
		}
	})
	return l
}

// testContext ends a little before the test's own limit, so that a hang ends in a report.
func testContext(t *testing.T, limit time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	return ctx
}

// command runs a program of this machine and returns what it said.
func command(t *testing.T, ctx context.Context, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// ledge runs the operator's command against the lab and returns its standard output.
func (l *Lab) ledge(t *testing.T, ctx context.Context, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(ctx, filepath.Join(build, "bin", "ledge"), args...)
	cmd.Env = append(os.Environ(), "LEDGE_RUN="+l.Dir(), "LEDGE_SOCKET="+l.AgentSocket())
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("ledge %s: %w: %s%s", strings.Join(args, " "), err, out, said.String())
	}
	return string(out), err
}

// must is ledge for commands that have to succeed.
func (l *Lab) must(t *testing.T, ctx context.Context, args ...string) string {
	t.Helper()
	out, err := l.ledge(t, ctx, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// show is `ledge volume show NAME --json`, when everything acknowledged has been packed.
func (l *Lab) show(t *testing.T, ctx context.Context, name string) (v api.Volume) {
	t.Helper()
	err := poll(ctx, func() error {
		var now api.Volume
		if err := json.Unmarshal([]byte(l.must(t, ctx, "volume", "show", name, "--json")), &now); err != nil {
			return permanent{err}
		}
		v = now
		if v.PendingBytes > 0 {
			return fmt.Errorf("%d bytes of volume %s are not packed yet", v.PendingBytes, name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// url is the volume as libiscsi's programs want it.
func url(v api.Volume) string { return fmt.Sprintf("iscsi://%s/%s/%d", v.Portal, v.IQN, v.LUN) }
