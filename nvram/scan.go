package nvram

import (
	"cmp"
	"fmt"
	"slices"
)

// Scan finds the records that an area holds: first each lane from its tail for as long as the lane's
// sequence is unbroken; then, both together, for as long as no LSN is missing from the later tail on.
// What lies above a gap was never acknowledged, unless a superblock or a record says that it was: then
// the gap is damage, and the area is corrupt.

// scanned is the content of an area.
type scanned struct {
	sb   super
	live [lanes][]entry
	head [lanes]Position
	next uint64 // first LSN that is not there
	// stale is where whole or torn records lie that are not below next, of any run: no part of the log, see Area.wipe.
	stale []uint64
}

// window reads an area's ring ahead, more with each read: most rings hold little, and a scan of one jumps at first.
type window struct {
	r     Region
	base  int64 // of the ring, in the region
	size  uint64
	buf   *Buffer
	ahead uint64 // bytes of the next read ahead
	off   uint64
	n     int
	big   []byte
}

const (
	windowFirst  = 8 // blocks
	windowBlocks = 128
)

func newWindow(r Region, a Area, size uint64) *window {
	return &window{r: r, base: a.Off + superBlocks*BlockBytes, size: size, buf: GetBuffer(windowBlocks), ahead: windowFirst * BlockBytes}
}

// close frees the buffer; nothing that read returned is valid any more.
func (w *window) close() { w.buf.Put() }

// read returns n bytes at ring offset off, valid until the next read.
func (w *window) read(off, n uint64) ([]byte, error) {
	if off+n > w.size {
		return nil, fmt.Errorf("%w: %d bytes at %d of a ring of %d", ErrCorrupt, n, off, w.size)
	}
	if n > windowBlocks*BlockBytes {
		if n > uint64(len(w.big)) {
			w.big = AlignedBlocks(int(n / BlockBytes))
		}
		return w.big[:n], w.fetch(w.big[:n], off)
	}
	if off < w.off || off+n > w.off+uint64(w.n) {
		m := min(max(w.ahead, n), w.size-off)
		w.ahead = min(2*w.ahead, windowBlocks*BlockBytes)
		w.n = 0
		if err := w.fetch(w.buf.b[:m], off); err != nil {
			return nil, err
		}
		w.off, w.n = off, int(m)
	}
	return w.buf.b[off-w.off:][:n:n], nil
}

func (w *window) fetch(b []byte, off uint64) error {
	if _, err := w.r.ReadAt(b, w.base+int64(off)); err != nil {
		return fmt.Errorf("nvram: read ring at %d: %w", off, err)
	}
	return nil
}

// scan reads the area. A mirror that is incomplete holds nothing that counts.
func scan(r Region, a Area) (*scanned, error) {
	sb, err := readSuper(r, a)
	if err != nil {
		return nil, err
	}
	s := &scanned{sb: sb}
	if sb.mirror && sb.incomplt {
		s.head, s.next = sb.tail, sb.maxTail()
		return s, nil
	}
	w := newWindow(r, a, sb.bytes[0]+sb.bytes[1])
	defer w.close()
	for i := range lanes {
		if err := s.scanLane(w, i); err != nil {
			return nil, err
		}
		if s.head[i].Seq < sb.ackedSeq[i] {
			return nil, fmt.Errorf("%w: lane %d ends at record %d, but all below %d were acknowledged", ErrCorrupt, i, s.head[i].Seq, sb.ackedSeq[i])
		}
	}
	s.cut()
	if s.next < sb.acked {
		return nil, fmt.Errorf("%w: log ends at lsn %d, but all below %d were acknowledged", ErrCorrupt, s.next, sb.acked)
	}
	return s, s.sweep(w)
}

func (s *scanned) scanLane(w *window, lane int) error {
	p, used := s.sb.tail[lane], uint64(0)
	for {
		h, err := s.recordAt(w, lane, p)
		if err != nil {
			return err
		}
		n := uint64(h.blocks) * BlockBytes
		if h.blocks == 0 || used+n > s.sb.bytes[lane] {
			break
		}
		s.live[lane] = append(s.live[lane], entry{lsn: h.lsn, off: p.Off, seq: p.Seq, blocks: h.blocks, frameBlocks: h.frameBlocks(), run: h.run})
		used += n
		p = Position{LSN: h.lsn + 1, Off: p.Off + n, Seq: p.Seq + 1}
		if p.Off == s.sb.end(lane) {
			p.Off = s.sb.start(lane)
		}
	}
	s.head[lane] = p
	return nil
}

