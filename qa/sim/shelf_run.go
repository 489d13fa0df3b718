package sim

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/ledge-storage/ledge/firmware/ha"
	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/target"
)

// shelfRun is one seed's run in the shelf world.
type shelfRun struct {
	*base
	s   *shelfWorld
	h   *history
	err error // why the world could not be made
	// under way: commands of initiators, orders of the operator.
	calls  []*call
	orders []chan error
}

// call is a command under way.
type call struct {
	*command
	what string
	buf  []byte // of a read
	done chan error
}

// maxCalls bounds the commands under way.
const maxCalls = 8

func newShelfRun(b *base) run {
	r := &shelfRun{base: b, h: newHistory()}
	r.s, r.err = newShelfWorld(b)
	return r
}

func (r *shelfRun) close() {
	for _, n := range r.s.nodes {
		n.kill()
	}
	r.s.shutDown()
	for _, c := range r.calls {
		<-c.done
	}
	for _, o := range r.orders {
		<-o
	}
	for _, c := range r.s.pools {
		for what, n := range map[string]int{"whole stripe": int(c.FullStripes), "partial stripe": int(c.PartialStripes), "stall for room": int(c.Stalls),
			"set replayed": int(c.Replayed), "update replayed": int(c.ReplayedUpdates), "overlay hit": int(c.OverlayHits)} {
			r.counts[what] += n
		}
	}
}

var shelfEvents = []weighted{{"write", 40}, {"burst", 6}, {"read", 14}, {"unmap", 4}, {"sleep", 8}, {"arm", 14}, {"kill", 4}, {"site", 1}, {"power on", 10},
	{"unplug", 5}, {"plug", 7}, {"reset", 3}, {"slow", 2}, {"again", 1}, {"takeover", 8}, {"stop", 3}, {"resume", 5}, {"wipe", 2}, {"remember", 3}, {"old", 3},
	{"message", 2}, {"drive", 2}, {"sync", 6}, {"check", 2}, {"overtake", 3}, {"contest", 2}}

func (r *shelfRun) expand(rng *rand.Rand) []event {
	events := []event{{"start"}}
	for range 10 + rng.IntN(30) {
		events = append(events, event{pick(rng, shelfEvents)})
	}
	return events
}

// collect takes the answers that have come.
func (r *shelfRun) collect() error {
	time.Sleep(time.Nanosecond) // all that can run now has run when it returns
	if err := r.s.supervise(); err != nil {
		return err
	}
	if r.s.inSync() != nil {
		r.s.hurt = false
	}
	var broken error
	r.calls = slices.DeleteFunc(r.calls, func(c *call) bool {
		select {
		case err := <-c.done:
			if e := r.answer(c, err); e != nil && broken == nil {
				broken = e
			}
			return true
		default:
			return false
		}
	})
	r.orders = slices.DeleteFunc(r.orders, func(o chan error) bool {
		select {
		case err := <-o:
			r.ordered(err)
			return true
		default:
			return false
		}
	})
	var open []*command
	for _, c := range r.calls {
		open = append(open, c.command)
	}
	r.h.trim(open)
	return broken
}

func (r *shelfRun) ordered(err error) {
	r.trace("    order: %v", err)
	switch {
	case err == nil:
		r.s.count("order done")
	case errors.Is(err, ha.ErrRefused):
		r.s.count("order refused")
	default:
		r.s.count("order without answer")
	}
}

// answer takes one.
func (r *shelfRun) answer(c *call, err error) error {
	r.trace("    %s %d+%d: %v", c.what, c.lo, max(len(c.data), len(c.may)), err)
	switch {
	case errors.Is(err, errLoss):
		return err
	case err == nil:
	case errors.Is(err, target.ErrNoSpace):
		return fmt.Errorf("%w: %s: %w", errLoss, c.what, err)
	default:
		r.s.count(c.what + " failed")
	}
	if c.data != nil {
		r.h.answered(c.command, err == nil)
		return nil
	}
	if err != nil {
		return nil
	}
	if err := r.h.saw(c.command, c.buf); err != nil {
		return fmt.Errorf("%w: %w", errLoss, err)
	}
	return nil
}

