package guest

import (
	"context"
	"debug/elf"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// programs that the guest has, by their place in the packages; a pattern stands for all that match. Libraries come
// by themselves, but for those that a program opens by name: multipath's checkers, and libgcc_s, without which
// glibc cannot cancel a thread.
var programs = []string{
	"bin/dash", "bin/cat", "bin/chmod", "bin/cp", "bin/date", "bin/dd", "bin/dmesg", "bin/echo", "bin/false", "bin/findmnt", "bin/grep", "bin/ip",
	"bin/ln", "bin/ls", "bin/lsblk", "bin/mkdir", "bin/mount", "bin/mv", "bin/rm", "bin/sleep", "bin/ss", "bin/sync", "bin/touch", "bin/true", "bin/udevadm", "bin/umount", "bin/uname",
	"usr/bin/cksum", "usr/bin/cut", "usr/bin/env", "usr/bin/head", "usr/bin/id", "usr/bin/od", "usr/bin/printf", "usr/bin/seq", "usr/bin/sha256sum", "usr/bin/sort",
	"usr/bin/stat", "usr/bin/tail", "usr/bin/test", "usr/bin/timeout", "usr/bin/tr", "usr/bin/truncate", "usr/bin/wc",
	"sbin/blkdiscard", "sbin/blkid", "sbin/blockdev", "sbin/fstrim",
	"sbin/mke2fs", "sbin/mkfs.ext4", "sbin/e2fsck", "sbin/fsck.ext4", "sbin/debugfs", "sbin/dumpe2fs", "sbin/resize2fs",
	"sbin/insmod", "sbin/mdadm", "sbin/dmsetup", "sbin/kpartx", "sbin/multipath", "sbin/multipathd", "sbin/multipathc", "sbin/mpathpersist",
	"sbin/iscsid", "sbin/iscsiadm", "sbin/iscsi-iname", "lib/systemd/systemd-udevd", "lib/udev/scsi_id", "lib/udev/kpartx_id",
	"usr/bin/fio", "usr/bin/sg_*", "usr/bin/sginfo", "usr/bin/sgp_dd", "usr/bin/scsi_*",
	"lib/multipath/*.so", "*/x86_64-linux-gnu/libgcc_s.so.1", "usr/lib/x86_64-linux-gnu/fio/*", "lib64/ld-linux-x86-64.so.2",
}

// rules of udev that name block devices as a Debian host does; the rest is for keyboards and sound.
var rules = []string{"50-udev-default.rules", "55-dm.rules", "55-scsi-sg3_id.rules", "56-dm-mpath.rules", "56-dm-parts.rules", "58-scsi-sg3_symlink.rules",
	"60-block.rules", "60-kpartx.rules", "60-multipath.rules", "60-persistent-storage.rules", "60-persistent-storage-dm.rules", "68-del-part-nodes.rules", "95-dm-notify.rules"}

// settings are the files below etc.
//
//go:embed etc
var settings embed.FS

// buildRoot makes the root's image, unless it is there.
func buildRoot(ctx context.Context, o Options, dir, packages string) (string, error) {
	parts := append(append([]string{filepath.Base(packages), "1"}, programs...), rules...)
	err := fs.WalkDir(settings, "etc", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := settings.ReadFile(path)
		parts = append(parts, path, string(text))
		return err
	})
	if err != nil {
		return "", err
	}
	image := filepath.Join(dir, "root-"+key(parts...)+".ext4")
	if _, err := os.Stat(image); !errors.Is(err, fs.ErrNotExist) {
		return image, err
	}
	staging, err := os.MkdirTemp(dir, "root-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(staging)
	r := &root{from: packages, to: staging, done: map[string]bool{}}
	if err := r.fill(); err != nil {
		return "", err
	}
	o.Say("root: %d files, %.0f MB", len(r.done), float64(r.bytes)/1e6)
	size := fmt.Sprintf("%dM", r.bytes>>20+64)
	if _, err := run(ctx, "", "mke2fs", "-q", "-F", "-t", "ext4", "-L", "guest", "-d", staging, image+".new", size); err != nil {
		return "", err
	}
	return image, os.Rename(image+".new", image)
}

// root is the tree that becomes the image.
type root struct {
	from, to  string
	libraries map[string]string // base name → place in from
	done      map[string]bool
	bytes     int64
}

func (r *root) fill() error {
	if err := os.Chmod(r.to, 0o755); err != nil {
		return err
	}
	if err := r.findLibraries(); err != nil {
		return err
	}
	for _, pattern := range programs {
		found, err := filepath.Glob(filepath.Join(r.from, pattern))
		if err != nil {
			return err
		}
		if len(found) == 0 && !strings.Contains(pattern, "*") {
			return fmt.Errorf("guest: the packages have no %s", pattern)
		}
		for _, path := range found {
			if err := r.program(strings.TrimPrefix(path, r.from+"/")); err != nil {
				return err
			}
		}
	}
	for _, name := range rules {
		if err := r.copy("lib/udev/rules.d/" + name); err != nil {
			return err
		}
	}
	if err := os.Symlink("dash", filepath.Join(r.to, "bin/sh")); err != nil {
		return err
	}
	for _, name := range []string{"dev", "proc", "sys", "run", "tmp", "root", "mnt", "var/lib", "etc/iscsi/ifaces", "etc/iscsi/nodes", "etc/iscsi/send_targets", "etc/multipath"} {
		if err := os.MkdirAll(filepath.Join(r.to, name), 0o755); err != nil {
			return err
		}
	}
	for link, target := range map[string]string{"var/run": "/run", "etc/mtab": "/proc/self/mounts"} {
		if err := os.Symlink(target, filepath.Join(r.to, link)); err != nil {
			return err
		}
	}
	return fs.WalkDir(settings, "etc", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := settings.ReadFile(path)
		if err != nil {
			return err
		}
		return r.put(path, text, 0o600)
	})
}

