package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/boards"
	"github.com/ledge-storage/ledge/qa/emulator"
)

// TestBurntDisk does what BUILDING.md, section Burn, says: copies the disk image, puts shelf.json into its
// partition with mcopy, and boots it by UEFI, without any kernel, command line or fw_cfg of QEMU's. As
// controller A from an NVMe drive; then as controller B from a USB stick, which must not be taken for one of
// the shelf's drives though it is among /dev/sd*.
func TestBurntDisk(t *testing.T) {
	needMachine(t)
	nvme := []string{"-device", "nvme,drive=boot,serial=boot,addr=10,bootindex=0"}
	for _, c := range []struct {
		controller string
		disk       []string
		until      string
		says       []string
	}{
		{"A", nvme, "ledge: serving role=no-pool", []string{"controller A; ledge/shelf.json on /dev/nvme0n1p3"}},
		{"C", nvme, "no shelfd without a configuration", []string{`ledge/shelf.json on /dev/nvme0n1p3: controller: "C"`}},
		{"B", []string{"-device", "qemu-xhci,id=xhci,addr=10", "-device", "usb-storage,bus=xhci.0,drive=boot,bootindex=0"},
			"ledge: serving role=no-pool", []string{"controller B; ledge/shelf.json on /dev/sd", "is detached"}},
	} {
		t.Run(c.controller, func(t *testing.T) {
			began := time.Now()
			dir := t.TempDir()
			disk := burn(t, dir, map[string]any{
				"shelf": "burnt", "controller": c.controller, "secret": "0123456789abcdef0123456789abcdef", "api_token": "0123456789abcdef",
				"api_listen": ":8443", "portals": map[string][]string{"A": {"10.0.2.15:3260"}, "B": {"10.0.2.15:3260"}},
			})
			text := bootBurnt(t, dir, disk, c.disk, c.until)
			for _, want := range append(c.says, "12 of 12 drives") {
				if !strings.Contains(text, want) {
					t.Errorf("the console does not say %q:\n%s", want, text)
				}
			}
			t.Logf("controller %s was up %.1f s after QEMU's start", c.controller, time.Since(began).Seconds())
		})
	}
}

// burn copies the image and the configuration onto it.
func burn(t *testing.T, dir string, config map[string]any) (disk string) {
	t.Helper()
	shelf := filepath.Join(dir, "shelf.json")
	if err := writeJSON(shelf, 0o600, config); err != nil {
		t.Fatal(err)
	}
	disk = filepath.Join(dir, "boot.img")
	command(t, t.Context(), "cp", "--sparse=always", filepath.Join(build, "image", "ledge-"+boardName+".img"), disk)
	command(t, t.Context(), "mcopy", "-i", disk+"@@257M", shelf, "::ledge/")
	return disk
}

// bootBurnt starts a machine with the board's devices and the boot disk, waits until its console says what is
// wanted, and returns what it said. The machine ends with the test.
func bootBurnt(t *testing.T, dir, disk string, attach []string, want string) string {
	t.Helper()
	b, err := boards.Load(boardName)
	if err != nil {
		t.Fatal(err)
	}
	for name, size := range map[string]int64{"nvram.img": 64 << 20, "drive.img": 64 << 20} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(filepath.Join(dir, name), size); err != nil {
			t.Fatal(err)
		}
	}
	vars, console := filepath.Join(dir, "vars.fd"), filepath.Join(dir, "console.log")
	command(t, t.Context(), "cp", "/usr/share/OVMF/OVMF_VARS_4M.fd", vars)
	args := []string{"-nodefaults", "-display", "none", "-no-user-config", "-M", "q35,nvdimm=on", "-cpu", emulator.CPU, "-smp", "2",
		"-m", "1G,slots=2,maxmem=4G",
		"-drive", "if=pflash,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd", "-drive", "if=pflash,format=raw,file=" + vars,
		"-object", "memory-backend-file,id=nvram,share=on,size=64M,pmem=off,mem-path=" + filepath.Join(dir, "nvram.img"), "-device", "nvdimm,memdev=nvram",
		// romfile=: no network boot is wanted.
		"-netdev", "user,id=management,restrict=on", "-device", "virtio-net-pci,romfile=,netdev=management,addr=" + slot(b.Links.Management.Device),
		"-netdev", "user,id=link,restrict=on", "-device", "virtio-net-pci,romfile=,netdev=link,addr=" + slot(b.Links.Partner.Device),
		"-device", "virtio-rng-pci", "-device", "i6300esb", "-action", "watchdog=reset", "-serial", "file:" + console,
		"-drive", "if=none,id=boot,format=raw,file=" + disk, "-device", "virtio-scsi-pci,id=scsi0"}
	args = append(args, attach...)
	for n := range b.Drives.Count {
		// Each drive is a view of one empty file that keeps its writes to itself: nothing is written here.
		args = append(args, "-drive", fmt.Sprintf("if=none,id=d%d,format=raw,snapshot=on,file.locking=off,file=%s", n, filepath.Join(dir, "drive.img")),
			"-device", fmt.Sprintf("scsi-hd,drive=d%d,bus=scsi0.0,scsi-id=%d,serial=d%d", n, n, n))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var said strings.Builder
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	var text string
	err = poll(ctx, func() error {
		data, _ := os.ReadFile(console)
		if text = string(data); strings.Contains(text, want) {
			return nil
		}
		select {
		case err := <-ended:
			ended <- err
			return permanent{fmt.Errorf("QEMU ended: %v: %s", err, said.String())}
		default:
			return errors.New("the console does not say " + want)
		}
	})
	cancel()
	<-ended
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return text
}
