package shelf

import (
	"container/heap"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/raid"
)

// Destage moves acknowledged blocks from the overlay to the members, a round at a time:
//
//	1. pick      of what is in the oldest part of the log, whole stripes first, then those with the oldest blocks;
//	             when the log is nearly full, the oldest only, so that its tail moves; in a drain, all.
//	2. capture   the blocks of each as they are now. The extent is pinned.
//	3. write     W  a stripe that is whole in the overlay, or was never written (the rest is zeros):
//	                array.WriteStripe, which reads nothing.
//	             U  any other: PrepareUpdate (reads), log.Append of the redo image, parity included, Apply (P3).
//	                What is beyond parity is given up (lost.go).
//	4. flush     the members' caches.
//	5. record    the stripes written for the first time, as "written" in the map.
//	6. settle    blocks that were not overwritten meanwhile leave the overlay.
//	7. trim      the update lane up to this round's last image, the data lane up to the oldest block still in the
//	             overlay, or the oldest Append in flight.
//
// # Why no crash loses or mixes anything
//
// Three facts carry the proof. (a) A block's newest acknowledged copy is in the data lane until step 7, which
// comes after step 4 of a round that wrote it. (b) A stripe in place is read by PrepareUpdate only when it is
// consistent: no write to it is half done. (c) Replay (replay.go) first applies all redo images, then fills the
// overlay from the data lane, then destages as here.
//
// A cut of power, by the step it hits, with up to M members lost with it:
//
//	 cut in          the members hold                 replay finds                     and then
//	 3 U before log  old stripe                       blocks in the data lane          overlay; destaged again
//	 3 U in Append   old stripe                       a torn record ends the log;      the same: the image was
//	                                                  data records are older, whole    not needed yet
//	 3 U in Apply    some strips old, some new        the image, whole                 applied from the first strip on
//	                                                                                   to all members present:
//	                                                                                   consistent, new (b)
//	 3 U before 4    strips in drive caches, lost     the image, whole                 the same
//	                 in any combination
//	 3 W, first      any mix; the map says never      all acknowledged blocks of it    reads: overlay, else zeros;
//	                 written                          in the data lane                 written whole again
//	 3 W, overwrite  any mix of old and new strips    EVERY block of it in the data    reads: overlay only; written
//	                                                  lane (see below)                 whole again, nothing read
//	 4 to 5          the new stripe                   the same as 3                    the same as 3
//	 5 in Append     the new stripe                   no record: never written         as 3 W, first
//	 6, 7            the new stripe                   any part of the records          the same bytes written again
//
// # Why a full overwrite needs no intent
//
// A record "stripe s is about to be overwritten whole" was the first design. It would tell replay to rewrite s
// from the log; but replay does that without being told. s was written whole because each of its blocks
// was in the overlay; each one's newest copy is held in the data lane by its LSN until the round has
// flushed (a newer copy that comes meanwhile holds its own record). So after a cut all of them are in the overlay
// again, s is whole again, and nothing reads its strips before it is rewritten: not a host's read (overlay
// first), not PrepareUpdate (whole stripes take path W). An unmap does not open a gap: zeros are entries too, and
// a freed extent is not read at all. The intent would cost an append and a mirror round trip for each full
// stripe, and carry no information.
// It does not hold for metadata: its log records are changes, not blocks. So metadata stripes always take path U.
//
// # What is overwritten
//
// A block that is written again and again shall not reach the members each time. Its older copies are not needed, and go
// with the log's tail: so the tail is moved before anything is destaged. And what is young enough to be there when destage
// stops (stopAt) is left alone: it may yet be overwritten, or become a whole stripe. A ring that takes less of the log,
// such as an agent's journal, so never reaches the members while it is written.
//
// # Stale redo images
//
// The lanes are trimmed apart, and a trim may reach the media late. So replay can meet an image that a
// later write has overtaken, even one of an extent freed and given away since. Generations decide: they rise
// with every write of a stripe (nextGen; the ceiling is logged before one below it is used), and Apply leaves
// strips of a higher generation alone. Where the later write was complete, nothing of the old image is applied.
// Where it was torn, it was W and is done again whole, or U and its own image follows, later in the log.
//
// # The race with writers and unmaps
//
// A block overwritten after its capture keeps its entry (the LSN differs) and is destaged again later. An extent
// freed during the round keeps its stripes to itself until the pin goes; its "written" record names the
// allocation's birth and changes nothing then.

