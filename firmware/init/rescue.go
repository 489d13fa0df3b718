package main

import (
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	shellPath = "/bbin/gosh"
	// shellPause keeps a shell that ends at once from filling the console.
	shellPause = 2 * time.Second
)

// rescue gives the one who sits at the serial console a shell.
type rescue struct {
	con      *console
	children *reaper
}

func newRescue(con *console, children *reaper) *rescue { return &rescue{con: con, children: children} }

// listen waits for Enter on the console and starts a shell, again and again. At once: without Enter the
// first time.
func (r *rescue) listen(atOnce bool) {
	for {
		// Opened anew for each round: the shell's session leader hangs the terminal up when it ends.
		tty, err := os.OpenFile(r.con.path, os.O_RDWR|unix.O_NOCTTY, 0)
		if err != nil {
			r.con.say("rescue: no shell on this console: %v", err)
			return
		}
		if !atOnce {
			var one [256]byte
			n, err := tty.Read(one[:])
			if err != nil || n == 0 {
				tty.Close()
				time.Sleep(shellPause)
				continue
			}
			if !strings.ContainsAny(string(one[:n]), "\r\n") {
				tty.Close()
				continue
			}
		}
		atOnce = false
		r.shell(tty)
		tty.Close()
		time.Sleep(shellPause)
	}
}

func (r *rescue) shell(tty *os.File) {
	r.con.say("rescue: a shell; exit returns, shelfd keeps running, poweroff goes down hard")
	_, done, err := r.children.start(shellPath, nil, &syscall.ProcAttr{
		Dir:   "/",
		Env:   []string{"PATH=/bbin:/bin", "HOME=/", "TERM=vt100", "USER=root"},
		Files: []uintptr{tty.Fd(), tty.Fd(), tty.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: 0},
	})
	if err != nil {
		r.con.say("rescue: %v", err)
		return
	}
	<-done
	r.con.say("rescue: shell ended; press Enter for another")
}
