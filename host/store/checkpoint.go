package store

import (
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"time"
)

// A checkpoint is the whole state at one position of the log: volumes, where the pages of their maps are, segments. It is
// a run of items, in checkpoint segments with consecutive numbers; no item crosses segments. It
// exists when the superblock names it. It is written at the end of a data segment that is durable,
// so that recovery goes on with the segments after it.
//
// The items are written twice, the second time in the segments behind the first: the shelf may lose a piece of either.
//
// Before the items it writes the pages of maps that have changed (paging.go), in segments of the same kind; the items begin behind
// the last page. A segment with pages stays for as long as one of them counts, whatever becomes of the items.
//
// Freeing is safe in this order: a segment without references is condemned (no new references),
// a checkpoint without references to it becomes durable, both superblocks name that checkpoint, and
// then the segment is unmapped. Until recovery ends, nothing else of the past is needed.
const (
	itemHead    = 1 // next volume, last data segment, cover seq, cover unit
	itemVolume  = 2 // id, length and description
	itemPage    = 3 // version 1 and 2: volume, number of page, its places as runs
	itemSegment = 4 // number, slots, bytes, shares: count, (volume, slots, bytes)…
	itemFree    = 5 // number of a segment to unmap
	itemEnd     = 6
	itemShared  = 7 // since version 2: volume, volume before it, first page, pages: those of the two are the same
	// Since version 3. Volumes from lastDying down are none: their maps are being taken apart.
	itemNode = 8 // volume, number of node, where its pages are as runs; how many blocks each of them knows
	itemLive = 9 // number of a segment, references to it
)

// checkpointCall is a wanted checkpoint; err is set before it is wanted no more.
type checkpointCall struct{ err error }

// Checkpoint packs all that was acknowledged before the call and writes a checkpoint.
func (st *Store) Checkpoint(ctx context.Context) error { return st.checkpoint(ctx, false) }

// checkpoint asks the packer for a checkpoint. The last one is Close's.
func (st *Store) checkpoint(ctx context.Context, last bool) error {
	st.mu.Lock()
	for st.needed != nil { // one that began before may not hold what the caller means
		before := st.needed
		if err := st.wait(ctx, func() bool { return st.needed != before }); err != nil {
			st.mu.Unlock()
			return err
		}
	}
	if err := st.err; err != nil || st.closed && !last {
		st.mu.Unlock()
		return cmp.Or(err, ErrClosed)
	}
	call := new(checkpointCall)
	st.needed = call
	st.notify()
	err := st.wait(ctx, func() bool { return st.needed != call })
	st.mu.Unlock()
	if err != nil {
		return err
	}
	return call.err
}

// Sync returns when all that was acknowledged before the call is packed: then the figures of
// Stats are those of the stored data.
func (st *Store) Sync(ctx context.Context) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	seq := st.current.seq
	if len(st.current.ops) > 0 {
		seq++
	}
	st.packTo = max(st.packTo, seq)
	st.notify()
	before := func(list []*batch) bool { return len(list) > 0 && list[0].seq < seq }
	return st.wait(ctx, func() bool {
		return st.current.seq >= seq && !before(st.inflight) && !before(st.queue)
	})
}

// checkpointWriter fills checkpoint segments with pages and then with items.
type checkpointWriter struct {
	st     *Store
	ctx    context.Context
	id     uint64
	buf    []byte
	begun  bool   // the buffer is of segment number
	number uint32 //
	fill   int
	items  int    // where they begin in the buffer,
	list   bool   // if they do
	from   uint32 // the first segment of all
	first  uint32 // the first with items
	count  uint32 // of those
	bytes  int64
}

// room begins a segment where n bytes more do not fit.
func (w *checkpointWriter) room(n int) error {
	if w.begun && w.fill+n > trailerOffset {
		if err := w.flush(); err != nil {
			return err
		}
	}
	if w.begun {
		return nil
	}
	number, err := w.st.allocate(w.ctx)
	if err != nil {
		return err
	}
	w.begun, w.number, w.fill, w.items = true, number, 0, 0
	if w.from == 0 {
		w.from = number
	}
	return nil
}

