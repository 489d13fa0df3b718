package main

import (
	"errors"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// watchdog resets a hung machine. It is fed from PID 1 itself: a kernel that schedules nothing and a PID 1
// that is stuck are what it is for. A shelfd that hangs is not found here; its partner sees that.
type watchdog struct {
	dev  *os.File
	stop atomic.Bool
}

// startWatchdog arms the board's watchdog, if it has one. A nil *watchdog is one that does nothing.
func startWatchdog(con *console, b *boardFile) *watchdog {
	if b == nil || b.Watchdog == nil {
		return nil
	}
	dev, err := os.OpenFile(b.Watchdog.Path, os.O_WRONLY, 0)
	if err != nil {
		con.step("watchdog", err)
		return nil
	}
	// The ioctl takes whole seconds in an int and returns what the hardware made of them. (u-root's
	// pkg/watchdog passes nanoseconds and gets EINVAL.)
	seconds := b.Watchdog.TimeoutSeconds
	if err := unix.IoctlSetPointerInt(int(dev.Fd()), unix.WDIOC_SETTIMEOUT, seconds); err != nil {
		con.say("watchdog: timeout %d s: %v; it keeps its own", seconds, err)
	}
	set, err := unix.IoctlGetInt(int(dev.Fd()), unix.WDIOC_GETTIMEOUT)
	if err != nil {
		set = seconds
	}
	w := &watchdog{dev: dev}
	con.step("watchdog", nil, "%s resets after %d s", b.Watchdog.Path, set)
	go w.feed(time.Duration(set) * time.Second / 6)
	return w
}

func (w *watchdog) feed(every time.Duration) {
	for !w.stop.Load() {
		w.dev.Write([]byte{0})
		time.Sleep(every)
	}
}

// disarm stops the watchdog: the magic close. Called on the way down only, and then power off must follow.
func (w *watchdog) disarm() error {
	if w == nil {
		return nil
	}
	w.stop.Store(true)
	_, err := w.dev.Write([]byte{'V'})
	return errors.Join(err, w.dev.Close())
}
