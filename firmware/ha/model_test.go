package ha

import (
	"fmt"
	"hash/maphash"
	"os"
	"strings"
	"testing"
)

// The model test walks every reachable state of two machines, the members, both NVRAMs and the link, under
// crashes, lost messages, stops of any length between any two steps, failing actions and operator's orders,
// up to small bounds, and checks in each of them:
//
//	P2    at most one controller can acknowledge a write
//	P1    who serves has every acknowledged write
//	order a claim over an owner that did not hand over follows a fence and a look after it
//	stop  who is fenced or failed does nothing any more
//
// A stopped controller is one whose steps are not chosen; so SIGSTOP and SIGCONT need no events of their own.

type label struct {
	epoch           uint8
	owner           Controller
	solo, replaying bool
	fresh           bool
	log             uint8 // epoch at which the owner's log was formatted: its nvramID
}

type ctl struct {
	st      State
	up      bool
	queue   [8]Op
	n       uint8
	frozen  bool
	follows bool // after Follow: takes frames when thawed
	soloMem bool // as owner: recorded solo, acknowledges alone
	fresh   bool // as owner: acknowledges nothing before the label says that it may have
	lost    bool // as owner: knows nothing yet, for the EvLost event
	nobody  bool // Disown: a majority has the label, the rest is under way
	expired bool // as owner: the lease that it had when it was fenced has run out, or it got none
	// NVRAM
	logID, log        uint8
	mirEpoch, mir     uint8
	mirComplete       bool
	fencedBy, lookAft bool // the order invariant
}

type world struct {
	formed bool
	l      label
	holder Controller
	reg    [2]bool
	c      [2]ctl
	// messages in flight to controller i
	ask, handed, deny [2]bool
	linkUp            bool
	acked, disk       uint8
	given             uint8 // epoch whose claim gave up what was not destaged
	// budgets
	orders, crashes, fails, writes, cuts, wipes, creates, loses uint8
}

func idx(c Controller) int { return int(c - A) }

func (w *world) view(i int) View {
	me := &w.c[i]
	if !w.formed {
		return View{Blank: true, Holder: w.holder}
	}
	return View{Epoch: uint64(w.l.epoch), Owner: w.l.owner, Solo: w.l.solo, Replaying: w.l.replaying, Fresh: w.l.fresh, Holder: w.holder,
		Mirror: me.mirComplete && me.mirEpoch == w.l.epoch}
}

type checker struct {
	t       *testing.T
	seed    maphash.Seed
	seen    map[uint64]struct{} // hashes: a collision loses one state of millions
	todo    []world
	reached [phases]bool
}

// step feeds an event to controller i and applies what is immediate.
func (c *checker) step(w world, i int, e Event) world {
	me := &w.c[i]
	before := me.st
	n, acts := before.Step(e)
	if (before.Phase == Fenced || before.Phase == Failed) && len(acts) > 0 {
		c.t.Fatalf("%v acts after its end: %v", before, acts)
	}
	me.st = n
	c.reached[n.Phase] = true
	for _, a := range acts {
		switch a.Op {
		case Halt:
			me.soloMem, me.lost = false, false
		case Exit: // process gone
			c.kill(&w, i)
			return w
		case Done, Refuse:
			if before.Phase == Checking && a.Op == Done {
				c.t.Fatalf("done in %v", before)
			}
		case Serve:
			c.checkServe(&w, i)
		case Deny:
			if w.linkUp && w.c[1-i].up {
				w.deny[1-i] = true
			}
		default:
			if int(me.n) == len(me.queue) {
				c.t.Fatalf("queue of %v overflows: %v + %v", n, me.queue, acts)
			}
			me.queue[me.n] = a.Op
			me.n++
		}
	}
	return w
}

func (c *checker) checkServe(w *world, i int) {
	if w.holder != w.c[i].st.Self {
		w.c[i].expired = true // fenced: the gate opens without a lease, and no answer leaves (gate_test.go)
		return
	}
	if w.c[i].log < w.acked {
		c.t.Fatalf("controller %d serves with %d of %d acknowledged writes\n%s", i, w.c[i].log, w.acked, w)
	}
}

