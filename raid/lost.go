package raid

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"slices"
)

// Lost blocks. When more strips of a column are bad than parity can rebuild, their blocks are gone; the rest of the
// stripe is not. Left like that, no part of the stripe could be written: new parity needs the old blocks. So what is
// gone is given up, by a stripe update that marks it (PrepareLoss):
//
//	lost block        zeros, with the checksum of zeros, and its bit set in the checksum blocks
//	bad, recoverable  computed, and written in place, as a repair does
//	parity            of the stripe as it is then: consistent again
//
// A lost block takes part in all arithmetic as the zeros that it holds: updates, repair, rebuild and scrub need to know
// nothing of it but to carry its bit on. Only Read looks at the bit, and answers a *BlockError. A write of the block,
// or of the whole stripe, clears it.
//
// The bit stands in the checksum block of the block's strip and, for all strips, in those of parity. A checksum block
// is covered by its own checksum, so no rot sets or clears a bit; and with any M strips gone another copy is left: a
// block that is computed is computed with at least one parity strip, which tells. The copies are of one generation,
// as every write of a stripe writes all of its parity.
//
// # When a block is lost
//
// What may come back is not lost. PrepareLoss declares blocks lost only when all of this holds:
//
//	1. the array may write: its label is on a majority, absent members are recorded in it as failed, no more than M;
//	2. every strip on a working member was read afresh, block by block, with a write's patience, and each block was
//	   right, or did not verify, or was answered with an error;
//	3. each of these members showed before and after those reads that it is there and is itself: its label can be read.
//	   One that did not, or left any of the reads unanswered (no power, no cable, hung, dead) is not believed but
//	   recorded as failed, as after a write; if that makes more than M, the array stops writing (ErrDegraded), with all
//	   of it still in the log;
//	4. strips on members recorded as failed count as gone only with LossSpec.Failed, where they could make the
//	   difference: such a member might be re-added with the strip on it. The caller says when that is not worth waiting
//	   for any more. Without it: ErrNotLost.
//
// The caller logs the update before it applies it, as any other (P3): cut at any step, replay ends it. A stripe is
// never marked by a read, a scrub or a rebuild: only when it has to be written.

// BlockError is a data block that cannot be had: ErrUnrecoverable.
type BlockError struct {
	Stripe uint64
	Block  int
	// Lost: it was given up earlier, and reads so until it is written.
	Lost bool
	Err  error
}

func (e *BlockError) Error() string {
	if e.Lost {
		return fmt.Sprintf("raid: stripe %d block %d was lost, and not written since", e.Stripe, e.Block)
	}
	return fmt.Sprintf("block %d: %v", e.Block, e.Err)
}

// Unwrap gives ErrUnrecoverable, and Err.
func (e *BlockError) Unwrap() []error {
	if e.Err == nil {
		return []error{ErrUnrecoverable}
	}
	return []error{ErrUnrecoverable, e.Err}
}

// LossSpec rules PrepareLoss.
type LossSpec struct {
	// Failed lets strips on members recorded as failed count as gone for good.
	Failed bool
	// MaxBlocks bounds Update.Blocks (ErrRange). [no bound]
	MaxBlocks int
}

// PrepareLoss is PrepareUpdate for a stripe that has lost more than parity can rebuild: the update changes the blocks
// given and marks as lost what cannot be had of the others. It changes nothing but the label (see above). What it
// declares lost, Update.Lost tells. ErrNotLost: see above.
func (a *Array) PrepareLoss(ctx context.Context, stripe, gen uint64, writes []BlockWrite, spec LossSpec) (*Update, error) {
	columns, err := a.checkWrites(stripe, writes)
	if err != nil {
		return nil, err
	}
	if err := a.beginWrite(ctx, stripe, gen); err != nil {
		return nil, err
	}
	defer a.leave()
	fail := func(err error) (*Update, error) {
		return nil, fmt.Errorf("raid: give up blocks of stripe %d: %w", stripe, err)
	}
	// A member that does not show itself is recorded as failed, so the members bound the attempts.
	for range len(a.members) + 1 {
		u, gone, err := a.prepareLoss(stripe, gen, writes, columns, spec)
		if err != nil {
			return fail(err)
		}
		if u != nil {
			return u, nil
		}
		if err := a.fail(gone); err != nil {
			return fail(err)
		}
	}
	return fail(ErrDegraded)
}

// checkWrites refuses blocks that are out of range, broken or given twice, and returns the columns by strip.
func (a *Array) checkWrites(stripe uint64, writes []BlockWrite) ([]uint32, error) {
	columns := make([]uint32, a.layout.Data())
	for _, w := range writes {
		if err := a.checkBlocks(stripe, w.Block, 1); err != nil {
			return nil, err
		}
		bit := uint32(1) << (w.Block % StripBlocks)
		if len(w.Data) != BlockBytes || columns[w.Block/StripBlocks]&bit != 0 {
			return nil, fmt.Errorf("raid: update stripe %d block %d: twice, or of %d bytes: %w", stripe, w.Block, len(w.Data), ErrRange)
		}
		columns[w.Block/StripBlocks] |= bit
	}
	return columns, nil
}

