package store

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"

	"github.com/ledge-storage/ledge/host/dedup"
	"github.com/ledge-storage/ledge/target"
)

// Cleaning turns segments of which little is referenced into free ones: what is referenced moves to
// segments of its own, and the next checkpoint finds the old ones without references. The maps themselves
// are looked through for references, so that counts alone never decide what is kept.
//
// It goes in rounds: victims are chosen, the maps looked through once, and what was found is moved bit by bit between the
// batches of the packer, more of it the less room is left. What is overwritten meanwhile is not moved; what comes to refer to
// a block of a victim after the look keeps the victim, and a later round finds it. A write that finds no room
// waits for the cleaner; it is refused only when a round cannot gain a segment.
//
// What is moved is older than what is written, and is overwritten later: mixed with it, both would be moved again and again.
// So it goes to segments beside the log (aside.go), whose own logs have nothing but moves. They have no place in
// the order of the log, and need none: a move changes no content and is done only where the block still lies at its old place, so
// that before or after any other entry it leaves what is read the same. At worst a replay leaves a reference to the old
// place, and that is there: victims are freed by a checkpoint, behind which nothing is replayed.

const (
	leastRound     = 4 * SegmentBytes / BlockBytes // blocks that a round may move in any case,
	mostRound      = 1 << 17                       // and at most: its lists are in memory
	mostRoom       = 64                            // segments free, below which cleaning is due: what a round may need
	roundShare     = 128                           // or this part of all mapped blocks, because a round looks through all of them
	dueOf          = 32                            // a checkpoint is due when so many times what it would write was written,
	paysOf         = 16                            // or when it frees so many times that
	deadWorthIt    = 16                            // segments without references that are worth a checkpoint
	victimPercent  = 80                            // of a segment in use, above which it is left alone while there is room
	garbagePercent = 30                            // of all segments' bytes not in use, above which cleaning is due
	moveAtOnce     = 64
	hurryBlocks    = 4096 // moved between two batches when writers wait,
	idleBlocks     = 512  // when there are none,
	paceBlocks     = 3    // and for each block that is packed
)

// round is one round of cleaning.
type round struct {
	victims []uint32
	fps     map[loc]digest
	set     map[uint32]bool // victims
	looking *look           // through the maps, still
	refs    []reference     // still to be looked at
	moved   map[loc]loc
	updated map[uint32]float64 // of victims, as of segment
	// segs is how many segments there were before.
	segs int
}

// look is where a round is in looking through the maps.
type look struct {
	maps []namedMap
	pass uint64
	node int // of the first map
}

func (c *round) over() bool { return c.looking == nil && len(c.refs) == 0 }

// maintain is called by the packer after each step, in which it packed so many blocks; 0: it had nothing else to do.
func (st *Store) maintain(ctx context.Context, packed int) error {
	if err := st.discardSome(ctx); err != nil {
		return err
	}
	st.mu.Lock()
	due := st.opt.CheckpointSegments
	if due == 0 {
		due = max(64, dueOf*st.ckptCost())
	}
	pressed := st.maps.pressed()
	busy := st.recovering || st.closed // Close gives unused segment numbers back: none may be taken behind it
	starved := st.starved()
	st.mu.Unlock()
	if busy {
		return nil
	}
	// A checkpoint seals what is open: it comes when that is nearly full, where it can wait.
	early := st.open != nil && st.open.used() < trailerOffset*7/8
	if pressed || st.sinceCkpt > due || st.sinceCkpt == due && !early {
		return st.writeCheckpoint(ctx)
	}
	if c := st.cleaning; c != nil {
		quota := paceBlocks*packed + moveAtOnce
		switch {
		case starved:
			quota = hurryBlocks
		case packed == 0:
			quota = idleBlocks
		}
		if err := st.cleanSome(ctx, c, quota); err != nil {
			return err
		}
		if c.over() {
			st.endRound(c)
		}
	}
	if st.freeable > 0 && (starved || packed == 0 && st.pays(true) || !early && st.pays(false)) {
		if err := st.writeCheckpoint(ctx); err != nil {
			return err
		}
		st.mu.Lock()
		st.fruitless = len(st.segs)+st.ckptSegments >= st.segsBefore
		st.gaveUp = st.fruitless && st.starved()
		st.notify()
		st.mu.Unlock()
		return nil
	}
	if st.cleaning != nil {
		return nil
	}
	return st.look(ctx, starved)
}