func (c *checker) kill(w *world, i int) {
	me := &w.c[i]
	*me = ctl{st: State{Self: me.st.Self}, logID: me.logID, log: me.log, mirEpoch: me.mirEpoch, mir: me.mir, mirComplete: me.mirComplete, frozen: true}
	w.ask[i], w.handed[i], w.deny[i] = false, false, false
}

func (w *world) String() string { return fmt.Sprintf("%+v", *w) }

// mirrorTakes: the partner of i would acknowledge a frame of i now.
func (w *world) mirrorTakes(i int) bool {
	p, me := &w.c[1-i], &w.c[i]
	return w.linkUp && p.up && p.follows && !p.frozen && p.mirComplete && uint64(p.mirEpoch) == me.st.Seen.Epoch
}

func (w *world) canAck(i int) bool {
	me := &w.c[i]
	return me.up && me.st.Phase.Serves() && !me.fresh && !me.expired && (me.soloMem || w.mirrorTakes(i))
}

func (c *checker) push(w world) {
	if w.canAck(0) && w.canAck(1) {
		c.t.Fatalf("both controllers can acknowledge\n%s", &w)
	}
	h := maphash.Comparable(c.seed, w)
	if _, ok := c.seen[h]; ok {
		return
	}
	c.seen[h] = struct{}{}
	c.todo = append(c.todo, w)
}

// expand pushes every successor of w.
func (c *checker) expand(w world) {
	for i := range 2 {
		me := w.c[i]
		if !me.up {
			n := w
			n.c[i].up = true
			n = c.step(n, i, Event{Kind: EvStart})
			c.push(n)
			if w.wipes > 0 {
				n := w
				n.wipes--
				n.c[i].logID, n.c[i].log, n.c[i].mirComplete, n.c[i].mir = 0, 0, false, 0
				c.push(n)
			}
			continue
		}
		if w.crashes > 0 {
			n := w
			n.crashes--
			c.kill(&n, i)
			c.push(n)
		}
		if me.n > 0 {
			c.exec(w, i)
		} else {
			switch me.st.Phase {
			case Starting, NoPool, Standby, Refused, Asking:
				c.push(c.step(w, i, Event{Kind: EvTick}))
			}
		}
		// The driver holds orders back while actions are queued.
		if w.orders > 0 && me.n == 0 {
			n := w
			n.orders--
			c.push(c.step(n, i, Event{Kind: EvTakeover, Connected: w.linkUp && w.c[1-i].up}))
			// The order was given when the link had just gone, or was not noticed to be gone.
			c.push(c.step(n, i, Event{Kind: EvTakeover, Connected: !(w.linkUp && w.c[1-i].up)}))
		}
		if w.loses > 0 && me.n == 0 {
			for _, connected := range []bool{true, false} {
				n := w
				n.loses--
				c.push(c.step(n, i, Event{Kind: EvTakeover, Connected: connected, Lose: true}))
			}
		}
		if w.creates > 0 && me.n == 0 {
			n := w
			n.creates--
			c.push(c.step(n, i, Event{Kind: EvCreate}))
		}
		if me.st.Phase == Asking {
			c.push(c.step(w, i, Event{Kind: EvTimeout}))
		}
		c.deliver(w, i, EvHandoverAsked, func(w *world) *bool { return &w.ask[i] })
		c.deliver(w, i, EvHandedOver, func(w *world) *bool { return &w.handed[i] })
		c.deliver(w, i, EvHandoverDenied, func(w *world) *bool { return &w.deny[i] })
		if me.st.Phase.Serves() {
			c.serveSteps(w, i)
		}
	}
	if w.cuts > 0 {
		n := w
		n.cuts--
		n.linkUp = !n.linkUp
		c.push(n)
	}
}

// deliver: a message in flight is lost, arrives, or arrives and comes again.
func (c *checker) deliver(w world, i int, k Kind, in func(*world) *bool) {
	if !*in(&w) {
		return
	}
	again := w
	*in(&w) = false
	c.push(w)
	c.push(c.step(w, i, Event{Kind: k}))
	c.push(c.step(again, i, Event{Kind: k}))
}

