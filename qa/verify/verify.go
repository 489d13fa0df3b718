// Package verify writes blocks that prove where and when they were written, and checks them.
//
// It holds promise P1 against a whole system: while a Writer runs, anything may be killed; what it
// was told to be written must read back afterwards, nothing torn, nothing foreign, nothing older.
//
// Each 4 KiB block on the device, all integers little endian:
//
//	offset  size  field
//	     0     8  magic "LEDGEVFY"
//	     8     8  run: the seed of the Writer
//	    16     8  address: the block's number on the device
//	    24     8  sequence: 1 for the first write of the run, and rising
//	    32  4060  filler: a xorshift stream seeded by run, address and sequence; every other 64 bytes zeros
//	  4092     4  CRC-32C of bytes 0 to 4091
//
// A CRC-32C that anybody computes over such blocks is the same whatever else is in them. So a checksum that is one, over a record or a block, shows
// itself here as wrong data.
//
// At most one write of a block is in flight, so that the model is small: a block may hold the newest
// acknowledged sequence, or any later one whose write did not return or returned an error.
package verify

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"sync"
	"time"
)

// BlockBytes is the unit that is written whole.
const BlockBytes = 4096

const magic = "LEDGEVFY"

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// A Device is what is written to: an initiator's, or a fake.
type Device interface {
	ReadAt(ctx context.Context, p []byte, off int64) error
	WriteAt(ctx context.Context, p []byte, off int64) error
}

// Options of a Writer; Offset and Bytes are multiples of BlockBytes.
type Options struct {
	Seed          uint64
	Offset, Bytes int64
	Depth         int // writes in flight; zero: 8
	MaxBlocks     int // blocks of a write; zero: 16
}

// A Writer owns a region of a device, and knows what it must hold.
type Writer struct {
	opts  Options
	first int64 // number of the region's first block

	mu     sync.Mutex
	rng    *rand.Rand
	seq    uint64
	blocks []state
	acked  uint64
	failed uint64
	last   time.Time     // of the newest acknowledgement
	stall  time.Duration // longest time without one while running
	errs   []error
}

// state of a block: the newest acknowledged sequence, and the later ones of unknown outcome (busy: one is in flight).
type state struct {
	acked   uint64
	unknown []uint64
	busy    bool
}

// New returns a writer for a region that reads as zeros.
func New(o Options) (*Writer, error) {
	if o.Depth == 0 {
		o.Depth = 8
	}
	if o.MaxBlocks == 0 {
		o.MaxBlocks = 16
	}
	if o.Offset%BlockBytes != 0 || o.Bytes%BlockBytes != 0 || o.Bytes < int64(o.MaxBlocks*BlockBytes) {
		return nil, fmt.Errorf("verify: region %d+%d: want multiples of %d, and %d blocks at least", o.Offset, o.Bytes, BlockBytes, o.MaxBlocks)
	}
	return &Writer{
		opts: o, first: o.Offset / BlockBytes,
		rng:    rand.New(rand.NewPCG(o.Seed, 1)),
		blocks: make([]state, o.Bytes/BlockBytes),
	}, nil
}

// Run writes until ctx ends, and waits for its writes. A write that fails is tried no more, and its blocks may
// hold either content from then on; errors other than ctx's are returned, the first eight of them.
func (w *Writer) Run(ctx context.Context, dev Device) error {
	w.mu.Lock()
	w.last, w.errs = time.Now(), nil
	w.mu.Unlock()
	var wg sync.WaitGroup
	for range w.opts.Depth {
		wg.Add(1)
		go func() {
			defer wg.Done()
			buf := make([]byte, w.opts.MaxBlocks*BlockBytes)
			for ctx.Err() == nil {
				w.write(ctx, dev, buf)
			}
		}()
	}
	wg.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	return errors.Join(w.errs...)
}

