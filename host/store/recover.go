package store

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/ledge-storage/ledge/host/dedup"
	"github.com/ledge-storage/ledge/target"
)

// Recovery, on any host, in this order:
//
//  1. the superblock with a new epoch and fresh segment numbers: an old host that still runs meets
//     the epoch at its next superblock, and its late segment writes hit numbers that are not used;
//  2. the checkpoint;
//  3. the data segments written after it, in the log's order: each names its predecessor, and the
//     first that is missing or torn, or that refers to one that is, ends the log;
//  4. the records from the superblock's place on that are in no segment, up to the first that is missing;
//  5. all that was found is packed and a checkpoint written. Only then does the ring begin anew, behind
//     where writes of the dead host may still land, and only with records of the new epoch.
//
// A crash at any point repeats this from the same superblock contents, or finds them complete.
func (st *Store) recover(ctx context.Context) error {
	began := time.Now()
	old := st.super
	st.numbers = uint32(min(st.opt.Segments.Size()/SegmentBytes, maxSegments))
	st.step = max(4, min(reserveStep, st.numbers/1024))
	reserve := max(old.reserved, min(old.reserved+st.step, st.numbers))
	if err := st.writeSuper(ctx, func(s *superblock) { s.epoch++; s.reserved = reserve }); err != nil {
		return err
	}
	st.epoch, st.reserved, st.nextSegment, st.recovering = old.epoch+1, reserve, old.reserved, true
	if err := st.loadCheckpoint(ctx, &old); err != nil {
		return err
	}
	if st.opt.AcceptLost {
		if err := st.giveUp(ctx); err != nil {
			return fmt.Errorf("store: give up what is lost: %w", err)
		}
	}
	loaded := time.Now()
	behind := max(old.ckptFrom+old.ckptSegs+old.ckptCopy, 1) // the checkpoint
	applied, err := st.replaySegments(ctx, behind, old.reserved)
	if err != nil {
		return err
	}
	segments := time.Now()
	if err := st.replayJournal(ctx, &old); err != nil {
		return err
	}
	journal := time.Now()
	records := len(st.queue)
	replayed := applied > 0 || len(st.queue) > 0 // asked before the packer takes from the queue
	st.wg.Go(st.packLoop)
	st.wg.Go(st.sealLoop)
	if replayed || len(st.givenUp) > 0 || st.counters.copiesRead > 0 {
		err = st.checkpoint(ctx, false)
	} else {
		if err = st.writeSuper(ctx, func(s *superblock) { st.journalStart(s) }); err == nil {
			err = st.free(ctx, st.condemned)
		}
		st.condemned = nil
	}
	if err != nil {
		return fmt.Errorf("store: recover: %w", err)
	}
	st.mu.Lock()
	st.recovering = false
	st.mu.Unlock()
	st.wg.Go(st.journalLoop)
	st.wg.Go(st.warmIndex)
	st.opt.Logger.Debug("recovered", "checkpoint", loaded.Sub(began), "segments", segments.Sub(loaded), "applied", applied, "journal", journal.Sub(segments), "records", records,
		"packed", time.Since(journal), "looked", old.reserved-behind)
	return nil
}

