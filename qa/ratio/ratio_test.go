package main

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// The bounds of issue 5, on a part of Go's own source: an image, the same again with files changed and missing, and a compressed archive.
func TestRatios(t *testing.T) {
	out, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		t.Fatal(err)
	}
	src, err := filepath.EvalSymlinks(filepath.Join(strings.TrimSpace(string(out)), "src")) // Debian's is a link
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	pack := func(name string, change bool) string {
		var image []byte
		n := 0
		err := filepath.WalkDir(src, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || len(image) > 24<<20 {
				return err
			}
			n++
			b, err := os.ReadFile(path)
			if change && n%40 == 0 {
				return err
			}
			if change && n%15 == 0 {
				b = append([]byte("// changed\n"), b...)
			}
			image = append(image, b...)
			image = append(image, make([]byte, -len(image)&4095)...) // as a file system does
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, image, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	one, two := pack("one", false), pack("two", true)
	archive := filepath.Join(dir, "archive.gz")
	if out, err := exec.Command("sh", "-c", "gzip -c "+one+" > "+archive).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	r, err := measure(t.Context(), 0, []string{one, two})
	if err != nil {
		t.Fatal(err)
	}
	t.Log(r.row("two images"))
	if r.data < 40<<20 || r.unique > r.data*3/4 {
		t.Fatalf("the data is not what it should be: %+v", r)
	}
	if d := r.dedup(); d < 0.95 || d > 1 {
		t.Errorf("%.4f of the duplicates were found, want 0.95", d)
	}
	if most := float64(r.oracle) * 1.1; float64(r.stored) > most {
		t.Errorf("%d bytes stored, the oracle has %d", r.stored, r.oracle)
	}
	if r, err = measure(t.Context(), 0, []string{archive}); err != nil {
		t.Fatal(err)
	}
	t.Log(r.row("archive"))
	if most := float64(r.data) * 1.01; float64(r.stored) > most {
		t.Errorf("%d bytes stored of an archive of %d", r.stored, r.data)
	}
}
