package shelf

import (
	"context"
	"fmt"
	"time"

	"github.com/ledge-storage/ledge/target"
)

// Admission: a write waits here, and only here, for room.
//
// Why not leave the waiting to log.Append? An Append in flight holds Trim at its floor (lsn.go): its record
// may already be on the media. An Append that waited for room inside the log would hold Trim below the very
// records that must go to give it room, and the pool would stand still. So a write is admitted by the log's
// figures first, and takes its floor only when there is room for its record (twice its size: it may meet
// the end of the ring).
//
// What bounds the wait: destage needs no admission. Its map changes have the log's reserve, its redo images
// a lane of their own, so it always goes on, oldest blocks first when the log is nearly full, and each round
// moves the tail.

// overheadBlocks is what a record adds to the blocks of one write: its header, a delta block, the
// rounding of the extent list.
const overheadBlocks = 3

// pollRoom bounds the wait for a Trim that the log carries out later.
const pollRoom = 5 * time.Millisecond

// admit waits for room for a record of that many blocks of payload and entries of the overlay, and takes it.
// release gives it back once the record is in the log and the entries are in the overlay.
func (p *Pool) admit(ctx context.Context, payload, entries int) error {
	n := int64(payload+overheadBlocks) * blockBytes
	stalled := false
	for {
		p.mu.Lock()
		if p.err != nil {
			p.mu.Unlock()
			return p.alive()
		}
		if p.closing {
			p.mu.Unlock()
			return fmt.Errorf("shelf: the pool is being closed: %w", target.ErrTransition)
		}
		if p.room(n, entries) {
			p.inflight += n
			p.mu.Unlock()
			if !p.opts.Inline && p.pressure() >= startAt {
				p.wake()
			}
			return nil
		}
		if !stalled {
			stalled = true
			p.stats.Stalls++
		}
		w := make(chan struct{})
		p.waiters = append(p.waiters, w)
		p.mu.Unlock()
		if err := p.makeRoom(ctx, w); err != nil {
			return err
		}
	}
}

// makeRoom waits for a Trim, or destages here when nobody does in the background.
func (p *Pool) makeRoom(ctx context.Context, w chan struct{}) error {
	if p.opts.Inline {
		worked, err := p.destageRound(ctx, needRoom)
		if err != nil || worked {
			return err
		}
	}
	p.wake()
	t := time.NewTimer(pollRoom)
	defer t.Stop()
	select {
	case <-w:
	case <-t.C:
	case <-p.failed:
	case <-p.log.Failed():
		p.fail(fmt.Errorf("shelf: log: %w", p.log.Err()))
	case <-ctx.Done():
		return fmt.Errorf("shelf: wait for room: %w", ctx.Err())
	}
	return nil
}

// room tells whether n bytes and that many entries fit. Called with mu held.
func (p *Pool) room(n int64, entries int) bool {
	s := p.log.Stats()
	return s.Used+2*(p.inflight+n) <= s.Bytes-s.Reserve && p.over.entries+entries <= p.opts.OverlayBlocks
}

func (p *Pool) release(payload int) {
	p.mu.Lock()
	p.inflight -= int64(payload+overheadBlocks) * blockBytes
	if p.closing {
		p.wakeWaiters()
	}
	p.mu.Unlock()
}

// wakeWaiters lets all waiters look again. Called with mu held.
func (p *Pool) wakeWaiters() {
	for _, w := range p.waiters {
		close(w)
	}
	p.waiters = p.waiters[:0]
}

// wake starts the background goroutine on a round.
func (p *Pool) wake() {
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

// pressure is how full the log and the overlay are, the fuller of both, from 0 to 1. What the log is about to trim
// does not count: it does so a little later.
func (p *Pool) pressure() float64 {
	s := p.log.Stats()
	p.mu.Lock()
	defer p.mu.Unlock()
	left := 1.0
	if p.trimmed > s.Tail && s.Next > s.Tail {
		left = float64(s.Next-min(p.trimmed, s.Next)) / float64(s.Next-s.Tail)
	}
	used := (float64(s.Used)*left + float64(p.inflight)) / float64(max(1, s.Bytes-s.Reserve))
	return max(used, float64(p.over.entries)/float64(p.opts.OverlayBlocks))
}
