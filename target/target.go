// Package target is the vocabulary between the engines that speak SCSI and NVMe to
// initiators and the things that hold blocks: the shelf's LUN, the agent's volume, a file,
// memory. It knows no wire format and no medium.
//
// It never imports anything of this repository.
package target

import (
	"context"
)

// Info describes a logical unit. It may change while the unit is served (resize); an engine
// reads it for each command that needs it.
type Info struct {
	// Blocks is the capacity in logical blocks of BlockBytes each.
	Blocks uint64
	// BlockBytes is the logical block size: 512 or 4096.
	BlockBytes uint32
	// PhysicalExponent is log2(physical block / logical block): 3 for 512-byte emulation on 4 KiB.
	PhysicalExponent uint8
	// OptimalBlocks and MaxBlocks are hints for transfer sizes, in logical blocks; zero: none.
	OptimalBlocks, MaxBlocks uint32
	// UnmapGranularityBlocks is the unit in which Unmap frees space, in logical blocks; zero: one.
	UnmapGranularityBlocks uint32
	// AtomicBlocks is the longest Write, in logical blocks, that is applied whole or not at all,
	// power loss included, and that no Read sees half of; zero: one block.
	AtomicBlocks uint32
	// AtomicAlignmentBlocks and AtomicGranularityBlocks restrict which Writes that holds for: those
	// whose LBA is a multiple of the one and whose length is a multiple of the other; zero: one.
	AtomicAlignmentBlocks, AtomicGranularityBlocks uint32
	// Thin says that blocks are allocated on first write and that Unmap frees them.
	Thin bool
	// ReadOnly refuses every command that writes.
	ReadOnly bool
	// UUID identifies the unit for ever and on every path (RFC 9562); the engines derive the
	// NAA, EUI-64 and UUID designators from it, so it must be the same on both controllers.
	UUID [16]byte
	// Vendor (8 bytes at most), Product (16), Revision (4) and Serial are ASCII.
	Vendor, Product, Revision, Serial string
}

// Range is a run of logical blocks.
type Range struct {
	LBA    uint64
	Blocks uint64
}

// Device is the blocking edge of an engine: what a logical unit must be able to do. All methods
// may be called concurrently; overlapping calls may be applied in any order, each block
// atomically. Buffers in dst and src are owned by the caller and not kept after the return.
// Each buffer's length is a multiple of BlockBytes. Errors are those of this package, wrapped or
// bare; any other error becomes HARDWARE ERROR / INTERNAL TARGET FAILURE.
//
// Completion is asynchronous for the engine and its initiators, not for the device: a call returns when
// it is done, on a goroutine of its own (or, Inline, at once), while the connection is read on; its
// context ends when the command is aborted; answers leave in the order in which they come up. Not built:
// a call that submits and tells of the end later. It would save what BenchmarkWorkerRead4KQD32 costs
// over BenchmarkRead4KQD32 (target/iscsi; 5 µs a command on 2026-11-25, most of it a system call for each
// answer), which a device that waits for NVRAM or drives does not notice much.
//
// A successful Write, Unmap, WriteSame or CompareAndWrite is durable when it returns, whatever
// fua says, unless the device documents a volatile cache; Flush makes all that returned durable.
type Device interface {
	Info() Info
	// Read fills dst from lba on. Blocks never written read as zeros.
	Read(ctx context.Context, lba uint64, dst [][]byte) error
	// Write stores src from lba on.
	Write(ctx context.Context, lba uint64, src [][]byte, fua bool) error
	// Unmap frees the ranges; they read as zeros afterwards.
	Unmap(ctx context.Context, ranges []Range) error
	// WriteSame stores block in each of blocks blocks; a nil block means zeros.
	WriteSame(ctx context.Context, lba, blocks uint64, block []byte) error
	// CompareAndWrite reads len(compare) bytes at lba and, where they equal compare, writes
	// write there, atomically against every other call. It returns *MiscompareError where not.
	CompareAndWrite(ctx context.Context, lba uint64, compare, write []byte) error
	// Flush returns when everything acknowledged before the call is durable.
	Flush(ctx context.Context) error
	// Mapped tells whether the block at lba is mapped, and for how many following blocks
	// (blocks at most, at least 1) that holds.
	Mapped(ctx context.Context, lba, blocks uint64) (mapped bool, n uint64, err error)
}

// AccessState is the asymmetric access state of a target port group (SPC-4 5.15.2); the values
// are those of the REPORT TARGET PORT GROUPS parameter data (SPC-4 6.36).
type AccessState uint8

const (
	Optimized     AccessState = 0x0
	NonOptimized  AccessState = 0x1
	Standby       AccessState = 0x2
	Unavailable   AccessState = 0x3
	Offline       AccessState = 0xE
	Transitioning AccessState = 0xF
)

func (s AccessState) String() string {
	switch s {
	case Optimized:
		return "optimized"
	case NonOptimized:
		return "non-optimized"
	case Standby:
		return "standby"
	case Unavailable:
		return "unavailable"
	case Offline:
		return "offline"
	case Transitioning:
		return "transitioning"
	}
	return "unknown"
}

// PortGroup is a target port group: the ports of one controller. Ports are relative target port
// identifiers (SPC-4 4.3.4), 1 and up.
type PortGroup struct {
	ID    uint16
	State AccessState
	// Preferred is the PREF bit. Linux's multipath-tools choose a preferred group that is not optimized (90, in
	// standby 81) before an optimized one (50): set it only where no other group is ever optimized instead.
	Preferred bool
	Ports     []uint16
}
