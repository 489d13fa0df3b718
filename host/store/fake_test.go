package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/target"
)

var errPower = errors.New("power cut")

// power is cut once, at the write that it was told; both LUNs hang on it. Writes that were on
// their way then are wholly, partly or not on the medium, in pieces of 4 KiB.
type power struct {
	mu     sync.Mutex
	rng    *rand.Rand
	writes int
	cutAt  int // 0: never
	cut    bool
	jitter bool
}

// memory is a LUN in memory. As a store LUN it refuses to overwrite, and the test fails when a
// segment's number is used again.
type memory struct {
	t       testing.TB
	p       *power
	size    int64
	pages   map[int64][]byte
	store   bool
	freed   map[int64]bool
	zombies bool // two hosts write, which only the shelf's leases can prevent
	reads   int64
	full    func() bool
	refuse  func(off int64) error
	bad     func(off int64) bool // a block that cannot be read
}

func newMemory(t testing.TB, p *power, size int64, store bool) *memory {
	return &memory{t: t, p: p, size: size, pages: map[int64][]byte{}, store: store, freed: map[int64]bool{}}
}

func (m *memory) Size() int64                 { return m.size }
func (m *memory) Flush(context.Context) error { return nil }

func (m *memory) check(p int, off int64) error {
	if off < 0 || off%BlockBytes != 0 || p%BlockBytes != 0 || off+int64(p) > m.size {
		m.t.Errorf("request of %d bytes at %d", p, off)
		return target.ErrRange
	}
	return nil
}

func (m *memory) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := m.check(len(p), off); err != nil {
		return err
	}
	m.p.mu.Lock()
	defer m.p.mu.Unlock()
	if m.p.cut {
		return errPower
	}
	m.reads++
	for i := 0; i < len(p); i += BlockBytes {
		if m.bad != nil && m.bad(off+int64(i)) {
			return target.ErrMediumRead
		}
		if b := m.pages[off+int64(i)]; b != nil {
			copy(p[i:], b)
		} else {
			clear(p[i : i+BlockBytes])
		}
	}
	return ctx.Err()
}

func (m *memory) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := m.check(len(p), off); err != nil {
		return err
	}
	if m.store && (off%StripeBytes != 0 || len(p)%StripeBytes != 0) {
		m.t.Errorf("store LUN: write of %d bytes at %d", len(p), off)
	}
	m.p.mu.Lock()
	jitter := time.Duration(0)
	if m.p.jitter && m.p.rng.IntN(4) == 0 {
		jitter = time.Duration(m.p.rng.IntN(300)) * time.Microsecond
	}
	m.p.mu.Unlock()
	if jitter > 0 {
		time.Sleep(jitter)
	}
	m.p.mu.Lock()
	defer m.p.mu.Unlock()
	if m.refuse != nil {
		if err := m.refuse(off); err != nil {
			return err
		}
	}
	m.p.writes++
	if m.p.cutAt > 0 && m.p.writes >= m.p.cutAt {
		m.p.cut = true
	}
	if m.p.cut {
		switch m.p.rng.IntN(3) {
		case 0:
			m.put(p, off, func() bool { return true })
		case 1:
			m.put(p, off, func() bool { return m.p.rng.IntN(2) == 0 })
		}
		return errPower
	}
	if m.full != nil && m.full() {
		return fmt.Errorf("fake: %w", target.ErrNoSpace)
	}
	return m.put(p, off, func() bool { return true })
}

func (m *memory) put(p []byte, off int64, lands func() bool) error {
	if m.store {
		if m.freed[off/SegmentBytes] && !m.zombies {
			m.t.Errorf("segment %d is used again", off/SegmentBytes)
		}
		for i := 0; i < len(p); i += BlockBytes {
			if b := m.pages[off+int64(i)]; b != nil && !bytes.Equal(b, p[i:i+BlockBytes]) {
				m.t.Errorf("segment %d is overwritten", off/SegmentBytes)
				return target.ErrOverwrite
			}
		}
	}
	p = bytes.Clone(p)
	for i := 0; i < len(p); i += BlockBytes {
		if lands() {
			m.pages[off+int64(i)] = p[i : i+BlockBytes : i+BlockBytes]
		}
	}
	return nil
}

func (m *memory) Unmap(ctx context.Context, off, n int64) error {
	if m.store && (off%SegmentBytes != 0 || n%SegmentBytes != 0) {
		m.t.Errorf("unmap of %d bytes at %d", n, off)
	}
	m.p.mu.Lock()
	defer m.p.mu.Unlock()
	if m.p.cut {
		return errPower
	}
	for at := off; at < off+n; at += SegmentBytes {
		m.freed[at/SegmentBytes] = true
		for i := int64(0); i < SegmentBytes; i += BlockBytes {
			delete(m.pages, at+i)
		}
	}
	return nil
}

// allocated is how many segments hold something.
func (m *memory) allocated() int {
	m.p.mu.Lock()
	defer m.p.mu.Unlock()
	segs := map[int64]bool{}
	for off := range m.pages {
		segs[off/SegmentBytes] = true
	}
	return len(segs)
}

// shelf is both LUNs, which outlive hosts.
type shelf struct {
	p                 *power
	journal, segments *memory
}

func newShelf(t testing.TB, seed uint64) *shelf {
	p := &power{rng: rand.New(rand.NewPCG(seed, 77))}
	return &shelf{p, newMemory(t, p, 2<<20, false), newMemory(t, p, 1<<40, true)}
}

// repower ends a cut; the next one comes after n writes, 0: never.
func (s *shelf) repower(n int) {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	s.p.cut, s.p.writes, s.p.cutAt = false, 0, n
}

// options are small, so that everything that can be full is.
func (s *shelf) options() Options {
	return Options{Journal: s.journal, Segments: s.segments, RecordBytes: 64 << 10, BufferBytes: 1 << 20, PackDelay: -1, IndexBytes: 1 << 18,
		LineBytes: 1 << 20, TableBytes: 1 << 18, CheckpointSegments: 5}
}

func open(t testing.TB, o Options) *Store {
	t.Helper()
	st, err := Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// save and restore keep what is on both LUNs; blocks are replaced and never changed. Nothing else may be using them.
func (s *shelf) save() [3]any {
	return [3]any{maps.Clone(s.journal.pages), maps.Clone(s.segments.pages), maps.Clone(s.segments.freed)}
}

func (s *shelf) restore(saved [3]any) {
	s.journal.pages, s.segments.pages, s.segments.freed = maps.Clone(saved[0].(map[int64][]byte)), maps.Clone(saved[1].(map[int64][]byte)), maps.Clone(saved[2].(map[int64]bool))
	s.journal.bad, s.segments.bad = nil, nil
}
