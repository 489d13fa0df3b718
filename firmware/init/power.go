package main

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// stopPatience is how long shelfd may take to hand over cleanly. What it leaves is in NVRAM, so a kill after
// it loses nothing.
const stopPatience = 20 * time.Second

// powerOff is the way down.
type powerOff struct {
	con *console
	dog *watchdog
}

// run stops shelfd and powers off; it returns only if the machine refuses to go down.
func (p *powerOff) run(why os.Signal, sup *supervisor) {
	p.con.say("going down: %s", why)
	sup.stop(stopPatience)
	if err := p.dog.disarm(); err != nil {
		p.con.say("watchdog: %v", err)
	}
	p.con.say("power off")
	unix.Sync()
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		p.con.say("power off: %v; it is safe to cut the power now", err)
	}
}

// ctrlAltDelToInit makes Ctrl-Alt-Del a SIGINT to PID 1 instead of a reset.
func ctrlAltDelToInit() { unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF) }

// inputEvent is struct input_event of <linux/input.h> on a 64-bit machine.
//
//	offset  size  field
//	0       16    time
//	16      2     type (1: key)
//	18      2     code (116: power)
//	20      4     value (1: pressed)
const (
	inputEventBytes = 24
	eventKey        = 1
	keyPower        = 116
)

// powerPressed says whether one input event is a press of the power button.
func powerPressed(e []byte) bool {
	return len(e) >= inputEventBytes &&
		binary.NativeEndian.Uint16(e[16:]) == eventKey &&
		binary.NativeEndian.Uint16(e[18:]) == keyPower &&
		binary.NativeEndian.Uint32(e[20:]) == 1
}

// watchPowerButton turns a press of the ACPI power button into a SIGPWR on stop.
func watchPowerButton(con *console, stop chan<- os.Signal) {
	dirs, _ := filepath.Glob("/sys/class/input/event*")
	for _, dir := range dirs {
		name, err := os.ReadFile(filepath.Join(dir, "device", "name"))
		if err != nil || strings.TrimSpace(string(name)) != "Power Button" {
			continue
		}
		f, err := os.Open(filepath.Join("/dev/input", filepath.Base(dir)))
		if err != nil {
			con.say("power button: %v", err)
			continue
		}
		go func() {
			defer f.Close()
			var event [inputEventBytes]byte
			for {
				n, err := f.Read(event[:])
				if err != nil {
					con.say("power button: %v", err)
					return
				}
				if powerPressed(event[:n]) {
					stop <- syscall.SIGPWR
				}
			}
		}()
	}
}
