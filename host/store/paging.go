package store

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/ledge-storage/ledge/host/meter"
	"github.com/ledge-storage/ledge/target"
	"golang.org/x/sync/errgroup"
)

// Pages of maps are stored by checkpoints, each as a block with a checksum over its address, in segments that checkpoints
// write (checkpoint.go). A page that has not changed since needs no memory for its content: it is read through the same caches
// as blocks are when somebody asks for it. At most Options.MapBytes are kept; of them at most a half may have changed, then a
// checkpoint is due.
//
// Content comes and goes with mu held. The packer alone changes pages, so what it has read of one stays true until it
// has the lock; for a reader the page may be another by then, and it looks again.

// mapUse is what the maps of a store have in common. mu guards it.
type mapUse struct {
	pages    int64 // that exist; a shared one counts once
	resident int64 // of them with their content in memory
	dirty    int64 // of them not stored as they are
	limit    int64 // of bytes
	clock    []*page
	hand     int
	// homes are the segments that pages are stored in, and how many bytes of them count.
	homes         map[uint32]*home
	hold, release func(loc) // called for each reference that a page gains or loses
}

type home struct{ live int64 }

// most is how many pages may be in memory, if it can be helped: a quarter of the limit is theirs, whatever the others take.
func (u *mapUse) most() int64 {
	return max(leastPages, max(u.limit/4, u.limit-u.pages*stubBytes)/pageBytes)
}

// made returns a new page that nothing is stored of.
func (u *mapUse) made(at *places, count uint16) *page {
	p := &page{at: at, refs: 1, count: count}
	u.adopt(p)
	return p
}

// adopt counts a page that is new here.
func (u *mapUse) adopt(p *page) {
	u.pages++
	if p.rest == 0 {
		u.dirty++
	} else {
		u.homeOf(p.rest).live += int64(p.rest.len())
	}
	if p.at != nil {
		u.resident++
		u.remember(p)
	}
}

// remember gives p to the clock. Pages that were dropped lie there until it comes by, or are too many.
func (u *mapUse) remember(p *page) {
	if int64(len(u.clock)) > 2*u.resident+1024 {
		u.clock = slices.DeleteFunc(u.clock, func(p *page) bool { return p.at == nil })
		u.hand = 0
	}
	u.clock = append(u.clock, p)
}

func (u *mapUse) homeOf(l loc) *home {
	h := u.homes[l.segment()]
	if h == nil {
		h = new(home)
		u.homes[l.segment()] = h
	}
	return h
}

// touch notes that p is about to change.
func (u *mapUse) touch(p *page) {
	if p.rest != 0 {
		u.homes[p.rest.segment()].live -= int64(p.rest.len())
		p.rest = 0
		u.dirty++
	}
}

// stored notes that p lies at l as it is.
func (u *mapUse) stored(p *page, l loc) {
	u.touch(p)
	p.rest = l
	u.dirty--
	u.homeOf(l).live += int64(l.len())
}

// drop takes one reference to p away. If it is the last, its content is in memory.
func (u *mapUse) drop(p *page) {
	if p.refs--; p.refs > 0 {
		return
	}
	for _, l := range p.at {
		if l != 0 {
			u.release(l)
		}
	}
	u.touch(p)
	p.at = nil // the clock forgets it
	u.pages--
	u.dirty--
	u.resident--
}

// install puts the content of p into memory.
func (u *mapUse) install(p *page, at *places) {
	p.at = at
	p.hot.Store(true)
	u.resident++
	u.remember(p)
}

// trim takes the content of pages away, if more have theirs in memory than may; it looks at so many of them. keep stays.
func (u *mapUse) trim(looks int, keep *page) {
	for most := u.most(); u.resident > most && looks > 0 && len(u.clock) > 0; looks-- {
		u.hand %= len(u.clock)
		p := u.clock[u.hand]
		switch {
		case p.at == nil: // dropped
		case p == keep || p.rest == 0 || p.hot.Swap(false):
			u.hand++
			continue
		default:
			p.at = nil
			u.resident--
		}
		last := len(u.clock) - 1
		u.clock[u.hand], u.clock[last] = u.clock[last], nil
		u.clock = u.clock[:last]
	}
}