// wait lets time pass, for what was begun to be answered.
func (r *shelfRun) wait() {
	time.Sleep([]time.Duration{0, time.Microsecond, time.Millisecond, 20 * time.Millisecond, 20 * time.Millisecond, time.Second, 6 * time.Second}[r.rng.IntN(7)])
}

// path picks the controller that a command goes to: the one that serves, now and then the other.
func (r *shelfRun) path() *node {
	if r.rng.IntN(12) == 0 {
		return r.s.nodes[r.rng.IntN(2)]
	}
	for _, n := range r.s.nodes {
		if n.process == nil {
			continue
		}
		if st, _, _ := n.driver.State(); st.Phase == ha.Owner {
			return n
		}
	}
	return r.s.nodes[r.rng.IntN(2)]
}

// issue sends a command to a controller, which may be stopped, or without power.
func (r *shelfRun) issue(n *node, c *call, do func(target.Device) error) {
	r.calls = append(r.calls, c)
	c.done = make(chan error, 1)
	go func() {
		c.done <- func() error {
			if err := n.pass(); err != nil {
				return err
			}
			dev, err := n.device(shelfLUN)
			if err == nil {
				err = do(dev)
			}
			if perr := n.pass(); perr != nil && err == nil { // no answer leaves a controller that is stopped
				return perr
			}
			return err
		}()
	}()
}

func (r *shelfRun) write(ctx context.Context, what string) { r.writeTo(ctx, r.path(), what) }

func (r *shelfRun) writeTo(ctx context.Context, to *node, what string) {
	lo, n := r.rng.IntN(shelfBlocks), 1+r.rng.IntN(12)
	switch r.rng.IntN(4) {
	case 0:
		lo, n = r.rng.IntN(6), 1 // hot
	case 1:
		lo, n = r.rng.IntN(shelfBlocks/64)*64, 64
	}
	n = min(n, shelfBlocks-lo)
	data := make([][]byte, n)
	for i := range data {
		data[i] = zeros
		if what == "write" {
			data[i] = r.content(lo + i)
		}
	}
	c := &call{command: r.h.begin(lo, data), what: what}
	r.trace("%s %d+%d to %s", what, lo, n, to.self)
	r.s.count(what)
	r.issue(to, c, func(d target.Device) error {
		if what == "unmap" {
			return d.Unmap(ctx, []target.Range{{LBA: uint64(lo), Blocks: uint64(n)}})
		}
		return d.Write(ctx, uint64(lo), data, false)
	})
}

func (r *shelfRun) read(ctx context.Context, to *node, lo, n int) *call {
	n = min(n, shelfBlocks-lo)
	c := &call{command: r.h.look(lo, n), what: "read", buf: make([]byte, n*blockBytes)}
	r.s.count("read")
	r.issue(to, c, func(d target.Device) error { return d.Read(ctx, uint64(lo), [][]byte{c.buf}) })
	return c
}

func (r *shelfRun) takeover(n *node) {
	if n.process == nil || len(r.orders) > 4 {
		return
	}
	done := make(chan error, 1)
	r.orders = append(r.orders, done)
	d := n.driver
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
		defer cancel()
		done <- d.Takeover(ctx)
	}()
}