// acknowledge: all in i's log is acknowledged. What an owner acknowledges after its successor gave up what it had is lost like that.
func (w *world) acknowledge(i int) {
	if uint64(w.given) <= w.c[i].st.Seen.Epoch {
		w.acked = w.c[i].log
	}
}

// serveSteps: what an owner does while it serves: write, record solo, resync, destage, notice the fence.
func (c *checker) serveSteps(w world, i int) {
	me, p := &w.c[i], &w.c[1-i]
	fenced := w.holder != me.st.Self
	if fenced || w.l.epoch > uint8(me.st.Seen.Epoch) {
		c.push(c.step(w, i, Event{Kind: EvLost}))
	}
	if w.writes > 0 && !me.expired {
		n := w
		n.writes--
		n.c[i].log++
		c.push(n) // logged here, and nobody was told
		if w.mirrorTakes(i) && !me.soloMem {
			n.c[1-i].mir = n.c[i].log
			c.push(n) // durable there, the answer was lost, or the owner is fresh
			if !me.fresh {
				n.acknowledge(i)
				c.push(n)
			}
		} else if me.soloMem {
			n.acknowledge(i)
			c.push(n)
		}
	}
	if !w.mirrorTakes(i) && !me.soloMem && !fenced {
		n := w
		n.l.solo, n.c[i].soloMem = true, true
		n.l.fresh, n.c[i].fresh = false, false
		c.push(n)
	}
	if me.fresh && w.mirrorTakes(i) && !fenced {
		n := w
		n.l.fresh = false
		c.push(n) // the answer is under way
		n.c[i].fresh = false
		c.push(n)
	}
	if w.linkUp && p.up && p.follows && !p.frozen && (me.soloMem || !p.mirComplete || p.mirEpoch != uint8(me.st.Seen.Epoch)) {
		// Resync, in its two durable steps: the mirror is complete; then the label says so.
		n := w
		n.c[1-i].mir, n.c[1-i].mirEpoch, n.c[1-i].mirComplete = me.log, uint8(me.st.Seen.Epoch), true
		c.push(n)
		if !fenced {
			n.l.solo, n.c[i].soloMem = false, false
			n.l.fresh, n.c[i].fresh = false, false
			c.push(n)
		}
	}
	if !fenced && !me.fresh && w.disk < me.log {
		n := w
		n.disk = me.log
		c.push(n)
	}
}

