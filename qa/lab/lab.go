// Package lab runs a whole Ledge system on one machine: an enclosure of twelve dual-ported drives, two
// controllers and a host agent. `make run` and the end-to-end tests both use it, so what a user sees is what
// is tested. It owns its run directory and every process it started, and nothing else.
//
// # Two forms
//
//	qemu   the booted image: two virtual machines, NVDIMMs, drives in a tgtd enclosure with real SCSI-3
//	       persistent reservations, a unix socket as the partner link
//	local  the same daemons as processes of this machine: drives and NVRAM are files, reservations are emulated
//	       by raid/drive; no enclosure
//
// It promises that Close ends exactly what Start started, by process id, and keeps the state; that a second
// Start on the same directory comes up with the data; and that processes left by a lab that was killed are
// found by id and start time, and ended, before anything is started. Everything listens on 127.0.0.1 or on
// unix sockets in the run directory.
//
// # Run directory
//
//	lock           held while a lab runs
//	processes.json {name, pid, start time} of what runs now
//	secrets.json   shelf secret and API token, 0600, made once
//	ports.json     the ports in use
//	drives/NN.img  members, sparse        drives/removed/ what RemoveMember took out
//	nvram/A.img    NVRAM of a controller  nvram/B.img
//	A/ B/          shelf.json (0600), console.log, console.sock, qmp.sock
//	enclosure.log  tgtd's output
//	partner.sock   the partner link (form local; else A/partner.sock and B/partner.sock, see Cable)
//	shelf.json     where `ledge shelf` finds the controllers, 0600
//	hostd.json     the agent's configuration, 0600;  hostd.sock its API;  hostd.log;  cache.img
//	host.N/        the same four of the Nth host after the first (MoveHost): of those before it nothing is left
package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// Options say what to run. Dir, Image or Binaries must be given; the rest has defaults.
type Options struct {
	// Dir is the run directory; it is made where it is missing.
	Dir string
	// Image is the directory with vmlinuz and initramfs.zst (form qemu).
	Image string
	// Binaries is the directory with hostd, and for form local shelfd.
	Binaries string
	// Local runs the daemons as processes instead of virtual machines.
	Local bool
	// Ports are the TCP ports on 127.0.0.1; those that are zero are chosen free.
	Ports Ports
	// Drives (default 12) of DriveBytes each (default 4 GiB, sparse).
	Drives     int
	DriveBytes int64
	// NVRAMBytes of each controller (default 128 MiB).
	NVRAMBytes int64
	// MemoryMiB of a virtual controller (default 1024).
	MemoryMiB int
	// Window gives virtual controllers memory that both see (ivshmem), and has them use it for their link.
	Window bool
	// RebuildDelay, whole seconds, before a failed member is rebuilt to spare space (default: shelfd's own).
	RebuildDelay time.Duration
	// CacheBytes of the agent's flash cache (default 1 GiB, sparse); negative: none.
	CacheBytes int64
	// Patience is how long a boot, a takeover or a first connection may take (default 4 minutes: several
	// emulated machines may share one core).
	Patience time.Duration
	// Say reports progress; nil: silence.
	Say func(format string, args ...any)
}

// Ports are TCP ports on 127.0.0.1.
type Ports struct {
	Agent     int `json:"agent"`     // the agent's iSCSI portal
	PortalA   int `json:"portal_a"`  // controller A's iSCSI portal
	PortalB   int `json:"portal_b"`  // controller B's
	APIA      int `json:"api_a"`     // controller A's API
	APIB      int `json:"api_b"`     // controller B's
	Enclosure int `json:"enclosure"` // tgtd; also its control port
}

// DefaultPorts are those of `make run`.
var DefaultPorts = Ports{Agent: 3260, PortalA: 3261, PortalB: 3262, APIA: 8441, APIB: 8442, Enclosure: 3290}

func (o Options) withDefaults() (Options, error) {
	if o.Drives == 0 {
		o.Drives = 12
	}
	if o.DriveBytes == 0 {
		o.DriveBytes = 4 << 30
	}
	if o.NVRAMBytes == 0 {
		o.NVRAMBytes = 128 << 20
	}
	if o.MemoryMiB == 0 {
		o.MemoryMiB = 1024
	}
	if o.CacheBytes == 0 {
		o.CacheBytes = 1 << 30
	}
	if o.Patience == 0 {
		o.Patience = 4 * time.Minute
	}
	if o.Say == nil {
		o.Say = func(string, ...any) {}
	}
	var err error
	for _, dir := range []*string{&o.Dir, &o.Image, &o.Binaries} {
		if *dir != "" {
			if *dir, err = filepath.Abs(*dir); err != nil {
				return o, err
			}
		}
	}
	switch {
	case o.Dir == "":
		return o, errors.New("lab: no run directory")
	case o.Binaries == "":
		return o, errors.New("lab: no directory with the binaries")
	case o.Image == "" && !o.Local:
		return o, errors.New("lab: no directory with the image")
	case o.Drives < 3 || o.Drives > 60:
		return o, fmt.Errorf("lab: %d drives: outside 3 to 60", o.Drives)
	case o.DriveBytes < 64<<20 || o.DriveBytes%(1<<20) != 0:
		return o, fmt.Errorf("lab: drives of %d bytes: at least 64 MiB, whole MiB", o.DriveBytes)
	}
	return o, nil
}

