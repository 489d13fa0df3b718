package store

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/host/meter"
)

// slow is a LUN, and flash a cache, whose reads and writes take their time.
type slow struct {
	*memory
	read, write atomic.Int64 // nanoseconds
}

func (s *slow) ReadAt(ctx context.Context, p []byte, off int64) error {
	time.Sleep(time.Duration(s.read.Load()))
	return s.memory.ReadAt(ctx, p, off)
}

func (s *slow) WriteAt(ctx context.Context, p []byte, off int64) error {
	time.Sleep(time.Duration(s.write.Load()))
	return s.memory.WriteAt(ctx, p, off)
}

type flash struct {
	mu    sync.Mutex
	lines map[lineKey][]byte
	read  atomic.Int64
}

func (f *flash) Read(_ [16]byte, segment uint32, line int, p []byte) bool {
	time.Sleep(time.Duration(f.read.Load()))
	f.mu.Lock()
	defer f.mu.Unlock()
	return copy(p, f.lines[lineKey{segment, line}]) > 0
}

func (f *flash) Write(_ [16]byte, segment uint32, line int, p []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lines[lineKey{segment, line}] = append([]byte(nil), p...)
}

// partFlash can read less than a line, too.
type partFlash struct{ flash }

func (f *partFlash) ReadAt(_ [16]byte, segment uint32, off int, p []byte) bool {
	time.Sleep(time.Duration(f.read.Load()))
	f.mu.Lock()
	defer f.mu.Unlock()
	l := f.lines[lineKey{segment, off / LineBytes}]
	return l != nil && copy(p, l[off%LineBytes:]) > 0
}

// stages are a meter's, by name.
func stages(m *meter.Volume) map[string]meter.Counts {
	return map[string]meter.Counts{"read queue": m.ReadQueue.Counts(), "cache": m.Cache.Counts(), "miss": m.Miss.Counts(), "shelf": m.Shelf.Counts(), "decode": m.Decode.Counts(),
		"write queue": m.WriteQueue.Counts(), "journal": m.Journal.Counts()}
}

