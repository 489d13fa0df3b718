package nvram

import (
	"context"
	"fmt"
	"slices"
)

// The path of an Append:
//
//  1. Append measures the sets and queues a request.
//  2. While fewer than Pipeline records are in flight, a caller leads: it takes every queued request that
//     fits into one record (take), gives it an LSN and its place in the lane.
//  3. Outside the lock it copies the payload into the record's buffer and seals it (build). The one copy
//     there is: it makes the record one aligned write, and the caller's buffers free on return.
//  4. The record is ready: the feed sends it to the partner while the leader writes it to the own region.
//  5. advance (ack.go) acknowledges in LSN order what is durable in both, or here alone when solo.
//
// The leader is the caller itself where nobody waits, so one writer alone changes no goroutine. When a record
// is acknowledged, the first request in the queue is told to lead the next: all that came meanwhile share it.
// A dedicated goroutine that builds records was the other design; it costs two switches per Append.

// The queues, the one that is served first is first.
const (
	classUpdate = iota
	classInternal
	classWrite
	classes
)

// request is one Append. Its channel gets at most one order to lead and one result.
type request struct {
	sets    []Set
	class   int
	extents int
	blocks  int
	queued  bool // Log.mu
	ch      chan result
}

type result struct {
	lead bool
	lsn  uint64
	err  error
}

func newRequest() any { return &request{ch: make(chan result, 2)} }

func (q *request) finish(lsn uint64, err error) {
	q.queued = false
	q.ch <- result{lsn: lsn, err: err}
}

// record is a record in flight. Log.mu guards ready, local and refs.
type record struct {
	header
	off   uint64
	buf   *Buffer
	reqs  []*request
	ready bool // sealed
	local bool // durable in the own region
	refs  int
}

// Append makes all sets durable as one record, whole or not at all, and returns its LSN; all of them are of one
// lane. ctx bounds the wait for room: an error from it means that nothing was written. ErrTooLarge and
// ErrInvalid refuse the sets. After any other error the outcome is unknown until the next Replay.
func (l *Log) Append(ctx context.Context, sets ...Set) (uint64, error) {
	q, err := l.measure(sets)
	if err != nil {
		return 0, err
	}
	l.mu.Lock()
	if l.err != nil || l.closed {
		defer l.mu.Unlock()
		return 0, fmt.Errorf("nvram: append: %w", l.cause())
	}
	l.found = nil
	q.queued = true
	l.queue[q.class] = append(l.queue[q.class], q)
	l.stats.Waiting++
	var g group
	if l.leader == nil {
		g = l.take()
	}
	l.mu.Unlock()
	l.write(g)
	return l.wait(ctx, q)
}

// wait until q is answered, leading when told to.
func (l *Log) wait(ctx context.Context, q *request) (uint64, error) {
	cancelled := ctx.Done()
	for {
		select {
		case r := <-q.ch:
			if r.lead {
				l.lead(q)
				continue
			}
			l.leave(q)
			return r.lsn, r.err
		case <-cancelled:
			l.mu.Lock()
			if !q.queued { // in a record: the answer comes
				cancelled = nil
				l.mu.Unlock()
				continue
			}
			q.queued = false
			i := slices.Index(l.queue[q.class], q)
			l.queue[q.class] = slices.Delete(l.queue[q.class], i, i+1)
			l.kick() // it may have been what did not fit
			l.mu.Unlock()
			l.leave(q)
			return 0, fmt.Errorf("nvram: append: wait for room: %w", ctx.Err())
		}
	}
}

// leave passes an order to lead on, and frees the request.
func (l *Log) leave(q *request) {
	l.mu.Lock()
	l.stats.Waiting--
	if l.leader == q {
		<-q.ch
		l.leader = nil
		l.kick()
	}
	l.mu.Unlock()
	clear(q.sets)
	q.sets = q.sets[:0]
	l.requests.Put(q)
}

func (l *Log) lead(q *request) {
	l.mu.Lock()
	l.leader = nil
	g := l.take()
	l.mu.Unlock()
	l.write(g)
}

// kick tells the first request that fits to lead, unless someone was told. Called with mu held.
func (l *Log) kick() {
	if l.leader != nil || l.flying >= l.opts.Pipeline || l.err != nil || l.closed {
		return
	}
	for c := range classes {
		if len(l.queue[c]) > 0 && l.fits(c) {
			l.leader = l.queue[c][0]
			l.leader.ch <- result{lead: true}
			return
		}
	}
}

// fits: the first request of the class would find room in its lane.
func (l *Log) fits(class int) bool {
	q := l.queue[class][0]
	n := headerBlocksFor(len(q.sets), q.extents) + q.blocks
	_, ok := l.lane[laneOf(class)].place(uint64(n)*BlockBytes, class == classWrite)
	return ok
}

func laneOf(class int) int {
	if class == classUpdate {
		return laneUpdate
	}
	return laneData
}

func (l *Log) measure(sets []Set) (*request, error) {
	if len(sets) == 0 {
		return nil, fmt.Errorf("nvram: append of no sets: %w", ErrInvalid)
	}
	blocks, extents, internal, update := 0, 0, 0, 0
	for i := range sets {
		n, err := sets[i].measure()
		if err != nil {
			return nil, fmt.Errorf("nvram: append: set %d: %w", i, err)
		}
		blocks += n
		extents += len(sets[i].Extents)
		switch k := sets[i].Kind; {
		case k >= KindUpdate:
			update++
		case k >= KindInternal:
			internal++
		}
	}
	class := classWrite
	switch {
	case update == len(sets):
		class = classUpdate
	case update != 0:
		return nil, fmt.Errorf("nvram: append of sets of both lanes: %w", ErrInvalid)
	case internal == len(sets):
		class = classInternal
	}
	if n, most := headerBlocksFor(len(sets), extents)+blocks, l.lane[laneOf(class)].maxRecordBlk; n > most {
		return nil, fmt.Errorf("nvram: append of %d blocks, a record has at most %d: %w", n, most, ErrTooLarge)
	}
	q := l.requests.Get().(*request)
	q.sets = append(q.sets[:0], sets...)
	q.class, q.extents, q.blocks = class, extents, blocks
	return q, nil
}

