package nvramtest

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/ledge-storage/ledge/nvram"
)

// Partner is a Replicator without a network: it feeds an nvram.Mirror in the same process, over a link that the
// test cuts.
type Partner struct {
	// AckEarly makes it a liar: it acknowledges frames before they are durable.
	AckEarly bool

	mu      sync.Mutex
	mirror  *nvram.Mirror
	up      bool
	feed    *nvram.Feed
	session *nvram.Session
	stop    chan struct{}
	wake    chan struct{}
	done    sync.WaitGroup
}

// NewPartner with the link up, if m is not nil.
func NewPartner(m *nvram.Mirror) *Partner {
	return &Partner{mirror: m, up: m != nil, wake: make(chan struct{}, 1)}
}

// Attach implements nvram.Replicator.
func (p *Partner) Attach(f *nvram.Feed) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.feed, p.stop = f, make(chan struct{})
	stop := p.stop
	p.done.Go(func() { p.run(f, stop) })
}

// Detach implements nvram.Replicator.
func (p *Partner) Detach() {
	p.mu.Lock()
	close(p.stop)
	p.end()
	p.mu.Unlock()
	p.done.Wait()
}

// Cut takes the link down, Connect brings it up, with the mirror of a standby that restarted if m is not nil.
// When Cut returns the mirror may still get what is under way.
func (p *Partner) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.up = false
	p.end()
}

// Connect brings the link up.
func (p *Partner) Connect(m *nvram.Mirror) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if m != nil {
		p.mirror = m
	}
	p.up = true
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

func (p *Partner) end() {
	if p.session != nil {
		p.session.End(errors.New("nvramtest: link cut"))
	}
}

func (p *Partner) run(f *nvram.Feed, stop chan struct{}) {
	for {
		p.mu.Lock()
		m := p.mirror
		if !p.up {
			m = nil
		}
		p.mu.Unlock()
		if m != nil {
			p.serve(f, m, stop)
		}
		select {
		case <-stop:
			return
		case <-p.wake:
		case <-time.After(time.Millisecond):
		}
	}
}

// serve runs one session.
func (p *Partner) serve(f *nvram.Feed, m *nvram.Mirror, stop chan struct{}) {
	s, st, err := f.Begin(m.State())
	if err != nil {
		return
	}
	p.mu.Lock()
	p.session = s
	if !p.up {
		p.end()
	}
	select {
	case <-stop:
		p.end()
	default:
	}
	p.mu.Unlock()
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	if err := m.Begin(st); err != nil {
		cancel(err)
	}
	for ctx.Err() == nil {
		it, err := s.Next()
		if err == nil {
			err = p.apply(s, m, &it)
			it.Release()
		}
		if err != nil {
			cancel(err)
		}
	}
	s.End(context.Cause(ctx))
}

func (p *Partner) apply(s *nvram.Session, m *nvram.Mirror, it *nvram.Item) error {
	switch it.Kind {
	case nvram.ItemTrim:
		return m.Trim(it.Tail)
	case nvram.ItemComplete:
		if err := m.MarkComplete(it.LSN); err != nil {
			return err
		}
		return s.Complete(it.LSN)
	}
	if p.AckEarly {
		s.Acked(it.LSN + 1)
	}
	next, err := m.Write(it.LSN, it.Off, it.Frame)
	if err == nil {
		s.Acked(next)
	}
	return err
}

// Witness is a pool's members: it remembers what they say.
type Witness struct {
	mu            sync.Mutex
	solo          bool
	lsn           uint64
	fail          error
	half          bool
	entered, left int
}

// EnterSolo implements nvram.Witness.
func (w *Witness) EnterSolo(_ context.Context, lsn uint64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.fail == nil || w.half {
		if !w.solo || lsn < w.lsn {
			w.solo, w.lsn = true, lsn
		}
		w.entered++
	}
	return w.fail
}

// LeaveSolo implements nvram.Witness.
func (w *Witness) LeaveSolo(context.Context) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.fail == nil || w.half {
		w.solo = false
		w.left++
	}
	return w.fail
}

// SetFail makes every call fail with err (nil: work again); half: what it records happens all the same.
func (w *Witness) SetFail(err error, half bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fail, w.half = err, half
}

// Solo is what the members say.
func (w *Witness) Solo() (bool, uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.solo, w.lsn
}

// Counts of successful calls.
func (w *Witness) Counts() (entered, left int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.entered, w.left
}
