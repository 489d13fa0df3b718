package raid

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/bits"
)

// An Update is the complete physical redo image of a change of some blocks of one stripe: for each strip that
// it touches, the new data or parity blocks and all that its checksum block will say. Applying it needs no read of
// old data, so it can be applied again whatever a crash left (P3).
//
// Encoded it is whole blocks: descriptor blocks, then the data and parity blocks, strip by strip in the
// descriptor's order, column by column. The descriptor, little-endian:
//
//	offset size field
//	0      8    magic "LEDGEUPD"
//	8      2    version, 1 or 2
//	10     1    k
//	11     1    m
//	12     1    descriptor blocks
//	13     1    strips touched
//	14     1    kind of the block checksums (checksum.go)
//	15     1    zero
//	16     4    crc32c of all descriptor blocks, this field zero
//	20     4    data and parity blocks that follow
//	24     8    stripe number
//	32     8    generation of the update
//	40     16   array UUID
//	56     8    zero
//	64     8×w  the generation of each strip after the update (w = k+m)
//	…      4×w  version 2: the lost blocks of each strip after the update
//	…      for each strip touched, 136 bytes, in version 2 140:
//	0      1    strip index
//	1      3    zero
//	4      4    columns: bit c says that block c is written
//	8      128  32 × block checksum of the whole strip, after the update
//	136    4    version 2: of the columns, those whose block is zeros and does not follow
//
// The blocks are protected by the strips' block checksums.
//
// Version 1: the first. Version 2 marks lost blocks (lost.go), or leaves them marked; any other update is version 1.
const (
	updateMagic      = "LEDGEUPD"
	updateVersion    = 1
	updateHeader     = 64
	updateLost       = 2 // the version with lost blocks
	updateStripBytes = 8 + 4*StripBlocks
)

// Update is prepared by PrepareUpdate or decoded by DecodeUpdate, and applied by Apply.
type Update struct {
	array  UUID
	sums   Checksums
	k, m   int
	stripe uint64
	gen    uint64
	gens   []uint64
	strips []updateStrip
	// losts are the lost blocks of every strip after the update; nil: none, and version 1. newly are those of them
	// that this update declares lost.
	losts []uint32
	newly []int

	// fresh: prepared by this array and not applied so far, so no later write can be on the members.
	fresh   bool
	desc    [][]byte
	release func()
	// unpin lets the stripe move again; applied: it may (grow.go).
	unpin   func(applied bool)
	applied bool
}

type updateStrip struct {
	strip   int
	columns uint32
	zeros   uint32 // of columns: blocks of zeros, not encoded
	crcs    [StripBlocks]uint32
	blocks  [][]byte // one for each set bit of columns
}

// Stripe and Gen say what is updated.
func (u *Update) Stripe() uint64 { return u.stripe }
func (u *Update) Gen() uint64    { return u.gen }

// Blocks is how many blocks Encode returns.
func (u *Update) Blocks() int {
	n := u.descriptorBlocks()
	for i := range u.strips {
		n += bits.OnesCount32(u.strips[i].columns &^ u.strips[i].zeros)
	}
	return n
}

// version, and what it adds to the descriptor for each strip of the stripe, and each strip touched.
func (u *Update) version() (version uint16, each, touched int) {
	if u.losts != nil {
		return updateLost, 4, 4
	}
	return updateVersion, 0, 0
}

func (u *Update) descriptorBlocks() int {
	_, each, touched := u.version()
	n := updateHeader + (8+each)*(u.k+u.m) + (updateStripBytes+touched)*len(u.strips)
	return (n + BlockBytes - 1) / BlockBytes
}

// Encode returns the image in buffers of whole blocks. They are valid until Release, and as long as the data
// given to PrepareUpdate is.
func (u *Update) Encode() [][]byte {
	n := u.descriptorBlocks()
	d := make([]byte, n*BlockBytes)
	out := [][]byte{d}
	le := binary.LittleEndian
	copy(d, updateMagic)
	version, _, touched := u.version()
	le.PutUint16(d[8:], version)
	d[10], d[11], d[12], d[13] = byte(u.k), byte(u.m), byte(n), byte(len(u.strips))
	d[14] = byte(u.sums)
	le.PutUint64(d[24:], u.stripe)
	le.PutUint64(d[32:], u.gen)
	copy(d[40:], u.array[:])
	at := updateHeader
	for _, g := range u.gens {
		le.PutUint64(d[at:], g)
		at += 8
	}
	for _, l := range u.losts {
		le.PutUint32(d[at:], l)
		at += 4
	}
	for i := range u.strips {
		s := &u.strips[i]
		d[at] = byte(s.strip)
		le.PutUint32(d[at+4:], s.columns)
		for c, crc := range s.crcs {
			le.PutUint32(d[at+8+4*c:], crc)
		}
		if touched > 0 {
			le.PutUint32(d[at+updateStripBytes:], s.zeros)
		}
		at += updateStripBytes + touched
		for n, c := 0, 0; c < StripBlocks; c++ {
			if s.columns>>c&1 != 0 {
				if s.zeros>>c&1 == 0 {
					out = append(out, s.blocks[n])
				}
				n++
			}
		}
	}
	le.PutUint32(d[20:], uint32(u.Blocks()-n))
	le.PutUint32(d[16:], blockSum(d, 16))
	return out
}

