package scsi

import (
	"bytes"
	"encoding/binary"
	"errors"

	"github.com/ledge-storage/ledge/target"
)

func testUnitReady(*Task) error { return nil }

// Reading.

func decodeRead(t *Task) error {
	t.decodeRange()
	if err := t.checkProtection(); err != nil {
		return err
	}
	if err := t.checkRange(); err != nil {
		return err
	}
	t.InTotal = int64(t.blocks) * int64(t.info.BlockBytes)
	return t.checkTransfer()
}

// read_ is READ(6), (10), (12) and (16): piece by piece, no further than the initiator has room.
func read_(t *Task) error {
	lba := t.lba
	block := int64(t.info.BlockBytes)
	left := min(t.InTotal, (t.InLimit+block-1)/block*block)
	for left > 0 {
		n := min(left, ReadPiece)
		b, err := t.readPiece(lba, int(n))
		if err != nil {
			return err
		}
		t.give(b)
		if t.aborted.Load() {
			return errAborted
		}
		left -= n
		lba += uint64(n / block)
	}
	return nil
}

// readPiece returns the n bytes from lba on: the device's own memory where it lends it, or what it fetched, else a copy.
func (t *Task) readPiece(lba uint64, n int) (*Buffer, error) {
	if l := t.unit.lender; l != nil {
		if b := borrow(l, lba, n); b != nil {
			return b, nil
		}
	}
	if f := t.unit.fetch; f != nil {
		return fetch(t.ctx, f, lba, n)
	}
	b := GetBuffer(n)
	t.vec = append(t.vec[:0], b.B)
	if err := t.unit.dev.Read(t.ctx, lba, t.vec); err != nil {
		b.Release()
		return nil, err
	}
	return b, nil
}

// Writing.

func decodeWrite(t *Task) error {
	t.decodeRange()
	if err := t.checkProtection(); err != nil {
		return err
	}
	if err := t.checkWritable(); err != nil {
		return err
	}
	if err := t.checkRange(); err != nil {
		return err
	}
	t.OutTotal = int64(t.blocks) * int64(t.info.BlockBytes)
	return t.checkTransfer()
}

// whole cuts Out to whole blocks: an initiator that offers less than the CDB asks for gets
// written what it offered.
func (t *Task) whole() (out [][]byte, bytes int64) {
	block := int64(t.info.BlockBytes)
	bytes = t.OutWanted / block * block
	left := bytes
	t.vec = t.vec[:0]
	for _, s := range t.Out {
		s = s[:min(left, int64(len(s)))]
		if len(s) == 0 {
			break
		}
		left -= int64(len(s))
		t.vec = append(t.vec, s)
	}
	return t.vec, bytes
}

// write_ is WRITE(6), (10), (12) and (16).
func write_(t *Task) error {
	out, n := t.whole()
	if n == 0 {
		return nil
	}
	fua := t.CDB[0]>>5 != 0 && t.CDB[1]&0x08 != 0
	return t.unit.dev.Write(t.ctx, t.lba, out, fua)
}

func writeAndVerify(t *Task) error {
	if err := write_(t); err != nil {
		return err
	}
	return t.compare()
}

func decodeWriteAtomic(t *Task) error {
	t.lba, t.blocks = t.be64(2), t.be16(12)
	if t.be16(10) != 0 {
		return badCDB(10, 7) // no atomic boundary
	}
	if err := t.checkProtection(); err != nil {
		return err
	}
	if err := t.checkWritable(); err != nil {
		return err
	}
	if err := t.checkRange(); err != nil {
		return err
	}
	if t.blocks > t.atomicBlocks() || t.blocks%uint64(max(t.info.AtomicGranularityBlocks, 1)) != 0 {
		return badCDB(12, 7)
	}
	if t.lba%uint64(max(t.info.AtomicAlignmentBlocks, 1)) != 0 {
		return badCDB(2, 7)
	}
	t.OutTotal = int64(t.blocks) * int64(t.info.BlockBytes)
	return nil
}

