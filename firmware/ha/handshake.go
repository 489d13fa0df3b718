package ha

import (
	"context"
	"crypto/rand"
	"errors"
	"time"
)

// Handing over by agreement. An ask may lie in a buffer while its sender gives up, or dies; whoever acts on it then leaves a pool
// that nobody owns until an operator comes. So the owner asks back, and once more when all is destaged:
//
//	standby, Asking                        owner
//	ask "confirm"          ──────────────►
//	                       ◄────────────── offer n         n: new with each offer
//	accept n, if Asking    ──────────────► HandingOver, if n is of the newest offer and that is offerAge old at most
//	                       ◄────────────── progress        each second while it drains
//	                       ◄────────────── progress n      drained
//	accept n, if Asking    ──────────────► Disown; none in offerAge: it is the owner still, and opens the pool again
//
// offerAge is half of AskTimeout, measured by the owner's clock from the offer on. The standby's patience begins anew after it, with each
// offer and progress that comes, so it is Asking still when the owner acts. An owner that was stopped meanwhile finds the offer too old. What is left is
// that the standby dies, or the owner is stopped, after the last accept: then nobody owns the pool, nothing is lost, and an operator decides.
//
// None of it matters for safety: the machine takes an ask at any moment (model_test.go). An ask without a body is of a firmware from before
// 2026-11-27 and is obeyed at once, as it was; such an owner ignores the body.

// askConfirm is the body of an ask whose sender answers offers.
const askConfirm = "confirm"

// errUnwanted: who asked for the pool does not want it any more.
var errUnwanted = errors.New("ha: the partner that asked for the pool is gone, or has given up")

func (d *Driver) offerAge() time.Duration { return d.o.AskTimeout / 2 }

// handshake is an offer of an owner. The loop has it.
type handshake struct {
	nonce string // empty: none
	at    time.Time
}

// handshake deals with messages of the partner; false: there is no event in it for the machine.
func (d *Driver) handshake(m *message) bool {
	switch m.kind {
	case MsgAsk:
		if d.state.Phase != Owner {
			break
		}
		if d.offered = (handshake{}); string(m.body) == askConfirm {
			d.offered = handshake{rand.Text(), time.Now()}
			d.tell(MsgOffer, d.offered.nonce)
			return false
		}
	case MsgOffer:
		if d.patient() {
			d.tell(MsgAccept, string(m.body))
		}
		return false
	case MsgProgress:
		if d.patient() && len(m.body) > 0 {
			d.tell(MsgAccept, string(m.body))
		}
		return false
	case MsgAccept:
		nonce := string(m.body)
		if nonce == "" || nonce != d.offered.nonce {
			return false
		}
		if d.state.Phase == HandingOver {
			select {
			case d.wanted <- nonce:
			default:
			}
		}
		if d.state.Phase != Owner || time.Since(d.offered.at) > d.offerAge() {
			return false
		}
		m.event.Kind = EvHandoverAsked
	}
	return true
}

// patient: the partner is heard of while we ask.
func (d *Driver) patient() bool {
	if d.state.Phase != Asking || time.Since(d.asked) >= d.o.HandoverLimit {
		return false
	}
	d.timeout.Reset(d.o.AskTimeout)
	return true
}

// stillWanted asks the partner a last time. The worker calls it.
func (d *Driver) stillWanted(ctx context.Context, nonce string) error {
	if nonce == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, d.offerAge())
	defer cancel()
	again := time.NewTicker(d.offerAge() / 4)
	defer again.Stop()
	for len(d.wanted) > 0 {
		<-d.wanted
	}
	began := time.Now()
	for {
		d.send(MsgProgress, nonce)
		select {
		case got := <-d.wanted:
			if got == nonce && time.Since(began) <= d.offerAge() {
				return nil
			}
		case <-again.C:
		case <-ctx.Done():
			return errUnwanted
		}
	}
}
