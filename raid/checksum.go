package raid

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/zeebo/xxh3"
)

// A checksum block stands before the data blocks of each strip. It is one 4096-byte block, little-endian; all
// that matters (of version 1) lies in its first 512 bytes, so that no drive can tear it in half unseen:
//
//	offset size field
//	0      8    magic "LEDGESUM"
//	8      2    version, 1 or 2
//	10     1    strip index within the stripe: 0 to k-1 data, k to k+m-1 parity
//	11     1    k
//	12     1    m
//	13     3    zero
//	16     16   array UUID
//	32     8    stripe number
//	40     8    generation of this strip: of the last write that touched it
//	48     4    crc32c of the block, this field zero
//	52     4    version 2, data strips: the lost blocks of this strip, bit c is block c (lost.go); else zero
//	56     8    zero
//	64     128  32 × block checksum
//	192    288  parity strips: the generation of strip 0, 1, … k+m-1; data strips: zero
//	480    144  version 2, parity strips: the lost blocks of strip 0, 1, … k+m-1, 4 bytes each; else zero
//	624    …    zero
//
// A block's checksum is of its 4096 bytes and of where it belongs, the 32 bytes {array UUID 16, stripe 8, strip 1, block 1, zero 6}: the same
// bytes at another address have another checksum. Its kind is the array's, and stands in the label (Checksums):
//
//	1  xxh3: the low 32 bits of the XXH3-64 of the block, seeded with the XXH3-64 of the address
//	0  crc32c of the address, then the block
//
// A CRC-32C cannot tell blocks that end in the CRC-32C of their other 4092 bytes, as those of ext4's directories do, from each other: all
// have the same at one address. A drive that loses the write of such a block is believed, and a replay that asks
// whether a block is still the one that it wrote hears that it is. Arrays made before 2026-11-28 have kind 0.
//
// Version 1: the first. Version 2 has lost blocks, and is written only where a strip has any to tell of: readers of
// version 1 take it for rotten, so that they answer an error for a stripe with lost blocks, and never zeros. (It is
// also the only one of which something lies beyond 512 bytes; torn there it is found by its checksum, and
// written again from the log like the blocks behind it.)
const (
	sumMagic   = "LEDGESUM"
	sumVersion = 1
	// sumLost is the version that tells of lost blocks.
	sumLost  = 2
	maxWidth = 36
)

// stripSum is what a checksum block says.
type stripSum struct {
	gen  uint64
	crcs [StripBlocks]uint32
	gens []uint64 // of every strip; nil for data strips
	// lost are the lost blocks of a data strip; losts, of a parity strip, those of every strip, nil for none.
	lost  uint32
	losts []uint32
}

// address is which strip a checksum block or a block belongs to, and the kind of its blocks' checksums.
type address struct {
	array  UUID
	stripe uint64
	strip  int
	k, m   int
	sums   Checksums
}

// Checksums is the kind of an array's block checksums. The numbers are those of the label.
type Checksums uint8

const (
	ChecksumsCRC32C Checksums = iota
	ChecksumsXXH3
	checksumKinds
)

func (c Checksums) String() string {
	if c < checksumKinds {
		return [...]string{"crc32c", "xxh3"}[c]
	}
	return fmt.Sprintf("checksums(%d)", uint8(c))
}

func (s *stripSum) encode(b []byte, at address) {
	clear(b[:BlockBytes])
	le := binary.LittleEndian
	copy(b, sumMagic)
	le.PutUint16(b[8:], sumVersion)
	if s.marked() {
		le.PutUint16(b[8:], sumLost)
	}
	b[10], b[11], b[12] = byte(at.strip), byte(at.k), byte(at.m)
	copy(b[16:], at.array[:])
	le.PutUint64(b[32:], at.stripe)
	le.PutUint64(b[40:], s.gen)
	for i, c := range s.crcs {
		le.PutUint32(b[64+4*i:], c)
	}
	for i, g := range s.gens {
		le.PutUint64(b[192+8*i:], g)
	}
	le.PutUint32(b[52:], s.lost)
	for i, l := range s.losts {
		le.PutUint32(b[480+4*i:], l)
	}
	le.PutUint32(b[48:], blockSum(b[:BlockBytes], 48))
}

