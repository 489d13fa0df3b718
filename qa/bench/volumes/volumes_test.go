package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"testing"
	"time"
)

// TestMain is the contestants' process too.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "serve" {
		if err := serve(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// Each contestant runs, has every figure that it can have, and stores what it should; what it reads is what was written.
func TestVolumes(t *testing.T) {
	if _, err := exec.LookPath("qemu-storage-daemon"); err != nil {
		t.Fatal(err, "('make packages' installs it)")
	}
	s := &settings{t.TempDir(), content(48 << 20), 50 * time.Millisecond, 1, regexp.MustCompile("")}
	figures, err := s.run(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	printTable(figures)
	for _, c := range contestants {
		for _, r := range rows {
			want := 1
			if c.name == "raw" && (r.figure == "snapshot" || r.figure == "after snapshot" || r.figure == "delete snapshot") ||
				c.name == "qcow2-zstd" && (r.figure == "random write" || r.figure == "random write cpu" || r.figure == "snapshot" || r.figure == "after snapshot" || r.figure == "delete snapshot") {
				want = 0
			}
			if got := len(figures[c.name][r.figure]); got != want {
				t.Errorf("%s: %d figures of %q", c.name, got, r.what)
			}
		}
	}
	if f := figures["ledge"]; f["stored"][0] > 0.75 || f["stored again"][0] > 0.6*f["stored"][0] {
		t.Errorf("ledge: stored %v, again %v", f["stored"], f["stored again"])
	}
	for _, c := range contestants {
		dir := t.TempDir()
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		d, err := c.start(t.Context(), dir, self)
		if err != nil {
			t.Fatal(c.name, err)
		}
		got := make([]byte, chunk)
		for _, off := range []int64{0, 8 << 20} {
			if err := d.WriteAt(t.Context(), s.data[off:off+chunk], off); err != nil {
				t.Error(c.name, err)
			}
			if err := d.ReadAt(t.Context(), got, off); err != nil || !bytes.Equal(got, s.data[off:off+chunk]) {
				t.Errorf("%s: reads something else, %v", c.name, err)
			}
		}
		if err := d.stop(); err != nil {
			t.Error(c.name, err)
		}
	}
}