// prepareLoss is one attempt; gone are members that did not show themselves.
func (a *Array) prepareLoss(stripe, gen uint64, writes []BlockWrite, columns []uint32, spec LossSpec) (u *Update, gone uint64, err error) {
	defer a.stripes.rlock(stripe)()
	v := a.newView(stripe)
	defer v.release()
	if err := a.writable(stripe, v.places); err != nil {
		return nil, 0, err
	}
	v.fromMedia, v.patient = true, true
	absent := 0
	for i := range v.strips {
		if v.places[i].member != nil {
			v.strips[i].want = ^uint32(0)
		} else {
			absent++
		}
	}
	if gone := a.notThere(v.members()); gone != 0 {
		return nil, gone, nil
	}
	if err := v.fetch(); err != nil && !errors.Is(err, ErrUnrecoverable) {
		return nil, 0, err
	}
	for i := range v.strips {
		if v.strips[i].silent {
			gone |= 1 << v.places[i].member.index
		}
	}
	if gone |= a.notThere(v.members()); gone != 0 {
		return nil, gone, nil
	}
	for i := range v.strips {
		if v.gens[i] >= gen {
			return nil, 0, fmt.Errorf("generation %d after %d: %w", gen, v.gens[i], ErrGeneration)
		}
	}
	if v.unwritten() {
		return nil, 0, fmt.Errorf("%w: %w", ErrUnwritten, ErrNotLost)
	}
	x, err := v.salvage(writes)
	if err != nil {
		return nil, 0, err
	}
	if x.short > 0 && x.short <= absent && !spec.Failed {
		return nil, 0, fmt.Errorf("%d strips are on failed members: %w", absent, ErrNotLost)
	}
	u, err = x.update(gen, columns)
	if err == nil && spec.MaxBlocks > 0 && u.Blocks() > spec.MaxBlocks {
		err = fmt.Errorf("an update of %d blocks, %d allowed: %w", u.Blocks(), spec.MaxBlocks, ErrRange)
	}
	if err != nil {
		return nil, 0, err
	}
	return u, 0, nil
}

// members are those that hold strips of the stripe.
func (v *view) members() []*member {
	var ms []*member
	for _, p := range v.places {
		if p.member != nil && !slices.Contains(ms, p.member) {
			ms = append(ms, p.member)
		}
	}
	return ms
}

// notThere returns those of the members whose label cannot be read from the drive now.
func (a *Array) notThere(ms []*member) (gone uint64) {
	t := a.newBatch()
	for _, m := range ms {
		b := newSlot()
		t.read(m, 0, b, b.b[:labelSlots*BlockBytes], 0)
		b.release() // the op holds it
	}
	held := make([]*buffer, len(t.ops))
	for i, o := range t.ops {
		held[i] = o.buf.hold()
	}
	t.run(a.opts.WriteTimeout)
	for i, o := range t.ops {
		if o.err() != nil || !a.isLabelOf(o.member, o.b) {
			gone |= 1 << o.member.index
			a.log(slog.LevelWarn, "raid: member is not there", "member", o.member.index, "err", o.err())
		}
		held[i].release()
	}
	return gone
}

func (a *Array) isLabelOf(m *member, slots []byte) bool {
	for s := range labelSlots {
		l, err := decodeLabel(slots[s*BlockBytes : (s+1)*BlockBytes])
		if err == nil && l.Array == a.id && l.Member == m.index && l.MemberID == m.id {
			return true
		}
	}
	return false
}

// salvaged is a stripe as it shall be: every data block (zeros where it is lost), and what of it must be written.
type salvaged struct {
	v     *view
	data  [][][]byte // by strip and column
	lost  []uint32   // by strip, after the update
	newly []int      // blocks that are declared lost
	// write are the columns of each strip to be written: bad ones, changed ones, and those of parity that follow.
	write []uint32
	// short is the least number of strips that would have to come back for one of the columns that lost blocks to be whole.
	short int
}