// page adds a page as the stored block b, whose checksum it makes. again: it is stored elsewhere as it is.
func (w *checkpointWriter) page(p *page, b []byte, again bool) error {
	if err := w.room(len(b)); err != nil {
		return err
	}
	sealBlock(w.number, w.fill, w.buf[w.fill:w.fill+copy(w.buf[w.fill:], b)])
	w.st.mu.Lock()
	defer w.st.mu.Unlock()
	if w.st.counters.pagesWritten++; again {
		w.st.counters.pagesAgain++
	}
	w.st.unwritten = unwritten{w.number, w.buf}
	w.st.maps.stored(p, makeLoc(w.number, w.fill, len(b)))
	w.fill += len(b)
	return nil
}

// unwritten is a segment with pages that is not written yet. They are read in buf until then.
type unwritten struct {
	number uint32 // 0: none
	buf    []byte
}

// add adds an item. No block may follow.
func (w *checkpointWriter) add(item []byte) error {
	if err := w.room(len(item)); err != nil {
		return err
	}
	if !w.list {
		w.list, w.items, w.first = true, w.fill, w.number
	}
	w.fill += copy(w.buf[w.fill:], item)
	return nil
}

func (w *checkpointWriter) flush() error {
	if !w.begun {
		return nil
	}
	clear(w.buf[w.fill:])
	t := trailer{kind: kindCheckpoint, uuid: w.st.uuid, epoch: w.st.epoch, segment: w.number, payload: uint32(w.fill), ckptID: w.id}
	if w.list {
		t.index, t.items = w.count, uint32(w.items)
		w.count++
	} else {
		t.items = t.payload
	}
	t.content = crc(w.buf[t.items:w.fill])
	if err := w.st.writeSegment(w.number, w.buf, &t); err != nil {
		return err
	}
	w.bytes += int64(w.fill) + BlockBytes
	w.begun = false
	w.written()
	return nil
}

func (w *checkpointWriter) written() {
	w.st.mu.Lock()
	w.st.unwritten = unwritten{}
	w.st.mu.Unlock()
}

func (w *checkpointWriter) end() {
	w.written()
	segmentBuffers.Put(w.buf)
}

// writeCheckpoint is called by the packer between batches.
func (st *Store) writeCheckpoint(ctx context.Context) error {
	if err := st.sealOpen(ctx); err != nil {
		return err
	}
	if err := st.sealAside(ctx); err != nil {
		return err
	}
	st.mu.Lock()
	err := st.wait(ctx, func() bool { return st.sealing == 0 })
	st.mu.Unlock()
	if err != nil {
		return err
	}
	st.mu.Lock()
	st.sealedTo = st.packed // the checkpoint covers what needed no segment
	st.mu.Unlock()
	began := time.Now()
	free := slices.Concat(st.condemned, st.condemn())
	w := &checkpointWriter{st: st, ctx: ctx, id: st.ckptID + 1, buf: segmentBuffers.Get().([]byte)}
	defer w.end()
	if err := st.writePages(ctx, w); err != nil {
		return err
	}
	free = append(free, st.emptyHomes()...)
	if err := st.encodeState(w, free); err != nil {
		return err
	}
	if err := w.flush(); err != nil {
		return err
	}
	again := &checkpointWriter{st: st, ctx: ctx, id: w.id, buf: w.buf}
	if err := st.encodeState(again, free); err != nil {
		return err
	}
	if err := again.flush(); err != nil {
		return err
	}
	if again.first != w.first+w.count {
		return fmt.Errorf("store: the copy of checkpoint segments %d+%d begins at %d", w.first, w.count, again.first)
	}
	var tail uint64
	err = st.writeSuper(ctx, func(s *superblock) {
		s.ckptID, s.ckptFrom, s.ckptSegs, s.ckptCopy = w.id, w.first, w.count, again.count
		tail = st.journalStart(s)
	})
	if err != nil {
		return err
	}
	st.sinceCkpt = 0
	st.mu.Lock()
	st.ckptID, st.ckptFirst, st.ckptItems, st.ckptCopies = w.id, w.first, int(w.count), int(again.count)
	st.countHomes()
	st.counters.checkpoints++
	st.mu.Unlock()
	st.dropRecords(tail)
	st.condemned, st.freeable = nil, 0
	if err := st.free(ctx, free); err != nil {
		return err
	}
	st.opt.Logger.Debug("checkpoint", "id", w.id, "bytes", w.bytes+again.bytes, "freed", len(free), "took", time.Since(began))
	return nil
}

