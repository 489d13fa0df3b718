package cache

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// LineBytes is the length of a line: store.LineBytes.
	LineBytes = 64 << 10
	// segmentLines are in a segment: store.SegmentBytes / store.LineBytes.
	segmentLines = 128

	maxStores   = 1 << 8
	queueLines  = 256 // wait for the writer at most: 16 MiB
	readTimeout = 500 * time.Millisecond
	tick        = time.Second
	// checkpoint is how long a line is in memory only.
	checkpoint = 10 * time.Second
)

var (
	// ErrSize: the medium is too small.
	ErrSize = errors.New("cache: size")
	// ErrForeign: the medium holds something that this package didn't write. It is not touched.
	ErrForeign = errors.New("cache: not a cache of Ledge")
	// ErrStuck: Close gave up waiting for a medium that hangs.
	ErrStuck = errors.New("cache: stuck")
)

// Options of Open.
type Options struct {
	// Path of a file, made if it is not there, or of a block device.
	Path string
	// SizeBytes of the medium to use, up to 16 TiB; zero: what the file or device has. A file
	// grows or shrinks to it.
	SizeBytes int64
	// Buffered goes through the page cache, which then holds a second copy of what is read often.
	// Otherwise it is avoided (O_DIRECT) where the file system can.
	Buffered bool
	// ReadTimeout is what a read may take before it is a miss (default 500 ms).
	ReadTimeout time.Duration
	Logger      *slog.Logger

	// For tests: another medium than Path; everything in the caller's goroutine; another clock;
	// other lengths of regions and lines.
	open                   func() (medium, int64, error)
	inline                 bool
	now                    func() time.Time
	slowTimeout            time.Duration
	newAsync               func() (async, error)
	regionBytes, lineBytes uint32
}

// Cache implements store.Cache. All its methods may be called concurrently.
//
// mu guards what its group says and is held for moments, never across I/O; health.mu and the
// ghost's locks come after it.
type Cache struct {
	opt     Options
	log     *slog.Logger
	queue   chan put
	reads   chan *op
	flushes chan *buffer
	free    chan *buffer // two in all
	resizes chan resize
	// contexts are those of reads that the kernel has: of readers in all, nil where none was needed yet.
	contexts chan async
	stop     chan struct{}
	wg       sync.WaitGroup // the goroutines
	readWG   sync.WaitGroup // calls of Read
	ops      sync.Pool
	lines    sync.Pool

	reading, writing health
	bypassed         atomic.Bool  // nothing is read or written
	full             atomic.Bool  // nothing is written
	synchronous      atomic.Bool  // the kernel takes no reads of its own, or none of this medium
	unsynced         atomic.Bool  // a table may be in the drive's cache only
	inflight         atomic.Int64 // reads that may use the medium
	stuck            atomic.Int64 // in the medium, and waited for no more

	counters

	mu       sync.RWMutex
	closed   bool
	medium   medium
	head     head
	layout   layout
	stores   [][16]byte
	perStore []*storeCounters
	index    *index
	ghost    *ghost
	seqs     []uint64 // of regions: changes when one is filled anew
	filling  *buffer
	flushing *buffer

	// The writer's own.
	next      uint32 // region to fill
	sequence  uint64 // of the newest region
	foreign   bool
	marked    bool // the medium says that it is being written,
	moved     bool // but not from where on
	lastFlush time.Time
}

// put is a line on its way to the medium.
type put struct {
	store   [16]byte
	segment uint32
	line    uint8
	data    []byte
}

// Open finds what the medium holds, or formats it where it is empty. A medium that fails is no
// error: the cache is bypassed until it works. ErrForeign, ErrInUse, ErrSize and a path that can't be
// opened are.
func Open(ctx context.Context, o Options) (*Cache, error) {
	c := &Cache{opt: o, log: o.Logger, queue: make(chan put, queueLines), reads: make(chan *op), flushes: make(chan *buffer, 1),
		free: make(chan *buffer, 2), resizes: make(chan resize), stop: make(chan struct{}),
		reading: health{what: "medium", forgiven: readFaults}, writing: health{what: "writing"}}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	if o.open == nil {
		c.opt.open = func() (medium, int64, error) { return openFile(&c.opt) }
	}
	if o.now == nil {
		c.opt.now = time.Now
	}
	if o.ReadTimeout == 0 {
		c.opt.ReadTimeout = readTimeout
	}
	if o.slowTimeout == 0 {
		c.opt.slowTimeout = slowTimeout
	}
	if o.lineBytes == 0 {
		c.opt.lineBytes = LineBytes
	}
	if o.newAsync == nil {
		c.opt.newAsync = newAIO
	}
	c.ops.New = c.newOp
	c.lines.New = func() any { return make([]byte, c.opt.lineBytes) }
	c.lastFlush = c.opt.now()
	if err := c.attach(ctx); err != nil {
		if isRefusal(err) {
			close(c.stop)
			c.closeMedium()
			return nil, err
		}
		c.bypassed.Store(true)
		c.reading.bypass(c.opt.now(), err)
		c.log.Error("cache bypassed: its medium fails; reads go to the shelf", "err", err)
	}
	if !o.inline {
		c.contexts = make(chan async, readers)
		for range readers {
			c.contexts <- nil
			c.wg.Go(c.readLoop)
		}
		c.wg.Go(c.writeLoop)
		c.wg.Go(c.flushLoop)
	}
	return c, nil
}