// Where something is slow, the time is in its stage, and in no other.
func TestStages(t *testing.T) {
	const delay = 60 * time.Millisecond
	type world struct {
		v                 *Volume
		journal, segments *slow
		flash             *flash
	}
	ctx := t.Context()
	read := func(w world) error { return w.v.Read(ctx, 0, make([]byte, BlockBytes)) }
	for name, c := range map[string]struct {
		cache Cache // nil: none
		slow  func(w world)
		do    func(w world) error
		stage string // and how often it is entered
		times uint64
	}{
		"shelf":                      {slow: func(w world) { w.segments.read.Store(int64(delay)) }, do: read, stage: "shelf", times: 1},
		"cache":                      {cache: &flash{}, slow: func(w world) { w.flash.read.Store(int64(delay)) }, do: read, stage: "cache", times: 1},
		"cache part":                 {cache: &partFlash{}, slow: func(w world) { w.flash.read.Store(int64(delay)) }, do: read, stage: "cache", times: 1},
		"miss":                       {cache: &flash{}, slow: func(w world) { w.flash.read.Store(int64(delay)); clear(w.flash.lines) }, do: read, stage: "miss", times: 1},
		"miss of a part":             {cache: &partFlash{}, slow: func(w world) { w.flash.read.Store(int64(delay)); clear(w.flash.lines) }, do: read, stage: "miss", times: 2},
		"shelf after an empty cache": {cache: &flash{}, slow: func(w world) { w.segments.read.Store(int64(delay)); clear(w.flash.lines) }, do: read, stage: "shelf", times: 1},
		"shelf after a bad line": {cache: &flash{}, slow: func(w world) {
			w.segments.read.Store(int64(delay))
			for _, p := range w.flash.lines {
				p[100] ^= 1
			}
		}, do: read, stage: "shelf", times: 1},
		"two for one line": {slow: func(w world) { w.segments.read.Store(int64(delay)) }, do: func(w world) error {
			done := make(chan error)
			go func() { done <- read(w) }()
			err := read(w)
			if other := <-done; err == nil {
				err = other
			}
			return err
		}, stage: "shelf", times: 2},
		"journal": {slow: func(w world) { w.journal.write.Store(int64(delay)) }, do: func(w world) error { return w.v.Write(ctx, 1000, noise(9, 1)) }, stage: "journal", times: 1},
		"unmap":   {slow: func(w world) { w.journal.write.Store(int64(delay)) }, do: func(w world) error { return w.v.Zero(ctx, 1000, 1) }, stage: "journal", times: 1},
		"read of what is not durable": {slow: func(w world) { w.journal.write.Store(int64(delay)) }, do: func(w world) error {
			ticket, err := w.v.Stage(ctx, 1000, noise(9, 1))
			if err != nil {
				return err
			}
			err = w.v.Read(ctx, 1000, make([]byte, BlockBytes))
			<-ticket.batches[0].done
			return err
		}, stage: "read queue", times: 1},
		"no room": {slow: func(w world) { w.journal.write.Store(int64(delay)) }, do: func(w world) error {
			var tickets []*Ticket
			for i := range uint64(journalPipeline + 2) { // one goes at once, others gather in the next records
				ticket, err := w.v.Stage(ctx, 1000+16*i, noise(i, 16))
				if err != nil {
					return err
				}
				tickets = append(tickets, ticket)
			}
			for _, ticket := range tickets {
				<-ticket.batches[0].done
			}
			for _, ticket := range tickets {
				if err := ticket.Wait(ctx); err != nil {
					return err
				}
			}
			return nil
		}, stage: "write queue", times: journalPipeline + 2},
	} {
		t.Run(name, func(t *testing.T) {
			sh := newShelf(t, 1)
			w := world{journal: &slow{memory: sh.journal}, segments: &slow{memory: sh.segments}}
			o := sh.options()
			o.Journal, o.Segments, o.Cache = w.journal, w.segments, c.cache
			switch f := c.cache.(type) {
			case *flash:
				w.flash = f
			case *partFlash:
				w.flash = &f.flash
			}
			if w.flash != nil {
				w.flash.lines = map[lineKey][]byte{}
			}
			st := open(t, o)
			defer st.stop()
			_, err := st.CreateVolume(ctx, "v", 1<<30)
			must(t, err)
			must(t, volume(t, st, "v").Write(ctx, 0, noise(1, 16)))
			must(t, st.Checkpoint(ctx))
			w.v = volume(t, st, "v")
			before := stages(w.v.Meter())
			c.slow(w)
			must(t, c.do(w))
			for name, s := range stages(w.v.Meter()) {
				b := before[name]
				s = s.Since(&b)
				switch took := time.Duration(s.Nanos); {
				case name == c.stage:
					if s.N() != c.times || took < delay/2 {
						t.Errorf("%s: %d times, %v in all", name, s.N(), took)
					}
				case took > delay/2:
					t.Errorf("%s: took %v", name, took)
				}
			}
		})
	}
}