// emptyHomes takes the segments of former checkpoints that nothing counts of out of use and returns them.
func (st *Store) emptyHomes() (free []uint32) {
	st.mu.Lock()
	defer st.mu.Unlock()
	for n, h := range st.maps.homes {
		if h.live == 0 {
			delete(st.maps.homes, n)
			free = append(free, n)
		}
	}
	for i := range uint32(st.ckptItems + st.ckptCopies) {
		if n := st.ckptFirst + i; st.maps.homes[n] == nil && !slices.Contains(free, n) {
			free = append(free, n)
		}
	}
	return free
}

// countHomes counts the segments of checkpoints that exist. mu is held.
func (st *Store) countHomes() {
	st.ckptSegments = st.ckptItems + st.ckptCopies
	st.ckptBytes = int64(st.ckptSegments) * BlockBytes
	for n, h := range st.maps.homes {
		st.ckptBytes += h.live
		if n-st.ckptFirst >= uint32(st.ckptItems) {
			st.ckptSegments++
		}
	}
}

// ckptCost is about how many segments a checkpoint would write now. mu is held, at least for reading.
func (st *Store) ckptCost() int { return st.changedMaps() + max(2*st.ckptItems-1, 1) }

// changedMaps is how many segments the pages take that have changed. mu is held, at least for reading.
func (st *Store) changedMaps() int {
	return int(st.maps.dirty * (blockHeader + pageBytes) / SegmentBytes)
}

// condemn takes the segments without references out of use and returns them.
func (st *Store) condemn() (dead []uint32) {
	for n, s := range st.segs { // the packer needs no lock to look at them
		if s.live < 0 {
			panic(fmt.Sprintf("store: segment %d has %d references", n, s.live))
		}
		if s.live == 0 {
			dead = append(dead, n)
		}
	}
	slices.Sort(dead)
	st.mu.Lock()
	defer st.mu.Unlock()
	dead = slices.DeleteFunc(dead, func(n uint32) bool { return st.inMemory[n] != nil })
	for _, n := range dead {
		s := st.segs[n]
		s.condemned = true
		for _, sh := range s.shares {
			if v := st.volumes[sh.vol]; v != nil {
				v.slots -= int64(sh.slots)
				v.bytes -= int64(sh.bytes)
			}
		}
		delete(st.segs, n)
	}
	return dead
}

// free unmaps segments that the durable checkpoint doesn't know any more.
func (st *Store) free(ctx context.Context, numbers []uint32) error {
	slices.Sort(numbers)
	for i := 0; i < len(numbers); {
		n, run := numbers[i], 1
		for i+run < len(numbers) && numbers[i+run] <= n+uint32(run) && run < reserveStep {
			run++
		}
		last := numbers[i+run-1]
		if err := st.opt.Segments.Unmap(ctx, int64(n)*SegmentBytes, int64(last-n+1)*SegmentBytes); err != nil {
			return fmt.Errorf("store: free segments %d to %d: %w", n, last, err)
		}
		i += run
	}
	forgetful, _ := st.opt.Cache.(forgetfulCache)
	for _, n := range numbers {
		st.tables.drop(n)
		if forgetful != nil {
			forgetful.Forget(st.uuid, n)
		}
	}
	st.mu.Lock()
	st.counters.segmentsFreed += int64(len(numbers))
	st.notify()
	st.mu.Unlock()
	return nil
}