func (c *Cache) slotBytes() int {
	return (int(c.opt.lineBytes) + payloadBytes - 1) / payloadBytes * blockBytes
}

// Read fills p with the line and returns true, or returns false.
func (c *Cache) Read(store [16]byte, segment uint32, line int, p []byte) bool {
	hit := len(p) == int(c.opt.lineBytes) && c.read(store, segment, line, 0, p, true)
	if !hit {
		c.misses.Add(1)
	}
	return hit
}

// ReadAt fills p with what stands at off in the segment, within one line, and returns true, or
// returns false. It reads no more of the medium than it needs. Who gets false is to ask for the whole line next, so
// that this is no miss yet.
func (c *Cache) ReadAt(store [16]byte, segment uint32, off int, p []byte) bool {
	lineBytes := int(c.opt.lineBytes)
	line, at := off/lineBytes, off%lineBytes
	return off >= 0 && len(p) > 0 && at+len(p) <= lineBytes && c.read(store, segment, line, at, p, false)
}

// read: once more if the line moved meanwhile.
func (c *Cache) read(store [16]byte, segment uint32, line, at int, p []byte, whole bool) bool {
	if segment == 0 || line < 0 || line >= segmentLines {
		return false
	}
	n := lineName{store: store, segment: segment, line: uint8(line)}
	hit, moved := c.readOnce(&n, at, p, whole)
	if moved {
		hit, _ = c.readOnce(&n, at, p, whole)
	}
	return hit
}

// readOnce looks the line up, reads and verifies it, and judges the medium by it, unless the line moved
// while it was read. Of a whole line it notes that it was missed.
func (c *Cache) readOnce(want *lineName, at int, p []byte, whole bool) (hit, moved bool) {
	c.inflight.Add(1)
	defer c.inflight.Add(-1)
	if c.bypassed.Load() {
		return false, false
	}
	if whole {
		c.meet(want.store)
	}
	c.mu.RLock()
	s, known := c.storeNumber(want.store)
	if c.closed || c.index == nil || !known {
		c.mu.RUnlock()
		return false, false
	}
	c.readWG.Add(1)
	defer c.readWG.Done()
	n, counters := nameOf(s, want.segment, want.line), c.perStore[s]
	slot, found := c.index.find(n)
	if !found {
		g := c.ghost
		c.mu.RUnlock()
		if whole {
			g.miss(n)
			counters.misses.Add(1)
		}
		return false, false
	}
	c.index.hit(slot)
	*want = c.lineName(want.store, want.segment, want.line)
	l, region := &c.layout, slot/c.layout.perRegion
	seq := c.seqs[region]
	first, blocks := l.blocksOf(at, len(p))
	var err error
	if b := c.inMemory(region); b != nil {
		err = decodeLine(p, b.slot(l, slot%l.perRegion)[first*blockBytes:], want, at)
		c.mu.RUnlock()
	} else {
		o := c.ops.Get().(*op)
		o.m, o.n, o.off = c.medium, blocks*blockBytes, l.slotAt(slot)+int64(first)*blockBytes
		c.mu.RUnlock()
		if err = c.readOp(o); err == nil {
			err = decodeLine(p, o.buf[:o.n], want, at)
		}
		if !errors.Is(err, errLate) {
			c.ops.Put(o)
		}
	}
	if err == nil {
		c.hits.Add(1)
		c.hitBytes.Add(uint64(len(p)))
		counters.hits.Add(1)
		counters.hitBytes.Add(uint64(len(p)))
		return true, false
	}
	if !errors.Is(err, errLate) && !c.forget(slot, n, seq) {
		return false, true
	}
	c.readFault(err)
	if whole {
		counters.misses.Add(1)
	}
	return false, false
}

