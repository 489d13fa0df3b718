package mirror

import (
	"bufio"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ledge-storage/ledge/nvram"
)

// Reasons in a Refuse.
const (
	refuseProtocol = 1 + iota
	refuseStale
	refuseSize
	refuseRegion
)

// buffersWriter is a connection that is no socket and writes several buffers at once all the same (package window).
type buffersWriter interface {
	WriteBuffers(bufs [][]byte) (int64, error)
}

// outgoing is a message to send. A frame's record follows the payload and is released once sent.
type outgoing struct {
	kind    messageType
	payload []byte
	item    *nvram.Item
}

// batchBytes go out in one write at most, but for a frame that is longer: each write has Timeout to end.
const batchBytes = 1 << 20

func (o *outgoing) size() int {
	if o.item == nil {
		return len(o.payload)
	}
	return len(o.payload) + len(o.item.Frame)
}

// conn is one connection, from its handshake to its end.
type conn struct {
	link   *Link
	nc     net.Conn
	in     decoder
	turn   uint64
	self   hello
	peer   hello
	feed   *nvram.Feed
	mirror *nvram.Mirror

	// wmu is held by whoever writes to nc; it guards the fields below.
	wmu        sync.Mutex
	sent       uint64 // messages
	heads      []byte
	vec        net.Buffers
	writeUntil time.Time // the deadline that is set
	// queued counts what was posted and is not written: who finds it zero may write itself and overtakes nothing of its own.
	queued atomic.Int64

	readUntil time.Time // the reader's

	ctx    context.Context
	cancel context.CancelCauseFunc
	out    chan outgoing
	over   chan struct{} // closed when nothing of it runs any more
	parts  sync.WaitGroup
}

// serve runs a connection to its end.
func (l *Link) serve(nc net.Conn) (err error) {
	if l.opts.Watch != nil {
		defer func() { l.opts.Watch.Down(nc, fault(err)) }()
	}
	c := &conn{link: l, nc: nc, out: make(chan outgoing, 64), over: make(chan struct{})}
	c.ctx, c.cancel = context.WithCancelCause(l.ctx)
	stop := context.AfterFunc(c.ctx, c.hurry)
	defer func() {
		c.close(errClosed)
		stop()
		nc.Close()
	}()
	if err := c.greet(); err != nil {
		return fmt.Errorf("%s: %w", nc.RemoteAddr(), err)
	}
	if !l.adopt(c) {
		return errRole
	}
	err = c.run()
	close(c.over)
	return err
}

// fault is err, where the transport, or a stranger at its other end, may be why the connection ended. The partner's own end
// of it (io.EOF) is none: each of its changes of role is one.
func fault(err error) error {
	var ne net.Error
	if errors.Is(err, ErrAuth) || errors.Is(err, ErrProtocol) || errors.As(err, &ne) {
		return err
	}
	return nil
}

// close ends the connection for a reason; the first counts.
func (c *conn) close(err error) { c.cancel(err) }

// hurry ends what the connection waits for, but leaves the writer time for a last word.
func (c *conn) hurry() {
	c.nc.SetReadDeadline(time.Unix(1, 0))
	c.nc.SetWriteDeadline(time.Now().Add(c.link.opts.Timeout / 4))
}

// await sets the deadline of the next read.
func (c *conn) await() {
	now, timeout := time.Now(), c.link.opts.Timeout
	if c.readUntil.Sub(now) > timeout*7/8 { // to move a deadline costs more than to look at the clock
		return
	}
	c.readUntil = now.Add(timeout)
	c.nc.SetReadDeadline(c.readUntil)
	if c.ctx.Err() != nil { // hurry came before
		c.hurry()
	}
}

