package shelf

import (
	"bytes"
	"fmt"

	"github.com/ledge-storage/ledge/target"
)

// Persistent reservations of a LUN's initiators. What they are is the target engine's business; the pool keeps
// its bytes as it keeps LUN records: each change is one log record, durable in both NVRAMs when it is
// acknowledged (P1), replayed by whoever owns the pool next, and refused to an owner that was fenced. So an
// initiator that another fenced stays fenced through a takeover, a restart, and a power cut of the whole shelf.
//
// They are kept through a power cut whether or not the initiator asked for it (APTPL): the pool cannot tell
// the loss of the shelf's power from that of a controller's, and who fences must not lose it to the latter.

// maxReservationParts bounds the blocks of one LUN; a log with small records has fewer (limitParts). A registration takes
// some hundred bytes.
const maxReservationParts = 96

// reservationBlock is one block of a LUN's reservations; a LUN of 0 is a free block.
type reservationBlock struct {
	lun         uint32
	part, parts int
	data        []byte
}

// LoadReservations returns what SaveReservations stored last, or nothing. ErrCorrupt where parts are missing: who
// serves the LUN then may let an initiator write that was fenced.
func (l *LUN) LoadReservations() ([]byte, error) {
	p := l.p
	p.mu.Lock()
	defer p.mu.Unlock()
	var parts []*reservationBlock
	for i := range p.reservations {
		r := &p.reservations[i]
		if r.lun != l.id {
			continue
		}
		if parts == nil {
			parts = make([]*reservationBlock, r.parts)
		}
		if r.parts != len(parts) || parts[r.part] != nil {
			return nil, fmt.Errorf("shelf: reservations of LUN %d: %w: parts do not fit together", l.id, ErrCorrupt)
		}
		parts[r.part] = r
	}
	var state []byte
	for i, r := range parts {
		if r == nil {
			return nil, fmt.Errorf("shelf: reservations of LUN %d: %w: part %d of %d is missing", l.id, ErrCorrupt, i, len(parts))
		}
		state = append(state, r.data...)
	}
	return state, nil
}

// SaveReservations keeps state, durably. target.ErrNoSpace when it is too long, or the pool's blocks for
// reservations are used up; an owner that was fenced gets target.ErrUnavailable, also where nothing changed.
func (l *LUN) SaveReservations(state []byte) error {
	p := l.p
	if err := p.admin.take(p.ctx); err != nil {
		return p.alive()
	}
	defer p.admin.give()
	if _, err := l.live(); err != nil {
		return err
	}
	parts := (len(state) + reservationBytes - 1) / reservationBytes
	if parts > p.limitParts() {
		return fmt.Errorf("shelf: reservations of LUN %d: %d bytes: %w", l.id, len(state), target.ErrNoSpace)
	}
	use, spare, ok := p.placeReservations(l.id, parts)
	if !ok {
		return fmt.Errorf("shelf: reservations of LUN %d: %d blocks: the pool's %d are used: %w", l.id, parts, len(p.reservations), target.ErrNoSpace)
	}
	records := make(map[int]reservationBlock, len(use)+len(spare))
	var blocks []metaBlock
	for i, at := range use {
		r := reservationBlock{lun: l.id, part: i, parts: parts, data: bytes.Clone(state[:min(len(state), reservationBytes)])}
		state = state[len(r.data):]
		records[at] = r
		block := p.sb.reservationBlock() + uint32(at)
		blocks = append(blocks, metaBlock{block, encodeReservation(r, block)})
	}
	for _, at := range spare {
		records[at] = reservationBlock{}
		blocks = append(blocks, metaBlock{p.sb.reservationBlock() + uint32(at), zeroBlock})
	}
	if len(blocks) == 0 {
		return nil // nothing was, nothing is
	}
	err := p.logBlocks(p.ctx, blocks, func() {
		for at, r := range records {
			p.reservations[at] = r
		}
	})
	if err != nil {
		return fmt.Errorf("shelf: reservations of LUN %d: %w", l.id, err)
	}
	return nil
}

// limitParts is how many blocks one record of the log surely takes.
func (p *Pool) limitParts() int { return min(maxReservationParts, p.opts.PieceBlocks-overheadBlocks) }

// placeReservations picks the blocks for a LUN's parts: those that it has, then free ones; spare are those it
// has and needs no more. The admin semaphore is held: nobody else takes free ones.
func (p *Pool) placeReservations(lun uint32, parts int) (use, spare []int, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var free []int
	for i := range p.reservations {
		switch p.reservations[i].lun {
		case lun:
			use = append(use, i)
		case 0:
			free = append(free, i)
		}
	}
	if len(use) >= parts {
		return use[:parts], use[parts:], true
	}
	if len(use)+len(free) < parts {
		return nil, nil, false
	}
	return append(use, free[:parts-len(use)]...), nil, true
}

// strayReservations frees the blocks of LUNs that are not there: none are expected. Called by replay.
func (p *Pool) strayReservations() {
	for i := range p.reservations {
		if r := &p.reservations[i]; r.lun != 0 && p.luns[r.lun] == nil {
			p.opts.Logger.Warn("reservations of a LUN that does not exist are dropped", "lun", r.lun)
			*r = reservationBlock{}
		}
	}
}
