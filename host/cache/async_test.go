package cache

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// asyncDisk is a drive that can be read by the kernel's queue, which fakeAsync is.
type asyncDisk struct{ sizedDisk }

func (d asyncDisk) async() (int, bool) { return 7, true }

// fakeAsync is a request to a drive.
type fakeAsync struct {
	d        *fakeDisk
	starts   *atomic.Int64
	startErr func() error
	n        chan int
	err      error
}

func (x *fakeAsync) start(fd int, p []byte, off int64) error {
	x.starts.Add(1)
	if x.startErr != nil {
		if err := x.startErr(); err != nil {
			return err
		}
	}
	go func() {
		n := 0
		n, x.err = x.d.ReadAt(p, off)
		x.n <- n
	}()
	return nil
}

func (x *fakeAsync) wait(limit time.Duration) (int, error) {
	var late <-chan time.Time
	if limit >= 0 {
		late = time.After(limit)
	}
	select {
	case n := <-x.n:
		return n, x.err
	case <-late:
		return 0, errLate
	}
}

func (x *fakeAsync) close() {}

func asyncCache(t *testing.T, startErr func() error) (*fakeDisk, *Cache, *atomic.Int64) {
	d, starts := newDisk(smallSize(32)), new(atomic.Int64)
	o := small(d)
	o.open = func() (medium, int64, error) {
		m, size, err := d.open()
		if err != nil {
			return nil, 0, err
		}
		return asyncDisk{m.(sizedDisk)}, size, nil
	}
	o.newAsync = func() (async, error) {
		return &fakeAsync{d: d, starts: starts, startErr: startErr, n: make(chan int, 1)}, nil
	}
	o.inline, o.ReadTimeout, o.slowTimeout = false, 20*time.Millisecond, 50*time.Millisecond
	c := openWith(t, o)
	for line := range 64 {
		until(t, "a line is let in", func() bool { return fill(t, c, storeA, 1, line) })
	}
	until(t, "regions are on the drive", func() bool { return c.drained() })
	return d, c, starts
}

