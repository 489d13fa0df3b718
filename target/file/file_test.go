package file

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/devicetest"
)

func TestDevice(t *testing.T) {
	for _, o := range []Options{{BlockBytes: 512, Volatile: true}, {BlockBytes: 4096}} {
		o.Path, o.Bytes = filepath.Join(t.TempDir(), "disk"), 2<<20
		d, err := Open(o)
		if err != nil {
			t.Fatal(err)
		}
		devicetest.Run(t, d, 3)
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestReopen: data, size and UUID are there again; read-only refuses writes.
func TestReopen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	d, err := Open(Options{Path: path, Bytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	ctx, want := context.Background(), bytes.Repeat([]byte{5}, 1024)
	if err := d.Write(ctx, 3, [][]byte{want}, true); err != nil {
		t.Fatal(err)
	}
	first := d.Info()
	d.Close()
	d, err = Open(Options{Path: path, ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if i := d.Info(); i.UUID != first.UUID || i.Blocks != first.Blocks {
		t.Errorf("%+v, was %+v", i, first)
	}
	got := make([]byte, 1024)
	if err := d.Read(ctx, 3, [][]byte{got}); err != nil || !bytes.Equal(got, want) {
		t.Errorf("other data came back, %v", err)
	}
	if err := d.Write(ctx, 3, [][]byte{want}, false); !errors.Is(err, target.ErrReadOnly) {
		t.Errorf("write: %v", err)
	}
	if _, err := Open(Options{Path: filepath.Join(t.TempDir(), "none"), ReadOnly: true}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
}

func TestCopy(t *testing.T) {
	open := func(name string, volatile bool) *Device {
		d, err := Open(Options{Path: filepath.Join(t.TempDir(), name), Bytes: 1 << 20, Volatile: volatile})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { d.Close() })
		return d
	}
	devicetest.RunCopy(t, open("dst", false), open("src", true), 5)
	// Ranges that overlap although no two steps do.
	d, err := Open(Options{Path: filepath.Join(t.TempDir(), "sparse"), Bytes: 4 * copyStepBytes, Volatile: true})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if done, err := d.CopyFrom(context.Background(), d, 0, copyStepBytes/512, 2*copyStepBytes/512); done || err != nil {
		t.Errorf("ranges that overlap: %v %v", done, err)
	}
}
