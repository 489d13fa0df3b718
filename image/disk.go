package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/diskfs/go-diskfs/backend/file"
	"github.com/diskfs/go-diskfs/filesystem/fat32"
	"github.com/diskfs/go-diskfs/partition/gpt"
	"github.com/google/uuid"

	"github.com/ledge-storage/ledge/boards"
	"github.com/ledge-storage/ledge/image/uki"
)

// The disk that a controller boots from, as an administrator writes it to an NVMe drive, an SSD or a stick:
//
//	at        size     GPT name     what
//	1 MiB     128 MiB  ledge-A      EFI system partition, slot A: EFI/BOOT/BOOTX64.EFI, the unified kernel image
//	129 MiB   128 MiB  ledge-B      EFI system partition, slot B: empty, for an upgrade to fill
//	257 MiB   40 MiB   ledge-state  FAT: directory ledge, where the administrator puts shelf.json
//	297 MiB   1 MiB    –            the GPT's second copy
//
// The configuration lies in the state partition and not beside the kernel: an upgrade replaces a slot whole.
// Its type is "basic data", which every operating system mounts. PID 1 finds it by its GPT name.
const (
	mib         = 1 << 20
	slotBytes   = 128 * mib
	stateBytes  = 40 * mib // FAT32 needs more than 65525 clusters
	diskBytes   = 298 * mib
	sectorBytes = 512
	slotFile    = "/EFI/BOOT/BOOTX64.EFI"
	stateDir    = "/ledge"
	stubPackage = "systemd-boot-efi"
	stubPath    = "usr/lib/systemd/boot/efi/linuxx64.efi.stub"
	diskTime    = "1767225600" // 2026-01-01: every file's time on the disk
)

// fetchStub returns systemd-boot's stub, from Debian's package, which is unpacked and not installed.
func fetchStub(ctx context.Context, o Options) ([]byte, error) {
	root := filepath.Join(o.Cache, stubPackage)
	stub, err := os.ReadFile(filepath.Join(root, stubPath))
	if !errors.Is(err, fs.ErrNotExist) && !o.Update {
		return stub, err
	}
	dir, err := os.MkdirTemp(o.Cache, "download-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	o.Say("stub        fetching %s", stubPackage)
	if _, err := run(ctx, dir, "apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", stubPackage); err != nil {
		return nil, err
	}
	debs, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil || len(debs) != 1 {
		return nil, fmt.Errorf("%s: apt-get download left %d packages", stubPackage, len(debs))
	}
	if _, err := run(ctx, "", "dpkg", "-x", debs[0], filepath.Join(dir, "root")); err != nil {
		return nil, err
	}
	if err := os.RemoveAll(root); err != nil {
		return nil, err
	}
	if err := os.Rename(filepath.Join(dir, "root"), root); err != nil {
		return nil, err
	}
	return os.ReadFile(filepath.Join(root, stubPath))
}

// writeDisks makes ledge-BOARD.efi and ledge-BOARD.img of the kernel and the initramfs in o.Out, for each board.
func writeDisks(ctx context.Context, k *kernel, o Options) ([]part, error) {
	stub, err := fetchStub(ctx, o)
	if err != nil {
		return nil, err
	}
	kernelData, err := os.ReadFile(filepath.Join(o.Out, "vmlinuz"))
	if err != nil {
		return nil, err
	}
	initramfs, err := os.ReadFile(filepath.Join(o.Out, "initramfs.zst"))
	if err != nil {
		return nil, err
	}
	var parts []part
	for _, name := range o.Boards {
		b, err := boards.Load(name)
		if err != nil {
			return nil, err
		}
		program, err := uki.Unify(stub, ukiSections(b, k.release, kernelData, initramfs))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", stubPath, err)
		}
		if err := ensure(filepath.Join(o.Out, "ledge-"+name+".efi"), program); err != nil {
			return nil, err
		}
		image := filepath.Join(o.Out, "ledge-"+name+".img")
		if err := writeDisk(image, name, program); err != nil {
			return nil, fmt.Errorf("%s: %w", image, err)
		}
		data, err := os.ReadFile(image)
		if err != nil {
			return nil, err
		}
		parts = append(parts, describe("ledge-"+name+".efi", program), describe("ledge-"+name+".img", data))
	}
	return parts, nil
}

