package ha

import (
	"context"
	"errors"
	"log/slog"
	"time"
)

// The edge of the driver: what it acts on, and what those answer with.

// Errors that the interfaces below answer with, wrapped.
var (
	// ErrConflict: a member answered RESERVATION CONFLICT, or carries a label of a newer epoch.
	ErrConflict = errors.New("ha: another controller holds the members")
	// ErrUnfit: the own NVRAM does not carry the log that the label names.
	ErrUnfit = errors.New("ha: NVRAM does not hold the pool's log")
	// ErrBroken: Drain could not close what it had begun to close.
	ErrBroken = errors.New("ha: the pool did not close")
	// ErrRefused: the operator's order is refused; the text says why and what to do.
	ErrRefused = errors.New("refused")
	// ErrStopped: the driver ended before the order was answered.
	ErrStopped = errors.New("ha: stopping")
)

// Members are the pool's drives as ownership sees them: labels and reservations, on majorities.
type Members interface {
	// Look reads the labels, the reservation's holder and the state of the own mirror. A look at too few
	// members is a View that says Unreadable.
	Look(ctx context.Context) (View, error)
	// Reserve registers this controller and takes the reservation, preempting nobody: ErrConflict where the
	// partner holds it, and no registration is left behind.
	Reserve(ctx context.Context, seen View) error
	// Fence registers this controller at the next epoch and preempts every other key, on a majority.
	Fence(ctx context.Context, seen View) error
	// Release drops reservation and registration of this controller.
	Release(ctx context.Context) error
	// Claim formats the own log and writes the label: epoch+1, owned by this controller, replaying unless clean. lose: what was acknowledged and
	// not destaged is given up, so that Open finds stripes that were being changed, until Clear.
	Claim(ctx context.Context, seen View, clean, lose bool) error
	// Refresh writes the label as it is, on a majority.
	Refresh(ctx context.Context) error
	// Clear writes the label without the mark Replaying.
	Clear(ctx context.Context) error
	// Disown writes the label with no owner.
	Disown(ctx context.Context) error
	// Confirm returns nil while this controller holds the reservation on a majority; ErrConflict once another
	// does.
	Confirm(ctx context.Context) error
}

// Pool is what the owner opens and the front that initiators see.
type Pool interface {
	// Form reserves the members, creates array, log, pool and labels (epoch 1, owned by this controller).
	Form(ctx context.Context, spec any) error
	// Open opens the log that the label names and the pool, and replays; with seen.Replaying the mirror of the
	// partner's log too, destaged and flushed before the return. ErrUnfit, ErrConflict.
	Open(ctx context.Context, seen View) error
	// Drain finishes what is being served, destages all of it and closes the pool. After an error the pool is open
	// as before, unless it is ErrConflict or ErrBroken.
	Drain(ctx context.Context) error
	// Abort closes what is open without writing anything. At the end of Run it may come while another call hangs.
	Abort()
	// Serve shows the LUNs with optimized paths; Transition says that ownership moves; Follow shows the LUNs
	// that the owner told of, with standby paths; Halt makes paths unavailable.
	Serve()
	Transition()
	Follow()
	Halt()
}

// Mirror is the link to the partner and the mirror of its log in the own NVRAM.
type Mirror interface {
	// Freeze: from its return on no frame is written or acknowledged.
	Freeze()
	// Thaw: the owner that seen names may send frames (none where nobody owns the pool).
	Thaw(seen View)
	// Connected tells whether the partner answers on the link now.
	Connected() bool
	// Send sends a message to the partner; it may get lost.
	Send(ctx context.Context, kind string, body []byte) error
}

// Kinds of messages between the drivers, sent with Mirror.Send and fed to Driver.Message. handshake.go tells of their bodies.
const (
	MsgAsk      = "ha.ask"      // hand over, please
	MsgOffer    = "ha.offer"    // do you still want it?
	MsgAccept   = "ha.accept"   // yes
	MsgProgress = "ha.progress" // draining
	MsgDone     = "ha.done"     // handed over
	MsgDeny     = "ha.deny"     // not the owner
)

// Options of a Driver. Zero durations are replaced by the defaults given.
type Options struct {
	Self    Controller
	Members Members
	Pool    Pool
	Mirror  Mirror
	Gate    *Gate
	Logger  *slog.Logger
	// LookInterval (1 s) between looks of a waiting controller.
	LookInterval time.Duration
	// AskTimeout (5 s) of silence ends a handover that was asked for; HandoverLimit (60 s) ends it in any case.
	AskTimeout, HandoverLimit time.Duration
	// Lease (4 s) is for how long a confirmed reservation lets the owner answer; ConfirmInterval (1 s) between
	// confirmations. Both controllers of a shelf must use the same lease.
	Lease, ConfirmInterval time.Duration
	// Changed, if not nil, is called from the loop after each change of phase. It must not block.
	Changed func(State)
}

func (o *Options) defaults() {
	for _, d := range []struct {
		v *time.Duration
		d time.Duration
	}{{&o.LookInterval, time.Second}, {&o.AskTimeout, 5 * time.Second}, {&o.HandoverLimit, time.Minute}, {&o.Lease, 4 * time.Second}, {&o.ConfirmInterval, time.Second}} {
		if *d.v == 0 {
			*d.v = d.d
		}
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
}
