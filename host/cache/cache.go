// Package cache is the flash cache of a host: lines of segments on a file, partition or SSD.
//
// It owns the medium and the little memory that says what is where. It promises: a line that it
// gives is the line that was put in under this name, proved by a checksum over name and content
// at every read; what a clean stop or a power cut left is found again (but for lines written in
// the last second); a medium that fails is left alone from then on and reported, and every call
// still returns. It never holds anything that is not on the shelf too, and never needs to be
// told that something changed: a line's name is never used for other bytes.
//
// # Medium
//
// The head, then regions, each a table and 126 lines. Little endian; crc32c (Castagnoli) from byte 12
// to the end of the block.
//
//	head        0  8  "LEDGECH1"            table      0  8  "LEDGECT1"
//	(4 KiB)     8  4  crc32c                (4 KiB)    8  4  crc32c
//	           12  4  version, 1                      12  4  region's number
//	           16 16  id of this formatting           16 16  id of the formatting
//	           32  4  regions                         64     126 × entry:
//	           36  4  slots in a region, 126             0 16  UUID of the store
//	           40  4  bytes of a line, 65536            16  4  segment; 0: nothing here
//	                                                    20  2  line
//	line       65536 bytes as they are on the shelf     24  4  crc32c of UUID, segment (4 bytes), line (2), content
//
// Lines are written one behind the other round the medium (a flash drive's favourite order: its
// own write amplification stays near 1), passing over those that were read since the last round. A
// table follows its lines, so that after a power cut it may name what was overwritten; the
// line's checksum tells.
//
// # Memory
//
// About 45 bytes for each line: 0.7 GB for 1 TB.
package cache

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
)

// Medium is what the cache is on.
type Medium interface {
	io.ReaderAt
	io.WriterAt
}

// Options of Open.
type Options struct {
	// Path of a file, made if it is not there, or of a block device.
	Path string
	// SizeBytes of the medium to use; zero: what the file or device has.
	SizeBytes int64
	Logger    *slog.Logger

	// medium replaces Path, for tests.
	medium Medium
}

// ErrSize: the medium is too small for one region, or too large to be addressed.
var ErrSize = errors.New("cache: size")

const (
	maxStores  = 1 << 8
	queueLines = 256 // written to the cache while they wait: 16 MiB
)

// Cache implements store.Cache. All its methods may be called concurrently.
type Cache struct {
	medium Medium
	file   *os.File
	log    *slog.Logger
	head   head
	queue  chan put
	wg     sync.WaitGroup
	lines  sync.Pool

	hits, misses, bad, written, dropped atomic.Uint64

	mu     sync.RWMutex
	failed error
	closed bool
	stores [][16]byte
	slots  []slot
	where  map[name]uint32 // slot of each line

	next  uint32 // owned by the writer: the slot it looks at next
	dirty map[uint32]bool
}

// name is a line's name in 8 bytes: number of the store (8 bits), segment (32), line (16).
type name uint64

func nameOf(store int, segment uint32, line int) name {
	return name(uint64(store)<<48 | uint64(segment)<<16 | uint64(uint16(line)))
}

type slot struct {
	name name // 0: free
	sum  uint32
	used bool // read since the writer passed
}

// put is a line on its way to the medium.
type put struct {
	store   [16]byte
	segment uint32
	line    int
	data    []byte
}

// Open finds what the medium holds, or formats it.
func Open(ctx context.Context, o Options) (*Cache, error) {
	c := &Cache{medium: o.medium, log: o.Logger, queue: make(chan put, queueLines), where: map[name]uint32{}, dirty: map[uint32]bool{}}
	c.lines.New = func() any { return make([]byte, lineBytes) }
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	size := o.SizeBytes
	if c.medium == nil {
		if err := c.openFile(o.Path, &size); err != nil {
			return nil, err
		}
	}
	regions := (size - blockBytes) / regionBytes
	if regions < 1 || regions*slotsPer >= 1<<32 {
		c.closeFile()
		return nil, fmt.Errorf("cache: %d bytes; at least %d are needed: %w", size, blockBytes+regionBytes, ErrSize)
	}
	c.slots = make([]slot, regions*slotsPer)
	if err := c.load(ctx, uint32(regions)); err != nil {
		c.closeFile()
		return nil, err
	}
	c.wg.Go(c.writeLoop)
	return c, nil
}

func (c *Cache) openFile(path string, size *int64) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("cache: %w", err)
	}
	c.file, c.medium = f, f
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return fmt.Errorf("cache: %s is in use by another process: %w", path, err)
	}
	info, err := f.Stat()
	if err == nil && info.Mode().IsRegular() && *size > 0 {
		err = f.Truncate(*size)
	}
	end := int64(0)
	if err == nil {
		end, err = f.Seek(0, io.SeekEnd)
	}
	if err != nil {
		f.Close()
		return fmt.Errorf("cache: %s: %w", path, err)
	}
	if *size == 0 || *size > end {
		*size = end
	}
	return nil
}

func (c *Cache) closeFile() error {
	if c.file == nil {
		return nil
	}
	return c.file.Close()
}

