package raid

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

// A checksum block stands before the data blocks of each strip. It is one 4096-byte block, little-endian; all
// that matters lies in its first 512 bytes, so that no drive can tear it in half unseen:
//
//	offset size field
//	0      8    magic "LEDGESUM"
//	8      2    version, 1
//	10     1    strip index within the stripe: 0 to k-1 data, k to k+m-1 parity
//	11     1    k
//	12     1    m
//	13     3    zero
//	16     16   array UUID
//	32     8    stripe number
//	40     8    generation of this strip: of the last write that touched it
//	48     4    crc32c of the block, this field zero
//	52     12   zero
//	64     128  32 × block checksum
//	192    288  parity strips: the generation of strip 0, 1, … k+m-1; data strips: zero
//	480    …    zero
//
// A block's checksum is the crc32c of its 4096 bytes, begun with the crc32c of {array UUID, stripe, strip, block}:
// the same bytes at another address have another checksum.
//
// Version 1: the first.
const (
	sumMagic   = "LEDGESUM"
	sumVersion = 1
	maxWidth   = 36
)

// stripSum is what a checksum block says.
type stripSum struct {
	gen  uint64
	crcs [StripBlocks]uint32
	gens []uint64 // of every strip; nil for data strips
}

// address is which strip a checksum block or a block belongs to.
type address struct {
	array  UUID
	stripe uint64
	strip  int
	k, m   int
}

func (s *stripSum) encode(b []byte, at address) {
	clear(b[:BlockBytes])
	le := binary.LittleEndian
	copy(b, sumMagic)
	le.PutUint16(b[8:], sumVersion)
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
	case le.Uint16(b[8:]) != sumVersion:
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
	return s, nil
}

// blockCRC is the checksum of one data or parity block.
func blockCRC(at address, block int, data []byte) uint32 {
	var a [32]byte
	copy(a[:], at.array[:])
	binary.LittleEndian.PutUint64(a[16:], at.stripe)
	a[24], a[25] = byte(at.strip), byte(block)
	return crc32.Update(crc32.Checksum(a[:], castagnoli), castagnoli, data)
}
