package sim

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// The link between the controllers: connections as TCP gives them over a bad cable. Bytes arrive late, in order, or not
// at all for as long as the cable is cut; a connection is reset, or its far end vanishes without a word; what an earlier
// connection said is said again on a new one.

// sendBuffer is how many bytes may be on their way in one direction. A writer that finds it full is told at once that its
// time is over, instead of when it is: it holds a mutex, and virtual time stands still while another waits for that.
const sendBuffer = 1 << 20

var errReset = errors.New("sim: connection reset")

// wire is the cable. A listens, B dials.
type wire struct {
	count func(string)
	// latency of the next bytes: the wire's own, and what the seed adds.
	latency func() time.Duration

	mu       sync.Mutex // guards all below and all halves
	changed  chan struct{}
	cut      bool
	listener *listener
	ends     []*end
	// recorded is what B said first on its connections, the last of them.
	recorded []byte
}

func newWire(count func(string), latency func() time.Duration) *wire {
	return &wire{count: count, latency: latency, changed: make(chan struct{})}
}

// wake lets all that wait look again. mu is held.
func (w *wire) wake() {
	close(w.changed)
	w.changed = make(chan struct{})
}

// setCut takes the cable out, or puts it in again; what is on its way waits.
func (w *wire) setCut(cut bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.cut != cut {
		w.cut = cut
		w.wake()
	}
}

// reset ends all connections, at both ends; what is on its way is lost.
func (w *wire) reset() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, e := range w.ends {
		e.out.reset = true
	}
	w.ends = nil
	w.wake()
}

// vanish ends what a controller whose power went had: its partner is told nothing.
func (w *wire) vanish(self byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, e := range w.ends {
		if e.owner == self {
			e.gone = true
			e.in.reset = true // for those of its own who still read
		}
	}
	w.wake()
}

// half is one direction.
type half struct {
	queue  []parcel
	bytes  int
	last   time.Time
	closed bool // by the writer: the reader gets EOF behind the queue
	deaf   bool // the reader closed
	reset  bool
}

type parcel struct {
	b  []byte
	at time.Time
}

// end is one end of a connection.
type end struct {
	w       *wire
	owner   byte
	in, out *half
	gone    bool // the owner's power went
	record  bool

	// guarded by w.mu
	readBy, writeBy time.Time
	shut            bool
}

func (w *wire) pair(dialer, listener byte) (d, l *end) {
	x, y := new(half), new(half)
	d = &end{w: w, owner: dialer, in: x, out: y}
	l = &end{w: w, owner: listener, in: y, out: x}
	w.ends = append(w.ends, d, l)
	return d, l
}

// until waits for a change, or the earlier of the times that are set. mu is held before and after.
func (w *wire) until(times ...time.Time) {
	changed := w.changed
	var first time.Time
	for _, t := range times {
		if !t.IsZero() && (first.IsZero() || t.Before(first)) {
			first = t
		}
	}
	w.mu.Unlock()
	defer w.mu.Lock()
	if first.IsZero() {
		<-changed
		return
	}
	t := time.NewTimer(time.Until(first))
	defer t.Stop()
	select {
	case <-changed:
	case <-t.C:
	}
}

func past(t time.Time) bool { return !t.IsZero() && !time.Now().Before(t) }

func (e *end) Read(p []byte) (int, error) {
	w, h := e.w, e.in
	w.mu.Lock()
	defer w.mu.Unlock()
	for {
		switch {
		case e.shut:
			return 0, net.ErrClosed
		case h.reset:
			return 0, errReset
		case past(e.readBy):
			return 0, os.ErrDeadlineExceeded
		case len(p) == 0:
			return 0, nil
		}
		var arrival time.Time
		switch {
		case w.cut:
		case len(h.queue) > 0 && past(h.queue[0].at):
			n := copy(p, h.queue[0].b)
			if h.queue[0].b = h.queue[0].b[n:]; len(h.queue[0].b) == 0 {
				h.queue = h.queue[1:]
			}
			h.bytes -= n
			return n, nil
		case len(h.queue) > 0:
			arrival = h.queue[0].at
		case h.closed:
			return 0, io.EOF
		}
		w.until(arrival, e.readBy)
	}
}