// pays: a checkpoint frees many times what it writes, or most of what is kept free; or a quarter of what it writes, when there is nothing
// else to do. It is the packer's to ask.
func (st *Store) pays(idle bool) bool {
	cost := st.ckptCost()
	least := max(cost, min(paysOf*cost, st.low()*3/4))
	if idle {
		least = cost / 4
	}
	return st.freeable >= max(least, 1)
}

// low is how many segments are to be free at least: where there are fewer, cleaning is due. mu is held, at least for reading, or it is the
// packer who asks.
func (st *Store) low() int {
	return min(max(4, int(st.opt.CapacityBytes/SegmentBytes)/24), mostRoom+2*st.ckptCost())
}

func (st *Store) allocated() int {
	st.mu.RLock()
	defer st.mu.RUnlock()
	return len(st.segs) + st.ckptSegments
}

// look begins a round where one is due.
func (st *Store) look(ctx context.Context, starved bool) error {
	st.mu.RLock()
	total := int(st.opt.CapacityBytes / SegmentBytes)
	many, ckpt := len(st.segs), st.ckptSegments
	low := st.low()
	free := total - st.taken() - st.spare - max(0, int(st.buffered/SegmentBytes)-low/2) // half of low is for what is to be packed yet
	st.mu.RUnlock()
	tight := free <= low
	every := 64
	if tight {
		every = 4 + many/4096 // to look at all segments takes a microsecond for 20 of them
	}
	if st.sinceLook++; st.sinceLook < every && !starved {
		return nil
	}
	st.sinceLook = 0
	victims, dead, garbage, found := st.survey(tight, starved, max(1, free+st.spare-2))
	st.mu.Lock()
	st.surveyed = found
	st.mu.Unlock()
	if dead >= deadWorthIt || tight && dead > 0 {
		if st.freeable == 0 {
			st.segsBefore = many + ckpt
		}
		if st.freeable = dead; starved || st.pays(false) {
			return nil
		}
	}
	wanted := starved || tight && !st.fruitless || (tight || garbage >= garbagePercent) && st.cleanAfter <= st.nextSegment
	if !wanted || len(victims) == 0 {
		st.mu.Lock()
		if st.gaveUp = starved; starved {
			st.notify()
		}
		st.mu.Unlock()
		return nil
	}
	return st.beginRound(ctx, victims)
}

// survey is what the cleaner found: bytes of blocks that are referenced, and the number of references (Store.references) then.
type survey struct{ live, references int64 }

