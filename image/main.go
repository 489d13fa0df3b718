// Command image builds what a controller boots: a kernel and an initramfs. It owns build/image and
// build/cache.
//
//	build/image/vmlinuz        Debian's kernel, as it is in its package
//	build/image/initramfs.zst  PID 1, the daemons, the boards' kernel modules, a busybox for the rescue shell
//	build/image/ledge-BOARD.efi  with -disk: both and a command line as one program of UEFI
//	build/image/ledge-BOARD.img  with -disk: the disk that a controller boots from, to be burnt
//	build/image/manifest.json  what went in: versions, sizes, SHA-256 of each part
//
// It promises that the same inputs give the same bytes, wherever the tree lies and whenever it is built,
// and that a build with nothing changed takes seconds. The inputs are: the kernel's package version, the Go
// toolchain, go.sum, and this tree. It installs nothing on the machine that builds.
//
// # Stages
//
//	kernel.go    resolve the newest linux-image-6.12.N+deb12-amd64, fetch it by name, unpack it
//	modules.go   the boards' modules and their dependencies, decompressed, with a modules.dep of our own
//	busybox.go   u-root's commands in one binary, cached by what they are made of
//	daemons.go   firmware/init and the daemons: ordinary CGO-free binaries
//	archive.go   the parts in one fixed order, owner root, time 0 → cpio → zstd
//	uki.go       systemd-boot's stub + command line + kernel + initramfs → a unified kernel image
//	disk.go      a GPT disk: two slots for such an image, and a partition for the configuration
//
// # Decisions
//
// 2026-11-22: daemons are not part of the busybox. gobusybox builds everything anew and without inlining
// (40 s, slow code), and runs each imported package's init() for each command.
//
// 2026-11-22: modules lie decompressed in the archive and the whole is compressed once: smaller than
// compressing each, and PID 1 needs no decompressor.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/ledge-storage/ledge/boards"
)

// Options say what to build and where.
type Options struct {
	// Tree is the repository's root.
	Tree string
	// Out gets the image, Cache what later builds reuse.
	Out, Cache string
	// Boards whose modules the image carries.
	Boards []string
	// Kernel pins the package: a version like 6.12.117, or "" for the newest.
	Kernel string
	// Update looks for a newer kernel though an unpacked one is there.
	Update bool
	// Daemons are the packages, relative to Tree, whose binaries go to /bin.
	Daemons []string
	// Disk makes the unified kernel images and the disks, too.
	Disk bool
	// Say reports progress.
	Say func(format string, args ...any)
}

func main() {
	started := time.Now()
	boardList := flag.String("boards", strings.Join(boards.Names(), ","), "boards whose modules the image carries")
	daemons := flag.String("daemons", "firmware/shelfd", "packages whose binaries go to /bin")
	o := Options{Tree: "."}
	flag.StringVar(&o.Out, "o", "build/image", "where the image goes")
	flag.StringVar(&o.Cache, "cache", "build/cache", "what later builds reuse")
	flag.StringVar(&o.Kernel, "kernel", "", "pin the kernel's version, 6.12.117 for instance; empty: the newest, then the same until -update")
	flag.BoolVar(&o.Update, "update", false, "look for a newer kernel")
	flag.BoolVar(&o.Disk, "disk", false, "make ledge-BOARD.img, the disk to burn, and ledge-BOARD.efi, too")
	flag.Parse()
	o.Boards, o.Daemons = split(*boardList), split(*daemons)
	o.Say = func(format string, args ...any) {
		fmt.Printf("image %6.1f s  %s\n", time.Since(started).Seconds(), fmt.Sprintf(format, args...))
	}
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "image: %q: takes no arguments\n", flag.Arg(0))
		os.Exit(2)
	}
	if err := build(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

func split(list string) []string {
	return strings.FieldsFunc(list, func(r rune) bool { return r == ',' })
}

// manifest is manifest.json.
type manifest struct {
	Kernel string   `json:"kernel"`
	Go     string   `json:"go"`
	Boards []string `json:"boards"`
	Parts  []part   `json:"parts"`
}

type part struct {
	Name   string `json:"name"`
	Bytes  int64  `json:"bytes"`
	SHA256 string `json:"sha256"`
}

// build goes through the stages.
func build(ctx context.Context, o Options) error {
	for _, dir := range []string{o.Out, o.Cache} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	unlock, err := lock(filepath.Join(o.Cache, "lock"))
	if err != nil {
		return err
	}
	defer unlock()

	// 1. The boards name the modules; their loader finds a wrong file before anything is fetched.
	var wanted []string
	for _, name := range o.Boards {
		b, err := boards.Load(name)
		if err != nil {
			return err
		}
		wanted = append(append(wanted, b.Modules...), b.Config.DiskModules...)
	}
	// 2. The kernel, unpacked.
	k, err := fetchKernel(ctx, o)
	if err != nil {
		return err
	}
	// 3. Its modules.
	a := newArchive()
	count, err := addModules(ctx, a, k, wanted, filepath.Join(o.Cache, "modules-"+k.release))
	if err != nil {
		return err
	}
	o.Say("modules     %d of %s", count, k.release)
	// 4. The busybox.
	if err := addBusybox(a, o); err != nil {
		return err
	}
	// 5. PID 1 and the daemons.
	if err := addDaemons(ctx, a, o); err != nil {
		return err
	}
	// 6. One file, compressed; only when a part changed.
	parts, err := writeImage(a, k, o)
	if err != nil {
		return err
	}
	// 7. What an administrator burns.
	if o.Disk {
		disks, err := writeDisks(ctx, k, o)
		if err != nil {
			return err
		}
		parts = append(parts, disks...)
	}
	m := manifest{Kernel: k.version, Go: goVersion(), Boards: o.Boards, Parts: parts}
	text, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	if err := writeFile(filepath.Join(o.Out, "manifest.json"), append(text, '\n'), 0o644); err != nil {
		return err
	}
	var total int64
	for _, p := range parts {
		total += p.Bytes
		o.Say("%-14s %5.1f MB  sha256 %s", p.Name, float64(p.Bytes)/1e6, p.SHA256[:16])
	}
	o.Say("done        %.1f MB in %s", float64(total)/1e6, o.Out)
	return nil
}

// lock keeps two builds from mixing in one cache.
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

// writeFile replaces path in one step: a build that is interrupted leaves the old file or the new.
func writeFile(path string, data []byte, mode os.FileMode) error {
	tmp := path + ".new"
	if err := os.WriteFile(tmp, data, mode); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}
