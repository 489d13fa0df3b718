package raid

import (
	"fmt"
	"log/slog"
	"math/bits"
)

// What is left of an update whose image is lost. A stripe's update is logged before its first strip is touched; where the log is given up (an
// operator's last resort), a stripe may be left with some strips of after it and some of before, and parity that knows of writes that
// other strips lack. Where those are more than parity stands for, the stripe cannot be told from one of which drives lost acknowledged
// writes, and its strips are answered with errors. ScrubOptions.AcceptOld takes them for what they are: each data block that
// is right by its strip's checksum block, or by itself where the caller knows (ScrubOptions.Valid), is the stripe's data, and
// parity is made of them. One that is not, because the power went while it was written, is lost (lost.go).

// accept writes the parity of a stripe that fetch could not make whole, if all its data strips are there, and what is to be lost of them. err is fetch's.
// The stripe is locked. Cut in the middle, it can be done again.
func (a *Array) accept(v *view, r ScrubResult, err error, valid func(stripe uint64, block int, data []byte) bool) (ScrubResult, error) {
	k := a.layout.Data()
	if a.opts.ReadOnly {
		return r, err
	}
	for _, p := range v.places[:k] {
		if p.member == nil {
			return r, err
		}
	}
	t := a.newBatch()
	slots := make([]*buffer, len(v.strips))
	for i := range slots {
		slots[i] = newSlot()
		defer slots[i].release()
		if i < k {
			t.read(v.places[i].member, i, slots[i], slots[i].b, v.places[i].off)
		}
	}
	t.run(a.opts.WriteTimeout)
	gens, losts, wrong := make([]uint64, len(slots)), make([]uint32, len(slots)), make([]bool, len(slots))
	sums := make([]*stripSum, len(slots))
	newest, lost := uint64(1), uint32(0)
	for _, g := range v.gens {
		newest = max(newest, g)
	}
	shards := make([][]byte, len(slots))
	for i := range slots {
		shards[i] = slots[i].b[BlockBytes:]
	}
	for _, o := range t.ops {
		if o.err() != nil {
			return r, err
		}
		at := a.address(v.stripe, o.strip)
		sum, bad := decodeSum(o.b[:BlockBytes], at)
		if bad != nil {
			sum = &stripSum{lost: ^uint32(0)}
		}
		for c := range StripBlocks {
			b := o.b[(1+c)*BlockBytes : (2+c)*BlockBytes]
			if bad == nil && checksumOf(at, c, b) == sum.crcs[c] {
				continue
			}
			sum.lost &^= 1 << c
			if valid == nil || !valid(v.stripe, o.strip*StripBlocks+c, b) {
				clear(b)
				sum.lost |= 1 << c
			}
			sum.crcs[c], wrong[o.strip] = checksumOf(at, c, b), true
		}
		sums[o.strip], gens[o.strip], losts[o.strip] = sum, sum.gen, sum.lost
		newest, lost = max(newest, sum.gen), lost|sum.lost
	}
	for i, sum := range sums {
		if sum != nil && sum.gen == 0 {
			sum.gen, gens[i] = newest, newest
		}
	}
	for i := k; i < len(slots); i++ {
		gens[i] = newest
	}
	if lost == 0 {
		losts = nil
	}
	if err := a.prepareToWrite(); err != nil {
		return r, err
	}
	if err := a.code.Encode(shards); err != nil {
		return r, fmt.Errorf("raid: accept stripe %d: %w", v.stripe, err)
	}
	t = a.newBatch()
	for i := range slots {
		sum, at := sums[i], a.address(v.stripe, i)
		if i < k && !wrong[i] {
			continue
		}
		if i >= k {
			sum = &stripSum{gen: newest}
			for c := range StripBlocks {
				sum.crcs[c] = checksumOf(at, c, shards[i][c*BlockBytes:(c+1)*BlockBytes])
			}
		}
		sum.tell(i, k, gens, losts)
		sum.encode(slots[i].b, at)
		t.writePlace(v.places[i], i, slots[i], slots[i].b, 0)
	}
	a.cache.put(v.stripe, nil)
	t.run(a.opts.WriteTimeout)
	for _, o := range t.ops {
		if o.err() == nil {
			r.Repaired++
		}
	}
	if err := a.settle(t); err != nil {
		return r, fmt.Errorf("raid: accept stripe %d: %w", v.stripe, err)
	}
	for _, l := range losts {
		r.Lost += bits.OnesCount32(l)
	}
	a.log(slog.LevelWarn, "raid: strips of before an update are accepted", "stripe", v.stripe, "lost_blocks", r.Lost)
	return r, nil
}
