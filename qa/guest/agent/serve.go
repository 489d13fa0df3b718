package agent

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"sync"
	"syscall"
	"time"
)

// Serve says hello and runs what is asked for until rw ends; then it waits for the commands under way.
func Serve(rw io.ReadWriter, hello Hello) error {
	if err := write(rw, hello); err != nil {
		return err
	}
	var (
		mu      sync.Mutex // one answer at a time
		running sync.WaitGroup
		places  = make(chan struct{}, MaxUnderWay)
	)
	defer running.Wait()
	in := newLines(rw)
	for {
		places <- struct{}{}
		var r Request
		if err := in.next(&r); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		running.Add(1)
		go func() {
			defer running.Done()
			a := run(r)
			mu.Lock()
			defer mu.Unlock()
			_ = write(rw, a) // a line that broke shows to the reader, too
			<-places
		}()
	}
}

// run runs one command. It gets a process group of its own, so that its time limit reaches what it started.
func run(r Request) Answer {
	a := Answer{ID: r.ID, Code: -1}
	if len(r.Argv) == 0 {
		a.Error = "no command"
		return a
	}
	out := &head{}
	cmd := exec.Command(r.Argv[0], r.Argv[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(r.Input), out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = time.Second // a child that lives on with our pipe must not hold the answer
	if err := cmd.Start(); err != nil {
		a.Error = err.Error()
		return a
	}
	var late bool
	var limit *time.Timer
	var once sync.Mutex
	if r.Seconds > 0 {
		limit = time.AfterFunc(time.Duration(r.Seconds)*time.Second, func() {
			once.Lock()
			defer once.Unlock()
			late = true
			_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		})
	}
	err := cmd.Wait()
	if limit != nil {
		limit.Stop()
	}
	once.Lock()
	defer once.Unlock()
	a.Output, a.Cut = out.take()
	a.Code = cmd.ProcessState.ExitCode()
	switch {
	case late:
		a.Error = fmt.Sprintf("killed after %d s", r.Seconds)
	case a.Code < 0:
		a.Error = err.Error()
	}
	return a
}

// head keeps the first MaxOutput bytes.
type head struct {
	mu   sync.Mutex
	kept []byte
	cut  bool
}

func (h *head) Write(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := min(len(p), MaxOutput-len(h.kept))
	h.kept = append(h.kept, p[:n]...)
	h.cut = h.cut || n < len(p)
	return len(p), nil
}

func (h *head) take() ([]byte, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return bytes.Clone(h.kept), h.cut
}
