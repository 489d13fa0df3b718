package raid

import (
	"fmt"
	"math/bits"
	"slices"
)

// view is one operation's picture of one stripe: which blocks it wants, what it has read, what of that is
// good. The stripe's lock is held as long as the view is.
//
// fetch gets the wanted blocks in these steps:
//
//  1. read the wanted blocks, with their checksum blocks where these are not in memory, and the checksum
//     blocks of the parity strips, which tell the generations;
//  2. judge: a strip whose checksum block is rotten, foreign or of an older generation is bad as a whole; a
//     block whose checksum differs is bad alone;
//  3. while wanted blocks are bad or absent: read the same columns of other strips until k good ones are there;
//  4. compute what is missing, and compare it with its checksum where that is known.
//
// A read that takes too long counts as bad in the first attempt. If parity cannot serve then, a second attempt
// waits as long as for a write, and reads block by block, so that one unreadable sector costs one block.
type view struct {
	a       *Array
	stripe  uint64
	places  []place
	strips  []stripView
	gens    []uint64 // true generations, as far as known
	parity  bool     // all parity strips were asked for gens
	learned bool     // a checksum block was read that was not in memory
	patient bool
	// hedged: members were late, and others are not waited for longer than for them.
	hedged bool
	// sums: the checksum blocks of all strips are asked for. While parity is missing, that another parity strip lost a write may show
	// in the data strip alone that was written then; who makes parity again may not be one who did not look.
	sums bool
	// fromMedia ignores the checksum blocks in memory: a repair judges what the members hold.
	fromMedia bool
}

type stripView struct {
	want, have uint32 // columns
	bad        uint32 // columns that did not verify, or did not read
	computed   uint32 // of have: from parity
	sum        *stripSum
	asked      bool // the checksum block was read, or is in memory
	badSum     bool // it is no good: unreadable, rotten, another's
	stale      bool
	silent     bool // did not answer in time, or is not asked because it hangs or is suspect
	unread     bool // a read of it failed: it may yet be good
	buf        *buffer
}

func (a *Array) newView(stripe uint64) *view {
	w := a.layout.Width()
	return &view{a: a, stripe: stripe, places: a.places(stripe), strips: make([]stripView, w), gens: make([]uint64, w)}
}

// release gives the buffers back. Blocks of the view are invalid afterwards.
func (v *view) release() {
	for i := range v.strips {
		if b := v.strips[i].buf; b != nil {
			b.release()
			v.strips[i].buf = nil
		}
	}
}

// block is the memory of a block of a strip: whole strips lie in it as in their slot.
func (v *view) block(strip, column int) []byte {
	s := &v.strips[strip]
	return s.buf.b[(1+column)*BlockBytes : (2+column)*BlockBytes]
}

// usable: the strip is somewhere, and nothing speaks against it as a whole.
func (v *view) usable(i int) bool {
	s := &v.strips[i]
	return v.places[i].member != nil && !s.badSum && !s.stale && !s.silent
}

func (v *view) fetch() error {
	defer v.count()
	err := v.attempt()
	if v.hedged && (err != nil || !v.told()) {
		v.hedged, v.parity = false, false
		for i := range v.strips {
			v.strips[i].silent = false
		}
		err = v.attempt()
	}
	if err == nil || v.patient {
		return err
	}
	again := false
	for i := range v.strips {
		s := &v.strips[i]
		if s.silent || s.bad != 0 || s.badSum {
			s.silent, s.asked, s.badSum, s.bad, s.sum = false, false, false, 0, nil
			s.have, s.unread = 0, false
			again = true
		}
	}
	if !again {
		return err
	}
	v.patient, v.parity = true, false
	return v.attempt()
}

// told says whether a parity strip has told the generations.
func (v *view) told() bool {
	for i := v.a.layout.Data(); i < len(v.strips); i++ {
		if s := &v.strips[i]; s.sum != nil && !s.silent {
			return true
		}
	}
	return false
}

