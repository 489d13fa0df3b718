package mirror

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"time"

	"github.com/ledge-storage/ledge/nvram"
)

// owner is the feeding side of a connection: Offer → Begin, Start → Ready → what Session.Next gives.
type owner struct {
	c     *conn
	ready chan struct{}

	mu      sync.Mutex
	offered bool
	session *nvram.Session
	started bool
	// The window: LSNs sent and not acknowledged, with the bytes on their way.
	flying int64
	sizes  []flight
	moved  *sync.Cond

	turn  sync.Mutex // taken before conn.wmu, and that before mu
	batch []outgoing // guarded by turn
}

type flight struct {
	lsn  uint64
	size int64
}

func newOwner(c *conn) *owner {
	o := &owner{c: c, ready: make(chan struct{})}
	o.moved = sync.NewCond(&o.mu)
	context.AfterFunc(c.ctx, func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.moved.Broadcast()
		if o.session != nil {
			o.session.End(context.Cause(c.ctx))
		}
	})
	return o
}

// handle takes the standby's messages, on the reader.
func (o *owner) handle(m message) error {
	o.mu.Lock()
	s, offered, started := o.session, o.offered, o.started
	o.mu.Unlock()
	switch {
	case m.kind == msgOffer && !offered:
		state, err := decodeOffer(m.payload)
		if err != nil {
			return err
		}
		o.mu.Lock()
		o.offered = true
		o.mu.Unlock()
		o.c.parts.Go(func() { o.feed(state) })
		return nil
	case m.kind == msgReady && s != nil && !started:
		o.mu.Lock()
		o.started = true
		o.mu.Unlock()
		close(o.ready)
		return nil
	case m.kind == msgAck && started:
		lsn := le.Uint64(m.payload)
		o.landed(lsn)
		s.Acked(lsn)
		return nil
	case m.kind == msgCompleted && started:
		if err := s.Complete(le.Uint64(m.payload)); err != nil {
			return fmt.Errorf("%w: %w", ErrProtocol, err)
		}
		o.c.link.setSlow(0)
		return nil
	}
	return fmt.Errorf("%w: message type %d out of turn", ErrProtocol, m.kind)
}

// feed runs the session to its end.
func (o *owner) feed(state nvram.MirrorState) {
	s, err := o.begin(state)
	for err == nil {
		err = o.step(s)
	}
	if s != nil {
		s.End(err)
	}
	if errors.Is(err, nvram.ErrSlow) {
		o.c.link.setSlow(1)
	}
	o.c.close(err)
}

// begin waits out a partner that was too slow before, and for solo where the session needs it.
func (o *owner) begin(state nvram.MirrorState) (*nvram.Session, error) {
	pause := o.c.link.slowness()
	for {
		if !o.sleep(pause) {
			return nil, context.Cause(o.c.ctx)
		}
		s, start, err := o.c.feed.Begin(state)
		if errors.Is(err, nvram.ErrSoloFirst) {
			pause = 20 * time.Millisecond
			continue
		}
		if err != nil {
			return nil, err
		}
		o.mu.Lock()
		o.session = s
		o.mu.Unlock()
		if o.c.ctx.Err() != nil { // it ended before the session was there to be ended
			s.End(context.Cause(o.c.ctx))
		}
		if err := o.c.post(outgoing{kind: msgStart, payload: encodeStart(start)}); err != nil {
			return s, err
		}
		select {
		case <-o.ready:
			s.OnReady(o.prompt)
			return s, nil
		case <-o.c.ctx.Done():
			return s, context.Cause(o.c.ctx)
		}
	}
}

func (o *owner) sleep(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-o.c.ctx.Done():
		return false
	}
}

// A record goes to the partner from one of two goroutines. The one that appended it sends it before it writes to the
// own region, where little is on its way (prompt): a write alone changes no goroutine here. All else is the feed's: what
// is read back from the region, what finds the socket busy or the window full. turn is the right to take items and
// send them, so that they leave in the session's order.

