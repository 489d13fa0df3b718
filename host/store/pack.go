package store

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"time"

	"github.com/ledge-storage/ledge/host/dedup"
	"github.com/ledge-storage/ledge/target"
)

// The packer is one goroutine. It takes durable batches in the log's order, fingerprints and
// compresses their blocks on Options.Workers cores, and applies them, still in order, to the open
// segment, its log, and the map at once: a block of an open segment is read from memory. It alone
// changes maps, allocates segments, cleans and checkpoints, so none of these can meet
// another halfway.
//
// Replay (recover.go) applies the logs of segments by the same functions; the conditions that
// they test (logMove) have the same outcome, because the map they test has had the same past.

// builder is a segment being filled, sealed and waiting, or being written.
type builder struct {
	number, prev uint32
	aside        bool     // not of the log, and covers nothing of the journal: see aside.go
	needs        []uint32 // of the log: segments beside it that it refers to, and that were not durable then
	keeps        bool     // aside: what the journal holds from since on waits for it
	since        uint64
	buf          []byte // SegmentBytes
	fill         int    // bytes of blocks
	slots        []slot
	log          logWriter
	cover        position
	info         *segment
}

var segmentBuffers = sync.Pool{New: func() any { return make([]byte, SegmentBytes) }}

// fits says whether blocks of n bytes and an entry of the log have room.
func (b *builder) fits(n, entry int) bool {
	return len(b.slots) < maxSlots && b.used()+n+slotBytes+entry+64 <= trailerOffset
}

// used is what of the segment is in use, without the trailer.
func (b *builder) used() int { return b.fill + len(b.slots)*slotBytes + b.log.bytes() }

// packLoop is the packer.
func (st *Store) packLoop() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for st.ctx.Err() == nil {
		st.breathe()
		st.mu.Lock()
		var b *batch
		if len(st.queue) > 0 {
			b = st.queue[0]
			if wait := st.mayWait(b); wait > 0 {
				b = nil
				timer.Reset(wait)
			}
		}
		call := st.needed
		pressed := st.head-st.handed > st.ringSize/2
		behind := st.aside != nil && st.aside.keeps && st.head-st.aside.since > min(st.ringSize/2, asideKeeps+uint64(st.opt.BufferBytes))
		idle := len(st.queue) == 0 // what waits to be packed sets the cleaner's pace when it is
		more := !st.recovering && !st.closed && (idle && (st.cleaning != nil || st.pays(true)) || st.starved() && !st.gaveUp) || len(st.dying) > 0
		st.mu.Unlock()
		var err error
		packed := 0
		switch {
		case b != nil:
			packed = max(1, b.payload/BlockBytes)
			err = st.packBatch(st.ctx, b)
			if err == nil && pressed {
				err = st.sealOpen(st.ctx)
			}
			if err == nil && behind {
				err = st.sealInTime(st.ctx)
			}
		case call != nil:
			err = st.writeCheckpoint(st.ctx)
			st.mu.Lock()
			st.needed = nil
			call.err = err
			st.notify()
			st.mu.Unlock()
		case pressed && st.open != nil:
			err = st.sealOpen(st.ctx)
		case behind:
			err = st.sealInTime(st.ctx)
		case more: // maintain goes on with it
		default:
			select {
			case <-st.wake:
			case <-timer.C:
			case <-st.ctx.Done():
			}
			continue
		}
		if err == nil {
			err = st.maintain(st.ctx, packed)
		}
		if err != nil {
			st.fail(fmt.Errorf("store: pack: %w", err))
			return
		}
	}
}

// mayWait says how long the first batch of the queue can still wait for its blocks to be overwritten. mu is held.
func (st *Store) mayWait(b *batch) time.Duration {
	if st.recovering || st.closed || st.needed != nil || b.seq < st.packTo || st.short() ||
		st.buffered >= min(st.opt.BufferBytes/2, st.opt.BufferBytes-int64(st.opt.RecordBytes)) || st.head-st.handed > st.ringSize/4 {
		return 0
	}
	return st.opt.PackDelay - time.Since(b.since)
}

