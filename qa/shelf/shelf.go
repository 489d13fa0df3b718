// Package shelf runs a whole shelf as two ordinary processes on files, and breaks it: the promises P1, P2 and P9
// of shelfd without QEMU. qa/lab shows the same on the booted image.
//
// It owns the harness; the tests beside it hold the promises.
package shelf

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Shelf is two controllers over one set of drive files.
type Shelf struct {
	Dir     string
	Binary  string
	Portals map[string]string

	mu    sync.Mutex // guards procs
	procs map[string]*proc
}

// proc is one run of a controller.
type proc struct {
	cmd  *exec.Cmd
	done chan struct{}
	code int
}

// Options of New.
type Options struct {
	Binary                 string
	Dir                    string
	Drives                 int
	DriveBytes, NVRAMBytes int64
	// Window gives the mirror link shared memory beside its socket.
	Window bool
}

// New writes drive files and configurations. Nothing runs yet.
func New(o Options) (*Shelf, error) {
	s := &Shelf{Dir: o.Dir, Binary: o.Binary, Portals: map[string]string{}, procs: map[string]*proc{}}
	for i := range o.Drives {
		path := s.Drive(i)
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			return nil, err
		}
		if err := os.Truncate(path, o.DriveBytes); err != nil {
			return nil, err
		}
	}
	for _, c := range []string{"A", "B"} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		s.Portals[c] = l.Addr().String()
		if err := l.Close(); err != nil {
			return nil, err
		}
	}
	for _, c := range []string{"A", "B"} {
		link := "unix:" + filepath.Join(o.Dir, "mirror.sock")
		mirror := map[string]any{"listen": link}
		if c == "B" {
			mirror = map[string]any{"dial": link}
		}
		if o.Window {
			mirror["window"], mirror["window_create"] = s.Window(), true
		}
		text, err := json.MarshalIndent(map[string]any{
			"shelf": "qa", "controller": c, "secret": "a secret of the qa shelf", "api_listen": "unix:" + s.socket(c),
			"portal_listen": s.Portals[c], "portals": map[string]any{"A": []string{s.Portals["A"]}, "B": []string{s.Portals["B"]}},
			"drives": []string{filepath.Join(o.Dir, "drive*.img")}, "nvram": map[string]any{"path": s.NVRAM(c), "size": o.NVRAMBytes}, "mirror": mirror,
		}, "", "  ")
		if err != nil {
			return nil, err
		}
		if err := os.WriteFile(s.Config(c), text, 0o600); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// Drive, Window, NVRAM, Config, Log and socket are the files of the shelf.
func (s *Shelf) Drive(i int) string     { return filepath.Join(s.Dir, fmt.Sprintf("drive%02d.img", i)) }
func (s *Shelf) Window() string         { return filepath.Join(s.Dir, "mirror.window") }
func (s *Shelf) NVRAM(c string) string  { return filepath.Join(s.Dir, "nvram-"+c+".img") }
func (s *Shelf) Config(c string) string { return filepath.Join(s.Dir, c+".json") }
func (s *Shelf) Log(c string) string    { return filepath.Join(s.Dir, c+".log") }
func (s *Shelf) socket(c string) string { return filepath.Join(s.Dir, c+".sock") }
func (s *Shelf) running(c string) *proc { s.mu.Lock(); defer s.mu.Unlock(); return s.procs[c] }
func (s *Shelf) set(c string, p *proc)  { s.mu.Lock(); defer s.mu.Unlock(); s.procs[c] = p }

// Start runs controller c; its output is appended to Log(c).
func (s *Shelf) Start(c string) error {
	log, err := os.OpenFile(s.Log(c), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	p := &proc{cmd: exec.Command(s.Binary, "--config", s.Config(c)), done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = log, log
	if err := p.cmd.Start(); err != nil {
		return err
	}
	go func() {
		p.cmd.Wait() // its outcome is in ProcessState
		p.code = p.cmd.ProcessState.ExitCode()
		close(p.done)
	}()
	s.set(c, p)
	return nil
}

// Signal sends sig to controller c.
func (s *Shelf) Signal(c string, sig syscall.Signal) error {
	return s.running(c).cmd.Process.Signal(sig)
}

// Kill is a power loss of controller c.
func (s *Shelf) Kill(c string) {
	p := s.running(c)
	if p == nil {
		return
	}
	p.cmd.Process.Kill() // an error says that it has ended already
	<-p.done
}

// Exit waits for controller c to end and returns its code.
func (s *Shelf) Exit(ctx context.Context, c string) (int, error) {
	p := s.running(c)
	select {
	case <-p.done:
		return p.code, nil
	case <-ctx.Done():
		return 0, fmt.Errorf("controller %s did not end: %w", c, ctx.Err())
	}
}

// Close kills both.
func (s *Shelf) Close() {
	s.Kill("A")
	s.Kill("B")
}

// Call sends a request to the API of controller c, and decodes the answer into out where it is not nil.
func (s *Shelf) Call(ctx context.Context, c, method, path string, in, out any) (int, error) {
	var body io.Reader
	if in != nil {
		text, err := json.Marshal(in)
		if err != nil {
			return 0, err
		}
		body = bytes.NewReader(text)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", s.socket(c))
	}}}
	r, err := http.NewRequestWithContext(ctx, method, "http://shelf"+path, body)
	if err != nil {
		return 0, err
	}
	w, err := client.Do(r)
	if err != nil {
		return 0, err
	}
	defer w.Body.Close()
	text, err := io.ReadAll(w.Body)
	if err != nil {
		return w.StatusCode, err
	}
	if w.StatusCode >= 300 {
		return w.StatusCode, fmt.Errorf("%s %s on %s: %d %s", method, path, c, w.StatusCode, strings.TrimSpace(string(text)))
	}
	if out != nil {
		err = json.Unmarshal(text, out)
	}
	return w.StatusCode, err
}

// Status is what the tests look at.
type Status struct {
	Role, Phase, Owner string
	Epoch              uint64
	Partner            struct {
		Connected bool
		Mirror    string
		Transport string
		Fallback  *struct{ Reason string }
	}
	LUNs []struct {
		Name string
		LUN  uint16
	}
	Members []struct{ State string }
	Trouble string
}

// Wait polls controller c until ok, or until its process has ended.
func (s *Shelf) Wait(ctx context.Context, c, what string, ok func(Status) bool) (Status, error) {
	for {
		var st Status
		_, err := s.Call(ctx, c, "GET", "/v1/status", nil, &st)
		if err == nil && ok(st) {
			return st, nil
		}
		p := s.running(c)
		if p == nil {
			return st, fmt.Errorf("controller %s is not %s: it was not started", c, what)
		}
		select {
		case <-p.done:
			return st, fmt.Errorf("controller %s is not %s: its process ended with code %d, see %s", c, what, p.code, s.Log(c))
		case <-ctx.Done():
			return st, fmt.Errorf("controller %s is not %s: %+v, %v", c, what, st, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Hash is over all drive files.
func (s *Shelf) Hash(drives int) (string, error) {
	h := sha256.New()
	for i := range drives {
		f, err := os.Open(s.Drive(i))
		if err != nil {
			return "", err
		}
		_, err = io.Copy(h, f)
		f.Close()
		if err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("%x", h.Sum(nil)), nil
}
