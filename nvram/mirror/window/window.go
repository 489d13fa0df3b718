package window

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	magic      = "LEDGEWIN"
	version    = 2
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
	offAlive   = 448
	endFields  = 512

	// bumpEvery is how often a side that has the window open says so; deadAfter is for how long its counter stands still
	// when it is taken for dead, and deadLooks how often this side must have looked meanwhile: else a
	// machine that stopped both for a while would make each think the other dead.
	bumpEvery = 100 * time.Millisecond
	deadAfter = 1500 * time.Millisecond
	deadLooks = 10

	// DefaultBytes is the size of a file that Open makes.
	DefaultBytes = 4 << 20
	// MinBytes is the least that a window can have.
	MinBytes = rings + 2*minRing
)

// magicWord is magic as one word.
var magicWord = binary.NativeEndian.Uint64([]byte(magic))

var (
	// ErrSize: what is there is too small for a window.
	ErrSize = errors.New("window: too small")
	// ErrForeign: what is there is neither a window nor empty. Nothing was written to it.
	ErrForeign = errors.New("window: this is something else")
	// ErrLayout: the other side has another version of the layout, or another size.
	ErrLayout = errors.New("window: the other side has another layout")
	// ErrLost: the other side has left, or begun anew.
	ErrLost = errors.New("window: the other side is gone")
	// ErrDead: the other side's counter stands still: its process is dead or stopped, or its machine.
	ErrDead = errors.New("window: the other side is dead")
	// ErrProtocol: the other side says what cannot be.
	ErrProtocol = errors.New("window: protocol violation")
	// ErrFault: the memory is not there any more.
	ErrFault = errors.New("window: memory fault")
	// ErrBusy: a window has one connection at a time.
	ErrBusy = errors.New("window: a connection is open")
)

// Options of Open.
type Options struct {
	// Path of a file or of a PCI device's BAR.
	Path string
	// Create makes a file that is not there, or empty, DefaultBytes long: for two processes of one machine. Else what
	// Path names must be there: a mistyped path must neither make a file nor be taken for a window with nobody behind it.
	Create bool
	// Side is 'A' or 'B'; the other controller has the other.
	Side byte
	// Spin is for how long who waits looks again before it sleeps; 0: 50 µs, less than 0: not at all.
	Spin time.Duration
}

// Window is a mapped window.
type Window struct {
	opts   Options
	info   os.FileInfo
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
	began  time.Time    // deadlines are kept relative to it, by the monotonic clock

	sleeping sync.Mutex
	sleepers uint32 // this side's; offAsleep says so
	peer     vigil
	stop     chan struct{} // ends live
	ended    sync.WaitGroup
}

// vigil is what is known of the other side's counter.
type vigil struct {
	mu    sync.Mutex
	count uint64
	since time.Time // when it changed
	looks int       // since then
	dead  atomic.Bool
}

// look takes the counter as it is at a time. True: the other side is dead since now.
func (v *vigil) look(count uint64, now time.Time) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	if count != v.count || v.since.IsZero() {
		v.count, v.since, v.looks = count, now, 0
		v.dead.Store(false)
		return false
	}
	v.looks++
	return v.looks >= deadLooks && now.Sub(v.since) >= deadAfter && !v.dead.Swap(true)
}

// answered: the other side did something, whatever its counter says.
func (v *vigil) answered(now time.Time) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.since, v.looks = now, 0
	v.dead.Store(false)
}

// Open maps the window. What it finds must be a window, or its first 64 KiB zero: else it writes nothing.
func Open(o Options) (*Window, error) {
	if o.Side != 'A' && o.Side != 'B' {
		return nil, fmt.Errorf("window: side %q is neither A nor B", o.Side)
	}
	if o.Spin == 0 {
		o.Spin = 50 * time.Microsecond
	}
	w := &Window{opts: o, began: time.Now(), stop: make(chan struct{})}
	if err := w.mapFile(); err != nil {
		return nil, err
	}
	a, b := w.mem[blockA:blockB], w.mem[blockB:blockB+4096]
	ab, ba := w.mem[rings:rings+w.ring], w.mem[rings+w.ring:]
	w.own, w.other, w.out, w.in = a, b, ab, ba
	if o.Side == 'B' {
		w.own, w.other, w.out, w.in = b, a, ba, ab
	}
	err := w.guard(func() error {
		if err := w.recognize(); err != nil {
			return err
		}
		store(w.own, 0, magicWord) // at once, and before all else: see recognize
		store(w.own, offSession, 0)
		atomic.StoreUint32(half(w.own, offAsleep), 0) // a process that died asleep left it
		binary.LittleEndian.PutUint32(w.own[8:], version)
		binary.LittleEndian.PutUint32(w.own[12:], uint32(w.ring))
		return nil
	})
	if err != nil {
		return nil, errors.Join(err, unix.Munmap(w.mem))
	}
	w.ended.Go(w.live)
	return w, nil
}