// Lab is a running system.
type Lab struct {
	o       Options
	secrets secrets
	lock    *os.File

	// Enclosure is nil in form local.
	Enclosure *Part
	// Cable is the partner link; nil in form local.
	Cable *Cable
	// A and B are the controllers.
	A, B *Controller
	// Agent is hostd.
	Agent *Part
	// moves is how often the host was another one.
	moves int
	// FirstRun says that Start made the pool.
	FirstRun bool

	// mu guards processes.json and the set of running parts.
	mu      sync.Mutex
	running map[string]process
}

// Dir is the run directory.
func (l *Lab) Dir() string { return l.o.Dir }

// Ports are the ports in use.
func (l *Lab) Ports() Ports { return l.o.Ports }

func (l *Lab) path(elements ...string) string {
	return filepath.Join(append([]string{l.o.Dir}, elements...)...)
}

// New prepares the run directory, ends what a killed lab left in it, and describes the parts. Nothing runs
// yet. Close must be called.
func New(o Options) (*Lab, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	l := &Lab{o: o, running: map[string]process{}}
	if err := os.MkdirAll(o.Dir, 0o755); err != nil {
		return nil, err
	}
	if l.lock, err = os.OpenFile(l.path("lock"), os.O_CREATE|os.O_RDWR, 0o644); err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(l.lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		l.lock.Close()
		return nil, fmt.Errorf("lab: %s is in use by another run", o.Dir)
	}
	if err := l.prepare(); err != nil {
		l.lock.Close()
		return nil, err
	}
	return l, nil
}

func (l *Lab) prepare() error {
	if err := l.endOrphans(); err != nil {
		return err
	}
	if err := l.choosePorts(); err != nil {
		return err
	}
	if err := l.makeState(); err != nil {
		return err
	}
	if !l.o.Local {
		l.Enclosure = l.newEnclosure()
		l.Cable = newCable(l.path("A", "partner.sock"), l.path("B", "partner.sock"))
	}
	l.A, l.B = l.newController("A"), l.newController("B")
	l.Agent = l.newAgent()
	return nil
}

// Start brings everything up: enclosure, both controllers, the pool (the first time), the agent. It
// returns when the agent serves.
func (l *Lab) Start(ctx context.Context) error {
	if err := l.StartShelf(ctx); err != nil {
		return err
	}
	return l.StartAgent(ctx)
}

// StartShelf brings up enclosure and controllers, makes the pool where there is none, and returns when one
// controller owns it and the other stands by.
func (l *Lab) StartShelf(ctx context.Context) error {
	if l.Enclosure != nil {
		if err := l.startEnclosure(ctx); err != nil {
			return err
		}
	}
	for _, c := range []*Controller{l.A, l.B} {
		if err := c.Start(); err != nil {
			return err
		}
		l.o.Say("controller %s starts (pid %d), console in %s", c.Name, c.PID(), c.ConsoleLog())
	}
	for _, c := range []*Controller{l.A, l.B} {
		if _, err := c.WaitAnswer(ctx); err != nil {
			return err
		}
		l.o.Say("controller %s answers%s", c.Name, c.bootTime())
	}
	if err := l.ensurePool(ctx); err != nil {
		return err
	}
	owner, err := l.WaitOwner(ctx)
	if err != nil {
		return err
	}
	l.o.Say("controller %s owns the pool", owner.Name)
	if err := l.WaitMirrored(ctx); err != nil {
		return err
	}
	l.o.Say("controller %s holds the mirror", owner.Partner().Name)
	return nil
}

// Close ends everything that runs, gently first, each after those that use it: agent, controllers,
// enclosure. The state stays.
func (l *Lab) Close() error {
	var errs []error
	if l.Agent != nil {
		errs = append(errs, l.Agent.End())
	}
	if l.A != nil && l.B != nil {
		// Together, which halves the time: either order is safe.
		done := make(chan error, 1)
		go func() { done <- l.B.End() }()
		errs = append(errs, l.A.End(), <-done)
	}
	if l.Cable != nil {
		l.Cable.close()
	}
	if l.Enclosure != nil {
		errs = append(errs, l.Enclosure.End())
		l.sweepEnclosure()
	}
	l.lock.Close()
	return errors.Join(errs...)
}

// writeJSON replaces a file of the run directory in one step.
func writeJSON(path string, mode fs.FileMode, value any) error {
	text, err := json.MarshalIndent(value, "", "  ")
	if err != nil {
		return err
	}
	tmp := path + ".new"
	if err := os.WriteFile(tmp, append(text, '\n'), mode); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

func readJSON(path string, value any) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(text, value); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}
