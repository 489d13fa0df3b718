package nvram

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

const (
	superMagic     = "LEDGENVS"
	superVersion   = 2 // 1 is read; an older build, which does not know records of version 2, refuses what this one has opened
	superBlocks    = 2
	flagMirror     = 1
	flagIncomplete = 2
)

var (
	le         = binary.LittleEndian
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
	zero4      [4]byte
)

// The lanes of a log.
const (
	laneData = iota
	laneUpdate
	lanes
)

// Position of a record in its lane. Off counts from the start of the ring (both lanes), in bytes.
type Position struct {
	LSN, Off, Seq uint64
}

// super is a decoded superblock; doc.go has the byte table.
type super struct {
	seq              uint64
	id               ID
	epoch            uint64
	run, runLSN      uint64
	bytes            [lanes]uint64
	tail             [lanes]Position
	acked            uint64
	ackedSeq         [lanes]uint64
	mirror, incomplt bool
	// of is whose region it is, and regionBytes the region's size; zero: not recorded.
	of          Identity
	regionBytes uint64
}

// start is where the lane begins in the ring, end where it ends.
func (s *super) start(lane int) uint64 {
	if lane == laneData {
		return 0
	}
	return s.bytes[laneData]
}
func (s *super) end(lane int) uint64 { return s.start(lane) + s.bytes[lane] }

// maxTail: from here on the LSNs of both lanes are all present.
func (s *super) maxTail() uint64 { return max(s.tail[laneData].LSN, s.tail[laneUpdate].LSN) }

func (s *super) encode(b []byte) {
	clear(b[:BlockBytes])
	copy(b, superMagic)
	le.PutUint32(b[8:], superVersion)
	le.PutUint64(b[16:], s.seq)
	copy(b[24:], s.id[:])
	le.PutUint64(b[40:], s.epoch)
	le.PutUint64(b[48:], s.run)
	le.PutUint64(b[56:], s.runLSN)
	for i := range lanes {
		le.PutUint64(b[64+8*i:], s.bytes[i])
		putPosition(b[80+24*i:], s.tail[i])
		le.PutUint64(b[136+8*i:], s.ackedSeq[i])
	}
	le.PutUint64(b[128:], s.acked)
	if s.mirror {
		b[152] |= flagMirror
	}
	if s.incomplt {
		b[152] |= flagIncomplete
	}
	if s.of != (Identity{}) {
		b[153], b[154] = s.of.Controller, byte(len(s.of.Shelf))
		le.PutUint64(b[160:], s.regionBytes)
		copy(b[168:168+MaxShelfName], s.of.Shelf)
	}
	le.PutUint32(b[12:], checksum(b[:BlockBytes]))
}

// checksum is CRC32C of b with bytes 12 to 15 taken as zero.
func checksum(b []byte) uint32 {
	c := crc32.Update(0, castagnoli, b[:12])
	c = crc32.Update(c, castagnoli, zero4[:])
	return crc32.Update(c, castagnoli, b[16:])
}

func putPosition(b []byte, p Position) {
	le.PutUint64(b, p.LSN)
	le.PutUint64(b[8:], p.Off)
	le.PutUint64(b[16:], p.Seq)
}

func getPosition(b []byte) Position {
	return Position{le.Uint64(b), le.Uint64(b[8:]), le.Uint64(b[16:])}
}

