package mirror

import (
	"context"
	"errors"
	"fmt"
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

// step sends the session's next item, once the window has room.
func (o *owner) step(s *nvram.Session) error {
	it, err := s.Next()
	if err != nil {
		return err
	}
	switch it.Kind {
	case nvram.ItemTrim:
		return o.c.post(outgoing{kind: msgTrim, payload: appendPositions(nil, it.Tail)})
	case nvram.ItemComplete:
		return o.c.post(outgoing{kind: msgComplete, payload: le.AppendUint64(nil, it.LSN)})
	}
	o.launch(it.LSN, int64(len(it.Frame)))
	payload := le.AppendUint64(make([]byte, 0, frameHead), it.LSN)
	return o.c.post(outgoing{kind: msgFrame, payload: le.AppendUint64(payload, it.Off), item: &it})
}

// launch waits for room in the window.
func (o *owner) launch(lsn uint64, size int64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for o.flying > 0 && o.flying+size > o.c.link.opts.Window && o.c.ctx.Err() == nil {
		o.moved.Wait()
	}
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
