package agent

import (
	"context"
	"errors"
	"net"
	"strings"
	"sync"
	"testing"
)

// connect serves one end of a pipe and returns the other end's client.
func connect(t *testing.T) *Client {
	t.Helper()
	a, b := net.Pipe()
	served := make(chan error, 1)
	go func() { served <- Serve(a, Hello{Version: Version, Kernel: "test"}) }()
	c, err := NewClient(b)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = c.Close()
		if err := <-served; err != nil {
			t.Errorf("the guest's end: %v", err)
		}
	})
	return c
}

func TestCommands(t *testing.T) {
	c := connect(t)
	for _, x := range []struct {
		r      Request
		code   int
		output string
		why    string
	}{
		{Request{Argv: []string{"sh", "-c", "echo out; echo err >&2; exit 3"}}, 3, "out\nerr\n", ""},
		{Request{Argv: []string{"cat"}, Input: []byte("a\nb\x00\xff")}, 0, "a\nb\x00\xff", ""},
		{Request{Argv: []string{"/no/such/program"}}, -1, "", "no such file"},
		{Request{}, -1, "", "no command"},
		{Request{Argv: []string{"sh", "-c", "sleep 100 & sleep 100"}, Seconds: 1}, -1, "", "killed after 1 s"},
		{Request{Argv: []string{"sh", "-c", "kill -9 $$"}}, -1, "", "killed"},
	} {
		a, err := c.Do(t.Context(), x.r)
		if err != nil {
			t.Fatal(err)
		}
		if a.Code != x.code || string(a.Output) != x.output || !strings.Contains(a.Error, x.why) {
			t.Errorf("%q: code %d, output %q, error %q", x.r.Argv, a.Code, a.Output, a.Error)
		}
	}
}

// TestOutputIsBounded: a command that never stops talking costs MaxOutput bytes.
func TestOutputIsBounded(t *testing.T) {
	a, err := connect(t).Do(t.Context(), Request{Argv: []string{"head", "-c", "3000000", "/dev/zero"}})
	if err != nil || len(a.Output) != MaxOutput || !a.Cut || a.Code != 0 {
		t.Errorf("%d bytes, cut %v, code %d, %v", len(a.Output), a.Cut, a.Code, err)
	}
}

// TestManyAtOnce: more than run at once, each gets its own answer.
func TestManyAtOnce(t *testing.T) {
	c := connect(t)
	var all sync.WaitGroup
	for i := range 4 * MaxUnderWay {
		all.Add(1)
		go func() {
			defer all.Done()
			word := strings.Repeat("x", i)
			a, err := c.Do(t.Context(), Request{Argv: []string{"echo", word}})
			if err != nil || string(a.Output) != word+"\n" {
				t.Errorf("%d: %q, %v", i, a.Output, err)
			}
		}()
	}
	all.Wait()
}

func TestGuestGoes(t *testing.T) {
	a, b := net.Pipe()
	go func() {
		_ = write(a, Hello{Version: Version})
		_ = newLines(a).next(&Request{})
		a.Close()
	}()
	c, err := NewClient(b)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Do(context.Background(), Request{Argv: []string{"true"}}); !errors.Is(err, ErrGone) {
		t.Errorf("%v", err)
	}
	_ = c.Close()
}
