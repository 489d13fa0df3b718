package qcow2

import (
	"bytes"
	"context"
	"errors"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// disk is a Source in memory.
type disk struct {
	size  int64
	parts map[int64][]byte // by offset, multiples of 4 KiB
	order []int64          // the offsets, once they are asked for
}

const unit = 4096

func (d *disk) Size() int64 { return d.size }

func (d *disk) Next(_ context.Context, off int64) (bool, int64, error) {
	_, ok := d.parts[off/unit*unit]
	if ok {
		return true, unit - off%unit, nil
	}
	if d.order == nil {
		d.order = slices.Sorted(maps.Keys(d.parts))
	}
	if i, _ := slices.BinarySearch(d.order, off); i < len(d.order) {
		return false, d.order[i] - off, nil
	}
	return false, d.size - off, nil
}

func (d *disk) ReadAt(_ context.Context, p []byte, off int64) error {
	for len(p) > 0 {
		n := min(len(p), int(unit-off%unit))
		if b := d.parts[off/unit*unit]; b != nil {
			copy(p[:n], b[off%unit:])
		} else {
			clear(p[:n])
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

func newDisk(seed uint64, size int64, parts int) *disk {
	rng := rand.New(rand.NewPCG(seed, 0))
	d := &disk{size: size, parts: map[int64][]byte{}}
	for range parts {
		at := rng.Int64N(size) / unit * unit
		for range 1 + rng.IntN(40) {
			if at >= size {
				break
			}
			b := make([]byte, unit)
			for i := 0; i < len(b) && at+int64(i) < size; i += 7 {
				b[i] = byte(rng.Uint32())
			}
			d.parts[at] = b
			at += unit
		}
	}
	return d
}

func image(t testing.TB, src Source) []byte {
	t.Helper()
	p, err := NewPlan(t.Context(), src)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	last := int64(0)
	if err := p.Write(t.Context(), &out, func(n int64) { last = n }); err != nil {
		t.Fatal(err)
	}
	if int64(out.Len()) != p.Bytes() || p.DataBytes() > 0 && last != p.Bytes() {
		t.Fatalf("%d bytes written, %d planned, %d told", out.Len(), p.Bytes(), last)
	}
	return out.Bytes()
}

// same compares a source with the disk, in odd pieces, and where there is data.
func same(t testing.TB, d *disk, got Source) {
	t.Helper()
	if got.Size() != d.size {
		t.Fatalf("size %d, want %d", got.Size(), d.size)
	}
	const piece = 100_000
	for off := range d.parts {
		from := max(0, off-5000)
		a, b := make([]byte, piece), make([]byte, piece)
		if err := errors.Join(got.ReadAt(t.Context(), a, from), d.ReadAt(t.Context(), b, from)); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(a, b) {
			t.Fatalf("bytes from %d on differ", from)
		}
		if data, n, err := got.Next(t.Context(), off); !data || n <= 0 || err != nil {
			t.Fatalf("at %d: data %t, %d bytes, %v", off, data, n, err)
		}
	}
	held := int64(0)
	for off := int64(0); off < d.size; {
		data, n, err := got.Next(t.Context(), off)
		if err != nil || n <= 0 {
			t.Fatal(n, err)
		}
		if data {
			held += n
		}
		off += n
	}
	if most := int64(len(d.parts)) * (1 << 21); held > most {
		t.Fatalf("%d bytes hold data, %d at most should", held, most)
	}
}

func TestRoundTrip(t *testing.T) {
	for _, test := range []struct {
		name  string
		size  int64
		parts int
	}{{"empty", 1 << 30, 0}, {"nothing", 0, 0}, {"small", 5 * unit, 2}, {"odd end", 3<<30 + 3*unit, 60}, {"ends in data", 1 << 20, 40}, {"16 TiB", 16 << 40, 50}} {
		t.Run(test.name, func(t *testing.T) {
			d := newDisk(1, max(test.size, 1), test.parts)
			d.size = test.size
			raw := image(t, d)
			m, err := Open(bytes.NewReader(raw), int64(len(raw)))
			if err != nil {
				t.Fatal(err)
			}
			same(t, d, m)
			fromStream(t, raw, d)
			t.Run("check", func(t *testing.T) {
				needQEMU(t)
				if out := qemuImg(t, raw, "check", "IMAGE"); !strings.Contains(out, "No errors") {
					t.Fatal(out)
				}
			})
		})
	}
}

// fromStream reads an image front to back, through a pipe that gives little at a time.
func fromStream(t *testing.T, raw []byte, d *disk) {
	t.Helper()
	s, err := NewStream(struct{ io.Reader }{bytes.NewReader(raw)})
	if err != nil {
		t.Fatal(err)
	}
	seen, last, p := &disk{size: s.Size(), parts: map[int64][]byte{}}, int64(-1), make([]byte, 3*Cluster)
	for {
		off, n, err := s.Next(p)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil || off <= last || n <= 0 || off+int64(n) > s.Size() {
			t.Fatal(off, n, err)
		}
		last = off
		for i := 0; i < n; i += unit {
			seen.parts[off+int64(i)] = bytes.Clone(p[i : i+unit])
		}
	}
	same(t, d, seen)
}

// needQEMU skips a comparison where qemu-img is missing: `make test` installs it first (package qemu-utils), and in CI it must be there.
func needQEMU(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("qemu-img"); err == nil {
		return
	}
	if os.Getenv("CI") != "" {
		t.Fatal("qemu-img is missing")
	}
	t.Skip("qemu-img is missing, so nothing is compared with QEMU: 'make packages' installs it")
}

// qemuImg runs qemu-img on an image, IMAGE in args.
func qemuImg(t *testing.T, raw []byte, args ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	for i := range args {
		args[i] = strings.ReplaceAll(args[i], "IMAGE", path)
	}
	out, err := exec.Command("qemu-img", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("qemu-img %v: %v: %s", args, err, out)
	}
	return string(out)
}

// QEMU's own images, of each kind, read as what went in.
func TestFromQEMU(t *testing.T) {
	needQEMU(t)
	d := newDisk(7, 64<<20, 30)
	raw := image(t, d)
	for _, test := range []struct {
		name string
		args []string
		want error
	}{
		{"version 3", nil, nil},
		{"version 2", []string{"-o", "compat=0.10"}, nil},
		{"deflate", []string{"-c"}, nil},
		{"zstd", []string{"-c", "-o", "compression_type=zstd"}, nil},
		{"clusters of 4 KiB", []string{"-o", "cluster_size=4k"}, nil},
		{"clusters of 2 MiB", []string{"-o", "cluster_size=2M"}, nil},
		{"metadata in advance", []string{"-o", "preallocation=metadata"}, nil},
		{"extended entries", []string{"-o", "extended_l2=on"}, ErrUnsupported},
		{"backing file", []string{"-B", "/dev/null", "-F", "raw"}, ErrUnsupported},
	} {
		t.Run(test.name, func(t *testing.T) {
			out := filepath.Join(t.TempDir(), "out")
			qemuImg(t, raw, append(append([]string{"convert", "-f", "qcow2", "-O", "qcow2"}, test.args...), "IMAGE", out)...)
			b, err := os.ReadFile(out)
			if err != nil {
				t.Fatal(err)
			}
			m, err := Open(bytes.NewReader(b), int64(len(b)))
			if !errors.Is(err, test.want) {
				t.Fatalf("open: %v, want %v", err, test.want)
			}
			if err != nil {
				return
			}
			defer m.Close()
			same(t, d, m)
		})
	}
}

// What QEMU makes of our image is what went in.
func TestToQEMU(t *testing.T) {
	needQEMU(t)
	d := newDisk(3, 40<<20+unit, 25)
	out := filepath.Join(t.TempDir(), "raw")
	qemuImg(t, image(t, d), "convert", "-f", "qcow2", "-O", "raw", "IMAGE", out)
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, d.size)
	if err := d.ReadAt(t.Context(), want, 0); err != nil || !bytes.Equal(b, want) {
		t.Fatalf("QEMU reads something else (%v)", err)
	}
}

func TestRefused(t *testing.T) {
	raw := image(t, newDisk(1, 4<<20, 3))
	for name, change := range map[string]func(b []byte){
		"no magic":     func(b []byte) { b[0] = 0 },
		"version":      func(b []byte) { b[7] = 4 },
		"backing file": func(b []byte) { b[15] = 1 },
		"encryption":   func(b []byte) { b[35] = 1 },
		"dirty":        func(b []byte) { b[79] = 1 },
		"corrupt":      func(b []byte) { b[79] = 2 },
		"data file":    func(b []byte) { b[79] = 4 },
		"unknown":      func(b []byte) { b[79] = 32 },
		"clusters":     func(b []byte) { b[23] = 30 },
		"size":         func(b []byte) { b[24] = 1 },
		"L1 away":      func(b []byte) { b[41] = 1 },
		"L1 short":     func(b []byte) { b[39] = 0 },
	} {
		b := bytes.Clone(raw)
		change(b)
		if _, err := Open(bytes.NewReader(b), int64(len(b))); !errors.Is(err, ErrFormat) && !errors.Is(err, ErrUnsupported) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := NewStream(bytes.NewReader(b)); !errors.Is(err, ErrFormat) && !errors.Is(err, ErrUnsupported) && !errors.Is(err, ErrOrder) {
			t.Errorf("%s, as a stream: %v", name, err)
		}
	}
	for n := range len(raw) / 512 {
		b := raw[:n*512]
		s, err := NewStream(bytes.NewReader(b))
		for p := make([]byte, Cluster); err == nil; {
			_, _, err = s.Next(p)
		}
		if !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("%d of %d bytes: %v", len(b), len(raw), err)
		}
	}
}

// FuzzOpen: whatever the bytes, an answer, in bounded time and memory.
func FuzzOpen(f *testing.F) {
	raw := image(f, newDisk(1, 600<<20, 3))
	f.Add(raw[:6*Cluster])
	f.Fuzz(func(t *testing.T, b []byte) {
		p := make([]byte, 2*Cluster)
		if m, err := Open(bytes.NewReader(b), int64(len(b))); err == nil {
			for off, i := int64(0), 0; off < m.Size() && i < 64; i++ {
				_, n, err := m.Next(t.Context(), off)
				if err != nil {
					break
				}
				if n <= 0 {
					t.Fatalf("%d bytes at %d", n, off)
				}
				if err := m.ReadAt(t.Context(), p, off); err != nil {
					break
				}
				off += n
			}
			m.Close()
		}
		if s, err := NewStream(bytes.NewReader(b)); err == nil {
			for err == nil {
				_, _, err = s.Next(p)
			}
		}
	})
}