func (v *view) attempt() error {
	v.recall()
	v.readWanted()
	for {
		need := v.needed()
		if need == 0 {
			v.remember()
			return nil
		}
		more, enough := v.readMore(need)
		if enough {
			break
		}
		if !more {
			v.a.counters.unrecoverable.Add(1)
			return fmt.Errorf("raid: stripe %d: %s: %w", v.stripe, v.describe(need), ErrUnrecoverable)
		}
	}
	if err := v.compute(); err != nil {
		v.a.counters.unrecoverable.Add(1)
		return err
	}
	v.remember()
	return nil
}

// count notes checksum blocks that are no good; in a stripe that was never written none is.
func (v *view) count() {
	if v.unwritten() {
		return
	}
	for i := range v.strips {
		if s := &v.strips[i]; s.badSum && v.places[i].member != nil {
			v.a.noteChecksum(v.places[i].member)
			v.a.blame(v.places[i].member, v.stripe, "rotten checksum block")
		}
	}
}

// recall takes what is in memory of the stripe's checksum blocks.
func (v *view) recall() {
	if v.fromMedia || v.patient {
		return
	}
	meta := v.a.cache.get(v.stripe)
	if meta == nil {
		v.a.counters.cacheMisses.Add(1)
		return
	}
	v.a.counters.cacheHits.Add(1)
	copy(v.gens, meta.gens)
	v.parity = meta.parity
	for i, sum := range meta.sums {
		if sum != nil && v.places[i].member != nil {
			v.strips[i].sum, v.strips[i].asked = sum, true
		}
	}
}

// remember puts what is known now in memory, unless it is only what was there.
func (v *view) remember() {
	if !v.learned {
		return
	}
	meta := &stripeMeta{gens: slices.Clone(v.gens), parity: v.parity, sums: make([]*stripSum, len(v.strips))}
	for i := range v.strips {
		if i >= v.a.layout.Data() && v.strips[i].silent {
			meta.parity = false
		}
		if v.usable(i) {
			meta.sums[i] = v.strips[i].sum
		}
	}
	v.a.cache.put(v.stripe, meta)
}

// needed returns the columns of wanted blocks that are not there.
func (v *view) needed() uint32 {
	var need uint32
	for i := range v.strips {
		need |= v.strips[i].want &^ v.strips[i].have
	}
	return need
}

// readWanted is steps 1 and 2.
func (v *view) readWanted() {
	t := v.a.newBatch()
	for i := range v.strips {
		s := &v.strips[i]
		if s.want != 0 {
			v.plan(t, i, s.want)
		} else if !v.parity && (v.sums || i >= v.a.layout.Data()) {
			v.plan(t, i, 0)
		}
	}
	v.parity = true
	v.perform(t)
}

// plan adds the reads of a strip's columns, and of its checksum block if that is not known.
func (v *view) plan(t *batch, i int, columns uint32) {
	s, p := &v.strips[i], v.places[i]
	columns &^= s.have | s.bad
	if p.member == nil || s.badSum || s.stale || s.silent || columns == 0 && s.asked {
		return
	}
	if !v.patient && (p.member.stuck.Load() > 0 || v.hedged && p.member.late.Load() > 0) {
		if p.member.stuck.Load() > 0 {
			v.a.blameHang(p.member)
		}
		s.silent = true
		return
	}
	if columns != 0 && !v.patient && !v.fromMedia && v.a.avoid(p.member) {
		s.silent = true
		return
	}
	if s.buf == nil {
		s.buf = newSlot()
	}
	add := func(from, to int) { // in blocks of the slot
		t.read(p.member, i, s.buf, s.buf.b[from*BlockBytes:to*BlockBytes], p.off+int64(from)*BlockBytes)
	}
	if v.patient {
		if !s.asked {
			add(0, 1)
		}
		for c := range StripBlocks {
			if columns>>c&1 != 0 {
				add(c+1, c+2)
			}
		}
		return
	}
	if columns == 0 {
		add(0, 1)
		return
	}
	from, to := 1+bits.TrailingZeros32(columns), 1+bits.Len32(columns)
	// A few blocks too many cost less than a second I/O.
	const near = 8
	switch {
	case s.asked:
		add(from, to)
	case from <= near:
		add(0, to)
	default:
		add(0, 1)
		add(from, to)
	}
}

