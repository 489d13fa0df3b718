package scsi

import (
	"encoding/binary"

	"github.com/ledge-storage/ledge/target"
)

// Limits of the commands in this file, as the block limits page tells them.
const (
	maxUnmapDescriptors = 256
	maxUnmapBlocks      = 1<<32 - 1
	maxMappings         = 512
)

func decodeWriteSame(t *Task) error {
	t.decodeRange()
	if t.CDB[1]&0xE0 != 0 {
		return badCDB(1, 7)
	}
	unmap, anchor := t.CDB[1]&0x08 != 0, t.CDB[1]&0x10 != 0
	if anchor {
		return badCDB(1, 4) // no anchored state
	}
	if unmap && !t.info.Thin {
		return badCDB(1, 3)
	}
	if err := t.checkWritable(); err != nil {
		return err
	}
	if err := t.checkRange(); err != nil {
		return err
	}
	if t.blocks == 0 {
		t.blocks = t.info.Blocks - t.lba // WSNZ is clear: to the end
	}
	if t.blocks > maxWriteSameBlocks(t.info) {
		return badCDB(lengthField(t.CDB[0]), 7)
	}
	if noData := t.CDB[0] == 0x93 && t.CDB[1]&0x01 != 0; !noData {
		t.OutTotal = int64(t.info.BlockBytes)
	}
	if t.OutLimit != t.OutTotal {
		return badCDB(lengthField(t.CDB[0]), 7) // a block, and no more than a block
	}
	return nil
}

// maxWriteSameBlocks bounds the time that one command takes: 1 TiB.
func maxWriteSameBlocks(i target.Info) uint64 { return 1 << 40 / uint64(i.BlockBytes) }

// writeSame is WRITE SAME(10) and (16).
func writeSame(t *Task) error {
	var block []byte
	if t.OutTotal > 0 {
		if block = t.Out[0]; isZero(block) {
			block = nil
		}
	}
	if t.blocks == 0 {
		return nil
	}
	if block == nil && t.CDB[1]&0x08 != 0 {
		return t.unit.dev.Unmap(t.ctx, []target.Range{{LBA: t.lba, Blocks: t.blocks}})
	}
	return t.unit.dev.WriteSame(t.ctx, t.lba, t.blocks, block)
}

func isZero(b []byte) bool {
	for len(b) >= 8 {
		if binary.LittleEndian.Uint64(b) != 0 {
			return false
		}
		b = b[8:]
	}
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

func decodeUnmap(t *Task) error {
	if t.CDB[1]&0x01 != 0 {
		return badCDB(1, 0) // ANCHOR
	}
	if !t.info.Thin {
		return illegal(ascInvalidOpcode)
	}
	if err := t.checkWritable(); err != nil {
		return err
	}
	t.OutTotal = int64(t.be16(7))
	return nil
}

// unmap is UNMAP (SBC-3 5.28). The parameter list:
//
//	offset size
//	0      2    length of what follows these two bytes
//	2      2    length of the descriptors
//	4      4    reserved
//	8      16n  descriptors: LBA (8), blocks (4), reserved (4)
func unmap(t *Task) error {
	if t.OutTotal == 0 {
		return nil
	}
	list, err := t.list()
	if err != nil {
		return err
	}
	if len(list) < 8 {
		return illegal(ascParameterListLength)
	}
	n := int(binary.BigEndian.Uint16(list[2:]))
	if n > len(list)-8 {
		return illegal(ascParameterListLength)
	}
	if n/16 > maxUnmapDescriptors {
		return badList(2)
	}
	ranges := make([]target.Range, 0, n/16)
	total := uint64(0)
	for d := list[8 : 8+n/16*16]; len(d) > 0; d = d[16:] {
		r := target.Range{LBA: binary.BigEndian.Uint64(d), Blocks: uint64(binary.BigEndian.Uint32(d[8:]))}
		if r.LBA > t.info.Blocks || r.Blocks > t.info.Blocks-r.LBA {
			return illegal(ascRange)
		}
		if total += r.Blocks; total > maxUnmapBlocks {
			return badList(8)
		}
		if r.Blocks > 0 {
			ranges = append(ranges, r)
		}
	}
	if len(ranges) == 0 {
		return nil
	}
	t.unit.changes(ranges)
	return t.unit.dev.Unmap(t.ctx, ranges)
}

func decodeMappings(t *Task) error {
	t.lba = t.be64(2)
	if t.lba >= t.info.Blocks {
		return illegal(ascRange)
	}
	return nil
}

// getLBAStatus is GET LBA STATUS (SBC-3 5.5): descriptors of LBA (8), blocks (4), provisioning
// status (1: 0 mapped, 1 deallocated), reserved (3).
func getLBAStatus(t *Task) error {
	allocation := t.be32(10)
	most := maxMappings
	if room := int(max(allocation, 24)-8) / 16; room < most {
		most = max(room, 1)
	}
	b := append(t.reply[:0], 0, 0, 0, 0, 0, 0, 0, 0)
	for lba := t.lba; lba < t.info.Blocks && most > 0; most-- {
		mapped, n, err := t.unit.dev.Mapped(t.ctx, lba, min(t.info.Blocks-lba, 1<<31))
		if err != nil {
			return err
		}
		n = max(1, min(n, t.info.Blocks-lba, 1<<32-1))
		b = binary.BigEndian.AppendUint64(b, lba)
		b = binary.BigEndian.AppendUint32(b, uint32(n))
		if mapped {
			b = append(b, 0, 0, 0, 0)
		} else {
			b = append(b, 1, 0, 0, 0)
		}
		lba += n
		if t.aborted.Load() {
			return errAborted
		}
	}
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	t.reply = b
	return t.answer(b, allocation)
}