// breathe is called by the packer after some ten microseconds' work at most. It lets those run first who have something to do for a request
// that is waited for: the runtime would not interrupt it for milliseconds, and several goroutines take part in a write one after the other.
func (st *Store) breathe() {
	if st.breaths++; st.breaths%8 > 0 {
		return
	}
	if now := time.Now(); now.Sub(st.breathed) > breath {
		runtime.Gosched()
		st.breathed = now
	}
}

// breath is how long the packer goes on without asking whether others want to run, which may wake another processor.
const breath = 100 * time.Microsecond

// packItem is a block of a batch on its way into a segment.
type packItem struct {
	v      *Volume
	lba    uint64
	unit   uint64
	data   []byte
	codec  Compression
	skip   bool // overwritten by what is durable too
	place  loc  // of a duplicate
	same   int  // index+1 of an equal block before it in the batch
	stored []byte
	// Of what is stored: an estimate of when the block was overwritten the last time but one, by Store.clock; and whether it is to lie beside the log.
	updated float64
	aside   bool
}

// packBatch puts one record's entries into the log of segments and into the map.
func (st *Store) packBatch(ctx context.Context, b *batch) error {
	items := st.gather(b)
	fps := st.fingerprint(items)
	if err := st.findDuplicates(ctx, items, fps); err != nil {
		return err
	}
	st.compress(items)
	if err := st.readAhead(ctx, items); err != nil {
		return err
	}
	next, unit, absorbed := 0, b.base, int64(0)
	for i := range b.ops {
		o, v := &b.ops[i], b.vols[i]
		if o.kind == opWrite {
			for range o.count {
				if it := &items[next]; it.skip {
					absorbed++
				} else {
					st.breathe()
					if err := st.place(ctx, items, it, fps, next, position{b.seq, unit}); err != nil {
						return err
					}
				}
				st.settle(v, &items[next], b)
				next++
				unit++
			}
			continue
		}
		if err := st.roomFor(ctx, 0, 64+len(o.data), position{b.seq, unit}); err != nil {
			return err
		}
		absent := func() []*page { return nil }
		if o.kind == opZero {
			absent = func() []*page { return v.m.edges(o.lba, o.count) }
		}
		if err := st.lockFor(ctx, absent); err != nil {
			return err
		}
		st.applyOp(v, o, b, unit)
		st.mu.Unlock()
		unit++
	}
	st.mu.Lock()
	st.queue = st.queue[1:]
	st.packed = position{b.seq + 1, 0}
	st.buffered -= b.memory
	st.counters.absorbed += absorbed
	st.maps.trim(trimAtOnce+2*len(items), nil)
	if st.open == nil && !st.logInMemory() && len(st.awaiting) == 0 {
		st.sealedTo = st.packed // nothing of it was worth a segment
	}
	st.notify()
	st.mu.Unlock()
	return nil
}

// gather lists the blocks of b, marking those that a durable write has overwritten since. (One
// that is not durable may be lost, and then the older block must be there; and so it must where the volume is copied
// between the two.)
func (st *Store) gather(b *batch) []packItem {
	items := make([]packItem, 0, b.payload/BlockBytes)
	st.mu.RLock()
	defer st.mu.RUnlock()
	unit := b.base
	for i := range b.ops {
		o := &b.ops[i]
		if o.kind != opWrite {
			unit++
			continue
		}
		for k := range o.count {
			it := packItem{v: b.vols[i], lba: o.lba + k, unit: unit, data: o.data[k*BlockBytes : (k+1)*BlockBytes], codec: b.vols[i].compression}
			if p := it.v.newest(it.lba); p != nil && it.v.copying == 0 && p.b.durable && (p.b != b || p.unit != unit) {
				it.skip = true
			}
			items = append(items, it)
			unit++
		}
	}
	return items
}

// parallel calls f for parts of 0…n-1 on the workers, and returns when all are done.
func (st *Store) parallel(n int, f func(lo, hi int)) {
	workers := min(st.opt.Workers, (n+15)/16)
	if workers <= 1 {
		f(0, n)
		return
	}
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() { f(w*n/workers, (w+1)*n/workers) })
	}
	wg.Wait()
}

