package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/raid/drive"
)

// console collects what a controller says.
type console struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.b.Write(p)
}

func (c *console) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.b.String()
}

// bench is a shelf in a directory: twelve drives as files, controller A's NVRAM as a file.
type bench struct {
	t   *testing.T
	dir string
}

const benchNVRAM = 32 << 20

func (b *bench) path(name string) string { return filepath.Join(b.dir, name) }

func (b *bench) config(shelf, controller string, size int64) string {
	b.t.Helper()
	text, err := json.Marshal(map[string]any{
		"shelf": shelf, "controller": controller, "secret": "0123456789abcdef", "api_listen": "unix:" + b.path("api"),
		"portal_listen": "127.0.0.1:0", "portals": map[string][]string{"A": {"127.0.0.1:3260"}, "B": {"127.0.0.1:3261"}},
		"drives": []string{b.path("drive*")}, "nvram": map[string]any{"path": b.path("nvram"), "size": size},
		"mirror": map[string]string{"listen": "unix:" + b.path("partner")},
	})
	if err != nil {
		b.t.Fatal(err)
	}
	path := b.path("shelf.json")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		b.t.Fatal(err)
	}
	return path
}

// start runs a controller until it has said want or ended, and stops it.
func (b *bench) start(path, want string, then func()) (code int, said string, err error) {
	b.t.Helper()
	c, err := LoadConfig(path)
	if err != nil {
		b.t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	out, ended := &console{}, make(chan struct{})
	go func() {
		defer close(ended)
		code, err = serve(ctx, c, out)
	}()
	for deadline := time.Now().Add(2 * time.Minute); ; {
		select {
		case <-ended:
			return code, out.String(), err
		case <-time.After(10 * time.Millisecond):
		}
		if strings.Contains(out.String(), want) {
			break
		}
		if time.Now().After(deadline) {
			b.t.Fatalf("it never said %q:\n%s", want, out)
		}
	}
	if then != nil {
		then()
	}
	stop()
	<-ended
	return code, out.String(), err
}

func (b *bench) post(path string) {
	b.t.Helper()
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", b.path("api"))
	}}
	defer tr.CloseIdleConnections()
	res, err := (&http.Client{Transport: tr}).Post("http://shelf"+path, "application/json", strings.NewReader("{}"))
	if err != nil {
		b.t.Fatal(err)
	}
	defer res.Body.Close()
	if res.StatusCode/100 != 2 {
		b.t.Fatalf("POST %s: %s", path, res.Status)
	}
}

// What the operator sees of a controller whose NVRAM module was exchanged, swapped with the partner's, emptied or
// truncated: a precise refusal that says what to do, and a module that is left as it was.
func TestNVRAMModules(t *testing.T) {
	dir, err := os.MkdirTemp("", "nv") // short: a socket's path has 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	b := &bench{t, dir}
	for i := range 12 {
		if err := drive.Create(b.path(fmt.Sprintf("drive%02d", i)), 64<<20); err != nil {
			t.Fatal(err)
		}
	}
	const owner = "role=owner"
	mine := b.config("s1", "A", benchNVRAM)
	code, said, err := b.start(mine, "role=no-pool", func() { b.post("/v1/pool") })
	if code != exitOK || err != nil {
		t.Fatalf("%d, %v:\n%s", code, err, said)
	}
	if code, said, err := b.start(mine, owner, nil); code != exitOK || err != nil || !strings.Contains(said, owner) {
		t.Fatalf("the pool that was made: %d, %v:\n%s", code, err, said)
	}
	whole, err := os.ReadFile(b.path("nvram"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		what    string
		shelf   string
		side    string
		size    int64
		change  func() error
		refusal []string
	}{
		{"another shelf's", "s2", "A", benchNVRAM, nil, []string{"belongs to another log", "of shelf s1, controller A", "this is shelf s2", "--erase-nvram", "s1/A"}},
		{"the partner's", "s1", "B", benchNVRAM, nil, []string{"belongs to the partner controller", "of controller A, this is controller B", "Exchange the two modules"}},
		{"truncated", "s1", "A", 0, func() error { return os.Truncate(b.path("nvram"), benchNVRAM/2) }, []string{"changed its size", "33554432", "16777216", "takeover on the partner"}},
		{"truncated, its size configured", "s1", "A", benchNVRAM, func() error { return os.Truncate(b.path("nvram"), benchNVRAM/2) }, []string{"too small", "16777216", "33554432 wanted"}},
		{"grown", "s1", "A", 0, func() error { return os.Truncate(b.path("nvram"), 2*benchNVRAM) }, []string{"changed its size", "Set its size to 33554432"}},
	} {
		if c.change != nil {
			if err := c.change(); err != nil {
				t.Fatal(err)
			}
		}
		before, err := os.ReadFile(b.path("nvram"))
		if err != nil {
			t.Fatal(err)
		}
		code, said, err := b.start(b.config(c.shelf, c.side, c.size), owner, nil)
		if code != exitRefused || err == nil {
			t.Errorf("%s: code %d, %v:\n%s", c.what, code, err, said)
			continue
		}
		for _, want := range c.refusal {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v; should say %q", c.what, err, want)
			}
		}
		if after, err := os.ReadFile(b.path("nvram")); err != nil || !bytes.Equal(before, after) {
			t.Errorf("%s: the refused module was changed: %v", c.what, err)
		}
		if err := os.WriteFile(b.path("nvram"), whole, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// Put back, it serves again.
	mine = b.config("s1", "A", benchNVRAM)
	if code, said, err := b.start(mine, owner, nil); code != exitOK || err != nil || !strings.Contains(said, owner) {
		t.Fatalf("put back: %d, %v:\n%s", code, err, said)
	}
	// Erased, as only its right name allows, it is empty: the controller runs, does not serve, and says why.
	if code := run([]string{"--config", mine, "--erase-nvram", "s1/B"}); code != exitRefused {
		t.Errorf("erased by a wrong name: %d", code)
	}
	if code := run([]string{"--config", mine, "--erase-nvram", "s1/A"}); code != exitOK {
		t.Errorf("erase: %d", code)
	}
	code, said, err = b.start(mine, "it cannot serve", nil)
	if code != exitOK || err != nil || strings.Contains(said, owner) {
		t.Fatalf("emptied: %d, %v:\n%s", code, err, said)
	}
	for _, want := range []string{"NVRAM is empty", "region carries no log", "does not hold the pool's log", "order a takeover on the partner"} {
		if !strings.Contains(said, want) {
			t.Errorf("emptied: it should say %q:\n%s", want, said)
		}
	}
}