// trimAtOnce is how many pages are looked at with the lock held, for each that comes.
const trimAtOnce = 64

// trimMaps takes away what is too much, pages that were read of late too, a few at a time.
func (st *Store) trimMaps() {
	st.mu.Lock()
	defer st.mu.Unlock()
	for looks := 2 * len(st.maps.clock); looks > 0 && st.maps.resident > st.maps.most(); looks -= trimRound {
		st.maps.trim(trimRound, nil)
		st.mu.Unlock()
		st.mu.Lock()
	}
}

const trimRound = 4096

// bytes is the memory that the maps take.
func (u *mapUse) bytes() int64 { return u.resident*pageBytes + u.pages*stubBytes }

// pressed: so many pages have changed that a checkpoint is due.
func (u *mapUse) pressed() bool { return u.dirty > u.most()/2 }

// A stored page: a stored block, whose codec is codecPlaces, 8 bytes for each entry, or codecRuns, shorter where blocks lie
// one behind the other.
const (
	codecPlaces = 2
	codecRuns   = 3
)

// encodePage fills dst, which has pageScratch bytes, and returns how many it used; the checksum is left to sealBlock.
func encodePage(dst []byte, at *places) int {
	if !slices.Contains(at[:], lost) {
		if b := appendRuns(dst[:blockHeader], at[:]); len(b) < blockHeader+pageBytes {
			dst[4] = codecRuns
			return len(b)
		}
	}
	dst[4] = codecPlaces
	for i, l := range at {
		le.PutUint64(dst[blockHeader+i*8:], uint64(l))
	}
	return blockHeader + pageBytes
}

const pageScratch = blockHeader + pageEntries*16

// decodePage reads the stored page p of place rest. Each segment that it names exists says exists.
func decodePage(rest loc, p []byte, exists func(uint32) bool) (*places, error) {
	if err := checkBlock(rest, p); err != nil {
		return nil, err
	}
	at, content := new(places), p[blockHeader:]
	switch p[4] {
	case codecRuns:
		d := decoder{p: content}
		d.runs(at[:])
		if d.bad || len(d.p) > 0 {
			at = nil
		}
	case codecPlaces:
		if len(content) != pageBytes {
			at = nil
			break
		}
		for i := range at {
			at[i] = loc(le.Uint64(content[i*8:]))
		}
	default:
		at = nil
	}
	if at != nil {
		for _, l := range at {
			if l != 0 && l != lost && (!l.valid() || !exists(l.segment())) {
				return nil, fmt.Errorf("page at segment %d offset %d names segment %d: %w", rest.segment(), rest.off(), l.segment(), ErrCorrupt)
			}
		}
		return at, nil
	}
	return nil, fmt.Errorf("page at segment %d offset %d: %w", rest.segment(), rest.off(), ErrCorrupt)
}

// appendRuns appends places: runs of a length·2+1 if there is something, segment, offset, lengths; of length·2 if not.
func appendRuns(b []byte, at []loc) []byte {
	for i := 0; i < len(at); {
		n := 1
		if at[i] == 0 {
			for i+n < len(at) && at[i+n] == 0 {
				n++
			}
			b = binary.AppendUvarint(b, uint64(n)<<1)
		} else {
			for i+n < len(at) && at[i+n].segment() == at[i].segment() && at[i+n].off() == at[i+n-1].off()+at[i+n-1].len() {
				n++
			}
			b = binary.AppendUvarint(b, uint64(n)<<1|1)
			b = binary.AppendUvarint(b, uint64(at[i].segment()))
			b = binary.AppendUvarint(b, uint64(at[i].off()))
			for _, l := range at[i : i+n] {
				b = binary.AppendUvarint(b, uint64(l.len()))
			}
		}
		i += n
	}
	return b
}

