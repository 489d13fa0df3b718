package nvram

import (
	"fmt"
)

// Replicator carries the log to the partner (nvram/mirror implements it, tests have their own). It pulls:
// Open calls Attach once, the replicator reads records from a Session of the Feed at its own pace, and tells
// what became durable there. Detach returns when it will not touch the feed any more.
type Replicator interface {
	Attach(f *Feed)
	Detach()
}

// Pulling, rather than being pushed to, makes resync and live mirroring one thing: a cursor over LSNs. Records
// go to the partner strictly in order, whether they are read from the region (resync) or still in memory, so the
// mirror is at every moment a prefix of the log, and a partner that lost the link for a second goes on where
// it was. Copying in the background beside live frames was the other design: its mirror has holes, which
// need a map of their own to be durable.

// Feed is the log as its Replicator sees it.
type Feed struct {
	log *Log
}

// Epoch of the owner.
func (f *Feed) Epoch() uint64 { return f.log.opts.Epoch }

// Start is what the owner tells the standby at the start of a session.
type Start struct {
	ID          ID
	Epoch       uint64
	Run, RunLSN uint64
	Bytes       [2]uint64 // of the lanes
	Tail        [2]Position
	Full        bool        // the mirror's content is void: it is filled from the tails
	Resume      uint64      // the lowest LSN that may be sent
	Head        [2]Position // where the lanes go on
}

// Session is one connection's worth of feeding. Next, or Wait and TryNext: the caller sees to it that items are taken
// and sent in one order. Only one goroutine calls Next or Wait; the others may be called from any.
type Session struct {
	log    *Log
	err    error  // Log.mu guards all below
	cursor uint64 // all live records below were sent
	tails  [lanes]Position
	acked  uint64
	// join is the LSN below which the partner must have all before it counts; 0 before acknowledgements wait for it.
	join     uint64
	asked    bool // ItemComplete was sent
	passEnd  uint64
	passLeft int64
	stash    *Item       // taken by wait, not yet given
	ready    func() bool // OnReady
}

// ItemKind tells what an Item is.
type ItemKind int

const (
	ItemFrame    ItemKind = iota // LSN, Off, Frame
	ItemTrim                     // Tail: the tails moved; before any frame that reuses the room
	ItemComplete                 // LSN: the partner has all below once it has what was sent; it notes so, durably
)

// Item is the next thing to send.
type Item struct {
	Kind     ItemKind
	Tail     [2]Position
	LSN, Off uint64
	Frame    []byte // valid until Release

	log *Log
	rec *record
	buf *Buffer
}

// Release gives the frame back.
func (it *Item) Release() {
	if it.rec != nil {
		it.log.mu.Lock()
		defer it.log.mu.Unlock()
	}
	it.drop()
}

// drop is Release with mu held.
func (it *Item) drop() {
	switch {
	case it.rec != nil:
		it.rec.release()
	case it.buf != nil:
		it.buf.Put()
	}
	it.rec, it.buf, it.Frame = nil, nil, nil
}

// ErrSoloFirst refuses a session that would void a mirror on which acknowledged writes may rely, until solo is
// recorded; that is under way, so Begin is to be called again soon.
var ErrSoloFirst = fmt.Errorf("%w: it must be filled anew, and solo is being recorded first", ErrStale)

// Begin starts a session with a partner whose mirror is m. The session before it, if any, ends. ErrStale: the
// partner saw a newer epoch than this owner's. ErrSoloFirst: again, a little later.
//
// The mirror goes on where it is (Full false) exactly when its content is known to be a prefix of this log that
// reaches the tails: same log, complete, and of this run, or of the run before and then only up to this run's
// first LSN. Anything else is void.
func (f *Feed) Begin(m MirrorState) (*Session, Start, error) {
	l := f.log
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil || l.closed {
		return nil, Start{}, l.cause()
	}
	sb := &l.sb
	if m.Epoch > sb.epoch {
		return nil, Start{}, fmt.Errorf("nvram: own epoch %d, partner saw epoch %d: %w", sb.epoch, m.Epoch, ErrStale)
	}
	l.drop(fmt.Errorf("%w: replaced by another session", ErrClosed))
	st := Start{
		ID: sb.id, Epoch: sb.epoch, Run: sb.run, RunLSN: sb.runLSN, Bytes: sb.bytes, Tail: sb.tail,
		Full: true, Head: sb.tail, Resume: min(sb.tail[laneData].LSN, sb.tail[laneUpdate].LSN),
	}
	next := m.Next
	if m.Run+1 == sb.run {
		next = min(next, sb.runLSN)
	}
	if m.Complete && m.ID == sb.id && m.Bytes == sb.bytes && (m.Run == sb.run || m.Run+1 == sb.run) && next >= sb.maxTail() && next <= l.next {
		st.Full, st.Resume = false, next
	}
	p := &l.partner
	if st.Full && !p.solo && !p.fresh && !l.virgin() {
		p.forced = true
		l.poke(l.wake)
		return nil, Start{}, ErrSoloFirst
	}
	s := &Session{log: l, tails: sb.tail, cursor: st.Resume}
	if !st.Full {
		s.acked = next
		for i := range lanes {
			st.Head[i] = l.lane[i].at(next)
		}
	}
	p.session, p.synced, p.mirrored = s, false, 0
	l.opts.Logger.Info("nvram mirror session", "log", l.id, "full", st.Full, "resume", st.Resume, "next", l.next)
	return s, st, nil
}

