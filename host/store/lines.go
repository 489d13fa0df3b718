package store

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/ledge-storage/ledge/host/meter"
	"github.com/ledge-storage/ledge/target"
	"golang.org/x/sync/errgroup"
)

// lineKey names 64 KiB of a segment.
type lineKey struct {
	segment uint32
	line    int
}

func lineOf(l loc) lineKey         { return lineKey{l.segment(), l.off() / LineBytes} }
func (k lineKey) next() lineKey    { return lineKey{k.segment, k.line + 1} }
func (k lineKey) isLast() bool     { return (k.line+1)*LineBytes >= SegmentBytes }
func (k lineKey) offset() int64    { return int64(k.segment)*SegmentBytes + int64(k.line)*LineBytes }
func straddles(l loc) (split bool) { return l.off()%LineBytes+l.len() > LineBytes }

// lineCache keeps the lines that were read last. A line that several readers want is read once.
// Lines hold stored bytes as they came; each block's checksum is verified by who decodes it.
type lineCache struct {
	mu    sync.Mutex
	limit int
	lines map[lineKey]*line
	order list.List // of *line, last used first
	free  [][]byte  // buffers of lines that are no more
	parts [128]part // that were read lately, by hash
	turn  uint64    // counts those who ask for parts
}

// freeLines is how many buffers are kept for the next lines.
const freeLines = 32

// part notes that a part of the line, which ends there in the segment, was read in that turn.
type part struct {
	line lineKey
	end  int
	turn uint64
}

// Who goes on where a part ended, or nearly, within so many turns, reads in sequence: a few dozen streams at once are found, and of
// reads at random few are taken for one, also where the data are little.
const (
	partMoment = 64
	partNear   = 8 << 10
)

type line struct {
	key   lineKey
	ready chan struct{}
	data  []byte
	err   error
	hit   bool // it came from the flash cache
	users int
	at    *list.Element
}

func newLineCache(limit int) *lineCache {
	return &lineCache{limit: max(limit, 2*linesAtOnce), lines: map[lineKey]*line{}}
}

// get returns the line and whether the caller must fill it and close ready.
func (c *lineCache) get(k lineKey) (l *line, mine bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if l := c.lines[k]; l != nil {
		l.users++
		c.order.MoveToFront(l.at)
		return l, false
	}
	l = &line{key: k, ready: make(chan struct{}), users: 1}
	l.at = c.order.PushFront(l)
	c.lines[k] = l
	for e := c.order.Back(); e != nil && len(c.lines) > c.limit; {
		old, prev := e.Value.(*line), e.Prev()
		if old.users == 0 {
			c.remove(old)
			c.recycle(old)
		}
		e = prev
	}
	return l, true
}

// wantsPart says whether a part of the line, from from to to in the segment, is enough: the line is not here, and the part does not go on
// where one ended a moment ago.
func (c *lineCache) wantsPart(k lineKey, from, to int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	last := &c.parts[(k.segment*31+uint32(k.line))%uint32(len(c.parts))]
	c.turn++
	if c.lines[k] != nil || last.line == k && c.turn-last.turn <= partMoment && from >= last.end-partNear && from <= last.end+partNear {
		return false
	}
	*last = part{k, to, c.turn}
	return true
}

func (c *lineCache) remove(l *line) {
	c.order.Remove(l.at)
	if c.lines[l.key] == l {
		delete(c.lines, l.key)
	}
}

// buffer is for a line's content. What was in it is there still.
func (c *lineCache) buffer() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := len(c.free)
	if n == 0 {
		return make([]byte, LineBytes)
	}
	p := c.free[n-1]
	c.free[n-1], c.free = nil, c.free[:n-1]
	return p
}

// recycle takes the buffer of a line that is in the cache no more and that nobody uses.
func (c *lineCache) recycle(l *line) {
	if l.data != nil && len(c.free) < freeLines {
		c.free = append(c.free, l.data)
	}
	l.data = nil
}

// drop forgets a line.
func (c *lineCache) drop(k lineKey) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if l := c.lines[k]; l != nil {
		c.remove(l)
		if l.users == 0 {
			c.recycle(l)
		}
	}
}

// done tells that the caller uses lines no more, nor what lineSet.block gave; failed ones are forgotten.
func (c *lineCache) done(ls lineSet) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for k, l := range ls {
		l.users--
		if l.err != nil && c.lines[k] == l {
			c.remove(l)
		}
		if l.users == 0 && c.lines[k] != l {
			c.recycle(l)
		}
	}
}