// promptBytes bounds what may be on its way when a record's writer sends it: it must not be held up by a partner that
// does not read, before its own region has the record. A socket's buffer takes so much.
const promptBytes = 128 << 10

// prompt is called by the goroutine that made a record ready. It answers whether nothing is left for the feed to do.
func (o *owner) prompt() bool {
	if !o.turn.TryLock() {
		return false
	}
	defer o.turn.Unlock()
	if !o.c.wmu.TryLock() {
		return false
	}
	defer o.c.wmu.Unlock()
	held, more, err := o.send(promptBytes, promptBytes)
	return err == nil && held == 0 && !more
}

// step waits for something to send, and sends what there is.
func (o *owner) step(s *nvram.Session) error {
	if err := s.Wait(); err != nil {
		return err
	}
	o.turn.Lock()
	o.c.wmu.Lock()
	held, _, err := o.send(batchBytes, o.c.link.opts.Window)
	o.c.wmu.Unlock()
	o.turn.Unlock()
	if held > 0 && err == nil {
		o.await(held)
	}
	return err
}

// send takes what is there and fits into the window, up to about batch bytes, and writes it at once. held is the
// size of a frame that does not fit; more says that there may be more. Called with turn and wmu held.
func (o *owner) send(batch, window int64) (held int64, more bool, err error) {
	out, size := o.batch[:0], int64(0)
	for len(out) < maxBatch && size < batch {
		room := o.room(window)
		it, n, ok, nerr := o.session.TryNext(room)
		if !ok {
			held, err = n, nerr
			break
		}
		size += n
		g := outgoing{kind: msgFrame, item: &it}
		switch it.Kind {
		case nvram.ItemTrim:
			g = outgoing{kind: msgTrim, payload: appendPositions(nil, it.Tail)}
		case nvram.ItemComplete:
			g = outgoing{kind: msgComplete, payload: le.AppendUint64(nil, it.LSN)}
		default:
			o.launch(it.LSN, n)
			g.payload = le.AppendUint64(le.AppendUint64(make([]byte, 0, frameHead), it.LSN), it.Off)
		}
		out = append(out, g)
	}
	o.batch = out
	more = size >= batch || len(out) == maxBatch
	if len(out) > 0 {
		if werr := o.c.write(out); err == nil {
			err = werr
		}
	}
	return held, more, err
}

// maxBatch is how many messages one writev carries.
const maxBatch = 64

// room is how large a frame may be now: any, when none is on its way.
func (o *owner) room(window int64) int64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.flying == 0 && window == o.c.link.opts.Window {
		return math.MaxInt64
	}
	return max(window-o.flying, 0)
}

// await waits until the window has room for a frame, and a quarter more: so that small ones go out together.
func (o *owner) await(size int64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for o.flying > 0 && o.flying+size > o.c.link.opts.Window*3/4 && o.c.ctx.Err() == nil {
		o.moved.Wait()
	}
}

// launch counts a frame that is sent.
func (o *owner) launch(lsn uint64, size int64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.flying += size
	o.sizes = append(o.sizes, flight{lsn, size})
}

// landed frees the window of what is durable.
func (o *owner) landed(lsn uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	n := 0
	for n < len(o.sizes) && o.sizes[n].lsn < lsn {
		o.flying -= o.sizes[n].size
		n++
	}
	o.sizes = o.sizes[:copy(o.sizes, o.sizes[n:])]
	o.moved.Signal()
}

// A partner that held acknowledgements up until the log went solo is given more time each time before it may do
// so again: else a partner that limps would stall every write for MirrorTimeout, over and over.
const (
	slowFirst = time.Second
	slowMost  = time.Minute
)

// setSlow doubles the pause, or ends it (0).
func (l *Link) setSlow(by int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if by == 0 {
		l.slow = 0
		return
	}
	l.slow = min(max(2*l.slow, slowFirst), slowMost)
}

func (l *Link) slowness() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.slow
}
