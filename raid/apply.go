package raid

import (
	"context"
	"fmt"
)

// Apply writes an update's blocks and checksum blocks to the members that it has. It may be repeated, after a crash at
// any point, by another process, and with other members missing: the stripe ends the same.
//
// An update that comes from a log may find a strip of a higher generation: a later write of it was begun, and is
// either whole, or in the log behind this one. Its checksum block stays then, and so do the blocks of which it knows
// another checksum. The blocks that it knows with this update's checksum are written again: they may never have
// reached the media, though the later checksum block did.
//
// It returns nil when every strip of the update is on its member, or its member is recorded as failed. It is durable
// after Flush.
func (a *Array) Apply(ctx context.Context, u *Update) error {
	if u.array != a.id || u.sums != a.sums || u.k != a.layout.Data() || u.m != a.layout.Parity() {
		return fmt.Errorf("raid: apply: update of array %v: %w", u.array, ErrForeign)
	}
	if err := a.beginWrite(ctx, u.stripe, u.gen); err != nil {
		return err
	}
	defer a.leave()
	moved, err := a.apply(u)
	if moved && err == nil {
		if _, err := a.repair(u.stripe); err != nil {
			return fmt.Errorf("raid: apply: %w", err)
		}
	}
	return err
}

// apply answers moved when a strip that the update touches has got a place since the update was prepared: a rebuild or
// copy-back passed the stripe. The update has no image for it.
func (a *Array) apply(u *Update) (moved bool, err error) {
	defer a.stripes.lock(u.stripe)()
	places := a.places(u.stripe)
	if err := a.writable(u.stripe, places); err != nil {
		return false, err
	}
	images := uint64(0)
	for i := range u.strips {
		images |= 1 << u.strips[i].strip
	}
	for i, p := range places {
		moved = moved || p.member != nil && u.gens[i] == u.gen && images>>i&1 == 0
	}
	later := make([]*stripSum, len(u.strips))
	if !u.fresh {
		a.cache.put(u.stripe, nil)
		later = a.laterSums(u, places)
	}
	meta := a.metaAfter(u)
	t := a.newBatch()
	var bufs []*buffer
	for i := range u.strips {
		s := &u.strips[i]
		p := places[s.strip]
		if p.member == nil {
			continue
		}
		b := newSlot()
		bufs = append(bufs, b)
		u.sum(i).encode(b.b, a.address(u.stripe, s.strip))
		n := 0
		for c := range StripBlocks {
			if s.columns>>c&1 != 0 {
				copy(b.b[(1+c)*BlockBytes:], s.blocks[n])
				n++
			}
		}
		t.writeBlocks(p, s.strip, b, s.toWrite(later[i]))
	}
	if moved {
		meta = nil
	}
	err = a.finishWrite(t, u.stripe, meta)
	for _, b := range bufs {
		b.release()
	}
	u.fresh, u.applied = false, err == nil
	return moved, err
}

// toWrite returns the blocks of the slot to be written, bit 0 the checksum block; later is what is there of a later
// generation, or nil.
func (s *updateStrip) toWrite(later *stripSum) uint64 {
	if later == nil {
		return uint64(s.columns)<<1 | 1
	}
	var blocks uint64
	for c := range StripBlocks {
		if s.columns>>c&1 != 0 && later.crcs[c] == s.crcs[c] {
			blocks |= 2 << c
		}
	}
	return blocks
}

// laterSums returns the checksum blocks of a later generation that lie on the strips of a replayed update. One that
// cannot be read, or is torn, is none.
func (a *Array) laterSums(u *Update, places []place) []*stripSum {
	later := make([]*stripSum, len(u.strips))
	t := a.newBatch()
	var bufs []*buffer
	for i := range u.strips {
		if p := places[u.strips[i].strip]; p.member != nil {
			b := newBlock()
			bufs = append(bufs, b)
			t.read(p.member, i, b, b.b, p.off)
		}
	}
	t.run(a.opts.WriteTimeout)
	for _, o := range t.ops {
		if o.err() == nil {
			sum, err := decodeSum(o.b, a.address(u.stripe, u.strips[o.strip].strip))
			if err == nil && sum.gen > u.gen {
				later[o.strip] = sum
			}
		}
	}
	for _, b := range bufs {
		b.release()
	}
	return later
}

// metaAfter is what is known of the stripe once the update is on it; nil when too little is known.
func (a *Array) metaAfter(u *Update) *stripeMeta {
	old := a.cache.get(u.stripe)
	if old == nil || !u.fresh {
		return nil
	}
	meta := &stripeMeta{gens: u.gens, parity: old.parity, sums: make([]*stripSum, len(old.sums))}
	copy(meta.sums, old.sums)
	for i := u.k; i < len(meta.sums); i++ {
		meta.sums[i] = nil
	}
	for i := range u.strips {
		meta.sums[u.strips[i].strip] = u.sum(i)
	}
	return meta
}
