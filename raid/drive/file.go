package drive

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ledge-storage/ledge/raid"
)

// A plain file as a drive. Its reservation is kept in a sidecar, path + ".pr" (sidecar.go), and every writer obeys it:
//
//	write:   shared flock on the file → the sidecar lets us write? → pwrite → it still does? → unlock
//	preempt: change the sidecar → exclusive flock on the file, once: all writes that were let in before are done
//
// so that after a Preempt no write of the victim can reach the file. A controller that was stopped (SIGSTOP) inside
// its write holds the shared lock for as long as it sleeps. After drainLimit the preempter therefore puts a copy of the
// file in its place (rename): what the victim still writes when it wakes goes to a file that nobody reads, and
// the second look at the sidecar tells it so. Each write locks a descriptor of its own, since flock belongs to the
// open file description.
//
// A waiting exclusive lock does not starve: a victim's new writes are refused by the sidecar.
type File struct {
	path       string
	controller string
	direct     bool
	size       int64

	// sidecar is open once it exists; it is changed in place, never replaced.
	sidecar atomic.Pointer[os.File]
	verdict atomic.Pointer[verdict]
	// seen is when the file was last seen to be there, in nanoseconds after opened; 0: never, or it was not.
	seen   atomic.Int64
	opened time.Time

	// swap is held for reading by every I/O, for writing while a fence replaces the file.
	swap sync.RWMutex
	now  *handles

	mu     sync.Mutex
	old    []*handles // replaced by a fence; closed with the drive
	closed bool
}

// drainLimit is how long a preempter waits for writes that were let in.
const drainLimit = 2 * time.Second

// handles are descriptors of one inode.
type handles struct {
	f *os.File // for reads and flushes
	// writers are idle descriptors, each with a lock of its own.
	writers chan *os.File
}

func openFile(path string, o Options) (*File, error) {
	f := &File{path: path, controller: o.Controller, direct: o.Direct, opened: time.Now()}
	h, err := f.openHandles()
	if err != nil {
		return nil, fmt.Errorf("drive: %w", err)
	}
	f.now = h
	st, err := h.f.Stat()
	if err != nil {
		h.close()
		return nil, fmt.Errorf("drive: %w", err)
	}
	f.size = st.Size() / raid.BlockBytes * raid.BlockBytes
	return f, nil
}

func (f *File) openHandles() (*handles, error) {
	file, err := openDirect(f.path, f.direct)
	if err != nil {
		return nil, err
	}
	return &handles{f: file, writers: make(chan *os.File, 32)}, nil
}

func (h *handles) close() error {
	err := h.f.Close()
	for {
		select {
		case w := <-h.writers:
			if e := w.Close(); err == nil {
				err = e
			}
		default:
			return err
		}
	}
}

func (f *File) Size() int64  { return f.size }
func (f *File) Name() string { return f.path }

// ErrGone: the file was removed, as a drive is pulled. What its descriptor still reaches nobody can open again.
var ErrGone = errors.New("drive: removed")

// ReadAt notices within presentFor that the file is gone.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	f.swap.RLock()
	defer f.swap.RUnlock()
	if seen := f.seen.Load(); seen == 0 || time.Since(f.opened)-time.Duration(seen) > presentFor {
		if err := f.present(f.now.f); err != nil {
			return 0, err
		}
	}
	return f.now.f.ReadAt(p, off)
}

func (f *File) Flush() error {
	f.swap.RLock()
	defer f.swap.RUnlock()
	if err := f.present(f.now.f); err != nil {
		return err
	}
	return control(f.now.f, func(fd uintptr) error {
		return retryIntr(func() error { return unix.Fdatasync(int(fd)) })
	})
}

// presentFor: a file that was there is not looked for by each read.
const presentFor = 20 * time.Millisecond

func (f *File) present(file *os.File) error {
	return control(file, func(fd uintptr) error {
		var st unix.Stat_t
		if err := unix.Fstat(int(fd), &st); err != nil {
			return err
		}
		if st.Nlink == 0 {
			f.seen.Store(0)
			return fmt.Errorf("%w: %s", ErrGone, f.path)
		}
		f.seen.Store(int64(time.Since(f.opened)))
		return nil
	})
}

func (f *File) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil
	}
	f.closed = true
	err := f.now.close()
	if s := f.sidecar.Load(); s != nil {
		s.Close()
	}
	for _, h := range f.old {
		if e := h.close(); err == nil {
			err = e
		}
	}
	return err
}

// WriteAt is the write of the essay above. Writing beyond the end would make the drive grow, and is refused.
func (f *File) WriteAt(p []byte, off int64) (int, error) {
	return f.write(len(p), off, func(w *os.File) (int, error) { return w.WriteAt(p, off) })
}

// WriteVAt implements raid.VectorWriter.
func (f *File) WriteVAt(bufs [][]byte, off int64) (int, error) {
	n := 0
	for _, b := range bufs {
		n += len(b)
	}
	return f.write(n, off, func(w *os.File) (int, error) { return pwritev(w, bufs, off) })
}

func (f *File) write(bytes int, off int64, do func(*os.File) (int, error)) (int, error) {
	if off < 0 || off+int64(bytes) > f.size {
		return 0, fmt.Errorf("drive: %s: write %d bytes at %d of %d: %w", f.path, bytes, off, f.size, io.ErrShortWrite)
	}
	f.swap.RLock()
	defer f.swap.RUnlock()
	h := f.now
	w, err := h.writer(f)
	if err != nil {
		return 0, err
	}
	n, err := f.writeLocked(w, do)
	select {
	case h.writers <- w:
	default:
		w.Close()
	}
	return n, err
}