// virgin: nothing was ever acknowledged by this log. Called with mu held. That nothing acknowledged is in it now does not do:
// the members would say that the partner's mirror is as good as the log, and it would not be.
func (l *Log) virgin() bool { return l.sb.run == 1 && l.acked == l.sb.runLSN }

// Next waits for the next item. Its error ends the session: ErrSlow, ErrClosed, or what End was given.
func (s *Session) Next() (Item, error) {
	l := s.log
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := s.wait(); err != nil {
		return Item{}, err
	}
	it := *s.stash
	s.stash = nil
	return it, nil
}

// Wait waits until TryNext has something to give. Its error is the one of Next.
func (s *Session) Wait() error {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	return s.wait()
}

// wait fills the stash. Called with mu held.
func (s *Session) wait() error {
	for s.stash == nil {
		it, ok, err := s.poll(true)
		switch {
		case err != nil:
			return err
		case ok:
			s.stash = &it
		case s.stash == nil:
			s.log.changed.Wait()
		}
	}
	return s.ended()
}

// TryNext gives the next item if it is there at once, in memory, and its frame has at most most bytes. Without an
// item size is 0, or what the frame has that is too large.
func (s *Session) TryNext(most int64) (it Item, size int64, ok bool, err error) {
	l := s.log
	l.mu.Lock()
	defer l.mu.Unlock()
	if s.stash == nil {
		var got Item
		if got, ok, err = s.poll(false); !ok {
			return Item{}, 0, false, err
		}
		s.stash = &got
	}
	if err := s.ended(); err != nil {
		return Item{}, 0, false, err
	}
	if size = int64(len(s.stash.Frame)); size > most {
		return Item{}, size, false, nil
	}
	it, s.stash = *s.stash, nil
	return it, size, true, nil
}

// OnReady has f called when a record became ready to be sent, by the goroutine that appends it and before it writes to
// its own region: to send it from there saves a change of goroutine on the way of every write. f answers whether
// all that was there is sent or someone is about to; otherwise Wait and Next are woken.
func (s *Session) OnReady(f func() bool) {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	s.ready = f
}

// ended is why the session is over. Called with mu held.
func (s *Session) ended() error {
	if s.err != nil {
		return s.err
	}
	if s.log.err != nil || s.log.closed {
		return s.log.cause()
	}
	return nil
}

// poll looks for the next item; with read also in the region, for which it drops mu. Called with mu held.
func (s *Session) poll(read bool) (Item, bool, error) {
	l := s.log
	for {
		if err := s.ended(); err != nil || s.stash != nil { // while mu was dropped TryNext may have found something too large
			return Item{}, false, err
		}
		if s.tails != l.sb.tail {
			s.tails = l.sb.tail
			return Item{Kind: ItemTrim, Tail: s.tails}, true, nil
		}
		e, lane := s.peek()
		if e == nil {
			s.cursor = l.next
		}
		if s.tryJoin(); s.join != 0 && s.cursor >= s.join && !s.asked {
			s.asked = true
			return Item{Kind: ItemComplete, LSN: s.join}, true, nil
		}
		switch {
		case e == nil:
		case e.rec == nil && read:
			if it, ok, err := s.read(*e, lane); err != nil || ok {
				return it, ok, err
			}
			continue
		case e.rec != nil && e.rec.ready:
			e.rec.refs++
			s.cursor = e.lsn + 1
			return Item{LSN: e.lsn, Off: e.off, Frame: e.rec.buf.b, log: l, rec: e.rec}, true, nil
		}
		return Item{}, false, nil
	}
}