// ukiSections are what the stub looks for. The command line does not say which controller this is: both burn the
// same bytes, and shelf.json says it.
func ukiSections(b *boards.Board, release string, kernel, initramfs []byte) []uki.Section {
	cmdline := strings.Join(append(b.KernelArgs[:len(b.KernelArgs):len(b.KernelArgs)], "ledge.board="+b.Name), " ")
	osrel := fmt.Sprintf("ID=ledge\nNAME=Ledge\nPRETTY_NAME=\"Ledge on %s\"\nVERSION_ID=%s\n", b.Name, release)
	return []uki.Section{
		{Name: ".osrel", Data: []byte(osrel)},
		{Name: ".cmdline", Data: []byte(cmdline + "\x00")},
		{Name: ".uname", Data: []byte(release + "\x00")},
		{Name: ".linux", Data: kernel},
		{Name: ".initrd", Data: initramfs},
	}
}

// writeDisk writes the disk's image beside target, then moves it there.
func writeDisk(target, board string, program []byte) (err error) {
	// The library's one switch for times. Fixed, whatever the builder's environment says.
	if err := os.Setenv("SOURCE_DATE_EPOCH", diskTime); err != nil {
		return err
	}
	f, err := os.Create(target + ".new")
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, f.Close())
		if err == nil {
			err = os.Rename(target+".new", target)
		}
	}()
	if err := f.Truncate(diskBytes); err != nil {
		return err
	}
	slotA := &gpt.Partition{Type: gpt.EFISystemPartition, Name: "ledge-A", Start: mib / sectorBytes, Size: slotBytes}
	slotB := &gpt.Partition{Type: gpt.EFISystemPartition, Name: "ledge-B", Start: (mib + slotBytes) / sectorBytes, Size: slotBytes}
	state := &gpt.Partition{Type: gpt.MicrosoftBasicData, Name: "ledge-state", Start: (mib + 2*slotBytes) / sectorBytes, Size: stateBytes}
	table := &gpt.Table{ProtectiveMBR: true, GUID: guid(board, "disk")}
	for i, p := range []*gpt.Partition{slotA, slotB, state} {
		p.Index, p.GUID, p.End = i+1, guid(board, p.Name), p.Start+p.Size/sectorBytes-1
		table.Partitions = append(table.Partitions, p)
	}
	if err := table.Write(f, diskBytes); err != nil {
		return err
	}
	for _, c := range []struct {
		p          *gpt.Partition
		label, dir string
		name       string
		data       []byte
	}{
		{slotA, "LEDGE-A", path.Dir(slotFile), slotFile, program},
		{slotB, "LEDGE-B", "", "", nil},
		{state, "LEDGE-STATE", stateDir, "", nil},
	} {
		if err := writeFAT(f, c.p, c.label, c.dir, c.name, c.data); err != nil {
			return fmt.Errorf("%s: %w", c.p.Name, err)
		}
	}
	return nil
}

// writeFAT makes a partition's file system with a directory and, for a name, a file in it.
func writeFAT(f *os.File, p *gpt.Partition, label, dir, name string, data []byte) (err error) {
	v, err := fat32.Create(file.New(f, false), int64(p.Size), int64(p.Start)*sectorBytes, sectorBytes, label, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	if dir != "" {
		if err := v.Mkdir(dir); err != nil {
			return err
		}
		if err := mendDotDot(f, int64(p.Start)*sectorBytes+int64(v.DataStart())+int64(v.BytesPerCluster())); err != nil {
			return err
		}
	}
	if name == "" {
		return nil
	}
	out, err := v.OpenFile(name, os.O_CREATE|os.O_RDWR)
	if err != nil {
		return err
	}
	_, err = out.Write(data)
	return errors.Join(err, out.Close())
}

// mendDotDot corrects what the library writes into the first directory of the root, which starts at off: the entry
// ".." of such a directory names cluster 0, not the root's own (FAT specification, 6.5). Firmware and kernels do not
// care; fsck does.
func mendDotDot(f *os.File, off int64) error {
	var d [64]byte // two entries: name 11, …, cluster's high half at 20, low half at 26
	if _, err := f.ReadAt(d[:], off); err != nil {
		return err
	}
	if string(d[:11]) != ".          " || string(d[32:43]) != "..         " {
		return errors.New("the first directory is not where it was expected")
	}
	copy(d[43:64], d[11:32]) // its times, too, are nonsense
	clear(d[32+20 : 32+22])
	clear(d[32+26 : 32+28])
	_, err := f.WriteAt(d[:], off)
	return err
}

// guid is the same for the same board and part: the same inputs give the same bytes. Two disks of one image have
// the same, too, and are not meant to be in one machine.
func guid(board, part string) string {
	return strings.ToUpper(uuid.NewSHA1(uuid.NameSpaceURL, []byte("https://github.com/ledge-storage/ledge/boards/"+board+"/"+part)).String())
}
