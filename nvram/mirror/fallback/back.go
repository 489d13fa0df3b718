package fallback

import (
	"context"
	"net"
	"time"
)

// backing is the way back to the window while another connection, nc, is up.
type backing struct {
	nc     net.Conn
	cancel context.CancelFunc
	ended  chan struct{}
}

// Better gives connections through the window that are to take the place of the one in use: for mirror.Options, where Dial is.
func (t *Transport) Better() <-chan net.Conn { return t.better }

// goBack asks on the window from time to time, until ctx ends, which it does with the connection that is up.
func (t *Transport) goBack(ctx context.Context) {
	for {
		t.mu.Lock()
		wait := max(min(t.o.Back<<min(t.relapse, 16), t.o.MostBack), time.Until(t.rest))
		t.mu.Unlock()
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
		nc, err := t.dialWindow(ctx, t.o.Answer)
		if err != nil {
			continue
		}
		c := nc.(*conn)
		select {
		case t.better <- c:
		case <-ctx.Done():
			c.Close()
			return
		}
		t.o.Logger.Info("the mirror link goes back to its window")
		select {
		case <-c.over: // it was not authenticated
		case <-ctx.Done():
			return
		}
	}
}

// stopBack ends that, so that the window is free for who dials.
func (t *Transport) stopBack() {
	t.mu.Lock()
	b := t.back
	t.mu.Unlock()
	if b == nil {
		return
	}
	b.cancel()
	<-b.ended
	t.mu.Lock()
	t.back = nil
	t.mu.Unlock()
}
