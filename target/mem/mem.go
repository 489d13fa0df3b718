// Package mem is a thin target.Device in memory, for tests, benchmarks and conformance. What it
// acknowledges is as durable as the process. Blocks are kept in pages of 64 KiB that exist only
// while something other than zeros may be in them.
package mem

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/ledge-storage/ledge/target"
)

const (
	pageBytes = 64 << 10
	stripes   = 64
	// atomicBytes is the longest write that is atomic.
	atomicBytes = 1 << 20
)

// Options of a Device.
type Options struct {
	// Bytes is the capacity, a multiple of the block size.
	Bytes int64
	// BlockBytes is 512 (zero means it) or 4096.
	BlockBytes uint32
	// Limit bounds the bytes of pages held; zero: no limit but Bytes. Beyond it writes get
	// target.ErrNoSpace.
	Limit int64
	// Name makes the UUID; devices of one name are the same unit.
	Name string
	// PhysicalExponent is told in target.Info.
	PhysicalExponent uint8
	// ReadOnly refuses writes.
	ReadOnly bool
	// Huge takes the memory of the whole unit at once, in huge pages where the system gives
	// them: for benchmarks. [page by page, from Go's heap]
	Huge bool
}

// Device is a thin memory-backed unit.
type Device struct {
	info  target.Info
	limit int64

	// whole orders single-page calls (shared) against those that must be atomic over many
	// pages (exclusive).
	whole sync.RWMutex
	locks [stripes]sync.RWMutex // page n is guarded by locks[n%stripes]
	pages []*page
	// region is the memory of all pages, where Options.Huge asked for it.
	region []byte
	home   []page // of region

	held atomic.Int64
}

// New returns an empty device.
func New(o Options) (*Device, error) {
	if o.BlockBytes == 0 {
		o.BlockBytes = 512
	}
	if o.BlockBytes != 512 && o.BlockBytes != 4096 {
		return nil, fmt.Errorf("mem: block size %d is neither 512 nor 4096", o.BlockBytes)
	}
	if o.Bytes <= 0 || o.Bytes%int64(o.BlockBytes) != 0 {
		return nil, fmt.Errorf("mem: capacity %d is no multiple of %d", o.Bytes, o.BlockBytes)
	}
	sum := sha256.Sum256([]byte(o.Name))
	i := target.Info{
		Blocks:     uint64(o.Bytes) / uint64(o.BlockBytes),
		BlockBytes: o.BlockBytes,
		Thin:       true,
		ReadOnly:   o.ReadOnly,
		Product:    "MEMORY",

		PhysicalExponent: o.PhysicalExponent,
		AtomicBlocks:     atomicBytes / o.BlockBytes,
	}
	copy(i.UUID[:], sum[:16])
	i.UUID[6] = i.UUID[6]&0x0F | 0x80 // version 8, RFC 9562 variant
	i.UUID[8] = i.UUID[8]&0x3F | 0x80
	i.UnmapGranularityBlocks = 1
	d := &Device{info: i, limit: o.Limit, pages: make([]*page, (o.Bytes+pageBytes-1)/pageBytes)}
	if o.Huge {
		if err := d.reserve(o.Bytes); err != nil {
			return nil, err
		}
	}
	return d, nil
}

var (
	_ target.Inline      = (*Device)(nil)
	_ target.Provisioned = (*Device)(nil)
)

// NeverBlocks is true: memory is there.
func (d *Device) NeverBlocks() bool { return true }

// Info implements target.Device.
func (d *Device) Info() target.Info { return d.info }

func (d *Device) check(lba uint64, n int64) (off int64, err error) {
	if lba > d.info.Blocks || uint64(n) > (d.info.Blocks-lba)*uint64(d.info.BlockBytes) {
		return 0, fmt.Errorf("mem: %d bytes at block %d: %w", n, lba, target.ErrRange)
	}
	return int64(lba) * int64(d.info.BlockBytes), nil
}

// Read implements target.Device.
func (d *Device) Read(_ context.Context, lba uint64, dst [][]byte) error {
	off, err := d.check(lba, length(dst))
	if err != nil {
		return err
	}
	d.whole.RLock()
	defer d.whole.RUnlock()
	for _, p := range dst {
		d.read(off, p)
		off += int64(len(p))
	}
	return nil
}

func (d *Device) read(off int64, p []byte) {
	for len(p) > 0 {
		page, at := off/pageBytes, off%pageBytes
		n := min(int64(len(p)), pageBytes-at)
		l := &d.locks[page%stripes]
		l.RLock()
		if m := d.pages[page]; m != nil {
			copy(p[:n], m.data[at:])
		} else {
			clear(p[:n])
		}
		l.RUnlock()
		p, off = p[n:], off+n
	}
}

// Write implements target.Device.
func (d *Device) Write(_ context.Context, lba uint64, src [][]byte, _ bool) error {
	off, err := d.writable(lba, length(src))
	if err != nil {
		return err
	}
	if n := length(src); n > pageBytes-off%pageBytes && n <= atomicBytes {
		d.whole.Lock()
		defer d.whole.Unlock()
		if err := d.allocate(off, n); err != nil {
			return err
		}
	} else {
		d.whole.RLock()
		defer d.whole.RUnlock()
	}
	for _, p := range src {
		if err := d.write(off, p); err != nil {
			return err
		}
		off += int64(len(p))
	}
	return nil
}

func (d *Device) writable(lba uint64, n int64) (int64, error) {
	if d.info.ReadOnly {
		return 0, fmt.Errorf("mem: write at block %d: %w", lba, target.ErrReadOnly)
	}
	return d.check(lba, n)
}