// loadCheckpoint makes the checkpoint that the superblock names the state.
func (st *Store) loadCheckpoint(ctx context.Context, s *superblock) error {
	got, err := st.readItems(ctx, s, s.ckptFrom, s.ckptSegs)
	if s.ckptCopy > 0 && (errors.Is(err, ErrCorrupt) || errors.Is(err, target.ErrMediumRead)) {
		st.opt.Logger.Error("the checkpoint cannot be read; taking its second copy", "err", err)
		again, bad := st.readItems(ctx, s, s.ckptFrom+s.ckptSegs, s.ckptCopy)
		if bad == nil {
			got, err = again, nil
			st.counters.copiesRead++
		}
	}
	if err != nil {
		return err
	}
	st.volumes, st.segs = got.volumes, got.segs
	st.nextVol, st.lastSegment, st.packed, st.sealedTo, st.condemned = got.nextVol, got.lastSegment, got.cover, got.cover, got.free
	st.logTo = st.lastSegment
	st.ckptID, st.ckptFirst, st.ckptItems, st.ckptCopies = s.ckptID, s.ckptFrom, int(s.ckptSegs), int(s.ckptCopy)
	for _, id := range slices.Sorted(maps.Keys(got.dying)) {
		st.dying = append(st.dying, got.dying[id])
	}
	for _, v := range st.volumes {
		v.st = st
		st.list(v)
	}
	st.pass++
	for _, m := range st.allMaps() {
		var missing uint32
		m.m.each(func(_ uint64, p *page) {
			if p.pass == st.pass {
				return
			}
			p.pass = st.pass
			st.maps.adopt(p)
			if p.at == nil {
				if p.rest.segment() >= s.ckptFrom+s.ckptSegs || st.segs[p.rest.segment()] != nil {
					missing = p.rest.segment()
				}
				return
			}
			for _, l := range p.at { // of version 2
				if l == 0 {
					continue
				}
				if g := st.segs[l.segment()]; g != nil {
					g.live++
				} else {
					missing = l.segment()
				}
			}
		})
		if missing != 0 {
			return fmt.Errorf("store: map %d names segment %d, which is none of its kind: %w", m.id, missing, ErrCorrupt)
		}
	}
	st.countHomes()
	for _, g := range st.segs {
		for _, sh := range g.shares {
			if v := st.volumes[sh.vol]; v != nil {
				v.slots += int64(sh.slots)
				v.bytes += int64(sh.bytes)
			}
		}
	}
	return nil
}

// readItems reads what the segments from number from on say of the checkpoint.
func (st *Store) readItems(ctx context.Context, s *superblock, from, segments uint32) (got state, err error) {
	got = state{nextVol: 1, volumes: map[uint32]*Volume{}, segs: map[uint32]*segment{}}
	buf := make([]byte, SegmentBytes)
	for i := range segments {
		n := from + i
		if err := st.opt.Segments.ReadAt(ctx, buf[trailerOffset:], int64(n)*SegmentBytes+trailerOffset); err != nil {
			return got, fmt.Errorf("store: read checkpoint segment %d: %w", n, err)
		}
		t, err := st.checkTrailer(n, buf[trailerOffset:])
		if err != nil {
			return got, err
		}
		if t.kind != kindCheckpoint || t.ckptID != s.ckptID || t.index != i {
			return got, fmt.Errorf("store: segment %d is not part %d of checkpoint %d: %w", n, i, s.ckptID, ErrCorrupt)
		}
		if from := int(t.items) / BlockBytes * BlockBytes; t.payload > t.items { // its pages are read when they are wanted
			p := buf[from:roundUp(int(t.payload), BlockBytes)]
			if err := st.opt.Segments.ReadAt(ctx, p, int64(n)*SegmentBytes+int64(from)); err != nil {
				return got, fmt.Errorf("store: read checkpoint segment %d: %w", n, err)
			}
		}
		if crc(buf[t.items:t.payload]) != t.content {
			return got, fmt.Errorf("store: content of checkpoint segment %d: %w", n, ErrCorrupt)
		}
		if err := got.decodeItems(buf[t.items:t.payload]); err != nil {
			return got, fmt.Errorf("store: checkpoint segment %d: %w", n, err)
		}
	}
	if s.ckptSegs > 0 && !got.end {
		return got, fmt.Errorf("store: checkpoint %d has no end: %w", s.ckptID, ErrCorrupt)
	}
	return got, nil
}