// greet is the handshake: Hello and Proof both ways, nothing else, within the timeout.
func (c *conn) greet() error {
	l := c.link
	l.mu.Lock()
	c.turn, c.feed, c.mirror = l.turn, l.feed, l.mirror
	c.self = hello{controller: l.opts.Self, role: l.role, epoch: l.epoch, shelf: l.opts.Shelf}
	l.mu.Unlock()
	rand.Read(c.self.nonce[:])
	if err := c.nc.SetDeadline(time.Now().Add(l.opts.Timeout)); err != nil {
		return fmt.Errorf("mirror: handshake: %w", err)
	}
	c.in.r = bufio.NewReaderSize(spinning(c.nc, l.opts.Spinner), 64<<10)
	mine := c.self.encode()
	if err := c.send(msgHello, mine); err != nil {
		return err
	}
	m, err := c.in.next()
	if err != nil {
		return err
	}
	if m.kind != msgHello {
		return fmt.Errorf("%w: message type %d instead of a hello", ErrProtocol, m.kind)
	}
	if c.peer, err = decodeHello(m.payload); err != nil {
		return err
	}
	switch {
	case c.peer.shelf != c.self.shelf:
		return fmt.Errorf("%w: partner is of shelf %q, this is %q", ErrAuth, c.peer.shelf, c.self.shelf)
	case c.peer.controller == c.self.controller:
		return fmt.Errorf("%w: partner says it is controller %c, too", ErrAuth, c.peer.controller)
	}
	if err := c.send(msgProof, c.proof(c.self.controller, mine, m.payload)); err != nil {
		return err
	}
	p, err := c.in.next()
	if err != nil {
		return err
	}
	if p.kind != msgProof || !hmac.Equal(p.payload, c.proof(c.peer.controller, m.payload, mine)) {
		return fmt.Errorf("%w: wrong proof", ErrAuth)
	}
	c.in.open = true
	return c.nc.SetDeadline(time.Time{})
}

func (c *conn) proof(sender byte, sent, received []byte) []byte {
	h := hmac.New(sha256.New, c.link.opts.Secret)
	h.Write([]byte("ledge mirror 1"))
	h.Write([]byte{sender})
	h.Write(sent)
	h.Write(received)
	return h.Sum(nil)
}

// send writes one message at once: in the handshake, and a last word.
func (c *conn) send(t messageType, payload []byte) error {
	b := make([]byte, headerBytes, headerBytes+len(payload))
	c.sent++
	putHeader(b, t, c.sent, len(payload), payload)
	if _, err := c.nc.Write(append(b, payload...)); err != nil {
		return fmt.Errorf("mirror: write: %w", err)
	}
	return nil
}

// run is the connection after the handshake: a reader (this goroutine), a writer, and the role's part.
func (c *conn) run() error {
	c.in.wait = c.await
	c.parts.Go(c.writer)
	var handle func(message) error
	switch {
	case c.self.role == roleOwner && c.peer.role == roleStandby:
		handle = newOwner(c).handle
	case c.self.role == roleStandby && c.peer.role == roleOwner:
		handle = newReceiver(c).handle
	default:
		handle = func(m message) error {
			return fmt.Errorf("%w: message type %d between %s and %s", ErrProtocol, m.kind, c.self.role, c.peer.role)
		}
	}
	for c.ctx.Err() == nil {
		m, err := c.in.next()
		if err == nil {
			err = c.take(m, handle)
		}
		if err != nil {
			c.close(err)
		}
	}
	err := context.Cause(c.ctx)
	c.parts.Wait()
	c.link.abandon(c, err)
	return err
}

// take handles what both roles do.
func (c *conn) take(m message, handle func(message) error) error {
	switch m.kind {
	case msgHeartbeat:
		return nil
	case msgControl:
		kind, body, err := decodeControl(m.payload)
		if err == nil && c.link.opts.OnControl != nil {
			c.link.event(c.ctx, func() { c.link.opts.OnControl(kind, body) })
		}
		return err
	case msgRefuse:
		err := fmt.Errorf("%w: %s", ErrRefused, m.payload[1:])
		if m.payload[0] == refuseStale {
			err = fmt.Errorf("%w: %w", err, nvram.ErrStale)
		}
		return err
	}
	return handle(m)
}