func (d *Device) write(off int64, p []byte) error {
	for len(p) > 0 {
		page, at := off/pageBytes, off%pageBytes
		n := min(int64(len(p)), pageBytes-at)
		if err := d.store(page, at, p[:n]); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

func (d *Device) store(page, at int64, p []byte) error {
	l := &d.locks[page%stripes]
	l.Lock()
	defer l.Unlock()
	if d.pages[page] == nil {
		if !d.take() {
			return fmt.Errorf("mem: page %d: %w", page, target.ErrNoSpace)
		}
		d.pages[page] = d.newPage(page)
	}
	copy(d.own(page)[at:], p)
	return nil
}

// allocate makes the pages of a range, all or none. The whole lock is held exclusively.
func (d *Device) allocate(off, n int64) error {
	first, last := off/pageBytes, (off+n-1)/pageBytes
	for page := first; page <= last; page++ {
		if d.pages[page] != nil {
			continue
		}
		if !d.take() {
			return fmt.Errorf("mem: page %d: %w", page, target.ErrNoSpace)
		}
		d.pages[page] = d.newPage(page) // zeros, should a later page find no room
	}
	return nil
}

func (d *Device) take() bool {
	for {
		held := d.held.Load()
		if d.limit != 0 && held+pageBytes > d.limit {
			return false
		}
		if d.held.CompareAndSwap(held, held+pageBytes) {
			return true
		}
	}
}

// Held is the memory of all pages, in bytes.
func (d *Device) Held() int64 { return d.held.Load() }

// Space implements target.Provisioned. The threshold is an eighth of the limit.
func (d *Device) Space() target.Space {
	held, most := uint64(max(d.Held(), 0)), uint64(len(d.pages))*pageBytes
	if d.limit == 0 || uint64(d.limit) > most {
		return target.Space{UsedBytes: held, AvailableBytes: most - min(held, most)}
	}
	most = uint64(d.limit)
	return target.Space{UsedBytes: held, AvailableBytes: most - min(held, most), ThresholdBytes: most / 8}
}

// Unmap implements target.Device.
func (d *Device) Unmap(_ context.Context, ranges []target.Range) error {
	for _, r := range ranges {
		if err := d.zero(r.LBA, r.Blocks); err != nil {
			return err
		}
	}
	return nil
}

// zero frees whole pages and clears parts of others.
func (d *Device) zero(lba, blocks uint64) error {
	if blocks > d.info.Blocks {
		return fmt.Errorf("mem: %d blocks at block %d: %w", blocks, lba, target.ErrRange)
	}
	left := int64(blocks) * int64(d.info.BlockBytes)
	off, err := d.writable(lba, left)
	if err != nil {
		return err
	}
	d.whole.RLock()
	defer d.whole.RUnlock()
	for left > 0 {
		page, at := off/pageBytes, off%pageBytes
		n := min(left, pageBytes-at)
		l := &d.locks[page%stripes]
		l.Lock()
		if m := d.pages[page]; m != nil {
			if n < pageBytes {
				clear(d.own(page)[at : at+n])
				m = d.pages[page]
			}
			if n == pageBytes || zeros(m.data) {
				d.pages[page] = nil
				d.held.Add(-pageBytes)
			}
		}
		l.Unlock()
		off, left = off+n, left-n
	}
	return nil
}

var zeroPage [pageBytes]byte

func zeros(m []byte) bool { return bytes.Equal(m, zeroPage[:len(m)]) }

// WriteSame implements target.Device.
func (d *Device) WriteSame(ctx context.Context, lba, blocks uint64, block []byte) error {
	if block == nil {
		return d.zero(lba, blocks)
	}
	if blocks > d.info.Blocks {
		return fmt.Errorf("mem: %d blocks at block %d: %w", blocks, lba, target.ErrRange)
	}
	off, err := d.writable(lba, int64(blocks)*int64(len(block)))
	if err != nil {
		return err
	}
	run := bytes.Repeat(block, pageBytes/len(block))
	d.whole.RLock()
	defer d.whole.RUnlock()
	for left := int64(blocks) * int64(len(block)); left > 0; {
		n := min(left, pageBytes-off%pageBytes)
		if err := d.write(off, run[:n]); err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		off, left = off+n, left-n
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
	d.read(off, have)
	for i := range have {
		if have[i] != compare[i] {
			return &target.MiscompareError{Offset: uint64(i)}
		}
	}
	return d.write(off, write)
}

// Flush implements target.Device.
func (d *Device) Flush(context.Context) error { return nil }

// Mapped implements target.Device: a page is mapped as a whole.
func (d *Device) Mapped(_ context.Context, lba, blocks uint64) (bool, uint64, error) {
	off, err := d.check(lba, 0)
	if err != nil {
		return false, 0, err
	}
	end := int64(min(blocks, d.info.Blocks-lba))*int64(d.info.BlockBytes) + off
	mapped := d.mapped(off / pageBytes)
	at := (off/pageBytes + 1) * pageBytes
	for at < end && d.mapped(at/pageBytes) == mapped {
		at += pageBytes
	}
	return mapped, uint64(min(at, end)-off) / uint64(d.info.BlockBytes), nil
}

func (d *Device) mapped(page int64) bool {
	l := &d.locks[page%stripes]
	l.RLock()
	defer l.RUnlock()
	return d.pages[page] != nil
}

func length(v [][]byte) (n int64) {
	for _, p := range v {
		n += int64(len(p))
	}
	return n
}
