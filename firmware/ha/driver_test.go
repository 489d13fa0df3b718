package ha

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The drivers of both controllers over members in memory, on a fake clock. The decisions are model_test.go's
// business; here it is orders, answers, messages, time-outs, the worker and the end.

type disks struct {
	mu     sync.Mutex
	formed bool
	view   View // Epoch, Owner, Solo, Replaying, Holder
}

func (d *disks) seen() View {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.view
}

type node struct {
	self    Controller
	disks   *disks
	partner *node
	d       *Driver
	gate    *Gate

	mute   atomic.Bool // messages to us are lost
	loses  string      // so are those of this kind; set before the orders
	mirror atomic.Bool // complete
	frozen atomic.Bool
	open   atomic.Bool

	mu      sync.Mutex // guards up to forms: the driver's goroutines and the test's meet here
	up      bool       // on the link
	failing map[Op]error
	hang    map[Op]chan struct{}
	log     []string
	shown   string
	forms   any

	last chan struct{} // the last member's label is written by Disown when this is closed; nil: at once
	code chan int
	stop context.CancelFunc
}

func (n *node) do(op Op, f func(*disks) error) error {
	n.mu.Lock()
	n.log = append(n.log, op.String())
	err, hang := n.failing[op], n.hang[op]
	n.mu.Unlock()
	if hang != nil {
		<-hang
	}
	if err != nil {
		return err
	}
	n.disks.mu.Lock()
	defer n.disks.mu.Unlock()
	return f(n.disks)
}

func (n *node) Look(context.Context) (v View, err error) {
	err = n.do(Look, func(d *disks) error {
		v = d.view
		if !d.formed {
			v = View{Blank: true}
		}
		v.Mirror = n.mirror.Load()
		return nil
	})
	return v, err
}

func (n *node) held(d *disks) error {
	if d.view.Holder != n.self {
		return ErrConflict
	}
	return nil
}

func (n *node) Reserve(context.Context, View) error {
	return n.do(Reserve, func(d *disks) error {
		if d.view.Holder == n.self.Partner() {
			return ErrConflict
		}
		d.view.Holder = n.self
		return nil
	})
}

func (n *node) Fence(context.Context, View) error {
	return n.do(Fence, func(d *disks) error { d.view.Holder = n.self; return nil })
}

func (n *node) Release(context.Context) error {
	return n.do(Release, func(d *disks) error {
		if d.view.Holder == n.self {
			d.view.Holder = None
		}
		return nil
	})
}

func (n *node) Claim(_ context.Context, seen View, clean, _ bool) error {
	return n.do(Claim, func(d *disks) error {
		if err := n.held(d); err != nil {
			return err
		}
		d.view = View{Epoch: seen.Epoch + 1, Owner: n.self, Holder: n.self, Replaying: !clean}
		return nil
	})
}

func (n *node) Refresh(context.Context) error { return n.do(Refresh, n.held) }
func (n *node) Clear(context.Context) error {
	return n.do(Clear, func(d *disks) error { d.view.Replaying = false; return n.held(d) })
}

func (n *node) Disown(context.Context) error {
	if err := n.do(Disown, func(d *disks) error { d.view.Owner = None; return n.held(d) }); err != nil || n.last == nil {
		return err
	}
	<-n.last // a majority has the label
	n.disks.mu.Lock()
	defer n.disks.mu.Unlock()
	return n.held(n.disks)
}
func (n *node) Confirm(context.Context) error {
	n.disks.mu.Lock()
	defer n.disks.mu.Unlock()
	return n.held(n.disks)
}

func (n *node) Form(_ context.Context, spec any) error {
	n.mu.Lock()
	n.forms = spec
	n.mu.Unlock()
	return n.do(Form, func(d *disks) error {
		d.formed, d.view = true, View{Epoch: 1, Owner: n.self, Holder: n.self}
		return nil
	})
}

func (n *node) Open(context.Context, View) error {
	return n.do(Open, func(d *disks) error {
		if err := n.held(d); err != nil {
			return err
		}
		n.open.Store(true)
		return nil
	})
}

func (n *node) Drain(context.Context) error {
	return n.do(Drain, func(d *disks) error { n.open.Store(false); return n.held(d) })
}
func (n *node) Abort() { n.open.Store(false) }
func (n *node) show(s string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.shown = s
}
func (n *node) shows() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.shown
}

func (n *node) formedFrom() any {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.forms
}

func (n *node) Serve()      { n.show("serve") }
func (n *node) Transition() { n.show("transition") }
func (n *node) Follow()     { n.show("follow") }
func (n *node) Halt()       { n.show("halt") }
func (n *node) Freeze()     { n.frozen.Store(true) }
func (n *node) Thaw(View)   { n.frozen.Store(false) }
func (n *node) Connected() bool {
	n.partner.mu.Lock()
	defer n.partner.mu.Unlock()
	return n.partner.up
}