func (e *end) Write(p []byte) (int, error) {
	w, h := e.w, e.out
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case e.shut:
		return 0, net.ErrClosed
	case e.gone, h.reset, h.deaf && !w.cut:
		return 0, errReset
	case past(e.writeBy), h.bytes >= sendBuffer:
		return 0, os.ErrDeadlineExceeded
	}
	if len(p) == 0 {
		return 0, nil
	}
	if e.record && len(w.recorded) < 64<<10 {
		w.recorded = append(w.recorded, p...)
	}
	at := time.Now().Add(w.latency())
	if at.Before(h.last) {
		at = h.last
	}
	h.last = at
	if n := len(h.queue); n > 0 && h.queue[n-1].at.Equal(at) {
		h.queue[n-1].b = append(h.queue[n-1].b, p...)
	} else {
		h.queue = append(h.queue, parcel{append([]byte(nil), p...), at})
	}
	h.bytes += len(p)
	w.wake()
	return len(p), nil
}

// Close sends what is on its way and then the end, unless the power went.
func (e *end) Close() error {
	e.w.mu.Lock()
	defer e.w.mu.Unlock()
	e.shut = true
	e.in.deaf = true
	if !e.gone {
		e.out.closed = true
	}
	e.w.wake()
	return nil
}

func (e *end) SetReadDeadline(t time.Time) error {
	e.w.mu.Lock()
	defer e.w.mu.Unlock()
	e.readBy = t
	e.w.wake()
	return nil
}

func (e *end) SetWriteDeadline(t time.Time) error {
	e.w.mu.Lock()
	defer e.w.mu.Unlock()
	e.writeBy = t
	return nil
}

func (e *end) SetDeadline(t time.Time) error {
	return errors.Join(e.SetReadDeadline(t), e.SetWriteDeadline(t))
}

type address string

func (address) Network() string  { return "sim" }
func (a address) String() string { return string(a) }

func (e *end) LocalAddr() net.Addr  { return address(e.owner) }
func (e *end) RemoteAddr() net.Addr { return address("partner") }

// listener is A's.
type listener struct {
	w      *wire
	queue  chan *end
	closed chan struct{}
	once   sync.Once
}

func (w *wire) listen() *listener {
	l := &listener{w: w, queue: make(chan *end, 16), closed: make(chan struct{})}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.listener = l
	return l
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case e := <-l.queue:
		return e, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error {
	l.once.Do(func() {
		l.w.mu.Lock()
		defer l.w.mu.Unlock()
		if l.w.listener == l {
			l.w.listener = nil
		}
		close(l.closed)
		for {
			select {
			case e := <-l.queue:
				e.in.deaf, e.out.reset = true, true
			default:
				l.w.wake()
				return
			}
		}
	})
	return nil
}

func (l *listener) Addr() net.Addr { return address("A") }

// dial is B's.
func (w *wire) dial(ctx context.Context) (net.Conn, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.cut {
		changed := w.changed
		w.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
		}
		w.mu.Lock()
		if err := ctx.Err(); err != nil {
			return nil, err
		}
	}
	if w.listener == nil {
		return nil, errors.New("sim: connection refused")
	}
	d, l := w.pair('B', 'A')
	select {
	case w.listener.queue <- l:
	default:
		return nil, errors.New("sim: connection refused: backlog full")
	}
	d.record, w.recorded = true, nil
	return d, nil
}

// replay says on a new connection what B said before. Nobody reads the answers.
func (w *wire) replay() bool {
	w.mu.Lock()
	said := append([]byte(nil), w.recorded...)
	var e *end
	if w.listener != nil && !w.cut && len(said) > 0 {
		d, l := w.pair('B', 'A')
		select {
		case w.listener.queue <- l:
			e = d
		default:
		}
	}
	w.mu.Unlock()
	if e == nil {
		return false
	}
	for len(said) > 0 {
		n := min(len(said), sendBuffer/2)
		if _, err := e.Write(said[:n]); err != nil {
			break
		}
		said = said[n:]
	}
	return true
}
