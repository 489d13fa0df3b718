package nvram

import (
	"errors"
	"fmt"
)

// The standby's mirror. Its bytes are the owner's, at the same offsets; only the superblock is its own, and
// says what the mirror itself can know:
//
//   - log, epoch and run: set by Begin, on both copies, before anything of the session is written;
//   - incomplete: set by Begin when its content is void, and by Trim when records that it never got were
//     trimmed; cleared by Complete, when the owner says that all below an LSN was sent, and it was.
//
// A mirror that is not incomplete is a prefix of the owner's log that reaches the tails. Whether the prefix is
// all of it, it cannot know: while the link was down, the owner may have gone on alone. So who takes over asks
// both: is solo *not* recorded on the members at this epoch, *and* is this mirror complete, of the label's
// log and epoch? The owner records solo before it acknowledges anything that the mirror lacks, and takes it
// back only after Complete (ack.go). Neither alone suffices: a standby that was off sees a complete mirror, and a
// member's label cannot tell that the standby's NVRAM came back empty.
//
// Acked here means "all below was durable in this mirror", so that damage shows as it does in the log.

// ioLock is a mutex that is held across I/O: a channel, because who waits for one lets a simulation's virtual time go on.
type ioLock chan struct{}

func (l ioLock) Lock()   { l <- struct{}{} }
func (l ioLock) Unlock() { <-l }

// MirrorState is what a mirror knows of itself.
type MirrorState struct {
	ID          ID
	Epoch       uint64
	Run, RunLSN uint64
	Bytes       [2]uint64 // of the lanes
	// Next: all records below, from the tails on, are here durably.
	Next uint64
	// Complete: nothing that the owner acknowledged is missing, unless it went solo.
	Complete bool
}

// Mirror is the area that holds the partner's log. One session at a time calls Begin, Write, Trim and
// Complete, from one goroutine; the rest may be called from any.
type Mirror struct {
	region Region
	area   Area

	mu     ioLock
	sb     super
	head   [lanes]Position
	next   uint64
	used   bool  // the area holds a mirror
	damage error // why what was there does not count
	of     Identity
	buf    []byte
}

// OpenMirror reads the area; it writes nothing. An area of zeros is a mirror without content, and so is one whose
// content is damaged (Damage says how); a resync fills both. ErrForeign: the area holds something else, or
// the own log of a controller; FormatMirror overrides that.
func OpenMirror(r Region, a Area) (*Mirror, error) {
	m := &Mirror{region: r, area: a, mu: make(ioLock, 1), buf: AlignedBlocks(1)}
	s, err := scan(r, a)
	switch {
	case errors.Is(err, ErrEmpty):
		return m, nil
	case errors.Is(err, ErrCorrupt):
		m.damage = err
		if sb, err := readSuper(r, a); err == nil && sb.mirror {
			m.sb, m.used = sb, true // its epoch still counts
		}
		return m, nil
	case err != nil:
		return nil, fmt.Errorf("nvram: open mirror: %w", err)
	case !s.sb.mirror:
		return nil, fmt.Errorf("nvram: open mirror: area holds a log of its own, %s: %w", s.sb.id, ErrForeign)
	}
	m.sb, m.head, m.next, m.used = s.sb, s.head, s.next, true
	return m, nil
}

// FormatMirror empties the area, whatever it holds.
func FormatMirror(r Region, a Area) error {
	if a.Off < 0 || a.Size < minAreaBytes || a.Off+a.Size > r.Size() {
		return fmt.Errorf("nvram: format mirror: area of %d bytes at %d in a region of %d: %w", a.Size, a.Off, r.Size(), ErrInvalid)
	}
	if _, err := r.WriteAt(AlignedBlocks(superBlocks), a.Off); err != nil {
		return fmt.Errorf("nvram: format mirror: %w", err)
	}
	return nil
}

// Identify has sessions record whose region the mirror is in.
func (m *Mirror) Identify(id Identity) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.of = id
}

// State is what the mirror knows of itself.
func (m *Mirror) State() MirrorState {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state()
}

func (m *Mirror) state() MirrorState {
	if !m.used {
		return MirrorState{}
	}
	return MirrorState{
		ID: m.sb.id, Epoch: m.sb.epoch, Run: m.sb.run, RunLSN: m.sb.runLSN, Bytes: m.sb.bytes,
		Next: m.next, Complete: !m.sb.incomplt && m.damage == nil,
	}
}

// Complete tells that the mirror misses nothing that the owner acknowledged at epoch in log id, unless the owner
// went solo: that the caller reads from the members.
func (m *Mirror) Complete(id ID, epoch uint64) bool {
	s := m.State()
	return s.Complete && s.ID == id && s.Epoch == epoch
}

