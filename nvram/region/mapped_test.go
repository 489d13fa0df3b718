package region

import (
	"bytes"
	"errors"
	"io"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// ordinary maps a file as a DAX one, with the given instructions: what is no promise on such a file is not tested on it.
func ordinary(t *testing.T, blocks int, cpu *instructions) *Mapped {
	t.Helper()
	path := filepath.Join(t.TempDir(), "nv")
	if err := os.WriteFile(path, make([]byte, blocks*blockBytes), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := lock(f); err != nil {
		t.Fatal(err)
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, blocks*blockBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	r := &Mapped{f: f, size: int64(blocks * blockBytes), cpu: cpu, mem: mem}
	t.Cleanup(func() { r.Close() })
	return r
}

// Every write is durable when it returns, whatever its size.
func TestMappedDurable(t *testing.T) {
	r := ordinary(t, 64, nil)
	m := newCPUModel(r.mem)
	r.cpu = m.instructions()
	p := aligned(64)
	for i := range p {
		p[i] = byte(i*7 + i>>9)
	}
	for off := 0; off < 64; off += 5 {
		for n := 1; off+n <= 64; n += 7 {
			p[0]++
			if k, err := r.WriteAt(p[:n*blockBytes], int64(off*blockBytes)); err != nil || k != n*blockBytes {
				t.Fatal(k, err)
			}
			if m.misuse != "" {
				t.Fatal(m.misuse)
			}
			if !bytes.Equal(m.durable, r.mem) {
				t.Fatalf("write of %d blocks at %d: not all of it is durable", n, off)
			}
			q := aligned(n)
			if _, err := r.ReadAt(q, int64(off*blockBytes)); err != nil || !bytes.Equal(q, p[:n*blockBytes]) {
				t.Fatalf("reads otherwise: %v", err)
			}
		}
	}
}

// A mapping reaches the file, with each way that this machine has.
func TestMappedFile(t *testing.T) {
	for _, cpu := range append(everyInstructions(), nil) {
		r := ordinary(t, 8, cpu)
		p := aligned(3)
		for i := range p {
			p[i] = byte(i*3 + 1)
		}
		if _, err := r.WriteAt(p, 5*blockBytes); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(r.f.Name())
		if err != nil || !bytes.Equal(b[5*blockBytes:], p) || !bytes.Equal(b[:5*blockBytes], make([]byte, 5*blockBytes)) {
			t.Fatalf("%s: file differs: %v", r.Medium(), err)
		}
		for _, c := range []struct {
			p    []byte
			off  int64
			want error
		}{
			{p[:100], 0, ErrUnaligned},
			{p[8 : 8+blockBytes], 0, ErrUnaligned},
			{p, 17, ErrUnaligned},
			{p, 6 * blockBytes, io.ErrUnexpectedEOF},
			{p, -blockBytes, io.ErrUnexpectedEOF},
			{p, math.MaxInt64 / blockBytes * blockBytes, io.ErrUnexpectedEOF},
		} {
			if _, err := r.WriteAt(c.p, c.off); !errors.Is(err, c.want) {
				t.Errorf("write %d at %d: %v", len(c.p), c.off, err)
			}
			if _, err := r.ReadAt(c.p, c.off); !errors.Is(err, c.want) {
				t.Errorf("read %d at %d: %v", len(c.p), c.off, err)
			}
		}
	}
}

// Memory that the kernel cannot give (a poisoned page; here, one behind the file's end) is an error of the call that
// touched it; the process and all other memory go on.
func TestMappedPoison(t *testing.T) {
	for _, cpu := range append(everyInstructions(), nil) {
		r := ordinary(t, 64, cpu)
		p := aligned(16)
		for i := range p {
			p[i] = 0x5a
		}
		if err := r.f.Truncate(32 * blockBytes); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				q := aligned(16)
				for i := range 50 {
					if _, err := r.ReadAt(q, 40*blockBytes); !errors.Is(err, ErrPoison) {
						t.Errorf("read of lost memory: %v", err)
					}
					if _, err := r.WriteAt(p, 24*blockBytes); !errors.Is(err, ErrPoison) {
						t.Errorf("write that ends in lost memory: %v", err)
					}
					if _, err := r.WriteAt(p[:blockBytes], int64(i%16)*blockBytes); err != nil {
						t.Errorf("write of good memory: %v", err)
					}
					if _, err := r.ReadAt(q[:blockBytes], int64(i%16)*blockBytes); err != nil || q[0] != 0x5a {
						t.Errorf("read of good memory: %v", err)
					}
				}
			})
		}
		wg.Wait()
		// Outside of the region's calls a fault is what it always was: recover finds other panics untouched.
		func() {
			defer func() {
				if recover() == nil {
					t.Error("a panic was swallowed")
				}
			}()
			_ = r.access("test", 0, func([]byte) error { panic("other") })
		}()
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := r.ReadAt(p, 0); !errors.Is(err, os.ErrClosed) {
			t.Fatalf("read after close: %v", err)
		}
		if _, err := r.WriteAt(p, 0); !errors.Is(err, os.ErrClosed) {
			t.Fatalf("write after close: %v", err)
		}
	}
}