// runs fills at.
func (d *decoder) runs(at []loc) {
	for i := uint64(0); i < uint64(len(at)) && !d.bad; {
		run := d.limited(2*uint64(len(at)) + 1)
		n := run >> 1
		if n == 0 || n > uint64(len(at))-i {
			d.bad = true
			break
		}
		if run&1 != 0 {
			seg, off := d.limited(maxSegments-1), d.limited(SegmentBytes-1)
			for k := i; k < i+n; k++ {
				length := d.limited(blockHeader + BlockBytes)
				l := makeLoc(uint32(seg), int(off), int(length))
				if d.bad = d.bad || off >= SegmentBytes || !l.valid(); d.bad {
					break
				}
				at[k] = l
				off += length
			}
		}
		i += n
	}
}

// storedPage is a stored page, whose bytes may be wanted as they are.
func (st *Store) storedPage(ctx context.Context, m *meter.Volume, rest loc) ([]byte, error) {
	st.mu.RLock()
	if u := st.unwritten; u.number == rest.segment() {
		b := slices.Clone(u.buf[rest.off() : rest.off()+rest.len()])
		st.mu.RUnlock()
		return b, nil
	}
	st.mu.RUnlock()
	lines, err := st.fetch(ctx, m, []where{{place: rest}})
	if err != nil {
		return nil, err
	}
	b := lines.block(rest)
	if checkBlock(rest, b) == nil {
		b = slices.Clone(b)
		st.lines.done(lines)
		return b, nil
	}
	st.lines.done(lines)
	b, err = st.readStored(ctx, rest)
	if err == nil && checkBlock(rest, b) == nil {
		st.mu.Lock()
		st.counters.badLines++
		st.mu.Unlock()
		st.lines.drop(lineOf(rest))
		st.lines.drop(lineOf(rest).next())
	}
	return b, err
}

// content is that of p, whose content was not in memory when it lay at rest. stale: it has changed since.
func (st *Store) content(ctx context.Context, m *meter.Volume, p *page, rest loc) (at *places, stale bool, err error) {
	b, err := st.storedPage(ctx, m, rest)
	if errors.Is(err, target.ErrMediumRead) {
		st.mu.Lock()
		st.counters.badBlocks++
		st.mu.Unlock()
		return nil, false, fmt.Errorf("%w: %w", ErrMap, err)
	}
	if err != nil {
		return nil, false, err
	}
	at, err = decodePage(rest, b, func(n uint32) bool {
		st.mu.RLock()
		defer st.mu.RUnlock()
		return st.segs[n] != nil
	})
	st.mu.Lock()
	stale = err != nil && p.rest != rest // its place may have been freed while it was read
	switch {
	case err == nil:
		st.counters.pagesRead++
	case !stale:
		st.counters.badBlocks++
	}
	st.mu.Unlock()
	if err == nil || stale {
		return at, stale, nil
	}
	st.opt.Logger.Error("page of a map not readable", "err", err)
	return nil, false, fmt.Errorf("%w: %w: %w", ErrMap, err, target.ErrMediumRead)
}

// want brings the content of p into memory, where it is when want returns, if nobody took it away again.
func (st *Store) want(ctx context.Context, m *meter.Volume, p *page) error {
	for {
		st.mu.RLock()
		here, rest := p.at != nil || p.refs == 0, p.rest
		st.mu.RUnlock()
		if here {
			return nil
		}
		at, stale, err := st.content(ctx, m, p, rest)
		if err != nil {
			return err
		}
		if stale {
			continue
		}
		st.mu.Lock()
		if p.at == nil && p.refs > 0 && p.rest == rest {
			st.maps.install(p, at)
			st.maps.trim(trimAtOnce, p)
		}
		st.mu.Unlock()
	}
}