func (n *node) Send(_ context.Context, kind string, body []byte) error {
	if !n.Connected() {
		return errors.New("no link")
	}
	if p := n.partner; !p.mute.Load() && kind != p.loses {
		p.d.Message(kind, body)
	}
	return nil
}

func (n *node) start(t *testing.T) {
	t.Helper()
	n.gate = NewGate(nil)
	d, err := New(Options{Self: n.self, Members: n, Pool: n, Mirror: n, Gate: n.gate})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	n.d, n.stop, n.code = d, cancel, make(chan int, 1)
	n.mu.Lock()
	n.up = true
	n.mu.Unlock()
	go func() {
		code := d.Run(ctx)
		n.mu.Lock()
		n.up = false
		n.mu.Unlock()
		n.code <- code
	}()
	synctest.Wait()
}

func (n *node) end() int { n.stop(); return <-n.code }

func (n *node) phase() Phase { st, _, _ := n.d.State(); return st.Phase }

func pair(view View) (a, b *node) {
	d := &disks{formed: view.Epoch > 0, view: view}
	a = &node{self: A, disks: d, failing: map[Op]error{}, hang: map[Op]chan struct{}{}}
	b = &node{self: B, disks: d, failing: map[Op]error{}, hang: map[Op]chan struct{}{}}
	b.mirror.Store(true)
	a.partner, b.partner = b, a
	return a, b
}

func owned() View { return View{Epoch: 1, Owner: A} }

func scene(t *testing.T, view View, f func(t *testing.T, a, b *node)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		a, b := pair(view)
		a.start(t)
		b.start(t)
		f(t, a, b)
		a.stop()
		b.stop()
		synctest.Wait()
	})
}

func TestStartAndStop(t *testing.T) {
	scene(t, owned(), func(t *testing.T, a, b *node) {
		if a.phase() != Owner || b.phase() != Standby || a.shows() != "serve" || b.shows() != "follow" || !a.frozen.Load() || b.frozen.Load() {
			t.Fatalf("a %v %s, b %v %s", a.phase(), a.shows(), b.phase(), b.shows())
		}
		if code := a.end(); code != 0 || a.open.Load() {
			t.Fatalf("stopped with %d, open %t", code, a.open.Load())
		}
	})
}

func TestPlannedTakeover(t *testing.T) {
	scene(t, owned(), func(t *testing.T, a, b *node) {
		b.mirror.Store(false) // stale does not matter: the owner drains
		if err := b.d.Takeover(t.Context()); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if a.phase() != Standby || b.phase() != Owner || a.open.Load() || b.disks.seen().Epoch != 2 {
			t.Fatalf("a %v, b %v, %v", a.phase(), b.phase(), b.disks.seen())
		}
		if err := b.d.Takeover(t.Context()); err != nil {
			t.Fatal("an owner that is told to take over:", err)
		}
	})
}

// TestFencedInDisown: the partner sees the label on a majority and goes on while the last members get it.
func TestFencedInDisown(t *testing.T) {
	scene(t, owned(), func(t *testing.T, a, b *node) {
		a.last = make(chan struct{})
		if err := b.d.Takeover(t.Context()); err != nil {
			t.Fatal(err)
		}
		a.d.Lost() // a confirmation that came late
		close(a.last)
		synctest.Wait()
		if a.phase() != Standby || b.phase() != Owner {
			t.Fatalf("a %v, b %v", a.phase(), b.phase())
		}
		if err := a.d.Takeover(t.Context()); err != nil {
			t.Fatal("and back:", err)
		}
		if code := b.end(); code != 0 {
			t.Fatalf("b ended with %d", code)
		}
	})
}

// TestLostAnswer: the label says what the message would have.
func TestLostAnswer(t *testing.T) {
	scene(t, owned(), func(t *testing.T, a, b *node) {
		b.loses = MsgDone
		if err := b.d.Takeover(t.Context()); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if a.phase() != Standby {
			t.Fatal(a.phase())
		}
	})
}

func TestSilentPartner(t *testing.T) {
	scene(t, owned(), func(t *testing.T, a, b *node) {
		a.mute.Store(true)
		began := time.Now()
		if err := b.d.Takeover(t.Context()); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took < 4*time.Second {
			t.Fatalf("served after %v, before the old owner's lease ran out", took)
		}
		if code := <-a.code; code != ExitFenced || a.shows() != "halt" {
			t.Fatalf("old owner: %d, %s", code, a.shows())
		}
	})
}

