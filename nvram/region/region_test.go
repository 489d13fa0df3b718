package region

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
)

// dirs to test in: a disk's file system and, where there is one, tmpfs, which refuses O_DIRECT in old kernels.
func dirs(t *testing.T) []string {
	d := []string{t.TempDir()}
	if shm, err := os.MkdirTemp("/dev/shm", "region"); err == nil {
		t.Cleanup(func() { os.RemoveAll(shm) })
		d = append(d, shm)
	}
	return d
}

func TestFile(t *testing.T) {
	for _, dir := range dirs(t) {
		for _, buffered := range []bool{false, true} {
			path := filepath.Join(dir, "nv")
			os.Remove(path)
			if _, err := Open(path, Options{}); !errors.Is(err, os.ErrNotExist) {
				t.Fatal(err)
			}
			r, err := Open(path, Options{Create: true, Size: 8 * blockBytes, Buffered: buffered})
			if err != nil {
				t.Fatal(err)
			}
			if r.Size() != 8*blockBytes || buffered && r.(*File).Direct() {
				t.Fatal(r.Size(), r.Medium())
			}
			if _, err := Open(path, Options{}); !errors.Is(err, ErrInUse) {
				t.Fatalf("opened twice: %v", err)
			}
			p := aligned(2)
			copy(p, "abc")
			p[2*blockBytes-1] = 'z'
			if _, err := r.WriteAt(p, 6*blockBytes); err != nil {
				t.Fatal(err)
			}
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
			// Create keeps what is there, and its size.
			if r, err = Open(path, Options{Create: true, Size: 8 * blockBytes}); err != nil {
				t.Fatal(err)
			}
			q := aligned(2)
			if _, err := r.ReadAt(q, 6*blockBytes); err != nil || !bytes.Equal(p, q) {
				t.Fatal("content differs", err)
			}
			r.Close()
		}
	}
}

func TestRefusals(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "nv")
	if err := os.WriteFile(path, make([]byte, 5*blockBytes+100), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path, Options{Size: 6 * blockBytes}); !errors.Is(err, ErrTooSmall) {
		t.Fatal(err)
	}
	if _, err := Open(path, Options{Size: 100}); !errors.Is(err, ErrUnaligned) {
		t.Fatal(err)
	}
	if _, err := Open("/dev/null", Options{}); !errors.Is(err, ErrKind) {
		t.Fatal(err)
	}
	if _, err := Open(dir, Options{}); err == nil {
		t.Fatal("opened a directory")
	}
	r, err := Open(path, Options{Size: 4 * blockBytes})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	p := aligned(2)
	for _, c := range []struct {
		p    []byte
		off  int64
		want error
	}{
		{p[:100], 0, ErrUnaligned},
		{p[8 : 8+blockBytes], 0, ErrUnaligned},
		{p, 17, ErrUnaligned},
		{p, 3 * blockBytes, io.ErrUnexpectedEOF},
		{p, -blockBytes, io.ErrUnexpectedEOF},
	} {
		if _, err := r.WriteAt(c.p, c.off); !errors.Is(err, c.want) {
			t.Errorf("write %d at %d: %v", len(c.p), c.off, err)
		}
		if _, err := r.ReadAt(c.p, c.off); !errors.Is(err, c.want) {
			t.Errorf("read %d at %d: %v", len(c.p), c.off, err)
		}
	}
}
