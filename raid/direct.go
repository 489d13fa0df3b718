package raid

import (
	"math/bits"
	"slices"
	"sync/atomic"
	"time"
)

// The straight way of a read, for a stripe of which nothing is amiss. Nearly all reads go this way, so it is made for
// speed: each strip is one I/O, verified by the goroutine that read it, while it is in that core's cache, and copied to the
// reader, its buffer going back at once, or lent.
//
//	1. one I/O for each wanted strip, with the checksum block where it is not in memory; the checksum blocks of parity,
//	   which tell the generations, where they are not;
//	2. each, when it has come: decode its checksum block, compute its blocks' checksums, copy them, if they are to be copied;
//	3. when all have come: generations, then checksums, are compared.
//
// Whatever is not as it should be, a member that is absent or does not answer, an error, a wrong checksum, an old
// generation, makes it answer false, with what was to be filled undefined: the view (fetch.go) then reads again, judges, reconstructs.
// The straight way decides nothing and repairs nothing; it only knows what good is.
//
// # Hedged reads
//
// A member that does not answer for longer than reads of this array usually take (pulse.go) is not waited for, if all
// others have answered and parity can stand for it: the view gets the strips that are late as silent, and reconstructs
// them; for the strips that it reads in their place it is as impatient, and tries further ones, then all again with patience. The
// late answer is dropped when it comes. Strips that are late and absent are at most M together, and
// one parity strip has told the generations: a hedge never verifies less than a read. A hedge costs reads of other
// members, so that hedges have a budget: an array that is slow as a whole is not made slower.

// straight is one read.
type straight struct {
	a       *Array
	stripe  uint64
	to      *sink
	summer  summer
	ops     []straightOp
	left    atomic.Int32 // ops that are neither done nor given up
	done    chan struct{}
	quit    chan struct{} // closed when ops are given up: those that wait for their member's queue leave
	gens    []uint64
	meta    *stripeMeta // what was in memory; may be nil
	sums    []*stripSum // what is known after verify
	learned bool
}

// straightOp is one I/O: blocks first to first+count of the slot of a strip, block 0 being the checksum block.
type straightOp struct {
	r            *straight
	member       *member
	strip        int
	first, count int
	off          int64
	buf          *buffer
	// dst gets the wanted blocks, unless they are lent: then the read has a reference to buf of its own.
	dst  spans
	from int // the first wanted block of the slot; the last is the op's last
	want bool

	state atomic.Int32 // opPending → opTaken → opDone, or opPending → opAbandoned
	tardy tardy
	begun time.Time

	// Valid in opDone.
	err  error
	sum  *stripSum
	crcs [StripBlocks]uint32
}

// opTaken: the drive answered in time, and the bytes are being verified. Only the op's goroutine leaves it, soon.
const opTaken = opAbandoned + 1

// readStraight reads count blocks from block on. late are strips that did not answer in time, for the view.
func (a *Array) readStraight(stripe uint64, block, count int, to *sink) (ok bool, late uint64, hedged bool) {
	r := a.planStraight(stripe, block, count, to)
	if r == nil {
		return false, 0, false
	}
	late, hedged = r.run()
	ok = late == 0 && r.verify()
	if to.loan != nil {
		r.lend(ok)
	}
	if ok {
		r.remember()
		return true, 0, false
	}
	return false, late, hedged
}

// lend passes the read's references on, or gives them up.
func (r *straight) lend(ok bool) {
	for i := range r.ops {
		op := &r.ops[i]
		switch {
		case !op.want:
		case ok:
			r.to.lend(op.buf, op.from-op.first, op.count)
		default:
			op.buf.release()
		}
	}
}