func (r *shelfRun) do(ctx context.Context, e event) error {
	if r.err != nil {
		return r.err
	}
	s := r.s
	if err := r.collect(); err != nil {
		return err
	}
	n := s.nodes[r.rng.IntN(2)]
	switch e.kind {
	case "start":
		for _, n := range s.nodes {
			if err := s.powerOn(n); err != nil {
				return err
			}
		}
		s.within(20*time.Second, func() bool { return s.owner() != nil })
		return nil
	case "write", "burst", "unmap":
		for range map[string]int{"write": 1, "unmap": 1, "burst": 3}[e.kind] {
			if len(r.calls) < maxCalls {
				r.write(ctx, map[bool]string{true: "unmap", false: "write"}[e.kind == "unmap"])
			}
		}
		r.wait()
	case "read":
		if len(r.calls) < maxCalls {
			to, lo, k := r.path(), r.rng.IntN(shelfBlocks), 1+r.rng.IntN(64)
			if r.rng.IntN(2) == 0 {
				lo, k = 0, 8
			}
			r.trace("read %d+%d from %s", lo, k, to.self)
			r.read(ctx, to, lo, k)
			r.wait()
		}
	case "sleep":
		time.Sleep(time.Duration(1+r.rng.IntN(5000)) * time.Millisecond)
	case "arm":
		what := pick(r.rng, []weighted{{"power", 5}, {"site power", 1}, {"stop before", 3}, {"stop after", 3}, {"unplug", 3}, {"reset", 2}})
		n.mu.Lock()
		n.armed = arm{at: n.steps + 1 + r.rng.IntN(40), what: what}
		r.trace("arm %s: %s in %d steps", n.self, what, n.armed.at-n.steps)
		n.mu.Unlock()
	case "kill":
		r.trace("power of %s goes", n.self)
		n.kill()
	case "site":
		r.trace("power of all goes")
		s.powerCut()
	case "power on":
		for _, n := range s.nodes {
			if err := s.powerOn(n); err != nil {
				return err
			}
		}
		r.wait()
	case "unplug":
		s.wire.setCut(true)
		s.count("link cut")
		r.wait()
	case "plug":
		s.wire.setCut(false)
		s.slow = 0
		r.wait()
	case "reset":
		s.wire.reset()
		s.count("link reset")
	case "slow":
		s.slow = time.Duration(1+r.rng.IntN(900)) * time.Millisecond
		s.count("link slow")
	case "again":
		if s.wire.replay() {
			s.count("connection said again")
		}
	case "takeover":
		r.trace("takeover ordered on %s", n.self)
		r.takeover(n)
		r.wait()
	case "stop":
		r.trace("stop %s", n.self)
		n.pause()
		r.wait()
	case "resume":
		r.trace("resume")
		for _, n := range s.nodes {
			n.resume()
		}
		r.wait()
	case "message":
		s.cmu.Lock()
		s.duplicates = []int{-1, 1, 2}[r.rng.IntN(3)]
		s.cmu.Unlock()
	case "drive":
		r.drive()
	case "remember":
		for i, n := range s.nodes {
			image := n.module.Image()
			s.old[i] = &image
		}
	case "wipe":
		r.wipe(n)
	case "old":
		return r.comeBackOld(n)
	case "sync":
		s.wire.setCut(false)
		s.slow = 0
		if s.within(20*time.Second, func() bool { return s.inSync() != nil }) {
			s.count("in sync")
		}
	case "check":
		return r.check(ctx)
	case "overtake":
		return r.overtake(ctx)
	case "contest":
		return r.contest(ctx)
	}
	return nil
}

// overtake stops the owner in the middle of what it does, has its partner take over and write, and lets the old owner go
// on: whatever it does then, it must neither answer nor change anything.
func (r *shelfRun) overtake(ctx context.Context) error {
	s := r.s
	own := s.inSync()
	if own == nil || len(r.orders) > 0 || len(r.calls) > 0 {
		return nil
	}
	other := s.nodes[1-int(own.self-ha.A)]
	r.trace("%s is to be overtaken", own.self)
	if r.rng.IntN(2) == 0 {
		own.mu.Lock()
		own.armed = arm{at: own.steps + 1 + r.rng.IntN(12), what: []string{"stop before", "stop after"}[r.rng.IntN(2)]}
		own.mu.Unlock()
	}
	for range 1 + r.rng.IntN(5) {
		r.writeTo(ctx, own, "write")
		time.Sleep(5 * time.Millisecond)
	}
	own.pause()
	r.takeover(other)
	s.within(time.Minute, func() bool { return s.serves(other) })
	if err := r.collect(); err != nil {
		return err
	}
	for range 3 {
		r.writeTo(ctx, other, "write")
		time.Sleep(20 * time.Millisecond)
	}
	r.read(ctx, other, 0, 8)
	time.Sleep(20 * time.Millisecond)
	if err := r.collect(); err != nil {
		return err
	}
	if s.serves(other) {
		s.count("owner overtaken")
	}
	own.resume()
	r.read(ctx, own, 0, 8)
	r.writeTo(ctx, own, "write")
	r.read(ctx, own, r.rng.IntN(shelfBlocks), 64)
	time.Sleep(time.Duration(r.rng.IntN(3000)) * time.Millisecond)
	return r.collect()
}

