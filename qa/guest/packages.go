package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// packageNames are Debian 12's; what they depend on comes with them. systemd-boot-efi has the stub of disk.go.
var packageNames = []string{"open-iscsi", "multipath-tools", "kpartx", "fio", "sg3-utils", "sg3-utils-udev", "udev", "dmsetup",
	"e2fsprogs", "util-linux", "mount", "coreutils", "dash", "grep", "iproute2", "libgcc-s1", "kmod", "mdadm", "systemd-boot-efi"}

// fetchPackages returns the directory in which the packages lie unpacked, one tree of them all.
//
// apt resolves as for a machine on which nothing is installed: its list of installed packages is an empty file. So
// the outcome does not depend on what this machine has. It verifies what it fetches against the archive's signature.
func fetchPackages(ctx context.Context, o Options, dir string) (string, error) {
	tree := filepath.Join(dir, "packages-"+key(packageNames...))
	if _, err := os.Stat(tree); !errors.Is(err, fs.ErrNotExist) {
		return tree, err
	}
	tmp, err := os.MkdirTemp(dir, "download-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	status, debs, root := filepath.Join(tmp, "status"), filepath.Join(tmp, "debs"), filepath.Join(tmp, "root")
	if err := errors.Join(os.WriteFile(status, nil, 0o644), os.MkdirAll(filepath.Join(debs, "partial"), 0o755), os.Mkdir(root, 0o755)); err != nil {
		return "", err
	}
	o.Say("fetching %d packages of Debian and what they depend on (75 MB; once)", len(packageNames))
	args := append([]string{"-qq", "-y", "-o", "Dir::State::status=" + status, "-o", "Dir::Cache::archives=" + debs, "-o", "Debug::NoLocking=true",
		"-o", "APT::Sandbox::User=root", "--no-install-recommends", "--download-only", "install"}, packageNames...)
	if _, err := run(ctx, "", "apt-get", args...); err != nil {
		// A machine that is new has no lists, or old ones.
		if _, uerr := run(ctx, "", "apt-get", "-o", "DPkg::Lock::Timeout=400", "-qq", "update"); uerr != nil {
			return "", errors.Join(err, uerr)
		}
		if _, err := run(ctx, "", "apt-get", args...); err != nil {
			return "", err
		}
	}
	files, err := filepath.Glob(filepath.Join(debs, "*.deb"))
	if err != nil || len(files) < len(packageNames) {
		return "", fmt.Errorf("guest: apt-get left %d packages of %d and more", len(files), len(packageNames))
	}
	o.Say("unpacking %d packages", len(files))
	for _, file := range files {
		if _, err := run(ctx, "", "dpkg", "-x", file, root); err != nil {
			return "", err
		}
	}
	return tree, os.Rename(root, tree)
}