// What a volume's reads found where; one read of sixteen is a sample of decoding; snapshots and other volumes are not counted.
func TestMeterCounts(t *testing.T) {
	ctx, sh := t.Context(), newShelf(t, 1)
	o, f := sh.options(), &flash{lines: map[lineKey][]byte{}}
	o.Cache = f
	st := open(t, o)
	defer st.stop()
	for _, name := range []string{"v", "other"} {
		_, err := st.CreateVolume(ctx, name, 1<<30)
		must(t, err)
	}
	if n := len(st.Metered()); n != 0 {
		t.Errorf("%d volumes are metered without a handle", n)
	}
	v, m := volume(t, st, "v"), volume(t, st, "v").Meter()
	must(t, v.Write(ctx, 0, text(1, 16)))
	must(t, v.Write(ctx, 100, text(1, 16)))
	must(t, volume(t, st, "other").Write(ctx, 0, text(1, 16)))
	must(t, v.Zero(ctx, 200, 1))
	p := make([]byte, BlockBytes)
	must(t, v.Read(ctx, 0, p)) // from memory
	must(t, st.Checkpoint(ctx))
	_, err := st.Snapshot(ctx, "s", "v")
	must(t, err)
	must(t, snapshotOf(t, st, "v", "s").Read(ctx, 5, p)) // the line is in memory from here on
	for i := range uint64(32) {
		must(t, v.Read(ctx, i%16, p))
	}
	must(t, v.Read(ctx, 1<<17, p)) // never written
	if d, u, b := m.Duplicates.Load(), m.Uniques.Load(), m.StoredBytes.Load(); d != 16 || u != 16 || b == 0 || b > 16*BlockBytes/2 {
		t.Errorf("%d duplicates, %d stored in %d bytes", d, u, b)
	}
	if d, u := volume(t, st, "other").Meter().Duplicates.Load(), volume(t, st, "other").Meter().Uniques.Load(); d != 16 || u != 0 {
		t.Errorf("the other: %d duplicates, %d stored", d, u)
	}
	hits, misses, decoded, written := m.Cache.Counts(), m.Shelf.Counts(), m.Decode.Counts(), m.Journal.Counts()
	if hits.N() != 0 || misses.N() != 0 || m.Memory.Load() != 34 || decoded.N() != 2 || written.N() != 3 {
		t.Errorf("%d from the cache, %d from the shelf, %d from memory; %d decoded; %d written", hits.N(), misses.N(), m.Memory.Load(), decoded.N(), written.N())
	}
	for range 2 { // a miss, then a hit
		clearLines(st)
		must(t, v.Read(ctx, 0, p))
		clear(f.lines)
		clearLines(st)
		must(t, v.Read(ctx, 0, p))
	}
	hits, misses = m.Cache.Counts(), m.Shelf.Counts()
	if hits.N() != 2 || m.Hits.Load() != 2 || m.CacheBytes.Load() != 2*LineBytes || misses.N() != 2 || m.ShelfBytes.Load() != 2*LineBytes || m.Memory.Load() != 34 {
		t.Errorf("%d hits of %d bytes, %d misses of %d bytes", hits.N(), m.CacheBytes.Load(), misses.N(), m.ShelfBytes.Load())
	}
	if list := st.Metered(); len(list) != 2 || list[1].Name != "v" || list[1].Meter != m || list[1].LogicalBytes != 32*BlockBytes || m.Since().IsZero() {
		t.Errorf("%+v", list)
	}
}

// Of parts of lines all are counted, and one read of sixteen is timed.
func TestMeterParts(t *testing.T) {
	o := newShelf(t, 1).options()
	o.Cache = &partFlash{flash{lines: map[lineKey][]byte{}}}
	st := open(t, o)
	defer st.stop()
	_, err := st.CreateVolume(t.Context(), "v", 1<<30)
	must(t, err)
	v, p := volume(t, st, "v"), make([]byte, BlockBytes)
	must(t, v.Write(t.Context(), 0, noise(1, 1)))
	must(t, st.Checkpoint(t.Context()))
	for range 17 {
		clearLines(st)
		must(t, v.Read(t.Context(), 0, p))
	}
	m := v.Meter()
	timed, decoded, missed := m.Cache.Counts(), m.Decode.Counts(), m.Miss.Counts()
	if m.Hits.Load() != 17 || m.CacheBytes.Load() != 17*(BlockBytes+blockHeader) || timed.N() != 2 || decoded.N() != 2 || missed.N() != 0 {
		t.Errorf("%d hits of %d bytes, %d timed, %d decoded, %d missed", m.Hits.Load(), m.CacheBytes.Load(), timed.N(), decoded.N(), missed.N())
	}
}

// clearLines makes the next read of a line go to the flash cache.
func clearLines(st *Store) { st.lines = newLineCache(st.lines.limit) }

// Metering takes no memory: a read from memory allocates what it did before there was any.
func TestMeterAllocations(t *testing.T) {
	st := open(t, newShelf(t, 1).options())
	defer st.stop()
	_, err := st.CreateVolume(t.Context(), "v", 1<<30)
	must(t, err)
	v, p := volume(t, st, "v"), make([]byte, BlockBytes)
	must(t, v.Write(t.Context(), 0, text(1, 16)))
	must(t, st.Checkpoint(t.Context()))
	must(t, v.Read(t.Context(), 0, p))
	most := 3.0 // where the blocks are, and the set of lines
	if raceEnabled {
		most = 4
	}
	if n := testing.AllocsPerRun(500, func() { v.Read(t.Context(), 3, p) }); n > most {
		t.Errorf("%v allocations", n)
	}
}