// contest stops a controller in the middle of its takeover, just when it has looked at the fenced members, has its partner
// become owner and write meanwhile, and lets the first go on: what it saw is no longer so.
func (r *shelfRun) contest(ctx context.Context) error {
	s := r.s
	own := s.inSync()
	if own == nil || len(r.orders) > 0 || len(r.calls) > 0 {
		return nil
	}
	taker := s.nodes[1-int(own.self-ha.A)]
	r.trace("%s and %s are to contest", taker.self, own.self)
	if r.rng.IntN(2) == 0 { // else it hands over
		own.kill()
	}
	taker.mu.Lock()
	taker.armed = arm{kind: "a look", what: "stop after"}
	taker.mu.Unlock()
	r.takeover(taker)
	if !s.within(time.Minute, func() bool {
		taker.mu.Lock()
		defer taker.mu.Unlock()
		return taker.paused != nil || taker.armed.kind == ""
	}) {
		taker.mu.Lock()
		taker.armed = arm{}
		taker.mu.Unlock()
		return r.collect()
	}
	if err := s.powerOn(own); err != nil {
		return err
	}
	time.Sleep(time.Duration(10+r.rng.IntN(10)) * time.Second) // it has started, and missed its partner
	r.takeover(own)
	s.within(time.Minute, func() bool { return s.serves(own) })
	if s.serves(own) {
		s.count("takeover contested")
	}
	for range 3 {
		r.writeTo(ctx, own, "write")
		time.Sleep(20 * time.Millisecond)
	}
	time.Sleep(time.Duration(r.rng.IntN(5000)) * time.Millisecond)
	taker.resume()
	r.read(ctx, taker, 0, 8)
	time.Sleep(time.Duration(r.rng.IntN(5000)) * time.Millisecond)
	r.read(ctx, own, 0, 8)
	time.Sleep(20 * time.Millisecond)
	return r.collect()
}

// drive breaks a member, no more of them than parity stands for.
func (r *shelfRun) drive() {
	s := r.s
	i := r.rng.IntN(shelfMembers)
	if !s.sick[i] && len(s.sick) == 2 {
		return
	}
	s.sick[i] = true
	if r.rng.IntN(2) == 0 {
		s.disks.Disks[i].Die()
		s.count("drive died")
		r.trace("drive %d dies", i)
		return
	}
	for range 1 + r.rng.IntN(40) {
		s.disks.Disks[i].Rot(raid.DataOffset + r.rng.Int64N(shelfSlots*raid.SlotBytes))
		s.count("rotten block")
	}
	r.trace("drive %d rots", i)
}

// spareable tells whether a controller's NVRAM may be lost now, as the one failure that the shelf survives.
func (r *shelfRun) spareable(n *node) bool {
	s := r.s
	l, err := s.truth()
	if err != nil || s.hurt || l.Replaying() {
		return false
	}
	return ha.Controller(l.Owner) != n.self || !l.Solo()
}

// wipe has a controller come back with an empty NVRAM.
func (r *shelfRun) wipe(n *node) {
	r.trace("NVRAM of %s is exchanged: %t", n.self, r.spareable(n))
	n.kill()
	n.end()
	if !r.spareable(n) {
		return
	}
	r.s.hurt = true
	n.module.Load(nil)
	r.s.count("NVRAM came back empty")
}

// comeBackOld has a standby come back with an older copy of its NVRAM, while the owner lives: with the owner dead too
// nothing could tell (nvram/mirror, case 9).
func (r *shelfRun) comeBackOld(n *node) error {
	s := r.s
	own := s.owner()
	i := int(n.self - ha.A)
	if own == nil || own == n || s.old[i] == nil || s.hurt || s.inSync() == nil {
		return nil
	}
	l, err := s.truth()
	if err != nil || ha.Controller(l.Owner) != own.self || l.Replaying() {
		return nil
	}
	for _, n := range s.nodes {
		n.mu.Lock()
		n.armed = arm{}
		n.mu.Unlock()
		n.resume()
	}
	if len(r.orders) > 0 {
		return nil
	}
	r.trace("NVRAM of %s is exchanged for an older copy", n.self)
	n.kill()
	n.end()
	n.module.Show(*s.old[i])
	s.hurt = true
	s.count("NVRAM came back old")
	s.wire.setCut(false)
	s.slow = 0
	if err := s.powerOn(n); err != nil {
		return err
	}
	time.Sleep(3 * time.Second)
	if !s.within(2*time.Minute, func() bool { return s.supervise() != nil || s.inSync() != nil }) {
		return fmt.Errorf("%w: a partner whose NVRAM is an older copy does not come into sync", errLoss)
	}
	return nil
}

