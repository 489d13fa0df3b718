package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/ledge-storage/ledge/host/dedup"
	"github.com/ledge-storage/ledge/target"
	"golang.org/x/sync/errgroup"
)

// Sealing: the packer hands a full segment to one goroutine, which writes segments one after the
// other. So a data segment becomes durable only after its predecessors in the log, and recovery
// finds a prefix. Then the records that are wholly in durable segments are released, by a superblock
// in which the journal begins later, before the ring's space is used again.

// seal gives the open segment, whose cover is set, to the sealer. It waits while another is queued.
func (st *Store) seal(ctx context.Context) error {
	b := st.open
	st.open = nil
	st.mu.Lock()
	st.handed = st.startOf(b.cover.seq)
	st.mu.Unlock()
	return st.hand(ctx, b)
}

func (st *Store) hand(ctx context.Context, b *builder) error {
	b.log.flush()
	st.sinceCkpt++
	st.mu.Lock()
	st.sealing++
	b.info.bytes = uint32(b.used()) + BlockBytes
	st.mu.Unlock()
	select {
	case st.toSeal <- b:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// sealOpen seals the open segment at a batch's end, if there is one.
func (st *Store) sealOpen(ctx context.Context) error {
	if st.open == nil {
		return nil
	}
	st.mu.RLock()
	st.open.cover = st.packed
	st.mu.RUnlock()
	return st.seal(ctx)
}

func (st *Store) sealLoop() {
	for {
		select {
		case b := <-st.toSeal:
			if err := st.sealOne(b); err != nil {
				st.fail(err)
				return
			}
		case <-st.ctx.Done():
			return
		}
	}
}

func (st *Store) sealOne(b *builder) error {
	kind := uint8(kindData)
	if b.aside {
		kind = kindAside
	}
	t := trailer{kind: kind, uuid: st.uuid, epoch: st.epoch, segment: b.number, prev: b.prev, cover: b.cover,
		payload: uint32(b.fill), slots: uint32(len(b.slots)), log: uint32(len(b.log.p))}
	at := t.tableOffset()
	encodeSlots(b.buf[at:], b.slots)
	copy(b.buf[at+len(b.slots)*slotBytes:], b.log.p)
	t.table = crc(b.buf[at:trailerOffset])
	if err := st.writeSegment(b.number, b.buf, &t); err != nil {
		return err
	}
	st.keepLines(b)
	if b.aside { // of what was moved, others refer from now on to what is durable
		for i := range b.slots {
			hint := b.slots[i].fp.fingerprint()
			st.index.Load().Insert(&hint, dedup.Ref{Segment: b.number, Slot: uint16(i)})
		}
	}
	st.mu.Lock()
	delete(st.inMemory, b.number)
	st.sealing--
	if !b.aside {
		st.awaiting = append(st.awaiting, await{b.number, b.cover, b.needs})
	}
	st.reach()
	st.counters.segmentsWritten++
	release := st.releasable()
	st.notify()
	st.mu.Unlock()
	segmentBuffers.Put(b.buf) // no reader is left: they copy with mu held
	b.buf = nil
	if release > st.ringSize/8 {
		return st.releaseJournal(st.ctx)
	}
	return nil
}

// keepLines gives a segment that was just written to the flash cache.
func (st *Store) keepLines(b *builder) {
	for line := 0; line*LineBytes < b.fill; line++ {
		st.opt.Cache.Write(st.uuid, b.number, line, b.buf[line*LineBytes:(line+1)*LineBytes])
	}
}

// writeSegment writes the stripes that hold something: all others first, and the one with the
// trailer when they are durable. While the pool is full it tries again: the same bytes in the
// same place are no overwriting.
func (st *Store) writeSegment(n uint32, buf []byte, t *trailer) error {
	last := SegmentBytes - StripeBytes
	t.stripe = crc(buf[last:trailerOffset])
	t.encode(buf[trailerOffset:])
	for {
		err := st.writeStripes(n, buf, int(t.payload), t.tableOffset())
		if err == nil {
			st.setFull(false)
			return nil
		}
		if !errors.Is(err, target.ErrNoSpace) {
			return err
		}
		st.setFull(true)
		select {
		case <-time.After(250 * time.Millisecond):
		case <-st.ctx.Done():
			return st.ctx.Err()
		}
	}
}

func (st *Store) setFull(full bool) {
	st.mu.Lock()
	if st.full != full {
		st.full = full
		st.notify()
		if full {
			st.opt.Logger.Warn("the shelf's pool is full: writes are refused until space is free")
		}
	}
	st.mu.Unlock()
}

func (st *Store) writeStripes(n uint32, buf []byte, payload, table int) error {
	base := int64(n) * SegmentBytes
	write := func(ctx context.Context, off int) error {
		if err := st.opt.Segments.WriteAt(ctx, buf[off:off+StripeBytes], base+int64(off)); err != nil {
			return fmt.Errorf("store: segment %d: write stripe %d: %w", n, off/StripeBytes, err)
		}
		return nil
	}
	g, ctx := errgroup.WithContext(st.ctx)
	g.SetLimit(stripesAtOnce)
	const last = SegmentBytes - StripeBytes
	for off := 0; off < last; off += StripeBytes {
		if off < payload || off+StripeBytes > table {
			g.Go(func() error { return write(ctx, off) })
		}
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return write(st.ctx, last)
}

// releasable is how many bytes of the ring a superblock would free. mu is held.
func (st *Store) releasable() uint64 { return st.startOf(st.sealedTo.seq) - st.tail }

// startOf is where in the ring the first record is whose seq is not below seq. mu is held.
func (st *Store) startOf(seq uint64) uint64 {
	i, _ := slices.BinarySearchFunc(st.records, seq, func(r ringRecord, seq uint64) int { return cmp.Compare(r.seq, seq) })
	if i < len(st.records) {
		return st.records[i].start
	}
	return st.head
}

// releaseJournal writes a superblock in which the journal begins at the first record that is
// still needed, and gives the space before it back to the ring.
func (st *Store) releaseJournal(ctx context.Context) error {
	var tail uint64
	if err := st.writeSuper(ctx, func(s *superblock) { tail = st.journalStart(s) }); err != nil {
		return err
	}
	st.dropRecords(tail)
	return nil
}

// journalStart sets where the journal begins, and returns it as an address that only grows.
func (st *Store) journalStart(s *superblock) (tail uint64) {
	st.mu.RLock()
	defer st.mu.RUnlock()
	seq, tail := st.current.seq, st.head
	for _, r := range st.records {
		if r.seq >= st.sealedTo.seq {
			seq, tail = r.seq, r.start
			break
		}
	}
	s.jSeq, s.jStart, s.jEpoch, s.logTo = seq, tail%st.ringSize, st.epoch, st.logTo
	return tail
}

func (st *Store) dropRecords(tail uint64) {
	st.mu.Lock()
	defer st.mu.Unlock()
	for len(st.records) > 0 && st.records[0].start < tail {
		st.records = st.records[1:]
	}
	st.tail = max(st.tail, tail)
	st.notify()
}
