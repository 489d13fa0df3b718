package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ledge-storage/ledge/qa/guest/agent"
)

// portName is the virtio serial port's, as QEMU's command line has it.
const portName = "ledge.guest"

// daemonPatience is how long a daemon may take to listen.
const daemonPatience = 2 * time.Minute

// serve is the child's part.
func serve() error {
	for _, m := range []struct{ kind, at, data string }{
		{"tmpfs", "/run", "mode=0755"}, {"tmpfs", "/tmp", "mode=1777"}, {"devpts", "/dev/pts", ""},
	} {
		if err := os.MkdirAll(m.at, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, m.at, m.kind, 0, m.data); err != nil {
			return fmt.Errorf("mount %s: %w", m.at, err)
		}
	}
	for _, dir := range []string{"/run/udev", "/run/lock/iscsi", "/run/log"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	networks := strings.FieldsFunc(argument("guest.net"), func(r rune) bool { return r == ',' })
	steps := [][]string{{"ip", "link", "set", "lo", "up"}}
	for i, address := range networks {
		dev := fmt.Sprintf("eth%d", i)
		steps = append(steps, []string{"ip", "address", "add", address, "dev", dev}, []string{"ip", "link", "set", dev, "up"})
	}
	steps = append(steps, []string{"/lib/systemd/systemd-udevd", "--daemon"},
		[]string{"udevadm", "trigger", "--action=add", "--subsystem-match=block", "--subsystem-match=virtio-ports"},
		[]string{"udevadm", "settle", "--timeout=60"})
	for _, argv := range steps {
		if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, out)
		}
	}
	if len(networks) > 0 {
		for socket, argv := range map[string][]string{
			"@ISCSIADM_ABSTRACT_NAMESPACE":          {"iscsid", "-f"},
			"@/org/kernel/linux/storage/multipathd": {"multipathd", "-d", "-s"},
		} {
			if err := daemon(argv, socket); err != nil {
				return err
			}
		}
	}
	port, err := openPort()
	if err != nil {
		return err
	}
	defer port.Close()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	say("up")
	return agent.Serve(port, agent.Hello{Version: agent.Version, Kernel: unix.ByteSliceToString(u.Release[:])})
}

// daemon starts a program that stays, its output in /run/log, and waits until it listens on its socket: iscsiadm, when
// it finds no iscsid, goes on without the configuration file and says nothing.
func daemon(argv []string, socket string) error {
	log, err := os.Create(filepath.Join("/run/log", argv[0]))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return err
	}
	go cmd.Wait() // a zombie would look like a daemon that runs
	for end := time.Now().Add(daemonPatience); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if text, err := os.ReadFile("/proc/net/unix"); err == nil && strings.Contains(string(text), socket+"\n") {
			return nil
		}
	}
	return fmt.Errorf("%s does not listen on %s after %s", argv[0], socket, daemonPatience)
}

// openPort finds the virtio serial port by its name in sysfs.
func openPort() (*os.File, error) {
	names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return nil, err
	}
	for _, path := range names {
		name, err := os.ReadFile(path)
		if err == nil && strings.TrimSpace(string(name)) == portName {
			return os.OpenFile("/dev/"+filepath.Base(filepath.Dir(path)), os.O_RDWR, 0)
		}
	}
	return nil, fmt.Errorf("no virtio serial port %s among %d", portName, len(names))
}