// lineSet is the lines of one request.
type lineSet map[lineKey]*line

// block returns the stored bytes of the block at l, which may lie in two lines.
func (ls lineSet) block(l loc) []byte {
	k, at := lineOf(l), l.off()%LineBytes
	if !straddles(l) {
		return ls[k].data[at : at+l.len()]
	}
	p := append(make([]byte, 0, l.len()), ls[k].data[at:]...)
	return append(p, ls[k.next()].data[:l.len()-len(p)]...)
}

// fetch returns all lines that hold the blocks of far. In m it counts those that are waited for, whoever reads them.
func (st *Store) fetch(ctx context.Context, m *meter.Volume, far []where) (lineSet, error) {
	ls := lineSet{}
	var mine []*line
	want := func(k lineKey) {
		if ls[k] == nil {
			l, fill := st.lines.get(k)
			ls[k] = l
			if fill {
				mine = append(mine, l)
			}
		}
	}
	for _, w := range far {
		want(lineOf(w.place))
		if straddles(w.place) {
			want(lineOf(w.place).next())
		}
	}
	if len(mine) == 1 {
		st.fill(ctx, m, mine[0])
	} else if len(mine) > 1 {
		var g errgroup.Group
		g.SetLimit(linesAtOnce)
		for _, l := range mine {
			g.Go(func() error { st.fill(ctx, m, l); return nil })
		}
		g.Wait()
	}
	waited := len(mine) > 0
	for k, l := range ls {
		select {
		case <-l.ready:
		default:
			waited = true
			start := m.Now()
			select {
			case <-l.ready:
				l.count(m, start)
			case <-ctx.Done():
				st.lines.done(ls)
				return nil, ctx.Err()
			}
		}
		if l.err != nil {
			err := l.err
			if ctx.Err() == nil && isContextError(err) {
				// Another reader gave up while reading it for all of us.
				p, start := make([]byte, LineBytes), m.Now()
				if err = st.opt.Segments.ReadAt(ctx, p, k.offset()); err == nil {
					m.FromShelf(start, len(p))
					own := &line{key: k, ready: l.ready, data: p, at: l.at}
					st.lines.done(lineSet{k: l})
					own.users = 1
					ls[k] = own
					continue
				}
			}
			st.lines.done(ls)
			return nil, fmt.Errorf("store: read segment %d line %d: %w", k.segment, k.line, err)
		}
	}
	if !waited {
		m.Memory.Add(1)
	}
	return ls, nil
}

// count counts a line that was waited for since start.
func (l *line) count(m *meter.Volume, start time.Duration) {
	switch {
	case l.err != nil:
	case l.hit:
		m.FromCache(start, LineBytes)
	default:
		m.FromShelf(start, LineBytes)
	}
}

// readAround reads block by block what cannot be read at once. Blocks that cannot be read are zeros in p.
func (st *Store) readAround(ctx context.Context, p []byte, off int64) error {
	for at := 0; at < len(p); at += BlockBytes {
		b := p[at : at+BlockBytes]
		if err := st.opt.Segments.ReadAt(ctx, b, off+int64(at)); errors.Is(err, target.ErrMediumRead) {
			clear(b)
		} else if err != nil {
			return err
		}
	}
	return nil
}

// fill reads a line from the flash cache or the LUN.
func (st *Store) fill(ctx context.Context, m *meter.Volume, l *line) {
	defer close(l.ready)
	p, start := st.lines.buffer(), m.Now() // lost where it is not read: who was to fill it may do so yet
	l.hit = st.opt.Cache.Read(st.uuid, l.key.segment, l.key.line, p)
	if !l.hit {
		asked := start
		start = m.Now()
		m.Miss.Add(start - asked)
		whole := true
		if l.err = st.opt.Segments.ReadAt(ctx, p, l.key.offset()); errors.Is(l.err, target.ErrMediumRead) {
			whole, l.err = false, st.readAround(ctx, p, l.key.offset())
		}
		if l.err != nil {
			return
		}
		if !whole { // what of it cannot be read fails its blocks' checksums: they are read again, and their readers told
			l.count(m, start)
			l.data = p
			return
		}
	}
	l.count(m, start)
	if !l.hit {
		st.opt.Cache.Write(st.uuid, l.key.segment, l.key.line, p)
	}
	l.data = p
	if l.hit {
		st.cacheHits.Add(1)
	} else {
		st.cacheMisses.Add(1)
	}
}

func isContextError(err error) bool {
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}
