package ha

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// The driver feeds the machine and performs its actions:
//
//	orders, messages, ticks, answers ──► events ──► loop: Step ──► immediate actions (Halt, Exit, Refuse, Done, Deny)
//	                                       ▲              └──► queue ──► worker: one action with I/O at a time, in order
//	                                       └───────────────────────────────────────┘ answer
//
// One goroutine, the loop, owns the state. The queue is first in, first out and one action runs at a time: that
// is what makes a look that was ordered after a fence a look after the fence. Halt does not queue: it must not
// wait for an action that hangs. Orders of the operator wait while actions are queued, so the queue is bounded
// by what one event can ask for.

const (
	maxQueue  = 16 // actions with I/O that wait
	maxEvents = 64 // events that wait
	maxOrders = 4  // operator's orders that wait
	maxBody   = 64 // bytes of a message between the drivers
)

// endLimit is how long Run waits at its end for actions that hang.
const endLimit = 5 * time.Second

type order struct {
	event Event
	spec  any
	reply chan error // buffered 1
}

// job is an action with the state that asked for it.
type job struct {
	op    Op
	state State
	spec  any
	nonce string // Drain: who asked answers to it
}

type message struct {
	event  Event
	order  *order
	answer bool   // from the worker: the action at the head of the queue ended
	kind   string // of the partner's message; empty: it is none
	body   []byte
}

// Driver runs one Machine. Run must be called once.
type Driver struct {
	o      Options
	events chan message
	done   chan struct{}

	mu    sync.Mutex // guards snap, last
	snap  State
	last  string
	since time.Time

	// Owned by the loop.
	state   State
	queue   []job
	busy    bool
	waiting []*order
	current *order
	asked   time.Time
	apart   time.Time // since when there is no link, while Asking; zero: there is, or nobody looked
	offered handshake
	quit    bool
	code    int
	tick    *time.Timer
	timeout *time.Timer

	// Owned by the worker.
	fencedAt time.Time

	wanted chan string // from the loop to the worker: the partner still wants the pool
	ended  chan struct{}
	sends  sync.WaitGroup // of tell; the loop adds
}

// New validates o and returns a driver that Run starts.
func New(o Options) (*Driver, error) {
	if o.Self != A && o.Self != B {
		return nil, fmt.Errorf("ha: controller %q is neither A nor B", byte(o.Self))
	}
	if o.Members == nil || o.Pool == nil || o.Mirror == nil || o.Gate == nil {
		return nil, errors.New("ha: members, pool, mirror and gate are required")
	}
	o.defaults()
	s := State{Self: o.Self}
	return &Driver{o: o, events: make(chan message, maxEvents), done: make(chan struct{}), wanted: make(chan string, 1),
		ended: make(chan struct{}), state: s, snap: s, since: time.Now()}, nil
}

// State is a snapshot for status, with the time since which the phase lasts and the last trouble in words.
func (d *Driver) State() (State, time.Time, string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.snap, d.since, d.last
}

// Takeover orders this controller to become owner, and waits until it is or refuses (ErrRefused).
func (d *Driver) Takeover(ctx context.Context) error { return d.takeover(ctx, false) }

// TakeoverLosing is Takeover, and where no log is left of what the owner acknowledged it gives that up: the pool is as it was
// destaged last, and what was acknowledged since is lost, also if the controller that has its log comes back later. Where Takeover would do,
// it loses nothing.
func (d *Driver) TakeoverLosing(ctx context.Context) error { return d.takeover(ctx, true) }

func (d *Driver) takeover(ctx context.Context, lose bool) error {
	return d.order(ctx, &order{event: Event{Kind: EvTakeover, Connected: d.o.Mirror.Connected(), Lose: lose}, reply: make(chan error, 1)})
}

// Create orders a new pool; spec goes to Pool.Form as it is.
func (d *Driver) Create(ctx context.Context, spec any) error {
	return d.order(ctx, &order{event: Event{Kind: EvCreate}, spec: spec, reply: make(chan error, 1)})
}

func (d *Driver) order(ctx context.Context, o *order) error {
	select {
	case d.events <- message{order: o}:
	case <-d.done:
		return ErrStopped
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-o.reply:
		return err
	case <-d.done:
		select {
		case err := <-o.reply:
			return err
		default:
			return ErrStopped
		}
	case <-ctx.Done():
		return fmt.Errorf("ha: the order goes on, its outcome is not known yet: %w", ctx.Err())
	}
}

