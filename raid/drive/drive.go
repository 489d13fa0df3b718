// Package drive opens the members of an array: Linux SCSI block devices, with persistent reservations by SG_IO,
// and plain files, with the reservation emulated in a sidecar, for a shelf that runs as ordinary processes.
//
// It owns the file descriptors and the translation of errors: a write that another controller's reservation refused
// is raid.ErrReservation, whatever errno the kernel made of it. It never retries a read or a write, and never caches.
//
// # Block devices
//
// Opened O_DIRECT: what is written is in the drive's hands, and Flush (fsync: SYNCHRONIZE CACHE) puts it on its media.
// Offsets, lengths and buffers are multiples of 4096 bytes, as raid promises. The kernel reports RESERVATION CONFLICT
// as EBADE, on some paths as EIO; on EIO the drive is asked who holds it.
//
// # Files
//
// See file.go: how a controller is fenced that may be stopped in the middle of a write.
package drive

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ledge-storage/ledge/raid"
)

// Options of Open.
type Options struct {
	// Controller names whose port this is. Files keep the registrations under it, at most 16 bytes; block devices
	// ignore it, their initiator port is theirs. ["-"]
	Controller string
	// Direct opens files with O_DIRECT, where the filesystem can. Block devices always are.
	Direct bool
}

// Drive is a drive with reservations.
type Drive interface {
	raid.Drive
	raid.VectorWriter
	raid.Reserver
}

// Open opens a block device or a file.
func Open(path string, o Options) (Drive, error) {
	if o.Controller == "" {
		o.Controller = "-"
	}
	if len(o.Controller) > controllerBytes {
		return nil, fmt.Errorf("drive: %s: controller name %q is longer than %d bytes", path, o.Controller, controllerBytes)
	}
	st, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("drive: %w", err)
	}
	switch {
	case st.Mode().IsRegular():
		return openFile(path, o)
	case st.Mode()&os.ModeDevice != 0 && st.Mode()&os.ModeCharDevice == 0:
		return openBlock(path)
	}
	return nil, fmt.Errorf("drive: %s: %v is no drive", path, st.Mode())
}

// Create makes a blank file of size bytes, sparse, to be opened as a drive. It refuses one that exists.
func Create(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("drive: %w", err)
	}
	err = f.Truncate(size)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("drive: create: %w", err)
	}
	return nil
}

// openDirect opens with O_DIRECT if wanted, and without where the filesystem refuses it.
func openDirect(path string, direct bool) (*os.File, error) {
	flags := os.O_RDWR | syscall.O_CLOEXEC
	if direct {
		f, err := os.OpenFile(path, flags|unix.O_DIRECT, 0)
		if !errors.Is(err, unix.EINVAL) {
			return f, err
		}
	}
	return os.OpenFile(path, flags, 0)
}

// maxVector is IOV_MAX: so many buffers a request takes.
const maxVector = 1024

// pwritev writes all of the buffers, one behind the other.
func pwritev(file *os.File, bufs [][]byte, off int64) (written int, err error) {
	err = control(file, func(fd uintptr) error {
		rest := bufs
		for len(rest) > 0 {
			n, err := unix.Pwritev(int(fd), rest[:min(len(rest), maxVector)], off+int64(written))
			switch {
			case errors.Is(err, unix.EINTR):
				continue
			case err != nil:
				return &os.PathError{Op: "pwritev", Path: file.Name(), Err: err}
			case n == 0:
				return io.ErrShortWrite
			}
			written += n
			rest = behind(rest, n)
		}
		return nil
	})
	return written, err
}

// behind returns what follows the first n bytes of bufs, and leaves bufs as it is.
func behind(bufs [][]byte, n int) [][]byte {
	for len(bufs) > 0 && n >= len(bufs[0]) {
		n -= len(bufs[0])
		bufs = bufs[1:]
	}
	if n > 0 {
		bufs = slices.Clone(bufs)
		bufs[0] = bufs[0][n:]
	}
	return bufs
}