func (w *Writer) write(ctx context.Context, dev Device, buf []byte) {
	at, n, seq := w.pick()
	p := buf[:n*BlockBytes]
	for i := range n {
		encode(p[i*BlockBytes:(i+1)*BlockBytes], w.opts.Seed, uint64(w.first)+uint64(at+i), seq)
	}
	err := dev.WriteAt(ctx, p, w.opts.Offset+int64(at)*BlockBytes)
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := at; i < at+n; i++ {
		b := &w.blocks[i]
		b.busy = false
		if err == nil {
			b.acked, b.unknown = seq, nil
		} else {
			b.unknown = append(b.unknown, seq)
		}
	}
	if err != nil {
		w.failed++
		if ctx.Err() == nil && len(w.errs) < 8 {
			w.errs = append(w.errs, fmt.Errorf("verify: write of block %d: %w", w.first+int64(at), err))
		}
		return
	}
	w.acked++
	now := time.Now()
	w.stall = max(w.stall, now.Sub(w.last))
	w.last = now
}

// pick chooses a run of blocks none of which is in flight, and marks it.
func (w *Writer) pick() (at, n int, seq uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for {
		n = 1 + w.rng.IntN(w.opts.MaxBlocks)
		at = w.rng.IntN(len(w.blocks) - n + 1)
		free := true
		for i := at; i < at+n; i++ {
			free = free && !w.blocks[i].busy
		}
		if free {
			break
		}
	}
	for i := at; i < at+n; i++ {
		w.blocks[i].busy = true
	}
	w.seq++
	return at, n, w.seq
}

// Acked is the number of writes acknowledged so far; a test waits for it to rise.
func (w *Writer) Acked() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.acked
}

// A Report is what Check found.
type Report struct {
	Blocks  int           // of the region
	Written int           // that hold something
	Writes  uint64        // acknowledged
	Unknown uint64        // that returned an error: either outcome is right
	Stall   time.Duration // longest time without an acknowledgement during Run
	// Unreadable blocks answered with an error; only CheckReadable counts them.
	Unreadable int
}

// Check reads the whole region and compares; no Run may be under way. Blocks whose outcome was unknown
// are settled by what is read: from then on they must not change.
func (w *Writer) Check(ctx context.Context, dev Device) (Report, error) {
	return w.check(ctx, dev, false)
}

// CheckReadable is Check after more was lost than can be made good: a block that answers with an error is counted,
// and is no error of the check. A block that answers with data must still hold what Check would want.
func (w *Writer) CheckReadable(ctx context.Context, dev Device) (Report, error) {
	return w.check(ctx, dev, true)
}

func (w *Writer) check(ctx context.Context, dev Device, lossy bool) (Report, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	r := Report{Blocks: len(w.blocks), Writes: w.acked, Unknown: w.failed, Stall: w.stall}
	const chunk = 64
	buf := make([]byte, chunk*BlockBytes)
	var errs []error
	for at := 0; at < len(w.blocks); at += chunk {
		n := min(chunk, len(w.blocks)-at)
		p := buf[:n*BlockBytes]
		read := make([]error, n)
		if err := dev.ReadAt(ctx, p, w.opts.Offset+int64(at)*BlockBytes); err != nil {
			if !lossy || ctx.Err() != nil {
				return r, fmt.Errorf("verify: read of block %d: %w", w.first+int64(at), err)
			}
			for i := range n {
				read[i] = dev.ReadAt(ctx, p[i*BlockBytes:(i+1)*BlockBytes], w.opts.Offset+int64(at+i)*BlockBytes)
			}
		}
		for i := range n {
			if read[i] != nil {
				r.Unreadable++
				continue
			}
			seq, err := w.settle(at+i, p[i*BlockBytes:(i+1)*BlockBytes])
			if err != nil {
				errs = append(errs, err)
				if len(errs) >= 16 {
					return r, errors.Join(errs...)
				}
			}
			if seq > 0 {
				r.Written++
			}
		}
	}
	return r, errors.Join(errs...)
}

// ReadOne reads one block that was acknowledged, any, and compares: the first sign that a system is back. No Run may be under way.
func (w *Writer) ReadOne(ctx context.Context, dev Device) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := range w.blocks {
		if w.blocks[i].acked == 0 {
			continue
		}
		p := make([]byte, BlockBytes)
		if err := dev.ReadAt(ctx, p, w.opts.Offset+int64(i)*BlockBytes); err != nil {
			return fmt.Errorf("verify: read of block %d: %w", w.first+int64(i), err)
		}
		_, err := w.settle(i, p)
		return err
	}
	return errors.New("verify: nothing was acknowledged yet")
}

