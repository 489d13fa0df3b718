// Package qcow2 reads and writes disk images of QEMU's format qcow2, so that a volume leaves and enters as a stream.
//
// It owns the format (QEMU's docs/interop/qcow2: versions 2 and 3) as far as a volume needs it: what is written is version 3 with
// clusters of 64 KiB, 16-bit reference counts, no backing file, no compression, and all tables before all data, so that it
// can go through a pipe and come out of one. It promises that whatever bytes it is given to read, it answers with
// data or an error, in bounded memory. It never changes an image, and refuses what it would read wrongly: backing files, encryption,
// external data files, extended L2 entries, unknown incompatible features, images marked dirty or corrupt.
//
//	write.go   Plan: what an image of a source will look like, and the image as a stream
//	stream.go  Stream: such an image again, front to back, without seeking
//	image.go   Image: any image, from a file
//
// # What is written
//
//	cluster            what
//	0                  header, 104 bytes, then zeros (which also end the header extensions)
//	1 …                reference count table: 8 bytes for each 32,768 clusters
//	then               reference count blocks: 2 bytes a cluster, 1 for each that is in use
//	then               L1 table: 8 bytes for each 512 MiB of the disk
//	then               L2 tables of those 512 MiB that hold something, in their order: 8 bytes a cluster
//	then               data, in the order of the disk; the last cluster of the disk whole
//
// All numbers are big-endian.
package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
)

const (
	magic       = 0x514649fb // "QFI\xfb"
	headerBytes = 104
	v2Bytes     = 72

	// Cluster is the unit of what is written, in bytes.
	Cluster = clusterBytes

	clusterBits  = 16 // of what is written
	clusterBytes = 1 << clusterBits
	tableEntries = clusterBytes / 8 // of an L2 table
	countsABlock = clusterBytes / 2

	copied     = 1 << 63
	compressed = 1 << 62
	zeroFlag   = 1
	offsetMask = 0x00fffffffffffe00

	// MaxSize is of a disk that is read or written.
	MaxSize = 64 << 40
	maxL1   = MaxSize / (512 << 20) * 64 // entries that are read: clusters may be smaller than those written
)

var (
	// ErrFormat: the bytes are no qcow2 image, or a broken one.
	ErrFormat = errors.New("qcow2: not a valid image")
	// ErrUnsupported: an image that this package would not read rightly.
	ErrUnsupported = errors.New("qcow2: unsupported")
	// ErrOrder: an image that cannot be read front to back.
	ErrOrder = errors.New("qcow2: tables and data are not in order: it can be read from a file, not from a pipe")
)

var be = binary.BigEndian

// Is says whether a file that begins so (4 bytes at least) is a qcow2 image.
func Is(head []byte) bool { return len(head) >= 4 && be.Uint32(head) == magic }

// header is what of an image's header matters.
type header struct {
	version     uint32
	clusterBits uint
	size        uint64
	l1Entries   uint32
	l1Offset    uint64
	zstd        bool
}

// parseHeader takes the first bytes of an image, 112 or more.
func parseHeader(b []byte) (h header, err error) {
	if len(b) < headerBytes+8 || !Is(b) {
		return h, fmt.Errorf("%w: no qcow2 header", ErrFormat)
	}
	h = header{version: be.Uint32(b[4:]), clusterBits: uint(be.Uint32(b[20:])), size: be.Uint64(b[24:]), l1Entries: be.Uint32(b[36:]), l1Offset: be.Uint64(b[40:])}
	switch {
	case h.version != 2 && h.version != 3:
		return h, fmt.Errorf("%w: version %d", ErrUnsupported, h.version)
	case be.Uint64(b[8:]) != 0:
		return h, fmt.Errorf("%w: it has a backing file; 'qemu-img convert' makes one image of both", ErrUnsupported)
	case be.Uint32(b[32:]) != 0:
		return h, fmt.Errorf("%w: it is encrypted; 'qemu-img convert' with its secret makes one that is not", ErrUnsupported)
	case h.clusterBits < 9 || h.clusterBits > 21:
		return h, fmt.Errorf("%w: clusters of 2^%d bytes", ErrFormat, h.clusterBits)
	case h.size > MaxSize:
		return h, fmt.Errorf("%w: a disk of %d bytes; at most %d", ErrUnsupported, h.size, int64(MaxSize))
	case h.l1Entries > maxL1 || uint64(h.l1Entries) < h.tables():
		return h, fmt.Errorf("%w: L1 table of %d entries for a disk of %d bytes", ErrFormat, h.l1Entries, h.size)
	case h.l1Offset%(1<<h.clusterBits) != 0 || h.l1Offset == 0 && h.size > 0:
		return h, fmt.Errorf("%w: L1 table at %d", ErrFormat, h.l1Offset)
	case h.version == 2:
		return h, nil
	}
	incompatible := be.Uint64(b[72:])
	switch {
	case incompatible&1 != 0:
		return h, fmt.Errorf("%w: it is marked dirty: it was not closed; 'qemu-img check -r all' mends it", ErrUnsupported)
	case incompatible&2 != 0:
		return h, fmt.Errorf("%w: it is marked corrupt; 'qemu-img check -r all' may mend it", ErrUnsupported)
	case incompatible&4 != 0:
		return h, fmt.Errorf("%w: its data is in another file; 'qemu-img convert' makes one image of both", ErrUnsupported)
	case incompatible&16 != 0:
		return h, fmt.Errorf("%w: extended L2 entries; 'qemu-img convert' makes an image without", ErrUnsupported)
	case incompatible&^8 != 0:
		return h, fmt.Errorf("%w: incompatible features %#x", ErrUnsupported, incompatible)
	}
	length := be.Uint32(b[100:])
	if length < headerBytes {
		return h, fmt.Errorf("%w: header of %d bytes", ErrFormat, length)
	}
	if incompatible&8 != 0 {
		if length <= headerBytes || b[headerBytes] > 1 {
			return h, fmt.Errorf("%w: unknown compression", ErrUnsupported)
		}
		h.zstd = b[headerBytes] == 1
	}
	return h, nil
}

// tables is how many L2 tables the disk needs.
func (h *header) tables() uint64 {
	covers := uint64(1) << (2*h.clusterBits - 3) // an L2 table has clusterBytes/8 entries
	return (h.size + covers - 1) / covers
}