// check reads everything that was ever written, if a controller serves.
func (r *shelfRun) check(ctx context.Context) error {
	n := r.s.owner()
	if n == nil {
		return nil
	}
	var runs [][2]int
	for _, b := range slices.Sorted(maps.Keys(r.h.blocks)) {
		if k := len(runs) - 1; k >= 0 && b < runs[k][0]+runs[k][1]+4 && b < runs[k][0]+100 {
			runs[k][1] = b + 1 - runs[k][0]
			continue
		}
		runs = append(runs, [2]int{b, 1})
	}
	for _, run := range runs {
		c := r.read(ctx, n, run[0], run[1])
		time.Sleep(time.Millisecond)
		if err := r.collect(); err != nil {
			return err
		}
		if slices.Contains(r.calls, c) {
			return nil // it hangs: the controller is stopped, or its lease ran out
		}
	}
	r.s.count("check of everything")
	return nil
}

// finish mends what can be mended, and then the shelf must serve, with everything that was acknowledged.
func (r *shelfRun) finish(ctx context.Context) error {
	if r.err != nil {
		return r.err
	}
	s := r.s
	for _, n := range s.nodes {
		n.mu.Lock()
		n.armed = arm{}
		n.mu.Unlock()
		n.resume()
	}
	s.wire.setCut(false)
	s.slow = 0
	if err := r.collect(); err != nil {
		return err
	}
	for _, n := range s.nodes {
		if err := s.powerOn(n); err != nil {
			return err
		}
	}
	if err := r.settle(); err != nil {
		return err
	}
	if err := r.check(ctx); err != nil {
		return err
	}
	if len(r.calls) > 0 {
		return fmt.Errorf("%w: %d commands hang", errLoss, len(r.calls))
	}
	// Once more through the other controller, which must find everything on the members.
	own := s.owner()
	if own == nil || r.rng.IntN(2) == 0 {
		return nil
	}
	other := s.nodes[1-int(own.self-ha.A)]
	r.trace("last: hand over to %s", other.self)
	r.takeover(other)
	if !s.within(3*time.Minute, func() bool { return len(r.orders) > 0 && len(r.orders[len(r.orders)-1]) > 0 }) {
		return fmt.Errorf("%w: an order has no answer", errLoss)
	}
	if err := r.settle(); err != nil {
		return err
	}
	return r.check(ctx)
}

// settle waits until a controller serves and nothing is under way, ordering a takeover where none comes up by itself.
func (r *shelfRun) settle() error {
	s := r.s
	for round := range 12 {
		var broken error
		ok := s.within(40*time.Second, func() bool {
			if broken = r.collect(); broken != nil {
				return true
			}
			return s.owner() != nil && len(r.calls) == 0 && len(r.orders) == 0
		})
		if broken != nil {
			return broken
		}
		if ok {
			return nil
		}
		if s.owner() == nil && len(r.orders) == 0 {
			n := s.nodes[(round+1)%2]
			r.trace("nobody serves: takeover ordered on %s", n.self)
			r.takeover(n)
		}
	}
	why := ""
	for _, n := range s.nodes {
		if n.process == nil {
			why += fmt.Sprintf("; %s: down", n.self)
			continue
		}
		st, _, last := n.driver.State()
		why += fmt.Sprintf("; %s: %s %s", n.self, st.Phase, last)
	}
	l, err := s.truth()
	return fmt.Errorf("%w: the shelf does not come up: owner %c epoch %d flags %d (%v)%s, %d commands, %d orders", errLoss, max(l.Owner, '-'), l.Epoch, l.Flags, err, why, len(r.calls), len(r.orders))
}