func (st *Store) fingerprint(items []packItem) []dedup.Fingerprint {
	fps := make([]dedup.Fingerprint, len(items))
	blocks := make([][]byte, len(items))
	for i := range items {
		blocks[i] = items[i].data
	}
	st.parallel(len(items), func(lo, hi int) { st.hasher.Sum(fps[lo:hi], blocks[lo:hi]) })
	return fps
}

// findDuplicates looks every block up, in the batch and in the index, and verifies each hit of
// the index against the fingerprint in the segment's table. What an index that has forgotten does not know is
// looked up in the tables of segments that had hits lately, this batch's among them: duplicates come in runs.
func (st *Store) findDuplicates(ctx context.Context, items []packItem, fps []dedup.Fingerprint) error {
	seen := make(map[dedup.Fingerprint]int, len(items))
	index := st.index.Load()
	var unknown []int
	for i := range items {
		if items[i].skip {
			continue
		}
		if first, ok := seen[fps[i]]; ok {
			items[i].same = first + 1
			continue
		}
		seen[fps[i]] = i
		ref, ok := index.Lookup(&fps[i])
		if !ok || !st.usable(ref.Segment) {
			unknown = append(unknown, i)
			continue
		}
		slots, err := st.table(ctx, ref.Segment)
		if err != nil {
			if ctx.Err() != nil {
				return err
			}
			// The block is at hand: storing it again is safer than depending on a table
			// that could not be read.
			if errors.Is(err, ErrCorrupt) || errors.Is(err, target.ErrMediumRead) { // nor will it be tried for each block
				st.mu.Lock()
				st.segs[ref.Segment].stuck = true
				st.mu.Unlock()
			}
			st.opt.Logger.Warn("table not readable; storing a block again", "segment", ref.Segment, "err", err)
			continue
		}
		if int(ref.Slot) < len(slots) && slots[ref.Slot].fp == shorten(&fps[i]) {
			s := &slots[ref.Slot]
			items[i].place = st.whereIs(makeLoc(ref.Segment, int(s.off), int(s.len)))
			st.near.hit(ref.Segment, slots)
		} else {
			unknown = append(unknown, i)
		}
	}
	if !index.Forgot() {
		return nil
	}
	for _, i := range unknown {
		d := shorten(&fps[i])
		if at := st.near.find(&d, st.usable); at != 0 {
			items[i].place = st.whereIs(at)
			st.mu.Lock()
			st.counters.beside++
			st.mu.Unlock()
		}
	}
	return nil
}

// usable says whether new references to segment n may be made.
func (st *Store) usable(n uint32) bool {
	st.mu.RLock()
	defer st.mu.RUnlock()
	s := st.segs[n]
	return s != nil && !s.condemned && !s.stuck
}

// compress fills stored of those that are to be stored, until the next call.
func (st *Store) compress(items []packItem) {
	if n := len(items) * encodeScratch; n > len(st.slab) {
		st.slab = make([]byte, n)
	}
	st.parallel(len(items), func(lo, hi int) {
		rest := st.slab[lo*encodeScratch : hi*encodeScratch]
		for i := lo; i < hi; i++ {
			if it := &items[i]; !it.skip && it.place == 0 && it.same == 0 {
				n := encodeBlock(rest[:encodeScratch:encodeScratch], it.data, it.codec)
				it.stored, rest = rest[:n:n], rest[n:]
			}
		}
	})
}