// live shows the other side that this process runs, and looks whether the other's does.
func (w *Window) live() {
	tick := time.NewTicker(bumpEvery)
	defer tick.Stop()
	for {
		_ = w.guard(func() error { // a fault is for those who read and write
			store(w.own, offAlive, load(w.own, offAlive)+1)
			if w.peer.look(load(w.other, offAlive), time.Now()) {
				w.wakeOwn()
			}
			return nil
		})
		select {
		case <-tick.C:
		case <-w.stop:
			return
		}
	}
}

// mapFile opens the path, looks what it is, and maps it.
func (w *Window) mapFile() error {
	flags := os.O_RDWR
	if w.opts.Create {
		flags |= os.O_CREATE
	}
	f, err := os.OpenFile(w.opts.Path, flags, 0o600)
	if err != nil {
		return fmt.Errorf("window: %w", err)
	}
	defer f.Close()
	if w.info, err = f.Stat(); err != nil {
		return fmt.Errorf("window: %w", err)
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return fmt.Errorf("window: %s: %w", w.opts.Path, err)
	}
	size := w.info.Size()
	w.file = w.info.Mode().IsRegular() && fs.Type != unix.SYSFS_MAGIC
	if fs.Type == unix.SYSFS_MAGIC {
		if err := enable(filepath.Dir(w.opts.Path)); err != nil {
			return err
		}
	}
	if w.opts.Create && w.file && size == 0 { // both may do it at once: the size is the same
		if err := f.Truncate(DefaultBytes); err != nil {
			return fmt.Errorf("window: %w", err)
		}
		size = DefaultBytes
	}
	if size < MinBytes {
		return fmt.Errorf("window: %s has %d bytes, at least %d are needed: %w", w.opts.Path, size, MinBytes, ErrSize)
	}
	w.ring = minRing
	for w.ring < maxRing && rings+4*int64(w.ring) <= size {
		w.ring *= 2
	}
	w.mem, err = unix.Mmap(int(f.Fd()), 0, rings+2*int(w.ring), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("window: map %s: %w", w.opts.Path, err)
	}
	return nil
}

// enable lets a PCI device that no driver has answer to its addresses. What it is already, it stays.
func enable(device string) error {
	path := filepath.Join(device, "enable")
	is, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) || err == nil && strings.TrimSpace(string(is)) != "0" {
		return nil
	}
	if err == nil {
		err = os.WriteFile(path, []byte("1"), 0)
	}
	if err != nil {
		return fmt.Errorf("window: enable the device: %w", err)
	}
	return nil
}

// recognize looks whether this is a window, or memory that nobody has used. The other side may be making it one
// meanwhile: it writes its magic first, so who finds something that is not zero finds the magic then. The fields of the two
// blocks say nothing: a side that still has mapped what was emptied under it counts on there.
func (w *Window) recognize() error {
	known := func() (bool, error) {
		a, b := load(w.own, 0), load(w.other, 0)
		for _, m := range []uint64{a, b} {
			if m != 0 && m != magicWord {
				return false, fmt.Errorf("window: %s has %#016x where %q or zero should be: %w", w.opts.Path, m, magic, ErrForeign)
			}
		}
		return a|b != 0, nil
	}
	if ok, err := known(); ok || err != nil {
		return err
	}
	for off := 0; off < rings; off += 8 {
		field := off >= blockA && off < blockB+4096 && off%4096 >= offSession && off%4096 < endFields
		if field || load(w.mem, off) == 0 {
			continue
		}
		if ok, err := known(); ok || err != nil {
			return err
		}
		return fmt.Errorf("window: %s is not empty at %d: %w", w.opts.Path, off, ErrForeign)
	}
	return nil
}

// Replaced says whether the path does not name what is mapped any more: a device that was plugged anew, a file made anew,
// or emptied, so that this side's block is gone. Such a window is to be opened again.
func (w *Window) Replaced() bool {
	now, err := os.Stat(w.opts.Path)
	if err != nil || !os.SameFile(w.info, now) || w.file && now.Size() < int64(len(w.mem)) {
		return true
	}
	mine := false
	err = w.guard(func() error { mine = load(w.own, 0) == magicWord; return nil })
	return err != nil || !mine
}

// Close ends a connection that is open, and unmaps. It returns when nobody uses the window any more.
func (w *Window) Close() error {
	if w.closed.Swap(true) {
		return nil
	}
	close(w.stop)
	w.ended.Wait()
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
	w.asleep(1)
	futexWait(half(w.other, offBell), rung, d)
	w.asleep(^uint32(0))
}

// asleep counts this side's sleepers. The window is told, never asked: what a process that died asleep left there would
// cost the other a wake-up in vain with each bell, for good, or (one too few) lose this side's.
func (w *Window) asleep(by uint32) {
	w.sleeping.Lock()
	defer w.sleeping.Unlock()
	w.sleepers += by
	atomic.StoreUint32(half(w.own, offAsleep), w.sleepers)
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
