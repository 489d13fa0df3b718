package cache

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"
)

var (
	storeA, storeB = [16]byte{1}, [16]byte{2}
	errMedium      = errors.New("medium")
	errPower       = errors.New("no power")
)

// fakeDisk is a drive of 4 KiB blocks with a volatile cache, whose power can be cut and which can
// be told to do wrong.
type fakeDisk struct {
	mu      sync.Mutex
	size    int64
	blocks  map[int64][]byte // what a read gives; missing: zeros
	unsaved map[int64][]byte // what a block was at the last Sync, of those written since; nil: zeros
	rng     *rand.Rand

	cutIn            int // writes until the power goes; 0: never
	dead             bool
	readErr          func() error                 // for each read
	onWrite          func(off int64, n int) error // for each write
	hang             chan struct{}                // not nil: all calls wait until it is closed
	lose             func(off int64) (to int64)   // where a block really goes; -1: nowhere
	synth            func(off int64, p []byte)    // gives blocks that were never written
	reads, readBytes int
}

func newDisk(size int64) *fakeDisk {
	return &fakeDisk{size: size, blocks: map[int64][]byte{}, unsaved: map[int64][]byte{}, rng: rand.New(rand.NewPCG(1, 1))}
}

func (d *fakeDisk) open() (medium, int64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.dead {
		return nil, 0, errPower
	}
	return sizedDisk{d}, d.size, nil
}

func (d *fakeDisk) wait() {
	d.mu.Lock()
	hang := d.hang
	d.mu.Unlock()
	if hang != nil {
		<-hang
	}
}

func (d *fakeDisk) set(f func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f()
}

func (d *fakeDisk) ReadAt(p []byte, off int64) (int, error) {
	d.wait()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.dead {
		return 0, errPower
	}
	if d.readErr != nil {
		if err := d.readErr(); err != nil {
			return 0, err
		}
	}
	d.reads++
	d.readBytes += len(p)
	n := 0
	for ; n < len(p); n += blockBytes {
		at := off + int64(n)
		if at >= d.size {
			return n, io.EOF
		}
		q := p[n:min(n+blockBytes, len(p))]
		if b, ok := d.blocks[at/blockBytes]; ok {
			copy(q, b)
		} else if clear(q); d.synth != nil {
			d.synth(at, q)
		}
	}
	return len(p), nil
}

func (d *fakeDisk) WriteAt(p []byte, off int64) (int, error) {
	d.wait()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.dead {
		return 0, errPower
	}
	if off%blockBytes != 0 || len(p)%blockBytes != 0 || off+int64(len(p)) > d.size {
		return 0, errors.New("a write that no drive takes")
	}
	if d.onWrite != nil {
		if err := d.onWrite(off, len(p)); err != nil {
			return 0, err
		}
	}
	torn := false
	if d.cutIn > 0 {
		d.cutIn--
		torn = d.cutIn == 0
	}
	for n := 0; n < len(p); n += blockBytes {
		at := off + int64(n)
		if d.lose != nil {
			if at = d.lose(at); at < 0 {
				continue
			}
		}
		if torn && d.rng.IntN(2) == 0 {
			continue
		}
		k := at / blockBytes
		if _, ok := d.unsaved[k]; !ok {
			d.unsaved[k] = d.blocks[k]
		}
		d.blocks[k] = bytes.Clone(p[n : n+blockBytes])
	}
	if torn {
		d.cut()
		return 0, errPower
	}
	return len(p), nil
}

// cut takes the power away: each block that was not synced is as it was, or as it was to be. mu is held.
func (d *fakeDisk) cut() {
	for _, k := range slices.Sorted(maps.Keys(d.unsaved)) { // sorted: from a seed, always the same
		if d.rng.IntN(2) == 0 {
			if old := d.unsaved[k]; old == nil {
				delete(d.blocks, k)
			} else {
				d.blocks[k] = old
			}
		}
	}
	clear(d.unsaved)
	d.dead = true
}

// powerOn after a cut.
func (d *fakeDisk) powerOn() { d.dead, d.cutIn = false, 0 }

func (d *fakeDisk) Sync() error {
	d.wait()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.dead {
		return errPower
	}
	clear(d.unsaved)
	return nil
}

func (d *fakeDisk) Close() error { return nil }

func (d *fakeDisk) grow(bytes int64) (int64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.size = max(d.size, bytes)
	return d.size, nil
}

// resizer: cut is the power's.
type sizedDisk struct{ *fakeDisk }

func (d sizedDisk) cut(bytes int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	beyond := func(k int64, _ []byte) bool { return k*blockBytes >= bytes }
	maps.DeleteFunc(d.blocks, beyond)
	maps.DeleteFunc(d.unsaved, beyond)
	d.size = bytes
	return nil
}

// fakeClock is moved by the test.
type fakeClock struct{ t time.Time }

func (c *fakeClock) now() time.Time { return c.t }

// small is a geometry that tests can fill: regions of 16 lines of one block.
const (
	smallLine   = 4000
	smallRegion = 64 << 10
	smallPer    = smallRegion / blockBytes
)

// smallSize of a medium with so many regions.
func smallSize(regions int64) int64 {
	groups := (regions + 15) / 16
	return smallRegion * (1 + groups + regions)
}

func small(d *fakeDisk) Options {
	return Options{open: d.open, inline: true, lineBytes: smallLine, regionBytes: smallRegion, Logger: slog.New(slog.DiscardHandler)}
}

// lineOf is the content of a line, which depends on its name only.
func lineOf(n int, store [16]byte, segment uint32, line int) []byte {
	rng := rand.New(rand.NewPCG(uint64(segment)<<8|uint64(line), uint64(store[0])))
	p := make([]byte, (n+7)/8*8)
	for i := 0; i < len(p); i += 8 {
		le.PutUint64(p[i:], rng.Uint64())
	}
	return p[:n]
}

func openWith(t testing.TB, o Options) *Cache {
	t.Helper()
	c, err := Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// has reads a line, and fails the test if it is another than was put in.
func has(t testing.TB, c *Cache, store [16]byte, segment uint32, line int) bool {
	t.Helper()
	p := make([]byte, c.opt.lineBytes)
	if !c.Read(store, segment, line, p) {
		return false
	}
	if !bytes.Equal(p, lineOf(len(p), store, segment, line)) {
		t.Fatalf("segment %d line %d: wrong content", segment, line)
	}
	return true
}

// fill does what the store does: read, and offer what was not there. The second time it is let in.
func fill(t testing.TB, c *Cache, store [16]byte, segment uint32, line int) (hit bool) {
	t.Helper()
	if has(t, c, store, segment, line) {
		return true
	}
	c.Write(store, segment, line, lineOf(int(c.opt.lineBytes), store, segment, line))
	if c.opt.inline {
		c.runQueue()
	}
	return false
}

// runQueue is the writer of a cache without goroutines.
func (c *Cache) runQueue() {
	for {
		select {
		case p := <-c.queue:
			c.put(&p)
		default:
			return
		}
	}
}

// held counts the lines that are there, without hitting them.
func held(c *Cache) int { return c.Stats().Lines }
