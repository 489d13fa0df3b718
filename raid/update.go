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
//	8      2    version, 1
//	10     1    k
//	11     1    m
//	12     1    descriptor blocks
//	13     1    strips touched
//	14     2    zero
//	16     4    crc32c of all descriptor blocks, this field zero
//	20     4    data and parity blocks that follow
//	24     8    stripe number
//	32     8    generation of the update
//	40     16   array UUID
//	56     8    zero
//	64     8×w  the generation of each strip after the update (w = k+m)
//	…      for each strip touched, 136 bytes:
//	0      1    strip index
//	1      3    zero
//	4      4    columns: bit c says that block c follows
//	8      128  32 × block checksum of the whole strip, after the update
//
// The blocks are protected by the strips' block checksums.
//
// Version 1: the first.
const (
	updateMagic      = "LEDGEUPD"
	updateVersion    = 1
	updateHeader     = 64
	updateStripBytes = 8 + 4*StripBlocks
)

// Update is prepared by PrepareUpdate or decoded by DecodeUpdate, and applied by Apply.
type Update struct {
	array  UUID
	k, m   int
	stripe uint64
	gen    uint64
	gens   []uint64
	strips []updateStrip

	// fresh: prepared by this array and not applied so far, so no later write can be on the members.
	fresh   bool
	desc    [][]byte
	release func()
}

type updateStrip struct {
	strip   int
	columns uint32
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
		n += len(u.strips[i].blocks)
	}
	return n
}

func (u *Update) descriptorBlocks() int {
	n := updateHeader + 8*(u.k+u.m) + updateStripBytes*len(u.strips)
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
	le.PutUint16(d[8:], updateVersion)
	d[10], d[11], d[12], d[13] = byte(u.k), byte(u.m), byte(n), byte(len(u.strips))
	le.PutUint64(d[24:], u.stripe)
	le.PutUint64(d[32:], u.gen)
	copy(d[40:], u.array[:])
	at := updateHeader
	for _, g := range u.gens {
		le.PutUint64(d[at:], g)
		at += 8
	}
	for i := range u.strips {
		s := &u.strips[i]
		d[at] = byte(s.strip)
		le.PutUint32(d[at+4:], s.columns)
		for c, crc := range s.crcs {
			le.PutUint32(d[at+8+4*c:], crc)
		}
		at += updateStripBytes
		out = append(out, s.blocks...)
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
	if v := le.Uint16(d[8:]); v != updateVersion {
		return bad("version", v)
	}
	u := &Update{k: int(d[10]), m: int(d[11]), stripe: le.Uint64(d[24:]), gen: le.Uint64(d[32:])}
	copy(u.array[:], d[40:])
	if u.k < 1 || u.k > 32 || u.m < 1 || u.m > 4 || int(d[13]) > u.k+u.m || d[13] == 0 {
		return bad("strips", d[10:14])
	}
	u.strips = make([]updateStrip, d[13])
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
	left := total - n
	last := -1
	for i := range u.strips {
		s := &u.strips[i]
		s.strip, s.columns = int(d[at]), le.Uint32(d[at+4:])
		for c := range s.crcs {
			s.crcs[c] = le.Uint32(d[at+8+4*c:])
		}
		at += updateStripBytes
		count := bits.OnesCount32(s.columns)
		if s.strip <= last || s.strip >= u.k+u.m || count > left || u.gens[s.strip] != u.gen {
			return bad("strip", s.strip)
		}
		last = s.strip
		left -= count
		if err := s.decodeBlocks(&in, address{u.array, u.stripe, s.strip, u.k, u.m}); err != nil {
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
		b := in.next()
		if blockCRC(at, c, b) != s.crcs[c] {
			return fmt.Errorf("raid: update of stripe %d strip %d: block %d rotten: %w", at.stripe, at.strip, c, ErrCorrupt)
		}
		s.blocks = append(s.blocks, b)
	}
	return nil
}

// sum is what the strip's checksum block says after the update.
func (u *Update) sum(i int) *stripSum {
	s := &stripSum{gen: u.gen, crcs: u.strips[i].crcs}
	if u.strips[i].strip >= u.k {
		s.gens = u.gens
	}
	return s
}
