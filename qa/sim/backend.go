package sim

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"math/bits"
	"time"

	"github.com/ledge-storage/ledge/firmware/ha"
	"github.com/ledge-storage/ledge/firmware/shelf"
	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/raid"
)

// firmware/shelfd's backend: ha.Members, ha.Pool and nvram.Witness.

const keyTag = uint64('L')<<56 | uint64('E')<<48 | uint64('D')<<40 | uint64('G')<<32 | uint64('E')<<24

func keyOf(c ha.Controller, epoch uint64) uint64 { return keyTag | (epoch&0xffff)<<8 | uint64(c) }

func controllerOf(key uint64) ha.Controller {
	c := ha.Controller(key & 0xff)
	if key&^0xffffff != keyTag || c != ha.A && c != ha.B {
		return ha.None
	}
	return c
}

func conflict(err error) error {
	if errors.Is(err, raid.ErrReservation) || errors.Is(err, raid.ErrStaleEpoch) {
		return fmt.Errorf("%w: %w", ha.ErrConflict, err)
	}
	return err
}

const straggleTime = 8 * time.Second

func (n *node) Look(ctx context.Context) (ha.View, error) {
	if err := n.pass(); err != nil {
		return ha.View{Unreadable: true}, err
	}
	var s raid.Survey
	look := func() (err error) {
		s, err = raid.ReadLabels(ctx, n.drives(), raid.UUID{})
		return err
	}
	var err error
	if st, _, _ := n.process.driver.State(); st.Phase == ha.Rechecking || st.Phase == ha.Reclaiming {
		// Nothing durable, but what follows builds on it: a controller may be stopped here for long.
		err = n.op("a look", look)
	} else {
		err = look()
	}
	switch {
	case errors.Is(err, raid.ErrBlank), err == nil && s.Label.Epoch == 0:
		return ha.View{Blank: true}, nil
	case err != nil:
		return ha.View{Unreadable: true}, err
	case s.Members < s.Label.K:
		return ha.View{Unreadable: true}, fmt.Errorf("%d members can be used", s.Members)
	case s.Label.N-bits.OnesCount64(s.Label.Failed)-s.Members > 0 && time.Since(n.began) < straggleTime:
		return ha.View{Unreadable: true}, errors.New("members are still missing")
	case s.Lost > s.Label.M:
		return ha.View{Unreadable: true}, fmt.Errorf("%d members are lost", s.Lost)
	}
	l := &s.Label
	v := ha.View{Epoch: l.Epoch, Owner: ha.Controller(l.Owner), Solo: l.Solo(), SoloLSN: l.SoloLSN, Replaying: l.Replaying(), Fresh: l.Fresh(),
		Mirror: n.process.mirror.Complete(nvram.ID(l.NVRAM), l.Epoch)}
	if !v.Solo {
		v.SoloLSN = 0
	}
	if s.HolderMembers > l.N/2 {
		v.Holder = controllerOf(s.Holder)
	}
	switch n.s.mutation {
	case StaleTakeover:
		v.Mirror = v.Mirror || v.Owner != n.self
	case IgnoreSolo:
		v.Solo = false
	}
	return v, nil
}

func (n *node) openArray(ctx context.Context) (*raid.Array, error) {
	if err := n.pass(); err != nil {
		return nil, err
	}
	return raid.Open(ctx, n.drives(), raid.Options{Logger: n.log, CacheBytes: cacheBytes(n.s.seed)})
}

func (n *node) Reserve(ctx context.Context, seen ha.View) error {
	a, err := n.openArray(ctx)
	if err != nil {
		return err
	}
	defer a.Close()
	return conflict(n.op("a reservation", func() error { return a.Acquire(ctx, keyOf(n.self, seen.Epoch)) }))
}

func (n *node) Fence(ctx context.Context, seen ha.View) error {
	a, err := n.openArray(ctx)
	if err != nil {
		return err
	}
	defer a.Close()
	if n.s.mutation == NoFence {
		for _, d := range n.drives() {
			if err := d.(*nodePort).Register(keyOf(n.self, seen.Epoch+1)); err != nil {
				n.s.trace("no fence: %v", err)
			}
		}
		return nil
	}
	err = n.op("a fence", func() error { return a.Preempt(ctx, keyOf(n.self, seen.Epoch+1)) })
	if err == nil {
		n.s.count("fence")
	}
	return err
}

func (n *node) Release(ctx context.Context) error {
	n.closeArray()
	return n.op("a release", func() error {
		var first error
		for _, d := range n.drives() {
			if err := n.releaseOne(d.(*nodePort)); err != nil && first == nil {
				first = err
			}
		}
		return first
	})
}