// lockFor returns with mu held and what absent, called with mu held, gives none of in memory. Only the packer calls it.
func (st *Store) lockFor(ctx context.Context, absent func() []*page) error {
	st.mu.Lock()
	for {
		ps := absent()
		if len(ps) == 0 {
			return nil
		}
		at := make([]*places, len(ps))
		rest := make([]loc, len(ps))
		for i, p := range ps {
			rest[i] = p.rest
		}
		st.mu.Unlock()
		g, gctx := errgroup.WithContext(ctx)
		g.SetLimit(pagesAtOnce)
		for i, p := range ps {
			g.Go(func() (err error) {
				at[i], _, err = st.content(gctx, st.unmetered, p, rest[i])
				return err
			})
		}
		if err := g.Wait(); err != nil {
			return err
		}
		st.mu.Lock()
		for i, p := range ps {
			if p.at == nil && p.refs > 0 && p.rest == rest[i] && at[i] != nil {
				st.maps.install(p, at[i])
			}
		}
	}
}

const pagesAtOnce = 16

// lockForBlock is lockFor a change of one block.
func (st *Store) lockForBlock(ctx context.Context, v *Volume, lba uint64) error {
	st.mu.Lock()
	if v.m.absent(lba) == nil {
		return nil
	}
	st.mu.Unlock()
	return st.lockFor(ctx, func() []*page {
		if p := v.m.absent(lba); p != nil {
			return []*page{p}
		}
		return nil
	})
}

// readAhead brings the pages that items will change, as many as may be in memory.
func (st *Store) readAhead(ctx context.Context, items []packItem) error {
	var ps []*page
	st.mu.RLock()
	for i := range items {
		if p := items[i].v.m.absent(items[i].lba); !items[i].skip && p != nil && (len(ps) == 0 || ps[len(ps)-1] != p) && int64(len(ps)) < st.maps.most()/4 {
			ps = append(ps, p)
		}
	}
	st.mu.RUnlock()
	return st.bring(ctx, ps)
}

// bring brings the content of pages into memory, several at once.
func (st *Store) bring(ctx context.Context, ps []*page) error {
	if len(ps) < 2 { // who changes it will
		return nil
	}
	slices.SortFunc(ps, func(a, b *page) int { return cmp.Compare(a.rest, b.rest) })
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(pagesAtOnce)
	for _, p := range ps {
		g.Go(func() error { return st.want(ctx, st.unmetered, p) })
	}
	return g.Wait()
}

// late gets a page that nobody has any more and whose content is not in memory. mu is held.
func (st *Store) late(p *page) {
	if st.corpse == nil {
		st.corpse, st.corpses = new(blockMap), 0
		st.dying = append(st.dying, st.corpse)
	}
	st.counters.latePages++
	st.corpse.put(st.corpses, p)
	st.corpses++
}