// replaySegments applies the data segments from number first up to end that follow the checkpoint
// in the log, and those beside it. All others there are of no use: their numbers were taken and never completed.
//
// What the log refers to is there before who refers to it was written, but a segment beside it may have a higher number
// than the open one of the log that refers to it. So those are looked for first.
func (st *Store) replaySegments(ctx context.Context, first, end uint32) (applied int, err error) {
	const window = 16
	moved, err := st.findAside(ctx, first, end)
	if err != nil {
		return 0, err
	}
	for ; first < end; first += window {
		found := make([]*found, min(window, end-first))
		g, gctx := errgroup.WithContext(ctx)
		for i := range found {
			if found[i] = moved[first+uint32(i)]; found[i] != nil {
				continue
			}
			g.Go(func() (err error) {
				found[i], err = st.readFound(gctx, first+uint32(i))
				return err
			})
		}
		if err := g.Wait(); err != nil {
			return applied, err
		}
		for i, f := range found {
			n := first + uint32(i)
			if f == nil || f.t.kind != kindAside && (f.t.prev != st.lastSegment || !st.refersToWhole(n, f)) {
				st.condemned = append(st.condemned, n)
				continue
			}
			if err := st.applySegment(ctx, n, f); err != nil {
				return applied, err
			}
			applied++
			st.counters.replayedSegments++
			if f.t.kind == kindAside {
				st.counters.replayedAside++
			}
			delete(moved, n)
			if f.t.kind != kindAside {
				st.lastSegment, st.packed, st.sealedTo, st.logTo = n, f.t.cover, f.t.cover, n
			}
		}
	}
	return applied, nil
}