func (n *node) releaseOne(p *nodePort) error {
	registered, holder, err := p.Keys()
	if err != nil {
		return err
	}
	if holder != 0 && controllerOf(holder) == n.self {
		if err := p.Release(holder); err != nil {
			return err
		}
	}
	for _, k := range registered {
		if controllerOf(k) == n.self {
			return p.Unregister(k)
		}
	}
	return nil
}

func (n *node) closeArray() {
	n.pmu.Lock()
	a := n.array
	n.array, n.key = nil, 0
	n.pmu.Unlock()
	if a != nil {
		n.s.repairs(a.Status())
		a.Close()
	}
}

func (n *node) hold(a *raid.Array, key uint64) {
	n.closeArray()
	n.pmu.Lock()
	n.array, n.key = a, key
	n.pmu.Unlock()
}

func (n *node) held() (*raid.Array, error) {
	if err := n.pass(); err != nil {
		return nil, err
	}
	n.pmu.Lock()
	defer n.pmu.Unlock()
	if n.array == nil {
		return nil, errors.New("no array is open")
	}
	return n.array, nil
}

// label changes the label, as one step.
func (n *node) label(ctx context.Context, a *raid.Array, change func(*raid.Label)) error {
	return conflict(n.op("a label", func() error { return a.WriteLabel(ctx, change) }))
}

func (n *node) Claim(ctx context.Context, seen ha.View, clean, _ bool) error {
	a, err := n.openArray(ctx)
	if err != nil {
		return err
	}
	key := keyOf(n.self, seen.Epoch+1)
	n.hold(a, key)
	if n.s.mutation != NoFence {
		if err := n.op("a fence", func() error { return a.Preempt(ctx, key) }); err != nil {
			return conflict(err)
		}
	}
	if err := n.unchanged(ctx, a, seen); err != nil {
		return err
	}
	if seen.Owner != ha.None && clean {
		n.s.count("fresh pool claimed")
	}
	first := uint64(1)
	if !clean {
		first = n.process.mirror.State().Next
	}
	id := nvram.NewID()
	if err := nvram.Format(n.region, n.own, nvram.FormatOptions{ID: id, Epoch: seen.Epoch + 1, FirstLSN: max(first, 1), UpdateBytes: updateBytes}); err != nil {
		return err
	}
	return n.label(ctx, a, func(l *raid.Label) {
		was := l.NVRAM
		l.Epoch, l.Owner, l.NVRAM = seen.Epoch+1, byte(n.self), raid.UUID(id)
		l.Flags, l.SoloLSN, l.Opaque = raid.FlagFresh, 0, nil
		if !clean {
			l.Flags, l.Opaque = raid.FlagReplaying, []byte(hex.EncodeToString(was[:]))
		}
	})
}

func (n *node) unchanged(ctx context.Context, a *raid.Array, seen ha.View) error {
	if n.s.mutation == ClaimBlindly {
		return nil
	}
	l, err := a.ReadLabel(ctx)
	if err != nil {
		return err
	}
	v := ha.View{Epoch: l.Epoch, Owner: ha.Controller(l.Owner), Solo: l.Solo(), Replaying: l.Replaying(), Fresh: l.Fresh()}
	if n.s.mutation == IgnoreSolo {
		v.Solo = seen.Solo
	}
	if !v.SameLabel(seen) {
		n.s.count("claim too late")
		return fmt.Errorf("%w: the labels changed since they were looked at", ha.ErrConflict)
	}
	return nil
}

func (n *node) Refresh(ctx context.Context) error {
	a, err := n.openArray(ctx)
	if err != nil {
		return err
	}
	l := a.Label()
	key := keyOf(n.self, l.Epoch)
	n.hold(a, key)
	if err := n.op("a reservation", func() error { return a.Acquire(ctx, key) }); err != nil {
		return conflict(err)
	}
	return n.label(ctx, a, func(*raid.Label) {})
}

func (n *node) Clear(ctx context.Context) error {
	a, err := n.held()
	if err != nil {
		return err
	}
	if err := n.label(ctx, a, func(l *raid.Label) {
		l.Flags &^= raid.FlagReplaying
		l.Opaque = nil
	}); err != nil {
		return err
	}
	n.pmu.Lock()
	p := n.pool
	n.pmu.Unlock()
	if p != nil {
		p.ReleaseSources()
	}
	n.s.count("takeover after a fence")
	return nil
}