// survey picks what to clean, emptiest first, and counts what is empty already. It measures in
// bytes against whole segments, because a segment that was sealed early wastes its rest too.
// What is moved, and the pages of maps that say so, takes room segments at most. victims is empty when cleaning them would gain nothing worth it.
func (st *Store) survey(tight, starved bool, room int) (victims []uint32, dead int, garbagePercent int64, found survey) {
	st.mu.RLock()
	inMemory := slices.Collect(maps.Keys(st.inMemory))
	st.mu.RUnlock()
	// The packer alone changes segments and what refers to them: it needs no lock to look at them, which takes a while where there are many.
	var all []candidate
	total, mapped, segments := int64(0), int64(0), int64(0)
	for n, s := range st.segs {
		if (dead+len(all))%256 == 255 {
			st.breathe()
		}
		if slices.Contains(inMemory, n) {
			found.live += min(s.live*BlockBytes, SegmentBytes)
			continue
		}
		if s.live == 0 {
			dead++
			continue
		}
		bytes := int64(s.bytes) // counts may say more where blocks are shared
		if s.slots > 0 {
			bytes = bytes * min(s.live, int64(s.slots)) / int64(s.slots)
		}
		segments++
		total += bytes
		mapped += s.live
		if !s.stuck && (tight || bytes*100 < SegmentBytes*victimPercent) {
			all = append(all, candidate{segment: n, blocks: s.live, bytes: bytes, decline: st.decline(s, bytes)})
		}
	}
	found = survey{found.live + total, st.references}
	if segments > 0 {
		garbagePercent = 100 - total*100/(segments*SegmentBytes)
	}
	most := min(max(leastRound, mapped/roundShare), mostRound)
	least := 4
	switch {
	case starved:
		least = 1
	case tight:
		least = 2 // what is open is sealed for the checkpoint: one segment may be lost by that
	}
	// choose takes the first of all that fit, in its order, and says how many segments that gains.
	choose := func(all []candidate) (good []uint32, gain int) {
		blocks, bytes := int64(0), int64(0)
		for i, c := range all {
			blocks, bytes = blocks+c.blocks, bytes+c.bytes
			changed := min(blocks, st.maps.pages) * (blockHeader + pageBytes) // of maps, at most
			if blocks > most && i > 0 || bytes+changed > int64(room)*SegmentBytes {
				break
			}
			// While there is room only what is emptier than the limit is worth it; when there is none, the first segments gained are.
			if gain >= 4 && c.bytes*100 >= SegmentBytes*victimPercent {
				break
			}
			good, gain = append(good, c.segment), i+1-int((bytes+SegmentBytes-1)/(SegmentBytes*31/32))
		}
		return good, gain
	}
	if !starved {
		// Of those that are empty enough, those that will not get much emptier soon.
		few := slices.DeleteFunc(slices.Clone(all), func(c candidate) bool { return c.bytes*100 >= SegmentBytes*victimPercent })
		slices.SortFunc(few, st.breathing(func(a, b candidate) int {
			return cmp.Or(cmp.Compare(a.decline, b.decline), cmp.Compare(a.segment, b.segment))
		}))
		if good, gain := choose(few); gain >= 4 {
			return good, dead, garbagePercent, found
		}
	}
	slices.SortFunc(all, st.breathing(func(a, b candidate) int {
		return cmp.Or(cmp.Compare(a.bytes, b.bytes), cmp.Compare(a.segment, b.segment))
	}))
	if good, gain := choose(all); gain >= least {
		return good, dead, garbagePercent, found
	}
	return nil, dead, garbagePercent, found
}

// breathing is f with breathe now and then.
func (st *Store) breathing(f func(a, b candidate) int) func(a, b candidate) int {
	n := 0
	return func(a, b candidate) int {
		if n++; n%512 == 0 {
			st.breathe()
		}
		return f(a, b)
	}
}

// candidate is a segment that may be cleaned: how many blocks in it are referenced, and their bytes.
type candidate struct {
	segment       uint32
	blocks, bytes int64
	decline       float64
}

// decline is how fast the cost of cleaning a segment falls while it waits: those are cleaned first with which waiting gains least. The emptiest
// first is best where all blocks are overwritten alike, and half as good as this where few are overwritten often: it waits for the
// cold ones for ever, which keep what little of them is free. Lomet and Luo, "Efficiently Reclaiming Space in a Log Structured Store"
// (2020), section 4, with the segment's penultimate update for an estimate of how often its blocks are overwritten. The packer's to ask.
func (st *Store) decline(s *segment, live int64) float64 {
	u := min(float64(live)/SegmentBytes, 0.999)
	return u / ((1 - u) * (1 - u) * max(1, st.clock-s.updated))
}

// reference is a block of a volume that is stored in a segment to be cleaned.
type reference struct {
	v   *Volume
	lba uint64
	at  loc
}

func (st *Store) beginRound(ctx context.Context, victims []uint32) error {
	c := &round{fps: map[loc]digest{}, moved: map[loc]loc{}, set: map[uint32]bool{}, updated: map[uint32]float64{}, segs: st.allocated()}
	for _, n := range victims {
		slots, err := st.table(ctx, n)
		st.mu.Lock()
		g := st.segs[n]
		if errors.Is(err, ErrCorrupt) || errors.Is(err, target.ErrMediumRead) {
			g.stuck = true
			st.mu.Unlock()
			st.opt.Logger.Error("segment cannot be cleaned; it is left as it is", "segment", n, "err", err)
			continue
		}
		if err != nil {
			st.mu.Unlock()
			return err // the store ends
		}
		g.victim = true
		c.updated[n] = g.updated
		st.mu.Unlock()
		c.set[n] = true
		c.victims = append(c.victims, n)
		for i := range slots {
			c.fps[makeLoc(n, int(slots[i].off), int(slots[i].len))] = slots[i].fp
		}
	}
	st.pass++
	st.mu.Lock()
	c.looking = &look{maps: st.allMaps(), pass: st.pass}
	st.cleaning, st.gaveUp = c, false
	st.mu.Unlock()
	return nil
}

