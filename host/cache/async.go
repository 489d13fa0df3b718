package cache

import (
	"errors"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A read past the page cache goes to the kernel by io_submit(2), and whoever wants it waits for the answer himself, no longer than he
// wants to: no other goroutine has to be woken, which takes 20 µs here of the 60 that the medium takes. The request never waits
// before the kernel has it (RWF_NOWAIT); where it would have to, and where the kernel or the file system knows none of this, a reading
// goroutine has it instead (readLoop).

// async is one request at a time on its way in the kernel.
type async interface {
	// start hands the kernel a read of p, which stays the kernel's until wait has had the answer.
	start(fd int, p []byte, off int64) error
	// wait returns how many bytes came, or errLate after so long; less than zero: as long as it takes.
	wait(limit time.Duration) (n int, err error)
	close()
}

// asyncMedium is a medium that can be read so.
type asyncMedium interface {
	// async returns its descriptor; false: it is not to be read so.
	async() (fd int, ok bool)
}

// readAsync is readOp by the kernel's own queue. False: nothing was done, another way must be taken.
func (c *Cache) readAsync(o *op, fd int) (done bool, err error) {
	var x async
	select {
	case x = <-c.contexts:
	default:
		return false, nil // as many as may be are on their way
	}
	if x == nil {
		if x, err = c.opt.newAsync(); err != nil {
			c.synchronous.Store(true)
			c.contexts <- nil
			return false, nil
		}
	}
	n, err := 0, x.start(fd, o.buf[:o.n], o.off)
	if err == nil {
		n, err = x.wait(c.opt.ReadTimeout)
	}
	if errors.Is(err, errLate) {
		c.stuck.Add(1)
		c.wg.Go(func() {
			x.wait(-1)
			runtime.KeepAlive(o) // the kernel had its buffer
			c.contexts <- x
			c.stuck.Add(-1)
		})
		return true, err
	}
	c.contexts <- x
	switch {
	case errors.Is(err, unix.EAGAIN):
		return false, nil
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EPERM):
		c.synchronous.Store(true)
		return false, nil
	case err == nil && n < o.n:
		return true, endsAt(o.off + int64(n))
	}
	return true, err
}

// endAsync gives back what the kernel keeps for requests.
func (c *Cache) endAsync() {
	for {
		select {
		case x := <-c.contexts:
			if x != nil {
				x.close()
			}
		default:
			return
		}
	}
}

// aio is a context of io_setup(2) for one request. The structures are those of linux/aio_abi.h.
type aio struct {
	context uintptr
	request iocb
	list    *iocb
	answer  ioEvent
}

type iocb struct {
	data      uint64
	key       uint32
	flags     int32 // RWF_*
	opcode    uint16
	priority  int16
	fd        uint32
	buf       uint64
	n         uint64
	off       int64
	_         uint64
	_, notify uint32
}

type ioEvent struct {
	data, request uint64
	res, res2     int64
}

func newAIO() (async, error) {
	x := new(aio)
	if _, _, e := unix.Syscall(unix.SYS_IO_SETUP, 1, uintptr(unsafe.Pointer(&x.context)), 0); e != 0 {
		return nil, e
	}
	x.list = &x.request
	return x, nil
}

func (x *aio) start(fd int, p []byte, off int64) error {
	x.request = iocb{flags: unix.RWF_NOWAIT, fd: uint32(fd), buf: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(p)))), n: uint64(len(p)), off: off} // opcode 0: PREAD
	n, _, e := unix.Syscall(unix.SYS_IO_SUBMIT, x.context, 1, uintptr(unsafe.Pointer(&x.list)))
	runtime.KeepAlive(p)
	if int(n) == 1 {
		return nil
	}
	if e == 0 {
		e = unix.EAGAIN
	}
	return e
}

func (x *aio) wait(limit time.Duration) (int, error) {
	var until time.Time
	if limit >= 0 {
		until = time.Now().Add(limit)
	}
	for left := limit; ; {
		var t *unix.Timespec
		if limit >= 0 {
			s := unix.NsecToTimespec(int64(max(left, 0)))
			t = &s
		}
		n, _, e := unix.Syscall6(unix.SYS_IO_GETEVENTS, x.context, 1, 1, uintptr(unsafe.Pointer(&x.answer)), uintptr(unsafe.Pointer(t)), 0)
		switch {
		case e == unix.EINTR: // by the runtime's signals
			if limit >= 0 {
				left = time.Until(until)
			}
		case e != 0:
			return 0, e
		case n == 0:
			return 0, errLate
		case x.answer.res < 0:
			return 0, unix.Errno(-x.answer.res)
		default:
			return int(x.answer.res), nil
		}
	}
}

func (x *aio) close() { unix.Syscall(unix.SYS_IO_DESTROY, x.context, 0, 0) }