// maxCompareBlocks is the most that COMPARE AND WRITE takes: all that its one byte can name.
const maxCompareBlocks = 255

// atomicBlocks is the most that WRITE ATOMIC takes: a multiple of the granularity, and no more than any
// command.
func (t *Task) atomicBlocks() uint64 {
	most := min(uint64(max(t.info.AtomicBlocks, 1)), t.maxTransferBlocks())
	return most - most%uint64(max(t.info.AtomicGranularityBlocks, 1))
}

// writeAtomic is WRITE ATOMIC(16) (SBC-4 5.48): a Write of which the device says that it applies it
// whole. What breaks the limits of the block limits page is INVALID FIELD IN CDB (SBC-4 4.29.2).
func writeAtomic(t *Task) error {
	if t.OutWanted < t.OutTotal {
		return badCDB(12, 7)
	}
	return write_(t)
}

// orWriteBytes is how much of an ORWRITE is applied at once, orWriteTries how often others may
// come between before the initiator is asked to try again.
const (
	orWriteBytes = 64 << 10
	orWriteTries = 100
)

// orWrite is ORWRITE(16): the blocks become the bitwise or of what they were and the data. It
// reads, computes, and has the device compare and write, so that no write of others is lost and
// no lock is held across I/O.
func orWrite(t *Task) error {
	out, _ := t.whole()
	old, next := GetBuffer(orWriteBytes), GetBuffer(orWriteBytes)
	defer old.Release()
	defer next.Release()
	lba := t.lba
	for _, s := range out {
		for len(s) > 0 {
			n := min(len(s), orWriteBytes)
			if err := t.orPiece(lba, s[:n], old.B[:n], next.B[:n]); err != nil {
				return err
			}
			lba += uint64(n) / uint64(t.info.BlockBytes)
			s = s[n:]
		}
	}
	if t.CDB[1]&0x08 != 0 && len(out) > 0 { // FUA
		return t.unit.dev.Flush(t.ctx)
	}
	return nil
}

func (t *Task) orPiece(lba uint64, data, old, next []byte) error {
	for range orWriteTries {
		if err := t.unit.dev.Read(t.ctx, lba, [][]byte{old}); err != nil {
			return err
		}
		for i := range data {
			next[i] = old[i] | data[i]
		}
		err := t.unit.dev.CompareAndWrite(t.ctx, lba, old, next)
		var miss *target.MiscompareError
		if !errors.As(err, &miss) {
			return err
		}
	}
	return target.ErrBusy
}

func decodeCompareAndWrite(t *Task) error {
	t.lba, t.blocks = t.be64(2), uint64(t.CDB[13])
	if err := t.checkProtection(); err != nil {
		return err
	}
	if err := t.checkWritable(); err != nil {
		return err
	}
	if err := t.checkRange(); err != nil {
		return err
	}
	t.OutTotal = 2 * int64(t.blocks) * int64(t.info.BlockBytes)
	if t.OutLimit != t.OutTotal {
		// Which half is to be compared would be a guess. It is also how a count of 256
		// arrives, which the field cannot hold.
		return badCDB(13, 7)
	}
	return nil
}

// compareAndWrite is COMPARE AND WRITE (SBC-3 5.2).
func compareAndWrite(t *Task) error {
	if t.blocks == 0 {
		return nil
	}
	data, err := t.list()
	if err != nil {
		return err
	}
	half := len(data) / 2
	return t.unit.dev.CompareAndWrite(t.ctx, t.lba, data[:half], data[half:])
}

// Verifying.

func decodeVerify(t *Task) error {
	t.decodeRange()
	if err := t.checkProtection(); err != nil {
		return err
	}
	if err := t.checkRange(); err != nil {
		return err
	}
	switch t.CDB[1] >> 1 & 3 {
	case 0: // the medium only
		return nil
	case 1:
		t.OutTotal = int64(t.blocks) * int64(t.info.BlockBytes)
	case 3:
		t.OutTotal = int64(t.info.BlockBytes)
		if t.blocks == 0 {
			t.OutTotal = 0
		}
	default:
		return badCDB(1, 2)
	}
	return t.checkTransfer()
}

