// Package guest boots a machine that is as stock as a Debian host can be, its kernel, open-iscsi, dm-multipath,
// sg3-utils and fio, and lets a test run commands in it. What it is for stands in the tests: that the target engine
// is taken for a good shelf by software that never heard of it.
//
// It owns build/guest and the QEMU processes that it starts. It installs nothing on this machine but unpacks
// Debian's packages into build/guest, and a guest reaches nothing but what the test put at its portal addresses.
//
// # Parts
//
//	packages.go  Debian's packages, resolved as for an empty machine, fetched and unpacked, not installed
//	root.go      the programs wanted and the libraries that they load → one ext4 image
//	initrd.go    Debian's kernel modules in loading order, and PID 1 (directory init) → an initramfs
//	disk.go      for a boot without QEMU's help: a disk with a unified kernel image and that root
//	path.go      a path from the guest to a portal, which can be cut
//	machine.go   QEMU, and package agent to run commands
//
// # Decisions
//
// 2026-11-25: the root is an ext4 image on a virtio disk, not a part of the initramfs: unpacking 60 MB costs the
// emulated processor more seconds than all the rest of the boot.
//
// 2026-11-25: a guest's way out is QEMU's guestfwd with a program that is started for each connection (directory
// forward). Rejected: the user network's gateway, which needs restrict=off and then leads everywhere; and guestfwd to a
// socket, which is one connection for the guest's whole life, where an initiator comes again after each cut.
//
// 2026-11-25: commands come by a virtio serial port and not over a network: the networks are what is cut.
//
// 2026-11-25: only what the programs load is copied to the root, as their ELF headers say: the packages and what
// they depend on are 270 MB, with Perl, Python and a debconf that nobody asks.
package guest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

// Options of a Build.
type Options struct {
	// Tree is the repository's root. `go run ./image` must have run there: its kernel is used.
	Tree string
	// Say reports what takes long; nil: nobody.
	Say func(format string, args ...any)
}

// Built is where the parts of a guest are.
type Built struct {
	// Kernel and Initrd are what QEMU boots, Root the ext4 image, Unified the kernel image for UEFI.
	Kernel, Initrd, Root, Unified string
	// Release is the kernel's, uname -r.
	Release string
	// Forward is the program of directory forward.
	Forward string
}

// Build makes what is not there yet: half a minute and 75 MB of packages the first time, then some seconds.
func Build(ctx context.Context, o Options) (*Built, error) {
	if o.Say == nil {
		o.Say = func(string, ...any) {}
	}
	dir := filepath.Join(o.Tree, "build", "guest")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	unlock, err := lock(filepath.Join(dir, "lock"))
	if err != nil {
		return nil, err
	}
	defer unlock()
	packages, err := fetchPackages(ctx, o, dir)
	if err != nil {
		return nil, err
	}
	b := &Built{Forward: filepath.Join(dir, "forward")}
	if b.Root, err = buildRoot(ctx, o, dir, packages); err != nil {
		return nil, err
	}
	for _, name := range []string{"init", "forward"} {
		if err := goBuild(ctx, o.Tree, "./qa/guest/"+name, filepath.Join(dir, name)); err != nil {
			return nil, err
		}
	}
	if err := buildInitrd(ctx, o, dir, b); err != nil {
		return nil, err
	}
	if err := buildUnified(packages, dir, b); err != nil {
		return nil, err
	}
	return b, nil
}

// lock keeps two builds from mixing in one directory.
func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return func() { f.Close() }, nil
}

// goBuild compiles a static program.
func goBuild(ctx context.Context, tree, pkg, out string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w -buildid=", "-o", out, pkg)
	cmd.Dir = tree
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if said, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build %s: %w\n%s", pkg, err, said)
	}
	return nil
}

// run executes a command; its error carries what it said.
func run(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(said.String()))
	}
	return out, nil
}

// key names what was made of the parts: another part, another name.
func key(parts ...string) string {
	h := sha256.Sum256([]byte(strings.Join(parts, "\x00")))
	return hex.EncodeToString(h[:6])
}
