package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The boot disk (image/disk.go draws it) has a FAT partition with the GPT name ledge-state, where an administrator
// put ledge/shelf.json. It is read once, mounted read-only, and let go.
const (
	blockRoot     = "/sys/class/block"
	statePartName = "ledge-state"
	stateFile     = "ledge/shelf.json"
	stateMount    = "/run/ledge-state"
	// bootDiskPatience is for a stick: USB takes seconds to find one.
	bootDiskPatience = 15 * time.Second
	// secondDiskPatience is how long a second disk of the same name is waited for: a forgotten stick that appears a
	// second after the right disk must be noticed, not raced.
	secondDiskPatience = 3 * time.Second
)

// readBootDisk returns the configuration that is on the boot disk, and where it was.
func readBootDisk(ctx context.Context, con *console, b *boardFile) (data []byte, from string, err error) {
	from = stateFile + " on the boot disk"
	if len(b.Config.DiskModules) == 0 {
		return nil, from, errors.New("the board has no disk_modules to read it with")
	}
	con.say("config: looking for a partition called %s; modules: %s", statePartName, loadModules(con, b.Config.DiskModules))
	var found []string
	look := func(n int) func() bool {
		return func() bool { found = namedPartitions(blockRoot, statePartName); return len(found) >= n }
	}
	if waitFor(ctx, bootDiskPatience, look(1)) {
		waitFor(ctx, secondDiskPatience, look(2))
	}
	switch {
	case len(found) == 0:
		return nil, from, fmt.Errorf("no partition is called %s", statePartName)
	case len(found) > 1:
		// Two disks of the image: which one this machine booted from, nobody says.
		return nil, from, fmt.Errorf("partitions %s are all called %s: remove the disk that is not this controller's", strings.Join(found, ", "), statePartName)
	}
	device := filepath.Join("/dev", found[0])
	from = stateFile + " on " + device
	if data, err = readMounted(device); err != nil {
		return nil, from, err
	}
	letGo(con, found[0], b.Drives.Globs)
	data = bytes.TrimPrefix(data, []byte("\ufeff")) // what Windows' editor puts first
	return data, from, nil
}

// readMounted mounts a FAT device read-only, reads the configuration and unmounts.
func readMounted(device string) (data []byte, err error) {
	if err := os.MkdirAll(stateMount, 0o700); err != nil {
		return nil, err
	}
	if err := unix.Mount(device, stateMount, "vfat", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return nil, fmt.Errorf("mount: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Unmount(stateMount, 0)) }()
	return readBounded(filepath.Join(stateMount, stateFile))
}

// readBounded reads a file of at most maxConfigBytes.
func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fs.ErrNotExist // its path is of no use to anyone
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxConfigBytes+1))
	if err == nil && len(data) > maxConfigBytes {
		err = fmt.Errorf("larger than %d bytes", maxConfigBytes)
	}
	return data, err
}

// namedPartitions lists the partitions with that GPT name, sorted; root is /sys/class/block.
func namedPartitions(root, name string) []string {
	entries, _ := os.ReadDir(root) // an unreadable /sys has no partitions
	var found []string
	for _, e := range entries {
		text, err := os.ReadFile(filepath.Join(root, e.Name(), "uevent"))
		if err != nil {
			continue // it went away meanwhile
		}
		for _, line := range strings.Split(string(text), "\n") {
			if line == "PARTNAME="+name {
				found = append(found, e.Name())
			}
		}
	}
	sort.Strings(found)
	return found
}

// letGo makes the kernel forget a SCSI boot disk that the board's patterns would take for a member (a stick among
// /dev/sd*): nothing needs it until the next boot, and shelfd must not count it, nor ever write to it.
func letGo(con *console, partition string, globs []string) {
	real, err := filepath.EvalSymlinks(filepath.Join(blockRoot, partition))
	if err != nil {
		con.say("config: %v", err)
		return
	}
	disk := filepath.Base(filepath.Dir(real)) // …/block/sdm/sdm3
	if !matches(globs, "/dev/"+disk) && !matches(globs, "/dev/"+partition) {
		return
	}
	if err := os.WriteFile(filepath.Join(blockRoot, disk, "device/delete"), []byte("1"), 0); err != nil {
		con.say("config: the boot disk %s is among the drives: %v", disk, err)
		return
	}
	con.say("config: boot disk %s is detached: it is no drive of the shelf, and may be unplugged", disk)
}

func matches(globs []string, path string) bool {
	for _, g := range globs {
		if ok, _ := filepath.Match(g, path); ok { // the board's loader checked the pattern
			return true
		}
	}
	return false
}
