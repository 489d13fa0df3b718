package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// process is what processes.json says of one part. Start is field 22 of /proc/PID/stat, in clock ticks since
// boot: pid and start time together name a process for ever, a pid alone does not.
type process struct {
	Name  string `json:"name"`
	PID   int    `json:"pid"`
	Start string `json:"start"`
}

// alive says whether this very process still runs (a zombie does not).
func (p process) alive() bool {
	start, state, err := procStat(p.PID)
	return err == nil && start == p.Start && state != "Z"
}

// procStat reads a process's start time and state.
func procStat(pid int) (start, state string, err error) {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return "", "", err
	}
	// The command's name, field 2, is in parentheses and may contain anything.
	_, rest, ok := strings.Cut(string(text), ") ")
	if i := strings.LastIndex(string(text), ") "); i >= 0 {
		rest = string(text)[i+2:]
	}
	fields := strings.Fields(rest)
	if !ok || len(fields) < 20 {
		return "", "", errors.New("lab: /proc stat is not understood")
	}
	return fields[19], fields[0], nil
}

// Part is one process of the lab. Its methods may be called from any goroutine.
type Part struct {
	Name string
	lab  *Lab
	// command makes the arguments anew for each start: members may have gone.
	command func() (args []string, err error)
	dir     string
	env     []string
	log     string
	// gently asks the process to end; nil: SIGTERM.
	gently func() error
	// patience is how long it may take to end before it is killed.
	patience time.Duration
	// again decides, after an end that nobody asked for, whether and when to start it again; nil: never.
	again func(code int) (restart bool, pause time.Duration)

	mu       sync.Mutex
	cmd      *exec.Cmd
	ended    chan struct{} // closed when cmd's process was waited for
	expected bool          // Kill or End was called: no restart
	exitText string
}

// Start runs the part; it must not be running.
func (p *Part) Start() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd != nil {
		return fmt.Errorf("lab: %s runs already", p.Name)
	}
	p.expected = false
	return p.startLocked()
}

func (p *Part) startLocked() error {
	args, err := p.command()
	if err != nil {
		return fmt.Errorf("lab: %s: %w", p.Name, err)
	}
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return fmt.Errorf("lab: %s: %w", p.Name, err)
	}
	defer log.Close()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = p.dir, log, log
	cmd.Env = append(os.Environ(), p.env...)
	// Its own process group: a Ctrl-C at the terminal reaches only the lab, which then ends the parts in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("lab: %s: %w", p.Name, err)
	}
	ended := make(chan struct{})
	p.cmd, p.ended = cmd, ended
	start, _, _ := procStat(cmd.Process.Pid)
	if err := p.lab.note(process{p.Name, cmd.Process.Pid, start}); err != nil {
		cmd.Process.Kill()
		cmd.Wait()
		p.cmd = nil
		return err
	}
	go p.watch(cmd, ended)
	return nil
}

// watch waits for the process and starts it again where that is its rule.
func (p *Part) watch(cmd *exec.Cmd, ended chan struct{}) {
	cmd.Wait()
	p.lab.forget(p.Name)
	p.mu.Lock()
	p.cmd = nil
	p.exitText = cmd.ProcessState.String()
	restart, pause := false, time.Duration(0)
	if p.again != nil && !p.expected {
		restart, pause = p.again(cmd.ProcessState.ExitCode())
	}
	p.mu.Unlock()
	close(ended)
	if !restart {
		return
	}
	time.Sleep(pause)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd == nil && !p.expected {
		if err := p.startLocked(); err != nil {
			p.lab.o.Say("%v", err)
		}
	}
}

// PID is the process's id, or zero.
func (p *Part) PID() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd == nil {
		return 0
	}
	return p.cmd.Process.Pid
}

// Running says whether the process runs.
func (p *Part) Running() bool { return p.PID() != 0 }

// Log is the path of its output.
func (p *Part) Log() string { return p.log }

// Ended tells how the last run ended.
func (p *Part) Ended() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.exitText
}

func (p *Part) signal(s syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd == nil {
		return fmt.Errorf("lab: %s does not run", p.Name)
	}
	return p.cmd.Process.Signal(s)
}

// Stop freezes the process (SIGSTOP): for a controller, a hang.
func (p *Part) Stop() error { return p.signal(syscall.SIGSTOP) }

// Cont lets a frozen process go on.
func (p *Part) Cont() error { return p.signal(syscall.SIGCONT) }

// Kill ends the process with SIGKILL, for a controller the loss of its power, and waits until it is gone.
func (p *Part) Kill() error {
	p.mu.Lock()
	p.expected = true
	cmd, ended := p.cmd, p.ended
	p.mu.Unlock()
	if cmd == nil {
		return nil
	}
	if err := cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("lab: %s: %w", p.Name, err)
	}
	<-ended
	return nil
}

// End asks the process to end, and kills it when it does not.
func (p *Part) End() error {
	p.mu.Lock()
	p.expected = true
	cmd, ended := p.cmd, p.ended
	p.mu.Unlock()
	if cmd == nil {
		return nil
	}
	began := time.Now()
	cmd.Process.Signal(syscall.SIGCONT) // a frozen one could not hear us
	ask := p.gently
	if ask == nil {
		ask = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	}
	err := ask()
	if err == nil {
		select {
		case <-ended:
			p.lab.o.Say("%s ended (%.1f s)", p.Name, time.Since(began).Seconds())
			return nil
		case <-time.After(p.patience):
			err = fmt.Errorf("did not end in %s", p.patience)
		}
	}
	p.lab.o.Say("%s: %v: killed", p.Name, err)
	return p.Kill()
}

// note and forget keep processes.json.
func (l *Lab) note(p process) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.running[p.Name] = p
	return l.saveLocked()
}

func (l *Lab) forget(name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.running, name)
	l.saveLocked() // a stale entry is harmless: its start time tells
}

func (l *Lab) saveLocked() error {
	list := make([]process, 0, len(l.running))
	for _, p := range l.running {
		list = append(list, p)
	}
	return writeJSON(l.path("processes.json"), 0o644, list)
}

// endOrphans ends what a lab on this directory left when it was killed.
func (l *Lab) endOrphans() error {
	var left []process
	if err := readJSON(l.path("processes.json"), &left); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("lab: %w; remove the file when none of the lab's processes is left", err)
	}
	for _, p := range left {
		if !p.alive() {
			continue
		}
		l.o.Say("ending %s (pid %d), left by an earlier run", p.Name, p.PID)
		for _, s := range []syscall.Signal{syscall.SIGCONT, syscall.SIGTERM, syscall.SIGKILL} {
			if p.alive() {
				syscall.Kill(p.PID, s)
			}
			for end := time.Now().Add(5 * time.Second); s != syscall.SIGCONT && p.alive() && time.Now().Before(end); {
				time.Sleep(20 * time.Millisecond)
			}
		}
		if p.alive() {
			return fmt.Errorf("lab: %s, pid %d, of an earlier run does not end", p.Name, p.PID)
		}
	}
	return os.Remove(l.path("processes.json"))
}
