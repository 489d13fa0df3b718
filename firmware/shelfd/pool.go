package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/ledge-storage/ledge/firmware/control"
	"github.com/ledge-storage/ledge/firmware/ha"
	"github.com/ledge-storage/ledge/firmware/shelf"
	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/raid/layout"
)

// Form makes array, pool and labels. The label with the epoch is written last: until then the members count
// as blank, and the next attempt starts over.
func (b *backend) Form(ctx context.Context, spec any) error {
	s, _ := spec.(control.PoolSpec)
	members, err := b.drives.lend(s.Drives...)
	if err != nil {
		return &control.Hint{Err: fmt.Errorf("%w: %w", control.ErrInvalid, err), Hint: "'ledge drive list' shows the drives that this controller has"}
	}
	key := keyOf(b.self, 1)
	a, err := b.createArray(ctx, members, key, s)
	if err != nil {
		giveBack(members)
		return conflict(err)
	}
	b.hold(a, key)
	id := nvram.NewID()
	if err := nvram.Format(b.region, b.own, nvram.FormatOptions{ID: id, Identity: b.conf.identity(), Epoch: 1}); err != nil {
		return err
	}
	l, err := nvram.Open(ctx, b.region, b.own, nvram.Options{ID: id, Epoch: 1, Logger: b.log})
	if err != nil {
		return err
	}
	p, err := shelf.CreatePool(ctx, a, l, shelf.Options{PoolUUID: a.Label().Pool, Shelf: b.conf.Shelf, Maintenance: shelf.MaintenanceOptions{Off: true}, Logger: b.log})
	if err == nil {
		err = p.Close(ctx)
	}
	if cerr := l.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = a.WriteLabel(ctx, func(l *raid.Label) {
			l.Epoch, l.Owner, l.NVRAM, l.Flags = 1, byte(b.self), raid.UUID(id), raid.FlagFresh
		})
	}
	return conflict(err)
}

// createArray reserves the drives and makes an array of them.
func (b *backend) createArray(ctx context.Context, members []raid.Drive, key uint64, s control.PoolSpec) (*raid.Array, error) {
	o := raid.Options{K: b.conf.Array.Data, M: b.conf.Array.Parity, Force: s.Force, Logger: b.log, CacheBytes: sumBytes()}
	if s.Data > 0 {
		o.K, o.M = s.Data, s.Parity
	}
	if s.Spares >= 0 {
		o.Spares, o.NoSpares = s.Spares, s.Spares == 0
	}
	if need := o.K + o.M + o.Spares; len(members) < need {
		return nil, &control.Hint{Err: fmt.Errorf("%w: %d drives, %d+%d with %d spare columns needs %d at least", control.ErrInvalid, len(members), o.K, o.M, o.Spares, need),
			Hint: "'ledge drive list' shows what this controller has; drives are looked for where the field drives of the configuration says"}
	}
	if !s.Force {
		lost, err := b.notBlank(ctx, members)
		if err != nil {
			return nil, err
		}
		if len(lost) > 0 {
			return nil, &control.Hint{Err: fmt.Errorf("%w: not blank: %s", control.ErrInvalid, strings.Join(lost, "; ")), Hint: `what is on the drives will be lost if you send {"force":true}`}
		}
		o.Force = true // all that is on them is a pool that was never finished
	}
	if err := b.drives.reserveAll(ctx, members, key, b.mine); err != nil {
		return nil, err
	}
	a, err := raid.Create(ctx, members, o)
	if errors.Is(err, layout.ErrGeometry) || errors.Is(err, raid.ErrSize) {
		err = fmt.Errorf("%w: %w", control.ErrInvalid, err)
	}
	return a, err
}

// notBlank says what would be lost on drives that are to become a new pool. Members of a pool whose making was cut, so
// that its label never got an epoch, lose nothing.
func (b *backend) notBlank(ctx context.Context, list []raid.Drive) (lost []string, err error) {
	s, _ := raid.ReadLabels(ctx, list, raid.UUID{}) // each drive's own error is in it
	for i, d := range list {
		var x control.Drive
		if i >= len(s.Drives) {
			return nil, fmt.Errorf("%s: its label could not be read", d.Name())
		}
		describe(&x, s.Drives[i], raid.Label{}, false, d)
		switch {
		case x.Label == control.DriveBlank, x.Member != nil && x.Epoch == 0:
		case x.Member != nil:
			lost = append(lost, fmt.Sprintf("%s is member %d of pool %s", d.Name(), *x.Member, x.Pool))
		case x.Label == control.DriveData:
			lost = append(lost, fmt.Sprintf("%s holds data without a label", d.Name()))
		default:
			return nil, fmt.Errorf("%w: %s: %s", control.ErrInvalid, d.Name(), x.Detail)
		}
	}
	return lost, nil
}