// decodeSuper checks one copy. areaBytes bounds the geometry.
func decodeSuper(b []byte, areaBytes int64) (super, error) {
	var s super
	switch {
	case allZero(b):
		return s, ErrEmpty
	case string(b[:8]) != superMagic:
		return s, fmt.Errorf("%w: no superblock, but other content (was it used for something else, or its size changed?)", ErrForeign)
	case checksum(b) != le.Uint32(b[12:]):
		return s, fmt.Errorf("%w: superblock checksum", ErrCorrupt)
	case le.Uint32(b[8:]) < 1 || le.Uint32(b[8:]) > superVersion:
		return s, fmt.Errorf("%w: superblock version %d, this build reads up to %d", ErrForeign, le.Uint32(b[8:]), superVersion)
	}
	s.seq = le.Uint64(b[16:])
	copy(s.id[:], b[24:])
	s.epoch = le.Uint64(b[40:])
	s.run = le.Uint64(b[48:])
	s.runLSN = le.Uint64(b[56:])
	for i := range lanes {
		s.bytes[i] = le.Uint64(b[64+8*i:])
		s.tail[i] = getPosition(b[80+24*i:])
		s.ackedSeq[i] = le.Uint64(b[136+8*i:])
	}
	s.acked = le.Uint64(b[128:])
	s.mirror = b[152]&flagMirror != 0
	s.incomplt = b[152]&flagIncomplete != 0
	if b[153] != 0 {
		s.of = Identity{Controller: b[153], Shelf: string(b[168 : 168+min(int(b[154]), MaxShelfName)])}
		s.regionBytes = le.Uint64(b[160:])
		if !s.of.valid() {
			return super{}, fmt.Errorf("%w: superblock of controller %q", ErrCorrupt, b[153])
		}
	}
	return s, s.check(areaBytes)
}

// check holds for every superblock that this package writes.
func (s *super) check(areaBytes int64) error {
	room := uint64(areaBytes) - superBlocks*BlockBytes
	for i := range lanes {
		if s.bytes[i] == 0 || s.bytes[i]%BlockBytes != 0 || s.bytes[i] > room {
			return fmt.Errorf("%w: lane %d of %d bytes in an area of %d (was the region truncated?)", ErrCorrupt, i, s.bytes[i], areaBytes)
		}
		room -= s.bytes[i]
	}
	for i := range lanes {
		if t := s.tail[i]; t.Off%BlockBytes != 0 || t.Off < s.start(i) || t.Off >= s.end(i) {
			return fmt.Errorf("%w: tail of lane %d at offset %d", ErrCorrupt, i, t.Off)
		}
	}
	return nil
}

// advanceAcked raises what is known to be acknowledged.
func (s *super) advanceAcked(lsn uint64, seq [lanes]uint64) {
	s.acked = lsn
	s.ackedSeq = seq
}

func allZero(b []byte) bool { return len(bytes.TrimLeft(b, "\x00")) == 0 }

// readSuper returns the newer valid copy.
func readSuper(r Region, a Area) (super, error) {
	if a.Off < 0 || a.Off%BlockBytes != 0 || a.Size%BlockBytes != 0 || a.Size < minAreaBytes || a.Off+a.Size > r.Size() {
		return super{}, fmt.Errorf("nvram: area of %d bytes at %d in a region of %d: %w", a.Size, a.Off, r.Size(), ErrInvalid)
	}
	buf := AlignedBlocks(superBlocks)
	if _, err := r.ReadAt(buf, a.Off); err != nil {
		return super{}, fmt.Errorf("nvram: read superblock: %w", err)
	}
	s0, err0 := decodeSuper(buf[:BlockBytes], a.Size)
	s1, err1 := decodeSuper(buf[BlockBytes:], a.Size)
	switch {
	case err0 == nil && (err1 != nil || s0.seq > s1.seq):
		return s0, nil
	case err1 == nil:
		return s1, nil
	case err0 == ErrEmpty:
		return super{}, err1
	}
	return super{}, err0
}

// writeSuper makes s durable, with the next sequence number. The other copy stays valid meanwhile.
func writeSuper(r Region, a Area, s *super, buf []byte) error {
	s.seq++
	s.encode(buf)
	if _, err := r.WriteAt(buf[:BlockBytes], a.Off+int64(s.seq&1)*BlockBytes); err != nil {
		return fmt.Errorf("nvram: write superblock: %w", err)
	}
	return nil
}

// writeSuperTwice also brings the other copy up to it: a change that must survive the rot of one copy.
func writeSuperTwice(r Region, a Area, s *super, buf []byte) error {
	if err := writeSuper(r, a, s, buf); err != nil {
		return err
	}
	return writeSuper(r, a, s, buf)
}
