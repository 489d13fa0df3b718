package main

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// mount is one file system of the running controller.
type mount struct {
	source, target, kind string
	flags                uintptr
	data                 string
}

// mounts in order. /run and /tmp are bounded: a runaway log must not eat the data path's memory (P7).
var mounts = []mount{
	{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"sysfs", "/sys", "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"},
	{"devpts", "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0620"},
	{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "size=32m,mode=0755"},
	{"tmpfs", "/tmp", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "size=64m,mode=1777"},
}

// mountAll mounts everything it can and returns what it could not.
func mountAll() error {
	var failed []error
	for _, m := range mounts {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			failed = append(failed, err)
			continue
		}
		// EBUSY: the kernel mounted devtmpfs itself (CONFIG_DEVTMPFS_MOUNT).
		if err := unix.Mount(m.source, m.target, m.kind, m.flags, m.data); err != nil && err != unix.EBUSY {
			failed = append(failed, fmt.Errorf("mount %s: %w", m.target, err))
		}
	}
	return errors.Join(failed...)
}