// verify is VERIFY(10), (12) and (16).
func verify(t *Task) error {
	if t.CDB[1]>>1&3 != 0 {
		return t.compare()
	}
	block := uint64(t.info.BlockBytes)
	b := GetBuffer(ReadPiece)
	defer b.Release()
	for lba, left := t.lba, t.blocks; left > 0; {
		n := min(left, ReadPiece/block)
		t.vec = append(t.vec[:0], b.B[:n*block])
		if err := t.unit.dev.Read(t.ctx, lba, t.vec); err != nil {
			return err
		}
		if t.aborted.Load() {
			return errAborted
		}
		lba, left = lba+n, left-n
	}
	return nil
}

// compare reads the blocks and compares them with Out; BYTCHK 3 means one block for all.
func (t *Task) compare() error {
	block := int64(t.info.BlockBytes)
	same := t.op.code&0x0F == 0x0F && t.CDB[1]>>1&3 == 3
	out, _ := t.whole()
	out = append([][]byte(nil), out...)
	if same {
		if len(out) == 0 {
			return nil
		}
		for i := uint64(1); i < t.blocks; i++ {
			out = append(out, out[0])
		}
	}
	b := GetBuffer(MaxBuffer)
	defer b.Release()
	lba, offset := t.lba, int64(0)
	for _, s := range out {
		have := b.B[:len(s)]
		t.vec = append(t.vec[:0], have)
		if err := t.unit.dev.Read(t.ctx, lba, t.vec); err != nil {
			return err
		}
		if !bytes.Equal(have, s) {
			i := 0
			for have[i] == s[i] {
				i++
			}
			return &target.MiscompareError{Offset: uint64(offset + int64(i))}
		}
		lba += uint64(int64(len(s)) / block)
		offset += int64(len(s))
	}
	return nil
}

// The cache.

func decodeExtent(t *Task) error {
	t.decodeRange()
	if t.blocks == 0 && t.lba <= t.info.Blocks {
		return nil // to the end of the unit
	}
	return t.checkRange()
}

func decodeSync(t *Task) error { return decodeExtent(t) }

// preFetch is PRE-FETCH(10) and (16): there is no cache that it could fill ahead of time, so all
// is as if it were filled.
func preFetch(t *Task) error { return errConditionMet }

func synchronizeCache(t *Task) error { return t.unit.dev.Flush(t.ctx) }

// readDefectData is READ DEFECT DATA(10) and (12): a list that is empty.
func readDefectData(t *Task) error {
	if t.CDB[0] == 0x37 {
		return t.answer([]byte{0, t.CDB[2] & 0x1F, 0, 0}, t.be16(7))
	}
	return t.answer([]byte{0, t.CDB[1] & 0x1F, 0, 0, 0, 0, 0, 0}, t.be32(6))
}

// Capacity.

func readCapacity10(t *Task) error {
	last := uint64(0)
	if t.info.Blocks > 0 {
		last = min(t.info.Blocks-1, 1<<32-1)
	}
	b := binary.BigEndian.AppendUint32(t.reply[:0], uint32(last))
	b = binary.BigEndian.AppendUint32(b, t.info.BlockBytes)
	t.reply = b
	return t.answer(b, 8)
}

func readCapacity16(t *Task) error {
	last := uint64(0)
	if t.info.Blocks > 0 {
		last = t.info.Blocks - 1
	}
	b := binary.BigEndian.AppendUint64(t.reply[:0], last)
	b = binary.BigEndian.AppendUint32(b, t.info.BlockBytes)
	b = append(b, 0, t.info.PhysicalExponent&0x0F, 0, 0)
	if t.info.Thin {
		b[14] = 0xC0 // LBPME, LBPRZ
	}
	b = append(b, make([]byte, 16)...)
	t.reply = b
	return t.answer(b, t.be32(10))
}