const (
	// Destage starts when log or overlay are half full, stops at three eighths, and from three quarters on
	// thinks only of the oldest.
	startAt, stopAt, hurryAt = 0.5, 0.375, 0.75
	// roundStripes bounds the stripes of a round.
	roundStripes = 64
)

// need is why a round runs.
type need int

const (
	needRoom  need = iota // somebody waits for room
	needDrain             // everything shall go
	needAll               // everything must go, whatever has to be given up for it (lost.go)
)

// job is one stripe of a round.
type job struct {
	ds      *dirtyStripe
	stripe  uint64
	gen     uint64
	extent  uint32
	birth   uint64
	full    bool // path W
	fresh   bool // never written before
	blocks  []captured
	skipped bool // its old blocks cannot be read, and may come back
	// force, most and postponed are of lost.go: failed members count as gone; the blocks of an image at most; another
	// stripe of the round was given up.
	force     bool
	most      int
	postponed bool
}

type captured struct {
	within int
	lsn    uint64
	data   []byte
}

// destageRound runs one round. worked is false when there was nothing to do. It runs under the pool's own
// context: a half applied stripe must not be an initiator's choice.
func (p *Pool) destageRound(ctx context.Context, why need) (worked bool, err error) {
	if err := p.turn.take(ctx); err != nil {
		return false, err
	}
	defer p.turn.give()
	if why == needRoom { // writers may come to wait for it
		p.load.enter()
		defer p.load.leave()
	}
	jobs, err := p.pick(why)
	if err != nil {
		return false, err
	}
	if len(jobs) == 0 {
		p.trim()
		return false, nil
	}
	last, err := p.writeStripes(jobs)
	if err == nil {
		err = p.array.Flush(p.ctx)
	}
	if err == nil {
		err = p.recordWritten(jobs)
	}
	p.settle(jobs, err == nil)
	if err != nil {
		// Whatever it was, raid has given up on it: the log has all, and a new start replays it.
		p.fail(fmt.Errorf("shelf: destage: %w", err))
		return false, p.alive()
	}
	if last > 0 {
		p.log.TrimUpdates(last + 1)
	}
	p.trim()
	for _, j := range jobs {
		worked = worked || !j.skipped
	}
	return worked, nil
}

// round is what a round may still take.
type round struct {
	hurry bool // the oldest only
	// force: what failed members would be needed for is given up; most bounds such an image (lost.go).
	force bool
	most  int
	upTo  uint64 // blocks above this LSN are young, and left alone
	// room is for blocks, updates for blocks of redo images: a quarter of their lane (it is empty when a round starts,
	// and a record may meet its end).
	room, updates int
	looks         int // at whole stripes
	jobs          []*job
	chosen        map[uint64]bool // stripes of the array
	over          bool
}

// pick chooses and captures the stripes of a round, a few at a time: writers wait for mu meanwhile.
func (p *Pool) pick(why need) ([]*job, error) {
	r := round{force: why == needAll, upTo: ^uint64(0), room: p.opts.BatchBlocks, most: p.maxLossBlocks(),
		updates: int(p.log.Stats().UpdateBytes / 4 / blockBytes), chosen: map[uint64]bool{}}
	keep := 0.0
	if why == needRoom {
		full := p.pressure()
		r.hurry, keep = full >= hurryAt, min(1, stopAt/full)
		r.force = r.hurry
	}
	for first := true; !r.over; first = false {
		p.mu.Lock()
		if p.err != nil {
			p.unpinJobs(r.jobs)
			p.mu.Unlock()
			return nil, p.alive()
		}
		if first {
			p.picks++
			r.looks = min(len(p.over.full), 4*roundStripes)
			if low, ok := p.refs.first(); ok && keep > 0 {
				r.upTo = max(low, p.maxLSN-uint64(float64(p.maxLSN-low)*keep))
			}
		}
		p.pickSome(&r)
		p.mu.Unlock()
	}
	return r.jobs, nil
}

