package raid

import (
	"context"
	"fmt"
	"math/bits"
	"slices"
)

// The path of a small write: PrepareUpdate → (the caller logs Encode) → Apply (apply.go).

// PrepareUpdate computes what a change of some data blocks of a stripe will write. It changes nothing, but repairs
// strips that it finds bad. Blocks are distinct; their Data, BlockBytes each, is referred to by the update and
// must not change before its last use. gen must be above the stripe's newest generation (ErrGeneration).
//
// New parity comes from the old data and parity of the changed columns (delta), or from the unchanged data of these
// columns (rebuild), whichever needs fewer reads; what is missing is reconstructed.
//
// Until Release the stripe does not move when the array grows. Who holds several updates prepares them for different stripes.
func (a *Array) PrepareUpdate(ctx context.Context, stripe, gen uint64, writes []BlockWrite) (u *Update, err error) {
	if len(writes) == 0 {
		return nil, fmt.Errorf("raid: update stripe %d: no blocks: %w", stripe, ErrRange)
	}
	seen, err := a.checkWrites(stripe, writes)
	if err != nil {
		return nil, err
	}
	unpin := a.pin(stripe)
	defer func() {
		if u != nil {
			u.unpin = unpin
		} else {
			unpin(true)
		}
	}()
	if err := a.beginWrite(ctx, stripe, gen); err != nil {
		return nil, err
	}
	defer a.leave()
	writes = slices.Clone(writes)
	slices.SortFunc(writes, func(x, y BlockWrite) int { return x.Block - y.Block })
	// A strip that is bad must be whole before a part of it is written. A repair heals it or fails its member; a member
	// that takes repairs and does not hold them is failed after some. So the members bound the attempts.
	repairs := make([]int, len(a.members))
	for range repairAttempts * (len(a.members) + 1) {
		u, bad, silent, err := a.prepare(stripe, gen, writes, seen)
		if bad|silent == 0 {
			return u, err
		}
		if tired := tire(repairs, bad); tired != 0 && a.canLose(tired) {
			silent |= tired
		}
		if silent != 0 {
			if err := a.fail(silent); err != nil {
				return nil, fmt.Errorf("raid: update stripe %d: %w", stripe, err)
			}
			continue
		}
		if _, err := a.repair(stripe); err != nil {
			return nil, fmt.Errorf("raid: update stripe %d: %w", stripe, err)
		}
	}
	return nil, fmt.Errorf("raid: update stripe %d: repaired again and again: %w", stripe, ErrUnrecoverable)
}

// repairAttempts is how often a strip is repaired in a row before its member counts as one that does not hold what is
// written to it.
const repairAttempts = 4

// tire counts a repair of each bad member, and returns those that had too many.
func tire(repairs []int, bad uint64) (tired uint64) {
	for i := range repairs {
		if bad>>i&1 != 0 {
			if repairs[i]++; repairs[i] > repairAttempts {
				tired |= 1 << i
			}
		}
	}
	return tired
}

// canLose tells whether parity stands for these members too.
func (a *Array) canLose(members uint64) bool {
	absent := a.absent()
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.label.lost(a.label.Failed|absent|members) <= a.layout.Parity()
}

// prepare is one attempt. bad members hold strips that need a repair first; silent ones are to be recorded as failed: they
// hold strips that will be written, and do not answer even a patient reader.
func (a *Array) prepare(stripe, gen uint64, writes []BlockWrite, columns []uint32) (u *Update, bad, silent uint64, err error) {
	defer a.stripes.rlock(stripe)()
	k := a.layout.Data()
	v := a.newView(stripe)
	done := false
	defer func() {
		if !done {
			v.release()
		}
	}()
	if err := a.writable(stripe, v.places); err != nil {
		return nil, 0, 0, err
	}
	var all uint32
	for _, c := range columns {
		all |= c
	}
	delta := v.deltaIsCheaper(columns, all)
	for i := range v.strips {
		switch {
		case i >= k && (delta && v.places[i].member != nil):
			v.strips[i].want = all
		case i < k && delta:
			v.strips[i].want = columns[i]
		case i < k:
			v.strips[i].want = all &^ columns[i]
		}
	}
	if err := v.fetchWithSums(columns); err != nil {
		return nil, 0, 0, err
	}
	if silent := v.silentTouched(columns); silent != 0 {
		return nil, 0, silent, nil
	}
	for i := range v.strips {
		touched := i >= k || columns[i] != 0
		if touched && v.places[i].member != nil && (v.damaged(i) || v.strips[i].sum == nil) {
			bad |= 1 << v.places[i].member.index
		}
		if v.gens[i] >= gen {
			return nil, 0, 0, fmt.Errorf("raid: update stripe %d: generation %d after %d: %w", stripe, gen, v.gens[i], ErrGeneration)
		}
	}
	if bad != 0 {
		return nil, bad, 0, nil
	}
	parity, err := v.newParity(writes, columns, all, delta)
	if err != nil {
		return nil, 0, 0, err
	}
	u = v.update(gen, writes, columns, all, parity)
	a.counters.updates.Add(1)
	if delta {
		a.counters.updatesByDelta.Add(1)
	} else {
		a.counters.updatesByRebuild.Add(1)
	}
	done = true
	return u, 0, 0, nil
}