// salvage computes what can be had of a view that read all there is.
func (v *view) salvage(writes []BlockWrite) (*salvaged, error) {
	k, w := v.a.layout.Data(), len(v.strips)
	x := &salvaged{v: v, data: make([][][]byte, k), lost: make([]uint32, w), write: make([]uint32, w)}
	fresh := make([][][]byte, k)
	for i := range k {
		x.data[i], fresh[i] = make([][]byte, StripBlocks), make([][]byte, StripBlocks)
	}
	for _, wr := range writes {
		fresh[wr.Block/StripBlocks][wr.Block%StripBlocks] = wr.Data
	}
	if was := v.losts(); was != nil {
		copy(x.lost, was)
	}
	for i := range v.strips {
		switch s := &v.strips[i]; {
		case v.places[i].member == nil:
		case s.badSum || s.stale || s.sum == nil:
			x.write[i] = ^uint32(0)
		default:
			x.write[i] = ^s.have | s.computed | s.bad
		}
	}
	for c := range StripBlocks {
		if err := x.column(c, fresh); err != nil {
			return nil, err
		}
	}
	return x, nil
}

// column fills in the data blocks of a column.
func (x *salvaged) column(c int, fresh [][][]byte) error {
	v, k, bit := x.v, len(x.data), uint32(1)<<c
	shards := make([][]byte, len(v.strips))
	good := 0
	for i := range v.strips {
		if v.usable(i) && v.strips[i].have&bit != 0 {
			shards[i] = v.block(i, c)
			good++
		}
	}
	var bad []int
	for i := range k {
		if shards[i] == nil {
			bad = append(bad, i)
		}
	}
	if good >= k && len(bad) > 0 {
		if err := v.a.code.ReconstructData(shards); err != nil {
			return fmt.Errorf("reconstruct: %w", err)
		}
	}
	changed := false
	for _, i := range bad {
		// As in computeRun: a checksum block that is current knows better.
		s := &v.strips[i]
		known := s.sum != nil && !s.stale && !s.badSum
		if good < k || known && checksumOf(v.a.address(v.stripe, i), c, shards[i]) != s.sum.crcs[c] {
			shards[i], changed = zeroBlock, true
			if fresh[i][c] == nil {
				if x.lost[i]&bit == 0 {
					x.newly = append(x.newly, i*StripBlocks+c)
				}
				x.lost[i] |= bit
				if good < k && (x.short == 0 || k-good < x.short) {
					x.short = k - good
				}
			}
			if v.places[i].member != nil {
				x.write[i] |= bit
			}
		}
	}
	for i := range k {
		x.data[i][c] = shards[i]
		if f := fresh[i][c]; f != nil {
			x.lost[i] &^= bit
			if !slices.Equal(f, shards[i]) || changed {
				x.data[i][c], changed = f, true
				if v.places[i].member != nil {
					x.write[i] |= bit
				}
			}
		}
	}
	for j := k; j < len(v.strips); j++ {
		if changed && v.places[j].member != nil {
			x.write[j] |= bit
		}
	}
	return nil
}

// update is the image of what must be written. Every parity strip has a part in it, if only for its checksum block.
func (x *salvaged) update(gen uint64, columns []uint32) (*Update, error) {
	v, a, k := x.v, x.v.a, len(x.data)
	u := &Update{array: a.id, sums: a.sums, k: k, m: a.layout.Parity(), stripe: v.stripe, gen: gen, gens: slices.Clone(v.gens),
		losts: x.lost, newly: x.newly, fresh: true}
	was := v.losts()
	for i := range v.strips {
		touched := i >= k || x.write[i] != 0 || columns[i] != 0 || x.lost[i] != 0 && (was == nil || was[i] != x.lost[i])
		if touched {
			u.gens[i] = gen
		}
		if touched && v.places[i].member != nil {
			u.strips = append(u.strips, updateStrip{strip: i, columns: x.write[i]})
		}
	}
	parity, err := x.parity()
	if err != nil {
		return nil, err
	}
	for n := range u.strips {
		s := &u.strips[n]
		at, sum := a.address(v.stripe, s.strip), v.strips[s.strip].sum
		if s.columns != ^uint32(0) {
			s.crcs = sum.crcs
		}
		for c := range StripBlocks {
			if s.columns>>c&1 == 0 {
				continue
			}
			var b []byte
			if s.strip < k {
				b = x.data[s.strip][c]
			} else {
				b = parity[s.strip-k][c]
			}
			if allZero(b) {
				b = zeroBlock
				s.zeros |= 1 << c
			} else {
				b = slices.Clone(b) // the view's buffers go
			}
			s.blocks = append(s.blocks, b)
			s.crcs[c] = checksumOf(at, c, b)
		}
	}
	return u, nil
}

// parity computes the parity blocks of all columns that some parity strip writes.
func (x *salvaged) parity() ([][][]byte, error) {
	v, k := x.v, len(x.data)
	out := make([][][]byte, len(v.strips)-k)
	var need uint32
	for j := range out {
		out[j] = make([][]byte, StripBlocks)
		need |= x.write[k+j]
	}
	for c := range StripBlocks {
		if need>>c&1 == 0 {
			continue
		}
		shards := make([][]byte, len(v.strips))
		for i := range k {
			shards[i] = x.data[i][c]
		}
		for j := range out {
			out[j][c] = make([]byte, BlockBytes)
			shards[k+j] = out[j][c]
		}
		if err := v.a.code.Encode(shards); err != nil {
			return nil, fmt.Errorf("encode: %w", err)
		}
	}
	return out, nil
}