// perform runs planned reads and judges what they brought.
func (v *view) perform(t *batch) {
	if len(t.ops) == 0 {
		return
	}
	limit := v.a.opts.ReadTimeout
	if v.patient {
		limit = v.a.opts.WriteTimeout
	}
	if v.hedged {
		t.hedge, limit = true, min(v.a.pulse.bound(), limit)
	}
	t.run(limit)
	fresh := make([]uint32, len(v.strips)) // columns that were read now
	for _, o := range t.ops {
		v.arrived(o, fresh)
	}
	for i := range v.strips {
		v.learn(i)
	}
	// Every write touches parity and at least one data strip: parity is as new as the newest strip. This is also how
	// parity's generation is known when no checksum block of parity can be read.
	newest := slices.Max(v.gens)
	for i := v.a.layout.Data(); i < len(v.gens); i++ {
		v.gens[i] = newest
	}
	for i := range v.strips {
		v.judge(i, fresh[i])
	}
}

// arrived takes one read's outcome: marks columns as read, or as bad.
func (v *view) arrived(o *op, fresh []uint32) {
	s := &v.strips[o.strip]
	first := int(o.off-v.places[o.strip].off) / BlockBytes
	count := len(o.b) / BlockBytes
	var mask uint32
	for c := max(first, 1); c < first+count; c++ {
		mask |= 1 << (c - 1)
	}
	switch {
	case o.outcome.Load() == opAbandoned:
		// The drive may yet write into the buffer: it is the op's alone from now on.
		s.silent = true
		v.a.blame(o.member, v.stripe, "read timed out")
		if s.buf == o.buf {
			s.buf.release()
			s.buf, s.have, s.computed = nil, 0, 0
		}
	case s.silent:
	case o.err() != nil:
		v.a.blame(o.member, v.stripe, o.err().Error())
		s.unread = true
		if first == 0 {
			s.asked, s.badSum = true, true
		}
		s.bad |= mask
	default:
		if first == 0 {
			s.asked = true
			sum, err := decodeSum(o.b[:BlockBytes], v.a.address(v.stripe, o.strip))
			s.badSum = err != nil
			s.sum, v.learned = sum, true
		}
		fresh[o.strip] |= mask
	}
}

// learn raises the known generations by what a checksum block tells.
func (v *view) learn(i int) {
	s := &v.strips[i]
	if s.sum == nil {
		return
	}
	v.gens[i] = max(v.gens[i], s.sum.gen)
	for j, g := range s.sum.gens {
		v.gens[j] = max(v.gens[j], g)
	}
}

// judge is step 2 for one strip: fresh columns were read.
func (v *view) judge(i int, fresh uint32) {
	s := &v.strips[i]
	if s.sum == nil || s.silent {
		return
	}
	stale := s.sum.gen < v.gens[i]
	for j, g := range s.sum.gens {
		stale = stale || g < v.gens[j]
	}
	if stale {
		if !s.stale {
			v.a.noteStale(v.places[i].member)
			v.a.blame(v.places[i].member, v.stripe, "lost write")
		}
		s.stale, s.have = true, 0
		return
	}
	at := v.a.address(v.stripe, i)
	for c := range StripBlocks {
		bit := uint32(1) << c
		if fresh&bit == 0 || s.have&bit != 0 {
			continue
		}
		if checksumOf(at, c, v.block(i, c)) == s.sum.crcs[c] {
			s.have |= bit
			s.bad &^= bit
		} else if s.bad&bit == 0 {
			s.bad |= bit
			v.a.noteChecksum(v.places[i].member)
			v.a.blame(v.places[i].member, v.stripe, "rotten block")
		}
	}
}

