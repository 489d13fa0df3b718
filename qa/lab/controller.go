package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"time"

	"github.com/ledge-storage/ledge/boards"
	"github.com/ledge-storage/ledge/firmware/control"
	"github.com/ledge-storage/ledge/host/api"
	"github.com/ledge-storage/ledge/qa/emulator"
)

// boardName is the virtual machine's board.
const boardName = "qemu-q35"

// Ports inside a virtual controller.
const (
	guestPortal = "3260"
	guestAPI    = "8443"
)

// The window of Options.Window.
const (
	windowBytes = 4 << 20
	windowSlot  = "0x10"
	windowBAR   = "/sys/bus/pci/devices/0000:00:10.0/resource2"
)

// Controller is one of the two.
type Controller struct {
	*Part
	client *api.Client
	// bootAt is where in the console's log the present boot begins.
	bootAt atomic.Int64
}

// Partner is the other one.
func (c *Controller) Partner() *Controller {
	if c.Name == "A" {
		return c.lab.B
	}
	return c.lab.A
}

func (l *Lab) newController(side string) *Controller {
	client, err := api.New(l.api(side), l.secrets.Token)
	if err != nil {
		panic(err) // the address is made here
	}
	c := &Controller{client: client, Part: &Part{Name: side, lab: l, dir: l.o.Dir, patience: 30 * time.Second}}
	if l.o.Local {
		c.log = l.path(side, "console.log")
		c.command = func() ([]string, error) { return l.localController(side) }
		c.again = contract
		return c
	}
	c.log = l.path(side, "qemu.log")
	c.command = func() ([]string, error) {
		if info, err := os.Stat(c.ConsoleLog()); err == nil {
			c.bootAt.Store(info.Size())
		}
		return l.virtualController(side)
	}
	c.gently = func() error { return powerButton(l.path(side, "qmp.sock")) }
	return c
}

// contract is the exit-code contract of shelfd, which firmware/init keeps on a real controller.
func contract(code int) (restart bool, pause time.Duration) {
	switch code {
	case 0, 1:
		return false, 0
	case 3:
		return true, 0
	case 4:
		return true, 5 * time.Second
	}
	return true, time.Second
}

// ConsoleLog is what the controller says: its serial console, in form local shelfd's output.
func (c *Controller) ConsoleLog() string { return c.lab.path(c.Name, "console.log") }

// Portal is where this machine reaches the controller's iSCSI portal.
func (c *Controller) Portal() string { return c.lab.portal(c.Name) }

// API is the URL of its API.
func (c *Controller) API() string { return c.lab.api(c.Name) }

// config is the part of shelfd's configuration that both forms share. Advertised portals are this machine's
// addresses: an initiator that was told the guest's own would find nothing there.
func (l *Lab) config() map[string]any {
	c := map[string]any{
		"shelf":     "lab",
		"secret":    l.secrets.Shelf,
		"api_token": l.secrets.Token,
		"portals":   map[string][]string{"A": {l.portal("A")}, "B": {l.portal("B")}},
		"log_level": "info",
	}
	if l.o.RebuildDelay > 0 {
		c["maintenance"] = map[string]any{"rebuild_delay_s": int(l.o.RebuildDelay.Seconds())}
	}
	return c
}

func (l *Lab) localController(side string) ([]string, error) {
	c := l.config()
	c["controller"] = side
	c["api_listen"] = strings.TrimPrefix(l.api(side), "http://")
	c["portal_listen"] = l.portal(side)
	c["drives"] = []string{l.path("drives", "*.img")}
	c["nvram"] = map[string]any{"path": l.nvramPath(side), "size": l.o.NVRAMBytes}
	link := "listen"
	if side == "B" {
		link = "dial"
	}
	c["mirror"] = map[string]string{link: "unix:" + l.path("partner.sock")}
	path := l.path(side, "shelf.json")
	return []string{filepath.Join(l.o.Binaries, "shelfd"), "--config", path}, writeJSON(path, 0o600, c)
}

