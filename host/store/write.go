package store

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/ledge-storage/ledge/host/meter"
	"github.com/ledge-storage/ledge/target"
)

// The path of a write, in this order:
//
//  1. Stage: the blocks are copied and become visible in the volume's dirty map, and the entries join
//     the current batch. Both under one lock, so that the order of requests is the order of the log.
//  2. journalLoop: whatever has gathered while the record before was on its way becomes the next
//     record (group commit); up to journalPipeline records are on their way at once.
//  3. finish: records become durable in order only. A record that came through before its
//     predecessor waits, because recovery stops at the first record that is missing.
//  4. Wait: the request is acknowledged. A reader that met the block before this point waits too: what
//     was read once is never unread by a crash.
//  5. pack.go: the packer takes the durable batch.

// pending is a block, or a longer range of zeros, that is in no segment yet.
type pending struct {
	b    *batch
	unit uint64
	lba  uint64
	n    uint64
	data []byte // nil: zeros
}

func (p *pending) position() position { return position{p.b.seq, p.unit} }

// batch is a record in the making, on its way, or waiting for the packer.
type batch struct {
	seq     uint64
	base    uint64 // units at the record's beginning that segments hold already (recovery)
	ops     []op
	vols    []*Volume // of each op; nil: an op on the volume itself
	units   uint64
	payload int
	memory  int64
	written bool
	durable bool
	since   time.Time     // it waits for the packer
	done    chan struct{} // closed when durable, or when err says that it never will be
	err     error
}

func newBatch(seq uint64) *batch { return &batch{seq: seq, done: make(chan struct{})} }

// ringRecord is a record's place in the ring; start grows for ever.
type ringRecord struct{ seq, start uint64 }

// Ticket is a staged write.
type Ticket struct {
	batches []*batch
	meter   *meter.Volume // nil: not counted
	queued  time.Duration
}

// Queued adds what the write waited before Stage to what it waited there.
func (t *Ticket) Queued(d time.Duration) { t.queued += d }

