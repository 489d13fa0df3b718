// Package region opens the media that an nvram log lives on: a pmem block device (/dev/pmem0), another block
// device with power-loss protection, or a file.
//
// It owns the descriptor and an exclusive flock on it, so that two processes never have one region. It promises
// that a WriteAt that returned nil is durable: O_DIRECT|O_DSYNC where the file system takes O_DIRECT,
// else (tmpfs) buffered writes with fdatasync each. It never retries, caches or reorders.
package region

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"unsafe"

	"golang.org/x/sys/unix"
)

const blockBytes = 4096

var (
	// ErrInUse: another process, or another File of this one, has the region open.
	ErrInUse = errors.New("region: in use")
	// ErrTooSmall: the device or file is smaller than asked for.
	ErrTooSmall = errors.New("region: too small")
	// ErrUnaligned: an offset, length or buffer that is not a multiple of 4096.
	ErrUnaligned = errors.New("region: unaligned")
	// ErrKind: neither a file nor a block device.
	ErrKind = errors.New("region: neither a file nor a block device")
)

// Options of a region.
type Options struct {
	// Create makes a file that is not there, of Size bytes, all allocated: no write of the log may find the
	// file system full. Never done for what is there.
	Create bool
	// Size is the least that the region must have, and all that is used of it; 0 means the whole.
	Size int64
	// Buffered never tries O_DIRECT.
	Buffered bool
}

// File is an open region. It implements nvram.Region; its calls may be concurrent.
type File struct {
	f      *os.File
	size   int64
	direct bool
}

// Open opens path and locks it.
func Open(path string, o Options) (*File, error) {
	if o.Size%blockBytes != 0 || o.Size < 0 {
		return nil, fmt.Errorf("region: open %s: size %d: %w", path, o.Size, ErrUnaligned)
	}
	if o.Create {
		if err := create(path, o.Size); err != nil {
			return nil, fmt.Errorf("region: create %s: %w", path, err)
		}
	}
	r, err := open(path, !o.Buffered)
	if err != nil {
		return nil, fmt.Errorf("region: open %s: %w", path, err)
	}
	if err := r.prepare(o.Size); err != nil {
		r.f.Close()
		return nil, fmt.Errorf("region: open %s: %w", path, err)
	}
	return r, nil
}

func open(path string, direct bool) (*File, error) {
	flags := os.O_RDWR | unix.O_DSYNC | unix.O_CLOEXEC
	if direct {
		f, err := os.OpenFile(path, flags|unix.O_DIRECT, 0)
		if err == nil {
			return &File{f: f, direct: true}, nil
		}
		if !errors.Is(err, unix.EINVAL) {
			return nil, err
		}
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return nil, err
	}
	return &File{f: f}, nil
}

// prepare locks the region and finds its size.
func (r *File) prepare(size int64) error {
	st, err := r.f.Stat()
	if err != nil {
		return err
	}
	if m := st.Mode(); !m.IsRegular() && (m&os.ModeDevice == 0 || m&os.ModeCharDevice != 0) {
		return fmt.Errorf("%w (%s)", ErrKind, m)
	}
	if err := unix.Flock(int(r.f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			return ErrInUse
		}
		return fmt.Errorf("lock: %w", err)
	}
	end, err := r.f.Seek(0, io.SeekEnd) // a block device's Stat says 0
	if err != nil {
		return err
	}
	if r.size = end / blockBytes * blockBytes; size > 0 {
		if r.size < size {
			return fmt.Errorf("%w: %d bytes, %d wanted", ErrTooSmall, r.size, size)
		}
		r.size = size
	}
	if r.size == 0 {
		return fmt.Errorf("%w: %d bytes", ErrTooSmall, end)
	}
	return r.probe()
}

// probe reads a block: some file systems take O_DIRECT at open and refuse it here.
func (r *File) probe() error {
	if !r.direct {
		return nil
	}
	b := aligned(1)
	if _, err := r.f.ReadAt(b, 0); errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("direct read: %w (open it with Buffered)", err)
	} else if err != nil {
		return err
	}
	return nil
}

// create makes the file under another name first, so that a half-made one is never found.
func create(path string, size int64) error {
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if size == 0 {
		return fmt.Errorf("no size: %w", ErrTooSmall)
	}
	tmp := path + ".new"
	f, err := os.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	zeros := make([]byte, 1<<20)
	for off := int64(0); off < size; off += int64(len(zeros)) { // written, not only allocated: later writes change no metadata
		if _, err := f.WriteAt(zeros[:min(int64(len(zeros)), size-off)], off); err != nil {
			os.Remove(tmp)
			return err
		}
	}
	if err := f.Sync(); err != nil {
		os.Remove(tmp)
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync() // the name, too, must outlive a power cut
}

func aligned(blocks int) []byte {
	b := make([]byte, (blocks+1)*blockBytes)
	skip := int(-uintptr(unsafe.Pointer(unsafe.SliceData(b))) & (blockBytes - 1))
	return b[skip:][:blocks*blockBytes]
}

func (r *File) check(op string, p []byte, off int64) error {
	switch {
	case len(p)%blockBytes != 0 || off%blockBytes != 0 || len(p) > 0 && uintptr(unsafe.Pointer(unsafe.SliceData(p)))%blockBytes != 0:
		return fmt.Errorf("region: %s %d bytes at %d: %w", op, len(p), off, ErrUnaligned)
	case off < 0 || off+int64(len(p)) > r.size:
		return fmt.Errorf("region: %s %d bytes at %d of %d: %w", op, len(p), off, r.size, io.ErrUnexpectedEOF)
	}
	return nil
}

// ReadAt implements nvram.Region.
func (r *File) ReadAt(p []byte, off int64) (int, error) {
	if err := r.check("read", p, off); err != nil {
		return 0, err
	}
	return r.f.ReadAt(p, off)
}

// WriteAt implements nvram.Region: p is durable when it returns.
func (r *File) WriteAt(p []byte, off int64) (int, error) {
	if err := r.check("write", p, off); err != nil {
		return 0, err
	}
	n, err := r.f.WriteAt(p, off)
	if err == nil && !r.direct {
		err = unix.Fdatasync(int(r.f.Fd()))
	}
	return n, err
}

// Size implements nvram.Region.
func (r *File) Size() int64 { return r.size }

// Direct tells whether writes go past the page cache.
func (r *File) Direct() bool { return r.direct }

// Close unlocks and closes.
func (r *File) Close() error { return r.f.Close() }
