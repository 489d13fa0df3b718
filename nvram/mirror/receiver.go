package mirror

import (
	"errors"
	"fmt"

	"github.com/ledge-storage/ledge/nvram"
)

// errRegion: the mirror's own medium failed. The connection ends; the owner goes solo.
var errRegion = errors.New("mirror: region error")

// receiver is the standby's side: it offers what the mirror holds, then does what comes, strictly in order. The
// reader queues; one goroutine writes.
type receiver struct {
	c     *conn
	queue chan message
}

// receiveQueue bounds the frames that wait to be written: the owner's Window bounds their bytes.
const receiveQueue = 64

func newReceiver(c *conn) *receiver {
	r := &receiver{c: c, queue: make(chan message, receiveQueue)}
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
	select {
	case r.queue <- m:
	case <-r.c.ctx.Done():
		m.release()
	}
	return nil
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
	started := false
	for {
		select {
		case m := <-r.queue:
			if r.c.ctx.Err() != nil {
				return
			}
			err := r.apply(m, started)
			m.release()
			started = true
			if err != nil {
				r.c.close(err)
				return
			}
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
		return r.c.post(outgoing{kind: msgReady})
	case msgFrame:
		next, err := mir.Write(m.lsn, m.off, m.frame.Bytes())
		if err != nil {
			return regionError(err)
		}
		return r.c.post(outgoing{kind: msgAck, payload: le.AppendUint64(nil, next)})
	case msgTrim:
		return regionError(mir.Trim(getPositions(m.payload)))
	}
	lsn := le.Uint64(m.payload)
	if err := mir.MarkComplete(lsn); err != nil {
		return regionError(err)
	}
	return r.c.post(outgoing{kind: msgCompleted, payload: le.AppendUint64(nil, lsn)})
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