// Message feeds a message of the partner. Unknown kinds and messages beyond the queue's limit are dropped: the
// partner's time-out covers both.
func (d *Driver) Message(kind string, body []byte) {
	m := message{kind: kind, event: Event{Kind: EvNothing}}
	switch kind {
	case MsgAsk:
		m.event.Kind = EvHandoverAsked
	case MsgDone:
		m.event.Kind = EvHandedOver
	case MsgDeny:
		m.event.Kind = EvHandoverDenied
	case MsgOffer, MsgAccept, MsgProgress:
	default:
		return
	}
	if len(body) <= maxBody {
		m.body = slices.Clone(body)
	}
	d.offer(m)
}

// Lost reports a reservation conflict that somebody met (the pool's data path).
func (d *Driver) Lost() { d.offer(message{event: Event{Kind: EvLost}}) }

// Broken reports that the log or the pool failed for another reason.
func (d *Driver) Broken() { d.offer(message{event: Event{Kind: EvBroken}}) }

// offer never blocks for long: what ends a process must get in, so EvLost and EvBroken shut the gate at once
// even before the loop sees them.
func (d *Driver) offer(m message) {
	if m.event.Kind == EvLost || m.event.Kind == EvBroken {
		d.o.Gate.Shut()
		select {
		case d.events <- m:
		case <-d.done:
		}
		return
	}
	select {
	case d.events <- m:
	default:
		d.o.Logger.Warn("ha: too many events; one dropped", "event", m.event.Kind.String())
	}
}

// Run drives the machine until ctx ends (code 0) or the machine asks to exit. It returns when no action is
// under way any more and the pool is closed or aborted, or after endLimit if that hangs: the process must end then.
func (d *Driver) Run(ctx context.Context) (code int) {
	defer close(d.done)
	inner, cancel := context.WithCancel(context.WithoutCancel(ctx))
	work := make(chan job)
	var wg sync.WaitGroup
	wg.Go(func() { d.worker(inner, work) })
	wg.Go(func() { d.confirmer(inner) })
	d.tick = time.NewTimer(time.Hour)
	d.timeout = time.NewTimer(time.Hour)
	d.timeout.Stop()
	d.apply(message{event: Event{Kind: EvStart}})
	for !d.quit {
		var out chan job
		var head job
		if len(d.queue) > 0 && !d.busy {
			out, head = work, d.queue[0]
		} else if len(d.queue) == 0 && !d.busy && len(d.waiting) > 0 {
			o := d.waiting[0]
			d.waiting = d.waiting[1:]
			d.apply(message{event: o.event, order: o})
			continue
		}
		select {
		case out <- head:
			d.busy = true
			d.queue = d.queue[1:]
		case m := <-d.events:
			d.apply(m)
		case <-d.tick.C:
			d.apply(message{event: Event{Kind: EvTick}})
		case <-d.timeout.C:
			d.apply(message{event: Event{Kind: EvTimeout}})
		case <-ctx.Done():
			d.quit = true
		}
	}
	if d.code == 0 && d.state.Phase == Owner {
		d.stopOwner()
	}
	d.o.Gate.Seal()
	d.tick.Stop()
	d.timeout.Stop()
	cancel()
	// Abort and the worker may hang on a drive. They are waited for, but not for ever: a fenced owner must end.
	go func() {
		d.o.Pool.Abort()
		wg.Wait()
		d.sends.Wait()
		close(d.ended)
	}()
	patience := time.NewTimer(endLimit)
	defer patience.Stop()
	for waiting := true; waiting; {
		select {
		case m := <-d.events: // the worker's answer, which nobody needs, or an order
			if m.order != nil {
				m.order.reply <- ErrStopped
			}
		case <-d.ended:
			waiting = false
		case <-patience.C:
			d.o.Logger.Error("ha: an action hangs; ending without it")
			waiting = false
		}
	}
	for _, o := range append(d.waiting, d.current) {
		if o != nil {
			o.reply <- ErrStopped
		}
	}
	return d.code
}

// Ended is closed when nothing that Run began is under way any more: that may be later than Run's return, if an action hangs.
func (d *Driver) Ended() <-chan struct{} { return d.ended }

// stopOwner ends an owner that was told to stop: what can be destaged in a short while is, the rest stays in
// the log for the next start.
func (d *Driver) stopOwner() {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	d.o.Pool.Transition()
	d.o.Gate.Quiesce()
	if err := d.o.Pool.Drain(ctx); err != nil {
		d.o.Logger.Info("stopping: not all was destaged; the log keeps the rest", "err", err)
	}
}