// peek returns the live record with the lowest LSN that was not sent, or nil.
func (s *Session) peek() (*entry, int) {
	var best *entry
	lane := 0
	for i := range lanes {
		ln := &s.log.lane[i]
		if j := ln.find(s.cursor); j < len(ln.live) && (best == nil || ln.live[j].lsn < best.lsn) {
			best, lane = &ln.live[j], i
		}
	}
	return best, lane
}

// read gets a record that is in memory no more. Called with mu held, which it drops meanwhile; ok is false when a
// Trim freed the record under it.
func (s *Session) read(e entry, lane int) (Item, bool, error) {
	l := s.log
	buf := GetBuffer(int(e.frameBlocks))
	l.mu.Unlock()
	_, err := l.region.ReadAt(buf.b, l.ringOff(e.off))
	var h header
	if err == nil {
		h, err = decodeRecord(buf.b)
	}
	l.mu.Lock()
	if j := l.lane[lane].find(e.lsn); j == len(l.lane[lane].live) || l.lane[lane].live[j].lsn != e.lsn {
		buf.Put()
		return Item{}, false, nil
	}
	if err == nil && (h.lsn != e.lsn || h.id != l.id) {
		err = fmt.Errorf("%w: lsn %d of log %s found", ErrCorrupt, h.lsn, h.id)
	}
	if err != nil {
		buf.Put()
		return Item{}, false, fmt.Errorf("nvram: read lsn %d for the mirror: %w", e.lsn, err)
	}
	s.cursor = e.lsn + 1
	return Item{LSN: e.lsn, Off: e.off, Frame: buf.b, buf: buf}, true, nil
}

// joinBytes is a backlog that a link carries in moments.
const joinBytes = 1 << 20

// tryJoin makes acknowledgements wait for the partner again once little is left to send. When the writers outrun
// the link (a pass over the backlog did not halve it) they are held anyway: else resync might never end.
// In sync they wait already. Called with mu held.
func (s *Session) tryJoin() {
	l := s.log
	if s.join != 0 {
		return
	}
	p := &l.partner
	if !p.solo {
		s.join = l.next
		return
	}
	left := s.backlog()
	hold := left <= joinBytes
	if s.passEnd == 0 || s.cursor >= s.passEnd {
		hold = hold || s.passEnd != 0 && left > s.passLeft/2
		s.passEnd, s.passLeft = l.next, left
	}
	if hold {
		s.join = l.next
		p.joining = true
		p.since = l.opts.Clock.Now()
		l.advance()
	}
}

// backlog is how many bytes are to be sent yet. Called with mu held.
func (s *Session) backlog() int64 {
	n := int64(0)
	for i := range lanes {
		ln := &s.log.lane[i]
		if j := ln.find(s.cursor); j < len(ln.live) {
			d := int64(ln.head.Off) - int64(ln.live[j].off)
			if d <= 0 {
				d += int64(ln.size)
			}
			n += d
		}
	}
	return n
}

// Acked tells that all records below lsn are durable at the partner.
func (s *Session) Acked(lsn uint64) {
	l := s.log
	l.mu.Lock()
	defer l.mu.Unlock()
	s.acked = max(s.acked, min(lsn, s.cursor))
	if p := &l.partner; p.session == s && (p.synced || p.joining) {
		p.since = l.opts.Clock.Now()
		if p.synced {
			p.mirrored = s.acked
		}
		l.advance()
		if p.leave || p.joining {
			l.poke(l.wake)
		}
	}
}

// Complete answers ItemComplete: the partner has everything below lsn and has durably noted that it is complete.
func (s *Session) Complete(lsn uint64) error {
	l := s.log
	l.mu.Lock()
	defer l.mu.Unlock()
	p := &l.partner
	switch {
	case p.session != s:
		return s.err
	case !s.asked || lsn != s.join:
		return fmt.Errorf("nvram: partner complete below lsn %d, asked for %d: %w", lsn, s.join, ErrInvalid)
	}
	s.acked = max(s.acked, lsn)
	p.synced, p.leave = true, true
	p.mirrored = s.acked
	p.since = l.opts.Clock.Now()
	l.advance()
	l.poke(l.wake)
	return nil
}

// End ends the session: the connection is gone.
func (s *Session) End(err error) {
	l := s.log
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.partner.session == s {
		l.drop(err)
	}
}

// drop ends the current session. Called with mu held.
func (l *Log) drop(err error) {
	p := &l.partner
	if p.session == nil {
		return
	}
	if err == nil {
		err = ErrClosed
	}
	p.session.err = err
	if it := p.session.stash; it != nil {
		p.session.stash = nil
		it.drop()
	}
	p.session, p.synced, p.joining = nil, false, false
	l.changed.Broadcast()
	l.advance()
}