func (n *node) Disown(ctx context.Context) error {
	a, err := n.held()
	if err != nil {
		return err
	}
	err = n.label(ctx, a, func(l *raid.Label) { l.Owner, l.Flags, l.SoloLSN, l.Opaque = 0, 0, 0, nil })
	if err == nil {
		n.s.count("handed over")
	}
	return err
}

func (n *node) Confirm(context.Context) error {
	a, err := n.held()
	if err != nil {
		return err
	}
	if n.s.mutation == NoFence || n.s.mutation == NoLease {
		return nil
	}
	n.pmu.Lock()
	key := n.key
	n.pmu.Unlock()
	members := map[string]bool{}
	for _, m := range a.Status().Members {
		members[m.Path] = m.Path != "" && (m.State == raid.Online || m.State == raid.Suspect)
	}
	all, mine, none, others := 0, 0, 0, 0
	for _, d := range n.drives() {
		if !members[d.Name()] {
			continue
		}
		all++
		_, holder, err := d.(*nodePort).Keys()
		switch {
		case err != nil:
		case holder == 0:
			none++
		case holder == key:
			mine++
		default:
			others++
		}
	}
	most := a.Geometry().N/2 + 1
	switch {
	case mine >= most:
		return nil
	case none+others > 0 && all-none-others < most:
		n.s.count("owner found that it was fenced")
		if others == 0 {
			n.s.count("owner without reservation")
		}
		return fmt.Errorf("%w: reservations are another's", ha.ErrConflict)
	}
	return fmt.Errorf("only %d members confirm our reservation", mine)
}

// Form makes the pool; spec is the name and blocks of its LUN.
func (n *node) Form(ctx context.Context, spec any) error {
	key := keyOf(n.self, 1)
	drives := n.drives()
	for _, d := range drives {
		p := d.(*nodePort)
		if err := errors.Join(p.Register(key), p.Reserve(key)); err != nil {
			return conflict(err)
		}
	}
	o := raid.Options{K: 2, M: 2, NoSpares: true, Force: true, Logger: n.log}
	a, err := raid.Create(ctx, drives, o)
	if err != nil {
		return conflict(err)
	}
	n.hold(a, key)
	id := nvram.NewID()
	if err := nvram.Format(n.region, n.own, nvram.FormatOptions{ID: id, Epoch: 1, UpdateBytes: updateBytes}); err != nil {
		return err
	}
	l, err := nvram.Open(ctx, n.region, n.own, nvram.Options{ID: id, Epoch: 1, Logger: n.log})
	if err != nil {
		return err
	}
	p, err := shelf.CreatePool(ctx, &nodeArray{a, n}, n.s.logOf(n, l), n.poolOptions(a.Label().Pool))
	if err == nil {
		spec := spec.(shelf.LUNSpec)
		if _, err = p.CreateLUN(ctx, spec); err == nil {
			err = p.Close(ctx)
		}
	}
	if err = errors.Join(err, l.Close()); err != nil {
		return err
	}
	return n.label(ctx, a, func(l *raid.Label) {
		l.Epoch, l.Owner, l.NVRAM, l.Flags = 1, byte(n.self), raid.UUID(id), raid.FlagFresh
	})
}

func (n *node) poolOptions(id raid.UUID) shelf.Options {
	return shelf.Options{PoolUUID: id, Shelf: "sim", ExtentBlocks: extentBlocks, MaxLUNs: 2, MaxHosts: 2, BatchBlocks: 512, Inline: true, Logger: n.log}
}

func (n *node) Open(ctx context.Context, seen ha.View) error {
	a, err := n.held()
	if err != nil {
		return err
	}
	label := a.Label()
	var sources []shelf.Source
	if label.Replaying() {
		want := string(label.Opaque)
		if st := n.process.mirror.State(); hex.EncodeToString(st.ID[:]) != want || !st.Complete && n.s.mutation != StaleTakeover {
			return fmt.Errorf("%w: the mirror of log %s is to be replayed, NVRAM has one of log %s, complete %t", ha.ErrUnfit, want, st.ID, st.Complete)
		}
		sources = append(sources, n.process.mirror)
		n.s.count("partner's log replayed")
	}
	o := nvram.Options{ID: nvram.ID(label.NVRAM), Epoch: label.Epoch, Replicator: n.link.Replicator(), Witness: n, Fresh: label.Fresh(), Logger: n.log}
	if n.s.mutation == AckWithoutMirror {
		o.Replicator, o.Witness = nil, nil
	}
	l, err := nvram.Open(ctx, n.region, n.own, o)
	if err != nil {
		if errors.Is(err, nvram.ErrEmpty) || errors.Is(err, nvram.ErrForeign) || errors.Is(err, nvram.ErrStale) || errors.Is(err, nvram.ErrCorrupt) {
			n.s.count("owner's NVRAM refused")
			err = fmt.Errorf("%w: %w", ha.ErrUnfit, err)
		}
		return err
	}
	p, err := shelf.OpenPool(ctx, &nodeArray{a, n}, n.s.logOf(n, l), sources, n.poolOptions(label.Pool))
	if err == nil {
		if err = l.Settle(ctx); err != nil {
			p.Abort()
		}
	}
	if err != nil {
		l.Close()
		return conflict(n.reason(err, a))
	}
	watch := make(chan struct{})
	n.pmu.Lock()
	n.nvlog, n.pool, n.watch = l, p, watch
	n.pmu.Unlock()
	go n.watcher(n.process, a, l, p, watch)
	return nil
}

