package nvram

import (
	"fmt"
)

// FormatOptions describes a new log.
type FormatOptions struct {
	ID    ID     // required: NewID()
	Epoch uint64 // the owner's epoch
	// FirstLSN of the new log; 0 means 1. A new owner continues above the log that it took over.
	FirstLSN uint64
	// UpdateBytes of the area are the lane of KindUpdate; 0 means a quarter.
	UpdateBytes int64
	// Identity is recorded, if it is not zero.
	Identity Identity
}

// Info is what an area says about its log.
type Info struct {
	ID    ID
	Epoch uint64
	// Run counts the openings of the log.
	Run uint64
	// Tail is the first LSN that may still be needed; all below Acked were acknowledged.
	Tail, Acked uint64
	// Mirror: the area mirrors a partner's log. Complete: as far as the mirror itself can know.
	Mirror, Complete bool
}

// Format makes an empty log in the area; whatever was there is gone. Durable when it returns.
func Format(r Region, a Area, o FormatOptions) error {
	if o.ID == (ID{}) {
		return fmt.Errorf("nvram: format: no log ID: %w", ErrInvalid)
	}
	room := a.Size - superBlocks*BlockBytes
	update := o.UpdateBytes / BlockBytes * BlockBytes
	if update == 0 {
		update = room / 4 / BlockBytes * BlockBytes
	}
	if a.Off < 0 || a.Off%BlockBytes != 0 || a.Size%BlockBytes != 0 || a.Off+a.Size > r.Size() ||
		update < minLaneBlocks*BlockBytes || room-update < minLaneBlocks*BlockBytes {
		return fmt.Errorf("nvram: format: area of %d bytes at %d in a region of %d: %w", a.Size, a.Off, r.Size(), ErrInvalid)
	}
	lsn := max(o.FirstLSN, 1)
	sb := super{id: o.ID, epoch: o.Epoch, runLSN: lsn, acked: lsn, bytes: [lanes]uint64{uint64(room - update), uint64(update)}}
	for i := range lanes {
		sb.tail[i] = Position{LSN: lsn, Off: sb.start(i), Seq: 1}
		sb.ackedSeq[i] = 1
	}
	if !o.Identity.valid() {
		return fmt.Errorf("nvram: format: identity %s: %w", o.Identity, ErrInvalid)
	}
	sb.of, sb.regionBytes = o.Identity, uint64(r.Size())
	return replaceSuper(r, a, &sb)
}

// replaceSuper starts another log in the area. The sequence number goes above whatever is there, so that each
// moment has one true copy; unreadable copies are simply overwritten.
func replaceSuper(r Region, a Area, sb *super) error {
	old, err := readSuper(r, a)
	if err == nil {
		sb.seq = old.seq
	}
	return writeSuperTwice(r, a, sb, AlignedBlocks(1))
}

// Inspect reads an area's superblock and writes nothing. ErrEmpty: the area is all zeros there; ErrForeign: it
// carries something else; ErrCorrupt: no copy is whole.
func Inspect(r Region, a Area) (Info, error) {
	sb, err := readSuper(r, a)
	if err != nil {
		return Info{}, err
	}
	return Info{
		ID: sb.id, Epoch: sb.epoch, Run: sb.run, Acked: sb.acked,
		Tail:   min(sb.tail[laneData].LSN, sb.tail[laneUpdate].LSN),
		Mirror: sb.mirror, Complete: sb.mirror && !sb.incomplt,
	}, nil
}