// exec performs the action at the head of i's queue, with each result that it can have.
func (c *checker) exec(w world, i int) {
	me := &w.c[i]
	self, partner := me.st.Self, me.st.Self.Partner()
	op := me.queue[0]
	copy(me.queue[:], me.queue[1:])
	me.n--
	me.queue[me.n] = 0
	answer := func(n world, k Kind, r Result) { c.push(c.step(n, i, Event{Kind: k, Result: r})) }
	fail := func(k Kind) {
		if w.fails > 0 {
			n := w
			n.fails--
			answer(n, k, Failure)
		}
	}
	held := w.holder == self
	switch op {
	case Look:
		n := w
		n.c[i].lookAft = me.fencedBy
		c.push(c.step(n, i, Event{Kind: EvLooked, View: w.view(i)}))
		if w.fails > 0 {
			n.fails--
			c.push(c.step(n, i, Event{Kind: EvLooked, View: View{Unreadable: true}}))
		}
	case Reserve:
		fail(EvReserved)
		if w.holder == partner {
			answer(w, EvReserved, Conflict)
			return
		}
		w.holder, w.reg[i] = self, true
		w.c[i].fencedBy, w.c[i].lookAft = true, false
		answer(w, EvReserved, OK)
	case Fence:
		w.c[i].frozen = true
		fail(EvFenced)
		w.holder = self
		w.reg = [2]bool{}
		w.reg[i] = true
		w.c[i].fencedBy, w.c[i].lookAft = true, false
		answer(w, EvFenced, OK)
	case Release:
		if held {
			w.holder = None
		}
		w.reg[i] = false
		w.c[i].fencedBy = false
		c.push(w)
	case Freeze:
		w.c[i].frozen = true
		c.push(w)
	case Thaw:
		w.c[i].frozen = false
		c.push(w)
	case Claim:
		if me.st.Phase != Claiming {
			c.push(w)
			return
		}
		if !me.lookAft {
			c.t.Fatalf("claim without a look after the fence\n%s", &w)
		}
		fail(EvClaimed)
		// It fences again, since members that were away may be back, and looks whether they still say what was seen.
		w.holder, w.reg = self, [2]bool{}
		w.reg[i] = true
		if !w.view(i).SameLabel(me.st.Seen) {
			answer(w, EvClaimed, Conflict)
			return
		}
		n := w
		if me.st.Clean && me.st.Lose {
			n.acked, n.given = min(w.acked, w.disk), w.l.epoch+1
		} else if me.st.Clean && w.disk < w.acked {
			c.t.Fatalf("claimed without a log, with %d of %d writes destaged\n%s", w.disk, w.acked, &w)
		}
		n.l = label{epoch: w.l.epoch + 1, owner: self, replaying: !me.st.Clean, fresh: me.st.Clean, log: w.l.epoch + 1}
		n.c[i].logID, n.c[i].log = n.l.epoch, w.disk
		// The claim of a replaying takeover: the mirror moves into the new epoch with the label.
		if w.fails > 0 { // written, and the answer was an error
			f := n
			f.fails--
			answer(f, EvClaimed, Failure)
		}
		answer(n, EvClaimed, OK)
	case Refresh:
		fail(EvClaimed)
		if !held {
			answer(w, EvClaimed, Conflict)
			return
		}
		answer(w, EvClaimed, OK)
	case Open:
		fail(EvOpened)
		if !held {
			answer(w, EvOpened, Conflict)
			return
		}
		if me.logID != w.l.log {
			answer(w, EvOpened, Unfit)
			return
		}
		if w.l.replaying {
			if !me.mirComplete {
				answer(w, EvOpened, Unfit)
				return
			}
			w.c[i].log = max(w.disk, me.mir)
			w.disk = w.c[i].log
		}
		w.c[i].soloMem = w.l.solo && w.l.owner == self
		w.c[i].fresh = w.l.fresh
		answer(w, EvOpened, OK)
	case Clear:
		fail(EvCleared)
		if !held {
			answer(w, EvCleared, Conflict)
			return
		}
		w.l.replaying = false
		if w.c[1-i].st.Phase.Serves() {
			w.c[1-i].expired = true // Clear waits for that
		}
		answer(w, EvCleared, OK)
	case Form:
		fail(EvFormed)
		if w.formed || w.holder == partner {
			answer(w, EvFormed, Conflict)
			return
		}
		w.formed, w.holder, w.reg[i] = true, self, true
		w.l = label{epoch: 1, owner: self, fresh: true, log: 1}
		w.c[i].logID, w.c[i].log = 1, 0
		answer(w, EvFormed, OK)
	case Transition:
		c.push(w)
	case Drain:
		fail(EvDrained)
		if !held {
			answer(w, EvDrained, Conflict)
			return
		}
		w.disk = me.log
		w.c[i].soloMem = false
		answer(w, EvDrained, OK)
		answer(w, EvDrained, Unwanted)
	case Disown:
		if !held {
			w.c[i].nobody = false
			answer(w, EvDisowned, Conflict)
			return
		}
		fail(EvDisowned)
		w.l.owner, w.l.solo, w.l.replaying, w.l.fresh = None, false, false, false
		// The partner may fence before the last member has the label; then the answer is a conflict.
		me := &w.c[i]
		if me.nobody = !me.nobody; me.nobody {
			copy(me.queue[1:], me.queue[:])
			me.queue[0] = Disown
			me.n++
			c.push(w)
			return
		}
		answer(w, EvDisowned, OK)
	case Follow:
		w.c[i].follows = true
		c.push(w)
	case Ask:
		if w.linkUp && w.c[1-i].up {
			w.ask[1-i] = true
		}
		c.push(w)
	case Answer:
		if w.linkUp && w.c[1-i].up {
			w.handed[1-i] = true
		}
		c.push(w)
	case Wait:
		c.push(w)
	default:
		c.t.Fatalf("op %v", op)
	}
}

