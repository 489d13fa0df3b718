package drive

import (
	"os"
	"path/filepath"
	"testing"
)

// TestFileGone: a file that was removed, and one that another took the name of, is gone; one that a fence of this
// very port replaced is not.
func TestFileGone(t *testing.T) {
	a, _, path := pair(t)
	gone := func(want bool, when string) {
		t.Helper()
		if got := a.(*File).Gone(); got != want {
			t.Fatalf("%s: gone is %t", when, got)
		}
	}
	gone(false, "opened")
	aside := filepath.Join(filepath.Dir(path), "aside")
	must(t, os.Rename(path, aside))
	gone(true, "renamed")
	must(t, Create(path, 1<<20))
	gone(true, "another file has the name")
	must(t, os.Rename(aside, path))
	gone(false, "back")
	must(t, os.Remove(path))
	gone(true, "removed")
}

// TestBlockGone needs a loop device, so root and a kernel that has them.
func TestBlockGone(t *testing.T) {
	devices, _ := filepath.Glob("/dev/loop[0-9]*")
	for _, path := range devices {
		b, err := openBlock(path)
		if err != nil {
			continue
		}
		defer b.Close()
		if b.Gone() {
			t.Fatalf("%s is gone though it is there", path)
		}
		was := sysDevBlock
		defer func() { sysDevBlock = was }()
		dir := t.TempDir()
		if sysDevBlock = dir; !b.Gone() {
			t.Fatalf("%s: a node without a disk is not gone", path)
		}
		return
	}
	t.Skip("no block device can be opened here")
}
