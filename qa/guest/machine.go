package guest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/ledge-storage/ledge/qa/emulator"
	"github.com/ledge-storage/ledge/qa/guest/agent"
)

// Machine is a guest that runs. Its methods may be called from any goroutine.
type Machine struct {
	dir    string
	cmd    *exec.Cmd
	ended  chan struct{} // closed when QEMU was waited for
	said   strings.Builder
	client *agent.Client
	close  sync.Once
}

// MachineOptions of a Machine.
type MachineOptions struct {
	// Dir gets the console's log and the sockets; its path must be short (108 bytes with a name).
	Dir string
	// Paths are the guest's networks: the nth leads from portal address Portal(n) to the path, and nowhere else.
	Paths []*Path
	// Args are more of QEMU's.
	Args []string
	// Firmware boots by UEFI from what Args attach, instead of Build's kernel and root.
	Firmware bool
	// Patience is how long the guest may take until it is up; zero: 5 minutes.
	Patience time.Duration
}

// Portal is the address at which a guest finds its nth path.
func Portal(n int) string { return fmt.Sprintf("10.%d.0.100:3260", n+1) }

// address is the guest's own on its nth network.
func address(n int) string { return fmt.Sprintf("10.%d.0.15/24", n+1) }

// Start boots a guest and waits until it is up. A kernel that the emulator itself brought down (package emulator)
// is booted again. One processor: of two, the emulator's may run code that the other has patched away.
func (b *Built) Start(ctx context.Context, o MachineOptions) (*Machine, error) {
	if o.Patience == 0 {
		o.Patience = 5 * time.Minute
	}
	for try := 1; ; try++ {
		m, err := b.start(ctx, o)
		if err == nil || try == 3 || !strings.Contains(err.Error(), "Kernel panic") {
			return m, err
		}
	}
}

func (b *Built) start(ctx context.Context, o MachineOptions) (*Machine, error) {
	m := &Machine{dir: o.Dir, ended: make(chan struct{})}
	args, err := b.arguments(o)
	if err != nil {
		return nil, err
	}
	listener, err := net.Listen("unix", filepath.Join(o.Dir, "agent.sock"))
	if err != nil {
		return nil, err
	}
	defer listener.Close()
	m.cmd = exec.Command("qemu-system-x86_64", args...)
	m.cmd.Stdout, m.cmd.Stderr = &m.said, &m.said
	// A test that is killed takes its guest with it.
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := m.cmd.Start(); err != nil {
		return nil, fmt.Errorf("guest: %w", err)
	}
	go func() {
		_ = m.cmd.Wait()
		close(m.ended)
	}()
	if err := m.connect(ctx, listener, o.Patience); err != nil {
		_ = m.cmd.Process.Kill()
		<-m.ended
		return nil, fmt.Errorf("guest: it did not come up: %w; QEMU said %q; its console:\n%s", err, m.said.String(), m.Console())
	}
	return m, nil
}

// connect waits for QEMU to call and for the guest's hello.
func (m *Machine) connect(ctx context.Context, listener net.Listener, patience time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	type result struct {
		c   *agent.Client
		err error
	}
	results := make(chan result, 1)
	go func() {
		line, err := listener.Accept()
		if err != nil {
			results <- result{err: err}
			return
		}
		c, err := agent.NewClient(line)
		results <- result{c, err}
	}()
	var err error
	select {
	case r := <-results:
		m.client = r.c
		return r.err
	case <-m.ended:
		err = errors.New("QEMU ended")
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	// Nobody calls any more, and the line of who called ends with QEMU.
	listener.Close()
	_ = m.cmd.Process.Kill()
	<-results
	return err
}

// arguments are QEMU's command line.
func (b *Built) arguments(o MachineOptions) ([]string, error) {
	// No KVM: the emulated processor is all there is, and everything is on loopback or on a unix socket.
	args := []string{"-nodefaults", "-display", "none", "-no-user-config", "-no-reboot", "-M", "q35", "-cpu", emulator.CPU, "-smp", "1", "-m", "768M",
		"-device", "virtio-rng-pci", "-serial", "file:" + filepath.Join(o.Dir, "console.log"),
		"-chardev", "socket,id=agent,path=" + filepath.Join(o.Dir, "agent.sock"),
		"-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent,name=ledge.guest"}
	var addresses []string
	for i, p := range o.Paths {
		host, port, err := net.SplitHostPort(Portal(i))
		if err != nil {
			return nil, err
		}
		args = append(args,
			"-netdev", fmt.Sprintf("user,id=n%d,net=10.%d.0.0/24,ipv6=off,restrict=on,guestfwd=tcp:%s:%s-cmd:%s %s", i, i+1, host, port, b.Forward, p.Address()),
			"-device", fmt.Sprintf("virtio-net-pci,romfile=,netdev=n%d", i))
		addresses = append(addresses, address(i))
	}
	if o.Firmware {
		vars := filepath.Join(o.Dir, "vars.fd")
		text, err := os.ReadFile("/usr/share/OVMF/OVMF_VARS_4M.fd")
		if err != nil {
			return nil, err
		}
		if err := os.WriteFile(vars, text, 0o600); err != nil {
			return nil, err
		}
		args = append(args, "-drive", "if=pflash,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd", "-drive", "if=pflash,format=raw,file="+vars)
		return append(args, o.Args...), nil
	}
	// snapshot=on: the image serves many guests, each with writes of its own.
	args = append(args, "-kernel", b.Kernel, "-initrd", b.Initrd,
		"-append", arguments+" guest.root=/dev/vda guest.net="+strings.Join(addresses, ","),
		"-drive", "if=none,id=root,format=raw,snapshot=on,file.locking=off,file="+b.Root, "-device", "virtio-blk-pci,drive=root")
	return append(args, o.Args...), nil
}

// Do runs a command in the guest.
func (m *Machine) Do(ctx context.Context, r agent.Request) (agent.Answer, error) {
	return m.client.Do(ctx, r)
}

// Kernel is the release of the guest's kernel, as it says.
func (m *Machine) Kernel() string { return m.client.Hello.Kernel }

// PID is QEMU's.
func (m *Machine) PID() int { return m.cmd.Process.Pid }

// Console is what the guest said on its serial console.
func (m *Machine) Console() string {
	text, err := os.ReadFile(filepath.Join(m.dir, "console.log"))
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// Close ends the line, upon which the guest syncs and powers off; one that does not is killed. It returns when QEMU is gone.
func (m *Machine) Close() error {
	var err error
	m.close.Do(func() {
		err = m.client.Close()
		select {
		case <-m.ended:
		case <-time.After(30 * time.Second):
			err = errors.Join(err, errors.New("guest: it did not power off: killed"), m.cmd.Process.Kill())
			<-m.ended
		}
	})
	return err
}

// Kill is the loss of power.
func (m *Machine) Kill() error {
	err := m.cmd.Process.Kill()
	<-m.ended
	_ = m.client.Close()
	return err
}
