package modules

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ledge-storage/ledge/image/modules/modulestest"
)

// testKernel is the root of four modules, one of them builtin.
func testKernel(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	for name, data := range map[string][]byte{
		"modules.builtin":                    []byte("kernel/drivers/virtio/virtio-pci.ko\n"),
		"kernel/drivers/scsi/sd_mod.ko":      modulestest.ELF("name=sd_mod\x00depends=scsi_mod\x00"),
		"kernel/drivers/scsi/scsi_mod.ko":    modulestest.ELF("depends=scsi-common,virtio_pci\x00"),
		"kernel/drivers/scsi/scsi-common.ko": modulestest.ELF("license=GPL\x00depends=\x00"),
		"kernel/drivers/unused.ko":           modulestest.ELF("depends=\x00"),
	} {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestModuleClosure(t *testing.T) {
	s, err := Open(context.Background(), testKernel(t), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	names, err := s.Closure([]string{"sd-mod", "virtio_pci"})
	if err != nil || !slices.Equal(names, []string{"scsi_common", "scsi_mod", "sd_mod"}) {
		t.Errorf("closure %v, %v", names, err)
	}
	want := "kernel/drivers/scsi/scsi-common.ko:\nkernel/drivers/scsi/scsi_mod.ko: kernel/drivers/scsi/scsi-common.ko\nkernel/drivers/scsi/sd_mod.ko: kernel/drivers/scsi/scsi_mod.ko\n"
	if got := s.Dep(names); got != want {
		t.Errorf("modules.dep:\n%swant:\n%s", got, want)
	}
	if order, err := s.Order([]string{"sd-mod"}); err != nil || !slices.Equal(order, []string{"scsi_common", "scsi_mod", "sd_mod"}) {
		t.Errorf("order %v, %v", order, err)
	}
	if _, err := s.Closure([]string{"ghost"}); err == nil || !strings.Contains(err.Error(), "ghost") {
		t.Errorf("a missing module: %v", err)
	}
}

func TestModuleDependsRefusesRubbish(t *testing.T) {
	good := modulestest.ELF("depends=a,b-c\x00")
	if got, err := depends(good); err != nil || !slices.Equal(got, []string{"a", "b_c"}) {
		t.Errorf("%v, %v", got, err)
	}
	for n := range good {
		depends(good[:n]) // must not panic
	}
	if _, err := depends([]byte("#!/bin/sh\n")); err == nil {
		t.Error("a script passed for a module")
	}
}
