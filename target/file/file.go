// Package file is a target.Device in a regular file: a sparse file is a thin unit, Unmap punches
// holes. What it acknowledges is durable (the file is written with O_DSYNC) unless
// Options.Volatile says otherwise.
package file

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ledge-storage/ledge/target"
)

// Options of a Device.
type Options struct {
	// Path of the file. It is created, and grown, to Bytes where that is not zero.
	Path  string
	Bytes int64
	// BlockBytes is 512 (zero means it) or 4096.
	BlockBytes uint32
	// Volatile leaves writes in the page cache until Flush; a write with fua is still durable.
	Volatile bool
	ReadOnly bool
	// UUID of the unit; zero: derived from the absolute path.
	UUID [16]byte
}

// Device is a unit in a file.
type Device struct {
	f     *os.File
	info  target.Info
	fua   bool         // writes are durable anyway
	whole sync.RWMutex // exclusive: compare and write
}

// Open opens or creates the file.
func Open(o Options) (*Device, error) {
	if o.BlockBytes == 0 {
		o.BlockBytes = 512
	}
	if o.BlockBytes != 512 && o.BlockBytes != 4096 {
		return nil, fmt.Errorf("file: block size %d is neither 512 nor 4096", o.BlockBytes)
	}
	flags := os.O_RDWR | os.O_CREATE
	if o.ReadOnly {
		flags = os.O_RDONLY
	}
	if !o.Volatile && !o.ReadOnly {
		flags |= unix.O_DSYNC
	}
	f, err := os.OpenFile(o.Path, flags, 0o600)
	if err != nil {
		return nil, fmt.Errorf("file: %w", err)
	}
	d := &Device{f: f, fua: !o.Volatile}
	if err := d.describe(o); err != nil {
		f.Close()
		return nil, fmt.Errorf("file: %s: %w", o.Path, err)
	}
	return d, nil
}

func (d *Device) describe(o Options) error {
	st, err := d.f.Stat()
	if err != nil {
		return err
	}
	size := st.Size()
	if o.Bytes > size && !o.ReadOnly {
		if err := d.f.Truncate(o.Bytes); err != nil {
			return err
		}
		size = o.Bytes
	}
	blocks := size / int64(o.BlockBytes)
	if blocks == 0 {
		return errors.New("smaller than a block")
	}
	d.info = target.Info{
		Blocks: uint64(blocks), BlockBytes: o.BlockBytes, Thin: true, ReadOnly: o.ReadOnly,
		UUID: o.UUID, Product: "FILE", UnmapGranularityBlocks: 4096 / o.BlockBytes,
	}
	if o.BlockBytes == 512 {
		d.info.PhysicalExponent = 3
	}
	if o.UUID == [16]byte{} {
		path, err := filepath.Abs(o.Path)
		if err != nil {
			return err
		}
		sum := sha256.Sum256([]byte(path))
		copy(d.info.UUID[:], sum[:])
		d.info.UUID[6] = d.info.UUID[6]&0x0F | 0x80
		d.info.UUID[8] = d.info.UUID[8]&0x3F | 0x80
	}
	return nil
}

// Close closes the file.
func (d *Device) Close() error { return d.f.Close() }

// Info implements target.Device.
func (d *Device) Info() target.Info { return d.info }

func (d *Device) offset(lba uint64, n int64) (int64, error) {
	if lba > d.info.Blocks || uint64(n) > (d.info.Blocks-lba)*uint64(d.info.BlockBytes) {
		return 0, fmt.Errorf("file: %d bytes at block %d: %w", n, lba, target.ErrRange)
	}
	return int64(lba) * int64(d.info.BlockBytes), nil
}

func (d *Device) writable(lba uint64, n int64) (int64, error) {
	if d.info.ReadOnly {
		return 0, fmt.Errorf("file: write at block %d: %w", lba, target.ErrReadOnly)
	}
	return d.offset(lba, n)
}

// failed wraps an error of the file system in what an initiator can act on.
func failed(what string, lba uint64, err, medium error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		medium = target.ErrNoSpace
	}
	return fmt.Errorf("file: %s at block %d: %w: %w", what, lba, medium, err)
}

// Read implements target.Device.
func (d *Device) Read(_ context.Context, lba uint64, dst [][]byte) error {
	off, err := d.offset(lba, length(dst))
	if err != nil {
		return err
	}
	d.whole.RLock()
	defer d.whole.RUnlock()
	for _, p := range dst {
		if _, err := d.f.ReadAt(p, off); err != nil {
			return failed("read", lba, err, target.ErrMediumRead)
		}
		off += int64(len(p))
	}
	return nil
}