// lockStripes bounds the stripes that are captured, or settled, before mu is given up for a moment.
const lockStripes = 8

// pickSome adds a few stripes to a round. Called with mu held.
func (p *Pool) pickSome(r *round) {
	end := len(r.jobs) + lockStripes
	free := func() bool { return r.room > 0 && len(r.jobs) < min(end, roundStripes) }
	for !r.hurry && free() {
		s := p.over.nextFull(r.upTo, &r.looks)
		if s == nil {
			break
		}
		p.add(r, s)
	}
	var back []*dirtyStripe
	for free() {
		s := p.over.nextOldest()
		if s == nil {
			r.over = true
			break
		}
		back = append(back, s)
		if s.bound > r.upTo || !r.chosen[p.stripeAt(s)] && p.ripe(s, r.force) && !p.add(r, s) {
			r.over = true
			break
		}
	}
	for _, s := range back {
		heap.Push(&p.over.oldest, s)
	}
	r.over = r.over || r.room <= 0 || len(r.jobs) >= roundStripes
}

// stripeAt is where a dirty stripe lies on the array. Called with mu held.
func (p *Pool) stripeAt(s *dirtyStripe) uint64 {
	if s.key.lun == 0 {
		return p.sb.metaStripe(s.key.ext)
	}
	x, _ := p.table.lookup(s.key)
	return p.table.stripe(x, s.index)
}

// add takes a stripe into the round; false: its redo image has no room. Called with mu held.
func (p *Pool) add(r *round, s *dirtyStripe) bool {
	if r.chosen[p.stripeAt(s)] {
		return true
	}
	j := p.capture(s, r.updates)
	if j == nil {
		return false
	}
	j.force, j.most = r.force, r.most
	r.jobs, r.chosen[j.stripe] = append(r.jobs, j), true
	if r.room -= len(j.blocks); j.full {
		r.room -= p.sb.stripeBlocks() - len(j.blocks)
	} else {
		r.updates -= p.updateBlocks(len(j.blocks))
	}
	return true
}

// updateBlocks bounds the redo image of a change of n blocks: the descriptor, the blocks, and the parity of
// each column that they touch. (Two descriptor blocks hold 64 strips.)
func (p *Pool) updateBlocks(n int) int {
	const descriptor, header = 2, 2
	return descriptor + header + n + p.sb.M*min(n, stripBlocks)
}

// capture makes the job of a stripe, or nil when its redo image has no room; of a stripe with more blocks than
// an image may have, it takes the first. Called with mu held.
func (p *Pool) capture(s *dirtyStripe, updates int) *job {
	j := &job{ds: s, stripe: p.sb.metaStripe(s.key.ext)}
	if s.key.lun != 0 {
		j.extent, _ = p.table.lookup(s.key)
		e := &p.table.entries[j.extent]
		j.stripe, j.birth = p.table.stripe(j.extent, s.index), e.birth
		j.fresh = e.written&(1<<s.index) == 0
		j.full = j.fresh || s.whole()
	}
	within := make([]int, 0, len(s.blocks))
	for w := range s.blocks {
		within = append(within, w)
	}
	slices.Sort(within)
	if !j.full {
		n := len(within)
		for n > 0 && p.updateBlocks(n) > min(updates, p.log.MaxUpdateBlocks()) {
			n--
		}
		if n == 0 {
			return nil
		}
		within = within[:n]
	}
	for _, w := range within {
		e := s.blocks[w]
		c := captured{within: w, lsn: e.lsn, data: e.data}
		switch {
		case s.key.lun == 0:
			c.data = p.render(s.key.ext*uint32(p.sb.stripeBlocks()) + uint32(w))
			e.since = 0
		case c.data == nil:
			c.data = zeroBlock
		}
		j.blocks = append(j.blocks, c)
	}
	j.gen = p.nextGen()
	if s.key.lun != 0 {
		p.table.pin(j.extent)
	}
	return j
}

