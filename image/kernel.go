package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// kernelSeries is the long-term series that the shelf is tested on, and oldestKernel the first of it that
// is known to be stable under QEMU.
const (
	kernelSeries = "6.12"
	oldestKernel = 117
)

// kernel is an unpacked kernel package.
type kernel struct {
	version string // of the series: 6.12.117
	release string // uname -r: 6.12.117+deb12-amd64
	vmlinuz string
	modules string // …/lib/modules/RELEASE
}

var packageForm = regexp.MustCompile(`^linux-image-` + regexp.QuoteMeta(kernelSeries) + `\.([0-9]+)\+deb12-amd64$`)

// fetchKernel returns the unpacked kernel: the pinned one, else the one that is there, else the newest that
// the machine's package sources have.
func fetchKernel(ctx context.Context, o Options) (*kernel, error) {
	pin := o.Kernel
	current := filepath.Join(o.Cache, "kernel")
	if pin == "" && !o.Update {
		if text, err := os.ReadFile(current); err == nil {
			pin = strings.TrimSpace(string(text))
		}
	}
	if pin != "" {
		if k, err := unpackedKernel(o.Cache, pin); err == nil {
			o.Say("kernel      %s (unpacked before)", k.release)
			return k, nil
		} else if !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	version, err := resolveKernel(ctx, o, pin)
	if err != nil {
		return nil, err
	}
	if _, err := unpackedKernel(o.Cache, version); errors.Is(err, fs.ErrNotExist) {
		if err := downloadKernel(ctx, o, version); err != nil {
			return nil, err
		}
	}
	k, err := unpackedKernel(o.Cache, version)
	if err != nil {
		return nil, err
	}
	return k, writeFile(current, []byte(version+"\n"), 0o644)
}

func packageName(version string) string { return "linux-image-" + release(version) }

func release(version string) string { return version + "+deb12-amd64" }

func unpackedKernel(cache, version string) (*kernel, error) {
	root := filepath.Join(cache, "kernel-"+version)
	k := &kernel{version: version, release: release(version)}
	k.vmlinuz = filepath.Join(root, "boot", "vmlinuz-"+k.release)
	k.modules = filepath.Join(root, "lib", "modules", k.release)
	for _, path := range []string{k.vmlinuz, filepath.Join(k.modules, "modules.builtin")} {
		if _, err := os.Stat(path); err != nil {
			return nil, err
		}
	}
	return k, nil
}

// resolveKernel finds the version to fetch, refreshing the package lists where they don't know it.
func resolveKernel(ctx context.Context, o Options, pin string) (string, error) {
	for _, refreshed := range []bool{false, true} {
		if refreshed || o.Update {
			o.Say("kernel      refreshing the package lists")
			if _, err := run(ctx, "", "apt-get", "-o", "DPkg::Lock::Timeout=400", "-qq", "update"); err != nil {
				return "", err
			}
		}
		names, err := run(ctx, "", "apt-cache", "pkgnames", "linux-image-"+kernelSeries+".")
		if err != nil {
			return "", err
		}
		if version, err := newestKernel(string(names), pin); err == nil {
			return version, nil
		} else if refreshed || o.Update {
			return "", err
		}
	}
	panic("unreachable: the second round returns")
}

// newestKernel picks from apt-cache's list: the pinned version, or the highest.
func newestKernel(names, pin string) (string, error) {
	best := -1
	for _, name := range strings.Fields(names) {
		m := packageForm.FindStringSubmatch(name)
		if m == nil {
			continue
		}
		n, err := strconv.Atoi(m[1])
		if err != nil {
			continue
		}
		if pin != "" && pin == fmt.Sprintf("%s.%d", kernelSeries, n) {
			return pin, nil
		}
		best = max(best, n)
	}
	switch {
	case pin != "":
		return "", fmt.Errorf("kernel %s: the package sources have no %s", pin, packageName(pin))
	case best < oldestKernel:
		return "", fmt.Errorf("kernel: the package sources have no %s.N+deb12-amd64 with N ≥ %d; is this Debian 12 with security updates?", packageName(kernelSeries)[:len("linux-image-")+len(kernelSeries)], oldestKernel)
	}
	return fmt.Sprintf("%s.%d", kernelSeries, best), nil
}

// downloadKernel fetches the package, which apt verifies against the archive's signature, and unpacks it
// without installing it.
func downloadKernel(ctx context.Context, o Options, version string) error {
	dir, err := os.MkdirTemp(o.Cache, "download-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	o.Say("kernel      fetching %s (107 MB)", packageName(version))
	if _, err := run(ctx, dir, "apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", packageName(version)); err != nil {
		return err
	}
	debs, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil || len(debs) != 1 {
		return fmt.Errorf("kernel: apt-get download left %d packages", len(debs))
	}
	root := filepath.Join(dir, "root")
	o.Say("kernel      unpacking")
	if _, err := run(ctx, "", "dpkg", "-x", debs[0], root); err != nil {
		return err
	}
	return os.Rename(root, filepath.Join(o.Cache, "kernel-"+version))
}

// run executes a command and returns its standard output; its error carries what it said.
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