// encodeState writes all items. Only the packer changes what they hold. A page that several maps share is written once.
func (st *Store) encodeState(w *checkpointWriter, free []uint32) error {
	st.pass++
	st.mu.RLock()
	head := []byte{itemHead}
	for _, x := range []uint64{uint64(st.nextVol), uint64(st.lastSegment), st.packed.seq, st.packed.unit} {
		head = binary.AppendUvarint(head, x)
	}
	all := st.allMaps()
	st.mu.RUnlock()
	if err := w.add(head); err != nil {
		return err
	}
	for _, m := range all {
		if err := st.encodeMap(w, m); err != nil {
			return err
		}
	}
	var item []byte
	for _, n := range slices.Sorted(maps.Keys(st.segs)) { // the packer needs no lock to look at them
		st.breathe()
		item = appendSegmentItem(item[:0], n, st.segs[n])
		if err := w.add(item); err != nil {
			return err
		}
		if live := st.segs[n].live; live > 0 {
			item = binary.AppendUvarint(binary.AppendUvarint(append(item[:0], itemLive), uint64(n)), uint64(live))
			if err := w.add(item); err != nil {
				return err
			}
		}
	}
	for _, n := range free {
		item = binary.AppendUvarint(append(item[:0], itemFree), uint64(n))
		if err := w.add(item); err != nil {
			return err
		}
	}
	return w.add([]byte{itemEnd})
}

func appendSegmentItem(p []byte, n uint32, s *segment) []byte {
	p = binary.AppendUvarint(append(p, itemSegment), uint64(n))
	p = binary.AppendUvarint(p, uint64(s.slots))
	p = binary.AppendUvarint(p, uint64(s.bytes))
	p = binary.AppendUvarint(p, uint64(len(s.shares)))
	for _, sh := range s.shares {
		p = binary.AppendUvarint(p, uint64(sh.vol))
		p = binary.AppendUvarint(p, uint64(sh.slots))
		p = binary.AppendUvarint(p, uint64(sh.bytes))
	}
	return p
}

func (st *Store) encodeMap(w *checkpointWriter, m namedMap) error {
	id := m.id
	st.mu.RLock()
	if m.v != nil && !m.v.created { // its creation is in the journal still
		st.mu.RUnlock()
		return nil
	}
	nodes := len(m.m.nodes)
	var item []byte
	if m.v != nil {
		item = binary.AppendUvarint([]byte{itemVolume}, uint64(id))
		d := m.v.describe()
		item = append(binary.AppendUvarint(item, uint64(len(d))), d...)
	}
	st.mu.RUnlock()
	if err := w.add(item); err != nil {
		return err
	}
	var items [][]byte
	var run sharedRun
	for i := range nodes {
		items = items[:0]
		var at [nodePages]loc
		var counts []byte
		st.mu.RLock()
		m.m.eachOf(i, func(first uint64, p *page) {
			number := first / pageEntries
			if p.pass == st.pass {
				if !run.extend(p.vol, number) {
					items = run.flush(items, id)
					run = sharedRun{of: p.vol, first: number, n: 1}
				}
				return
			}
			p.pass, p.vol = st.pass, id
			at[number%nodePages] = p.rest
			counts = binary.AppendUvarint(counts, uint64(p.count))
		})
		st.mu.RUnlock()
		if len(counts) > 0 {
			item := binary.AppendUvarint(binary.AppendUvarint([]byte{itemNode}, uint64(id)), uint64(i))
			items = append(items, append(appendRuns(item, at[:]), counts...))
		}
		if i == nodes-1 {
			items = run.flush(items, id)
		}
		for _, p := range items {
			if err := w.add(p); err != nil {
				return err
			}
		}
	}
	return nil
}

// sharedRun is pages, one behind the other, that were written with another volume.
type sharedRun struct {
	of       uint32
	first, n uint64
}

func (r *sharedRun) extend(of uint32, number uint64) bool {
	if r.n == 0 || r.of != of || r.first+r.n != number {
		return false
	}
	r.n++
	return true
}

// flush appends the run's item.
func (r *sharedRun) flush(items [][]byte, id uint32) [][]byte {
	if r.n == 0 {
		return items
	}
	p := binary.AppendUvarint([]byte{itemShared}, uint64(id))
	p = binary.AppendUvarint(p, uint64(r.of))
	p = binary.AppendUvarint(p, r.first)
	p = binary.AppendUvarint(p, r.n)
	*r = sharedRun{}
	return append(items, p)
}