// Write implements target.Device.
func (d *Device) Write(_ context.Context, lba uint64, src [][]byte, fua bool) error {
	off, err := d.writable(lba, length(src))
	if err != nil {
		return err
	}
	d.whole.RLock()
	defer d.whole.RUnlock()
	return d.write(lba, off, src, fua)
}

func (d *Device) write(lba uint64, off int64, src [][]byte, fua bool) error {
	for _, p := range src {
		if _, err := d.f.WriteAt(p, off); err != nil {
			return failed("write", lba, err, target.ErrMediumWrite)
		}
		off += int64(len(p))
	}
	if fua && !d.fua {
		if err := unix.Fdatasync(int(d.f.Fd())); err != nil {
			return failed("sync", lba, err, target.ErrMediumWrite)
		}
	}
	return nil
}

// Unmap implements target.Device.
func (d *Device) Unmap(_ context.Context, ranges []target.Range) error {
	for _, r := range ranges {
		if err := d.punch(r.LBA, r.Blocks); err != nil {
			return err
		}
	}
	return nil
}

func (d *Device) punch(lba, blocks uint64) error {
	if blocks > d.info.Blocks {
		return fmt.Errorf("file: %d blocks at block %d: %w", blocks, lba, target.ErrRange)
	}
	n := int64(blocks) * int64(d.info.BlockBytes)
	off, err := d.writable(lba, n)
	if err != nil || n == 0 {
		return err
	}
	d.whole.RLock()
	defer d.whole.RUnlock()
	const hole = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	if err := unix.Fallocate(int(d.f.Fd()), hole, off, n); err != nil {
		return failed("punch", lba, err, target.ErrMediumWrite)
	}
	if d.fua {
		if err := unix.Fdatasync(int(d.f.Fd())); err != nil {
			return failed("sync", lba, err, target.ErrMediumWrite)
		}
	}
	return nil
}

// WriteSame implements target.Device.
func (d *Device) WriteSame(ctx context.Context, lba, blocks uint64, block []byte) error {
	if block == nil {
		return d.punch(lba, blocks)
	}
	const run = 256 << 10
	b := make([]byte, 0, run)
	for len(b) < run && uint64(len(b)) < blocks*uint64(len(block)) {
		b = append(b, block...)
	}
	for blocks > 0 {
		n := min(blocks, uint64(len(b)/len(block)))
		if err := d.Write(ctx, lba, [][]byte{b[:n*uint64(len(block))]}, false); err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		lba, blocks = lba+n, blocks-n
	}
	return nil
}

// CompareAndWrite implements target.Device.
func (d *Device) CompareAndWrite(_ context.Context, lba uint64, compare, write []byte) error {
	off, err := d.writable(lba, int64(len(compare)))
	if err != nil {
		return err
	}
	d.whole.Lock()
	defer d.whole.Unlock()
	have := make([]byte, len(compare))
	if _, err := d.f.ReadAt(have, off); err != nil {
		return failed("read", lba, err, target.ErrMediumRead)
	}
	for i := range have {
		if have[i] != compare[i] {
			return &target.MiscompareError{Offset: uint64(i)}
		}
	}
	return d.write(lba, off, [][]byte{write}, false)
}

// Flush implements target.Device.
func (d *Device) Flush(context.Context) error {
	if err := unix.Fdatasync(int(d.f.Fd())); err != nil {
		return failed("flush", 0, err, target.ErrMediumWrite)
	}
	return nil
}

// Mapped implements target.Device, by the file's holes.
func (d *Device) Mapped(_ context.Context, lba, blocks uint64) (bool, uint64, error) {
	off, err := d.offset(lba, int64(d.info.BlockBytes))
	if err != nil {
		return false, 0, err
	}
	end := off + int64(min(blocks, d.info.Blocks-lba))*int64(d.info.BlockBytes)
	fd := int(d.f.Fd())
	next, mapped := end, false
	data, err := unix.Seek(fd, off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO): // no data to the end
	case err != nil:
		return false, 0, failed("seek", lba, err, target.ErrMediumRead)
	case data <= off:
		mapped = true
		if hole, err := unix.Seek(fd, off, unix.SEEK_HOLE); err == nil {
			next = min(hole, end)
		}
	default:
		next = min(data, end)
	}
	return mapped, max(1, uint64(next-off)/uint64(d.info.BlockBytes)), nil
}

func length(v [][]byte) (n int64) {
	for _, p := range v {
		n += int64(len(p))
	}
	return n
}