// Release gives the update's buffers back. It is called once, after the last use.
func (u *Update) Release() {
	if u.release != nil {
		u.release()
		u.release = nil
	}
	if u.unpin != nil {
		u.unpin(u.applied)
		u.unpin = nil
	}
}

// DecodeUpdate is the inverse of Encode, however the blocks are split over buffers of whole blocks. The update refers
// to them. Everything is verified: what it returns can be applied; any other input gives ErrCorrupt.
func DecodeUpdate(payload [][]byte) (*Update, error) {
	bad := func(what string, v any) (*Update, error) {
		return nil, fmt.Errorf("raid: update with %s %v: %w", what, v, ErrCorrupt)
	}
	total, whole := blocksOf(payload)
	if !whole || total == 0 {
		return bad("broken blocks", total)
	}
	in := spans{bufs: payload}
	d := in.next()
	le := binary.LittleEndian
	if !bytes.Equal(d[:8], []byte(updateMagic)) {
		return bad("magic", d[:8])
	}
	n := int(d[12])
	if n < 1 || n > total {
		return bad("descriptor blocks", n)
	}
	if n > 1 {
		d = bytes.Clone(d)
		for range n - 1 {
			d = append(d, in.next()...)
		}
	}
	if sum := blockSum(d, 16); sum != le.Uint32(d[16:]) {
		return bad("checksum", sum)
	}
	version := le.Uint16(d[8:])
	if version != updateVersion && version != updateLost {
		return bad("version", version)
	}
	u := &Update{sums: Checksums(d[14]), k: int(d[10]), m: int(d[11]), stripe: le.Uint64(d[24:]), gen: le.Uint64(d[32:])}
	copy(u.array[:], d[40:])
	if u.sums >= checksumKinds {
		return bad("checksums of kind", d[14])
	}
	if u.k < 1 || u.k > 32 || u.m < 1 || u.m > 4 || int(d[13]) > u.k+u.m || d[13] == 0 {
		return bad("strips", d[10:14])
	}
	u.strips = make([]updateStrip, d[13])
	if version == updateLost {
		u.losts = make([]uint32, u.k+u.m)
	}
	_, _, touched := u.version()
	if u.descriptorBlocks() != n {
		return bad("descriptor blocks", n)
	}
	if u.gen == 0 {
		return bad("generation", u.gen)
	}
	at := updateHeader
	for range u.k + u.m {
		u.gens = append(u.gens, le.Uint64(d[at:]))
		at += 8
	}
	for i := range u.losts {
		if u.losts[i] = le.Uint32(d[at:]); i >= u.k && u.losts[i] != 0 {
			return bad("lost parity", i)
		}
		at += 4
	}
	left := total - n
	last := -1
	for i := range u.strips {
		s := &u.strips[i]
		s.strip, s.columns = int(d[at]), le.Uint32(d[at+4:])
		for c := range s.crcs {
			s.crcs[c] = le.Uint32(d[at+8+4*c:])
		}
		if touched > 0 {
			s.zeros = le.Uint32(d[at+updateStripBytes:])
		}
		at += updateStripBytes + touched
		if s.zeros&^s.columns != 0 {
			return bad("zeros beyond the columns of strip", s.strip)
		}
		count := bits.OnesCount32(s.columns &^ s.zeros)
		if s.strip <= last || s.strip >= u.k+u.m || count > left || u.gens[s.strip] != u.gen {
			return bad("strip", s.strip)
		}
		last = s.strip
		left -= count
		if err := s.decodeBlocks(&in, address{u.array, u.stripe, s.strip, u.k, u.m, u.sums}); err != nil {
			return nil, err
		}
	}
	if left != 0 || int(le.Uint32(d[20:])) != total-n {
		return bad("blocks left over", left)
	}
	return u, nil
}

func (s *updateStrip) decodeBlocks(in *spans, at address) error {
	for c := range StripBlocks {
		if s.columns>>c&1 == 0 {
			continue
		}
		b := zeroBlock
		if s.zeros>>c&1 == 0 {
			b = in.next()
		}
		if checksumOf(at, c, b) != s.crcs[c] {
			return fmt.Errorf("raid: update of stripe %d strip %d: block %d rotten: %w", at.stripe, at.strip, c, ErrCorrupt)
		}
		s.blocks = append(s.blocks, b)
	}
	return nil
}

// sum is what the strip's checksum block says after the update.
func (u *Update) sum(i int) *stripSum {
	s := &stripSum{gen: u.gen, crcs: u.strips[i].crcs}
	s.tell(u.strips[i].strip, u.k, u.gens, u.losts)
	return s
}
