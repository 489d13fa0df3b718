package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"
)

// Exit codes of shelfd; see the package comment.
const (
	exitStopped = 0
	exitConfig  = 1
	exitCrash   = 2
	exitFenced  = 3
	exitRefused = 4
)

const (
	firstPause = time.Second
	longPause  = 30 * time.Second
	// goodRun is how long shelfd must have run for its next crash to count as the first.
	goodRun = time.Minute
	// lastWords is how much of a line of shelfd's output is passed on at once.
	lastWords = 64 << 10
)

// serving begins the line with which shelfd says that it does.
var serving = []byte("ledge: serving")

// decision is what follows an exit: whether to start again, after what time, and why.
type decision struct {
	restart bool
	pause   time.Duration
	why     string
}

// decide is the exit-code contract. crashes counts crashes in a row, this one included.
func decide(status syscall.WaitStatus, crashes int) decision {
	if status.Exited() {
		switch status.ExitStatus() {
		case exitStopped:
			return decision{why: "stopped"}
		case exitConfig:
			return decision{why: "its configuration is wrong; a restart cannot help. Press Enter for a rescue shell"}
		case exitFenced:
			return decision{true, 0, "fenced by the partner; starting again as standby"}
		case exitRefused:
			return decision{true, longPause, "refused to serve; trying again"}
		}
	}
	pause := longPause
	if crashes < 6 {
		pause = min(longPause, firstPause<<max(0, crashes-1))
	}
	return decision{true, pause, describe(status)}
}

func describe(status syscall.WaitStatus) string {
	if status.Signaled() {
		return "killed by " + status.Signal().String()
	}
	return fmt.Sprintf("crashed with code %d", status.ExitStatus())
}

// supervisor keeps one daemon running.
type supervisor struct {
	con      *console
	children *reaper
	sleep    func(time.Duration) // a test's clock

	mu       sync.Mutex
	pid      int // 0: not running
	stopping bool
	idle     chan struct{} // closed when serve has returned
	serving  bool
}

func newSupervisor(con *console, children *reaper) *supervisor {
	return &supervisor{con: con, children: children, sleep: time.Sleep, idle: make(chan struct{})}
}

// serve runs the daemon until it exits for good or stop was called.
func (s *supervisor) serve(path string, args ...string) {
	s.mu.Lock()
	s.serving = true
	s.mu.Unlock()
	defer close(s.idle)
	crashes := 0
	for {
		began := s.con.now()
		status, err := s.once(path, args)
		if err != nil {
			s.con.say("shelfd: %v", err)
			status = syscall.WaitStatus(exitCrash << 8)
		}
		if s.con.now()-began > goodRun {
			crashes = 0
		}
		crashes++
		d := decide(status, crashes)
		if s.isStopping() {
			s.con.say("shelfd: %s", "stopped")
			return
		}
		if !d.restart {
			s.con.say("shelfd: %s", d.why)
			return
		}
		if status.Exited() && (status.ExitStatus() == exitFenced || status.ExitStatus() == exitRefused) {
			crashes = 0
		}
		s.con.say("shelfd: %s; next start in %s", d.why, d.pause)
		s.sleep(d.pause)
		if s.isStopping() {
			return
		}
	}
}

// once runs the daemon to its end, its output on the console.
func (s *supervisor) once(path string, args []string) (syscall.WaitStatus, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer r.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		w.Close()
		return 0, err
	}
	defer null.Close()
	s.mu.Lock()
	if s.stopping {
		s.mu.Unlock()
		w.Close()
		return 0, nil
	}
	pid, done, err := s.children.start(path, args, &syscall.ProcAttr{
		Dir:   "/",
		Env:   []string{"PATH=/bin:/bbin", "HOME=/", "GOTRACEBACK=all"},
		Files: []uintptr{null.Fd(), w.Fd(), w.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	s.pid = pid
	s.mu.Unlock()
	w.Close()
	if err != nil {
		return 0, err
	}
	s.con.say("shelfd: started, pid %d", pid)
	passThrough(r, s.con)
	status := <-done
	s.mu.Lock()
	s.pid = 0
	s.mu.Unlock()
	return status, nil
}

// passThrough copies whole lines, so that ours and the daemon's never mix; an endless line is cut.
func passThrough(from *os.File, to *console) {
	in := bufio.NewReaderSize(from, lastWords)
	for {
		line, err := in.ReadSlice('\n')
		if len(line) > 0 {
			if line[len(line)-1] != '\n' {
				line = append(append([]byte(nil), line...), '\n')
			}
			to.Write(line)
			if bytes.HasPrefix(line, serving) {
				to.say("shelfd    serves") // with the time since the kernel started
			}
		}
		if err != nil && err != bufio.ErrBufferFull {
			return
		}
	}
}

func (s *supervisor) isStopping() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stopping
}

// stop ends the daemon: SIGTERM, after patience SIGKILL. It returns when the daemon is gone.
func (s *supervisor) stop(patience time.Duration) {
	s.mu.Lock()
	s.stopping = true
	pid, serving := s.pid, s.serving
	s.mu.Unlock()
	if !serving || pid == 0 {
		return
	}
	syscall.Kill(pid, syscall.SIGTERM)
	select {
	case <-s.idle:
	case <-time.After(patience):
		s.con.say("shelfd: did not stop in %s: killed", patience)
		syscall.Kill(pid, syscall.SIGKILL)
		<-s.idle
	}
}
