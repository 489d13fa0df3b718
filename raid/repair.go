package raid

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
)

// Repair in place. Under the stripe's lock the whole stripe is read from the media, judged without what memory
// knows, and every strip that is bad on a working member is written again, whole, with its checksum block. The
// generation is the one that the parity strips name: a repair is no new write.

// ScrubResult is what a scrub of one stripe found.
type ScrubResult struct {
	// Unwritten: no strip carries a checksum block of this stripe. It was never written, or its first write was cut.
	Unwritten bool
	// Bad strips lay rotten, stale or unreadable on working members; Repaired of them were rewritten. Absent ones
	// have no working member.
	Bad, Repaired, Absent int
	// Lost blocks are marked as lost (lost.go): there is nothing to repair them from.
	Lost int
	// Of Bad: Rotten did not match their checksums, or carried no checksum block; Stale had lost a write; Unreadable
	// answered with an error, or not at all.
	Rotten, Stale, Unreadable int
	// Members had them, bit i is member i.
	Members uint64
}

// Scrub verifies all of a stripe and repairs what it can. ErrUnrecoverable: more is bad than parity can rebuild.
// A stripe whose full write was cut by a crash and not yet repeated from the log looks like that too.
func (a *Array) Scrub(ctx context.Context, stripe uint64) (ScrubResult, error) {
	if err := a.checkBlocks(stripe, 0, 0); err != nil {
		return ScrubResult{}, err
	}
	if err := ctx.Err(); err != nil {
		return ScrubResult{}, err
	}
	if err := a.enter(); err != nil {
		return ScrubResult{}, err
	}
	defer a.leave()
	defer a.sentence()
	return a.repair(stripe)
}

// repairQuietly is for readers: what they were asked for they have, or have an error of their own.
func (a *Array) repairQuietly(stripe uint64) {
	if a.opts.ReadOnly || a.Err() != nil {
		return
	}
	if r, err := a.repair(stripe); err != nil {
		a.log(slog.LevelWarn, "raid: repair", "stripe", stripe, "bad", r.Bad, "err", err)
	}
}

func (a *Array) repair(stripe uint64) (ScrubResult, error) { return a.repairAs(stripe, ScrubOptions{}) }

// repairAs with o.AcceptOld: see accept.go.
func (a *Array) repairAs(stripe uint64, o ScrubOptions) (ScrubResult, error) {
	defer a.stripes.lock(stripe)()
	var r ScrubResult
	v := a.newView(stripe)
	defer v.release()
	v.fromMedia = true
	for i := range v.strips {
		v.strips[i].want = ^uint32(0)
		if v.places[i].member == nil {
			v.strips[i].want = 0
			r.Absent++
		}
	}
	err := v.fetch()
	if v.unwritten() {
		return ScrubResult{Unwritten: true, Absent: r.Absent}, nil
	}
	v.classify(&r)
	if err != nil {
		a.cache.put(stripe, nil)
		if o.AcceptOld && errors.Is(err, ErrUnrecoverable) {
			return a.accept(v, r, err, o.Valid)
		}
		return r, err
	}
	r.Lost = v.lostBlocks()
	if r.Bad == 0 {
		return r, v.checkParity()
	}
	if a.opts.ReadOnly {
		return r, ErrReadOnly
	}
	if err := a.prepareToWrite(); err != nil {
		return r, err
	}
	return a.rewrite(v, r)
}

// rewrite writes the damaged strips of a view that has all blocks.
func (a *Array) rewrite(v *view, r ScrubResult) (ScrubResult, error) {
	t := a.newBatch()
	for i := range v.strips {
		if !v.damaged(i) {
			continue
		}
		v.planRewrite(t, i, v.places[i])
	}
	a.cache.put(v.stripe, nil)
	t.run(a.opts.WriteTimeout)
	for _, o := range t.ops {
		if o.err() == nil {
			r.Repaired++
			o.member.repairs.Add(1)
			a.counters.repairs.Add(1)
			a.log(slog.LevelInfo, "raid: strip repaired", "stripe", v.stripe, "strip", o.strip, "member", o.member.index)
		}
	}
	if err := a.settle(t); err != nil {
		return r, fmt.Errorf("raid: repair stripe %d: %w", v.stripe, err)
	}
	return r, nil
}

// planRewrite plans the write of a strip that is whole in the view, with a new checksum block of its old generation.
func (v *view) planRewrite(t *batch, i int, to place) {
	s, at := &v.strips[i], v.a.address(v.stripe, i)
	sum := &stripSum{gen: v.gens[i]}
	sum.tell(i, v.a.layout.Data(), v.gens, v.losts())
	for c := range StripBlocks {
		sum.crcs[c] = checksumOf(at, c, v.block(i, c))
	}
	sum.encode(s.buf.b, at)
	t.writePlace(to, i, s.buf, s.buf.b, 0)
}

// classify counts the bad strips by kind.
func (v *view) classify(r *ScrubResult) {
	for i := range v.strips {
		s, p := &v.strips[i], v.places[i]
		if p.member == nil || !v.damaged(i) && !s.silent {
			continue
		}
		r.Members |= 1 << p.member.index
		switch {
		case s.silent:
			r.Unreadable++
			continue // it is not bad, as far as is known
		case s.stale:
			r.Stale++
		case s.unread:
			r.Unreadable++
		default:
			r.Rotten++
		}
		r.Bad++
	}
}

func (v *view) unwritten() bool {
	for i := range v.strips {
		if v.strips[i].sum != nil || v.strips[i].silent {
			return false
		}
	}
	return true
}

// checkParity compares parity with data where every checksum is right. They can differ only when this package,
// or the memory that it ran in, was wrong; which side lies cannot be known, so it is reported and left.
func (v *view) checkParity() error {
	shards := make([][]byte, len(v.strips))
	for i := range v.strips {
		if v.strips[i].have != ^uint32(0) {
			return nil // an absent strip: nothing to compare with
		}
		shards[i] = v.strips[i].buf.b[BlockBytes:]
	}
	ok, err := v.a.code.Verify(shards)
	if err == nil && !ok {
		err = ErrMismatch
	}
	if err != nil {
		return fmt.Errorf("raid: stripe %d: %w", v.stripe, err)
	}
	return nil
}
