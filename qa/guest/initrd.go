package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/u-root/u-root/pkg/cpio"

	"github.com/ledge-storage/ledge/image/modules"
	"github.com/ledge-storage/ledge/image/uki"
)

// wanted modules, and in this order. Debian's kernel would ask modprobe for some of them when they are needed
// (crc32c for iscsi_tcp's digests, scsi_dh_alua when a disk says that it has access states); there is none here.
var wanted = []string{"virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "virtio_rng", "crc32c_generic", "crc32c_intel", "crc32_pclmul", "ext4",
	"scsi_mod", "scsi_dh_alua", "sd_mod", "sg", "scsi_transport_iscsi", "iscsi_tcp", "dm_mod", "dm_multipath", "dm_round_robin", "dm_service_time"}

// kernel finds what `go run ./image` unpacked.
func kernel(tree string) (vmlinuz, root, release string, err error) {
	cache := filepath.Join(tree, "build", "cache")
	version, err := os.ReadFile(filepath.Join(cache, "kernel"))
	if errors.Is(err, fs.ErrNotExist) {
		return "", "", "", errors.New("guest: there is no kernel in build/cache: make image")
	} else if err != nil {
		return "", "", "", err
	}
	v := strings.TrimSpace(string(version))
	release = v + "+deb12-amd64"
	dir := filepath.Join(cache, "kernel-"+v)
	return filepath.Join(dir, "boot", "vmlinuz-"+release), filepath.Join(dir, "lib", "modules", release), release, nil
}

// buildInitrd writes the initramfs: PID 1, the modules and the list in which they are to be loaded.
func buildInitrd(ctx context.Context, o Options, dir string, b *Built) error {
	vmlinuz, modulesRoot, release, err := kernel(o.Tree)
	if err != nil {
		return err
	}
	b.Kernel, b.Release, b.Initrd = vmlinuz, release, filepath.Join(dir, "initramfs.zst")
	set, err := modules.Open(ctx, modulesRoot, filepath.Join(dir, "modules-"+release))
	if err != nil {
		return err
	}
	order, err := set.Order(wanted)
	if err != nil {
		return err
	}
	init, err := os.ReadFile(filepath.Join(dir, "init"))
	if err != nil {
		return err
	}
	records := []cpio.Record{cpio.StaticFile("init", string(init), 0o755), cpio.CharDev("dev/console", 0o600, 5, 1),
		cpio.StaticFile("modules/list", strings.Join(order, "\n")+"\n", 0o644)}
	for _, name := range order {
		_, data := set.File(name)
		records = append(records, cpio.StaticFile("modules/"+name+".ko", string(data), 0o644))
	}
	archive, err := pack(records)
	if err != nil {
		return err
	}
	return replace(b.Initrd, archive)
}

// pack makes the archive, directories first: the kernel's unpacker makes none.
func pack(records []cpio.Record) ([]byte, error) {
	var all []cpio.Record
	for _, dir := range []string{"dev", "proc", "sys", "root", "modules"} {
		all = append(all, cpio.Directory(dir, 0o755))
	}
	var raw bytes.Buffer
	w := cpio.Newc.Writer(&raw)
	for i, r := range append(all, records...) {
		r.Ino, r.NLink = uint64(i+1), 1
		if err := w.WriteRecord(r); err != nil {
			return nil, fmt.Errorf("guest: %s: %w", r.Name, err)
		}
	}
	if err := cpio.WriteTrailer(w); err != nil {
		return nil, err
	}
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	defer enc.Close()
	return enc.EncodeAll(raw.Bytes(), nil), nil
}

// replace writes a file in one step, unless it is there: a guest that runs keeps the old one open.
func replace(path string, data []byte) error {
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, data) {
		return nil
	}
	if err := os.WriteFile(path+".new", data, 0o644); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// arguments of the kernel. mitigations=off: an emulated processor leaks nothing and is slow enough. tsc=reliable: a
// machine that is loaded looks to the kernel as if its clock were bad, and the one that it then takes costs far more;
// no_timer_check: nor must it conclude that its timer is not connected.
const arguments = "console=ttyS0 quiet panic=-1 net.ifnames=0 mitigations=off tsc=reliable no_timer_check"

// buildUnified makes the program of UEFI that boots from the disk of disk.go.
func buildUnified(packages, dir string, b *Built) error {
	stub, err := os.ReadFile(filepath.Join(packages, "usr/lib/systemd/boot/efi/linuxx64.efi.stub"))
	if err != nil {
		return err
	}
	var sections []uki.Section
	for _, s := range []struct{ name, path, text string }{
		{".cmdline", "", arguments + " guest.root=" + bootRoot + "\x00"}, {".linux", b.Kernel, ""}, {".initrd", b.Initrd, ""},
	} {
		data := []byte(s.text)
		if s.path != "" {
			if data, err = os.ReadFile(s.path); err != nil {
				return err
			}
		}
		sections = append(sections, uki.Section{Name: s.name, Data: data})
	}
	program, err := uki.Unify(stub, sections)
	if err != nil {
		return err
	}
	b.Unified = filepath.Join(dir, "guest.efi")
	return replace(b.Unified, program)
}
