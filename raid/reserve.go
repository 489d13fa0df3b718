package raid

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
)

// Fencing: the same reservation on every member that can be reached. A member that cannot be fenced is dropped as
// missing, so that it becomes failed with the first write: whatever an old owner still writes to it, nobody reads.

type keyring struct {
	registered []uint64
	holder     uint64
	err        error
}

func readKeys(d Drive) (k keyring) {
	r, ok := d.(Reserver)
	if !ok {
		return keyring{err: ErrNoReservations}
	}
	k.registered, k.holder, k.err = r.Keys()
	return k
}

// tally sums up the members' answers: all keys, and the key that holds most members.
func tally(rings []keyring) (registered []uint64, holder uint64, members int) {
	held := make(map[uint64]int)
	for _, k := range rings {
		if k.err != nil {
			continue
		}
		for _, r := range k.registered {
			if !slices.Contains(registered, r) {
				registered = append(registered, r)
			}
		}
		if k.holder != 0 {
			held[k.holder]++
		}
	}
	slices.Sort(registered)
	for key, n := range held {
		if n > members || n == members && key < holder {
			holder, members = key, n
		}
	}
	return registered, holder, members
}

// Keys returns all keys registered on any member, and the one that holds the reservation on most (0: none).
func (a *Array) Keys(ctx context.Context) (registered []uint64, holder uint64, err error) {
	var (
		mu    sync.Mutex // a member that answers too late answers into nothing
		rings []keyring
	)
	err = a.onMembers(ctx, func(_ *member, d Drive) error {
		k := readKeys(d)
		mu.Lock()
		defer mu.Unlock()
		rings = append(rings, k)
		return k.err
	})
	mu.Lock()
	defer mu.Unlock()
	registered, holder, _ = tally(rings)
	return registered, holder, err
}

// Acquire registers key and takes the reservation on every member. ErrReservation: another key holds it
// on some member; then no registration of ours is left.
func (a *Array) Acquire(ctx context.Context, key uint64) error {
	err := a.onMembers(ctx, func(_ *member, d Drive) error {
		r, ok := d.(Reserver)
		if !ok {
			return ErrNoReservations
		}
		if err := r.Register(key); err != nil {
			return err
		}
		return hold(r, key)
	})
	if errors.Is(err, ErrReservation) {
		// Best effort: the reservation is what counts, a registration alone would only let us write.
		uerr := a.drop(ctx, key)
		return fmt.Errorf("raid: acquire: %w", errors.Join(err, uerr))
	}
	if err != nil {
		return fmt.Errorf("raid: acquire: %w", err)
	}
	a.setKey(key)
	return nil
}

// hold takes the reservation for a key that is registered. A drive knows its holder by the port that it came from, not
// by the key alone: a controller that lost its power and came back with other ports (another HBA, an initiator with
// another session) finds its own key holding, and is refused. Then it preempts what it was before, and so also fences
// it, should it still live.
func hold(r Reserver, key uint64) error {
	err := r.Reserve(key)
	if !isReservation(err) {
		return err
	}
	if _, holder, kerr := r.Keys(); kerr != nil || holder != key {
		return err
	}
	return r.Preempt(key, key)
}

// Preempt registers key, removes every other registration, and holds the reservation: when it returns nil, no
// other key can write on a majority of the members, nor on any member that this array will read.
func (a *Array) Preempt(ctx context.Context, key uint64) error {
	err := a.onMembers(ctx, func(_ *member, d Drive) error {
		r, ok := d.(Reserver)
		if !ok {
			return ErrNoReservations
		}
		return preempt(r, key)
	})
	if err != nil {
		return fmt.Errorf("raid: preempt: %w", err)
	}
	a.setKey(key)
	return nil
}

