// Package region opens the media that an nvram log lives on.
//
// It owns the descriptor and an exclusive flock on it, so that two processes never have one region. It promises
// that a WriteAt that returned nil is durable. It never retries, caches or reorders, and never takes a medium of
// which it cannot promise that.
//
//	kind   path                              how a write becomes durable
//	dax    /dev/daxX.Y; a file on a file     stores, cache line write-back and a store fence (persist.go); on CPUs
//	       system mounted with dax           without such instructions msync, and no device
//	pmem   /dev/pmemN                        O_DIRECT|O_DSYNC: the driver stores past the cache and fences
//	ssd    another block device              O_DIRECT|O_DSYNC: the drive answers from power-loss protected memory, or
//	                                         the kernel sends FUA or a flush with each write
//	file   a file                            the same; where the file system takes no O_DIRECT (old tmpfs), buffered
//	                                         writes with fdatasync each
//
// # SSDs and their caches
//
// A block device of which the kernel says "write back" answers from a cache that it may lose. O_DSYNC makes the
// kernel ask for each write to be written through, so that a drive which obeys is right, but without power-loss
// protection slow: milliseconds a write, where every acknowledgement waits for one. And drives that are sold without protection
// are those that obey least. So it is refused (ErrVolatileCache) until Options.TrustPLP says that this drive is
// protected. Nothing else changes with it: every write is still sent with O_DSYNC, so that a drive wrongly trusted
// loses nothing that it did not lie about.
package region

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
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
	// ErrKind: the path is nothing that can be a region, or not of the kind that was asked for.
	ErrKind = errors.New("region: wrong kind of medium")
	// ErrNotDAX: kind dax was asked for, and stores to the mapping would not be durable.
	ErrNotDAX = errors.New("region: not usable as DAX")
	// ErrVolatileCache: a block device that may lose what it answered; see Options.TrustPLP.
	ErrVolatileCache = errors.New("region: drive has a volatile write cache")
	// ErrPoison: memory that is damaged, or no longer there.
	ErrPoison = errors.New("region: memory error")
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
	// Kind is what the medium must be; "" takes what the path is: a DAX device, a block device or a file.
	Kind Kind
	// TrustPLP says that a block device with a write-back cache keeps its content without power.
	TrustPLP bool
}

// Kind is a kind of medium, as in a board's description.
type Kind string

// The kinds; the package comment says what each is.
const (
	KindDAX  Kind = "dax"
	KindPMEM Kind = "pmem"
	KindSSD  Kind = "ssd"
	KindFile Kind = "file"
)

// Kinds are all kinds.
var Kinds = []Kind{KindDAX, KindPMEM, KindSSD, KindFile}

// Region is an open region: a *File or a *Mapped. It implements nvram.Region.
type Region interface {
	ReadAt(p []byte, off int64) (int, error)
	// WriteAt returns when p is durable.
	WriteAt(p []byte, off int64) (int, error)
	Size() int64
	// Medium says what it is, for people.
	Medium() string
	Close() error
}

// File is an open region. It implements nvram.Region; its calls may be concurrent.
type File struct {
	f      *os.File
	size   int64
	direct bool
}

// Open opens path and locks it.
func Open(path string, o Options) (Region, error) {
	r, err := open(path, o, realSysfs)
	if err != nil {
		return nil, fmt.Errorf("region: open %s: %w", path, err)
	}
	return r, nil
}