// recordAt returns the header of the record that continues the lane at p, or no blocks if there is none.
func (s *scanned) recordAt(w *window, lane int, p Position) (header, error) {
	b, err := w.read(p.Off, BlockBytes)
	if err != nil {
		return header{}, err
	}
	h, err := decodeHeader(b)
	switch {
	case err != nil || h.id != s.sb.id || int(h.lane) != lane || h.seq != p.Seq || h.lsn < p.LSN:
		return header{}, nil
	case p.Off+uint64(h.blocks)*BlockBytes > s.sb.end(lane):
		return header{}, nil
	case !s.sb.rightRun(&h):
		if h.run > s.sb.run || h.epoch > s.sb.epoch {
			return header{}, fmt.Errorf("%w: record lsn %d of run %d, epoch %d; the superblock is older: run %d, epoch %d", ErrCorrupt, h.lsn, h.run, h.epoch, s.sb.run, s.sb.epoch)
		}
		return header{}, nil
	}
	if b, err = w.read(p.Off, uint64(h.frameBlocks())*BlockBytes); err != nil {
		return header{}, err
	}
	if h, err = decodeRecord(b); err != nil {
		return header{}, nil
	}
	return h, nil
}

// rightRun: the record is of the run that owns its LSN.
func (s *super) rightRun(h *header) bool {
	return h.epoch <= s.epoch && h.run <= s.run && (h.lsn >= s.runLSN) == (h.run == s.run)
}

// cut drops what lies above the first missing LSN, from the later tail on. Runs do not go back in a log: where two records claim an LSN, or one is of
// an earlier run than the one before it, the earlier run's is a stale one (areas from before 2026-11-28 may have such; see Area.wipe).
func (s *scanned) cut() {
	var at [lanes]int
	base := s.sb.maxTail()
	for i := range lanes {
		for at[i] < len(s.live[i]) && s.live[i][at[i]].lsn < base {
			at[i]++
		}
	}
	next, run := base, uint64(0)
	for {
		lane := -1
		for i := range lanes {
			if at[i] < len(s.live[i]) && s.live[i][at[i]].lsn == next && s.live[i][at[i]].run >= run {
				lane, run = i, s.live[i][at[i]].run
			}
		}
		if lane < 0 {
			break
		}
		at[lane]++
		next++
	}
	for i := range lanes {
		if at[i] < len(s.live[i]) {
			e := s.live[i][at[i]]
			s.head[i] = Position{LSN: next, Off: e.off, Seq: e.seq}
			s.live[i] = s.live[i][:at[i]]
		}
	}
	s.next = next
}

// sweep looks everywhere for a whole record above the end that says that the end was acknowledged, and notes all others that are there.
func (s *scanned) sweep(w *window) error {
	live := slices.Concat(s.live[:]...) // a host may have written what looks like a record
	slices.SortFunc(live, func(a, b entry) int { return cmp.Compare(a.off, b.off) })
	for off := uint64(0); off < w.size; off += BlockBytes {
		for len(live) > 0 && live[0].off+uint64(live[0].frameBlocks)*BlockBytes <= off {
			live = live[1:]
		}
		b, err := w.read(off, BlockBytes)
		if err != nil {
			return err
		}
		if string(b[:8]) != recordMagic {
			continue
		}
		h, err := decodeHeader(b)
		if err == nil && h.id == s.sb.id && h.lsn >= s.next && (len(live) == 0 || off < live[0].off) {
			s.stale = append(s.stale, off)
		}
		if err != nil || h.id != s.sb.id || h.acked <= s.next || !s.sb.rightRun(&h) || off+uint64(h.frameBlocks())*BlockBytes > w.size {
			continue
		}
		if b, err = w.read(off, uint64(h.frameBlocks())*BlockBytes); err != nil {
			return err
		}
		if _, err := decodeRecord(b); err == nil {
			return fmt.Errorf("%w: log ends at lsn %d, but lsn %d says that all below %d were acknowledged", ErrCorrupt, s.next, h.lsn, h.acked)
		}
	}
	return nil
}

// replay gives every set of the scanned area in LSN order.
func (s *scanned) replay(r Region, a Area, fn func(lsn uint64, set Set) error) error {
	w := newWindow(r, a, s.sb.bytes[0]+s.sb.bytes[1])
	defer w.close()
	var at [lanes]int
	for {
		lane := -1
		for i := range lanes {
			if at[i] < len(s.live[i]) && (lane < 0 || s.live[i][at[i]].lsn < s.live[lane][at[lane]].lsn) {
				lane = i
			}
		}
		if lane < 0 {
			return nil
		}
		e := s.live[lane][at[lane]]
		at[lane]++
		b, err := w.read(e.off, uint64(e.frameBlocks)*BlockBytes)
		if err != nil {
			return err
		}
		h, err := decodeRecord(b)
		if err == nil && (h.lsn != e.lsn || h.id != s.sb.id) {
			err = fmt.Errorf("%w: lsn %d of log %s found", ErrCorrupt, h.lsn, h.id)
		}
		if err != nil {
			return fmt.Errorf("nvram: replay lsn %d: %w", e.lsn, err)
		}
		if err := h.walk(b, func(set Set) error { return fn(e.lsn, set) }); err != nil {
			return fmt.Errorf("nvram: replay lsn %d: %w", e.lsn, err)
		}
	}
}

// wipe makes what lies at an offset of the ring no record.
func (a Area) wipe(r Region, off uint64, zeros []byte) error {
	if _, err := r.WriteAt(zeros[:BlockBytes], a.Off+superBlocks*BlockBytes+int64(off)); err != nil {
		return fmt.Errorf("nvram: wipe a stale record at %d: %w", off, err)
	}
	return nil
}
