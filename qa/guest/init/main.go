// Command init is PID 1 of the guest in which a stock initiator is tested. It brings the machine to where a Debian
// host is after its boot, as far as block devices go, and runs what the test asks for.
//
// # Order
//
//  1. boot.go    in the initramfs: proc, sys, dev; the modules, in the order of /modules/list; the root file system,
//     guest.root= of the command line; then into it
//  2. serve.go   /run, /tmp; the networks, guest.net=; udevd; iscsid and multipathd where there is a network
//  3. serve.go   "guest: up" on the console, and package agent on the virtio serial port
//
// Steps 2 and 3 are a child's, the same program: PID 1 then only waits for whatever ends, so that a program's exit
// status has one who wants it. When the child ends, PID 1 powers the machine off.
//
// What fails is said on the console and ends the machine: a test that waits must not wait for nothing.
package main

import (
	"fmt"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

func main() {
	var err error
	switch {
	case len(os.Args) > 1 && os.Args[1] == "serve":
		if err = serve(); err == nil {
			return
		}
		say("%v", err)
		os.Exit(1)
	case os.Getpid() != 1:
		fmt.Fprintln(os.Stderr, "init: this is a guest's PID 1; it does nothing elsewhere")
		os.Exit(1)
	}
	if err = boot(); err == nil {
		err = supervise()
	}
	if err != nil {
		say("FAILED: %v", err)
	}
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {} // PID 1 must not end
}

// say writes a line on the console.
func say(format string, args ...any) { fmt.Printf("guest: "+format+"\n", args...) }

// argument is the value of name= on the kernel's command line.
func argument(name string) string {
	text, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return ""
	}
	for _, word := range strings.Fields(string(text)) {
		if v, ok := strings.CutPrefix(word, name+"="); ok {
			return v
		}
	}
	return ""
}

// supervise starts the child and waits for every process until the child ends.
func supervise() error {
	child, err := syscall.ForkExec("/proc/self/exe", []string{"init", "serve"},
		&syscall.ProcAttr{Env: environment, Files: []uintptr{0, 1, 2}})
	if err != nil {
		return fmt.Errorf("start the child: %w", err)
	}
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case err == syscall.EINTR:
		case err != nil:
			return fmt.Errorf("wait: %w", err)
		case pid == child && status.ExitStatus() != 0:
			return fmt.Errorf("the child ended with %d", status)
		case pid == child:
			return nil
		}
	}
}

var environment = []string{"PATH=/sbin:/usr/sbin:/bin:/usr/bin", "HOME=/root", "LC_ALL=C", "TERM=dumb"}
