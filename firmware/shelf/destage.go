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
//	1. pick      whole stripes first, then those with the oldest blocks; when the log is nearly full, the
//	             oldest only, so that its tail moves.
//	2. capture   the blocks of each as they are now. The extent is pinned.
//	3. write     W  a stripe that is whole in the overlay, or was never written (the rest is zeros):
//	                array.WriteStripe, which reads nothing.
//	             U  any other: PrepareUpdate (reads), log.Append of the redo image, parity included, Apply (P3).
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
	skipped bool // its old blocks cannot be read
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
	hurry := why == needRoom && p.pressure() >= hurryAt
	updates := p.log.Stats().UpdateBytes / 4 / blockBytes
	p.mu.Lock()
	if p.err != nil {
		p.mu.Unlock()
		return false, p.alive()
	}
	jobs := p.pick(hurry, int(updates))
	p.mu.Unlock()
	if len(jobs) == 0 {
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

// pick chooses and captures the stripes of a round: BatchBlocks blocks, and redo images of no more than updates
// blocks (a quarter of their lane: the lane is empty when a round starts, and a record may meet its end).
// Called with mu held.
func (p *Pool) pick(hurry bool, updates int) []*job {
	var jobs []*job
	room := p.opts.BatchBlocks
	chosen := map[*dirtyStripe]bool{}
	add := func(s *dirtyStripe) bool {
		j := p.capture(s, updates)
		if j == nil {
			return false
		}
		jobs, chosen[s] = append(jobs, j), true
		if room -= len(j.blocks); j.full {
			room -= p.sb.stripeBlocks() - len(j.blocks)
		} else {
			updates -= p.updateBlocks(len(j.blocks))
		}
		return true
	}
	for !hurry && room > 0 && len(jobs) < roundStripes {
		s := p.over.nextFull()
		if s == nil {
			break
		}
		add(s)
	}
	var back []*dirtyStripe
	for room > 0 && len(jobs) < roundStripes {
		s := p.over.nextOldest()
		if s == nil {
			break
		}
		back = append(back, s)
		if !chosen[s] && (!s.stuck || s.whole()) && !add(s) {
			break
		}
	}
	for _, s := range back {
		heap.Push(&p.over.oldest, s)
	}
	return jobs
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
	j := &job{ds: s, stripe: uint64(s.key.ext)}
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
			c.data = p.render(uint32(int(j.stripe)*p.sb.stripeBlocks() + w))
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
	if errors.Is(err, raid.ErrUnrecoverable) {
		// More members lie or are gone than parity knows how to mend. The blocks stay in the overlay, and in the
		// log; a full overwrite, or a member that returns, frees them.
		j.skipped = true
		return 0, nil
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
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, j := range jobs {
		if done {
			p.settleJob(j)
		}
		if j.ds.key.lun != 0 {
			p.table.unpin(j.extent)
		}
	}
	p.stats.Rounds++
	p.wakeWaiters()
}

func (p *Pool) settleJob(j *job) {
	s := j.ds
	if s.stuck = j.skipped; s.stuck {
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

// Drain destages everything that was acknowledged before the call. It fails when blocks cannot be destaged, or
// the pool stops.
func (p *Pool) Drain(ctx context.Context) error {
	p.mu.Lock()
	target, writes := p.maxLSN, p.inserts
	p.mu.Unlock()
	for {
		p.mu.Lock()
		oldest, any := p.refs.first()
		done := !any || oldest > target && p.inserts != writes
		stuck := p.over.stuckStripes()
		p.mu.Unlock()
		if done {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("shelf: drain: %w", err)
		}
		worked, err := p.destageRound(ctx, needDrain)
		if err != nil {
			return fmt.Errorf("shelf: drain: %w", err)
		}
		if !worked {
			if stuck > 0 {
				return fmt.Errorf("shelf: drain: %d stripes: %w", stuck, raid.ErrUnrecoverable)
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

// isIdle tells whether nothing was written since it was asked last.
func (p *Pool) isIdle(seen *uint64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	idle := *seen == p.inserts
	*seen = p.inserts
	return idle
}