// Kind dax on a file system that is not mounted with dax is refused: the stores would be durable only some time.
func TestMappedNeedsDAX(t *testing.T) {
	for _, dir := range dirs(t) {
		path := filepath.Join(dir, "nv")
		_, err := Open(path, Options{Create: true, Size: 8 * blockBytes, Kind: KindDAX})
		if !errors.Is(err, ErrNotDAX) && err != nil {
			t.Fatal(err)
		}
		if err == nil && detect() != nil {
			t.Fatalf("%s was mapped synchronously", dir)
		}
	}
}

// fakeSys is a sysfs with a device.
func fakeSys(t *testing.T, class, numbers string, files map[string]string) sysfs {
	t.Helper()
	root := t.TempDir()
	dir := filepath.Join(root, "devices", "x", "dev0")
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if to, ok := strings.CutPrefix(content, "-> "); ok {
			if err := os.MkdirAll(filepath.Join(root, to), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(filepath.Join(root, to), path); err != nil {
				t.Fatal(err)
			}
		} else if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	link := filepath.Join(root, "dev", class, numbers)
	if err := os.MkdirAll(filepath.Dir(link), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	return sysfs(root)
}

// Only a character device of the dax subsystem is one; its size and alignment are the kernel's.
func TestDAXDevice(t *testing.T) {
	null := unix.Mkdev(1, 3)
	for _, c := range []struct {
		files map[string]string
		want  daxDevice
		err   bool
	}{
		{map[string]string{"subsystem": "-> bus/dax", "size": "16777216\n", "align": "2097152\n"}, daxDevice{16 << 20, 2 << 20}, false},
		{map[string]string{"subsystem": "-> bus/dax", "size": "16777216\n", "align": "4096\n"}, daxDevice{16 << 20, 4096}, false},
		{map[string]string{"subsystem": "-> class/dax", "size": "0x1000000"}, daxDevice{16 << 20, 2 << 20}, false},
		{map[string]string{"subsystem": "-> bus/dax", "size": "16 MB"}, daxDevice{}, true},
		{map[string]string{"subsystem": "-> bus/dax"}, daxDevice{}, true},
		{map[string]string{"subsystem": "-> class/mem", "size": "16777216"}, daxDevice{}, true},
		{map[string]string{"size": "16777216"}, daxDevice{}, true},
	} {
		sys := fakeSys(t, "char", "1:3", c.files)
		d, err := sys.dax(null)
		if (err != nil) != c.err || err == nil && *d != c.want {
			t.Errorf("%v: %+v, %v", c.files, d, err)
		}
	}
	// A device that says it is one, and cannot be mapped, is an error and no crash.
	sys := fakeSys(t, "char", "1:3", map[string]string{"subsystem": "-> bus/dax", "size": "16777216"})
	if _, err := open("/dev/null", Options{}, sys); err == nil {
		t.Error("/dev/null was mapped")
	}
	if _, err := open("/dev/null", Options{}, realSysfs); !errors.Is(err, ErrKind) {
		t.Errorf("/dev/null: %v", err)
	}
	if _, err := open("/dev/null", Options{Kind: KindSSD}, realSysfs); !errors.Is(err, ErrKind) {
		t.Errorf("/dev/null as an ssd: %v", err)
	}
}

// A drive that answers from a cache which it may lose is taken only when someone vouches for it.
func TestVolatileCache(t *testing.T) {
	rdev := unix.Mkdev(8, 1)
	for content, want := range map[string]bool{"write back\n": true, "write through\n": false, "something new\n": true} {
		for _, at := range []string{"queue/write_cache", "../queue/write_cache"} { // a drive, and a partition of it
			sys := fakeSys(t, "block", "8:1", map[string]string{at: content, "size": "1"})
			if got, err := sys.volatileCache(rdev); err != nil || got != want {
				t.Errorf("%s %q: volatile %t, %v", at, content, got, err)
			}
		}
	}
	sys := fakeSys(t, "block", "8:1", map[string]string{"size": "1"})
	if _, err := sys.volatileCache(rdev); !errors.Is(err, ErrVolatileCache) {
		t.Errorf("a kernel that does not say: %v", err)
	}
}

// On a real block device, if the machine has a loop device to lend.
func TestBlockDevice(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, 64*blockBytes), 0o600); err != nil {
		t.Fatal(err)
	}
	loop := attachLoop(t, path)
	if _, err := Open(loop, Options{Kind: KindPMEM}); !errors.Is(err, ErrKind) {
		t.Fatalf("a loop device as pmem: %v", err)
	}
	if _, err := Open(loop, Options{Kind: KindDAX}); !errors.Is(err, ErrKind) {
		t.Fatalf("a loop device as dax: %v", err)
	}
	st, err := os.Stat(loop)
	if err != nil {
		t.Fatal(err)
	}
	volatile, err := realSysfs.volatileCache(st.Sys().(*syscall.Stat_t).Rdev)
	if err != nil {
		t.Fatal(err)
	}
	_, err = Open(loop, Options{Kind: KindSSD})
	if volatile != errors.Is(err, ErrVolatileCache) {
		t.Fatalf("volatile %t, and opening answers %v", volatile, err)
	}
	r, err := Open(loop, Options{Kind: KindSSD, TrustPLP: true})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if !r.(*File).direct || r.Size() != 64*blockBytes {
		t.Fatal(r.Medium(), r.Size())
	}
	if flags, err := unix.FcntlInt(r.(*File).f.Fd(), unix.F_GETFL, 0); err != nil || flags&unix.O_DSYNC == 0 {
		t.Fatalf("a trusted drive is not written with O_DSYNC: %x, %v", flags, err)
	}
	p := aligned(1)
	p[0] = 1
	if _, err := r.WriteAt(p, 0); err != nil {
		t.Fatal(err)
	}
}

// attachLoop makes a loop device of a file until the test ends.
func attachLoop(t *testing.T, path string) string {
	t.Helper()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Skip("no loop devices:", err)
	}
	defer ctl.Close()
	back, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer back.Close()
	for range 8 { // another test may be quicker
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			t.Skip("no free loop device:", err)
		}
		name := "/dev/loop" + strconv.Itoa(n)
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			t.Skip("no loop device:", err)
		}
		if err := unix.IoctlSetInt(int(f.Fd()), unix.LOOP_SET_FD, int(back.Fd())); err != nil {
			f.Close()
			continue
		}
		t.Cleanup(func() {
			_ = unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0)
			f.Close()
		})
		return name
	}
	t.Skip("no loop device to be had")
	return ""
}