func (h *handles) writer(f *File) (*os.File, error) {
	select {
	case w := <-h.writers:
		return w, nil
	default:
	}
	// /proc reaches the inode that h stands for, also when its path is another's by now.
	return openDirect(fmt.Sprintf("/proc/self/fd/%d", h.f.Fd()), f.direct)
}

func (f *File) writeLocked(w *os.File, do func(*os.File) (int, error)) (n int, err error) {
	fd := int(w.Fd())
	if err := lock(fd, unix.LOCK_SH); err != nil {
		return 0, fmt.Errorf("drive: %s: lock: %w", f.path, err)
	}
	defer unix.Flock(fd, unix.LOCK_UN)
	if err := f.mayWrite(); err != nil {
		return 0, err
	}
	if n, err = do(w); err != nil {
		return n, err
	}
	if err := f.mayWrite(); err != nil {
		return 0, err
	}
	return n, f.present(w)
}

// mayWrite asks the sidecar. Its head says with generation and checksum what the rest of it says; while it is what it was, so is
// the answer.
func (f *File) mayWrite() error {
	var head [sidecarHead]byte
	if file := f.sidecar.Load(); file != nil {
		known := f.verdict.Load()
		if n, err := file.ReadAt(head[:], 0); err == nil && n == len(head) && known != nil && known.head == head {
			return known.err
		}
	}
	s, err := f.readSidecar()
	if err != nil {
		return err
	}
	if s.holder != 0 && s.keyOf(f.controller) == 0 {
		err = fmt.Errorf("drive: %s: held by %#x: %w", f.path, s.holder, raid.ErrReservation)
	}
	f.verdict.Store(&verdict{[sidecarHead]byte(s.encode()), err})
	return err
}

// verdict is the answer that a sidecar with that head gives to writes.
type verdict struct {
	head [sidecarHead]byte
	err  error
}

func (f *File) Register(key uint64) error {
	return f.change("register", func(s *sidecar) error {
		if old := s.keyOf(f.controller); old != 0 && old == s.holder {
			s.holder = key
		}
		return s.register(f.controller, key)
	})
}

func (f *File) Reserve(key uint64) error {
	return f.change("reserve", func(s *sidecar) error {
		if key == 0 || s.keyOf(f.controller) != key || s.holder != 0 && s.holder != key {
			return raid.ErrReservation
		}
		s.holder = key
		return nil
	})
}

func (f *File) Preempt(key, victim uint64) error {
	err := f.change("preempt", func(s *sidecar) error {
		if key == 0 || s.keyOf(f.controller) != key || !s.preempt(f.controller, victim) && victim != key {
			return raid.ErrReservation
		}
		if s.holder == victim {
			s.holder = key
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := f.drain(); err != nil {
		return fmt.Errorf("drive: %s: preempt: %w", f.path, err)
	}
	return nil
}

func (f *File) Release(key uint64) error {
	return f.change("release", func(s *sidecar) error {
		if s.keyOf(f.controller) != key {
			return raid.ErrReservation
		}
		if s.holder == key {
			s.holder = 0
		}
		return nil
	})
}

func (f *File) Unregister(key uint64) error {
	return f.change("unregister", func(s *sidecar) error {
		if s.keyOf(f.controller) != key {
			return raid.ErrReservation
		}
		if s.holder == key {
			s.holder = 0
		}
		return s.register(f.controller, 0)
	})
}

func (f *File) Keys() (registered []uint64, holder uint64, err error) {
	s, err := f.readSidecar()
	if err != nil {
		return nil, 0, err
	}
	for _, e := range s.entries {
		registered = append(registered, e.key)
	}
	slices.Sort(registered)
	return registered, s.holder, nil
}

// drain waits until no write that was let in before is under way, or makes it harmless.
func (f *File) drain() error {
	f.swap.RLock()
	h := f.now
	w, err := h.writer(f)
	f.swap.RUnlock()
	if err != nil {
		return err
	}
	defer w.Close()
	fd := int(w.Fd())
	for end := time.Now().Add(drainLimit); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		err := lock(fd, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return unix.Flock(fd, unix.LOCK_UN)
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return err
		}
	}
	return f.replace(h)
}

// replace puts a copy of the file in its place.
func (f *File) replace(h *handles) error {
	f.swap.Lock()
	defer f.swap.Unlock()
	copyPath := f.path + ".fence"
	if err := copySparse(copyPath, h.f, f.size); err != nil {
		return err
	}
	if err := os.Rename(copyPath, f.path); err != nil {
		return err
	}
	fresh, err := f.openHandles()
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.old = append(f.old, h)
	f.now = fresh
	return nil
}

// copySparse copies what is not a hole.
func copySparse(path string, from *os.File, size int64) error {
	to, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer to.Close()
	if err := to.Truncate(size); err != nil {
		return err
	}
	// A descriptor of its own: no O_DIRECT, and an offset that nobody else moves.
	src, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", from.Fd()))
	if err != nil {
		return err
	}
	defer src.Close()
	for at := int64(0); at < size; {
		start, err := unix.Seek(int(src.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break
		}
		if err != nil {
			return err
		}
		end, err := unix.Seek(int(src.Fd()), start, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		if _, err := io.Copy(io.NewOffsetWriter(to, start), io.NewSectionReader(src, start, end-start)); err != nil {
			return err
		}
		at = end
	}
	return to.Sync()
}

// lock is flock, for as long as it takes.
func lock(fd, how int) error {
	return retryIntr(func() error { return unix.Flock(fd, how) })
}

func retryIntr(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
