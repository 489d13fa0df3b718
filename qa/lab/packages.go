package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
)

// needs are the programs and files of the machine that the lab uses, and Debian's packages that have them.
var needs = []struct{ path, debian string }{
	{"qemu-system-x86_64", "qemu-system-x86"},
	{"qemu-img", "qemu-utils"},
	{"/usr/lib/x86_64-linux-gnu/qemu/block-iscsi.so", "qemu-block-extra"},
	{"tgtd", "tgt"},
	{"tgtadm", "tgt"},
	{"iscsi-ls", "libiscsi-bin"},
	{"xz", "xz-utils"},
	{"mke2fs", "e2fsprogs"},
	{"mcopy", "mtools"},
	{"/usr/share/OVMF/OVMF_CODE_4M.fd", "ovmf"},
}

// MissingPackages lists Debian's packages that the lab needs and the machine lacks.
func MissingPackages() []string {
	var missing []string
	seen := map[string]bool{}
	for _, n := range needs {
		var err error
		if strings.HasPrefix(n.path, "/") {
			_, err = os.Stat(n.path)
		} else {
			_, err = exec.LookPath(n.path)
		}
		if err != nil && !seen[n.debian] {
			missing = append(missing, n.debian)
			seen[n.debian] = true
		}
	}
	return missing
}

// policy keeps Debian's package scripts from starting services: tgt's would take port 3260 on every address.
const policy = "/usr/sbin/policy-rc.d"

// InstallPackages installs what is missing. It needs root and Debian's package sources.
func InstallPackages(ctx context.Context, say func(format string, args ...any)) (err error) {
	missing := MissingPackages()
	if len(missing) == 0 {
		return nil
	}
	command := "apt-get install -y --no-install-recommends " + strings.Join(missing, " ")
	if os.Getuid() != 0 {
		return fmt.Errorf("lab: packages are missing and only root can install them: %s", command)
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		return fmt.Errorf("lab: needed and missing: %s (names of Debian 12)", strings.Join(missing, " "))
	}
	say("installing %s", strings.Join(missing, " "))
	if f, err := os.OpenFile(policy, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755); err == nil {
		_, werr := f.WriteString("#!/bin/sh\nexit 101\n")
		if werr := errors.Join(werr, f.Close()); werr != nil {
			return werr
		}
		defer os.Remove(policy)
	}
	for _, args := range [][]string{
		{"-o", "DPkg::Lock::Timeout=400", "-qq", "update"},
		append([]string{"-o", "DPkg::Lock::Timeout=400", "-qq", "-y", "--no-install-recommends", "install"}, missing...),
	} {
		cmd := exec.CommandContext(ctx, "apt-get", args...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("lab: apt-get %s: %w\n%s", strings.Join(args, " "), err, out)
		}
	}
	if left := MissingPackages(); len(left) > 0 {
		return fmt.Errorf("lab: still missing after the installation: %s", strings.Join(left, " "))
	}
	return nil
}