// writeStripes writes the jobs' stripes, Workers at a time, and returns the LSN of the last redo image.
func (p *Pool) writeStripes(jobs []*job) (last uint64, err error) {
	var mu sync.Mutex
	one := func(j *job) {
		lsn, e := p.writeStripe(j)
		mu.Lock()
		defer mu.Unlock()
		last = max(last, lsn)
		if err == nil {
			err = e
		}
	}
	if p.opts.Workers == 1 {
		for _, j := range jobs {
			if one(j); err != nil {
				break
			}
		}
		return last, err
	}
	var wg sync.WaitGroup
	next := make(chan *job)
	for range min(p.opts.Workers, len(jobs)) {
		wg.Go(func() {
			for j := range next {
				one(j)
			}
		})
	}
	for _, j := range jobs {
		next <- j
	}
	close(next)
	wg.Wait()
	return last, err
}

func (p *Pool) writeStripe(j *job) (lsn uint64, err error) {
	if j.full {
		data := make([][]byte, p.sb.stripeBlocks())
		for i := range data {
			data[i] = zeroBlock
		}
		for _, c := range j.blocks {
			data[c.within] = c.data
		}
		return 0, p.array.WriteStripe(p.ctx, j.stripe, j.gen, data)
	}
	writes := make([]raid.BlockWrite, len(j.blocks))
	for i, c := range j.blocks {
		writes[i] = raid.BlockWrite{Block: c.within, Data: c.data}
	}
	u, err := p.array.PrepareUpdate(p.ctx, j.stripe, j.gen, writes)
	given := errors.Is(err, raid.ErrUnrecoverable)
	if given {
		if u, err = p.giveUp(j, writes); err == nil && u == nil {
			j.skipped = true
			return 0, nil
		}
	}
	if err != nil {
		return 0, err
	}
	defer u.Release()
	image := u.Encode()
	set := nvram.Set{Kind: setUpdate, Extents: []nvram.Extent{{Blocks: uint32(byteLen(image) / blockBytes), LBA: j.stripe}}, Payload: image}
	if err := p.append(func(n uint64) { lsn = n }, set); err != nil {
		return 0, err
	}
	if given {
		p.gaveUp(j, u.Lost())
	}
	return lsn, p.array.Apply(p.ctx, u)
}

// recordWritten logs which stripes of the map are on the members now.
func (p *Pool) recordWritten(jobs []*job) error {
	var ds []delta
	p.mu.Lock()
	for _, j := range jobs {
		if e := &p.table.entries[j.extent]; j.fresh && !j.skipped && e.birth == j.birth && e.lun != 0 {
			ds = append(ds, delta{op: opWritten, extent: j.extent, lun: j.ds.key.lun, ext: j.ds.key.ext, birth: j.birth, written: 1 << j.ds.index})
		}
	}
	p.mu.Unlock()
	if len(ds) == 0 {
		return nil
	}
	return p.append(func(lsn uint64) {
		for i := range ds {
			p.change(&ds[i], lsn)
		}
	}, p.deltaSet(ds))
}