// deltaIsCheaper counts blocks to read either way; one that is absent costs k.
func (v *view) deltaIsCheaper(columns []uint32, all uint32) bool {
	k := len(columns)
	delta, rebuild := 0, 0
	for i := range v.strips {
		if i >= k {
			if v.places[i].member != nil {
				delta += bits.OnesCount32(all)
			}
			continue
		}
		cost := 1
		if v.places[i].member == nil {
			cost = k
		}
		delta += cost * bits.OnesCount32(columns[i])
		rebuild += cost * bits.OnesCount32(all&^columns[i])
	}
	return delta < rebuild
}

// fetchWithSums fetches what is wanted, and the checksum blocks of the strips that will be written.
func (v *view) fetchWithSums(columns []uint32) error {
	if err := v.fetch(); err != nil {
		return err
	}
	t := v.a.newBatch()
	for i := range v.strips {
		if i >= len(columns) || columns[i] != 0 {
			v.plan(t, i, 0)
		}
	}
	v.perform(t)
	if v.silentTouched(columns) != 0 {
		v.patient = true
		t = v.a.newBatch()
		for i := range v.strips {
			if s := &v.strips[i]; s.silent && (i >= len(columns) || columns[i] != 0) {
				s.silent = false
				v.plan(t, i, 0)
			}
		}
		v.perform(t)
	}
	v.remember()
	return nil
}

// silentTouched returns the members of strips that will be written and that do not answer.
func (v *view) silentTouched(columns []uint32) (members uint64) {
	for i := range v.strips {
		if v.strips[i].silent && (i >= len(columns) || columns[i] != 0) {
			members |= 1 << v.places[i].member.index
		}
	}
	return members
}

// newParity returns for each parity strip a slot buffer with the new blocks of the columns in place.
func (v *view) newParity(writes []BlockWrite, columns []uint32, all uint32, delta bool) ([]*buffer, error) {
	k, w := len(columns), len(v.strips)
	parity := make([]*buffer, w-k)
	for j := range parity {
		parity[j] = newSlot()
	}
	fail := func(err error) ([]*buffer, error) {
		for _, b := range parity {
			b.release()
		}
		return nil, fmt.Errorf("raid: update stripe %d: parity: %w", v.stripe, err)
	}
	for c := range StripBlocks {
		if all>>c&1 == 0 {
			continue
		}
		shards, fresh := make([][]byte, w), make([][]byte, k)
		for _, wr := range writes {
			if wr.Block%StripBlocks == c {
				fresh[wr.Block/StripBlocks] = wr.Data
			}
		}
		for j := range parity {
			shards[k+j] = parity[j].b[(1+c)*BlockBytes : (2+c)*BlockBytes]
			if delta && v.places[k+j].member != nil {
				copy(shards[k+j], v.block(k+j, c))
			}
		}
		var err error
		if delta {
			for i := range k {
				if fresh[i] != nil {
					shards[i] = v.block(i, c)
				}
			}
			err = v.a.code.Update(shards, fresh)
		} else {
			for i := range k {
				if shards[i] = fresh[i]; shards[i] == nil {
					shards[i] = v.block(i, c)
				}
			}
			err = v.a.code.Encode(shards)
		}
		if err != nil {
			return fail(err)
		}
	}
	return parity, nil
}

// update assembles the image. Strips whose members are missing have no part in it: parity carries them.
func (v *view) update(gen uint64, writes []BlockWrite, columns []uint32, all uint32, parity []*buffer) *Update {
	a, k := v.a, len(columns)
	u := &Update{array: a.id, sums: a.sums, k: k, m: a.layout.Parity(), stripe: v.stripe, gen: gen, gens: slices.Clone(v.gens), fresh: true}
	for i := range v.strips {
		if i >= k || columns[i] != 0 {
			u.gens[i] = gen
		}
	}
	u.losts = without(v.losts(), columns)
	for i := range v.strips {
		if v.places[i].member == nil || i < k && columns[i] == 0 {
			continue
		}
		s := updateStrip{strip: i, columns: all, crcs: v.strips[i].sum.crcs}
		if i < k {
			s.columns = columns[i]
			for _, wr := range writes {
				if wr.Block/StripBlocks == i {
					s.blocks = append(s.blocks, wr.Data)
				}
			}
		} else {
			for c := range StripBlocks {
				if all>>c&1 != 0 {
					s.blocks = append(s.blocks, parity[i-k].b[(1+c)*BlockBytes:(2+c)*BlockBytes])
				}
			}
		}
		at, n := a.address(v.stripe, i), 0
		for c := range StripBlocks {
			if s.columns>>c&1 != 0 {
				s.crcs[c] = checksumOf(at, c, s.blocks[n])
				n++
			}
		}
		u.strips = append(u.strips, s)
	}
	v.release()
	u.release = func() {
		for _, b := range parity {
			b.release()
		}
	}
	return u
}
