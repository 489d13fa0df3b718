package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/ledge-storage/ledge/host/qcow2"
)

// images is the agent's side of transfers: it exports a disk, and keeps what is imported.
type images struct {
	disk     memDisk
	short    bool // exports break off
	imported []byte
	query    string
}

type memDisk []byte

func (d memDisk) Size() int64 { return int64(len(d)) }

func (d memDisk) Next(_ context.Context, off int64) (bool, int64, error) {
	n := min(int64(len(d))-off, 4096-off%4096)
	return len(bytes.Trim(d[off:off+n], "\x00")) > 0, n, nil
}

func (d memDisk) ReadAt(_ context.Context, p []byte, off int64) error {
	clear(p)
	copy(p, d[min(off, int64(len(d))):])
	return nil
}

func (m *images) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch {
	case strings.HasSuffix(r.URL.Path, "/none/export"):
		w.WriteHeader(http.StatusNotFound)
		json.NewEncoder(w).Encode(&api.Error{Message: "no volume \"none\"", Hint: "look"})
	case strings.HasSuffix(r.URL.Path, "/export"):
		m.query = r.URL.RawQuery
		p, err := qcow2.NewPlan(r.Context(), m.disk)
		if err != nil {
			panic(err)
		}
		w.Header().Set("Content-Length", strconv.FormatInt(p.Bytes(), 10))
		w.Header().Set(api.DiskBytesHeader, strconv.FormatInt(m.disk.Size(), 10))
		if m.short {
			var all bytes.Buffer
			p.Write(r.Context(), &all, nil)
			w.Write(all.Bytes()[:all.Len()-9])
			panic(http.ErrAbortHandler)
		}
		p.Write(r.Context(), w, nil)
	case strings.HasSuffix(r.URL.Path, "/taken/import"):
		w.WriteHeader(http.StatusConflict)
		json.NewEncoder(w).Encode(&api.Error{Message: "volume exists", Hint: "another name"})
	default:
		m.query = r.URL.RawQuery
		s, err := qcow2.NewStream(r.Body)
		if err != nil {
			panic(err)
		}
		m.imported = make([]byte, s.Size())
		for p := make([]byte, qcow2.Cluster); ; {
			off, n, err := s.Next(p)
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				panic(err)
			}
			copy(m.imported[off:], p[:n])
		}
		w.WriteHeader(http.StatusCreated)
		json.NewEncoder(w).Encode(api.Volume{Name: "vm1", SizeBytes: s.Size(), IQN: "iqn.x:vm1", Portal: "127.0.0.1:3260"})
	}
}

func TestTransfer(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("LEDGE_RUN", dir)
	t.Setenv("LEDGE_SOCKET", "")
	m := &images{disk: make(memDisk, 9<<20+4096)}
	copy(m.disk[3<<20:], bytes.Repeat([]byte("ledge "), 50_000))
	copy(m.disk[9<<20:], "the end")
	l, err := net.Listen("unix", filepath.Join(dir, "hostd.sock"))
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: m}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })

	raw, image := filepath.Join(dir, "disk.img"), filepath.Join(dir, "disk.qcow2")
	does := func(want int, says, args string) string {
		t.Helper()
		code, out, errs := ledge(strings.Fields(args)...)
		if code != want || !strings.Contains(out+errs, says) {
			t.Fatalf("ledge %s: %d, want %d %q\n%s%s", args, code, want, says, out, errs)
		}
		return out
	}
	does(0, "exported db@monday to "+raw+" as raw: a disk of 9.0 MiB", "volume export db@monday "+raw)
	if m.query != "snapshot=monday" {
		t.Errorf("asked %q", m.query)
	}
	if got, err := os.ReadFile(raw); err != nil || !bytes.Equal(got, m.disk) {
		t.Fatalf("raw file: %d bytes, %v", len(got), err)
	}
	var st struct{ Blocks int64 }
	if out, err := exec.Command("stat", "-c", `{"Blocks":%b}`, raw).Output(); err != nil || json.Unmarshal(out, &st) != nil || st.Blocks > 4096 {
		t.Errorf("raw file is not sparse: %s %v", out, err)
	}
	does(1, "pass --force", "volume export db "+raw)
	does(0, `"format": "raw"`, "volume export db "+raw+" --force --json")
	does(0, "as qcow2", "volume export db "+image)
	does(1, "no regular file", "volume export db /dev/null --force")
	does(1, "no volume", "volume export none "+filepath.Join(dir, "x"))
	does(2, "want raw or qcow2", "volume export db x --format vmdk")
	does(2, "want NAME", "volume export db@ x")
	does(2, "standard output", "volume export db - --json")
	if out := does(0, "", "volume export db -"); out != string(m.disk) {
		t.Errorf("raw on standard output: %d bytes", len(out))
	}
	if out := does(0, "", "volume export db - --format qcow2"); !qcow2.Is([]byte(out)) {
		t.Errorf("qcow2 on standard output: %d bytes", len(out))
	}
	m.short = true
	for _, name := range []string{"part.img", "part.qcow2"} {
		does(1, "unexpected EOF", "volume export db "+filepath.Join(dir, name))
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*part*")); len(left) > 0 {
		t.Errorf("a broken export leaves %v", left)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".*")); len(left) > 0 {
		t.Errorf("a broken export leaves %v", left)
	}

	for _, file := range []string{raw, image} {
		m.imported = nil
		does(0, "imported "+file, "volume import "+file+" vm1 --size 40GiB")
		if !bytes.Equal(m.imported, m.disk) || m.query != "size_bytes=42949672960" {
			t.Fatalf("import of %s: %d bytes, asked %q", file, len(m.imported), m.query)
		}
	}
	if _, err := exec.LookPath("qemu-img"); err == nil {
		small := filepath.Join(dir, "small.qcow2")
		if out, err := exec.Command("qemu-img", "convert", "-c", "-O", "qcow2", image, small).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		m.imported = nil
		if does(0, `"format": "qcow2"`, "volume import "+small+" vm1 --json"); !bytes.Equal(m.imported, m.disk) {
			t.Fatal("import of a compressed image")
		}
	}
	f, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m.imported = nil
	var out, errs bytes.Buffer
	if code := (&tool{out: &out, in: f}).run(t.Context(), []string{"volume", "import", "-", "vm1"}, &out, &errs); code != 0 || !bytes.Equal(m.imported, m.disk) {
		t.Fatalf("import from standard input: %d, %s", code, errs.String())
	}
	does(1, "exists", "volume import "+raw+" taken")
	does(1, "no such file", "volume import "+filepath.Join(dir, "none")+" vm1")
	does(1, "not a valid image", "volume import "+raw+" vm1 --format qcow2")
	does(2, "want auto", "volume import "+raw+" vm1 --format vhd")
	empty := filepath.Join(dir, "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	does(1, "empty", "volume import "+empty+" vm1")
}