// place stores item number i, or refers to where it is stored. before is the item's position.
func (st *Store) place(ctx context.Context, items []packItem, it *packItem, fps []dedup.Fingerprint, i int, before position) error {
	if it.same > 0 {
		it.place = items[it.same-1].place
	}
	if err := st.roomFor(ctx, len(it.stored), 64, before); err != nil {
		return err
	}
	if err := st.lockToPlace(ctx, it); err != nil {
		return err
	}
	defer st.mu.Unlock()
	b := st.open
	if it.stored == nil {
		st.need(b, it.place.segment())
		b.log.ref(it.v.id, it.lba, it.place)
		st.charge(b.info, it.v, costRef, 0)
		st.counters.duplicates++
		it.v.Meter().Duplicates.Add(1)
		if c := st.cleaning; c != nil && st.segs[it.place.segment()].victim {
			c.refs = append(c.refs, reference{it.v, it.lba, it.place})
		}
	} else {
		in := b
		if it.aside {
			if in = st.aside; !in.keeps {
				in.keeps, in.since = true, st.handed
			}
			st.counters.aside++
		}
		it.place = in.append(it.stored, shorten(&fps[i]), it.updated)
		if it.aside {
			st.need(b, in.number)
			b.log.put(it.v.id, it.lba, it.place)
			st.charge(b.info, it.v, costRef, 0)
		} else {
			b.log.store(it.v.id, it.lba, it.place)
		}
		st.index.Load().Insert(&fps[i], dedup.Ref{Segment: in.number, Slot: uint16(len(in.slots) - 1)})
		st.charge(in.info, it.v, len(it.stored)+slotBytes, 1)
		st.counters.uniques++
		it.v.Meter().Uniques.Add(1)
		it.v.Meter().StoredBytes.Add(uint64(len(it.stored)))
	}
	st.point(it.v, it.lba, it.place)
	st.clock++
	it.stored = nil
	return nil
}

// append puts a stored block behind the last one, and says where. updated is the estimate of its last update but one.
func (b *builder) append(stored []byte, fp digest, updated float64) loc {
	copy(b.buf[b.fill:], stored)
	sealBlock(b.number, b.fill, b.buf[b.fill:b.fill+len(stored)])
	l := makeLoc(b.number, b.fill, len(stored))
	b.slots = append(b.slots, slot{fp: fp, off: uint32(b.fill), len: uint16(len(stored))})
	b.fill += len(stored)
	b.info.slots++
	b.info.updated += (updated - b.info.updated) / float64(b.info.slots)
	return l
}

// What entries of the log are charged to volumes: about what they take, and the same in replay.
const (
	costRef  = 3
	costMove = 24
	costElse = 8
)

// charge books n bytes and slots of a segment to v. mu is held.
func (st *Store) charge(s *segment, v *Volume, n, slots int) {
	st.chargeShare(s, v, n, slots)
	s.bytes += uint32(n) // until it is sealed, and known exactly
}

func (st *Store) chargeShare(s *segment, v *Volume, n, slots int) {
	sh := s.share(v.id)
	sh.bytes += uint32(n)
	sh.slots += uint32(slots)
	v.bytes += int64(n)
	v.slots += int64(slots)
}

// point makes l the place of a block. mu is held.
func (st *Store) point(v *Volume, lba uint64, l loc) { v.m.set(&st.maps, lba, l) }

// hold and release count the references of pages to segments. mu is held.
func (st *Store) hold(l loc) {
	if l == lost {
		return
	}
	st.references++
	if s := st.segs[l.segment()]; s != nil {
		s.live++
	}
}

func (st *Store) release(l loc) {
	if l == lost {
		return
	}
	st.references--
	if s := st.segs[l.segment()]; s != nil {
		s.live--
	}
}

// settle ends the pending life of a block that is in the map now, or was overwritten.
func (st *Store) settle(v *Volume, it *packItem, b *batch) {
	st.mu.Lock()
	if p := v.dirty[it.lba]; p != nil && p.b == b && p.unit == it.unit {
		delete(v.dirty, it.lba)
	}
	st.mu.Unlock()
	it.data = nil
}