// findAside returns the whole segments beside the log from number first up to end, which exist from then on.
func (st *Store) findAside(ctx context.Context, first, end uint32) (map[uint32]*found, error) {
	var mu sync.Mutex
	moved := map[uint32]*found{}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(16)
	for n := first; n < end; n++ {
		g.Go(func() error {
			p := make([]byte, BlockBytes)
			if err := st.opt.Segments.ReadAt(ctx, p, int64(n+1)*SegmentBytes-BlockBytes); err != nil {
				return st.notFound(n, err)
			}
			if t, err := st.checkTrailer(n, p); err != nil || t.kind != kindAside {
				return nil
			}
			f, err := st.readFound(ctx, n)
			if f == nil || f.t.kind != kindAside {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			moved[n] = f
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	for n, f := range moved {
		st.segs[n] = &segment{slots: f.t.slots}
	}
	return moved, nil
}

// found is a data segment that is whole.
type found struct {
	t     trailer
	slots []slot
	log   []byte
}

// notFound says what it means that segment n, which no checkpoint knows, cannot be read: nothing, if what cannot be read is to be given up, for then it is
// as if it had never been finished.
func (st *Store) notFound(n uint32, err error) error {
	switch {
	case !errors.Is(err, target.ErrMediumRead):
		return fmt.Errorf("store: look for segment %d: %w", n, err)
	case st.opt.AcceptLost:
		st.opt.Logger.Error("a segment cannot be read, and is taken for none", "segment", n, "err", err)
		return nil
	}
	return fmt.Errorf("%w: segment %d, which may hold what was acknowledged last: %w", ErrJournal, n, err)
}

// readFound returns nil where segment n is not, or not whole.
func (st *Store) readFound(ctx context.Context, n uint32) (*found, error) {
	p := make([]byte, BlockBytes)
	end := int64(n+1) * SegmentBytes
	if err := st.opt.Segments.ReadAt(ctx, p, end-BlockBytes); err != nil {
		return nil, st.notFound(n, err)
	}
	if t, err := st.checkTrailer(n, p); err != nil || !t.isData() {
		return nil, nil
	}
	stripe := make([]byte, StripeBytes)
	if err := st.opt.Segments.ReadAt(ctx, stripe, end-StripeBytes); err != nil {
		return nil, st.notFound(n, err)
	}
	t, slots, log, err := st.readTable(ctx, n)
	if err != nil && !errors.Is(err, ErrCorrupt) {
		return nil, st.notFound(n, err)
	}
	if err != nil || crc(stripe[:StripeBytes-BlockBytes]) != t.stripe {
		return nil, nil // torn: the host stopped while it wrote this one
	}
	return &found{t, slots, log}, nil
}

// applySegment does to the state what the packer did when it filled segment n.
func (st *Store) applySegment(ctx context.Context, n uint32, f *found) error {
	info := st.segs[n]
	if info == nil { // else one of the cleaner's, and others may refer to it already
		info = &segment{slots: f.t.slots}
		st.segs[n] = info
	}
	if err := st.readAheadOf(ctx, n, f); err != nil {
		return err
	}
	taken := map[loc]bool{}
	err := decodeLog(n, f.slots, f.log, func(c *change) error {
		v := st.volumes[c.vol]
		if f.t.kind == kindAside {
			if c.kind != logMove {
				return fmt.Errorf("store: segment %d: entry of kind %d between moves: %w", n, c.kind, ErrCorrupt)
			}
			if v == nil { // it is deleted already, or not made yet: the block stays where it is
				return nil
			}
		}
		if (v == nil) != (c.kind == logCreate || c.kind == logCopy) {
			return fmt.Errorf("store: segment %d: entry of kind %d for volume %d: %w", n, c.kind, c.vol, ErrCorrupt)
		}
		for _, l := range c.places {
			if c.kind != logMove && st.segs[l.segment()] == nil {
				return fmt.Errorf("store: segment %d refers to segment %d, which is none: %w", n, l.segment(), ErrCorrupt)
			}
		}
		src := st.volumes[uint32(c.n)]
		if (c.kind == logCopy || c.kind == logRollback) && src == nil {
			return fmt.Errorf("store: segment %d: copy of volume %d, which is none: %w", n, c.n, ErrCorrupt)
		}
		cost, slots := 0, 0
		switch c.kind {
		case logStore, logRef, logPut:
			for i, l := range c.places {
				if err := st.lockForBlock(ctx, v, c.lba+uint64(i)); err != nil {
					return err
				}
				st.point(v, c.lba+uint64(i), l)
				st.mu.Unlock()
				if c.kind == logStore {
					cost += l.len() + f.t.slotBytes()
					slots++
					continue
				}
				cost += costRef
				if c.kind == logPut {
					st.chargeShare(st.segs[l.segment()], v, l.len()+slotBytes, 1)
				}
			}
		case logMove:
			cost = costMove
			to := c.places[1]
			if to.segment() != n {
				break
			}
			if err := st.lockForBlock(ctx, v, c.lba); err != nil {
				return err
			}
			moved := v.m.move(&st.maps, c.lba, c.places[0], to)
			st.mu.Unlock()
			if moved && !taken[to] {
				taken[to] = true
				cost += to.len() + f.t.slotBytes()
				slots++
			}
		case logZero:
			if err := st.lockFor(ctx, func() []*page { return v.m.edges(c.lba, c.n) }); err != nil {
				return err
			}
			v.m.zero(&st.maps, c.lba, c.n, st.late)
			st.mu.Unlock()
			cost = costElse
		case logCreate, logCopy:
			d, err := parseDescription(c.describe)
			if err != nil {
				return fmt.Errorf("store: segment %d: %w", n, err)
			}
			if c.kind == logCopy {
				d.m = src.m.share()
			}
			d.created = true
			st.adopt(c.vol, &d)
			return nil
		case logDelete:
			st.unlist(v)
			st.applyDelete(v)
			return nil
		case logRollback:
			st.applyRollback(v, src)
			v.size = v.applied
			cost = costElse
		case logDescribe:
			d, err := parseDescription(c.describe)
			if err != nil {
				return fmt.Errorf("store: segment %d: %w", n, err)
			}
			st.redescribe(v, &d)
			v.appliedFrom, v.appliedName, v.appliedCompression = d.from, d.name, d.compression
			cost = costElse
		case logResize:
			v.size, v.applied = int64(c.n), int64(c.n)
		}
		st.charge(info, v, cost, slots)
		return nil
	})
	info.bytes = f.t.payload + f.t.slots*uint32(f.t.slotBytes()) + f.t.log + BlockBytes
	return err
}

// readAheadOf brings the pages that the log of segment n changes, as many as may be in memory. What it finds in the log is but a hint.
func (st *Store) readAheadOf(ctx context.Context, n uint32, f *found) error {
	var ps []*page
	seen := map[*page]bool{}
	st.mu.RLock()
	most := int(min(st.maps.most()/4, 1<<16))
	err := decodeLog(n, f.slots, f.log, func(c *change) error {
		v := st.volumes[c.vol]
		if v == nil || c.kind != logStore && c.kind != logRef && c.kind != logPut && c.kind != logMove {
			return nil
		}
		for lba := c.lba; lba < c.lba+c.n && len(ps) < most; lba += pageEntries - lba%pageEntries {
			if p := v.m.absent(lba); p != nil && !seen[p] {
				seen[p] = true
				ps = append(ps, p)
			}
		}
		return nil
	})
	st.mu.RUnlock()
	if err != nil {
		return err
	}
	return st.bring(ctx, ps)
}

// adopt makes v a volume of the store.
func (st *Store) adopt(id uint32, v *Volume) {
	v.st, v.id, v.dirty = st, id, map[uint64]*pending{}
	st.volumes[id] = v
	st.list(v)
	st.nextVol = max(st.nextVol, id+1)
}

// replayJournal queues the records that no segment holds, for the packer.
func (st *Store) replayJournal(ctx context.Context, s *superblock) error {
	r := ringReader{st: st, at: s.jStart}
	seq := s.jSeq
	if s.logTo > st.lastSegment {
		if !st.opt.AcceptLost {
			return fmt.Errorf("%w: the log ends with segment %d, and the journal does not have what was in those up to %d: %w", ErrJournal, st.lastSegment, s.logTo, ErrCorrupt)
		}
		st.gaveUpJournal(st.packed.seq)
		r.passed = st.ringSize // what came later is none without what is missing
	}
	for s.jEpoch > 0 && r.passed < st.ringSize {
		rec, err := r.next(ctx)
		switch {
		case errors.Is(err, target.ErrMediumRead) && st.opt.AcceptLost:
			st.gaveUpJournal(seq)
		case errors.Is(err, target.ErrMediumRead):
			return fmt.Errorf("%w: from record %d on: %w", ErrJournal, seq, err)
		case err != nil:
			return err
		}
		if rec == nil || rec.uuid != st.uuid || rec.epoch != s.jEpoch || rec.seq != seq {
			break
		}
		if len(rec.ops) > 0 {
			if err := st.replayRecord(rec); err != nil {
				return err
			}
			seq++
		}
		r.skip(rec.advance)
	}
	st.current = newBatch(max(seq, st.packed.seq+1))
	// Writes of the dead host that were on their way may land behind the last record still.
	gap := uint64(journalPipeline * recordBytes(maxEntries, st.opt.RecordBytes))
	st.head = (r.at + gap) % st.ringSize
	st.tail, st.handed = st.head, st.head
	return nil
}

// replayRecord stages what of a record is in no segment.
func (st *Store) replayRecord(rec *record) error {
	b := newBatch(rec.seq)
	b.durable = true
	close(b.done)
	for _, o := range rec.ops {
		if before := (position{rec.seq, b.units}); before.less(st.packed) {
			skip := o.units()
			if rec.seq == st.packed.seq {
				skip = min(skip, st.packed.unit-b.units)
			}
			b.units += skip
			b.base = b.units
			if skip == o.units() {
				continue
			}
			o.lba, o.count, o.data = o.lba+skip, o.count-skip, o.data[skip*BlockBytes:]
		}
		v, src := st.volumes[o.vol], st.volumes[uint32(o.lba)]
		if (o.kind == opCopy || o.kind == opRollback) && (src == nil || src.deleted) {
			return fmt.Errorf("store: record %d: copy of volume %d, which is none: %w", rec.seq, o.lba, ErrCorrupt)
		}
		switch {
		case o.kind == opCreate || o.kind == opCopy:
			d, err := parseDescription(o.data)
			if err != nil || v != nil || st.listed(&d) != nil {
				return fmt.Errorf("store: record %d creates volume %d: %w", rec.seq, o.vol, ErrCorrupt)
			}
			v = &d
			st.adopt(o.vol, v)
		case v == nil || v.deleted:
			return fmt.Errorf("store: record %d: volume %d: %w", rec.seq, o.vol, ErrCorrupt)
		case o.kind == opDelete:
			v.deleted = true
			st.unlist(v)
		case o.kind == opResize:
			v.size = int64(o.lba)
		case o.kind == opRollback:
			v.size = src.size
		case o.kind == opDescribe:
			d, err := parseDescription(o.data)
			if err != nil {
				return fmt.Errorf("store: record %d describes volume %d: %w", rec.seq, o.vol, err)
			}
			if x := st.listed(&d); x != nil && x != v {
				return fmt.Errorf("store: record %d gives volume %d the name of volume %d: %w", rec.seq, o.vol, x.id, ErrCorrupt)
			}
			st.redescribe(v, &d)
		}
		st.stage(b, v, o)
	}
	if len(b.ops) > 0 {
		st.counters.replayedRecords++
		st.queue = append(st.queue, b)
	}
	return nil
}

// ringReader reads records one behind the other, many at a time.
type ringReader struct {
	st     *Store
	at     uint64 // in the ring
	passed uint64
	buf    []byte
	from   uint64 // buf[0] is here in the ring
}

const ringWindow = 4 << 20

// view returns n bytes at the reader's place, or nil where the ring ends before.
func (r *ringReader) view(ctx context.Context, n uint64) ([]byte, error) {
	if r.at+n > r.st.ringSize {
		return nil, nil
	}
	if r.at < r.from || r.at+n > r.from+uint64(len(r.buf)) {
		err := r.read(ctx, min(max(n, ringWindow), r.st.ringSize-r.at))
		if errors.Is(err, target.ErrMediumRead) { // it may be behind what is wanted
			err = r.read(ctx, n)
		}
		if err != nil {
			r.buf = nil
			return nil, fmt.Errorf("store: read journal at %d: %w", r.at, err)
		}
	}
	return r.buf[r.at-r.from : r.at-r.from+n], nil
}

func (r *ringReader) read(ctx context.Context, n uint64) error {
	r.buf, r.from = make([]byte, n), r.at
	return r.st.opt.Journal.ReadAt(ctx, r.buf, ringOffset+int64(r.at))
}

// next decodes the record at the reader's place; nil where there is none.
func (r *ringReader) next(ctx context.Context) (*record, error) {
	p, err := r.view(ctx, BlockBytes)
	if err != nil || p == nil {
		return nil, err
	}
	n, err := recordLength(p)
	if err != nil {
		return nil, nil
	}
	if p, err = r.view(ctx, uint64(n)); err != nil || p == nil {
		return nil, err
	}
	rec, err := decodeRecord(p)
	if err != nil {
		return nil, nil // torn: it was never acknowledged
	}
	return &rec, nil
}

func (r *ringReader) skip(n uint64) {
	r.at = (r.at + n) % r.st.ringSize
	r.passed += n
}

// warmIndex enters what the segments hold into the index, newest first, until it is full. Until
// then, duplicates of old blocks may be stored again.
func (st *Store) warmIndex() {
	x := st.index.Load()
	st.mu.RLock()
	numbers := make([]uint32, 0, len(st.segs))
	for n := range st.segs {
		numbers = append(numbers, n)
	}
	st.mu.RUnlock()
	st.warm(x, numbers)
	st.mu.Lock()
	defer st.mu.Unlock()
	if x == st.index.Load() {
		st.indexReady = true
	}
}

// leastIndex is the least memory of an index.
const leastIndex = 4 << 20

// ResizeIndex gives the dedup index another size while the store works: a new one, which is filled from the segments' tables as at an
// opening (Stats.IndexReady), and knows of what is written from now on at once. ErrIndexSize: less than 4 MiB.
func (st *Store) ResizeIndex(limitBytes int64) error {
	if limitBytes < leastIndex {
		return fmt.Errorf("store: index of %d bytes, %d at least: %w", limitBytes, leastIndex, ErrIndexSize)
	}
	x := dedup.NewIndex(limitBytes)
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.closed || st.recovering || st.err != nil {
		return ErrClosed
	}
	st.index.Store(x) // who fills the one before sees it, and leaves off
	st.indexReady = false
	st.wg.Go(st.warmIndex)
	return nil
}