// discardSome goes on with taking apart what is dying. Only the packer calls it.
func (st *Store) discardSome(ctx context.Context) error {
	if len(st.dying) == 0 {
		return nil
	}
	st.mu.Lock()
	absent := st.discardHere()
	st.mu.Unlock()
	at := make([]*places, len(absent))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(pagesAtOnce)
	for i, p := range absent {
		g.Go(func() (err error) {
			if at[i], _, err = st.content(ctx, st.unmetered, p, p.rest); errors.Is(err, target.ErrMediumRead) {
				at[i], err = new(places), nil // what it refers to stays for good: nothing says what that is
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	for i, p := range absent {
		if p.at == nil {
			p.at = at[i]
			st.maps.resident++ // for a moment: the clock need not know
		}
	}
	if len(absent) > 0 {
		st.discardHere()
	}
	if len(st.dying) == 0 {
		st.notify()
	}
	return nil
}

// discardHere takes apart what is in memory of the first maps that are dying. mu is held.
func (st *Store) discardHere() (absent []*page) {
	for most := discardAtOnce; len(st.dying) > 0; st.dying = st.dying[1:] {
		if st.dying[0] == st.corpse {
			st.corpse = nil
		}
		if most, absent = st.dying[0].discard(&st.maps, most); most == 0 || len(absent) > 0 {
			return absent
		}
	}
	st.dying = nil
	return nil
}

// writePages stores the pages that have changed, and those of segments of which little counts any more, so that what is
// stored of maps takes not much more than twice its size. The packer calls it.
func (st *Store) writePages(ctx context.Context, w *checkpointWriter) error {
	st.pass++
	st.mu.RLock()
	again := st.worthless()
	maps := st.allMaps()
	st.mu.RUnlock()
	var changes []pageChange
	var scratch []byte
	for _, m := range maps {
		for i, n := range m.m.nodes {
			if n == nil || n.pass == st.pass { // shared ones are looked through once
				continue
			}
			n.pass = st.pass
			for from := 0; from < nodePages; from += pagesLocked {
				changes, scratch = changes[:0], scratch[:0]
				st.mu.RLock()
				m.m.eachIn(i, from, from+pagesLocked, func(_ uint64, p *page) {
					switch {
					case p.rest != 0 && !again[p.rest.segment()]:
					case p.at == nil:
						changes = append(changes, pageChange{p: p, rest: p.rest, again: true})
					default:
						at := len(scratch)
						scratch = slices.Grow(scratch, pageScratch)[:at+pageScratch]
						size := encodePage(scratch[at:], p.at)
						scratch = scratch[:at+size]
						changes = append(changes, pageChange{p: p, at: scratch[at : at+size : at+size], again: p.rest != 0})
					}
				})
				st.mu.RUnlock()
				for _, c := range changes {
					st.breathe()
					if err := st.writePage(ctx, w, c); err != nil {
						return err
					}
				}
			}
		}
	}
	st.trimMaps()
	return nil
}

// pageChange is a page to be written.
type pageChange struct {
	p     *page
	rest  loc    // where it lies as it is; 0: it is in at
	at    []byte // encoded
	again bool   // it has not changed
}

func (st *Store) writePage(ctx context.Context, w *checkpointWriter, c pageChange) error {
	if c.rest != 0 {
		var err error
		if c.at, err = st.storedPage(ctx, st.unmetered, c.rest); err == nil {
			err = checkBlock(c.rest, c.at)
		}
		if errors.Is(err, ErrCorrupt) || errors.Is(err, target.ErrMediumRead) {
			st.opt.Logger.Error("page of a map not readable; it stays where it is", "err", err)
			return nil
		}
		if err != nil {
			return err
		}
	}
	return w.page(c.p, c.at, c.again)
}

// worthless are the segments with pages of which less than half counts, as many as are worth it beside what has changed. mu is held.
func (st *Store) worthless() map[uint32]bool {
	var few []uint32
	for n, h := range st.maps.homes {
		if h.live < SegmentBytes/2 {
			few = append(few, n)
		}
	}
	slices.SortFunc(few, func(a, b uint32) int {
		return cmp.Or(cmp.Compare(st.maps.homes[a].live, st.maps.homes[b].live), cmp.Compare(a, b))
	})
	again, left := map[uint32]bool{}, max(SegmentBytes, st.maps.dirty*pageBytes)
	for _, n := range few {
		if left -= st.maps.homes[n].live; left < 0 {
			break
		}
		again[n] = true
	}
	return again
}

// namedMap is a map with the number that a checkpoint gives it: its volume's, or one from lastDying down.
type namedMap struct {
	id uint32
	m  *blockMap
	v  *Volume // nil: it is taken apart
}

const (
	lastDying = 1<<32 - 1
	mostDying = 1 << 24
)

// allMaps are the maps of all volumes, and those that are taken apart. mu is held.
func (st *Store) allMaps() (all []namedMap) {
	for id, v := range st.volumes {
		all = append(all, namedMap{id, &v.m, v})
	}
	slices.SortFunc(all, func(a, b namedMap) int { return cmp.Compare(a.id, b.id) })
	for i, m := range st.dying {
		all = append(all, namedMap{lastDying - uint32(i), m, nil})
	}
	return all
}
