package main

import (
	"errors"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"
)

// reaper waits for every child of PID 1: those it started, whose status it hands on, and orphans, whose
// status nobody wants. os/exec cannot be used beside it: a wait for any child would steal exec's.
type reaper struct {
	// mu is held over fork and registration: a child that ends at once must find its channel.
	mu      sync.Mutex
	waiting map[int]chan syscall.WaitStatus
	signals chan os.Signal
}

func newReaper() *reaper {
	r := &reaper{waiting: map[int]chan syscall.WaitStatus{}, signals: make(chan os.Signal, 1)}
	signal.Notify(r.signals, syscall.SIGCHLD)
	return r
}

// start runs path; the channel gets its status once.
func (r *reaper) start(path string, args []string, attr *syscall.ProcAttr) (pid int, done <-chan syscall.WaitStatus, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	pid, err = syscall.ForkExec(path, append([]string{path}, args...), attr)
	if err != nil {
		return 0, nil, &os.PathError{Op: "start", Path: path, Err: err}
	}
	c := make(chan syscall.WaitStatus, 1)
	r.waiting[pid] = c
	return pid, c, nil
}

// reap never returns. Signals merge, so each one collects all there are; the tick covers a lost one.
func (r *reaper) reap() {
	for {
		for r.reapOne() {
		}
		select {
		case <-r.signals:
		case <-time.After(5 * time.Second):
		}
	}
}

// reapOne collects one child if one has ended.
func (r *reaper) reapOne() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	var status syscall.WaitStatus
	pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
	if errors.Is(err, syscall.EINTR) {
		return true
	}
	if err != nil || pid <= 0 {
		return false
	}
	if c, ok := r.waiting[pid]; ok {
		delete(r.waiting, pid)
		c <- status
	}
	return true
}
