package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// TestNamedPartitions: the GPT name counts, whole; disks and broken entries are passed over.
func TestNamedPartitions(t *testing.T) {
	root := t.TempDir()
	for name, uevent := range map[string]string{
		"nvme0n1":   "DEVNAME=nvme0n1\nDEVTYPE=disk\n",
		"nvme0n1p2": "DEVTYPE=partition\nPARTN=2\nPARTNAME=ledge-B\n",
		"nvme0n1p3": "DEVTYPE=partition\nPARTN=3\nPARTNAME=ledge-state\n",
		"sdb1":      "DEVTYPE=partition\nPARTN=1\nPARTNAME=ledge-state-of-another\n",
	} {
		if err := os.MkdirAll(filepath.Join(root, name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, name, "uevent"), []byte(uevent), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(root, "gone"), 0o755); err != nil {
		t.Fatal(err)
	}
	if got := namedPartitions(root, statePartName); !slices.Equal(got, []string{"nvme0n1p3"}) {
		t.Errorf("%v", got)
	}
	if got := namedPartitions(filepath.Join(root, "nothing"), statePartName); got != nil {
		t.Errorf("%v", got)
	}
}

// TestReadBounded: a configuration that is too large, or that is no file, is an error and never more.
func TestReadBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "shelf.json")
	if _, err := readBounded(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing file: %v", err)
	}
	for _, c := range []struct {
		bytes int
		good  bool
	}{{0, true}, {maxConfigBytes, true}, {maxConfigBytes + 1, false}} {
		if err := os.WriteFile(path, make([]byte, c.bytes), 0o600); err != nil {
			t.Fatal(err)
		}
		if data, err := readBounded(path); (err == nil) != c.good || c.good && len(data) != c.bytes {
			t.Errorf("%d bytes: read %d, %v", c.bytes, len(data), err)
		}
	}
	if _, err := readBounded(filepath.Dir(path)); err == nil {
		t.Error("a directory was read")
	}
}

func TestBootDiskAmongTheDrives(t *testing.T) {
	for _, c := range []struct {
		path string
		want bool
	}{{"/dev/sda", true}, {"/dev/sda3", true}, {"/dev/nvme0n1", false}, {"/dev/disk/x", false}} {
		if matches([]string{"/dev/sd*", "/dev/disk/by-path/*"}, c.path) != c.want {
			t.Errorf("%s: want %v", c.path, c.want)
		}
	}
}