// readMore is step 3: it reads the needed columns of as many more strips as the worst column lacks. It answers
// enough when every needed column has k good blocks, more when it read something.
func (v *view) readMore(need uint32) (more, enough bool) {
	k := v.a.layout.Data()
	lack := 0
	for c := range StripBlocks {
		if need>>c&1 == 0 {
			continue
		}
		good := 0
		for i := range v.strips {
			if v.usable(i) && v.strips[i].have>>c&1 != 0 {
				good++
			}
		}
		lack = max(lack, k-good)
	}
	if lack <= 0 {
		return false, true
	}
	t := v.a.newBatch()
	for i := range v.strips {
		if lack == 0 {
			break
		}
		s := &v.strips[i]
		if !v.usable(i) || need&^(s.have|s.bad) == 0 {
			continue
		}
		before := len(t.ops)
		v.plan(t, i, need)
		if len(t.ops) > before {
			lack--
		}
		more = true // also when plan found the member hanging: then the next round tries another
	}
	v.perform(t)
	return more, false
}

// compute is step 4, run by run of columns that have the same good strips.
func (v *view) compute() error {
	for c := 0; c < StripBlocks; {
		good, lack := v.column(c)
		next := c + 1
		if lack != 0 {
			for next < StripBlocks {
				if g, l := v.column(next); g != good || l != lack {
					break
				}
				next++
			}
			if err := v.computeRun(c, next, good, lack); err != nil {
				return err
			}
		}
		c = next
	}
	return nil
}

// column returns the strips that are good in a column, and those that are wanted and are not.
func (v *view) column(c int) (good, lack uint64) {
	for i := range v.strips {
		s := &v.strips[i]
		if v.usable(i) && s.have>>c&1 != 0 {
			good |= 1 << i
		} else if s.want&^s.have>>c&1 != 0 {
			lack |= 1 << i
		}
	}
	return good, lack
}

func (v *view) computeRun(from, to int, good, lack uint64) error {
	lo, hi := (1+from)*BlockBytes, (1+to)*BlockBytes
	shards := make([][]byte, len(v.strips))
	required := make([]bool, len(v.strips))
	for i := range v.strips {
		s := &v.strips[i]
		switch {
		case good>>i&1 != 0:
			shards[i] = s.buf.b[lo:hi:hi]
		case lack>>i&1 != 0:
			if s.buf == nil {
				s.buf = newSlot()
			}
			shards[i] = s.buf.b[lo:lo:hi]
			required[i] = true
		}
	}
	if err := v.a.code.ReconstructSome(shards, required); err != nil {
		return fmt.Errorf("raid: stripe %d: reconstruct: %w", v.stripe, err)
	}
	for i := range v.strips {
		if !required[i] {
			continue
		}
		s := &v.strips[i]
		for c := from; c < to; c++ {
			// The checksum block, if it is current, knows better than the sum of k other blocks.
			if s.sum != nil && !s.stale && !s.badSum && checksumOf(v.a.address(v.stripe, i), c, v.block(i, c)) != s.sum.crcs[c] {
				return fmt.Errorf("raid: stripe %d strip %d block %d: rebuilt block does not match its checksum: %w",
					v.stripe, i, c, ErrUnrecoverable)
			}
			s.have |= 1 << c
			s.computed |= 1 << c
		}
	}
	return nil
}

// damaged tells whether a strip that lies on a working member needs repair.
func (v *view) damaged(i int) bool {
	s := &v.strips[i]
	return v.places[i].member != nil && (s.badSum || s.stale || s.bad != 0)
}

func (v *view) anyDamaged() bool {
	for i := range v.strips {
		if v.damaged(i) {
			return true
		}
	}
	return false
}

func (v *view) anyComputed() bool {
	for i := range v.strips {
		if v.strips[i].computed != 0 {
			return true
		}
	}
	return false
}

// describe says what is wrong, for the error.
func (v *view) describe(need uint32) string {
	var absent, bad, stale, silent int
	for i := range v.strips {
		s := &v.strips[i]
		switch {
		case v.places[i].member == nil:
			absent++
		case s.silent:
			silent++
		case s.stale:
			stale++
		case s.badSum || s.bad&need != 0:
			bad++
		}
	}
	return fmt.Sprintf("of %d strips %d absent, %d rotten, %d stale, %d silent", len(v.strips), absent, bad, stale, silent)
}

func (a *Array) noteChecksum(m *member) {
	m.checksumErrors.Add(1)
	a.counters.checksumErrors.Add(1)
}

func (a *Array) noteStale(m *member) {
	m.staleStrips.Add(1)
	a.counters.staleStrips.Add(1)
}
