package main

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"github.com/ledge-storage/ledge/firmware/network"
)

const (
	linkPatience  = 5 * time.Second
	nvramPatience = 10 * time.Second
	// drivePatience is for a shelf with a drive missing: after it, shelfd starts with what is there. Drives
	// that answer appear in well under a second each.
	drivePatience = 10 * time.Second
	lookAgain     = 20 * time.Millisecond
)

// bringUpLinks configures loopback and the board's links; a missing one is reported and left.
func bringUpLinks(ctx context.Context, con *console, b *boardFile, controller string) error {
	if err := network.Loopback(); err != nil {
		con.say("links: %v", err)
	}
	if controller == "" {
		return fmt.Errorf("which controller this is, is unknown")
	}
	var failed []string
	for _, l := range []struct {
		role string
		link network.Link
	}{
		{"management", linkOf(b.Links.Management.Device, b.Links.Management.Address(controller), b.Links.Management.Gateway)},
		{"partner", linkOf(b.Links.Partner.Device, b.Links.Partner.Address(controller), "")},
	} {
		patience, cancel := context.WithTimeout(ctx, linkPatience)
		name, err := network.Up(patience, l.link)
		cancel()
		if err != nil {
			failed = append(failed, fmt.Sprintf("%s: %v", l.role, err))
			continue
		}
		con.say("links: %s %s on %s", l.role, l.link.Address, name)
	}
	if len(failed) > 0 {
		return fmt.Errorf("%s", strings.Join(failed, "; "))
	}
	return nil
}

// waitForDevices waits until NVRAM and drives are there and returns what is.
func waitForDevices(ctx context.Context, con *console, b *boardFile) string {
	if !waitFor(ctx, nvramPatience, func() bool { return usable(b.NVRAM.Path) }) {
		con.say("devices: no NVRAM at %s", b.NVRAM.Path)
	}
	waitFor(ctx, drivePatience, func() bool { return len(drives(b.Drives.Globs)) >= b.Drives.Count })
	found := drives(b.Drives.Globs)
	if len(found) < b.Drives.Count {
		con.say("devices: %d of %d drives appeared in %s; going on with them", len(found), b.Drives.Count, drivePatience)
	}
	return fmt.Sprintf("NVRAM %s, %d of %d drives", b.NVRAM.Path, len(found), b.Drives.Count)
}

// waitFor polls until there is, patience or ctx ends; it returns the last answer.
func waitFor(ctx context.Context, patience time.Duration, there func() bool) bool {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for !there() {
		select {
		case <-ctx.Done():
			return there()
		case <-time.After(lookAgain):
		}
	}
	return true
}

// drives lists the block devices that match, each once, sorted.
func drives(globs []string) []string {
	seen := map[string]bool{}
	for _, g := range globs {
		paths, _ := filepath.Glob(g) // the board's loader checked the pattern
		for _, p := range paths {
			if usable(p) {
				seen[p] = true
			}
		}
	}
	found := make([]string, 0, len(seen))
	for p := range seen {
		found = append(found, p)
	}
	sort.Strings(found)
	return found
}

// usable says whether path is a block device of some size: a disk's node appears before its capacity is known.
func usable(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return false
	}
	if end > 0 {
		return true
	}
	info, err := f.Stat() // a DAX character device has no size that can be sought
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

func linkOf(device string, address netip.Prefix, gateway string) network.Link {
	gw, _ := netip.ParseAddr(gateway) // checked by the board's loader; none is the invalid address
	return network.Link{Device: device, Address: address, Gateway: gw}
}