// settle ends the jobs: what is on the members, and not overwritten meanwhile, leaves the overlay.
func (p *Pool) settle(jobs []*job, done bool) {
	for some := range slices.Chunk(jobs, lockStripes) {
		p.mu.Lock()
		for _, j := range some {
			if done {
				p.settleJob(j)
			}
		}
		p.unpinJobs(some)
		p.mu.Unlock()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stats.Rounds++
	p.giving.Store(false)
	p.wakeWaiters()
}

// unpinJobs gives the jobs' extents back. Called with mu held.
func (p *Pool) unpinJobs(jobs []*job) {
	for _, j := range jobs {
		if j.ds.key.lun != 0 {
			p.table.unpin(j.extent)
		}
	}
}

func (p *Pool) settleJob(j *job) {
	s := j.ds
	if s.stuck = j.skipped; s.stuck {
		p.rest(j)
		return
	}
	if j.full {
		p.stats.FullStripes++
	} else {
		p.stats.PartialStripes++
	}
	p.stats.Blocks += uint64(len(j.blocks))
	for _, c := range j.blocks {
		e := s.blocks[c.within]
		switch {
		case e == nil || e.lsn != c.lsn && s.key.lun != 0: // freed, or overwritten
		case s.key.lun == 0 && e.since != 0:
			p.refs.add(e.since, 1)
			p.refs.drop(e.lsn)
			e.lsn = e.since
		default:
			p.over.remove(s, c.within)
		}
	}
}

// Drain destages everything that was acknowledged before the call. It fails when blocks cannot be destaged (see
// GiveUp), or the pool stops.
func (p *Pool) Drain(ctx context.Context) error { return p.drain(ctx, needDrain, nil) }

// DrainWith is Drain that tells after each round how many bytes are left to destage, of the bytes at its beginning; what
// is written meanwhile counts too.
func (p *Pool) DrainWith(ctx context.Context, progress func(left, total int64)) error {
	return p.drain(ctx, needDrain, progress)
}

func (p *Pool) drain(ctx context.Context, why need, progress func(left, total int64)) error {
	p.mu.Lock()
	target, writes, total := p.maxLSN, p.inserts, p.over.entries
	p.mu.Unlock()
	for {
		p.mu.Lock()
		oldest, any := p.refs.first()
		done := !any || oldest > target && p.inserts != writes
		stuck, left := p.over.stuckStripes(), p.over.entries
		p.mu.Unlock()
		if progress != nil {
			progress(int64(left)*blockBytes, int64(max(left, total))*blockBytes)
		}
		if done {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("shelf: drain: %w", err)
		}
		worked, err := p.destageRound(ctx, why)
		if err != nil {
			return fmt.Errorf("shelf: drain: %w", err)
		}
		if !worked {
			if stuck > 0 {
				return fmt.Errorf("shelf: drain: blocks of %d stripes cannot be read and may come back with their members: %w", stuck, raid.ErrUnrecoverable)
			}
			time.Sleep(time.Millisecond) // a round of somebody else's took the rest
		}
	}
}

// destager destages in the background until the pool stops.
func (p *Pool) destager() {
	defer p.wg.Done()
	idle := p.opts.IdleAfter
	if idle < 0 {
		idle = time.Hour
	}
	tick := time.NewTicker(idle)
	defer tick.Stop()
	var seen uint64
	for {
		select {
		case <-p.ctx.Done():
			return
		case <-p.log.Failed(): // also when nobody writes: the reservation's holder must not go on reading as if all was well
			p.fail(fmt.Errorf("shelf: log: %w", p.log.Err()))
		case <-p.kick:
			p.trim()
			if !p.wanted() {
				break
			}
			for p.pressure() > stopAt {
				if worked, err := p.destageRound(p.ctx, needRoom); err != nil || !worked {
					break
				}
			}
		case <-tick.C:
			for p.opts.IdleAfter > 0 && p.isIdle(&seen) {
				if worked, err := p.destageRound(p.ctx, needDrain); err != nil || !worked {
					break
				}
			}
		}
	}
}

// wanted tells whether destage shall begin: it is time, or somebody waits for room.
func (p *Pool) wanted() bool {
	if p.pressure() >= startAt {
		return true
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.waiters) > 0
}

// isIdle tells whether nothing was written since it was asked last.
func (p *Pool) isIdle(seen *uint64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	idle := *seen == p.inserts
	*seen = p.inserts
	return idle
}