// Damage is nil, or why the content that was found does not count.
func (m *Mirror) Damage() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.damage
}

// Replay gives every set of the mirror in LSN order, as Log.Replay does, read anew from the region. ErrStale: the
// mirror is not complete. No session may be under way.
func (m *Mirror) Replay(fn func(lsn uint64, s Set) error) error {
	if s := m.State(); !s.Complete {
		return fmt.Errorf("nvram: replay mirror of log %s: %w", s.ID, errors.Join(ErrStale, m.Damage()))
	}
	s, err := scan(m.region, m.area)
	if err != nil {
		return fmt.Errorf("nvram: replay mirror: %w", err)
	}
	if next := m.State().Next; s.next != next {
		return fmt.Errorf("nvram: replay mirror: it ends at lsn %d, and reached %d: %w", s.next, next, ErrCorrupt)
	}
	return s.replay(m.region, m.area, fn)
}

// Begin starts a session as the owner says. ErrStale: its epoch is older than one seen.
func (m *Mirror) Begin(st Start) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	sb := super{
		seq: m.sb.seq, id: st.ID, epoch: st.Epoch, run: st.Run, runLSN: st.RunLSN, bytes: st.Bytes, tail: st.Tail,
		acked: st.Resume, mirror: true, incomplt: st.Full, of: m.sb.of, regionBytes: m.sb.regionBytes,
	}
	if m.of != (Identity{}) {
		sb.of, sb.regionBytes = m.of, uint64(m.region.Size())
	}
	if m.used && st.Epoch < m.sb.epoch {
		return fmt.Errorf("nvram: session at epoch %d, epoch %d was seen: %w", st.Epoch, m.sb.epoch, ErrStale)
	}
	if need := superBlocks*BlockBytes + st.Bytes[0] + st.Bytes[1]; need > uint64(m.area.Size) {
		return fmt.Errorf("nvram: the owner's log takes %d bytes, this mirror's area has %d: %w", need, m.area.Size, ErrTooLarge)
	}
	if err := sb.check(m.area.Size); err != nil {
		return fmt.Errorf("nvram: session start: %w", err)
	}
	for i := range lanes {
		if h := st.Head[i]; h.Off%BlockBytes != 0 || h.Off < sb.start(i) || h.Off >= sb.end(i) || h.Seq < st.Tail[i].Seq {
			return fmt.Errorf("nvram: session start: lane %d goes on at %d: %w", i, h.Off, ErrInvalid)
		}
		sb.ackedSeq[i] = st.Head[i].Seq
	}
	if !st.Full {
		if err := m.continues(&sb, st); err != nil {
			return err
		}
	}
	if err := m.write(&sb, writeSuperTwice); err != nil {
		return err
	}
	m.used, m.damage = true, nil
	m.head, m.next = st.Head, st.Resume
	return m.wipe()
}

// wipe makes records of earlier runs no records that lie where the session goes on, and behind: the owner does not have them, or will send them again.
// They are one behind the other, because frames come in order.
func (m *Mirror) wipe() error {
	w := newWindow(m.region, m.area, m.sb.bytes[0]+m.sb.bytes[1])
	defer w.close()
	zeros := AlignedBlocks(1)
	for i := range lanes {
		p, used := m.head[i], uint64(0)
		free := m.free(&m.sb, p, i)
		for {
			b, err := w.read(p.Off, BlockBytes)
			if err != nil {
				return err
			}
			h, err := decodeHeader(b)
			n := uint64(h.blocks) * BlockBytes
			if err != nil || h.id != m.sb.id || int(h.lane) != i || h.seq != p.Seq || n == 0 || used+n > free || p.Off+n > m.sb.end(i) {
				break
			}
			if h.run != m.sb.run {
				if err := m.area.wipe(m.region, p.Off, zeros); err != nil {
					return err
				}
			}
			used += n
			if p.Seq, p.Off = p.Seq+1, p.Off+n; p.Off == m.sb.end(i) {
				p.Off = m.sb.start(i)
			}
		}
	}
	return nil
}

// continues: the session may go on with what is here.
func (m *Mirror) continues(sb *super, st Start) error {
	s := m.state()
	switch {
	case !s.Complete || s.ID != st.ID || s.Bytes != st.Bytes || st.Resume > s.Next || st.Resume < sb.maxTail():
	case st.Run != s.Run && (st.Run != s.Run+1 || st.Resume > st.RunLSN):
	case st.Run == s.Run && st.RunLSN != s.RunLSN:
	case st.Resume == s.Next && (st.Head[0].Off != m.head[0].Off || st.Head[0].Seq != m.head[0].Seq || st.Head[1].Off != m.head[1].Off || st.Head[1].Seq != m.head[1].Seq):
	default:
		return nil
	}
	return fmt.Errorf("nvram: session resumes run %d at lsn %d, mirror is of run %d and ends at %d: %w", st.Run, st.Resume, s.Run, s.Next, ErrInvalid)
}

