package sim

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/ledge-storage/ledge/firmware/ha"
	"github.com/ledge-storage/ledge/firmware/shelf"
	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/nvram/mirror"
	"github.com/ledge-storage/ledge/nvram/nvramtest"
	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/target"
)

// node is a controller: what firmware/shelfd makes of the parts, on simulated hardware. Its methods from Look to
// LeaveSolo follow firmware/shelfd's backend (members.go, pool.go, link.go) step by step, which cannot be imported: a
// change there is to be made here too.
//
// Every way out of it leads through pass, where it waits while it is stopped and fails when its power is gone, and what
// makes something durable through op, which is where power goes and stops happen.
type node struct {
	s      *shelfWorld
	self   ha.Controller
	module *nvramtest.Region // its NVRAM, which outlives it

	mu     sync.Mutex // guards up to cutLabel
	on     bool       // has power
	paused chan struct{}
	steps  int
	armed  arm
	// cutting: the power goes during the operation under way; cutLabel: and that is a change of the label.
	cutting, cutLabel bool

	*process
}

// arm is what happens at a step.
type arm struct {
	at   int // from the arming on; 0: never
	what string
	// kind, if not empty: it happens in the first step of this kind.
	kind string
}

// process is what ends when shelfd does.
type process struct {
	log    *slog.Logger
	began  time.Time
	region *nodeRegion
	own    nvram.Area
	mirror *nvram.Mirror
	link   *mirror.Link
	gate   *ha.Gate
	driver *ha.Driver
	stop   context.CancelFunc
	exited chan int
	// receiving is haLink's.
	receiving bool

	pmu    sync.Mutex // guards the rest
	array  *raid.Array
	nvlog  *nvram.Log
	pool   *shelf.Pool
	serves bool
	key    uint64
	watch  chan struct{}
	order  error // outcome of the last order
}

// pass waits while the controller is stopped, and fails when its power is gone.
func (n *node) pass() error {
	for {
		n.mu.Lock()
		on, paused := n.on, n.paused
		n.mu.Unlock()
		switch {
		case !on:
			return errPower
		case paused == nil:
			return nil
		}
		<-paused
	}
}

// pause stops the controller (SIGSTOP), resume lets it go on.
func (n *node) pause() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.paused == nil && n.on {
		n.paused = make(chan struct{})
		n.s.count("controller stopped")
	}
}

func (n *node) resume() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.paused != nil {
		close(n.paused)
		n.paused = nil
	}
}

// kill takes the controller's power.
func (n *node) kill() {
	n.mu.Lock()
	was := n.on
	n.on, n.armed = false, arm{}
	if n.paused != nil {
		close(n.paused)
		n.paused = nil
	}
	n.mu.Unlock()
	if was {
		n.module.Cut()
		n.s.wire.vanish(byte(n.self))
		n.s.count("controller without power")
	}
}

// op is a durable step: what is armed for it happens. kind is for the counters.
func (n *node) op(kind string, f func() error) error {
	if err := n.pass(); err != nil {
		return err
	}
	n.mu.Lock()
	n.steps++
	what := ""
	if n.armed.at > 0 && n.steps == n.armed.at || n.armed.kind == kind {
		what = n.armed.what
		n.armed = arm{}
	}
	n.mu.Unlock()
	n.s.count("step of " + kind)
	if what == "" {
		return f()
	}
	n.s.count(what + " in " + kind)
	n.s.trace("    %s: %s in %s", n.self, what, kind)
	switch what {
	case "power":
		return n.cut(kind, f)
	case "site power":
		err := n.cut(kind, f)
		n.s.powerCut()
		return err
	case "stop before":
		n.pause()
		if err := n.pass(); err != nil {
			return err
		}
		return f()
	case "stop after":
		err := f()
		n.pause()
		if perr := n.pass(); perr != nil {
			return perr
		}
		return err
	case "unplug":
		n.s.wire.setCut(true)
		n.s.count("link cut")
	case "reset":
		n.s.wire.reset()
		n.s.count("link reset")
	}
	return f()
}

// cut runs an operation of which part arrives, and takes the power.
func (n *node) cut(kind string, f func() error) error {
	if kind == "a region write" {
		n.module.CutAt(1)
		f()
		n.kill()
		return errPower
	}
	n.mu.Lock()
	n.cutting, n.cutLabel = true, kind == "a label"
	n.mu.Unlock()
	f()
	n.mu.Lock()
	n.cutting = false
	n.mu.Unlock()
	n.kill()
	return errPower
}