// findLibraries lists every shared object of the packages by its base name. Two of one name would be one too many;
// the system's directories are preferred.
func (r *root) findLibraries() error {
	r.libraries = map[string]string{}
	return filepath.WalkDir(r.from, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.Contains(d.Name(), ".so") {
			return err
		}
		rel := strings.TrimPrefix(path, r.from+"/")
		if old, ok := r.libraries[d.Name()]; !ok || strings.Count(rel, "/") < strings.Count(old, "/") {
			r.libraries[d.Name()] = rel
		}
		return nil
	})
}

// program copies a program and every library that its ELF header, and theirs, name.
func (r *root) program(rel string) error {
	if r.done[rel] {
		return nil
	}
	if err := r.copy(rel); err != nil {
		return err
	}
	f, err := elf.Open(r.resolve(rel))
	var format *elf.FormatError
	if errors.As(err, &format) {
		return nil // a script
	} else if err != nil {
		return err
	}
	defer f.Close()
	needed, err := f.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("guest: %s: %w", rel, err)
	}
	for _, name := range needed {
		library, ok := r.libraries[name]
		if !ok {
			return fmt.Errorf("guest: %s wants %s, which no package has", rel, name)
		}
		if err := r.program(library); err != nil {
			return err
		}
	}
	return nil
}

// copy copies a file of the packages, or what a link leads to, to the same place.
func (r *root) copy(rel string) error {
	path := r.resolve(rel)
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	r.done[rel] = true
	return r.put(rel, data, info.Mode().Perm())
}

// resolve follows an absolute link within the packages: this machine's own file of that name is another one.
func (r *root) resolve(rel string) string {
	path := filepath.Join(r.from, rel)
	if target, err := os.Readlink(path); err == nil && filepath.IsAbs(target) {
		return filepath.Join(r.from, target)
	}
	return path
}

func (r *root) put(rel string, data []byte, mode fs.FileMode) error {
	to := filepath.Join(r.to, rel)
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	r.bytes += int64(len(data)+4095) &^ 4095
	return os.WriteFile(to, data, mode)
}