// planStraight returns nil where the straight way is not open.
func (a *Array) planStraight(stripe uint64, block, count int, to *sink) *straight {
	places := a.places(stripe)
	k, w := a.layout.Data(), len(places)
	r := &straight{a: a, stripe: stripe, to: to, gens: make([]uint64, w), meta: a.cache.get(stripe)}
	known := func(int) bool { return false }
	askParity := true
	if r.meta != nil {
		a.counters.cacheHits.Add(1)
		copy(r.gens, r.meta.gens)
		known = func(strip int) bool { return r.meta.sums[strip] != nil }
		askParity = !r.meta.parity
	} else {
		a.counters.cacheMisses.Add(1)
	}
	first, last := block/StripBlocks, (block+count-1)/StripBlocks
	for i := first; i <= last; i++ {
		if m := places[i].member; m == nil || m.stuck.Load() > 0 || m.suspect.Load() {
			return nil
		}
	}
	r.ops = make([]straightOp, 0, 2*(last-first+1)+w-k)
	add := func(strip, first, count int) *straightOp {
		p := places[strip]
		r.ops = append(r.ops, straightOp{r: r, member: p.member, strip: strip, first: first, count: count, off: p.off + int64(first)*BlockBytes})
		return &r.ops[len(r.ops)-1]
	}
	for i := first; i <= last; i++ {
		lo, hi := max(block-i*StripBlocks, 0), min(block+count-i*StripBlocks, StripBlocks)
		from := lo + 1 // in blocks of the slot
		if !known(i) {
			if from <= nearBlocks {
				from = 0
			} else {
				add(i, 0, 1)
			}
		}
		op := add(i, from, hi+1-from)
		op.from = lo + 1
		op.want = true
		if to.loan == nil {
			op.dst = spansAt(to.dst, i*StripBlocks+lo-block)
		}
	}
	for i := k; askParity && i < w; i++ {
		switch m := places[i].member; {
		case m == nil:
		case m.stuck.Load() > 0:
			return nil
		default:
			add(i, 0, 1)
		}
	}
	r.summer = newSummer(a.sums, a.id, stripe)
	return r
}

// nearBlocks: so many blocks too many cost less than a second I/O.
const nearBlocks = 8

// spansAt returns bufs from a block on.
func spansAt(bufs [][]byte, block int) spans {
	n := block * BlockBytes
	for n > 0 && n >= len(bufs[0]) {
		n -= len(bufs[0])
		bufs = bufs[1:]
	}
	return spans{bufs: bufs, at: n}
}

// run performs the I/Os and returns the strips that were given up on. Afterwards nobody writes to where blocks are copied to, or to
// the buffers of those that have come.
func (r *straight) run() (late uint64, hedged bool) {
	n := len(r.ops)
	r.left.Store(int32(n))
	r.done, r.quit = make(chan struct{}), make(chan struct{})
	r.a.ios.Add(n)
	now := time.Now()
	for i := range r.ops {
		op := &r.ops[i]
		op.begun = now
		op.buf = newBuffer(op.count)
		if op.want && r.to.loan != nil {
			op.buf.hold()
		}
		go op.perform()
	}
	patience := r.a.opts.ReadTimeout
	hedge := min(r.a.pulse.bound(), patience)
	if !r.wait(hedge) {
		return 0, false
	}
	if hedge < patience {
		if r.mayHedge() {
			return r.giveUp(true), true
		}
		if !r.wait(patience - hedge) {
			return 0, false
		}
	}
	return r.giveUp(false), false
}

// wait says whether the time passed before all was done.
func (r *straight) wait(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-r.done:
		return false
	case <-timer.C:
		return true
	}
}

// mayHedge says whether parity can stand for what has not come, and takes it from the budget.
func (r *straight) mayHedge() bool {
	var pending uint64
	told := r.meta != nil && r.meta.parity
	k := r.a.layout.Data()
	for i := range r.ops {
		op := &r.ops[i]
		switch {
		case op.state.Load() == opPending:
			pending |= 1 << op.strip
		case op.state.Load() == opDone && op.strip >= k && op.err == nil && op.sum != nil:
			told = true
		}
	}
	if pending == 0 {
		return false // it came just now
	}
	for i, p := range r.a.places(r.stripe) {
		if p.member == nil || p.member.stuck.Load() > 0 || p.member.late.Load() > 0 {
			pending |= 1 << i
		}
	}
	if !told || bits.OnesCount64(pending) > r.a.layout.Parity() {
		return false
	}
	// The view reads the stripe again, so the whole of it counts.
	cost := 0
	for i := range r.ops {
		cost = max(cost, r.ops[i].count)
	}
	return r.a.pulse.spend(cost * k)
}

