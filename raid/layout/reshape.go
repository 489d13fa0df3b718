package layout

import "fmt"

// Reshape is the arithmetic of growing an array from one layout to a wider one of the same stripes: in which order
// stripes move, so that no copy is ever written over bytes that are still needed. It has no state.
//
// Stripe s begins at position s*w of the rows' strip columns, whatever their number; so a stripe's row under the wider
// layout is never behind its row under the narrower one, and all stripes can move in order, once. What overlaps is
// near the start only: there a stripe's new row is the very row that it, or one a little behind it, still lies in. For
// these there is a ring of staging slots outside both layouts. So each stripe has, at any time, exactly one place that
// counts: Done and Staged of a Progress say which.
//
//	0 ……… Done ……… Staged ……… Stripes
//	 by New  | staged   | by Old
//
// Each Step copies from places that count to places where nothing that counts lies, and only then moves a limit:
//
//	Stage    [Staged, To): Old → ring       then Staged = To   free: the ring slots of stripes below Done
//	Unstage  [Done, To):   ring → New       then Done = To     free: rows above which stripes from Staged on begin
//	Direct   [Done, To):   Old → New        then both = To     free: rows above which stripes from Done on begin
//
// Rows are compared whole: their spare columns are then free as well, whatever they are used for.
type Reshape struct {
	Old, New *Layout
	// Stripes is how many stripes there are to move.
	Stripes uint64
	// ring is how many stripes can be staged at a time.
	ring uint64
}

// StageSlots is how many staging slots a Reshape needs on each member. It suffices for every geometry: see Next.
const StageSlots = 7

// Action is what a Step does.
type Action int

const (
	Stage Action = iota
	Unstage
	Direct
)

// Step is the next move: stripes [From, To).
type Step struct {
	Action   Action
	From, To uint64
}

// NewReshape refuses layouts that differ in more than the number of members, or where that does not rise.
func NewReshape(old, wide *Layout, stripes uint64) (*Reshape, error) {
	if old.k != wide.k || old.m != wide.m || old.spares != wide.spares || old.n >= wide.n {
		return nil, fmt.Errorf("%w: from %d members of %d+%d and %d spares to %d of %d+%d and %d", ErrGeometry,
			old.n, old.k, old.m, old.spares, wide.n, wide.k, wide.m, wide.spares)
	}
	return &Reshape{old, wide, stripes, uint64(StageSlots*wide.n) / uint64(wide.width)}, nil
}

// Ring is how many stripes can be staged at a time.
func (r *Reshape) Ring() uint64 { return r.ring }

// Staged returns the member and the staging slot of a strip while its stripe is staged.
func (r *Reshape) Staged(stripe uint64, strip int) (member int, slot uint64) {
	pos := stripe%r.ring*uint64(r.New.width) + uint64(strip)
	return int(pos % uint64(r.New.n)), pos / uint64(r.New.n)
}

// Next returns the step after which the reshape stands further, of at most most stripes; false when all have moved.
//
// It never comes to a halt: a stripe can leave the ring when that much behind it is staged that its new row is above
// the rest. Its new row is not below its old one, and a row holds c/w stripes, so 1 + c/w staged stripes are always
// enough; the ring has 7n/w - 1 of them at least, and w ≤ c < n.
func (r *Reshape) Next(done, staged, most uint64) (Step, bool) {
	if done >= r.Stripes {
		return Step{}, false
	}
	if staged <= done {
		if to := r.fits(min(done+most, r.Stripes), r.Old.firstRow(done)); to > done {
			return Step{Direct, done, to}, true
		}
		staged = done
	} else {
		free := r.Old.firstRow(staged)
		if staged == r.Stripes {
			free = ^uint64(0) / uint64(r.New.columns)
		}
		if to := r.fits(min(done+most, staged), free); to > done {
			return Step{Unstage, done, to}, true
		}
	}
	return Step{Stage, staged, min(done+r.ring, staged+most, r.Stripes)}, true
}

// fits returns the highest to, at most limit, so that all stripes below it lie by New in rows below row.
func (r *Reshape) fits(limit, row uint64) uint64 {
	return min(limit, row*uint64(r.New.columns)/uint64(r.New.width))
}

// firstRow is the slot of a stripe's first strip.
func (l *Layout) firstRow(stripe uint64) uint64 { return stripe * uint64(l.width) / uint64(l.columns) }
