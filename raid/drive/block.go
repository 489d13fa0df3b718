package drive

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ledge-storage/ledge/raid"
)

// Block is a Linux block device.
type Block struct {
	f    *os.File
	size int64

	mu  sync.Mutex
	key uint64 // what this port registered last; 0: nothing, as far as this process knows
}

func openBlock(path string) (*Block, error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("drive: %w", err)
	}
	b := &Block{f: f}
	if err := b.inspect(); err != nil {
		f.Close()
		return nil, fmt.Errorf("drive: %s: %w", path, err)
	}
	return b, nil
}

func (b *Block) inspect() error {
	var size uint64
	if err := b.ioctl(unix.BLKGETSIZE64, unsafe.Pointer(&size)); err != nil {
		return fmt.Errorf("BLKGETSIZE64: %w", err)
	}
	var sector int32
	if err := b.ioctl(unix.BLKSSZGET, unsafe.Pointer(&sector)); err != nil {
		return fmt.Errorf("BLKSSZGET: %w", err)
	}
	if sector <= 0 || raid.BlockBytes%int(sector) != 0 {
		return fmt.Errorf("logical blocks of %d bytes", sector)
	}
	b.size = int64(size)
	return nil
}

func (b *Block) ioctl(request uintptr, arg unsafe.Pointer) error {
	return control(b.f, func(fd uintptr) error {
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, request, uintptr(arg)); errno != 0 {
			return errno
		}
		return nil
	})
}

// control keeps the descriptor open while f uses it.
func control(file *os.File, f func(fd uintptr) error) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := raw.Control(func(fd uintptr) { inner = f(fd) }); err != nil {
		return err
	}
	return inner
}

// ReadAt needs no explanation: Write Exclusive – Registrants Only refuses no reads.
func (b *Block) ReadAt(p []byte, off int64) (int, error) { return b.f.ReadAt(p, off) }

func (b *Block) WriteAt(p []byte, off int64) (int, error) {
	n, err := b.f.WriteAt(p, off)
	return n, b.explain(err)
}

// WriteVAt implements raid.VectorWriter.
func (b *Block) WriteVAt(bufs [][]byte, off int64) (int, error) {
	n, err := pwritev(b.f, bufs, off)
	return n, b.explain(err)
}

func (b *Block) Flush() error { return b.explain(b.f.Sync()) }

func (b *Block) Size() int64  { return b.size }
func (b *Block) Name() string { return b.f.Name() }

func (b *Block) Close() error { return b.f.Close() }

// explain tells a reservation conflict from a drive's error. EBADE is the block layer's word for it
// (BLK_STS_RESV_CONFLICT since Linux 6.2, BLK_STS_NEXUS before); EIO may be anything, so the drive is asked: a
// reservation whose registrants we are not among is the reason.
func (b *Block) explain(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EBADE):
		return fmt.Errorf("%w: %w", raid.ErrReservation, err)
	case !errors.Is(err, unix.EIO):
		return err
	}
	registered, holder, kerr := b.Keys()
	if kerr != nil {
		return errors.Join(err, kerr)
	}
	b.mu.Lock()
	key := b.key
	b.mu.Unlock()
	if holder != 0 && (key == 0 || !slices.Contains(registered, key)) {
		return fmt.Errorf("%w: held by %#x: %w", raid.ErrReservation, holder, err)
	}
	return err
}

// Register is REGISTER AND IGNORE EXISTING KEY. The registration is to survive the drive's power loss
// (APTPL); a drive that cannot is registered without.
func (b *Block) Register(key uint64) error {
	err := b.reserveOut(prRegisterIgnore, 0, key, true)
	var sense *SenseError
	if errors.As(err, &sense) && sense.Key == senseIllegalRequest {
		err = b.reserveOut(prRegisterIgnore, 0, key, false)
	}
	if err != nil {
		return fmt.Errorf("drive: %s: register: %w", b.Name(), err)
	}
	b.mu.Lock()
	b.key = key
	b.mu.Unlock()
	return nil
}

func (b *Block) Reserve(key uint64) error {
	return b.named("reserve", b.reserveOut(prReserve, key, 0, false))
}

func (b *Block) Preempt(key, victim uint64) error {
	return b.named("preempt", b.reserveOut(prPreempt, key, victim, false))
}

func (b *Block) Release(key uint64) error {
	return b.named("release", b.reserveOut(prRelease, key, 0, false))
}

func (b *Block) Unregister(key uint64) error {
	err := b.reserveOut(prRegister, key, 0, false)
	if err == nil {
		b.mu.Lock()
		b.key = 0
		b.mu.Unlock()
	}
	return b.named("unregister", err)
}

func (b *Block) Keys() (registered []uint64, holder uint64, err error) {
	buf := make([]byte, prInBytes)
	n, err := b.sgio(reserveInCDB(prReadKeys, len(buf)), buf, fromDevice)
	if err == nil {
		registered, err = decodeKeys(buf[:n])
	}
	if err != nil {
		return nil, 0, fmt.Errorf("drive: %s: read keys: %w", b.Name(), err)
	}
	n, err = b.sgio(reserveInCDB(prReadReservation, len(buf)), buf, fromDevice)
	if err == nil {
		holder, err = decodeReservation(buf[:n])
	}
	if err != nil {
		return nil, 0, fmt.Errorf("drive: %s: read reservation: %w", b.Name(), err)
	}
	return registered, holder, nil
}

func (b *Block) reserveOut(action byte, key, actionKey uint64, aptpl bool) error {
	_, err := b.sgio(reserveOutCDB(action), reserveOutData(key, actionKey, aptpl), toDevice)
	return err
}

func (b *Block) named(what string, err error) error {
	if err != nil {
		return fmt.Errorf("drive: %s: %s: %w", b.Name(), what, err)
	}
	return nil
}
