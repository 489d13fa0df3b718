package store

import (
	"context"
	"errors"
	"slices"
	"sync"

	"github.com/ledge-storage/ledge/target"
	"golang.org/x/sync/errgroup"
)

// A page of a map that the shelf cannot give back stops the store when it is to be changed, because its drives may come back, and
// what it says with them. Where they will not, an operator gives such pages up (Options.AcceptLost): nothing is known of their
// blocks any more. Each of them is an error for who reads it, until it is written or unmapped. All other blocks are what they were.
//
// So it is with a piece of the journal. Given up, it is where the journal ends: all volumes are as they were at one moment, and what was acknowledged
// later and was in no segment yet is gone. What lies behind it is not looked for: the blocks that volumes wrote are there, too, and
// what they hold must not be taken for a record.

// lost is the place of a block of which nothing is known any more. It refers to no segment. In a stored page it is what any other
// place is; an agent that does not know it takes the page for damaged.
const lost loc = 1

// GivenUp are blocks that Open gave up, or the end of the journal.
type GivenUp struct {
	Volume, Snapshot string // Snapshot: "" for those of the volume itself
	OffsetBytes      int64  // within it
	Bytes            int64  // some of them may never have been written
	Journal          bool   // the writes acknowledged last, of all volumes; nothing else is set
}

// gaveUpJournal notes that the journal ends before record seq.
func (st *Store) gaveUpJournal(seq uint64) {
	st.givenUp = append(st.givenUp, GivenUp{Journal: true})
	st.opt.Logger.Error("the end of the journal is given up: the writes acknowledged last, of all volumes, are gone", "from_record", seq, "in_segments_to", st.packed.seq)
}

// giveUp looks through all maps and gives up the pages that cannot be read. What the others refer to is counted anew, so that segments
// to which only those referred become free. It is for Open, before anything changes.
func (st *Store) giveUp(ctx context.Context) error {
	st.pass++
	maps := st.allMaps()
	var mu sync.Mutex // guards what the goroutines find
	bad, live := map[*page]bool{}, map[uint32]int64{}
	count := func(at *places) {
		mu.Lock()
		defer mu.Unlock()
		for _, l := range at {
			if l != 0 && l != lost {
				live[l.segment()]++
			}
		}
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(pagesAtOnce)
	for _, m := range maps {
		m.m.each(func(_ uint64, p *page) {
			if p.pass == st.pass {
				return
			}
			p.pass = st.pass
			if p.at != nil {
				count(p.at)
				return
			}
			g.Go(func() error {
				at, _, err := st.content(gctx, st.unmetered, p, p.rest)
				if errors.Is(err, target.ErrMediumRead) {
					mu.Lock()
					defer mu.Unlock()
					bad[p] = true
					return nil
				}
				if err == nil {
					count(at)
				}
				return err
			})
		})
	}
	if err := g.Wait(); err != nil || len(bad) == 0 {
		return err
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	for _, m := range maps {
		if m.v == nil { // it is taken apart, and needs no content for that
			continue
		}
		m.m.each(func(first uint64, p *page) {
			if !bad[p] {
				return
			}
			m.m.mapped += pageEntries - int64(p.count)
			size := m.v.size
			from := min(int64(first)*BlockBytes, size)
			st.gaveUpPage(m.v, from, min(from+pageEntries*BlockBytes, size))
		})
	}
	for p := range bad {
		at := new(places)
		for i := range at {
			at[i] = lost
		}
		st.maps.touch(p)
		st.maps.install(p, at)
		p.count = pageEntries
	}
	for n, s := range st.segs {
		s.live = live[n]
	}
	for _, x := range st.givenUp { // all are blocks so far
		st.opt.Logger.Error("blocks are given up: the map does not know them any more", "volume", x.Volume, "snapshot", x.Snapshot, "offset", x.OffsetBytes, "bytes", x.Bytes)
	}
	return nil
}

// gaveUpPage notes bytes from to to of v. mu is held.
func (st *Store) gaveUpPage(v *Volume, from, to int64) {
	x := GivenUp{Volume: v.name, OffsetBytes: from, Bytes: to - from}
	if v.snapshot {
		x.Volume, x.Snapshot = st.volumes[v.from].name, v.name
	}
	if x.Bytes <= 0 { // behind its end
		return
	}
	if n := len(st.givenUp); n > 0 {
		if l := &st.givenUp[n-1]; l.Volume == x.Volume && l.Snapshot == x.Snapshot && l.OffsetBytes+l.Bytes == x.OffsetBytes {
			l.Bytes += x.Bytes
			return
		}
	}
	st.givenUp = append(st.givenUp, x)
}

// GivenUp returns what the opening gave up, in the order of volumes and blocks.
func (st *Store) GivenUp() []GivenUp {
	st.mu.RLock()
	defer st.mu.RUnlock()
	return slices.Clone(st.givenUp)
}
