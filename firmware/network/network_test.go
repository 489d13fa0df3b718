package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// fakeSys builds /sys/class/net with a virtio NIC and an Intel one.
func fakeSys(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	class := filepath.Join(root, "class")
	for name, dev := range map[string][2]string{
		"eth0": {"pci0000:00/0000:00:04.0/virtio1/net/eth0", "52:54:00:12:34:56"},
		"eth1": {"pci0000:00/0000:00:1c.0/0000:02:00.0/net/eth1", "00:1b:21:aa:bb:cc"},
	} {
		dir := filepath.Join(root, "devices", dev[0])
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "address"), []byte(dev[1]+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(class, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(dir, filepath.Join(class, name)); err != nil {
			t.Fatal(err)
		}
	}
	return class
}

func TestFind(t *testing.T) {
	sys := fakeSys(t)
	for device, want := range map[string]string{
		"0000:00:04.0":      "eth0",
		"52:54:00:12:34:56": "eth0",
		"0000:02:00.0":      "eth1",
		"00:1B:21:AA:BB:CC": "eth1",
		"0000:00:05.0":      "",
		"0000:00:04":        "",
		"52:54:00:12:34:57": "",
	} {
		got, err := Find(sys, device)
		if got != want || (want == "") != errors.Is(err, ErrNoDevice) {
			t.Errorf("Find(%s) = %q, %v; want %q", device, got, err, want)
		}
	}
}

func TestWaitSeesALateDriver(t *testing.T) {
	sys := filepath.Join(t.TempDir(), "late")
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	found := make(chan string, 1)
	go func() {
		name, err := Wait(ctx, sys, "0000:00:04.0")
		if err != nil {
			t.Error(err)
		}
		found <- name
	}()
	if err := os.Symlink(fakeSys(t), sys); err != nil {
		t.Fatal(err)
	}
	if name := <-found; name != "eth0" {
		t.Errorf("found %q", name)
	}
	gone, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Wait(gone, sys, "0000:00:09.0"); !errors.Is(err, ErrNoDevice) || !errors.Is(err, context.Canceled) {
		t.Errorf("after cancel: %v", err)
	}
}

// TestConfigure runs in a network namespace of its own on a TAP or dummy device; it needs root.
func TestConfigure(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root for a network namespace")
	}
	impossible := make(chan string)
	go func() {
		defer close(impossible)
		runtime.LockOSThread() // never unlocked: the thread dies with its namespace
		if err := syscall.Unshare(syscall.CLONE_NEWNET); err != nil {
			impossible <- fmt.Sprintf("no network namespaces: %v", err)
			return
		}
		if why := inNamespace(t); why != "" {
			impossible <- why
		}
	}()
	if why := <-impossible; why != "" {
		t.Skip(why)
	}
}

// inNamespace returns why the kernel cannot do the test, or nothing.
func inNamespace(t *testing.T) (impossible string) {
	if err := Loopback(); err != nil {
		t.Error(err)
		return ""
	}
	if lo, err := netlink.LinkByName("lo"); err != nil || lo.Attrs().Flags&net.FlagUp == 0 {
		t.Errorf("lo is not up: %v", err)
	}
	var made error
	for _, l := range []netlink.Link{
		&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: "nic0"}},
		&netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "nic0"}, Mode: netlink.TUNTAP_MODE_TAP},
	} {
		if made = netlink.LinkAdd(l); made == nil {
			break
		}
	}
	if made != nil {
		return fmt.Sprintf("this kernel has neither dummy nor TAP devices: %v", made)
	}
	l := Link{Address: netip.MustParsePrefix("10.0.2.15/24"), Gateway: netip.MustParseAddr("10.0.2.2")}
	for range 2 { // the second time changes nothing
		if err := configure("nic0", l); err != nil {
			t.Error(err)
			return ""
		}
	}
	link, err := netlink.LinkByName("nic0")
	if err != nil {
		t.Error(err)
		return ""
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
	if err != nil || len(addrs) != 1 || addrs[0].IPNet.String() != "10.0.2.15/24" {
		t.Errorf("addresses %v, %v", addrs, err)
	}
	routes, err := netlink.RouteList(link, netlink.FAMILY_V4)
	if err != nil {
		t.Error(err)
	}
	found := false
	for _, r := range routes {
		found = found || r.Gw.String() == "10.0.2.2"
	}
	if !found {
		t.Errorf("no default route in %v", routes)
	}
	if err := configure("nic9", l); err == nil {
		t.Error("a missing interface was configured")
	}
	return ""
}