// load reads the tables, or formats the medium where it is not ours or has another size.
func (c *Cache) load(ctx context.Context, regions uint32) error {
	p := make([]byte, blockBytes)
	if _, err := c.medium.ReadAt(p, 0); err != nil && err != io.EOF {
		return fmt.Errorf("cache: read head: %w", err)
	}
	h, err := decodeHead(p)
	if err != nil || h.regions != regions {
		c.head = head{regions: regions}
		rand.Read(c.head.id[:])
		if _, err := c.medium.WriteAt(c.head.encode(), 0); err != nil {
			return fmt.Errorf("cache: format: %w", err)
		}
		return nil
	}
	c.head = h
	for r := range regions {
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, err := c.medium.ReadAt(p, tableAt(r)); err != nil && err != io.EOF {
			return fmt.Errorf("cache: read table %d: %w", r, err)
		}
		entries, err := decodeTable(c.head.id, r, p)
		if err != nil {
			continue // never written, or torn: its lines are gone
		}
		for i := range entries {
			if e := &entries[i]; e.used() {
				if s, ok := c.storeNumber(e.store, true); ok {
					c.enter(r*slotsPer+uint32(i), nameOf(s, e.segment, int(e.line)), e.sum)
				}
			}
		}
	}
	return nil
}

func tableAt(region uint32) int64 { return blockBytes + int64(region)*regionBytes }

func lineAt(slot uint32) int64 {
	return tableAt(slot/slotsPer) + blockBytes + int64(slot%slotsPer)*lineBytes
}

// storeNumber finds a store's number. mu is held; for writing, if it may be made.
func (c *Cache) storeNumber(store [16]byte, add bool) (int, bool) {
	for i, s := range c.stores {
		if s == store {
			return i, true
		}
	}
	if !add || len(c.stores) == maxStores {
		return 0, false
	}
	c.stores = append(c.stores, store)
	return len(c.stores) - 1, true
}

// enter says that a slot holds a line. mu is held for writing.
func (c *Cache) enter(at uint32, n name, sum uint32) {
	c.leave(at)
	if old, ok := c.where[n]; ok {
		c.leave(old)
	}
	c.slots[at] = slot{name: n, sum: sum}
	c.where[n] = at
}

// leave says that a slot holds nothing. mu is held for writing.
func (c *Cache) leave(at uint32) {
	if n := c.slots[at].name; n != 0 {
		delete(c.where, n)
	}
	c.slots[at] = slot{}
}

// Read fills p with the line and returns true, or returns false.
func (c *Cache) Read(store [16]byte, segment uint32, line int, p []byte) bool {
	c.mu.RLock()
	s, known := c.storeNumber(store, false)
	n := nameOf(s, segment, line)
	at, found := c.where[n]
	if !known || !found || c.failed != nil || c.closed || len(p) != lineBytes {
		c.mu.RUnlock()
		c.misses.Add(1)
		return false
	}
	sum := c.slots[at].sum
	c.mu.RUnlock()
	if _, err := c.medium.ReadAt(p, lineAt(at)); err != nil {
		c.fail(fmt.Errorf("read slot %d: %w", at, err))
		c.misses.Add(1)
		return false
	}
	good := sumOf(store, segment, line, p) == sum
	c.mu.Lock()
	if c.slots[at].name == n && c.slots[at].sum == sum {
		if c.slots[at].used = true; !good {
			c.leave(at)
			c.bad.Add(1)
		}
	}
	c.mu.Unlock()
	if !good {
		c.misses.Add(1)
		return false
	}
	c.hits.Add(1)
	return true
}

// Write keeps a copy of a line, if the medium keeps up; it never waits.
func (c *Cache) Write(store [16]byte, segment uint32, line int, p []byte) {
	c.mu.RLock()
	s, known := c.storeNumber(store, false)
	_, have := c.where[nameOf(s, segment, line)]
	if known && have || c.failed != nil || c.closed || segment == 0 || line < 0 || line >= 1<<16 || len(p) != lineBytes {
		c.mu.RUnlock()
		return
	}
	defer c.mu.RUnlock() // held, so that Close knows that nothing follows
	data := c.lines.Get().([]byte)
	copy(data, p)
	select {
	case c.queue <- put{store, segment, line, data}:
	default:
		c.lines.Put(data)
		c.dropped.Add(1)
	}
}

// fail leaves the medium alone from now on.
func (c *Cache) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failed == nil {
		c.failed = fmt.Errorf("cache: %w", err)
		c.log.Error("cache bypassed: its medium failed", "err", err)
	}
}

// Stats of a cache.
type Stats struct {
	// Hits and Misses count reads; Bad lines whose checksum was wrong, which are misses too.
	Hits, Misses, Bad uint64
	// Written and Dropped count lines; those that came faster than the medium takes are dropped.
	Written, Dropped uint64
	// Bytes are held, of CapacityBytes.
	Bytes, CapacityBytes int64
	// Err is why the medium is bypassed, or nil.
	Err error
}

// Stats returns the figures of now.
func (c *Cache) Stats() Stats {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return Stats{Hits: c.hits.Load(), Misses: c.misses.Load(), Bad: c.bad.Load(), Written: c.written.Load(), Dropped: c.dropped.Load(),
		Bytes: int64(len(c.where)) * lineBytes, CapacityBytes: int64(len(c.slots)) * lineBytes, Err: c.failed}
}

// Close writes what is on its way, and ends.
func (c *Cache) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed = true
	failed := c.failed
	close(c.queue)
	c.mu.Unlock()
	c.wg.Wait()
	return errors.Join(failed, c.closeFile())
}
