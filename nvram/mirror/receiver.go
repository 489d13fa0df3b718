package mirror

import (
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/ledge-storage/ledge/nvram"
)

// errRegion: the mirror's own medium failed. The connection ends; the owner goes solo.
var errRegion = errors.New("mirror: region error")

// receiver is the standby's side: it offers what the mirror holds, then does what comes, strictly in order. The
// reader queues and one goroutine writes, so that the next frames come in while one is written; but where no more is
// there to be read the reader writes itself: one frame alone is durable and answered without a change of goroutine.
type receiver struct {
	c     *conn
	queue chan message
	// waiting are messages that are queued or being done: who finds it zero has the mirror, and started, for itself.
	waiting atomic.Int64
	started bool
	// unanswered are frames that are durable and not acknowledged yet, ackEvery at most.
	unanswered int
	durable    uint64 // all below are
}

// ackEvery bounds how many frames one acknowledgement covers, so what a slow medium adds to the first one's wait.
const ackEvery = 4

// receiveQueue bounds the frames that wait to be written: the owner's Window bounds their bytes.
const receiveQueue = 64

func newReceiver(c *conn) *receiver {
	r := &receiver{c: c, queue: make(chan message, receiveQueue)}
	r.waiting.Store(1) // the offer
	c.parts.Go(r.run)
	return r
}

// handle queues the owner's messages, on the reader.
func (r *receiver) handle(m message) error {
	switch m.kind {
	case msgStart, msgFrame, msgTrim, msgComplete:
	default:
		return fmt.Errorf("%w: message type %d out of turn", ErrProtocol, m.kind)
	}
	if r.waiting.Load() == 0 && r.c.in.buffered() < headerBytes {
		return r.do(m)
	}
	r.waiting.Add(1)
	select {
	case r.queue <- m:
	case <-r.c.ctx.Done():
		m.release()
	}
	return nil
}

// do does one message.
func (r *receiver) do(m message) error {
	err := r.apply(m, r.started)
	m.release()
	r.started = true
	return err
}

func (m *message) release() {
	if m.frame != nil {
		m.frame.Put()
		m.frame = nil
	}
}

func (r *receiver) run() {
	state := r.c.mirror.State()
	state.Epoch = max(state.Epoch, r.c.self.epoch)
	if err := r.c.post(outgoing{kind: msgOffer, payload: encodeOffer(state)}); err != nil {
		return
	}
	r.waiting.Add(-1)
	for {
		select {
		case m := <-r.queue:
			if r.c.ctx.Err() != nil {
				return
			}
			if err := r.do(m); err != nil {
				r.c.close(err)
				return
			}
			r.waiting.Add(-1)
		case <-r.c.ctx.Done():
			return
		}
	}
}

// apply does one message and answers it.
func (r *receiver) apply(m message, started bool) error {
	mir := r.c.mirror
	if (m.kind == msgStart) == started {
		return fmt.Errorf("%w: message type %d out of turn", ErrProtocol, m.kind)
	}
	switch m.kind {
	case msgStart:
		st, err := decodeStart(m.payload)
		if err != nil {
			return err
		}
		if st.Epoch < r.c.self.epoch {
			return fmt.Errorf("mirror: session at epoch %d, this controller saw %d: %w", st.Epoch, r.c.self.epoch, nvram.ErrStale)
		}
		if err := mir.Begin(st); err != nil {
			return regionError(err)
		}
		return r.c.answer(outgoing{kind: msgReady})
	case msgFrame:
		next, err := mir.Write(m.lsn, m.off, m.frame.Bytes())
		if err != nil {
			return regionError(err)
		}
		r.durable = next
		if r.unanswered++; len(r.queue) > 0 && r.unanswered < ackEvery { // the next answer says this, too
			return nil
		}
		return r.acknowledge()
	case msgTrim:
		if err := mir.Trim(getPositions(m.payload)); err != nil {
			return regionError(err)
		}
		return r.acknowledge()
	}
	if err := r.acknowledge(); err != nil {
		return err
	}
	lsn := le.Uint64(m.payload)
	if err := mir.MarkComplete(lsn); err != nil {
		return regionError(err)
	}
	return r.c.answer(outgoing{kind: msgCompleted, payload: le.AppendUint64(nil, lsn)})
}

// acknowledge says what is durable, if that was not said yet.
func (r *receiver) acknowledge() error {
	if r.unanswered == 0 {
		return nil
	}
	r.unanswered = 0
	return r.c.answer(outgoing{kind: msgAck, payload: le.AppendUint64(nil, r.durable)})
}

// regionError marks what is neither the owner's fault nor nvram's verdict.
func regionError(err error) error {
	for _, known := range []error{nvram.ErrStale, nvram.ErrTooLarge, nvram.ErrInvalid, nvram.ErrCorrupt} {
		if errors.Is(err, known) {
			return err
		}
	}
	if err == nil {
		return nil
	}
	return fmt.Errorf("%w: %w", errRegion, err)
}