// GiveUp is for after acknowledged writes were given up: it reads the whole region and takes what is there for what must be there from now
// on. Each block must be zeros, or whole and of a write of this Writer to it, or answer with an error and take a new write; lost counts
// those that are older than what was acknowledged, unreadable those with an error. No Run may be under way.
func (w *Writer) GiveUp(ctx context.Context, dev Device) (lost, unreadable int, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	p := make([]byte, BlockBytes)
	for i := range w.blocks {
		off, addr := w.opts.Offset+int64(i)*BlockBytes, uint64(w.first)+uint64(i)
		if err := dev.ReadAt(ctx, p, off); err != nil {
			if ctx.Err() != nil {
				return lost, unreadable, fmt.Errorf("verify: read of block %d: %w", addr, err)
			}
			unreadable++
			w.seq++
			encode(p, w.opts.Seed, addr, w.seq)
			if err := dev.WriteAt(ctx, p, off); err != nil {
				return lost, unreadable, fmt.Errorf("verify: write of block %d, which cannot be read: %w", addr, err)
			}
		}
		seq, err := decode(p, w.opts.Seed, addr)
		if err != nil {
			return lost, unreadable, fmt.Errorf("verify: block %d: %w", addr, err)
		}
		if seq < w.blocks[i].acked {
			lost++
		}
		w.blocks[i] = state{acked: seq}
	}
	return lost, unreadable, nil
}

func (w *Writer) settle(i int, p []byte) (uint64, error) {
	b := &w.blocks[i]
	addr := uint64(w.first) + uint64(i)
	seq, err := decode(p, w.opts.Seed, addr)
	if err != nil {
		return 0, fmt.Errorf("verify: block %d (acknowledged sequence %d): %w", addr, b.acked, err)
	}
	if seq == b.acked {
		// An unknown write may still have been carried out and then lost; it may not appear later.
		b.unknown = nil
		return seq, nil
	}
	for _, u := range b.unknown {
		if u == seq {
			b.acked, b.unknown = seq, nil
			return seq, nil
		}
	}
	return seq, fmt.Errorf("verify: block %d holds sequence %d; acknowledged is %d, of unknown outcome are %v", addr, seq, b.acked, b.unknown)
}

// ErrTorn: a block is neither zeros nor one that this package wrote for that address in that run.
var ErrTorn = errors.New("torn or foreign block")

func encode(p []byte, run, addr, seq uint64) {
	copy(p, magic)
	binary.LittleEndian.PutUint64(p[8:], run)
	binary.LittleEndian.PutUint64(p[16:], addr)
	binary.LittleEndian.PutUint64(p[24:], seq)
	x := run*0x9e3779b97f4a7c15 ^ addr<<20 ^ seq | 1
	clear(p[32:])
	for o := 32; o+8 <= BlockBytes-4; o += 8 {
		if o&64 != 0 {
			continue
		}
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(p[o:], x)
	}
	binary.LittleEndian.PutUint32(p[BlockBytes-4:], crc32.Checksum(p[:BlockBytes-4], castagnoli))
}

// decode returns the sequence, 0 for a block of zeros.
func decode(p []byte, run, addr uint64) (uint64, error) {
	zero := true
	for _, c := range p {
		if c != 0 {
			zero = false
			break
		}
	}
	if zero {
		return 0, nil
	}
	if string(p[:8]) != magic || binary.LittleEndian.Uint32(p[BlockBytes-4:]) != crc32.Checksum(p[:BlockBytes-4], castagnoli) {
		return 0, ErrTorn
	}
	if r, a := binary.LittleEndian.Uint64(p[8:]), binary.LittleEndian.Uint64(p[16:]); r != run || a != addr {
		return 0, fmt.Errorf("%w: run %#x, address %d, sequence %d", ErrTorn, r, a, binary.LittleEndian.Uint64(p[24:]))
	}
	return binary.LittleEndian.Uint64(p[24:]), nil
}
