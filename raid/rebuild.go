package raid

import (
	"context"
	"fmt"
	"log/slog"
)

// Rebuild of a failed member to distributed spare space. Stripe by stripe, under its lock, the strip that lay on the
// member is computed and written to the spare place of its row; all members read, all members write. From then on
// the stripe's writes include the spare place. After each batch the members are flushed, and then the label says how
// far it is: a crash repeats at most a batch. When all is done the label says that the spare column stands for
// the member, and the array can lose m members again.
//
// An update prepared before its stripe was rebuilt and applied after has no image for the spare place: that strip is
// stale then, by its generation, and is repaired as any lost write is.

// RebuildBatch is how many stripes are rebuilt between two flushes and label writes.
const RebuildBatch = 256

// Rebuild rebuilds a failed member to a free spare column, or goes on with a rebuild that was cut. It returns when it
// is done, or ctx ends; progress (may be nil) is told after each batch. Only one rebuild runs at a time. pace, if not
// nil, is called before each stripe and may wait: that is the throttle. Stripes that cannot be rebuilt are skipped
// and make the result ErrUnrecoverable, after all others are done: the member stays failed then. Close waits for a
// rebuild: end ctx first.
func (a *Array) Rebuild(ctx context.Context, failed int, pace func(context.Context) error, progress func(done, total uint64)) error {
	if err := a.enter(); err != nil {
		return err
	}
	defer a.leave()
	a.rebuildMu.Lock()
	defer a.rebuildMu.Unlock()
	from, err := a.beginRebuild(failed)
	if err != nil {
		return fmt.Errorf("raid: rebuild member %d: %w", failed, err)
	}
	total, lost := a.Geometry().Stripes, 0
	for stripe := from; stripe < total; {
		end := min(stripe+RebuildBatch, total)
		for ; stripe < end; stripe++ {
			if err := ctx.Err(); err != nil {
				return err
			}
			if pace != nil {
				if err := pace(ctx); err != nil {
					return err
				}
			}
			if err := a.rebuildStripe(stripe); err != nil {
				if err := a.Err(); err != nil {
					return err
				}
				lost++
				a.log(slog.LevelError, "raid: stripe cannot be rebuilt", "stripe", stripe, "err", err)
			}
		}
		if err := a.saveProgress(ctx, stripe); err != nil {
			return fmt.Errorf("raid: rebuild member %d: %w", failed, err)
		}
		if progress != nil {
			progress(stripe, total)
		}
	}
	return a.endRebuild(failed, lost)
}

// beginRebuild picks the spare column and says so in the label, or finds the rebuild that was begun.
func (a *Array) beginRebuild(failed int) (from uint64, err error) {
	if err := a.prepareToWrite(); err != nil {
		return 0, err
	}
	a.labelMu.Lock()
	defer a.labelMu.Unlock()
	l := a.Label()
	switch {
	case failed < 0 || failed >= l.N || l.Failed>>failed&1 == 0:
		return 0, fmt.Errorf("it is not failed: %w", ErrRange)
	case l.lost(1<<failed) == 0:
		return 0, fmt.Errorf("it is rebuilt: %w", ErrRange)
	case l.RebuildMember == failed:
		a.setRebuilt(l.RebuildProgress)
		return l.RebuildProgress, nil
	case l.RebuildMember >= 0:
		return 0, fmt.Errorf("member %d is being rebuilt: %w", l.RebuildMember, ErrRange)
	}
	spare := -1
	for j := range l.Spares {
		if l.SpareOf[j] == 0 {
			spare = j
			break
		}
	}
	if spare < 0 {
		return 0, fmt.Errorf("no spare space is free: %w", ErrDegraded)
	}
	a.setRebuilt(0)
	return 0, a.changeLabel(func(l *Label) { l.RebuildMember, l.RebuildSpare, l.RebuildProgress = failed, spare, 0 })
}

func (a *Array) setRebuilt(stripe uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.rebuilt = stripe
}

// rebuildStripe computes the strip that has a place once the rebuild has passed the stripe, and had none before.
func (a *Array) rebuildStripe(stripe uint64) error {
	defer a.stripes.lock(stripe)()
	v := a.newView(stripe)
	defer v.release()
	before := v.places
	a.setRebuilt(stripe + 1)
	strip, to := -1, place{}
	for i, p := range a.places(stripe) {
		if p.member != nil && before[i].member == nil {
			strip, to = i, p
		}
	}
	if strip < 0 {
		return nil
	}
	v.strips[strip].want = ^uint32(0)
	a.cache.put(stripe, nil)
	if err := v.fetch(); err != nil {
		if v.unwritten() {
			return nil
		}
		return err
	}
	if v.gens[strip] == 0 { // no parity strip is left to tell it: as new as the newest
		v.gens[strip] = v.gens[len(v.gens)-1]
	}
	a.cache.put(stripe, nil)
	t := a.newBatch()
	v.planRewrite(t, strip, to)
	t.run(a.opts.WriteTimeout)
	return a.settle(t)
}

// saveProgress makes what was rebuilt durable, and then says so.
func (a *Array) saveProgress(ctx context.Context, stripe uint64) error {
	if err := a.flush(); err != nil {
		return err
	}
	a.labelMu.Lock()
	defer a.labelMu.Unlock()
	return a.changeLabel(func(l *Label) { l.RebuildProgress = stripe })
}

func (a *Array) endRebuild(failed, lost int) error {
	a.labelMu.Lock()
	defer a.labelMu.Unlock()
	err := a.changeLabel(func(l *Label) {
		if lost == 0 {
			l.SpareOf[l.RebuildSpare] = uint8(failed + 1)
		}
		l.RebuildMember, l.RebuildSpare, l.RebuildProgress = -1, -1, 0
	})
	a.setRebuilt(0)
	a.cache.clear()
	if err == nil && lost > 0 {
		err = fmt.Errorf("raid: rebuild member %d: %d stripes: %w", failed, lost, ErrUnrecoverable)
	}
	return err
}
