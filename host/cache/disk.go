package cache

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A medium that hangs holds whoever asks it, often for minutes, and nothing in the kernel takes a
// read back. So nobody asks it himself: readers hand their request to the kernel (async.go) or to one of a fixed number of
// goroutines, and leave it there when its time is over, buffer and all. Whoever is stuck in the
// medium is counted, and as long as there is one, a bypassed medium stays bypassed: a hang
// costs at most 2·readers+2 goroutines and their buffers, however long it lasts.

const (
	readers     = 64 // reads in the medium at once, either way
	slowTimeout = 10 * time.Second
)

// errLate: the medium did not answer in time.
var errLate = errors.New("no answer in time")

// medium is what the cache is on. All is aligned to blocks: addresses, lengths, memory.
type medium interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	Sync() error
}

// alignedBytes makes a buffer that O_DIRECT takes.
func alignedBytes(n int) []byte {
	p := make([]byte, n+blockBytes)
	skip := -int(uintptr(unsafe.Pointer(unsafe.SliceData(p)))) & (blockBytes - 1)
	return p[skip : skip+n : skip+n]
}

// op is a read on its way.
type op struct {
	buf   []byte // of a slot's length
	n     int
	off   int64
	m     medium
	err   error
	call  call
	done  chan struct{} // takes one
	timer *time.Timer
}

// call is one request to the medium; whoever comes second, the answer or the end of waiting, learns it.
type call struct{ settled atomic.Bool }

func (k *call) settle() (first bool) { return k.settled.CompareAndSwap(false, true) }

func (c *Cache) newOp() any {
	o := &op{buf: alignedBytes(c.slotBytes()), done: make(chan struct{}, 1), timer: time.NewTimer(time.Hour)}
	o.timer.Stop()
	return o
}

// readOp reads o.n bytes at o.off. If it returns errLate, o is not the caller's any more.
func (c *Cache) readOp(o *op) error {
	if c.opt.inline {
		return readFull(o.m, o.buf[:o.n], o.off)
	}
	if f, ok := o.m.(*file); ok {
		if f.memory {
			return readFull(f, o.buf[:o.n], o.off)
		}
		if f.buffered && f.readCached(o.buf[:o.n], o.off) {
			return nil
		}
	}
	if m, ok := o.m.(asyncMedium); ok && !c.synchronous.Load() {
		if fd, ok := m.async(); ok {
			if done, err := c.readAsync(o, fd); done {
				return err
			}
		}
	}
	o.call.settled.Store(false)
	o.timer.Reset(c.opt.ReadTimeout)
	select {
	case c.reads <- o:
	case <-o.timer.C:
		return errLate
	}
	select {
	case <-o.done:
		o.timer.Stop()
		return o.err
	case <-o.timer.C:
	}
	c.stuck.Add(1)
	if o.call.settle() {
		return errLate
	}
	c.stuck.Add(-1)
	<-o.done
	return o.err
}

func (c *Cache) readLoop() {
	for {
		select {
		case o := <-c.reads:
			if o.err = readFull(o.m, o.buf[:o.n], o.off); !o.call.settle() {
				c.stuck.Add(-1)
			}
			o.done <- struct{}{}
		case <-c.stop:
			return
		}
	}
}

func readFull(m io.ReaderAt, p []byte, off int64) error {
	n, err := m.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = endsAt(off + int64(n))
	}
	return err
}

func endsAt(off int64) error {
	return fmt.Errorf("the medium ends at %d: %w", off, io.ErrUnexpectedEOF)
}

// slow does what the writer, Open and Close ask of the medium. If it returns errLate, f runs still.
func (c *Cache) slow(f func() error) error {
	if c.opt.inline {
		return f()
	}
	var (
		k     call
		done  = make(chan error, 1)
		timer = time.NewTimer(c.opt.slowTimeout)
	)
	defer timer.Stop()
	c.wg.Go(func() {
		err := f()
		if !k.settle() {
			c.stuck.Add(-1)
		}
		done <- err
	})
	select {
	case err := <-done:
		return err
	case <-timer.C:
	}
	c.stuck.Add(1)
	if k.settle() {
		return errLate
	}
	c.stuck.Add(-1)
	return <-done
}

// file is a medium in a file or on a block device.
type file struct {
	*os.File
	fd                int
	buffered, regular bool
	memory            bool // in a file system of memory (tmpfs): there is no medium that could hang
}

func (f *file) async() (int, bool) { return f.fd, !f.buffered }

// ErrInUse: another process uses the medium.
var ErrInUse = errors.New("cache: in use")

// openFile opens what Options name.
func openFile(o *Options) (medium, int64, error) {
	flags := os.O_RDWR | syscall.O_CLOEXEC
	info, err := os.Stat(o.Path)
	switch {
	case err == nil && info.Mode()&os.ModeDevice != 0:
		flags |= os.O_EXCL // refused by the kernel while it is mounted, or part of something
	case errors.Is(err, os.ErrNotExist) && !isDevice(o.Path):
		flags |= os.O_CREATE // but never a file in memory where a device is missing
	}
	f := &file{buffered: o.Buffered}
	if !f.buffered {
		f.File, err = os.OpenFile(o.Path, flags|syscall.O_DIRECT, 0o600)
		f.buffered = errors.Is(err, syscall.EINVAL)
	}
	if f.buffered {
		f.File, err = os.OpenFile(o.Path, flags, 0o600)
	}
	if errors.Is(err, syscall.EBUSY) {
		return nil, 0, fmt.Errorf("cache: %s is mounted or part of another device: %w", o.Path, ErrInUse)
	} else if err != nil {
		return nil, 0, fmt.Errorf("cache: %w", err)
	}
	f.fd = int(f.Fd())
	size, err := f.prepare(o)
	if err != nil {
		f.Close()
		return nil, 0, fmt.Errorf("cache: %s: %w", o.Path, err)
	}
	return f, size, nil
}

// isDevice says whether a path is a device's, be it there or not.
func isDevice(path string) bool {
	return strings.HasPrefix(path, "/dev/") && !strings.HasPrefix(path, "/dev/shm/")
}

func (f *file) prepare(o *Options) (size int64, err error) {
	if err = syscall.Flock(f.fd, syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return 0, fmt.Errorf("%w: %w", ErrInUse, err)
	}
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(f.fd, &fs); err == nil {
		f.memory = fs.Type == unix.TMPFS_MAGIC || fs.Type == unix.RAMFS_MAGIC
	}
	// A file that is not new grows when it is known whose it is.
	if f.regular = info.Mode().IsRegular(); f.regular && info.Size() == 0 {
		err = f.Truncate(o.SizeBytes)
	}
	if err == nil {
		size, err = f.Seek(0, io.SeekEnd)
	}
	if err == nil && f.buffered {
		unix.Fadvise(f.fd, 0, 0, unix.FADV_RANDOM) // a hint: readahead would read neighbours in vain
	}
	if o.SizeBytes > 0 {
		size = min(size, o.SizeBytes)
	}
	return size, err
}

// Sync makes what was written durable; the file's times are not worth a journal commit.
func (f *file) Sync() error { return unix.Fdatasync(f.fd) }

// readCached reads what is in the page cache whole, without waiting for the medium.
func (f *file) readCached(p []byte, off int64) bool {
	n, err := unix.Preadv2(f.fd, [][]byte{p}, off, unix.RWF_NOWAIT)
	return err == nil && n == len(p)
}
