package scsi

import (
	"github.com/ledge-storage/ledge/target"
)

// transferStepBytes is how much a device copies by itself between two looks at whether it still may.
const transferStepBytes = 16 << 20

// extent is a range that a copy reads or writes.
type extent struct {
	unit *unit
	lba  uint64
}

// transfer copies blocks from one unit to another, or within one: by the destination's own means
// where it has some (target.Copier), else a piece at a time through memory. Where the ranges overlap
// upwards it begins at the end.
//
// still, where not nil, says whether what is read may yet be used. It is asked between reading a piece
// and writing it, so that nothing is written that was read too late; a device that copies by itself
// is asked before and after each step, whose destination is undefined where the answer is an error.
func (o *copyOp) transfer(from, to extent, blocks uint64, still func() error) error {
	if blocks == 0 {
		return nil
	}
	for _, e := range []extent{from, to} {
		if i := e.unit.dev.Info(); e.lba > i.Blocks || blocks > i.Blocks-e.lba {
			return &sense{key: keyCopyAborted, code: ascNone}
		}
	}
	source, err := from.unit.enterVisit(o, false, from.lba, blocks)
	if err != nil {
		return err
	}
	defer source.leave()
	destination, err := to.unit.enterVisit(o, true, to.lba, blocks)
	if err != nil {
		return err
	}
	defer destination.leave()
	t := transfer{op: o, from: from, to: to, still: still, size: uint64(to.unit.dev.Info().BlockBytes)}
	t.copier, _ = to.unit.dev.(target.Copier)
	backwards := from.unit.dev.Info().UUID == to.unit.dev.Info().UUID && to.lba > from.lba
	for done := uint64(0); done < blocks; {
		if err := o.ctx.Err(); err != nil {
			return err
		}
		for _, v := range []*visit{source, destination} {
			if err := v.check(); err != nil {
				return err
			}
		}
		n := min(t.step(), blocks-done)
		at := done
		if backwards {
			at = blocks - done - n
		}
		moved, err := t.piece(at, n)
		if err != nil {
			return err
		}
		if moved {
			done += n
			o.advance(n, t.size)
		}
	}
	if to.unit.pool != nil {
		to.unit.checkThreshold()
	}
	return nil
}

// advance counts n blocks in the units of the operation.
func (o *copyOp) advance(n, size uint64) {
	if o.units == countBlocks {
		o.add(n)
	} else {
		o.add(n * size)
	}
}

type transfer struct {
	op       *copyOp
	from, to extent
	still    func() error
	size     uint64
	copier   target.Copier
}

func (t *transfer) step() uint64 {
	if t.copier != nil {
		return transferStepBytes / t.size
	}
	return MaxBuffer / t.size
}

// piece copies n blocks from offset at on. It returns false where a device refused to do so by itself:
// the same is then to be done through memory.
func (t *transfer) piece(at, n uint64) (moved bool, err error) {
	ctx := t.op.ctx
	if t.copier != nil {
		if err := t.valid(); err != nil {
			return false, err
		}
		done, err := t.copier.CopyFrom(ctx, t.from.unit.dev, t.from.lba+at, t.to.lba+at, n)
		if err != nil {
			return false, err
		}
		if !done {
			t.copier = nil
			return false, nil
		}
		return true, t.valid()
	}
	b := GetBuffer(int(n * t.size))
	defer b.Release()
	v := [][]byte{b.B}
	if err := t.from.unit.dev.Read(ctx, t.from.lba+at, v); err != nil {
		return false, err
	}
	if err := t.valid(); err != nil {
		return false, err
	}
	return true, t.to.unit.dev.Write(ctx, t.to.lba+at, v, false)
}

func (t *transfer) valid() error {
	if t.still == nil {
		return nil
	}
	return t.still()
}