func (m *Mirror) write(sb *super, how func(Region, Area, *super, []byte) error) error {
	if err := how(m.region, m.area, sb, m.buf); err != nil {
		return fmt.Errorf("nvram: mirror: %w", err)
	}
	m.sb = *sb
	return nil
}

// Write makes one frame durable and returns the LSN below which all are. ErrCorrupt and ErrInvalid: the frame is
// not the next record of the session's log.
func (m *Mirror) Write(lsn, off uint64, frame []byte) (uint64, error) {
	m.mu.Lock()
	sb, head, next := m.sb, m.head, m.next
	m.mu.Unlock()
	h, err := decodeRecord(frame)
	if err != nil {
		return 0, fmt.Errorf("nvram: mirror lsn %d: %w", lsn, err)
	}
	n := uint64(h.blocks) * BlockBytes
	p := head[h.lane]
	switch {
	case h.lsn != lsn || h.id != sb.id || !sb.rightRun(&h) || h.epoch != sb.epoch && h.lsn >= sb.runLSN:
		err = fmt.Errorf("record lsn %d of log %s, run %d, epoch %d", h.lsn, h.id, h.run, h.epoch)
	case off != p.Off || h.seq != p.Seq || off+n > sb.end(int(h.lane)):
		err = fmt.Errorf("record %d of lane %d at %d, %d at %d expected", h.seq, h.lane, off, p.Seq, p.Off)
	case n > m.free(&sb, p, int(h.lane)):
		err = fmt.Errorf("record of %d bytes overwrites what was not trimmed", n)
	case lsn < next || lsn > next && lsn > sb.maxTail():
		err = fmt.Errorf("lsn %d expected", next)
	}
	if err != nil {
		return 0, fmt.Errorf("nvram: mirror lsn %d: %w: %w", lsn, err, ErrInvalid)
	}
	if _, err := m.region.WriteAt(frame, m.area.Off+superBlocks*BlockBytes+int64(off)); err != nil {
		return 0, fmt.Errorf("nvram: mirror lsn %d: %w", lsn, err)
	}
	p = Position{LSN: lsn + 1, Off: off + n, Seq: p.Seq + 1}
	if p.Off == sb.end(int(h.lane)) {
		p.Off = sb.start(int(h.lane))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.head[h.lane] = p
	m.next = lsn + 1
	return m.next, nil
}

// free bytes of a lane whose head is at p.
func (m *Mirror) free(sb *super, p Position, lane int) uint64 {
	t := sb.tail[lane]
	switch {
	case p.Seq == t.Seq:
		return sb.bytes[lane]
	case p.Off > t.Off:
		return sb.bytes[lane] - (p.Off - t.Off)
	}
	return t.Off - p.Off
}

// Trim moves the tails. Tails above what is here make the mirror incomplete.
func (m *Mirror) Trim(tail [2]Position) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	sb := m.sb
	for i := range lanes {
		if tail[i].LSN < sb.tail[i].LSN || tail[i].Seq < sb.tail[i].Seq {
			return fmt.Errorf("nvram: mirror: tail of lane %d goes back to lsn %d: %w", i, tail[i].LSN, ErrInvalid)
		}
		if tail[i].Seq > m.head[i].Seq { // the records up to there were trimmed before they came
			m.head[i] = tail[i]
		}
		sb.ackedSeq[i] = m.head[i].Seq
	}
	sb.tail = tail
	sb.acked = max(sb.acked, m.next)
	if sb.maxTail() > m.next {
		sb.incomplt = true
	}
	if err := sb.check(m.area.Size); err != nil {
		return err
	}
	return m.write(&sb, writeSuper)
}

// MarkComplete notes durably that the owner has sent all below lsn. ErrInvalid: it has not.
func (m *Mirror) MarkComplete(lsn uint64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if next := max(m.next, m.sb.maxTail()); next < lsn {
		return fmt.Errorf("nvram: mirror complete below lsn %d, but it ends at %d: %w", lsn, next, ErrInvalid)
	}
	m.next = max(m.next, m.sb.maxTail())
	if !m.sb.incomplt {
		return nil
	}
	sb := m.sb
	sb.incomplt = false
	sb.acked = m.next
	for i := range lanes {
		sb.ackedSeq[i] = m.head[i].Seq
	}
	return m.write(&sb, writeSuperTwice)
}