func open(path string, o Options, sys sysfs) (Region, error) {
	if o.Size%blockBytes != 0 || o.Size < 0 {
		return nil, fmt.Errorf("size %d: %w", o.Size, ErrUnaligned)
	}
	if o.Kind != "" && !slices.Contains(Kinds, o.Kind) {
		return nil, fmt.Errorf("%w: kind %q", ErrKind, o.Kind)
	}
	if o.Create {
		if err := create(path, o.Size); err != nil {
			return nil, fmt.Errorf("create: %w", err)
		}
	}
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	switch m := st.Mode(); {
	case m.IsRegular() && o.Kind == KindDAX, m&os.ModeCharDevice != 0 && (o.Kind == KindDAX || o.Kind == ""):
		return openMapped(path, st, o, sys)
	case m.IsRegular() && (o.Kind == KindFile || o.Kind == ""):
	case m&os.ModeDevice != 0 && m&os.ModeCharDevice == 0 && o.Kind != KindFile && o.Kind != KindDAX:
		if err := checkBlock(st, o, sys); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("%w: %s, wanted %s", ErrKind, m, cmp.Or(string(o.Kind), "a file, a block device or a DAX device"))
	}
	r, err := openFile(path, !o.Buffered)
	if err != nil {
		return nil, err
	}
	if err := r.prepare(o.Size); err != nil {
		r.f.Close()
		return nil, err
	}
	return r, nil
}

// checkBlock refuses a block device that is not what was asked for, or that may lose what it answered.
func checkBlock(st os.FileInfo, o Options, sys sysfs) error {
	rdev := st.Sys().(*syscall.Stat_t).Rdev
	name := sys.blockName(rdev)
	pmem := strings.HasPrefix(name, "pmem")
	if pmem && o.Kind == KindSSD || !pmem && o.Kind == KindPMEM {
		return fmt.Errorf("%w: %s is no %s", ErrKind, name, o.Kind)
	}
	if pmem || o.TrustPLP {
		return nil
	}
	volatile, err := sys.volatileCache(rdev)
	if err == nil && volatile {
		err = fmt.Errorf("%w: if it has power-loss protection say so (nvram.trust_plp), else use another drive", ErrVolatileCache)
	}
	return err
}

// openMapped opens a DAX device or a file to be mapped.
func openMapped(path string, st os.FileInfo, o Options, sys sysfs) (Region, error) {
	var dev *daxDevice
	if !st.Mode().IsRegular() {
		var err error
		if dev, err = sys.dax(st.Sys().(*syscall.Stat_t).Rdev); err != nil {
			return nil, err
		}
	}
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	err = lock(f)
	if err == nil {
		var r *Mapped
		if r, err = openDAX(f, dev, o); err == nil {
			return r, nil
		}
	}
	f.Close()
	return nil, err
}

func openFile(path string, direct bool) (*File, error) {
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

func lock(f *os.File) error {
	err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	switch {
	case errors.Is(err, unix.EWOULDBLOCK):
		return ErrInUse
	case err != nil:
		return fmt.Errorf("lock: %w", err)
	}
	return nil
}

// prepare locks the region and finds its size.
func (r *File) prepare(size int64) error {
	if err := lock(r.f); err != nil {
		return err
	}
	end, err := r.f.Seek(0, io.SeekEnd) // a block device's Stat says 0
	if err != nil {
		return err
	}
	if r.size, err = usable(end, size); err != nil {
		return err
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

func (r *File) check(op string, p []byte, off int64) error { return checkAccess(op, p, off, r.size) }

func checkAccess(op string, p []byte, off, size int64) error {
	switch {
	case len(p)%blockBytes != 0 || off%blockBytes != 0 || len(p) > 0 && uintptr(unsafe.Pointer(unsafe.SliceData(p)))%blockBytes != 0:
		return fmt.Errorf("region: %s %d bytes at %d: %w", op, len(p), off, ErrUnaligned)
	case off < 0 || off > size-int64(len(p)):
		return fmt.Errorf("region: %s %d bytes at %d of %d: %w", op, len(p), off, size, io.ErrUnexpectedEOF)
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

// Medium says how it is written, for people.
func (r *File) Medium() string {
	if r.direct {
		return "O_DIRECT|O_DSYNC"
	}
	return "buffered, fdatasync"
}

// Close unlocks and closes.
func (r *File) Close() error { return r.f.Close() }