// Wait returns when the write is durable. If ctx ends first, it may or may not become so.
func (t *Ticket) Wait(ctx context.Context) error {
	if m := t.meter; m != nil {
		m.WriteQueue.Add(t.queued)
		defer func(start time.Duration) { m.Journal.Add(m.Now() - start) }(m.Now())
	}
	for _, b := range t.batches {
		select {
		case <-b.done:
			if b.err != nil {
				return b.err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func (t *Ticket) add(b *batch) {
	if n := len(t.batches); n == 0 || t.batches[n-1] != b {
		t.batches = append(t.batches, b)
	}
}

// Stage puts data, whole blocks, into the log from block lba on: reads see it from now on, and
// writes staged later come later in the log. It waits while the store's buffers are full. More than
// RecordBytes are staged in parts: when one is refused, those before it stay written.
func (v *Volume) Stage(ctx context.Context, lba uint64, data []byte) (*Ticket, error) {
	if len(data)%BlockBytes != 0 {
		return nil, fmt.Errorf("store: write of %d bytes: %w", len(data), target.ErrAlignment)
	}
	t, st := &Ticket{meter: v.Meter()}, v.st
	for len(data) > 0 {
		n := min(len(data), st.opt.RecordBytes, (maxEntries-2)*BlockBytes)
		ops := splitZeros(v.id, lba, data[:n])
		if err := st.enqueue(ctx, v, lba, uint64(n/BlockBytes), ops, t); err != nil {
			return nil, err
		}
		data, lba = data[n:], lba+uint64(n/BlockBytes)
	}
	return t, nil
}

// AtomicBlocks is how many blocks Stage puts into one record: after a crash all of them are there, or none.
func (v *Volume) AtomicBlocks() int { return min(v.st.opt.RecordBytes/BlockBytes, maxEntries-2) }

// StageZeros makes n blocks from lba on read as zeros; they take no space afterwards.
func (v *Volume) StageZeros(ctx context.Context, lba, n uint64) (*Ticket, error) {
	t := new(Ticket)
	if n == 0 {
		return t, nil
	}
	t.meter = v.Meter()
	return t, v.st.enqueue(ctx, v, lba, n, []op{{kind: opZero, vol: v.id, lba: lba, count: n}}, t)
}

// Write is Stage and Wait.
func (v *Volume) Write(ctx context.Context, lba uint64, data []byte) error {
	t, err := v.Stage(ctx, lba, data)
	if err != nil {
		return err
	}
	return t.Wait(ctx)
}

// Zero is StageZeros and Wait.
func (v *Volume) Zero(ctx context.Context, lba, n uint64) error {
	t, err := v.StageZeros(ctx, lba, n)
	if err != nil {
		return err
	}
	return t.Wait(ctx)
}

// splitZeros copies data into ops, blocks of zeros as ranges without data.
func splitZeros(vol uint32, lba uint64, data []byte) []op {
	var ops []op
	for i := 0; i < len(data); i += BlockBytes {
		kind := opWrite
		if isZero(data[i : i+BlockBytes]) {
			kind = opZero
		}
		if n := len(ops); n > 0 && ops[n-1].kind == kind {
			ops[n-1].count++
		} else {
			ops = append(ops, op{kind: kind, vol: vol, lba: lba + uint64(i/BlockBytes), count: 1})
		}
	}
	for i := range ops {
		if o := &ops[i]; o.kind == opWrite {
			at := (o.lba - lba) * BlockBytes
			o.data = append([]byte(nil), data[at:at+o.count*BlockBytes]...)
		}
	}
	return ops
}

// enqueue stages the ops of one request on blocks lba… of v in one record.
func (st *Store) enqueue(ctx context.Context, v *Volume, lba, n uint64, ops []op, t *Ticket) error {
	payload, entries := 0, len(ops)
	for i := range ops {
		payload += ops[i].payload()
	}
	start := t.meter.Now()
	st.mu.Lock()
	defer st.mu.Unlock()
	if v.snapshot {
		return fmt.Errorf("store: %s is a snapshot: %w", v.name, target.ErrReadOnly)
	}
	ready := func() bool {
		switch {
		case st.closed || v.deleted || payload > 0 && st.full:
			return true
		case payload > 0 && st.short() && !st.recovering: // until what is buffered is packed, and the cleaner has made room, or cannot
			if st.starved() && st.gaveUp {
				return true
			}
			select {
			case st.wake <- struct{}{}:
			default:
			}
			return false
		}
		return st.room(entries, payload)
	}
	if err := st.wait(ctx, ready); err != nil {
		return err
	}
	t.queued += t.meter.Now() - start
	if st.closed {
		return ErrClosed
	}
	if v.deleted {
		return fmt.Errorf("store: volume %s is deleted: %w", v.name, target.ErrUnavailable)
	}
	if blocks := uint64(v.size) / BlockBytes; lba > blocks || n > blocks-lba {
		return fmt.Errorf("store: volume %s: blocks %d+%d of %d: %w", v.name, lba, n, blocks, target.ErrRange)
	}
	if payload > 0 {
		if err := st.admit(); err != nil {
			return err
		}
	}
	for _, o := range ops {
		st.stage(st.current, v, o)
	}
	t.add(st.current)
	st.notify()
	return nil
}

// room says whether the current batch and the buffer take entries more, with payload bytes.
func (st *Store) room(entries, payload int) bool {
	b := st.current
	return len(b.ops)+entries <= maxEntries && b.payload+payload <= st.opt.RecordBytes &&
		st.buffered+int64(payload) <= max(st.opt.BufferBytes, int64(payload)) && st.zeroRanges < mostZeroRanges
}

// short: there is no room for more, but for what is kept back. mu is held.
func (st *Store) short() bool {
	return int64(st.taken()+st.spare)*SegmentBytes+st.buffered >= st.opt.CapacityBytes
}

// starved: it is so with all that is buffered packed. mu is held.
func (st *Store) starved() bool {
	return int64(st.taken()+st.spare)*SegmentBytes >= st.opt.CapacityBytes
}

// taken is how many segments there are, and are to come for pages of maps. mu is held.
func (st *Store) taken() int { return len(st.segs) + st.ckptSegments + st.changedMaps() }

// admit checks that there is space. mu is held.
func (st *Store) admit() error {
	if st.full || st.short() {
		return fmt.Errorf("store: %d segments: %w", len(st.segs), target.ErrNoSpace)
	}
	if st.nextSegment+numbersKept*st.step >= st.numbers {
		return fmt.Errorf("store: segment number %d of %d: the LUN's numbers are used up: %w", st.nextSegment, st.numbers, target.ErrNoSpace)
	}
	return nil
}

// stage makes o visible and adds it to b. mu is held. Recovery stages what it finds the same way.
func (st *Store) stage(b *batch, v *Volume, o op) {
	unit := b.units
	switch {
	case o.kind == opWrite || o.kind == opZero && o.count <= smallZero:
		ps := make([]pending, o.count)
		for i := range ps {
			ps[i] = pending{b: b, unit: unit, lba: o.lba + uint64(i), n: 1}
			if o.kind == opWrite {
				ps[i].unit += uint64(i)
				ps[i].data = o.data[i*BlockBytes : (i+1)*BlockBytes : (i+1)*BlockBytes]
			}
			v.dirty[ps[i].lba] = &ps[i]
		}
	case o.kind == opZero:
		v.zeros = append(v.zeros, &pending{b: b, unit: unit, lba: o.lba, n: o.count})
		st.zeroRanges++
	case o.kind == opCopy || o.kind == opRollback:
		v.replacing++
		st.volumes[uint32(o.lba)].copying++
	}
	if o.kind != opWrite && (o.kind != opZero || o.count > smallZero) { // reads wait for it, or have to look whether it concerns them
		st.packTo = b.seq + 1
	}
	b.ops = append(b.ops, o)
	b.vols = append(b.vols, v)
	b.units += o.units()
	b.payload += o.payload()
	memory := int64(o.payload()) + 128
	b.memory += memory
	st.buffered += memory
}

// newest is what is pending for a block, or nil. mu is held, at least for reading.
func (v *Volume) newest(lba uint64) *pending {
	p := v.dirty[lba]
	for _, z := range v.zeros {
		if lba >= z.lba && lba-z.lba < z.n && (p == nil || p.position().less(z.position())) {
			p = z
		}
	}
	return p
}

// submit stages what f returns for volumes as such, and waits until it is durable. f is called
// with mu held, and changes what requests see.
func (st *Store) submit(ctx context.Context, f func() ([]op, error)) error {
	return st.submitMany(ctx, 1, f)
}

// submitMany is submit where f returns up to blocks ops with a description. They are in one record.
func (st *Store) submitMany(ctx context.Context, blocks int, f func() ([]op, error)) error {
	st.mu.Lock()
	if err := st.wait(ctx, func() bool { return st.closed || st.room(blocks+1, blocks*BlockBytes) }); err != nil {
		st.mu.Unlock()
		return err
	}
	if st.closed {
		st.mu.Unlock()
		return ErrClosed
	}
	ops, err := f()
	if err != nil {
		st.mu.Unlock()
		return fmt.Errorf("store: volume %w", err)
	}
	b := st.current
	for _, o := range ops {
		st.stage(b, st.volumes[o.vol], o)
	}
	st.notify()
	st.mu.Unlock()
	return (&Ticket{batches: []*batch{b}}).Wait(ctx)
}

// journalLoop writes batches to the ring, in order, several on their way at once.
func (st *Store) journalLoop() {
	st.mu.Lock()
	defer st.mu.Unlock()
	for {
		var pad, size uint64
		err := st.wait(st.ctx, func() bool {
			b := st.current
			if len(b.ops) == 0 || len(st.inflight) >= journalPipeline {
				return false
			}
			size = uint64(recordBytes(len(b.ops), b.payload))
			pad = 0
			if at := st.head % st.ringSize; at+size > st.ringSize {
				pad = st.ringSize - at
			}
			return st.head+pad+size-st.tail <= st.ringSize
		})
		if err != nil {
			return
		}
		b := st.current
		st.current = newBatch(b.seq + 1)
		st.inflight = append(st.inflight, b)
		start := st.head
		st.records = append(st.records, ringRecord{b.seq, start})
		st.head += pad + size
		st.notify()
		st.wg.Go(func() { st.finish(b, st.writeRecord(b, start, pad, int(size))) })
	}
}

// recordBuffers are reused: fresh pages for every record cost more than filling them.
var recordBuffers = sync.Pool{New: func() any { return new([]byte) }}

// writeRecord writes b's record at start of the ring, after pad bytes at the ring's end.
func (st *Store) writeRecord(b *batch, start, pad uint64, size int) error {
	r := record{uuid: st.uuid, epoch: st.epoch, seq: b.seq}
	buf := recordBuffers.Get().(*[]byte)
	defer recordBuffers.Put(buf)
	if cap(*buf) < size {
		*buf = make([]byte, roundUp(size, 64<<10))
	}
	p := (*buf)[:size]
	if pad > 0 {
		r.advance = pad
		r.encode(p[:BlockBytes])
		if err := st.writeRing(p[:BlockBytes], start); err != nil {
			return err
		}
	}
	r.advance, r.ops = uint64(size), b.ops
	r.encode(p[:size])
	return st.writeRing(p[:size], start+pad)
}

func (st *Store) writeRing(p []byte, at uint64) error {
	off := ringOffset + int64(at%st.ringSize)
	if err := st.opt.Journal.WriteAt(st.ctx, p, off); err != nil {
		return fmt.Errorf("store: journal write of %d bytes at %d: %w", len(p), off, err)
	}
	return nil
}

// finish acknowledges, in order, what is durable now that b's write has returned.
func (st *Store) finish(b *batch, err error) {
	if err != nil {
		st.fail(err)
		return
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	b.written = true
	now := time.Now()
	st.counters.journalBytes += int64(recordBytes(len(b.ops), b.payload))
	for len(st.inflight) > 0 && st.inflight[0].written && st.err == nil {
		d := st.inflight[0]
		st.inflight = st.inflight[1:]
		d.durable, d.since = true, now
		close(d.done)
		st.queue = append(st.queue, d)
	}
	st.notify()
}