// part tells whether what a drive is asked now arrives there, and whether that is told.
func (n *node) part(member int, off int64) (arrives, answers bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case !n.on:
		return false, false
	case !n.cutting:
		return true, true
	case off >= 0 && off < raid.DataOffset && !n.cutLabel:
		return false, false // see port.WriteAt
	}
	return hash(n.s.seed, uint64(n.steps), uint64(member), uint64(off))>>40&1 == 0, false
}

func hash(parts ...uint64) (h uint64) {
	for _, p := range parts {
		h = (h ^ p) * 0x9e3779b97f4a7c15
		h ^= h >> 29
	}
	h *= 0xbf58476d1ce4e5b9
	return h ^ h>>32
}

// start is shelfd's: region → mirror → link → driver. The power is on.
func (n *node) start() error {
	p := &process{log: n.s.logger(n.self.String() + ": "), began: time.Now(), gate: ha.NewGate(nil), exited: make(chan int, 1)}
	if p.log == nil {
		p.log = slog.New(slog.DiscardHandler)
	}
	n.process = p
	var marea nvram.Area
	p.own, marea = nvram.Areas(n.module.Size())
	p.region = &nodeRegion{Region: n.module, n: n}
	var err error
	if p.mirror, err = nvram.OpenMirror(p.region, marea); err != nil {
		return fmt.Errorf("open mirror: %w", err)
	}
	if p.mirror.Damage() != nil {
		n.s.count("mirror found damaged")
	}
	if p.driver, err = ha.New(ha.Options{Self: n.self, Members: n, Pool: n, Mirror: haLink{n}, Gate: p.gate, Logger: p.log, LookInterval: 1500 * time.Millisecond,
		ConfirmInterval: time.Second}); err != nil {
		return err
	}
	o := mirror.Options{Shelf: "sim", Self: byte(n.self), Secret: []byte("sixteen bytes of secret"), Logger: p.log}
	if n.self == ha.A {
		o.Listener = n.s.wire.listen()
	} else {
		o.Dial = n.s.wire.dial
	}
	d := p.driver
	o.OnControl = func(kind string, body []byte) {
		if n.pass() == nil {
			d.Message(kind, body)
		}
	}
	if n.s.mutation == LeaveSoloEarly {
		o.OnPeer = func(peer mirror.Peer) {
			if peer.Connected && d != nil {
				if err := n.LeaveSolo(context.Background()); err != nil {
					n.s.trace("early: %v", err)
				}
			}
		}
	}
	if p.link, err = mirror.New(o); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	p.stop = cancel
	go func() { p.exited <- d.Run(ctx) }()
	return nil
}

// end waits for the process to end after its power went, or it exited.
func (n *node) end() {
	p := n.process
	if p == nil {
		return
	}
	p.stop()
	<-p.exited
	n.Abort() // an Open that was under way when the driver ended
	<-p.driver.Ended()
	if err := p.link.Close(); err != nil {
		n.s.trace("link: %v", err)
	}
	n.process = nil
}

// device is what an initiator reaches on the paths to this controller.
func (n *node) device(name string) (target.Device, error) {
	if n.process == nil {
		return nil, target.ErrUnavailable
	}
	n.pmu.Lock()
	defer n.pmu.Unlock()
	if n.pool == nil || !n.serves {
		return nil, target.ErrStandby
	}
	l, ok := n.pool.LUN(name)
	if !ok {
		return nil, fmt.Errorf("%w: LUN %s is gone", errLoss, name)
	}
	return n.gate.Device(l.Device()), nil
}

// haLink is ha.Mirror.
type haLink struct{ n *node }

func (l haLink) Freeze() {
	if l.n.pass() == nil {
		l.n.link.StopReceiving()
		l.n.receiving = false
	}
}

func (l haLink) Thaw(seen ha.View) {
	if l.n.pass() == nil && !l.n.receiving {
		l.n.link.Receive(l.n.process.mirror, seen.Epoch)
		l.n.receiving = true
	}
}

func (l haLink) Connected() bool { return l.n.link.Peer().Connected }

func (l haLink) Send(ctx context.Context, kind string, body []byte) error {
	if err := l.n.pass(); err != nil {
		return err
	}
	for range l.n.s.copies() {
		if err := l.n.link.Send(ctx, kind, body); err != nil {
			return err
		}
	}
	return nil
}
