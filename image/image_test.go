package main

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/u-root/u-root/pkg/cpio"

	"github.com/ledge-storage/ledge/image/modules/modulestest"
)

func TestNewestKernel(t *testing.T) {
	names := "linux-image-6.12.99+deb12-amd64\nlinux-image-6.12.117+deb12-amd64\nlinux-image-6.12.118+deb12-amd64-unsigned\n" +
		"linux-image-6.12.120+deb12-cloud-amd64\nlinux-image-6.12.119+deb12-amd64-dbg\nlinux-image-6.1.0-40-amd64\n"
	for _, c := range []struct{ names, pin, want string }{
		{names, "", "6.12.117"},
		{names + "linux-image-6.12.200+deb12-amd64", "", "6.12.200"},
		{names, "6.12.99", "6.12.99"},
		{names, "6.12.118", ""},
		{"linux-image-6.12.99+deb12-amd64", "", ""},
		{"", "", ""},
	} {
		got, err := newestKernel(c.names, c.pin)
		if got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("pin %q: %q, %v; want %q", c.pin, got, err, c.want)
		}
	}
}

// testKernel is an unpacked kernel package of four modules.
func testKernel(t *testing.T) *kernel {
	t.Helper()
	root := t.TempDir()
	k := &kernel{version: "6.12.1", release: "6.12.1+test", vmlinuz: filepath.Join(root, "vmlinuz"), modules: filepath.Join(root, "modules")}
	files := map[string][]byte{
		"../vmlinuz":                         []byte("kernel"),
		"modules.builtin":                    []byte("kernel/drivers/virtio/virtio-pci.ko\n"),
		"kernel/drivers/scsi/sd_mod.ko":      modulestest.ELF("name=sd_mod\x00depends=scsi_mod\x00"),
		"kernel/drivers/scsi/scsi_mod.ko":    modulestest.ELF("depends=scsi-common,virtio_pci\x00"),
		"kernel/drivers/scsi/scsi-common.ko": modulestest.ELF("license=GPL\x00depends=\x00"),
		"kernel/drivers/unused.ko":           modulestest.ELF("depends=\x00"),
	}
	for name, data := range files {
		path := filepath.Join(k.modules, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return k
}

// TestArchiveIsSortedAndTimeless reads the archive back with u-root's own reader.
func TestArchiveIsSortedAndTimeless(t *testing.T) {
	a := newArchive()
	a.file("bin/z", []byte("z"), 0o755)
	a.file("lib/modules/x/y.ko", []byte("y"), 0o644)
	a.symlink("bin/a", "z")
	data, err := a.bytes()
	if err != nil {
		t.Fatal(err)
	}
	records, err := cpio.ReadAllRecords(cpio.Newc.Reader(bytes.NewReader(data)))
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{".": true}
	last := ""
	for _, r := range records {
		if r.Name <= last || r.MTime != 0 || r.UID != 0 || r.GID != 0 {
			t.Errorf("%s after %s: time %d, owner %d:%d", r.Name, last, r.MTime, r.UID, r.GID)
		}
		if !seen[filepath.Dir(r.Name)] {
			t.Errorf("%s precedes its directory", r.Name)
		}
		seen[r.Name], last = true, r.Name
	}
	for _, name := range []string{"bin/a", "bin/z", "lib/modules/x", "dev/console", "proc"} {
		if !seen[name] {
			t.Errorf("%s is missing", name)
		}
	}
}

// TestReproducible builds the initramfs twice: from this tree, and from a copy of it elsewhere, with another
// cache and another umask. The bytes must be equal. The busybox is left out (40 s each; its own builds were
// compared by hand, see BUILDING.md): an empty file stands for it in both.
func TestReproducible(t *testing.T) {
	tree, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	elsewhere := filepath.Join(t.TempDir(), "a deeper", "place")
	if err := os.MkdirAll(elsewhere, 0o700); err != nil {
		t.Fatal(err)
	}
	// What PID 1 is made of, and no more: a copy of the whole would bring others' half-written files.
	for _, name := range []string{"go.mod", "go.sum", "boards", "firmware/init", "firmware/network"} {
		target := filepath.Join(elsewhere, name)
		if err := os.MkdirAll(filepath.Dir(target), 0o700); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("cp", "-r", filepath.Join(tree, name), target).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	k := testKernel(t)
	var built [2][]byte
	for i, where := range []string{tree, elsewhere} {
		out := t.TempDir()
		o := Options{Tree: where, Out: out, Cache: t.TempDir(), Say: t.Logf}
		a := newArchive()
		if _, err := addModules(context.Background(), a, k, []string{"sd_mod"}, o.Cache); err != nil {
			t.Fatal(err)
		}
		if err := addDaemons(context.Background(), a, o); err != nil {
			t.Fatal(err)
		}
		if _, err := writeImage(a, k, o); err != nil {
			t.Fatal(err)
		}
		if built[i], err = os.ReadFile(filepath.Join(out, "initramfs.zst")); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(built[0], built[1]) {
		t.Errorf("two builds differ: %d and %d bytes", len(built[0]), len(built[1]))
	}
}

// TestUnchangedIsNotCompressedAgain: the second build must leave the file alone, and mend a damaged one.
func TestUnchangedIsNotCompressedAgain(t *testing.T) {
	k := testKernel(t)
	compressions := 0
	o := Options{Out: t.TempDir(), Cache: t.TempDir(), Say: func(format string, args ...any) {
		if strings.HasPrefix(format, "initramfs") {
			compressions++
		}
	}}
	build := func(content string) {
		a := newArchive()
		a.file("init", []byte(content), 0o755)
		if _, err := writeImage(a, k, o); err != nil {
			t.Fatal(err)
		}
	}
	build("one")
	build("one")
	if compressions != 1 {
		t.Errorf("%d compressions of one content", compressions)
	}
	build("two")
	if compressions != 2 {
		t.Errorf("%d compressions after a change", compressions)
	}
	path := filepath.Join(o.Out, "initramfs.zst")
	if err := os.WriteFile(path, []byte("damaged"), 0o644); err != nil {
		t.Fatal(err)
	}
	build("two")
	if data, _ := os.ReadFile(path); compressions != 3 || string(data) == "damaged" {
		t.Errorf("a damaged image stayed")
	}
}

// TestRescueCommandsAreKept: a command that tools.go does not import would be lost to go mod tidy.
func TestRescueCommandsAreKept(t *testing.T) {
	text, err := os.ReadFile("tools.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range rescueCommands {
		if !strings.Contains(string(text), `"`+commandRoot+name+`"`) {
			t.Errorf("tools.go does not import %s", name)
		}
	}
}
