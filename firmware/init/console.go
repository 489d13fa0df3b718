package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// console says what happens, one line a fact, with the seconds since the kernel started.
type console struct {
	path string

	mu  sync.Mutex
	out io.Writer
	now func() time.Duration
}

// openConsole opens /dev/device, or /dev/console for "". It falls back to standard output, which the
// kernel opened for PID 1.
func openConsole(device string) *console {
	path := "/dev/console"
	if device != "" {
		path = filepath.Join("/dev", device)
	}
	c := &console{path: path, out: os.Stdout, now: sinceKernelStart}
	// O_NOCTTY: PID 1 must not get a controlling terminal, else Ctrl-C on it would reach PID 1.
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NOCTTY, 0)
	if err == nil {
		c.out = f
	}
	return c
}

// sinceKernelStart is CLOCK_BOOTTIME: it starts with the kernel.
func sinceKernelStart() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

func (c *console) say(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	fmt.Fprintf(c.out, "[%8.3f] ledge init: %s\n", c.now().Seconds(), fmt.Sprintf(format, args...))
}

// step reports the end of a step: what came of it, or why it failed.
func (c *console) step(name string, err error, detail ...any) {
	text := "ready"
	if len(detail) > 0 {
		text = fmt.Sprintf(detail[0].(string), detail[1:]...)
	}
	if err != nil {
		text = "FAILED: " + err.Error()
	}
	c.say("%-9s %s", name, text)
}

// Write passes a child's output through, whole writes at a time.
func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.out.Write(p)
}