// inMemory returns the buffer that holds a region, if one does. mu is held.
func (c *Cache) inMemory(region uint32) *buffer {
	for _, b := range []*buffer{c.filling, c.flushing} {
		if b != nil && b.region == region {
			return b
		}
	}
	return nil
}

// forget drops a line that was read and is not what it should be, if the slot is what it was then.
func (c *Cache) forget(slot uint32, n name, seq uint64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if slot >= c.layout.slots() || c.seqs[slot/c.layout.perRegion] != seq || c.index.at(slot).bare() != n {
		return false
	}
	c.index.remove(slot)
	return true
}

// storeNumber finds a store's number. mu is held.
func (c *Cache) storeNumber(store [16]byte) (int, bool) {
	for i := range c.stores {
		if c.stores[i] == store {
			return i, true
		}
	}
	return 0, false
}

// meet gives a store its number when it first asks.
func (c *Cache) meet(store [16]byte) {
	c.mu.RLock()
	_, known := c.storeNumber(store)
	c.mu.RUnlock()
	if !known {
		c.mu.Lock()
		c.addStore(store)
		c.mu.Unlock()
	}
}

// addStore gives a store a number, one of a store without lines where all are given away. mu is held.
func (c *Cache) addStore(store [16]byte) (int, bool) {
	if i, ok := c.storeNumber(store); ok {
		return i, true
	}
	if len(c.stores) < maxStores {
		c.stores, c.perStore = append(c.stores, store), append(c.perStore, &storeCounters{})
		return len(c.stores) - 1, true
	}
	for i := range c.stores {
		if c.index != nil && c.index.held[i] == 0 {
			c.stores[i], c.perStore[i] = store, &storeCounters{}
			return i, true
		}
	}
	return 0, false
}

// Write keeps a copy of a line, if it was asked for before (or there is room that nobody needs), and if the
// medium keeps up; it never waits.
func (c *Cache) Write(store [16]byte, segment uint32, line int, p []byte) {
	if len(p) != int(c.opt.lineBytes) || segment == 0 || line < 0 || line >= segmentLines || c.bypassed.Load() || c.full.Load() {
		return
	}
	c.mu.RLock()
	defer c.mu.RUnlock() // held, so that Close knows that nothing follows
	if c.closed || c.index == nil {
		return
	}
	if s, known := c.storeNumber(store); known {
		n := nameOf(s, segment, uint8(line))
		if _, have := c.index.find(n); have {
			return
		}
		if admitted := c.ghost.admit(n); !admitted && !c.roomy.Load() {
			c.rejected.Add(1)
			return
		}
	} else if !c.roomy.Load() {
		c.rejected.Add(1)
		return
	}
	data := c.lines.Get().([]byte)
	copy(data, p)
	select {
	case c.queue <- put{store, segment, uint8(line), data}:
	default:
		c.lines.Put(data)
		c.dropped.Add(1)
	}
}

// Forget drops all lines of a segment that was freed, so that they take no more of the reader's or
// the writer's time. It costs microseconds. What is on the medium stays there until it is
// overwritten, and may be found again after a restart: no harm, as numbers of segments are used once.
func (c *Cache) Forget(store [16]byte, segment uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s, known := c.storeNumber(store)
	if !known || c.index == nil || segment == 0 {
		return
	}
	for line := range segmentLines {
		if slot, ok := c.index.find(nameOf(s, segment, uint8(line))); ok {
			c.index.remove(slot)
			c.forgotten.Add(1)
		}
	}
}

// Close writes what is on its way, and ends. A medium that hangs is left alone after a while, with ErrStuck.
func (c *Cache) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed = true
	close(c.queue)
	c.mu.Unlock()
	c.readWG.Wait()
	if c.opt.inline {
		c.finish()
	}
	ended := make(chan struct{})
	go func() {
		c.wg.Wait()
		close(ended)
	}()
	timer := time.NewTimer(3 * c.opt.slowTimeout)
	defer timer.Stop()
	select {
	case <-ended:
	case <-timer.C:
		return errors.Join(fmt.Errorf("cache %s: %d requests hang in the medium: %w", c.opt.Path, c.stuck.Load(), ErrStuck), c.closeMedium())
	}
	c.endAsync()
	return errors.Join(c.reading.err(), c.writing.err(), c.closeMedium())
}

func (c *Cache) closeMedium() error {
	if c.medium == nil {
		return nil
	}
	return c.medium.Close()
}