// A drive that hangs while the kernel has the reads: they come back as misses, no more than may be are stuck, and when it answers
// the cache serves again.
func TestAsyncHang(t *testing.T) {
	d, c, starts := asyncCache(t, nil)
	if !has(t, c, storeA, 1, 5) || starts.Load() == 0 {
		t.Fatalf("%d reads went to the kernel", starts.Load())
	}
	release := make(chan struct{})
	d.set(func() { d.hang = release })
	var wg sync.WaitGroup
	for range 3 * readers {
		wg.Go(func() {
			for line := range 48 {
				if c.Read(storeA, 1, line, make([]byte, smallLine)) {
					t.Error("a hit from a drive that hangs")
				}
			}
		})
	}
	wg.Wait()
	if s := c.Stats(); s.Err == nil || !errors.Is(s.Err, errLate) || s.Bypasses == 0 {
		t.Errorf("not reported: %+v", s)
	}
	if n := c.stuck.Load(); n == 0 || n > 2*readers+2 {
		t.Errorf("%d requests are stuck", n)
	}
	close(release)
	d.set(func() { d.hang = nil })
	until(t, "it serves again", func() bool { return has(t, c, storeA, 1, 5) })
	if n := c.stuck.Load(); n != 0 { // with one left it would not be tried again
		t.Errorf("%d requests are stuck in a drive that answers", n)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

// What the kernel does not take, now or ever, is read in the other way.
func TestAsyncRefused(t *testing.T) {
	for _, x := range []struct {
		err   error
		often bool // it is tried again
	}{{unix.EAGAIN, true}, {unix.EOPNOTSUPP, false}, {unix.ENOSYS, false}, {unix.EINVAL, false}} {
		_, c, starts := asyncCache(t, func() error { return x.err })
		before := starts.Load()
		for line := range 32 {
			if !has(t, c, storeA, 1, line) {
				t.Errorf("%v: a miss", x.err)
			}
		}
		if n := starts.Load() - before; (n > 0) != x.often {
			t.Errorf("%v: tried %d times more", x.err, n)
		}
		if s := c.Stats(); s.Err != nil || s.Failures+s.Late+s.Bad != 0 {
			t.Errorf("%v: %+v", x.err, s)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
}

// An error of the drive is one, and a read that ends early, too.
func TestAsyncErrors(t *testing.T) {
	d, c, _ := asyncCache(t, nil)
	d.set(func() { d.readErr = func() error { return errMedium } })
	if has(t, c, storeA, 1, 3) {
		t.Error("a hit from a drive that fails")
	}
	if s := c.Stats(); s.Failures != 1 {
		t.Errorf("%+v", s)
	}
	d.set(func() { d.readErr = nil })
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

// The kernel's queue itself: whole reads, one past the end, one of a descriptor that is none, and an answer that does not come.
func TestAIO(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cache")
	c := openWith(t, Options{Path: path, SizeBytes: 64 << 20})
	for line := range 64 {
		until(t, "a line is let in", func() bool { return fill(t, c, storeA, 1, line) })
	}
	until(t, "they are on the medium", func() bool { return c.drained() })
	var wg sync.WaitGroup
	for r := range 8 {
		wg.Go(func() {
			for i := range 200 {
				if line := (i*7 + r) % 64; !has(t, c, storeA, 1, line) {
					t.Error("a miss")
				}
			}
		})
	}
	wg.Wait()
	f := c.medium.(*file)
	if f.buffered {
		t.Skip("this file system has no reads past its cache")
	}
	x, err := newAIO()
	if err != nil {
		t.Fatal(err)
	}
	defer x.close()
	p := alignedBytes(2 * blockBytes)
	if err := x.start(f.fd, p, 0); err != nil {
		t.Fatal(err)
	}
	n, err := x.wait(time.Minute)
	if errors.Is(err, unix.EOPNOTSUPP) {
		t.Skip("this file system takes no reads that may not wait")
	}
	if c.synchronous.Load() {
		t.Error("the cache does not read so")
	}
	if n != len(p) || err != nil || bytes.Count(p, []byte{0}) == len(p) {
		t.Errorf("%d bytes, %v", n, err)
	}
	if err := x.start(f.fd, p, 64<<20-blockBytes); err != nil {
		t.Fatal(err)
	}
	if n, err := x.wait(-1); n != blockBytes || err != nil {
		t.Errorf("%d bytes at the end, %v", n, err)
	}
	if err := x.start(1<<20, p, 0); !errors.Is(err, unix.EBADF) {
		t.Errorf("no descriptor: %v", err)
	}
	if n, err := x.wait(time.Millisecond); !errors.Is(err, errLate) {
		t.Errorf("nothing was asked: %d bytes, %v", n, err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

// A file in memory is read in place: nothing takes requests here.
func TestMemoryFile(t *testing.T) {
	path := filepath.Join("/dev/shm", fmt.Sprintf("ledge-cache-%d", os.Getpid()))
	defer os.Remove(path)
	m, _, err := openFile(&Options{Path: path, SizeBytes: 1 << 20})
	if errors.Is(err, os.ErrNotExist) {
		t.Skip("there is no /dev/shm")
	} else if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if _, err := m.WriteAt(bytes.Repeat([]byte{7}, blockBytes), 8*blockBytes); err != nil {
		t.Fatal(err)
	}
	c := &Cache{opt: Options{ReadTimeout: time.Millisecond, lineBytes: LineBytes}}
	o := c.newOp().(*op)
	o.m, o.n, o.off = m, blockBytes, 8*blockBytes
	if err := c.readOp(o); err != nil || o.buf[0] != 7 || o.buf[blockBytes-1] != 7 {
		t.Fatal(err, o.buf[0])
	}
	if o.off = 1 << 20; c.readOp(o) == nil {
		t.Error("read behind the end")
	}
}