func TestStaleRefused(t *testing.T) {
	scene(t, owned(), func(t *testing.T, a, b *node) {
		a.mute.Store(true)
		b.disks.mu.Lock()
		b.disks.view.Solo, b.disks.view.SoloLSN = true, 812
		b.disks.mu.Unlock()
		err := b.d.Takeover(t.Context())
		if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "812") {
			t.Fatal(err)
		}
		synctest.Wait()
		if a.phase() != Owner || b.phase() != Standby || a.disks.seen().Holder != A {
			t.Fatalf("a %v, b %v, %v", a.phase(), b.phase(), a.disks.seen())
		}
	})
}

func TestFailureIsNamed(t *testing.T) {
	scene(t, owned(), func(t *testing.T, a, b *node) {
		a.mute.Store(true)
		b.mu.Lock()
		b.failing[Fence] = errors.New("drive 7 on fire")
		b.mu.Unlock()
		err := b.d.Takeover(t.Context())
		if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "drive 7 on fire") {
			t.Fatal(err)
		}
	})
}

// TestHaltDoesNotWait: a lost reservation stops the front while an action of the worker hangs.
func TestHaltDoesNotWait(t *testing.T) {
	scene(t, owned(), func(t *testing.T, a, b *node) {
		release := make(chan struct{})
		a.mu.Lock()
		a.hang[Drain] = release
		a.mu.Unlock()
		a.d.Message(MsgAsk, nil)
		synctest.Wait()
		a.d.Lost()
		synctest.Wait()
		if a.shows() != "halt" || a.gate.enter(t.Context()) == nil {
			t.Fatalf("shown %s", a.shows())
		}
		// The action hangs for ever, and the driver ends all the same.
		if code := <-a.code; code != ExitFenced {
			t.Fatal(code)
		}
		close(release)
	})
}

func TestSlowDrainGoesOn(t *testing.T) {
	scene(t, owned(), func(t *testing.T, a, b *node) {
		a.mu.Lock()
		a.failing[Drain] = context.DeadlineExceeded
		a.mu.Unlock()
		b.mirror.Store(false)
		err := b.d.Takeover(t.Context())
		if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "stale") {
			t.Fatal(err)
		}
		synctest.Wait() // the refusal is on its way before the owner serves again
		if a.phase() != Owner || a.shows() != "serve" || !a.open.Load() {
			t.Fatalf("a %v %s", a.phase(), a.shows())
		}
	})
}

func TestBroken(t *testing.T) {
	scene(t, owned(), func(t *testing.T, a, b *node) {
		a.d.Broken()
		if code := <-a.code; code != ExitFailed {
			t.Fatal(code)
		}
		if err := a.d.Takeover(t.Context()); !errors.Is(err, ErrStopped) {
			t.Fatal(err)
		}
	})
}

func TestCreate(t *testing.T) {
	scene(t, View{}, func(t *testing.T, a, b *node) {
		if a.phase() != NoPool || b.phase() != NoPool {
			t.Fatal(a.phase(), b.phase())
		}
		if err := a.d.Takeover(t.Context()); !errors.Is(err, ErrRefused) {
			t.Fatal(err)
		}
		if err := a.d.Create(t.Context(), "spec"); err != nil || a.formedFrom() != "spec" {
			t.Fatal(err, a.formedFrom())
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if a.phase() != Owner || b.phase() != Standby {
			t.Fatal(a.phase(), b.phase())
		}
		if err := b.d.Create(t.Context(), nil); !errors.Is(err, ErrRefused) {
			t.Fatal(err)
		}
	})
}

// TestUnfit: an owner without its log refuses, holds nothing, and becomes standby when the partner took over.
func TestUnfit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := pair(owned())
		a.failing[Open] = ErrUnfit
		a.start(t)
		b.start(t)
		if a.phase() != Refused || a.disks.seen().Holder != None {
			t.Fatal(a.phase(), a.disks.seen())
		}
		if err := a.d.Takeover(t.Context()); !errors.Is(err, ErrRefused) {
			t.Fatal(err)
		}
		if err := b.d.Takeover(t.Context()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * time.Second)
		synctest.Wait()
		if a.phase() != Standby || b.phase() != Owner {
			t.Fatal(a.phase(), b.phase())
		}
		a.stop()
		b.stop()
		synctest.Wait()
	})
}

// TestOrdersWait: orders given while actions run are answered, in turn, and beyond a limit refused at once.
func TestOrdersWait(t *testing.T) {
	scene(t, owned(), func(t *testing.T, a, b *node) {
		release := make(chan struct{})
		a.mute.Store(true)
		b.mu.Lock()
		b.hang[Fence] = release
		b.mu.Unlock()
		const n = maxOrders + 3
		out := make(chan error, n)
		for range n {
			go func() { out <- b.d.Takeover(t.Context()) }()
		}
		time.Sleep(10 * time.Second)
		close(release)
		good := 0
		for range n {
			if err := <-out; err == nil {
				good++
			} else if !errors.Is(err, ErrRefused) {
				t.Fatal(err)
			}
		}
		if good == 0 {
			t.Fatal("no order succeeded")
		}
	})
}
