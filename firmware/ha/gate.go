package ha

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ledge-storage/ledge/target"
)

// The gate stands before every LUN of the pool. A command is answered only if, when its answer is ready, the
// gate is open and the lease has not run out.
//
// Why a lease: writes of a fenced owner cannot be acknowledged whatever it believes (the mirror is frozen, the
// members refuse "solo"), but its reads could be: a controller that was stopped for a minute and goes on would
// answer from its memory what the new owner has overwritten since. So the answer of a read asks the clock. The
// lease is measured from the *beginning* of the last confirmation, on a clock that goes on while the process is
// stopped; the new owner waits the lease out before its first answer (driver.outwait).

//
// A lease that ran out on an owner that is only slow (a loaded machine, a drive that hangs) costs no error: the
// answer waits for the next confirmation, for leaseWait at most.

const leaseWait = 10 * time.Second

// Gate is safe for concurrent use. Its zero value is not usable: NewGate.
type Gate struct {
	start time.Time
	clock func() time.Duration
	state atomic.Int32
	until atomic.Int64 // on clock

	mu      sync.Mutex    // guards changed
	changed chan struct{} // closed and made anew with each change of state or lease
}

// NewGate returns a shut gate. clock is monotonic; nil: the system's.
func NewGate(clock func() time.Duration) *Gate {
	g := &Gate{start: time.Now(), clock: clock, changed: make(chan struct{})}
	if clock == nil {
		g.clock = func() time.Duration { return time.Since(g.start) }
	}
	return g
}

// Now is the time on the gate's clock.
func (g *Gate) Now() time.Duration { return g.clock() }

const (
	gateShut    = iota // nothing passes
	gateClosing        // what is inside may answer; nothing new enters
	gateOpen
	gateSealed // shut for ever
)

// Open lets commands through while the lease lasts. A sealed gate stays shut.
func (g *Gate) Open() { g.move(gateOpen) }

// Quiesce lets nothing new in; commands that are inside still answer.
func (g *Gate) Quiesce() { g.move(gateClosing) }

// Shut stops every answer from now on.
func (g *Gate) Shut() { g.move(gateShut) }

// Seal shuts the gate for ever: the process is about to end.
func (g *Gate) Seal() {
	g.state.Store(gateSealed)
	g.wake()
}

func (g *Gate) move(to int32) {
	for {
		old := g.state.Load()
		if old == gateSealed || g.state.CompareAndSwap(old, to) {
			g.wake()
			return
		}
	}
}

// wake lets those look again who wait for the lease.
func (g *Gate) wake() {
	g.mu.Lock()
	defer g.mu.Unlock()
	close(g.changed)
	g.changed = make(chan struct{})
}

// Extend moves the end of the lease; never back.
func (g *Gate) Extend(until time.Duration) {
	for {
		old := g.until.Load()
		if int64(until) <= old {
			return
		}
		if g.until.CompareAndSwap(old, int64(until)) {
			g.wake()
			return
		}
	}
}

// enter returns nil if a command may begin.
func (g *Gate) enter(ctx context.Context) error {
	if g.state.Load() == gateClosing {
		return target.ErrTransition
	}
	return g.leave(ctx)
}

// leave returns nil if an answer may leave now.
func (g *Gate) leave(ctx context.Context) error {
	done, err := g.look()
	if done {
		return err
	}
	t := time.NewTimer(leaseWait)
	defer t.Stop()
	for {
		g.mu.Lock()
		changed := g.changed
		g.mu.Unlock()
		if done, err := g.look(); done {
			return err
		}
		select {
		case <-changed:
		case <-t.C:
			return target.ErrTransition
		case <-ctx.Done():
			return target.ErrTransition
		}
	}
}

// look returns false while the gate is open and the lease has run out.
func (g *Gate) look() (done bool, err error) {
	if s := g.state.Load(); s != gateOpen && s != gateClosing {
		return true, target.ErrUnavailable
	}
	return int64(g.clock()) < g.until.Load(), nil
}

// Device puts the gate before dev. What a target.Provisioned tells of its space passes ungated: a figure, which
// promises nothing.
func (g *Gate) Device(dev target.Device) target.Device {
	d := &gated{g, dev}
	p, thin := dev.(target.Provisioned)
	f, fetches := dev.(target.Fetcher)
	switch {
	case thin && fetches:
		return &gatedLUN{gatedThin{d, p}, f}
	case thin:
		return &gatedThin{d, p}
	}
	return d
}

// gatedLUN is a LUN of the pool.
type gatedLUN struct {
	gatedThin
	fetcher target.Fetcher
}

// Fetch implements target.Fetcher.
func (d *gatedLUN) Fetch(ctx context.Context, lba uint64, n int, dst [][]byte) (out [][]byte, loan target.Loan, err error) {
	err = d.guard(ctx, func() (err error) { out, loan, err = d.fetcher.Fetch(ctx, lba, n, dst); return err })
	if err != nil && loan != nil { // it may not leave any more
		loan.Return()
		loan = nil
	}
	if err != nil {
		out = dst
	}
	return out, loan, err
}

type gatedThin struct {
	*gated
	pool target.Provisioned
}

func (d *gatedThin) Space() target.Space { return d.pool.Space() }

type gated struct {
	g   *Gate
	dev target.Device
}

// guard runs op between two checks. After a failed second check the outcome of a write is unknown to the
// initiator, as with any lost path: it may be on media, and it is not acknowledged.
func (d *gated) guard(ctx context.Context, op func() error) error {
	if err := d.g.enter(ctx); err != nil {
		return err
	}
	if err := op(); err != nil {
		if gone := d.g.leave(ctx); gone != nil {
			return gone
		}
		return err
	}
	return d.g.leave(ctx)
}

func (d *gated) Info() target.Info { return d.dev.Info() }

func (d *gated) Read(ctx context.Context, lba uint64, dst [][]byte) error {
	return d.guard(ctx, func() error { return d.dev.Read(ctx, lba, dst) })
}

func (d *gated) Write(ctx context.Context, lba uint64, src [][]byte, fua bool) error {
	return d.guard(ctx, func() error { return d.dev.Write(ctx, lba, src, fua) })
}

func (d *gated) Unmap(ctx context.Context, ranges []target.Range) error {
	return d.guard(ctx, func() error { return d.dev.Unmap(ctx, ranges) })
}

func (d *gated) WriteSame(ctx context.Context, lba, blocks uint64, block []byte) error {
	return d.guard(ctx, func() error { return d.dev.WriteSame(ctx, lba, blocks, block) })
}

func (d *gated) CompareAndWrite(ctx context.Context, lba uint64, compare, write []byte) error {
	return d.guard(ctx, func() error { return d.dev.CompareAndWrite(ctx, lba, compare, write) })
}

func (d *gated) Flush(ctx context.Context) error {
	return d.guard(ctx, func() error { return d.dev.Flush(ctx) })
}

func (d *gated) Mapped(ctx context.Context, lba, blocks uint64) (mapped bool, n uint64, err error) {
	err = d.guard(ctx, func() (err error) { mapped, n, err = d.dev.Mapped(ctx, lba, blocks); return err })
	return mapped, n, err
}
