package guest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ledge-storage/ledge/target/mem"
)

const bootTarget = "iqn.2026-11.io.ledge.qa:boot"

// TestBootFromLUN: a machine whose only disk is a LUN. QEMU's own initiator (libiscsi) logs in with CHAP and a header
// digest; UEFI finds the partition, and in it the kernel; that mounts its root from the same disk, writes to it and
// powers off. A second boot finds what the first one wrote, and what lies on the LUN is a clean file system.
func TestBootFromLUN(t *testing.T) {
	if testing.Short() {
		t.Skip("boots guests")
	}
	b, err := build()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "ledge-boot-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	disk := filepath.Join(dir, "disk.img")
	size, err := b.WriteDisk(t.Context(), disk)
	if err != nil {
		t.Fatal(err)
	}
	s := newShelf(t, bootTarget)
	unit := s.attach(t, 7, mem.Options{Bytes: size, Name: "boot"}, "MEMORY")
	// The target proves itself only to who asks; QEMU's driver does not.
	url := fmt.Sprintf("iscsi://%s%%%s@%s/%s/7", secrets.User, secrets.Secret, s.address[0], bootTarget)

	// 1. The disk goes onto the LUN as a user would bring it there.
	if out, err := exec.CommandContext(t.Context(), "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", disk, url).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img convert: %v: %s", err, out)
	}
	if wrong := exec.CommandContext(t.Context(), "qemu-img", "info", strings.Replace(url, secrets.Secret, "another-secret-02", 1)); wrong.Run() == nil {
		t.Error("a wrong secret opened the LUN")
	}
	t.Logf("the disk has %d MiB, of which the LUN holds %d", size>>20, unit.Held()>>20)

	// 2. Boot it, twice.
	for boot := 1; boot <= 2; boot++ {
		home := filepath.Join(dir, fmt.Sprint(boot))
		if err := os.Mkdir(home, 0o755); err != nil {
			t.Fatal(err)
		}
		before := s.servers[0].Stats()
		m, err := b.Start(t.Context(), MachineOptions{Dir: home, Firmware: true, Args: []string{
			"-drive", "if=none,id=boot,format=raw,cache=none,file=" + url, "-device", "virtio-blk-pci,drive=boot,bootindex=0"}})
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{"guest: root is " + bootRoot, "guest: up"} {
			if !strings.Contains(m.Console(), want) {
				t.Errorf("the console does not say %q:\n%s", want, m.Console())
			}
		}
		out := m.sh(t, `findmnt -n -o SOURCE,FSTYPE /; cat /boots 2>/dev/null; echo boot `+fmt.Sprint(boot)+` >> /boots
			dd if=/dev/urandom of=/written bs=64k count=32 conv=fsync 2>/dev/null; sha256sum /written > /sum.new; mv /sum.new /sum; sync`)
		if want := bootRoot + " ext4\n" + strings.Repeat("boot 1\n", boot-1); out != want {
			t.Errorf("boot %d: %q, not %q", boot, out, want)
		}
		// What was written is read from the LUN, not from the guest's memory.
		m.sh(t, "echo 3 > /proc/sys/vm/drop_caches && sha256sum -c /sum")
		if boot == 2 {
			m.sh(t, fio+" --filename=/verify --size=4M")
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
		after := s.servers[0].Stats()
		t.Logf("boot %d: kernel %s; %d logins, %d MiB read and %d MiB written at the LUN", boot, m.Kernel(), after.Logins-before.Logins,
			(after.ReadBytes-before.ReadBytes)>>20, (after.WriteBytes-before.WriteBytes)>>20)
	}

	// 3. What lies there, seen from outside.
	root := filepath.Join(dir, "root.ext4")
	if err := os.WriteFile(root, contents(t, unit, rootAt, size-rootAt), 0o600); err != nil {
		t.Fatal(err)
	}
	// The guest powers off with its root mounted: the journal is replayed, and then nothing is left to mend.
	if out, err := exec.CommandContext(t.Context(), "e2fsck", "-p", root).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v: %s", err, out)
	}
	if out, err := exec.CommandContext(t.Context(), "debugfs", "-R", "cat /boots", root).Output(); err != nil || string(out) != "boot 1\nboot 2\n" {
		t.Errorf("/boots on the LUN is %q, %v", out, err)
	}
}

// contents reads a piece of a unit past the engine.
func contents(t *testing.T, d *mem.Device, at, n int64) []byte {
	t.Helper()
	p := make([]byte, n)
	if err := d.Read(context.Background(), uint64(at)/sectorBytes, [][]byte{p}); err != nil {
		t.Fatal(err)
	}
	return p
}
