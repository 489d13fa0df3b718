package shelf

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/target"
)

// A stripe that lost more than parity knows how to mend cannot take path U: new parity needs the old blocks. It must
// not hold the log's tail for that, nor a takeover, which destages all that it replayed. So when destage meets
// one, it gives up what is gone (raid.Array.PrepareLoss): the stripe is written as far as it is known, and the rest
// marked as lost: MEDIUM ERROR to whoever reads it, until it is written again.
//
//	what can come back is waited for            raid says which it is (raid/lost.go). The stripe is "stuck" meanwhile:
//	                                            its blocks stay in the overlay and the log; it is tried again every
//	                                            retryRounds looks for work
//	strips on members recorded as failed        are waited for too (the member may be re-added), but only while
//	                                            the log has room: from hurryAt on, in a takeover, and when an operator
//	                                            says so (GiveUp) they count as gone. A stop or a handover waits
//	metadata                                    is whole in memory: every block is given with the update, so that
//	                                            nothing is lost of it while the pool is open. At start it is not:
//	                                            ErrMetadataLost
//
// The update is logged before it is applied, as any other. One a round: its image may be as large as all others
// of the round together.

// retryRounds is how many picks a stuck stripe rests.
const retryRounds = 16

// ErrMetadataLost: blocks of the pool's own records cannot be read from the members.
var ErrMetadataLost = errors.New("shelf: metadata beyond parity")

// GiveUp destages everything, like Drain, and gives up for it what strips on failed members would be needed for. It is an
// operator's order, when these members will not come back. It returns how many blocks were lost; Counters.StuckStripes
// says before whether there is anything to give up.
func (p *Pool) GiveUp(ctx context.Context) (blocks uint64, err error) {
	before := p.Status().Counters.LostBlocks
	err = p.drain(ctx, needAll, nil)
	return p.Status().Counters.LostBlocks - before, err
}

// ripe tells whether a stripe is worth a try. Called with mu held.
func (p *Pool) ripe(s *dirtyStripe, force bool) bool {
	return !s.stuck || s.whole() || s.retryAt <= p.picks || force && !s.forced
}

// rest makes a stripe stuck whose job was skipped. Called with mu held.
func (p *Pool) rest(j *job) {
	s := j.ds
	s.stuck, s.forced = true, j.force
	s.retryAt = p.picks + retryRounds
	if j.postponed {
		s.forced, s.retryAt = false, 0
	}
}

// giveUp prepares the update of a stripe that PrepareUpdate found beyond parity; nil when it has to rest.
func (p *Pool) giveUp(j *job, writes []raid.BlockWrite) (*raid.Update, error) {
	if !p.giving.CompareAndSwap(false, true) { // settle ends it
		j.postponed = true
		return nil, nil
	}
	if j.ds.key.lun == 0 {
		writes = p.renderStripe(j.ds.key.ext)
	}
	u, err := p.array.PrepareLoss(p.ctx, j.stripe, j.gen, writes, raid.LossSpec{Failed: j.force, MaxBlocks: j.most})
	switch {
	case err == nil:
		return u, nil
	case errors.Is(err, raid.ErrNotLost), errors.Is(err, raid.ErrRange), errors.Is(err, raid.ErrUnrecoverable):
		p.opts.Logger.Warn("a stripe waits: blocks of it cannot be read", "stripe", j.stripe, "lun", j.ds.key.lun, "err", err)
		return nil, nil
	}
	return nil, err
}

// renderStripe makes the present content of a stripe of the metadata. All of it is logged; what changes after this stays
// in the overlay.
func (p *Pool) renderStripe(stripe uint32) []raid.BlockWrite {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := p.sb.stripeBlocks()
	writes := make([]raid.BlockWrite, n)
	for w := range writes {
		writes[w] = raid.BlockWrite{Block: w, Data: p.render(stripe*uint32(n) + uint32(w))}
	}
	return writes
}

// gaveUp tells the operator what is gone, once the update is logged.
func (p *Pool) gaveUp(j *job, blocks []int) {
	if j.ds.key.lun == 0 {
		blocks = nil
	}
	p.mu.Lock()
	blocks = slices.DeleteFunc(slices.Sorted(slices.Values(blocks)), func(b int) bool { return j.ds.blocks[b] != nil }) // comes yet
	p.mu.Unlock()
	usable := p.sb.usable(j.ds.index)
	from := uint64(j.ds.key.ext)*uint64(p.sb.ExtentBlocks) + uint64(j.ds.index*p.sb.stripeBlocks())
	lost := 0
	for i := 0; i < len(blocks); {
		n := 1
		for i+n < len(blocks) && blocks[i+n] == blocks[i]+n {
			n++
		}
		if end := min(blocks[i]+n, usable); blocks[i] < end {
			lost += end - blocks[i]
			p.opts.Logger.Error("DATA LOST: more members failed or rotted than parity stands for; the blocks read as errors until they are written",
				"lun", j.ds.key.lun, "offset_bytes", (from+uint64(blocks[i]))*blockBytes, "bytes", (end-blocks[i])*blockBytes, "stripe", j.stripe)
		}
		i += n
	}
	p.mu.Lock()
	p.stats.LostBlocks += uint64(lost)
	p.stats.GivenUp++
	p.mu.Unlock()
}

// lostAt makes of a block that the array cannot give the answer that initiators understand: its address. first is the
// LUN's block at which the run begins.
func (l *LUN) lostAt(err error, first uint64, r *run) error {
	var be *raid.BlockError
	if !errors.As(err, &be) || be.Block < r.block || be.Block >= r.block+r.blocks {
		return fmt.Errorf("%w: %w", target.ErrMediumRead, err)
	}
	per := uint64(blockBytes / l.record().BlockBytes)
	return &target.MediumError{LBA: (first + uint64(be.Block-r.block)) * per, Err: err}
}

// metadataLost says which records cannot be read.
func (p *Pool) metadataLost(first, n uint32, err error) error {
	sb := &p.sb
	last := first + n - 1
	var what string
	for _, part := range []struct {
		name     string
		from, to uint32
	}{{"superblock", 0, 1}, {"LUN records", 1, sb.hostBlock()}, {"host records", sb.hostBlock(), sb.reservationBlock()},
		{"reservations", sb.reservationBlock(), sb.tableBlock()}, {"extent table", sb.tableBlock(), math.MaxUint32}} {
		if first < part.to && last >= part.from {
			what += part.name + ", "
		}
	}
	if what == "" {
		what = "extent table of a growth, "
	}
	return fmt.Errorf("%w: blocks %d to %d (%s) cannot be read; nothing was given up. If members are missing, bring them back: %w",
		ErrMetadataLost, first, last, what[:len(what)-2], err)
}

// maxLossBlocks bounds the image of a stripe that is given up: a quarter of the lane, as a round's others.
func (p *Pool) maxLossBlocks() int {
	return min(int(p.log.Stats().UpdateBytes/4/blockBytes), p.log.MaxUpdateBlocks())
}