func (n *node) reason(err error, a *raid.Array) error {
	if aerr := a.Err(); aerr != nil && !errors.Is(err, aerr) {
		return fmt.Errorf("%w: %w", err, aerr)
	}
	return err
}

func (n *node) watcher(pr *process, a *raid.Array, l *nvram.Log, p *shelf.Pool, closed chan struct{}) {
	var err error
	select {
	case <-closed:
		return
	case <-p.Failed():
		err = p.Err()
	case <-l.Failed():
		err = l.Err()
	}
	select {
	case <-closed:
		return
	default:
	}
	if n.pass() != nil {
		return
	}
	if err = conflict(n.reason(err, a)); errors.Is(err, ha.ErrConflict) {
		n.s.count("pool met the fence")
		pr.driver.Lost()
		return
	}
	n.s.trace("    %s: the pool failed: %v", n.self, err)
	n.s.count("pool failed")
	pr.driver.Broken()
}

func (n *node) Drain(ctx context.Context) error {
	if err := n.pass(); err != nil {
		return err
	}
	n.pmu.Lock()
	p, l, a := n.pool, n.nvlog, n.array
	n.pmu.Unlock()
	if p == nil {
		return errors.New("no pool is open")
	}
	if err := p.Drain(ctx); err != nil {
		return conflict(n.reason(err, a))
	}
	n.stopWatch()
	n.withdraw()
	if err := errors.Join(p.Close(ctx), l.Close()); err != nil {
		if err = conflict(n.reason(err, a)); !errors.Is(err, ha.ErrConflict) {
			err = fmt.Errorf("%w: %w", ha.ErrBroken, err)
		}
		return err
	}
	return nil
}

func (n *node) withdraw() {
	n.pmu.Lock()
	defer n.pmu.Unlock()
	if n.pool != nil {
		n.s.pools = append(n.s.pools, n.pool.Status().Counters)
	}
	n.pool, n.nvlog, n.serves = nil, nil, false
}

func (n *node) stopWatch() {
	n.pmu.Lock()
	w := n.watch
	n.watch = nil
	n.pmu.Unlock()
	if w != nil {
		close(w)
	}
}

func (n *node) Abort() {
	n.stopWatch()
	n.pmu.Lock()
	p, l := n.pool, n.nvlog
	n.pmu.Unlock()
	n.withdraw()
	if p != nil {
		p.Abort()
	}
	if l != nil {
		l.Close()
	}
	n.closeArray()
}

func (n *node) show(serves bool) {
	n.pmu.Lock()
	defer n.pmu.Unlock()
	n.serves = serves
}

func (n *node) Serve()      { n.show(true) }
func (n *node) Transition() {}
func (n *node) Follow()     { n.show(false) }
func (n *node) Halt()       { n.show(false) }

func (n *node) EnterSolo(ctx context.Context, lsn uint64) error {
	a, err := n.held()
	if err != nil {
		return err
	}
	if n.s.mutation == SkipSolo {
		return nil
	}
	n.s.count("solo entered")
	return n.label(ctx, a, func(l *raid.Label) {
		if l.Flags&raid.FlagSolo == 0 || lsn < l.SoloLSN {
			l.SoloLSN = lsn
		}
		l.Flags = l.Flags&^raid.FlagFresh | raid.FlagSolo
	})
}

func (n *node) LeaveSolo(ctx context.Context) error {
	a, err := n.held()
	if err != nil {
		return err
	}
	l := a.Label()
	switch {
	case l.Solo():
		n.s.count("solo left")
	case l.Fresh():
		if n.s.mutation == StayFresh {
			return nil
		}
		n.s.count("fresh left")
	default:
		return nil
	}
	return n.label(ctx, a, func(l *raid.Label) { l.Flags, l.SoloLSN = l.Flags&^(raid.FlagSolo|raid.FlagFresh), 0 })
}