// Open opens the log and the pool over the array that Claim, Refresh or Form left open, replays, and watches it.
func (b *backend) Open(ctx context.Context, seen ha.View) error {
	a, err := b.held()
	if err != nil {
		return err
	}
	label := a.Label()
	var sources []shelf.Source
	if label.Replaying() {
		want := string(label.Opaque)
		if st := b.mirror.State(); hex.EncodeToString(st.ID[:]) != want || !st.Complete {
			return fmt.Errorf("%w: the mirror of log %s is to be replayed, NVRAM has one of log %s, complete %t", ha.ErrUnfit, want, st.ID, st.Complete)
		}
		sources = append(sources, b.mirror)
		b.log.Info("replaying the partner's log", "lsn", b.mirror.State().Next)
	}
	l, err := nvram.Open(ctx, b.region, b.own, nvram.Options{ID: nvram.ID(label.NVRAM), Identity: b.conf.identity(), Epoch: label.Epoch, Replicator: b.link.Replicator(), Witness: b, Fresh: label.Fresh(), Logger: b.log})
	if err != nil {
		if errors.Is(err, nvram.ErrEmpty) || errors.Is(err, nvram.ErrForeign) || errors.Is(err, nvram.ErrStale) || errors.Is(err, nvram.ErrCorrupt) {
			err = fmt.Errorf("%w: %s: %w", ha.ErrUnfit, b.conf.NVRAM.Path, err)
		}
		return err
	}
	b.log.Info("opening the pool", "epoch", label.Epoch, "log", l.Stats().Next)
	p, err := shelf.OpenPool(ctx, a, l, sources, shelf.Options{AcceptOld: string(label.Opaque) == gaveUp, PoolUUID: label.Pool, Shelf: b.conf.Shelf, Maintenance: b.conf.Maintenance.options(), Logger: b.log})
	if err == nil {
		if err = l.Settle(ctx); err != nil {
			p.Abort()
		}
	}
	if err != nil {
		if cerr := l.Close(); cerr != nil {
			b.log.Debug("closing the log", "err", cerr)
		}
		return conflict(b.reason(err, a))
	}
	watch := make(chan struct{})
	b.mu.Lock()
	b.nvlog, b.pool, b.watch = l, p, watch
	b.mu.Unlock()
	go b.watcher(a, l, p, watch)
	return nil
}

// reason prefers the array's own error: a fence met by the witness reaches us as a failed log only.
func (b *backend) reason(err error, a *raid.Array) error {
	if aerr := a.Err(); aerr != nil && !errors.Is(err, aerr) {
		return fmt.Errorf("%w: %w", err, aerr)
	}
	return err
}

// watcher reports the end of the pool or the log to the driver. closed ends it.
func (b *backend) watcher(a *raid.Array, l *nvram.Log, p *shelf.Pool, closed chan struct{}) {
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
	case <-closed: // closing the pool is a failure only to those who still use it
		return
	default:
	}
	err = conflict(b.reason(err, a))
	if errors.Is(err, ha.ErrConflict) {
		b.log.Error("fenced: another controller owns the members", "err", err)
		b.lost()
		return
	}
	b.log.Error("the pool failed", "err", err)
	b.broken()
}

// Drain closes the pool with everything destaged, or with what is left in the log when ctx ends first; only the
// former is success.
func (b *backend) Drain(ctx context.Context) error {
	b.mu.Lock()
	p, l, a := b.pool, b.nvlog, b.array
	b.mu.Unlock()
	if p == nil {
		return errors.New("no pool is open")
	}
	// Before the drain, so that nothing works against it and the scrub's position is in what is drained.
	release, err := p.HoldMaintenance(ctx)
	if err != nil {
		return conflict(b.reason(err, a))
	}
	if err := p.Drain(ctx); err != nil {
		release()
		return conflict(b.reason(err, a))
	}
	b.tasks.stop() // before somebody else may write the members
	b.stopWatch()
	b.withdraw()
	err = p.Close(ctx)
	if cerr := l.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		if err = conflict(b.reason(err, a)); !errors.Is(err, ha.ErrConflict) {
			err = fmt.Errorf("%w: %w", ha.ErrBroken, err)
		}
	}
	return err
}

// withdraw takes pool and log out of everybody's sight; who closes them has them.
func (b *backend) withdraw() {
	b.shows.Lock()
	defer b.shows.Unlock()
	b.mu.Lock()
	b.pool, b.nvlog = nil, nil
	b.mu.Unlock()
	b.front.withdraw()
}

func (b *backend) stopWatch() {
	b.mu.Lock()
	w := b.watch
	b.watch = nil
	b.mu.Unlock()
	if w != nil {
		close(w)
	}
}

// Abort closes what is open without writing.
func (b *backend) Abort() {
	b.stopWatch()
	b.mu.Lock()
	p, l := b.pool, b.nvlog
	b.mu.Unlock()
	b.withdraw()
	if p != nil {
		p.Abort()
	}
	if l != nil {
		if err := l.Close(); err != nil {
			b.log.Debug("closing the log", "err", err)
		}
	}
	b.closeArray()
}

// Serve, Transition, Follow and Halt show initiators where ownership stands.
func (b *backend) Serve() {
	b.publish()
	b.front.states(roleOwner, b.link.Connected())
}

func (b *backend) Transition() { b.front.states(roleMoving, b.link.Connected()) }
func (b *backend) Follow()     { b.front.states(roleStandby, b.link.Connected()) }
func (b *backend) Halt()       { b.front.states(roleGone, b.link.Connected()) }

// publish brings the front up to date with the pool's LUNs and hosts, and tells the partner.
func (b *backend) publish() {
	b.shows.Lock()
	defer b.shows.Unlock()
	b.mu.Lock()
	p := b.pool
	b.mu.Unlock()
	if p == nil {
		return
	}
	inv := inventory(p)
	for i := range inv {
		inv[i].device = b.gate.Device(inv[i].device)
	}
	b.front.show(inv)
	b.tell(inv)
}

// tell sends the LUNs to the partner, who shows them with standby paths.
func (b *backend) tell(inv []unitInfo) {
	body, err := encodeInventory(inv)
	if err == nil && b.link.Connected() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		err = b.link.Send(ctx, msgLUNs, body)
	}
	if err != nil {
		b.log.Warn("the partner was not told of the LUNs", "err", err)
	}
}
