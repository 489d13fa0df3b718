package ha

import (
	"context"
	"errors"
	"time"
)

// answerOf says which event answers an action; actions that are not here have no answer.
var answerOf = map[Op]Kind{Look: EvLooked, Reserve: EvReserved, Fence: EvFenced, Claim: EvClaimed, Refresh: EvClaimed, Open: EvOpened,
	Clear: EvCleared, Form: EvFormed, Drain: EvDrained, Disown: EvDisowned}

// worker performs the queued actions, one at a time.
func (d *Driver) worker(ctx context.Context, work <-chan job) {
	for {
		select {
		case <-ctx.Done():
			return
		case j := <-work:
			m := message{answer: true, event: d.perform(ctx, j)}
			select {
			case d.events <- m:
			case <-ctx.Done():
				return
			}
		}
	}
}

func (d *Driver) perform(ctx context.Context, j job) Event {
	op, st := j.op, j.state
	var err error
	switch op {
	case Look:
		v, err := d.o.Members.Look(ctx)
		if err != nil {
			d.trouble(op, err)
			v = View{Unreadable: true}
		}
		return Event{Kind: EvLooked, View: v}
	case Reserve:
		err = d.o.Members.Reserve(ctx, st.Seen)
	case Fence:
		d.o.Mirror.Freeze()
		if err = d.o.Members.Fence(ctx, st.Seen); err == nil {
			d.fencedAt = time.Now()
		}
	case Release:
		if err := d.o.Members.Release(ctx); err != nil {
			d.o.Logger.Warn("ha: release", "err", err)
		}
		return Event{Kind: EvNothing}
	case Freeze:
		d.o.Mirror.Freeze()
		return Event{Kind: EvNothing}
	case Thaw:
		d.o.Mirror.Thaw(st.Seen)
		return Event{Kind: EvNothing}
	case Claim:
		lose := st.Lose && st.Clean && st.Seen.Owner != None && !st.Seen.Fresh
		if lose {
			d.o.Logger.Warn("ha: by order of the operator what was acknowledged and not destaged is given up", "labels", st.Seen.String())
		}
		err = d.o.Members.Claim(ctx, st.Seen, st.Clean, lose)
	case Refresh:
		err = d.o.Members.Refresh(ctx)
	case Open:
		err = d.o.Pool.Open(ctx, st.Seen)
	case Clear:
		if err = d.outwait(ctx); err == nil {
			err = d.o.Members.Clear(ctx)
		}
	case Form:
		err = d.o.Pool.Form(ctx, j.spec)
	case Serve:
		d.serveNow(ctx)
		return Event{Kind: EvNothing}
	case Transition:
		d.o.Pool.Transition()
		return Event{Kind: EvNothing}
	case Drain:
		d.o.Gate.Quiesce()
		if err = d.drain(ctx); err == nil {
			d.o.Gate.Shut()
			err = d.stillWanted(ctx, j.nonce)
		}
	case Disown:
		err = d.o.Members.Disown(ctx)
	case Follow:
		d.o.Pool.Follow()
		return Event{Kind: EvNothing}
	case Ask:
		if err := d.o.Mirror.Send(ctx, MsgAsk, []byte(askConfirm)); err != nil {
			d.o.Logger.Warn("ha: the partner cannot be asked to hand over", "err", err)
			return Event{Kind: EvTimeout}
		}
		return Event{Kind: EvNothing}
	case Answer:
		d.send(MsgDone, "")
		return Event{Kind: EvNothing}
	}
	if err != nil {
		d.trouble(op, err)
	}
	return Event{Kind: answerOf[op], Result: resultOf(err)}
}

func resultOf(err error) Result {
	switch {
	case err == nil:
		return OK
	case errors.Is(err, ErrConflict):
		return Conflict
	case errors.Is(err, ErrUnfit):
		return Unfit
	case errors.Is(err, ErrBroken):
		return Broken
	case errors.Is(err, errUnwanted):
		return Unwanted
	}
	return Failure
}

// outwait waits until a partner that was fenced while silent cannot believe in its lease any more: from the
// fence on it could not confirm, and its last confirmation began before.
func (d *Driver) outwait(ctx context.Context) error {
	from := d.fencedAt
	if from.IsZero() {
		from = time.Now()
	}
	left := d.o.Lease + d.o.Lease/8 - time.Since(from)
	if left <= 0 {
		return nil
	}
	t := time.NewTimer(left)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// serveNow opens the gate with a lease that is confirmed first; where the confirmation fails, the confirmer
// goes on trying and the gate answers "transitioning" until it succeeds.
func (d *Driver) serveNow(ctx context.Context) {
	d.o.Gate.Open()
	d.confirm(ctx)
	d.o.Pool.Serve()
}

// drain tells the partner that it goes on, so that it does not lose patience.
func (d *Driver) drain(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, d.o.HandoverLimit)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- d.o.Pool.Drain(ctx) }()
	t := time.NewTicker(time.Second)
	defer t.Stop()
	for {
		select {
		case err := <-done:
			return err
		case <-t.C:
			d.send(MsgProgress, "")
		}
	}
}

// confirmer keeps the lease of an owner alive, and finds out that it was fenced even if nobody writes.
func (d *Driver) confirmer(ctx context.Context) {
	t := time.NewTicker(d.o.ConfirmInterval)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			if st, _, _ := d.State(); st.Phase == Owner {
				d.confirm(ctx)
			}
		}
	}
}

func (d *Driver) confirm(ctx context.Context) {
	began := d.o.Gate.Now()
	err := d.o.Members.Confirm(ctx)
	switch {
	case err == nil:
		d.o.Gate.Extend(began + d.o.Lease)
	case ctx.Err() != nil:
	case errors.Is(err, ErrConflict):
		d.o.Logger.Error("ha: the reservation is lost", "err", err)
		d.Lost()
	default:
		d.o.Logger.Warn("ha: the reservation could not be confirmed", "err", err)
	}
}