func (c *checker) run(start world) {
	c.push(start)
	for len(c.todo) > 0 {
		w := c.todo[len(c.todo)-1]
		c.todo = c.todo[:len(c.todo)-1]
		c.expand(w)
	}
}

func begin() world {
	w := world{linkUp: true}
	for i := range 2 {
		w.c[i].st.Self = A + Controller(i)
		w.c[i].frozen = true
	}
	return w
}

func TestModel(t *testing.T) {
	formed := begin()
	formed.formed = true
	formed.l = label{epoch: 1, owner: A, log: 1}
	formed.c[0].logID = 1
	formed.c[1].mirEpoch, formed.c[1].mirComplete = 1, true
	fresh := formed
	fresh.l.fresh = true
	type budget struct{ orders, crashes, fails, writes, cuts, wipes, creates, loses uint8 }
	var reached [phases]bool
	for _, test := range []struct {
		name  string
		world world
		b     budget
	}{
		{"one crash", formed, budget{orders: 1, crashes: 1, writes: 1}},
		{"two failures", formed, budget{orders: 1, fails: 2, writes: 1}},
		{"crash and failure", formed, budget{orders: 1, crashes: 1, fails: 1}},
		{"two orders", formed, budget{orders: 2}},
		{"lost NVRAM", formed, budget{orders: 1, crashes: 1, wipes: 1}},
		{"fresh", fresh, budget{orders: 1, crashes: 1, wipes: 1}},
		{"cut link", formed, budget{orders: 1, writes: 1, cuts: 2}},
		{"create", begin(), budget{creates: 2, crashes: 1, fails: 1}},
		{"given up", formed, budget{loses: 1, crashes: 1, writes: 1, cuts: 1}},
		{"given up, lost NVRAM", formed, budget{loses: 1, crashes: 1, wipes: 1}},
		{"long: given up", formed, budget{loses: 1, orders: 1, crashes: 1, writes: 2, cuts: 1}},
		{"long: given up, lost NVRAM", formed, budget{loses: 1, crashes: 2, writes: 1, wipes: 1, fails: 1}},
		{"long: two crashes", formed, budget{orders: 1, crashes: 2, writes: 2, cuts: 1}},
		{"long: crash and failure", formed, budget{orders: 1, crashes: 1, fails: 1, writes: 1, cuts: 1}},
		{"long: two orders and a write", formed, budget{orders: 2, writes: 1}},
		{"long: two orders", formed, budget{orders: 2, crashes: 1, fails: 1, writes: 1}},
		{"long: lost NVRAM", formed, budget{orders: 1, crashes: 2, writes: 1, wipes: 1}},
		{"long: fresh, two orders", fresh, budget{orders: 2, writes: 1}},
		{"long: fresh", fresh, budget{orders: 1, crashes: 2, writes: 1, wipes: 1}},
		{"long: create", begin(), budget{creates: 2, crashes: 1, fails: 1, orders: 1, writes: 1}},
	} {
		t.Run(test.name, func(t *testing.T) {
			if strings.HasPrefix(test.name, "long") && os.Getenv("LEDGE_LONG") == "" {
				t.Skip("set LEDGE_LONG=1")
			}
			w := test.world
			w.orders, w.crashes, w.fails, w.writes, w.cuts, w.wipes, w.creates, w.loses = test.b.orders, test.b.crashes, test.b.fails, test.b.writes, test.b.cuts, test.b.wipes, test.b.creates, test.b.loses
			c := &checker{t: t, seed: maphash.MakeSeed(), seen: map[uint64]struct{}{}}
			c.run(w)
			t.Logf("%d states", len(c.seen))
			for p := range phases {
				reached[p] = reached[p] || c.reached[p]
			}
		})
	}
	for p, ok := range reached {
		if !ok && !t.Failed() {
			t.Errorf("phase %v was never reached: the test does not test it", Phase(p))
		}
	}
}