// apply is one step: state, then actions.
func (d *Driver) apply(m message) {
	if m.answer {
		d.busy = false
	}
	if m.kind != "" && !d.handshake(&m) {
		return
	}
	if m.event.Kind == EvTick && d.alone() {
		m.event.Kind = EvTimeout
	}
	if m.order != nil && (d.busy || len(d.queue) > 0) {
		if len(d.waiting) >= maxOrders {
			m.order.reply <- fmt.Errorf("%w: too many orders wait", ErrRefused)
			return
		}
		d.waiting = append(d.waiting, m.order)
		return
	}
	if m.order != nil {
		d.mu.Lock()
		d.last = "" // what failed before is not the cause of what this order meets
		d.mu.Unlock()
		m.event = m.order.event
		if m.event.Kind == EvTakeover {
			m.event.Connected = d.o.Mirror.Connected()
		}
	}
	was := d.state
	next, actions := was.Step(m.event)
	d.state = next
	if m.event.Kind == EvLooked {
		d.logLook(was, m.event.View)
	}
	if was.Phase != next.Phase {
		d.o.Logger.Info("ha: "+was.Phase.String()+" → "+next.Phase.String(), "event", m.event.Kind.String(), "labels", next.Seen.String())
	}
	d.publish(was)
	if m.order != nil && !answers(actions) {
		d.current = m.order
	}
	for _, a := range actions {
		d.act(a, m.order)
	}
}

func answers(actions []Action) bool {
	for _, a := range actions {
		if a.Op == Refuse || a.Op == Done {
			return true
		}
	}
	return false
}

// act performs what is immediate and queues the rest. o is the order that the event was, if it was one.
func (d *Driver) act(a Action, o *order) {
	if o == nil {
		o = d.current
	}
	switch a.Op {
	case Halt:
		d.o.Gate.Seal()
		d.o.Pool.Halt()
	case Exit:
		d.quit, d.code = true, a.Code
		d.queue = nil
	case Refuse:
		reason := a.Reason
		if cause := d.cause(); cause != "" && o == d.current {
			reason += ": " + cause
		}
		d.reply(o, fmt.Errorf("%w: %s", ErrRefused, reason))
	case Done:
		d.reply(o, nil)
	case Deny:
		// Never queued: a partner that repeats itself must not fill the queue.
		d.tell(MsgDeny, "")
	case Wait:
		d.tick.Reset(d.o.LookInterval)
	default:
		if len(d.queue) >= maxQueue {
			panic(fmt.Sprintf("ha: %d actions queued in phase %s", len(d.queue), d.state.Phase))
		}
		j := job{op: a.Op, state: d.state, nonce: d.offered.nonce}
		if o != nil {
			j.spec = o.spec
		}
		d.queue = append(d.queue, j)
	}
}

func (d *Driver) reply(o *order, err error) {
	if o == nil {
		return
	}
	o.reply <- err
	if o == d.current {
		d.current = nil
	}
}

// tell sends from the loop, without having it wait.
func (d *Driver) tell(kind, body string) { d.sends.Go(func() { d.send(kind, body) }) }

func (d *Driver) send(kind, body string) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if err := d.o.Mirror.Send(ctx, kind, []byte(body)); err != nil {
		d.o.Logger.Warn("ha: message to the partner lost", "kind", kind, "err", err)
	}
}

// linkGrace is for how long a link may be down before a partner that was asked counts as silent.
const linkGrace = time.Second

// alone tells whether the partner that is asked cannot answer.
func (d *Driver) alone() bool {
	switch {
	case d.state.Phase != Asking || d.o.Mirror.Connected():
		d.apart = time.Time{}
	case d.apart.IsZero():
		d.apart = time.Now()
	default:
		return time.Since(d.apart) >= linkGrace
	}
	return false
}

func (d *Driver) logLook(was State, v View) {
	if was.Seen != v && was.Phase != Owner {
		d.o.Logger.Info("ha: looked", "labels", v.String())
	}
}

func (d *Driver) publish(was State) {
	d.mu.Lock()
	d.snap = d.state
	if was.Phase != d.state.Phase {
		d.since = time.Now()
	}
	d.mu.Unlock()
	if was.Phase != d.state.Phase {
		if d.state.Phase == Asking {
			d.asked, d.apart = time.Now(), time.Time{}
			d.timeout.Reset(d.o.AskTimeout)
		} else if was.Phase == Asking {
			d.timeout.Stop()
		}
		if d.o.Changed != nil {
			d.o.Changed(d.state)
		}
	}
}

// trouble keeps the last error in words, for status and for refusals.
func (d *Driver) trouble(op Op, err error) {
	d.o.Logger.Error("ha: "+op.String()+" failed", "err", err)
	d.mu.Lock()
	d.last = op.String() + ": " + err.Error()
	d.mu.Unlock()
}

func (d *Driver) cause() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.last
}