// cleanSome moves blocks of the round, about so many.
func (st *Store) cleanSome(ctx context.Context, c *round, quota int) error {
	for quota > 0 && c.looking != nil {
		n, err := st.lookSome(ctx, c)
		if err != nil {
			return err
		}
		quota -= n
	}
	for quota > 0 && len(c.refs) > 0 {
		n := min(moveAtOnce, len(c.refs))
		if err := st.move(ctx, c, c.refs[:n]); err != nil {
			return err
		}
		c.refs = c.refs[n:]
		quota -= n
	}
	return nil
}

// endRound leaves it to a checkpoint to free what is empty now; where the map is large, several rounds share one.
func (st *Store) endRound(c *round) {
	st.mu.Lock()
	defer st.mu.Unlock()
	freed := 0
	for _, n := range c.victims {
		g := st.segs[n]
		if g != nil {
			g.victim = false
		}
		if g == nil || g.live == 0 { // nil: a checkpoint came before the round's end
			freed++
		}
	}
	st.counters.blocksMoved += int64(len(c.moved))
	st.cleaning = nil
	st.cleanAfter = st.nextSegment + 8 // let more be overwritten first
	if freed == 0 {
		st.fruitless = true
		st.gaveUp = st.starved() && st.freeable == 0
		st.notify()
		return
	}
	if st.freeable == 0 {
		st.segsBefore = c.segs
	}
	st.freeable += freed
}

// whereIs says where new references to the block at l are to go: to where the cleaner has moved it, once that is durable. Those
// to a victim are moved in the same round (place notes them).
func (st *Store) whereIs(l loc) loc {
	if st.cleaning == nil {
		return l
	}
	to := st.cleaning.moved[l]
	if to == 0 {
		return l
	}
	st.mu.RLock()
	defer st.mu.RUnlock()
	if st.inMemory[to.segment()] != nil || st.segs[to.segment()] == nil {
		return l
	}
	return to
}

// lookSome looks through one node of a map for blocks in the round's victims, and says what that is beside moving so many blocks. When
// all maps are done the references are sorted, within a segment as the blocks lie there. A page that several maps share is
// looked through once: a move is for all of them. One that changes behind the look keeps what it refers to; so does one of a map
// that is taken apart.
func (st *Store) lookSome(ctx context.Context, c *round) (quota int, err error) {
	k := c.looking
	if len(k.maps) == 0 {
		c.looking = nil
		slices.SortFunc(c.refs, func(a, b reference) int { // those first that are overwritten least, so that like comes to like
			if x, y := a.at.segment(), b.at.segment(); x != y && c.updated[x] != c.updated[y] {
				return cmp.Compare(c.updated[x], c.updated[y])
			}
			if a.at != b.at {
				return int(int64(a.at>>1) - int64(b.at>>1))
			}
			if a.v.id != b.v.id {
				return int(a.v.id) - int(b.v.id)
			}
			return int(int64(a.lba) - int64(b.lba))
		})
		return 1, nil
	}
	m, i := k.maps[0], k.node
	k.node++
	type far struct {
		first uint64
		p     *page
	}
	var absent []far
	look := func(first uint64, at *places) {
		for j, l := range at {
			if l != 0 && c.set[l.segment()] {
				c.refs = append(c.refs, reference{m.v, first + uint64(j), l})
			}
		}
	}
	st.mu.RLock()
	n := (*node)(nil)
	if m.v == nil || i >= len(m.m.nodes) {
		k.maps, k.node = k.maps[1:], 0
	} else if n = m.m.nodes[i]; n != nil && n.pass == k.pass {
		n = nil // it was looked through as another's
	}
	st.mu.RUnlock()
	for from := 0; n != nil && from < nodePages; from += pagesLocked {
		st.mu.RLock()
		n.pass = k.pass
		m.m.eachIn(i, from, from+pagesLocked, func(first uint64, p *page) {
			switch {
			case p.pass == k.pass:
				return
			case p.at == nil:
				absent = append(absent, far{first, p})
			default:
				look(first, p.at)
			}
			p.pass = k.pass
			quota++
		})
		st.mu.RUnlock()
		st.breathe()
	}
	slices.SortFunc(absent, func(a, b far) int { return cmp.Compare(a.p.rest, b.p.rest) })
	for _, f := range absent {
		at, _, err := st.content(ctx, st.unmetered, f.p, f.p.rest)
		if errors.Is(err, target.ErrMediumRead) {
			continue // what it refers to stays
		}
		if err != nil {
			return 0, err
		}
		look(f.first, at)
	}
	return quota/64 + len(absent) + 1, nil
}

