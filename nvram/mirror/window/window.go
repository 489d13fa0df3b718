package window

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	magic      = "LEDGEWIN"
	version    = 1
	blockA     = 4096
	blockB     = 8192
	rings      = 64 << 10
	maxRing    = 16 << 20
	minRing    = 4 << 10
	offSession = 64
	offPeer    = 128
	offPut     = 192
	offTaken   = 256
	offBell    = 320
	offAsleep  = 384

	// DefaultBytes is the size of a file that Open makes.
	DefaultBytes = 4 << 20
	// MinBytes is the least that a window can have.
	MinBytes = rings + 2*minRing
)

var (
	// ErrSize: the window is too small.
	ErrSize = errors.New("window: too small")
	// ErrLayout: the other side has another version of the layout, or another size.
	ErrLayout = errors.New("window: the other side has another layout")
	// ErrLost: the other side has left, or begun anew.
	ErrLost = errors.New("window: the other side is gone")
	// ErrProtocol: the other side says what cannot be.
	ErrProtocol = errors.New("window: protocol violation")
	// ErrFault: the memory is not there any more.
	ErrFault = errors.New("window: memory fault")
	// ErrBusy: a window has one connection at a time.
	ErrBusy = errors.New("window: a connection is open")
)

// Options of Open.
type Options struct {
	// Path of a file or of a PCI device's BAR. A file that is not there is made, DefaultBytes long.
	Path string
	// Side is 'A' or 'B'; the other controller has the other.
	Side byte
	// Spin is for how long who waits looks again before it sleeps; 0: 50 µs, less than 0: not at all.
	Spin time.Duration
}

// Window is a mapped window.
type Window struct {
	opts   Options
	mem    []byte
	ring   uint64
	file   bool // futexes work
	own    []byte
	other  []byte
	out    []byte // the ring that this side fills
	in     []byte
	busy   atomic.Bool
	closed atomic.Bool
	use    sync.RWMutex // held for writing to unmap
}

// Open maps the window.
func Open(o Options) (*Window, error) {
	if o.Side != 'A' && o.Side != 'B' {
		return nil, fmt.Errorf("window: side %q is neither A nor B", o.Side)
	}
	if o.Spin == 0 {
		o.Spin = 50 * time.Microsecond
	}
	f, err := os.OpenFile(o.Path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("window: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("window: %w", err)
	}
	size, regular := info.Size(), info.Mode().IsRegular()
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return nil, fmt.Errorf("window: %s: %w", o.Path, err)
	}
	regular = regular && fs.Type != unix.SYSFS_MAGIC
	if regular && size == 0 { // both may do it at once: the size is the same
		if err := f.Truncate(DefaultBytes); err != nil {
			return nil, fmt.Errorf("window: %w", err)
		}
		size = DefaultBytes
	}
	if size < MinBytes {
		return nil, fmt.Errorf("window: %s has %d bytes, at least %d are needed: %w", o.Path, size, MinBytes, ErrSize)
	}
	ring := int64(minRing)
	for ring < maxRing && rings+4*ring <= size {
		ring *= 2
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, int(rings+2*ring), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("window: map %s: %w", o.Path, err)
	}
	w := &Window{opts: o, mem: mem, ring: uint64(ring), file: regular}
	a, b := mem[blockA:blockB], mem[blockB:blockB+4096]
	ab, ba := mem[rings:rings+ring], mem[rings+ring:]
	w.own, w.other, w.out, w.in = a, b, ab, ba
	if o.Side == 'B' {
		w.own, w.other, w.out, w.in = b, a, ba, ab
	}
	err = w.guard(func() error {
		store(w.own, offSession, 0)
		copy(w.own, magic)
		binary.LittleEndian.PutUint32(w.own[8:], version)
		binary.LittleEndian.PutUint32(w.own[12:], uint32(ring))
		return nil
	})
	if err != nil {
		unix.Munmap(mem)
		return nil, err
	}
	return w, nil
}

// Close ends a connection that is open, and unmaps. It returns when nobody uses the window any more.
func (w *Window) Close() error {
	if w.closed.Swap(true) {
		return nil
	}
	w.wakeOwn()
	w.use.Lock()
	defer w.use.Unlock()
	_ = w.guardLocked(func() error { store(w.own, offSession, 0); return nil })
	return unix.Munmap(w.mem)
}

func word(b []byte, off int) *uint64    { return (*uint64)(unsafe.Pointer(&b[off])) }
func load(b []byte, off int) uint64     { return atomic.LoadUint64(word(b, off)) }
func store(b []byte, off int, v uint64) { atomic.StoreUint64(word(b, off), v) }
func half(b []byte, off int) *uint32    { return (*uint32)(unsafe.Pointer(&b[off])) }

// guard runs f, which touches the window: not when it is closed, and a fault is an error.
func (w *Window) guard(f func() error) error {
	w.use.RLock()
	defer w.use.RUnlock()
	if w.closed.Load() {
		return os.ErrClosed
	}
	return w.guardLocked(f)
}

func (w *Window) guardLocked(f func() error) (err error) {
	old := debug.SetPanicOnFault(true)
	defer func() {
		debug.SetPanicOnFault(old)
		if p := recover(); p != nil {
			if e, ok := p.(interface{ Addr() uintptr }); ok {
				err = fmt.Errorf("%w at %#x", ErrFault, e.Addr())
				return
			}
			panic(p)
		}
	}()
	return f()
}

// ring tells the other side that something changed.
func (w *Window) ringBell() {
	atomic.AddUint32(half(w.own, offBell), 1)
	if w.file && atomic.LoadUint32(half(w.other, offAsleep)) != 0 {
		futexWake(half(w.own, offBell))
	}
}

// wakeOwn wakes those of this side that sleep: a deadline moved, or the connection is closed.
func (w *Window) wakeOwn() {
	if w.file {
		futexWake(half(w.other, offBell)) // a mapping that is gone makes it fail, no more
	}
}

// sleep waits until the other's bell is not rung any more, or d has passed. It touches no memory itself while asleep.
func (w *Window) sleep(rung uint32, d time.Duration) {
	if !w.file {
		nap(d)
		return
	}
	atomic.AddUint32(half(w.own, offAsleep), 1)
	futexWait(half(w.other, offBell), rung, d)
	atomic.AddUint32(half(w.own, offAsleep), ^uint32(0))
}

const (
	futexWaitOp = 0
	futexWakeOp = 1
)

func futexWait(p *uint32, v uint32, d time.Duration) {
	ts := unix.NsecToTimespec(d.Nanoseconds())
	unix.Syscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(p)), futexWaitOp, uintptr(v), uintptr(unsafe.Pointer(&ts)), 0, 0)
}

func futexWake(p *uint32) {
	unix.Syscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(p)), futexWakeOp, 1<<30, 0, 0, 0)
}

// nap sleeps for a fraction of a millisecond, which the runtime's timers cannot.
func nap(d time.Duration) {
	ts := unix.NsecToTimespec(d.Nanoseconds())
	unix.Nanosleep(&ts, nil) // a signal makes it shorter
}