// Lost returns the blocks that the update declares lost: numbers of data blocks of the stripe.
func (u *Update) Lost() []int { return u.newly }

var zeroBlock = alignedBytes(BlockBytes)

func allZero(b []byte) bool {
	for len(b) >= 8 {
		if binary.LittleEndian.Uint64(b) != 0 {
			return false
		}
		b = b[8:]
	}
	return true
}

// losts returns the lost blocks of every strip, or nil when there are none. Strips of which nothing current is known are
// beyond parity, or nobody's business here.
func (v *view) losts() []uint32 {
	k := v.a.layout.Data()
	var told []uint32 // by parity
	for i := k; i < len(v.strips); i++ {
		if s := &v.strips[i]; v.usable(i) && s.sum != nil && s.sum.losts != nil {
			told = s.sum.losts
		}
	}
	var out []uint32
	for i := range k {
		lost := uint32(0)
		if s := &v.strips[i]; v.usable(i) && s.sum != nil {
			lost = s.sum.lost
		} else if told != nil {
			lost = told[i]
		}
		if lost != 0 {
			if out == nil {
				out = make([]uint32, len(v.strips))
			}
			out[i] = lost
		}
	}
	return out
}

func (v *view) lostBlocks() (n int) {
	for _, l := range v.losts() {
		n += bits.OnesCount32(l)
	}
	return n
}

// lostBlocks counts the lost blocks that current checksum blocks tell of; nil: not known.
func lostBlocks(sums []*stripSum, k int) (n uint64) {
	for i := range k {
		if s := sums[i]; s != nil {
			n += uint64(bits.OnesCount32(s.lost))
			continue
		}
		for _, p := range sums[k:] {
			if p != nil && p.losts != nil {
				n += uint64(bits.OnesCount32(p.losts[i]))
				break
			}
		}
	}
	return n
}

// checkLost answers for the wanted blocks that are lost.
func (v *view) checkLost() error {
	for i, l := range v.losts() {
		if l &= v.strips[i].want; l != 0 {
			v.a.counters.unrecoverable.Add(1)
			return &BlockError{Stripe: v.stripe, Block: i*StripBlocks + bits.TrailingZeros32(l), Lost: true}
		}
	}
	return nil
}

// locate adds to the error of a fetch the first of the wanted blocks that cannot be had.
func (v *view) locate(err error) error {
	if !errors.Is(err, ErrUnrecoverable) {
		return err
	}
	if v.unwritten() {
		return fmt.Errorf("%w: %w", ErrUnwritten, err)
	}
	k := v.a.layout.Data()
	var dead uint32
	for c := range StripBlocks {
		good := 0
		for i := range v.strips {
			if v.usable(i) && v.strips[i].have>>c&1 != 0 {
				good++
			}
		}
		if good < k {
			dead |= 1 << c
		}
	}
	losts := v.losts()
	for i := range k {
		s := &v.strips[i]
		gone := s.want &^ s.have & dead
		if losts != nil {
			gone |= s.want & losts[i]
		}
		if gone != 0 {
			return &BlockError{Stripe: v.stripe, Block: i*StripBlocks + bits.TrailingZeros32(gone), Err: err}
		}
	}
	return err
}

// without returns the lost blocks that are left when columns are written; nil: none.
func without(losts, columns []uint32) []uint32 {
	left := false
	for i := range losts {
		if i < len(columns) {
			losts[i] &^= columns[i]
		}
		left = left || losts[i] != 0
	}
	if !left {
		return nil
	}
	return losts
}

// marked tells whether the checksum block has lost blocks to tell of.
func (s *stripSum) marked() bool {
	return s.lost != 0 || slices.ContainsFunc(s.losts, func(l uint32) bool { return l != 0 })
}

// tell puts what the checksum block of a strip repeats of the stripe: parity all generations and lost blocks, data its
// own lost blocks. losts may be nil.
func (s *stripSum) tell(strip, k int, gens []uint64, losts []uint32) {
	if strip >= k {
		s.gens, s.losts = gens, losts
	} else if losts != nil {
		s.lost = losts[strip]
	}
}

func (s *stripSum) decodeLost(b []byte, at address) {
	if at.strip < at.k {
		s.lost = binary.LittleEndian.Uint32(b[52:])
		return
	}
	s.losts = make([]uint32, at.k+at.m)
	for i := range at.k {
		s.losts[i] = binary.LittleEndian.Uint32(b[480+4*i:])
	}
}