// applyOp puts an op that is not opWrite into the segment's log and the map. mu is held.
func (st *Store) applyOp(v *Volume, o *op, b *batch, unit uint64) {
	l := &st.open.log
	switch o.kind {
	case opZero:
		l.zero(v.id, o.lba, o.count)
		v.m.zero(&st.maps, o.lba, o.count, st.late)
		if o.count <= smallZero {
			for lba := o.lba; lba < o.lba+o.count; lba++ {
				if p := v.dirty[lba]; p != nil && p.b == b && p.unit == unit {
					delete(v.dirty, lba)
				}
			}
			break
		}
		for i, z := range v.zeros {
			if z.b == b && z.unit == unit {
				v.zeros = append(v.zeros[:i], v.zeros[i+1:]...)
				st.zeroRanges--
				break
			}
		}
	case opCreate:
		l.volume(logCreate, v.id, 0, v.describe())
		v.created = true
	case opDelete:
		l.volume(logDelete, v.id, 0, nil)
		st.applyDelete(v)
	case opResize:
		l.volume(logResize, v.id, o.lba, nil)
		v.applied = int64(o.lba)
	case opCopy:
		src := st.volumes[uint32(o.lba)]
		v.applied = src.applied
		l.volume(logCopy, v.id, o.lba, v.describe())
		v.m, v.created = src.m.share(), true
		v.replacing--
		src.copying--
	case opRollback:
		src := st.volumes[uint32(o.lba)]
		l.volume(logRollback, v.id, o.lba, nil)
		st.applyRollback(v, src)
		v.replacing--
		src.copying--
	case opDescribe:
		d, _ := parseDescription(o.data) // it was checked when it came
		v.appliedFrom, v.appliedName, v.appliedCompression = d.from, d.name, d.compression
		l.volume(logDescribe, v.id, 0, v.describe())
	}
	st.charge(st.open.info, v, costElse, 0)
}

func (st *Store) applyRollback(v, src *Volume) {
	st.discard(v.m)
	v.m, v.applied = src.m.share(), src.applied
}

// discardAtOnce is how many pages are taken apart with the lock held: a few milliseconds.
const discardAtOnce = 128

// discard takes a map apart that is no volume's any more: the first pages now, the others little by little. mu is held.
func (st *Store) discard(m blockMap) {
	st.dying = append(st.dying, &m)
	st.discardHere()
}

func (st *Store) applyDelete(v *Volume) {
	st.discard(v.m)
	st.zeroRanges -= len(v.zeros)
	v.m, v.dirty, v.zeros = blockMap{}, map[uint64]*pending{}, nil
	v.created, v.deleted = false, true
	delete(st.volumes, v.id)
}

// roomFor makes sure that the open segment takes n bytes of block and entry bytes of log, sealing
// it and opening the next if not. before is the position that is not yet in it.
func (st *Store) roomFor(ctx context.Context, n, entry int, before position) error {
	if st.open != nil && st.open.fits(n, entry) {
		return nil
	}
	if st.open != nil {
		st.open.cover = before
		if err := st.seal(ctx); err != nil {
			return err
		}
	}
	b, err := st.begin(ctx)
	if err != nil {
		return err
	}
	b.prev, st.lastSegment, st.open = st.lastSegment, b.number, b
	return nil
}

// begin opens a segment.
func (st *Store) begin(ctx context.Context) (*builder, error) {
	number, err := st.allocate(ctx)
	if err != nil {
		return nil, err
	}
	b := &builder{number: number, buf: segmentBuffers.Get().([]byte), info: &segment{bytes: BlockBytes}}
	clear(b.buf)
	st.mu.Lock()
	st.segs[number], st.inMemory[number] = b.info, b
	st.mu.Unlock()
	return b, nil
}

// logInMemory: a segment of the log is open or on its way. mu is held.
func (st *Store) logInMemory() bool {
	for _, b := range st.inMemory {
		if !b.aside {
			return true
		}
	}
	return false
}

// allocate takes the next segment number, reserving more of them on the journal LUN as needed.
func (st *Store) allocate(ctx context.Context) (uint32, error) {
	n := st.nextSegment
	if n >= st.numbers {
		return 0, fmt.Errorf("segment number %d: the segment LUN's numbers are used up: %w", n, target.ErrNoSpace)
	}
	if n >= st.reserved {
		reserve := min(n+st.step, st.numbers)
		if err := st.writeSuper(ctx, func(s *superblock) { s.reserved = reserve }); err != nil {
			return 0, err
		}
		st.reserved = reserve
	}
	st.mu.Lock()
	st.nextSegment++
	st.mu.Unlock()
	return n, nil
}