// virtualController is QEMU's command line. NICs have fixed PCI addresses: the board names links by them.
func (l *Lab) virtualController(side string) ([]string, error) {
	b, err := boards.Load(boardName)
	if err != nil {
		return nil, err
	}
	c := l.config()
	c["api_listen"] = ":" + guestAPI
	c["portal_listen"] = ":" + guestPortal
	if l.o.Window {
		end := "listen"
		if side == "B" {
			end = "dial"
		}
		c["mirror"] = map[string]string{end: fmt.Sprintf("%s:%d", b.Links.Partner.Address("A").Addr(), b.MirrorPort), "window": windowBAR}
	}
	if err := writeJSON(l.path(side, "shelf.json"), 0o600, c); err != nil {
		return nil, err
	}
	p, mac := l.o.Ports, "02:1e:d6:e0:0a:0"
	portal, apiPort := p.PortalA, p.APIA
	if side == "B" {
		mac, portal, apiPort = "02:1e:d6:e0:0b:0", p.PortalB, p.APIB
	}
	guest := b.Links.Management.Address(side).Addr().String()
	args := []string{"qemu-system-x86_64",
		"-name", "ledge-" + side, "-nodefaults", "-display", "none", "-no-user-config",
		"-M", "q35,nvdimm=on", "-cpu", emulator.CPU, "-smp", "2",
		"-m", fmt.Sprintf("%dM,slots=2,maxmem=%dM", l.o.MemoryMiB, int64(l.o.MemoryMiB)+l.o.NVRAMBytes>>20+1024),
		"-object", fmt.Sprintf("memory-backend-file,id=nvram,share=on,mem-path=nvram/%s.img,size=%d,pmem=off", side, l.o.NVRAMBytes),
		"-device", "nvdimm,id=nvdimm0,memdev=nvram",
		"-netdev", fmt.Sprintf("user,id=management,restrict=on,hostfwd=tcp:127.0.0.1:%d-%s:%s,hostfwd=tcp:127.0.0.1:%d-%s:%s",
			portal, guest, guestPortal, apiPort, guest, guestAPI),
		"-device", "virtio-net-pci,netdev=management,addr=" + slot(b.Links.Management.Device) + ",mac=" + mac + "1",
		"-netdev", "stream,id=link,server=on,addr.type=unix,addr.path=" + side + "/partner.sock", // see Cable
		"-device", "virtio-net-pci,netdev=link,addr=" + slot(b.Links.Partner.Device) + ",mac=" + mac + "2",
		"-device", "virtio-rng-pci",
		// A watchdog that fires resets the controller, as on a real board.
		"-device", "i6300esb", "-action", "watchdog=reset",
		"-fw_cfg", "name=" + b.Config.Name + ",file=" + side + "/shelf.json",
		"-chardev", "socket,id=console,path=" + side + "/console.sock,server=on,wait=off,logfile=" + side + "/console.log,logappend=on",
		"-serial", "chardev:console",
		"-qmp", "unix:" + side + "/qmp.sock,server=on,wait=off",
		"-kernel", filepath.Join(l.o.Image, "vmlinuz"), "-initrd", filepath.Join(l.o.Image, "initramfs.zst"),
		"-append", strings.Join(append(b.KernelArgs, "ledge.board="+boardName, "ledge.controller="+side), " "),
		"-device", "virtio-scsi-pci,id=scsi0",
	}
	if l.o.Window {
		args = append(args, "-object", fmt.Sprintf("memory-backend-file,id=window,share=on,mem-path=window.img,size=%d", windowBytes),
			"-device", "ivshmem-plain,memdev=window,master=on,addr="+windowSlot)
	}
	members, err := l.Members()
	if err != nil {
		return nil, err
	}
	for _, path := range members {
		n, err := member(path)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		args = append(args,
			"-drive", fmt.Sprintf("if=none,id=d%d,format=raw,cache=none,file.driver=iscsi,file.transport=tcp,file.portal=%s,file.target=%s,file.lun=%d,file.initiator-name=%s",
				n, loopback(p.Enclosure), enclosureTarget, n, l.driveInitiator(side)),
			"-device", fmt.Sprintf("scsi-block,id=tray%d,drive=d%d,share-rw=on,bus=scsi0.0,scsi-id=%d", n, n, n))
	}
	return args, nil
}

// slot is the PCI slot of an address like 0000:00:04.0.
func slot(pci string) string {
	return "0x" + strings.TrimLeft(strings.Split(strings.Split(pci, ":")[2], ".")[0], "0")
}

// driveInitiator is the name under which a controller uses the enclosure.
func (l *Lab) driveInitiator(side string) string {
	return "iqn.2026-11.lab:" + strings.ToLower(side)
}

// powerButton presses the virtual machine's power button: PID 1 stops shelfd and powers off.
func powerButton(socket string) error { return qmp(socket, `{"execute":"system_powerdown"}`) }

// qmp gives QEMU's monitor commands, one after the other; the first that fails ends it.
func qmp(socket string, commands ...string) error {
	conn, err := net.DialTimeout("unix", socket, 2*time.Second)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	in := bufio.NewScanner(conn)
	for _, command := range append([]string{"", `{"execute":"qmp_capabilities"}`}, commands...) {
		if command != "" {
			if _, err := fmt.Fprintln(conn, command); err != nil {
				return err
			}
		}
		if err := qmpAnswer(in); err != nil {
			return err
		}
	}
	return nil
}

// qmpAnswer reads to the greeting or the next answer; events in between are nobody's.
func qmpAnswer(in *bufio.Scanner) error {
	for in.Scan() {
		switch line := in.Text(); {
		case strings.Contains(line, `"error"`):
			return errors.New(line)
		case strings.Contains(line, `"return"`), strings.Contains(line, `"QMP"`):
			return nil
		}
	}
	return errors.Join(errors.New("lab: QEMU closed its monitor"), in.Err())
}

// Status asks the controller's API.
func (c *Controller) Status(ctx context.Context) (control.Status, error) {
	var st control.Status
	err := c.client.Do(ctx, "GET", "/v1/status", nil, &st)
	return st, err
}