// preempt fences one drive. The old owner may register again between two steps: so it looks until it is alone.
func preempt(r Reserver, key uint64) error {
	if err := r.Register(key); err != nil {
		return err
	}
	const attempts = 8
	for range attempts {
		registered, holder, err := r.Keys()
		if err != nil {
			return err
		}
		stranger := func(k uint64) bool { return k != key }
		if holder == key && len(registered) > 0 && !slices.ContainsFunc(registered, stranger) {
			return hold(r, key)
		}
		if err := evict(r, key, registered, holder); err != nil && !errors.Is(err, ErrReservation) {
			return err // a conflict means only that the keys changed since we looked
		}
	}
	return fmt.Errorf("another controller keeps registering: %w", ErrReservation)
}

// evict is one attempt to be alone on a drive. The holder goes first: preempting it takes the reservation
// over in one step.
func evict(r Reserver, key uint64, registered []uint64, holder uint64) error {
	if !slices.Contains(registered, key) {
		if err := r.Register(key); err != nil {
			return err
		}
	}
	if holder != 0 && holder != key {
		if err := r.Preempt(key, holder); err != nil {
			return err
		}
	}
	for _, other := range registered {
		if other != key && other != holder {
			if err := r.Preempt(key, other); err != nil {
				return err
			}
		}
	}
	if holder == 0 {
		return r.Reserve(key)
	}
	return nil
}

// Release gives the reservation back and drops the registration, on every member.
func (a *Array) Release(ctx context.Context, key uint64) error {
	if err := a.drop(ctx, key); err != nil {
		return fmt.Errorf("raid: release: %w", err)
	}
	a.setKey(0)
	return nil
}

// setKey remembers the reservation that members which join later must have too.
func (a *Array) setKey(key uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.key = key
}

func (a *Array) drop(ctx context.Context, key uint64) error {
	return a.onMembers(ctx, func(_ *member, d Drive) error {
		r, ok := d.(Reserver)
		if !ok {
			return ErrNoReservations
		}
		registered, holder, err := r.Keys()
		if err != nil {
			return err
		}
		if holder == key {
			if err := r.Release(key); err != nil {
				return err
			}
		}
		if slices.Contains(registered, key) {
			return r.Unregister(key)
		}
		return nil
	})
}

// onMembers does f on every working member. ErrReservation from any is the answer. Members where f fails otherwise
// are dropped, unless that leaves no majority.
func (a *Array) onMembers(ctx context.Context, f func(*member, Drive) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := a.enter(); err != nil {
		return err
	}
	defer a.leave()
	t := a.newBatch()
	a.mu.Lock()
	for _, m := range a.members {
		if m.state == Online || m.state == Restoring {
			t.call(m, func(d Drive) error { return f(m, d) })
		}
	}
	a.mu.Unlock()
	t.run(a.opts.WriteTimeout)
	var first, conflict error
	var bad []*member
	good := 0
	for _, o := range t.ops {
		err := o.err()
		switch {
		case err == nil:
			good++
		case isReservation(err):
			conflict = fmt.Errorf("%v: %w", o.member, err)
		default:
			bad = append(bad, o.member)
			if first == nil {
				first = fmt.Errorf("%v: %w", o.member, err)
			}
		}
	}
	if conflict != nil {
		return conflict
	}
	if n := a.Geometry().N; good < majority(n) {
		if first == nil {
			return fmt.Errorf("%d of %d members: %w", good, n, ErrNoMajority)
		}
		return fmt.Errorf("%d of %d members: %w: %w", good, n, ErrNoMajority, first)
	}
	for _, m := range bad {
		a.lose(m, first)
	}
	return nil
}

// lose makes a member missing. The next write records it as failed first.
func (a *Array) lose(m *member, why error) {
	a.mu.Lock()
	if m.state == Restoring {
		m.state = Failed // the next label change takes the copy-back out
	} else {
		m.state = Missing
	}
	a.mu.Unlock()
	a.ready.Store(false)
	a.cache.clear()
	a.log(slog.LevelWarn, "raid: member cannot be reserved", "member", m.index, "err", why)
}
