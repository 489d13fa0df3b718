// Package network owns a controller's interfaces: it finds a NIC by its PCI or MAC address, gives it its
// address and brings it up. It is the only importer of netlink.
//
// It promises to be idempotent: PID 1 may call Up again for a link that is configured already. It never
// removes an address, never renames an interface, and knows nothing of what the links are for: that is the
// board's and PID 1's business.
package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
)

// ErrNoDevice: no interface has the wanted PCI or MAC address.
var ErrNoDevice = errors.New("network: no such device")

// SysClassNet is where the kernel lists interfaces.
const SysClassNet = "/sys/class/net"

// lookAgain is how often Wait looks for an interface whose driver is still probing.
const lookAgain = 20 * time.Millisecond

// Link is one interface and what it is to become.
type Link struct {
	// Device is a PCI address (0000:00:04.0) or a MAC address.
	Device string
	// Address is the interface's address with the network's prefix length.
	Address netip.Prefix
	// Gateway is the default route, or invalid for none.
	Gateway netip.Addr
}

// Loopback brings lo up: without it nothing on the controller can talk to itself.
func Loopback() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("network: lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("network: lo up: %w", err)
	}
	return nil
}

// Up finds l's interface, waiting for its driver until ctx ends, and configures it. It returns the
// interface's name. An address or route that is there already is left as it is.
func Up(ctx context.Context, l Link) (string, error) {
	name, err := Wait(ctx, SysClassNet, l.Device)
	if err != nil {
		return "", err
	}
	return name, configure(name, l)
}

func configure(name string, l Link) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("network: %s: %w", name, err)
	}
	addr := &netlink.Addr{IPNet: ipNet(l.Address)}
	if err := netlink.AddrReplace(link, addr); err != nil {
		return fmt.Errorf("network: %s: address %s: %w", name, l.Address, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("network: %s up: %w", name, err)
	}
	if !l.Gateway.IsValid() {
		return nil
	}
	// Dst must be given: netlink refuses a route without any key.
	anywhere := &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
	if l.Gateway.Is6() {
		anywhere = &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	}
	route := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: anywhere, Gw: l.Gateway.AsSlice()}
	if err := netlink.RouteReplace(route); err != nil {
		return fmt.Errorf("network: %s: default route by %s: %w", name, l.Gateway, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// Wait looks for the interface in sys (SysClassNet) until it is there or ctx ends.
func Wait(ctx context.Context, sys, device string) (string, error) {
	for {
		name, err := Find(sys, device)
		if err == nil || !errors.Is(err, ErrNoDevice) {
			return name, err
		}
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("%w: %w", err, ctx.Err())
		case <-time.After(lookAgain):
		}
	}
}

// Find returns the name of the interface with that PCI or MAC address, or ErrNoDevice.
func Find(sys, device string) (string, error) {
	entries, err := os.ReadDir(sys)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("network: %w", err)
	}
	mac, macErr := net.ParseMAC(device)
	for _, e := range entries {
		dir := filepath.Join(sys, e.Name())
		if macErr == nil {
			text, err := os.ReadFile(filepath.Join(dir, "address"))
			if err == nil && strings.EqualFold(strings.TrimSpace(string(text)), mac.String()) {
				return e.Name(), nil
			}
			continue
		}
		// A virtio NIC's device is a child of its PCI function, so any element of the path may match:
		// …/pci0000:00/0000:00:04.0/virtio1/net/eth0
		real, err := filepath.EvalSymlinks(dir)
		if err != nil {
			continue // it went away while we looked
		}
		for _, element := range strings.Split(real, "/") {
			if element == device {
				return e.Name(), nil
			}
		}
	}
	return "", fmt.Errorf("%w: %s", ErrNoDevice, device)
}