// move stores the blocks of refs again, each once, and points their maps there.
func (st *Store) move(ctx context.Context, c *round, refs []reference) error {
	// What was overwritten since the maps were looked through is left alone.
	st.mu.RLock()
	refs = slices.DeleteFunc(slices.Clone(refs), func(r reference) bool {
		if s := st.segs[r.at.segment()]; s != nil && s.stuck { // it stays, so that nothing is gained by moving more of it
			return true
		}
		return r.v.m.absent(r.lba) == nil && r.v.m.get(r.lba) != r.at
	})
	for _, r := range refs {
		if to := c.moved[r.at]; to != 0 && st.segs[to.segment()] == nil {
			delete(c.moved, r.at) // nobody used it, and a checkpoint freed it
		}
	}
	st.mu.RUnlock()
	var far []where
	for _, r := range refs {
		if c.moved[r.at] == 0 {
			far = append(far, where{place: r.at})
		}
	}
	lines, err := st.fetch(ctx, st.unmetered, far)
	if err != nil {
		return err
	}
	defer st.lines.done(lines)
	for _, r := range refs {
		st.breathe()
		if err := st.lockForBlock(ctx, r.v, r.lba); err != nil {
			return err
		}
		there := r.v.m.get(r.lba) == r.at
		st.mu.Unlock()
		if !there {
			continue
		}
		to := c.moved[r.at]
		var stored []byte
		if to == 0 {
			fp, known := c.fps[r.at]
			stored = lines.block(r.at)
			bad := checkBlock(r.at, stored)
			if bad != nil {
				if stored, bad = st.readStored(ctx, r.at); bad == nil {
					bad = checkBlock(r.at, stored)
				} else if !errors.Is(bad, target.ErrMediumRead) {
					return bad
				}
			}
			if bad != nil || !known {
				st.opt.Logger.Error("block cannot be moved", "volume", r.v.name, "block", r.lba, "err", bad)
				st.mu.Lock()
				st.segs[r.at.segment()].stuck = true
				st.mu.Unlock()
				continue // it stays, and so does its segment: a reader will be told
			}
			if err := st.roomAside(ctx, len(stored), 64); err != nil {
				return err
			}
			st.mu.Lock()
			to = st.aside.append(stored, fp, c.updated[r.at.segment()])
			st.charge(st.aside.info, r.v, len(stored)+slotBytes, 1)
			st.mu.Unlock()
			c.moved[r.at] = to
		} else if err := st.roomAside(ctx, 0, 64); err != nil {
			return err
		}
		if err := st.lockForBlock(ctx, r.v, r.lba); err != nil {
			return err
		}
		st.aside.log.move(r.v.id, r.lba, r.at, to)
		st.charge(st.aside.info, r.v, costMove, 0)
		r.v.m.move(&st.maps, r.lba, r.at, to)
		st.mu.Unlock()
	}
	return nil
}

// warmTimes is of how many times the blocks that the index has room for it gets a sample, when it is filled.
const warmTimes = 8

// warm enters the blocks of the given segments into the index, newest first.
func (st *Store) warm(x *dedup.Index, numbers []uint32) {
	slices.SortFunc(numbers, func(a, b uint32) int { return int(b) - int(a) })
	room := warmTimes * x.Bytes() / 8
	for _, n := range numbers {
		if room <= 0 || st.index.Load() != x {
			return
		}
		if !st.usable(n) {
			continue
		}
		_, slots, _, err := st.readTable(st.ctx, n)
		if st.ctx.Err() != nil {
			return
		}
		if err != nil {
			st.opt.Logger.Warn("segment not in the index", "segment", n, "err", err)
			continue
		}
		for i := range slots {
			hint := slots[i].fp.fingerprint()
			x.Hint(&hint, dedup.Ref{Segment: n, Slot: uint16(i)})
		}
		room -= int64(len(slots))
	}
}
