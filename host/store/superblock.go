package store

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sync/errgroup"

	"github.com/ledge-storage/ledge/target"
)

// superblock is the root of everything: which checkpoint, and where the journal begins. Two
// copies at 0 and 4096 of the journal LUN; the valid one with the higher seq counts. A change
// writes the older copy first and then the other, so that losing either loses nothing, and
// space that only an older superblock knew of is reused only when both copies are new. With the second it writes a third,
// in the LUN's last block, if the ring leaves it: it counts where neither of the others can be read, as when the shelf has lost the stripe that they lie in.
type superblock struct {
	uuid     [16]byte
	key      [32]byte // of the fingerprints
	seq      uint64
	epoch    uint64 // raised by each open
	jEpoch   uint64 // epoch of the records in the ring that count
	jStart   uint64 // where in the ring the first of them is
	jSeq     uint64 // its seq
	ringSize uint64
	reserved uint32 // segment numbers below may have been used
	ckptSegs uint32 // segments of the checkpoint, consecutive numbers
	ckptID   uint64
	ckptFrom uint32 // its first segment
	ckptCopy uint32 // segments of its second copy, behind the first
	logTo    uint32 // the last segment of the log that the journal was released for
}

const (
	superMagic   = "LEDGESB1"
	superVersion = 5 // 1 had no snapshots, 2 whole maps in its checkpoints, 3 CRC-32C in its records, 4 all that is written in the log's own segments; all are read, and an older program refuses what this one has opened
)

func (s *superblock) encode() []byte {
	p := make([]byte, BlockBytes)
	copy(p, superMagic)
	le.PutUint32(p[12:], superVersion)
	copy(p[16:], s.uuid[:])
	copy(p[32:], s.key[:])
	le.PutUint64(p[64:], s.seq)
	le.PutUint64(p[72:], s.epoch)
	le.PutUint64(p[80:], s.jEpoch)
	le.PutUint64(p[88:], s.jStart)
	le.PutUint64(p[96:], s.jSeq)
	le.PutUint64(p[104:], s.ringSize)
	le.PutUint32(p[112:], s.reserved)
	le.PutUint32(p[116:], s.ckptSegs)
	le.PutUint64(p[120:], s.ckptID)
	le.PutUint32(p[128:], s.ckptFrom)
	le.PutUint32(p[132:], s.ckptCopy)
	le.PutUint32(p[136:], s.logTo)
	le.PutUint32(p[8:], crc(p[12:]))
	return p
}

func decodeSuperblock(p []byte) (superblock, error) {
	var s superblock
	if len(p) != BlockBytes || string(p[:8]) != superMagic || le.Uint32(p[8:]) != crc(p[12:]) {
		return s, fmt.Errorf("superblock: %w", ErrCorrupt)
	}
	if v := le.Uint32(p[12:]); v < 1 || v > superVersion {
		return s, fmt.Errorf("superblock version %d: %w", v, ErrVersion)
	}
	copy(s.uuid[:], p[16:])
	copy(s.key[:], p[32:])
	s.seq = le.Uint64(p[64:])
	s.epoch = le.Uint64(p[72:])
	s.jEpoch = le.Uint64(p[80:])
	s.jStart = le.Uint64(p[88:])
	s.jSeq = le.Uint64(p[96:])
	s.ringSize = le.Uint64(p[104:])
	s.reserved = le.Uint32(p[112:])
	s.ckptSegs = le.Uint32(p[116:])
	s.ckptID = le.Uint64(p[120:])
	s.ckptFrom = le.Uint32(p[128:])
	s.ckptCopy = le.Uint32(p[132:])
	s.logTo = le.Uint32(p[136:])
	if !isZero(p[140:]) || s.ringSize%BlockBytes != 0 || s.jStart%BlockBytes != 0 || s.jStart >= s.ringSize ||
		s.reserved == 0 || s.reserved > maxSegments || uint64(s.ckptFrom)+uint64(s.ckptSegs)+uint64(s.ckptCopy) > uint64(s.reserved) ||
		s.ckptCopy > 0 && s.ckptSegs == 0 || s.logTo >= s.reserved || s.ckptSegs > 0 && s.ckptFrom == 0 || s.jEpoch > s.epoch {
		return s, fmt.Errorf("superblock fields: %w", ErrCorrupt)
	}
	return s, nil
}

// readSuper returns the superblock that counts. blank: neither copy was ever written.
func readSuper(ctx context.Context, dev Device) (best superblock, blank bool, err error) {
	p := make([]byte, ringOffset)
	err = dev.ReadAt(ctx, p, 0)
	blank = err == nil && isZero(p)
	copyAt := func(off int64) (s superblock, err error) {
		b := p[:BlockBytes]
		if err := dev.ReadAt(ctx, b, off); err != nil {
			return s, fmt.Errorf("store: read superblock at %d: %w", off, err)
		}
		return decodeSuperblock(b)
	}
	switch {
	case blank:
		return best, true, nil
	case err != nil && !errors.Is(err, target.ErrMediumRead):
		return best, false, fmt.Errorf("store: read superblocks: %w", err)
	}
	a, errA := copyAt(0)
	b, errB := copyAt(BlockBytes)
	for _, err := range []error{errA, errB} { // an error that may go away says nothing about which of them counts
		if err != nil && !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrVersion) && !errors.Is(err, target.ErrMediumRead) {
			return best, false, err
		}
	}
	switch {
	case errA == nil && errB == nil && a.uuid != b.uuid:
		return best, false, fmt.Errorf("store: superblocks of two stores: %w", ErrForeign)
	case errA == nil && (errB != nil || a.seq >= b.seq):
		return a, false, nil
	case errB == nil:
		return b, false, nil
	case errors.Is(errA, target.ErrMediumRead) && errors.Is(errB, target.ErrMediumRead): // what can be read and is none may be another's
		if c, err := copyAt(thirdSuper(dev)); err == nil {
			return c, false, nil
		}
	}
	return best, false, fmt.Errorf("store: the journal LUN holds no superblock and is not blank (%w): %w", errA, ErrForeign)
}

// thirdSuper is where the third copy lies, if the ring ends before.
func thirdSuper(dev Device) int64 { return dev.Size()/BlockBytes*BlockBytes - BlockBytes }

func ringBytes(dev Device) uint64 { return uint64(thirdSuper(dev) - ringOffset) }

// writeSuper changes the superblock by f and returns when both copies are durable. Callers take
// turns; each first looks whether another host has opened the store since.
func (st *Store) writeSuper(ctx context.Context, f func(*superblock)) error {
	select {
	case st.superTurn <- struct{}{}:
		defer func() { <-st.superTurn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	found, blank, err := readSuper(ctx, st.opt.Journal)
	if err != nil {
		return err
	}
	if blank || found.uuid != st.super.uuid || found.epoch > st.super.epoch || found.seq > st.super.seq {
		return fmt.Errorf("store: superblock of epoch %d found, ours is %d: %w", found.epoch, st.super.epoch, ErrFenced)
	}
	s := st.super
	f(&s)
	for i := range 2 {
		s.seq++
		p := s.encode()
		g, ctx := errgroup.WithContext(ctx)
		write := func(off int64) {
			g.Go(func() error { return st.opt.Journal.WriteAt(ctx, p, off) })
		}
		write(int64(s.seq%2) * BlockBytes)
		if i == 1 && s.ringSize <= ringBytes(st.opt.Journal) {
			write(thirdSuper(st.opt.Journal))
		}
		if err := g.Wait(); err != nil {
			return fmt.Errorf("store: write superblock seq %d: %w", s.seq, err)
		}
		st.super = s
	}
	return nil
}