// Do sends a request to the controller's API.
func (c *Controller) Do(ctx context.Context, method, path string, in, out any) error {
	return c.client.Do(ctx, method, path, in, out)
}

// Takeover makes the controller take the pool over, as `ledge shelf takeover` does.
func (c *Controller) Takeover(ctx context.Context) error {
	return c.client.Do(ctx, "POST", "/v1/takeover", struct{}{}, nil)
}

// WaitAnswer waits until the API answers: a forwarded port accepts long before the guest listens, so that
// nothing less than an answer counts. A controller that ended for good ends the wait.
func (c *Controller) WaitAnswer(ctx context.Context) (control.Status, error) {
	return c.WaitStatus(ctx, func(control.Status) error { return nil })
}

// WaitStatus waits until ok returns nil for the controller's status.
func (c *Controller) WaitStatus(ctx context.Context, ok func(control.Status) error) (st control.Status, err error) {
	ctx, cancel := context.WithTimeout(ctx, c.lab.o.Patience)
	defer cancel()
	err = poll(ctx, func() error {
		if !c.Running() && c.again == nil {
			return permanent{fmt.Errorf("it ended: %s", c.Ended())}
		}
		// One answer may take long on a loaded machine, but a lost one must not take all our patience.
		try, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		if st, err = c.Status(try); err != nil {
			return err
		}
		return ok(st)
	})
	if err != nil {
		return st, fmt.Errorf("lab: controller %s: %w\n%s", c.Name, err, tail(c.ConsoleLog(), 15))
	}
	return st, nil
}

var serves = regexp.MustCompile(`\[ *([0-9.]+)\] ledge init: shelfd +serves`)

// BootSeconds is the time from the kernel's start to serving, of the last boot; zero where the console does
// not tell (form local).
func (c *Controller) BootSeconds() float64 {
	text, err := os.ReadFile(c.ConsoleLog())
	if err != nil {
		return 0
	}
	found := serves.FindSubmatch(text[min(int64(len(text)), c.bootAt.Load()):])
	if found == nil {
		return 0
	}
	var s float64
	fmt.Sscanf(string(found[1]), "%f", &s)
	return s
}

func (c *Controller) bootTime() string {
	if s := c.BootSeconds(); s > 0 {
		return fmt.Sprintf(" (%.1f s after its kernel started)", s)
	}
	return ""
}

// ensurePool makes the pool on a new shelf.
func (l *Lab) ensurePool(ctx context.Context) error {
	st, err := l.A.WaitStatus(ctx, func(st control.Status) error {
		if st.Role == "starting" {
			return errors.New("it is still starting")
		}
		return nil
	})
	if err != nil || st.Role != "no-pool" {
		return err
	}
	l.FirstRun = true
	l.o.Say("making the pool: 8+2 over %d drives", l.o.Drives)
	if err := l.A.Do(ctx, "POST", "/v1/pool", struct{}{}, nil); err != nil {
		return fmt.Errorf("lab: making the pool: %w\n%s", err, tail(l.A.ConsoleLog(), 15))
	}
	return nil
}

// WaitOwner waits until one controller owns the pool and serves it.
func (l *Lab) WaitOwner(ctx context.Context) (*Controller, error) {
	ctx, cancel := context.WithTimeout(ctx, l.o.Patience)
	defer cancel()
	var owner *Controller
	err := poll(ctx, func() error {
		var seen []string
		for _, c := range []*Controller{l.A, l.B} {
			try, cancel := context.WithTimeout(ctx, 5*time.Second)
			st, err := c.Status(try)
			cancel()
			if err == nil && st.Role == "owner" && st.ServingSince != nil {
				owner = c
				return nil
			}
			seen = append(seen, fmt.Sprintf("%s: %s %s %v", c.Name, st.Role, st.Trouble, err))
		}
		return fmt.Errorf("nobody owns the pool: %s", strings.Join(seen, "; "))
	})
	if err != nil {
		return nil, fmt.Errorf("lab: %w\n%s\n%s", err, tail(l.A.ConsoleLog(), 15), tail(l.B.ConsoleLog(), 15))
	}
	return owner, nil
}

// WaitMirrored waits until the owner says that its mirror is complete, and its partner that it stands by.
func (l *Lab) WaitMirrored(ctx context.Context) error {
	owner, err := l.WaitOwner(ctx)
	if err != nil {
		return err
	}
	_, err = owner.WaitStatus(ctx, func(st control.Status) error {
		if st.Partner.Mirror != "in-sync" {
			return fmt.Errorf("the mirror is %q, not in sync; %s", st.Partner.Mirror, st.Trouble)
		}
		return nil
	})
	if err != nil {
		return err
	}
	_, err = owner.Partner().WaitStatus(ctx, func(st control.Status) error {
		if st.Role != "standby" {
			return fmt.Errorf("it is %s, not standby", st.Role)
		}
		return nil
	})
	return err
}

// tail returns a file's last n lines, for an error.
func tail(path string, n int) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimRight(string(text), "\n"), "\n")
	return "last lines of " + path + ":\n\t" + strings.Join(lines[max(0, len(lines)-n):], "\n\t")
}