// giveUp abandons what has not come.
func (r *straight) giveUp(hedge bool) (late uint64) {
	for i := range r.ops {
		op := &r.ops[i]
		if op.tardy.abandon(op.member, &op.state, hedge, r.a.opts.ReadTimeout-time.Since(op.begun)) {
			late |= 1 << op.strip
			r.settle()
		}
	}
	close(r.quit)
	<-r.done // what was taken is through soon
	if hedge && late != 0 {
		r.a.counters.hedges.Add(1)
	}
	return late
}

func (r *straight) settle() {
	if r.left.Add(-1) == 0 {
		close(r.done)
	}
}

// perform is the goroutine of an op.
func (op *straightOp) perform() {
	r := op.r
	defer r.a.ios.Done()
	defer op.buf.release()
	b := op.buf.b[:op.count*BlockBytes]
	err := func() error {
		select {
		case op.member.queue <- struct{}{}:
		case <-r.quit:
			return ErrTimeout
		}
		defer func() { <-op.member.queue }()
		return op.member.read(b, op.off)
	}()
	r.a.beat(op.member, time.Since(op.begun), op.count)
	if !op.state.CompareAndSwap(opPending, opTaken) {
		op.tardy.answered(op.member)
		return
	}
	if op.err = err; err == nil {
		op.take(b)
	} else {
		op.member.readErrors.Add(1)
	}
	op.state.Store(opDone)
	r.settle()
}

// take is step 2.
func (op *straightOp) take(b []byte) {
	r := op.r
	if op.first == 0 {
		// An error shows as a sum that is missing.
		op.sum, _ = decodeSum(b[:BlockBytes], r.a.address(r.stripe, op.strip))
	}
	for i := op.from; op.want && i < op.first+op.count; i++ {
		block := b[(i-op.first)*BlockBytes:][:BlockBytes]
		op.crcs[i-1] = r.summer.block(op.strip, i-1, block)
		if r.to.loan == nil {
			copy(op.dst.next(), block)
		}
	}
}

// verify is step 3.
func (r *straight) verify() bool {
	sums := make([]*stripSum, len(r.gens))
	if r.meta != nil {
		copy(sums, r.meta.sums)
	}
	for i := range r.ops {
		op := &r.ops[i]
		if op.err != nil || op.first == 0 && op.sum == nil {
			return false
		}
		if op.sum != nil {
			sums[op.strip], r.learned = op.sum, true
			r.gens[op.strip] = max(r.gens[op.strip], op.sum.gen)
			for j, g := range op.sum.gens {
				r.gens[j] = max(r.gens[j], g)
			}
		}
	}
	newest := slices.Max(r.gens) // parity is as new as the newest strip: see view.perform
	for i := r.a.layout.Data(); i < len(r.gens); i++ {
		r.gens[i] = newest
	}
	for i := range r.ops {
		op := &r.ops[i]
		if sum := sums[op.strip]; sum.stale(op.strip, r.gens) || !op.matches(sum) {
			return false
		}
	}
	r.sums = sums
	return true
}

// matches compares the blocks that were read with what they should be. A lost block (lost.go) matches nothing.
func (op *straightOp) matches(sum *stripSum) bool {
	for c := op.from - 1; op.want && c < op.first+op.count-1; c++ {
		if op.crcs[c] != sum.crcs[c] || sum.lost>>c&1 != 0 {
			return false
		}
	}
	return true
}

// stale tells whether the strip lost a write, the generations of all strips being gens.
func (s *stripSum) stale(strip int, gens []uint64) bool {
	if s.gen < gens[strip] {
		return true
	}
	for j, g := range s.gens {
		if g < gens[j] {
			return true
		}
	}
	return false
}

// remember puts what is known now in memory, unless it is only what was there.
func (r *straight) remember() {
	if !r.learned {
		return
	}
	// Parity was asked now, or before; strips of it that are absent tell nothing.
	r.a.cache.put(r.stripe, &stripeMeta{gens: r.gens, parity: true, sums: r.sums})
}
