// Package sim runs the shelf's storage on hardware in memory, breaks that in every way that a seed chooses, and
// asks a model what may be read.
//
// It owns no code of the product: everything goes through shelf, nvram, nvram/mirror, raid and firmware/ha as
// firmware/shelfd joins them. There are two worlds:
//
//   - pool (pool.go, pool_run.go): one pool on one controller, its power cut at a step that the seed chooses, over
//     drives that lose, tear, misdirect, rot, stall, die and come back old. Destage runs inline.
//   - shelf (shelf.go, shelf_run.go, node.go, edges.go, backend.go, wire.go): two controllers with their NVRAMs, the link between them, the
//     ownership drivers, and drives with reservations.
//
// # Seeds and events
//
// A seed expands into a list of events, each with randomness of its own, so that an event does the same whether or not
// the others are there. That is what shrinking needs (shrink.go): it leaves events out while the seed still fails.
//
// # Time and order
//
// Run is to be called in a bubble of testing/synctest: clocks, time-outs and leases are virtual, so that a drive that
// hangs for half a minute costs nothing. The pool world gives the same steps for a seed whatever the scheduler does.
// In the shelf world goroutines of the product run beside each other; on one processor, without preemption by time
// (the tests see to both), a seed gives the same steps again but where a select finds two channels ready.
package sim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime/debug"
	"slices"
)

// World is one of the two.
type World string

const (
	PoolWorld  World = "pool"
	ShelfWorld World = "shelf"
)

// WorldOf is the world of a seed that nobody chose one for.
func WorldOf(seed uint64) World {
	if seed%2 == 0 {
		return ShelfWorld
	}
	return PoolWorld
}

// Options of a run.
type Options struct {
	// World, if not that of the seed.
	World    World
	Mutation Mutation
	// Keep are the events to run, by index; nil: all.
	Keep []int
	// Trace gets a line for each operation.
	Trace func(format string, args ...any)
}

// Counts say what happened in a run, by name.
type Counts map[string]int

// Add adds o.
func (c Counts) Add(o Counts) {
	for k, n := range o {
		c[k] += n
	}
}

// Outcome of a run.
type Outcome struct {
	// Events that the seed expanded into.
	Events int
	Counts Counts
	// Err is a broken promise, or a pool that does not come up again.
	Err error
}

// errLoss is what the simulation looks for.
var errLoss = errors.New("promise broken")

// event is one entry of the list. What it does follows from kind and from its own randomness.
type event struct {
	kind string
}

// run is one seed's run, in either world.
type run interface {
	// expand makes the events.
	expand(rng *rand.Rand) []event
	do(ctx context.Context, e event) error
	// finish is the last check, after all events.
	finish(ctx context.Context) error
	close()
}

// base is what both worlds' runs have.
type base struct {
	o      Options
	seed   uint64
	rng    *rand.Rand // of the event
	index  int        // of the event
	stamp  uint64     // of contents within the event
	counts Counts
}

func (b *base) trace(format string, args ...any) {
	if b.o.Trace != nil {
		b.o.Trace(fmt.Sprintf("%3d ", b.index)+format, args...)
	}
}

// logger traces what the product says; nil without a trace.
func (b *base) logger(who string) *slog.Logger {
	if b.o.Trace == nil {
		return nil
	}
	return slog.New(slog.NewTextHandler(traceWriter{b, who}, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}))
}

type traceWriter struct {
	b   *base
	who string
}

func (w traceWriter) Write(p []byte) (int, error) {
	w.b.trace("    %s%s", w.who, bytes.TrimSpace(p))
	return len(p), nil
}

// next is a number that no other event and no other call gives.
func (b *base) next() uint64 {
	b.stamp++
	return uint64(b.index+1)<<20 | b.stamp
}

// begin sets what belongs to event i.
func (b *base) begin(i int) {
	b.index, b.stamp = i, 0
	b.rng = rand.New(rand.NewPCG(b.seed, uint64(i)+0x5eed))
}

// Prepare makes what all seeds start from. It must be called in a bubble of its own before the first Run of a process, so
// that the first seed is like all others.
func Prepare() error {
	_, err := shelfTemplateOf()
	for seed := range uint64(64) {
		w, perr := newWorld(seed, None, Counts{})
		if perr == nil {
			w.sick = newSick()
			w.close()
		}
		err = errors.Join(err, perr)
	}
	return err
}

// Run runs a seed. It must be called in a bubble (see the package comment).
func Run(seed uint64, o Options) (out Outcome) {
	if o.World == "" {
		o.World = WorldOf(seed)
	}
	b := &base{o: o, seed: seed, counts: Counts{}}
	b.begin(-1)
	var r run
	switch o.World {
	case PoolWorld:
		r = newPoolRun(b)
	case ShelfWorld:
		r = newShelfRun(b)
	default:
		return Outcome{Err: fmt.Errorf("no world %q", o.World)}
	}
	out.Counts = b.counts
	b.counts["seeds of the "+string(o.World)+" world"]++
	ctx := context.Background()
	defer r.close()
	defer func() {
		if p := recover(); p != nil {
			out.Err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	events := r.expand(b.rng)
	out.Events = len(events)
	for i, e := range events {
		if o.Keep != nil && !slices.Contains(o.Keep, i) {
			continue
		}
		b.begin(i)
		if err := r.do(ctx, e); err != nil {
			out.Err = fmt.Errorf("event %d (%s): %w", i, e.kind, err)
			return out
		}
	}
	b.begin(len(events))
	if err := r.finish(ctx); err != nil {
		out.Err = fmt.Errorf("at the end: %w", err)
	}
	return out
}

// weighted picks a kind.
type weighted struct {
	kind   string
	weight int
}

func pick(rng *rand.Rand, from []weighted) string {
	total := 0
	for _, w := range from {
		total += w.weight
	}
	n := rng.IntN(total)
	for _, w := range from {
		if n -= w.weight; n < 0 {
			return w.kind
		}
	}
	panic("sim: weights")
}