// decodeSum parses a checksum block that should be at's. Every error is ErrCorrupt: for the reader it makes no
// difference whether the block rotted, was never written, or is another strip's that a drive put here.
func decodeSum(b []byte, at address) (*stripSum, error) {
	le := binary.LittleEndian
	switch {
	case len(b) != BlockBytes:
		return nil, fmt.Errorf("checksum block of %d bytes: %w", len(b), ErrCorrupt)
	case !bytes.Equal(b[:8], []byte(sumMagic)):
		return nil, fmt.Errorf("no checksum block: %w", ErrCorrupt)
	case blockSum(b, 48) != le.Uint32(b[48:]):
		return nil, fmt.Errorf("checksum block rotten: %w", ErrCorrupt)
	case le.Uint16(b[8:]) != sumVersion && le.Uint16(b[8:]) != sumLost:
		return nil, fmt.Errorf("checksum block version %d: %w", le.Uint16(b[8:]), ErrCorrupt)
	case !bytes.Equal(b[16:32], at.array[:]), le.Uint64(b[32:]) != at.stripe, int(b[10]) != at.strip,
		int(b[11]) != at.k, int(b[12]) != at.m:
		return nil, fmt.Errorf("checksum block of stripe %d strip %d: %w", le.Uint64(b[32:]), b[10], ErrCorrupt)
	case le.Uint64(b[40:]) == 0:
		return nil, fmt.Errorf("checksum block without generation: %w", ErrCorrupt)
	}
	s := &stripSum{gen: le.Uint64(b[40:])}
	for i := range s.crcs {
		s.crcs[i] = le.Uint32(b[64+4*i:])
	}
	if at.strip >= at.k {
		s.gens = make([]uint64, at.k+at.m)
		for i := range s.gens {
			s.gens[i] = le.Uint64(b[192+8*i:])
		}
		if s.gens[at.strip] != s.gen {
			return nil, fmt.Errorf("checksum block of two generations: %w", ErrCorrupt)
		}
	}
	if le.Uint16(b[8:]) == sumLost {
		s.decodeLost(b, at)
	}
	return s, nil
}

// checksumOf is the checksum of one data or parity block.
func checksumOf(at address, block int, data []byte) uint32 {
	s := newSummer(at.sums, at.array, at.stripe)
	return s.block(at.strip, block, data)
}

// summer computes the checksums of a stripe's blocks.
type summer struct {
	kind Checksums
	of   [addressBytes]byte // the address of strip 0, block 0
	// crc is the crc32c of that. That of any other block of the stripe differs by what does not depend on array and stripe, since a CRC is
	// affine: addressCRCs.
	crc uint32
}

func newSummer(kind Checksums, array UUID, stripe uint64) (s summer) {
	s.kind = kind
	copy(s.of[:], array[:])
	binary.LittleEndian.PutUint64(s.of[16:], stripe)
	if kind == ChecksumsCRC32C {
		s.crc = crc32.Checksum(s.of[:], castagnoli)
	}
	return s
}

// block is the checksum of a block of the stripe. Any number of goroutines may call it.
func (s *summer) block(strip, block int, data []byte) uint32 {
	if s.kind == ChecksumsCRC32C {
		return crc32.Update(s.crc^addressCRCs.strip[strip]^addressCRCs.block[block], castagnoli, data)
	}
	at := s.of
	at[24], at[25] = byte(strip), byte(block)
	return uint32(xxh3.HashSeed(data, xxh3.Hash(at[:])))
}

// addressBytes is the address that a block's checksum begins with: array UUID 16, stripe 8, strip 1, block 1, zero 6.
const addressBytes = 32

// addressCRCs are the differences that a strip and a block make to the checksum of an address.
var addressCRCs = func() (d struct {
	strip [maxWidth]uint32
	block [StripBlocks]uint32
}) {
	var a [addressBytes]byte
	zero := crc32.Checksum(a[:], castagnoli)
	for i := range d.strip {
		a[24] = byte(i)
		d.strip[i] = crc32.Checksum(a[:], castagnoli) ^ zero
	}
	a[24] = 0
	for i := range d.block {
		a[25] = byte(i)
		d.block[i] = crc32.Checksum(a[:], castagnoli) ^ zero
	}
	return d
}()