// post queues a message.
func (c *conn) post(o outgoing) error {
	c.queued.Add(1)
	select {
	case c.out <- o:
		return nil
	case <-c.ctx.Done():
		return context.Cause(c.ctx)
	}
}

// answer sends a small message from the caller's goroutine if the socket is free, else it queues it.
func (c *conn) answer(o outgoing) error {
	if c.queued.Load() != 0 || !c.wmu.TryLock() {
		return c.post(o)
	}
	defer c.wmu.Unlock()
	return c.write([]outgoing{o})
}

// writer sends what is queued, all that is there in one writev, and a heartbeat when there was nothing.
func (c *conn) writer() {
	beat := time.NewTicker(c.link.opts.Heartbeat)
	defer beat.Stop()
	var batch []outgoing
	for {
		batch = batch[:0]
		select {
		case o := <-c.out:
			batch = append(batch, o)
		case <-beat.C:
			c.queued.Add(1)
			batch = append(batch, outgoing{kind: msgHeartbeat})
		case <-c.ctx.Done():
			c.farewell()
			return
		}
		for size := batch[0].size(); len(batch) < cap(c.out) && len(c.out) > 0 && size < batchBytes; size += batch[len(batch)-1].size() {
			batch = append(batch, <-c.out)
		}
		c.wmu.Lock()
		err := c.write(batch)
		c.wmu.Unlock()
		c.queued.Add(-int64(len(batch)))
		if err != nil {
			return
		}
	}
}

// write sends messages in one writev and releases their frames. An error ends the connection. Called with wmu held.
func (c *conn) write(batch []outgoing) error {
	if n := len(batch) * headerBytes; cap(c.heads) < n {
		c.heads = make([]byte, n)
	}
	vec := c.vec[:0]
	for i, o := range batch {
		h := c.heads[i*headerBytes:][:headerBytes]
		c.sent++
		putHeader(h, o.kind, c.sent, o.size(), o.payload)
		vec = append(vec, h)
		if len(o.payload) > 0 {
			vec = append(vec, o.payload)
		}
		if o.item != nil {
			vec = append(vec, o.item.Frame)
		}
	}
	c.vec = vec
	now, timeout := time.Now(), c.link.opts.Timeout
	if c.writeUntil.Sub(now) < timeout*7/8 && c.ctx.Err() == nil {
		c.writeUntil = now.Add(timeout)
		c.nc.SetWriteDeadline(c.writeUntil)
		if c.ctx.Err() != nil { // hurry came before
			c.hurry()
		}
	}
	var err error
	if w, ok := c.nc.(buffersWriter); ok {
		_, err = w.WriteBuffers(vec)
	} else {
		_, err = vec.WriteTo(c.nc)
	}
	for i := range batch {
		if it := batch[i].item; it != nil {
			it.Release()
		}
	}
	if err != nil {
		err = fmt.Errorf("mirror: write: %w", err)
		c.close(err)
	}
	return err
}

// farewell tells the partner why, if it is the partner's fault or concern. The socket may be closed already.
func (c *conn) farewell() {
	err := context.Cause(c.ctx)
	code := byte(0)
	switch {
	case errors.Is(err, ErrRefused), errors.Is(err, nvram.ErrSlow):
		return
	case errors.Is(err, nvram.ErrStale):
		code = refuseStale
	case errors.Is(err, nvram.ErrTooLarge):
		code = refuseSize
	case errors.Is(err, ErrProtocol), errors.Is(err, nvram.ErrInvalid), errors.Is(err, nvram.ErrCorrupt):
		code = refuseProtocol
	case errors.Is(err, errRegion):
		code = refuseRegion
	default:
		return
	}
	text := err.Error()
	c.wmu.Lock()
	defer c.wmu.Unlock()
	c.nc.SetWriteDeadline(time.Now().Add(c.link.opts.Timeout / 4))
	_ = c.send(msgRefuse, append([]byte{code}, text[:min(len(text), maxSmall-1)]...)) // the connection ends either way
}
