package main

import (
	"bytes"
	"context"
	"debug/pe"
	"os"
	"path/filepath"
	"testing"

	"github.com/diskfs/go-diskfs/backend/file"
	"github.com/diskfs/go-diskfs/filesystem/fat32"
	"github.com/diskfs/go-diskfs/partition/gpt"

	"github.com/ledge-storage/ledge/image/uki"
)

// TestDisk reads a disk back, and compares two of the same inputs, one made with another idea of the time.
func TestDisk(t *testing.T) {
	program := bytes.Repeat([]byte("unified kernel image "), 100000)
	var made [2][]byte
	for i := range made {
		t.Setenv("SOURCE_DATE_EPOCH", []string{"", "1"}[i])
		path := filepath.Join(t.TempDir(), "disk.img")
		if err := writeDisk(path, "qemu-q35", program); err != nil {
			t.Fatal(err)
		}
		var err error
		if made[i], err = os.ReadFile(path); err != nil {
			t.Fatal(err)
		}
		if i > 0 {
			continue
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		table, err := gpt.Read(f, sectorBytes, sectorBytes)
		if err != nil {
			t.Fatal(err)
		}
		if err := table.Verify(f, diskBytes); err != nil {
			t.Error(err)
		}
		names := ""
		for _, p := range table.Partitions {
			if p.Type != gpt.Unused {
				names += p.Name + " "
			}
		}
		if names != "ledge-A ledge-B ledge-state " {
			t.Errorf("partitions %s", names)
		}
		slot, err := fat32.Read(file.New(f, true), slotBytes, mib, sectorBytes)
		if err != nil {
			t.Fatal(err)
		}
		if data, err := slot.ReadFile(slotFile); err != nil || !bytes.Equal(data, program) {
			t.Errorf("slot A has %d bytes of %d, %v", len(data), len(program), err)
		}
		state, err := fat32.Read(file.New(f, true), stateBytes, mib+2*slotBytes, sectorBytes)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := state.ReadDir(stateDir[1:]); err != nil {
			t.Errorf("state: %v", err)
		}
	}
	if !bytes.Equal(made[0], made[1]) {
		t.Error("two disks of the same inputs differ")
	}
}

// TestUnifiedImageOfAStubFromDebian is skipped where no build fetched the stub.
func TestUnifiedImageOfAStubFromDebian(t *testing.T) {
	o := Options{Cache: "../build/cache", Say: t.Logf}
	if _, err := os.Stat(filepath.Join(o.Cache, stubPackage, stubPath)); err != nil {
		t.Skip("build/cache has no stub")
	}
	stub, err := fetchStub(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	out, err := uki.Unify(stub, []uki.Section{{Name: ".linux", Data: []byte("kernel")}})
	if err != nil {
		t.Fatal(err)
	}
	if f, err := pe.NewFile(bytes.NewReader(out)); err != nil || f.Section(".linux") == nil || f.Section(".sdmagic") == nil {
		t.Errorf("%v", err)
	}
}