// state is what a checkpoint gives back.
type state struct {
	nextVol, lastSegment uint32
	cover                position
	volumes              map[uint32]*Volume
	segs                 map[uint32]*segment
	dying                map[uint32]*blockMap
	free                 []uint32
	head, end            bool
}

// mapOf is the map that a checkpoint calls id.
func (s *state) mapOf(id uint32) *blockMap {
	if v := s.volumes[id]; v != nil {
		return &v.m
	}
	if id <= lastDying-mostDying {
		return nil
	}
	if s.dying == nil {
		s.dying = map[uint32]*blockMap{}
	}
	if s.dying[id] == nil {
		s.dying[id] = new(blockMap)
	}
	return s.dying[id]
}

// decodeItems reads the items of one checkpoint segment into s.
func (s *state) decodeItems(p []byte) error {
	d := decoder{p: p}
	for len(d.p) > 0 && !s.end {
		kind := d.bytes(1)[0]
		if !s.head && kind != itemHead {
			return fmt.Errorf("checkpoint without head: %w", ErrCorrupt)
		}
		switch kind {
		case itemHead:
			d.bad = d.bad || s.head
			s.nextVol, s.lastSegment = uint32(d.limited(1<<32-1)), uint32(d.limited(maxSegments-1))
			s.cover = position{d.uvarint(), d.uvarint()}
			s.head = true
		case itemVolume:
			id := uint32(d.limited(1<<32 - 1))
			v, err := parseDescription(d.bytes(d.limited(BlockBytes)))
			if err != nil || id == 0 || id >= s.nextVol || s.volumes[id] != nil {
				d.bad = true
				break
			}
			v.id, v.created, v.dirty = id, true, map[uint64]*pending{}
			s.volumes[id] = &v
		case itemPage:
			m := s.mapOf(uint32(d.limited(1<<32 - 1)))
			number := d.limited(maxPages - 1)
			p := &page{at: new(places)}
			d.runs(p.at[:])
			for _, l := range p.at {
				if l != 0 {
					p.count++
				}
			}
			d.bad = d.bad || m == nil || !m.put(number, p)
		case itemNode:
			m := s.mapOf(uint32(d.limited(1<<32 - 1)))
			number := d.limited(maxPages/nodePages - 1)
			var at [nodePages]loc
			d.runs(at[:])
			for i, l := range at {
				if d.bad || l == 0 {
					continue
				}
				p := &page{rest: l, count: uint16(d.limited(pageEntries))}
				d.bad = d.bad || m == nil || !m.put(number*nodePages+uint64(i), p)
			}
		case itemShared:
			m, of := s.mapOf(uint32(d.limited(1<<32-1))), s.mapOf(uint32(d.limited(1<<32-1)))
			first := d.limited(maxPages - 1)
			n := d.limited(maxPages - first)
			d.bad = d.bad || m == nil || of == nil || m == of
			for i := first; !d.bad && i < first+n; i++ {
				p := of.page(i * pageEntries)
				d.bad = p == nil || !m.put(i, p)
			}
		case itemLive:
			g := s.segs[uint32(d.limited(maxSegments-1))]
			live := d.limited(1 << 50)
			if d.bad = d.bad || g == nil || g.live != 0; !d.bad {
				g.live = int64(live)
			}
		case itemSegment:
			n := uint32(d.limited(maxSegments - 1))
			g := &segment{slots: uint32(d.limited(maxSlots)), bytes: uint32(d.limited(SegmentBytes))}
			for range d.limited(1 << 16) {
				g.shares = append(g.shares, share{uint32(d.limited(1<<32 - 1)), uint32(d.limited(maxSlots)), uint32(d.limited(1<<32 - 1))})
				if d.bad {
					break
				}
			}
			d.bad = d.bad || n == 0 || s.segs[n] != nil
			s.segs[n] = g
		case itemFree:
			s.free = append(s.free, uint32(d.limited(maxSegments-1)))
		case itemEnd:
			s.end = true
		default:
			d.bad = true
		}
		if d.bad {
			return fmt.Errorf("checkpoint item of kind %d: %w", kind, ErrCorrupt)
		}
	}
	return nil
}

// maxPages is how many pages the map of a volume can have.
const maxPages = MaxVolume / BlockBytes / pageEntries
