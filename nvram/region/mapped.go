package region

import (
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"sync"

	"golang.org/x/sys/unix"
)

// Mapped is a region in persistent memory that the CPU stores to directly: a DAX character device, or a file
// on a file system mounted with DAX. A page that was poisoned, or cut off the file, is an error of the call that
// touched it, never the end of the process.
type Mapped struct {
	f    *os.File
	size int64
	cpu  *instructions // nil: msync

	mu  sync.RWMutex // held for reading by each access, so that Close unmaps what nobody touches
	mem []byte
}

// pieceBytes is what is stored between two points at which the scheduler may step in.
const pieceBytes = 128 << 10

// openDAX maps what f is, a character device if dev is not nil.
func openDAX(f *os.File, dev *daxDevice, o Options) (*Mapped, error) {
	r := &Mapped{f: f, cpu: detect()}
	if dev != nil && r.cpu == nil {
		return nil, fmt.Errorf("%w: this CPU has no cache line write-back known here", ErrNotDAX)
	}
	end := int64(0)
	if dev != nil {
		end = dev.size
	} else {
		st, err := f.Stat()
		if err != nil {
			return nil, err
		}
		end = st.Size()
	}
	var err error
	if r.size, err = usable(end, o.Size); err != nil {
		return nil, err
	}
	length := r.size
	if dev != nil { // a device maps in its own pages
		length = (length + dev.align - 1) / dev.align * dev.align
	}
	flags := unix.MAP_SHARED_VALIDATE | unix.MAP_SYNC
	if r.cpu == nil {
		flags = unix.MAP_SHARED
	}
	r.mem, err = unix.Mmap(int(f.Fd()), 0, int(length), unix.PROT_READ|unix.PROT_WRITE, flags)
	switch {
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL) && dev == nil:
		return nil, fmt.Errorf("%w: the file system does not map it synchronously (mount it with dax, or use kind %q)", ErrNotDAX, KindFile)
	case err != nil:
		return nil, fmt.Errorf("map %d bytes: %w", length, err)
	}
	return r, nil
}

func (r *Mapped) check(op string, p []byte, off int64) error {
	return checkAccess(op, p, off, r.size)
}

// access calls f with the mapping, and makes an error of a fault in it.
func (r *Mapped) access(op string, off int64, f func(mem []byte) error) (err error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if r.mem == nil {
		return fmt.Errorf("region: %s at %d: %w", op, off, os.ErrClosed)
	}
	old := debug.SetPanicOnFault(true)
	defer func() {
		debug.SetPanicOnFault(old)
		if v := recover(); v != nil {
			fault, ok := v.(interface {
				error
				Addr() uintptr
			})
			if !ok {
				panic(v)
			}
			err = fmt.Errorf("region: %s at %d: %w: %w", op, off, ErrPoison, fault)
		}
	}()
	return f(r.mem)
}

// ReadAt implements nvram.Region. ErrPoison: the memory cannot give the bytes back.
func (r *Mapped) ReadAt(p []byte, off int64) (int, error) {
	if err := r.check("read", p, off); err != nil {
		return 0, err
	}
	err := r.access("read", off, func(mem []byte) error {
		copy(p, mem[off:])
		return nil
	})
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// WriteAt implements nvram.Region: p is durable when it returns.
func (r *Mapped) WriteAt(p []byte, off int64) (int, error) {
	if err := r.check("write", p, off); err != nil {
		return 0, err
	}
	err := r.access("write", off, func(mem []byte) error {
		if r.cpu == nil {
			copy(mem[off:], p)
			page := int64(os.Getpagesize())
			first := off / page * page
			return unix.Msync(mem[first:off+int64(len(p))], unix.MS_SYNC)
		}
		for at := 0; at < len(p); at += pieceBytes {
			r.cpu.store(mem[off+int64(at):], p[at:min(at+pieceBytes, len(p))])
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// Size implements nvram.Region.
func (r *Mapped) Size() int64 { return r.size }

// Medium says what the region is, for people.
func (r *Mapped) Medium() string {
	if r.cpu == nil {
		return "DAX mapping, msync"
	}
	return "DAX mapping, " + r.cpu.name
}

// Close waits for accesses under way, unmaps, unlocks and closes.
func (r *Mapped) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.mem == nil {
		return os.ErrClosed
	}
	err := unix.Munmap(r.mem)
	r.mem = nil
	return errors.Join(err, r.f.Close())
}

// usable is the size of a region of which the medium has end bytes and the caller wants size, 0 for all.
func usable(end, size int64) (int64, error) {
	have := end / blockBytes * blockBytes
	switch {
	case have == 0:
		return 0, fmt.Errorf("%w: %d bytes", ErrTooSmall, end)
	case size > have:
		return 0, fmt.Errorf("%w: %d bytes, %d wanted", ErrTooSmall, have, size)
	case size > 0:
		return size, nil
	}
	return have, nil
}