// group is what a leader writes: a record, and a pad before it where the lane wraps.
type group struct {
	pad, rec *record
}

// take forms the next record. Called with mu held.
func (l *Log) take() group {
	if l.flying >= l.opts.Pipeline || l.err != nil || l.closed {
		return group{}
	}
	for c := range classes {
		if len(l.queue[c]) > 0 && l.fits(c) {
			return l.form(c)
		}
	}
	return group{}
}

// form makes a record of the class's first request and of all that still fit beside it; a record of internal
// sets takes host writes along. Called with mu held; the first request fits.
func (l *Log) form(class int) group {
	ln := &l.lane[laneOf(class)]
	rec := &record{refs: 1}
	sets, extents, blocks, total := 0, 0, 0, 0
	last := class
	if class == classInternal {
		last = classWrite
	}
	for c := class; c <= last; c++ {
		n := 0
		for _, q := range l.queue[c] {
			s, e, b := sets+len(q.sets), extents+q.extents, blocks+q.blocks
			t := headerBlocksFor(s, e) + b
			if len(rec.reqs) > 0 {
				_, ok := ln.place(uint64(t)*BlockBytes, c == classWrite)
				if !ok || t > ln.maxRecordBlk || int64(t)*BlockBytes > l.opts.GroupBytes {
					break
				}
			}
			sets, extents, blocks, total = s, e, b, t
			q.queued = false
			rec.reqs = append(rec.reqs, q)
			n++
		}
		l.queue[c] = dropFirst(l.queue[c], n)
	}
	var g group
	if pad, _ := ln.place(uint64(total)*BlockBytes, false); pad > 0 {
		g.pad = &record{refs: 1}
		g.pad.header = l.number(laneOf(class), g.pad, pad)
		g.pad.pad, g.pad.headerBlocks = true, 1
	}
	rec.header = l.number(laneOf(class), rec, uint64(total)*BlockBytes)
	rec.headerBlocks = uint32(headerBlocksFor(sets, extents))
	rec.sets, rec.extents = uint32(sets), uint32(extents)
	g.rec = rec
	l.flying++
	l.writers.Add(1)
	l.stats.Records++
	l.stats.Sets += uint64(sets)
	l.stats.PayloadBytes += uint64(blocks) * BlockBytes
	l.kick()
	return g
}

// dropFirst keeps the queue's array: it is reused.
func dropFirst(q []*request, n int) []*request {
	if n == 0 {
		return q
	}
	m := copy(q, q[n:])
	clear(q[m:])
	return q[:m]
}

// number gives rec the next LSN and n bytes of the lane. Called with mu held.
func (l *Log) number(lane int, rec *record, n uint64) header {
	if len(l.pending) == 0 && l.acked == l.next {
		l.partner.since = l.opts.Clock.Now()
	}
	frame := uint32(n / BlockBytes)
	if rec.reqs == nil {
		frame = 1
	}
	p := l.lane[lane].push(l.next, n, frame, rec)
	rec.off = p.Off
	l.pending = append(l.pending, rec)
	l.next++
	return header{lane: uint8(lane), lsn: p.LSN, seq: p.Seq, id: l.sb.id, epoch: l.sb.epoch, run: l.sb.run, acked: l.acked, blocks: uint32(n / BlockBytes)}
}

// write builds the group's records, shows them to the feed, and makes them durable here.
func (l *Log) write(g group) {
	if g.rec == nil {
		return
	}
	defer l.writers.Done()
	if g.pad != nil {
		g.pad.seal(nil)
	}
	g.rec.seal(g.rec.reqs)
	l.mu.Lock()
	if g.pad != nil {
		g.pad.ready = true
	}
	g.rec.ready = true
	var send func() bool
	if s := l.partner.session; s != nil {
		send = s.ready
	}
	if send == nil {
		l.changed.Broadcast()
	}
	if l.closed || l.err != nil {
		g.rec.abandon(l.cause())
	}
	l.mu.Unlock()
	if send != nil && !send() {
		l.mu.Lock()
		l.changed.Broadcast()
		l.mu.Unlock()
	}
	for _, r := range []*record{g.pad, g.rec} {
		if r == nil {
			continue
		}
		_, err := l.region.WriteAt(r.buf.b, l.ringOff(r.off))
		l.mu.Lock()
		if err == nil {
			r.local = true
			l.advance()
		} else {
			l.fail(fmt.Errorf("write lsn %d: %w", r.lsn, err))
		}
		l.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (l *Log) ringOff(off uint64) int64 { return l.area.Off + superBlocks*BlockBytes + int64(off) }

// seal builds the frame. It runs outside the lock: nobody else has the record before it is ready.
func (r *record) seal(reqs []*request) {
	r.buf = GetBuffer(int(r.frameBlocks()))
	r.build(r.buf.b, reqs)
}

// release drops one reference. Called with mu held.
func (r *record) release() {
	if r.refs--; r.refs == 0 {
		r.buf.Put()
		r.buf = nil
	}
}
