package shelf

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/target"
)

// Kind says what a LUN is for. The numbers are on the media.
type Kind uint8

const (
	// KindPlain: any initiator's disk.
	KindPlain Kind = 1
	// KindJournal: a host's circular log. It behaves as a plain one; overwritten before it is destaged, it
	// lives mostly in NVRAM.
	KindJournal Kind = 2
	// KindStore: written once, in whole stripes; freed by UNMAP of whole extents.
	KindStore Kind = 3
)

func (k Kind) String() string {
	switch k {
	case KindPlain:
		return "plain"
	case KindJournal:
		return "journal"
	case KindStore:
		return "store"
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// ParseKind is the inverse of String.
func ParseKind(s string) (Kind, bool) {
	for k := KindPlain; k <= KindStore; k++ {
		if k.String() == s {
			return k, true
		}
	}
	return 0, false
}

// LUNSpec describes a LUN to be made.
type LUNSpec struct {
	Name  string
	Kind  Kind
	Bytes int64
	// BlockBytes is 512 (only plain LUNs) or 4096. [plain: 512; else 4096]
	BlockBytes uint32
}

// LUNInfo describes a LUN.
type LUNInfo struct {
	ID                        uint32
	Name                      string
	Kind                      Kind
	UUID                      [16]byte
	SizeBytes, AllocatedBytes int64
	BlockBytes                uint32
}

// LUN is a logical unit of a pool.
type LUN struct {
	p    *Pool
	id   uint32
	rec  lunRecord // guarded by p.mu
	lock rangeLock
}

// ID is 1 to MaxLUNs: a good LUN number.
func (l *LUN) ID() uint32 { return l.id }

// Device returns the LUN as the engines see it.
func (l *LUN) Device() target.Device { return device{l} }

func (l *LUN) record() lunRecord {
	l.p.mu.Lock()
	defer l.p.mu.Unlock()
	return l.rec
}

// Info describes the LUN.
func (l *LUN) Info() LUNInfo {
	l.p.mu.Lock()
	defer l.p.mu.Unlock()
	r := &l.rec
	i := LUNInfo{ID: l.id, Name: r.Name, Kind: r.Kind, UUID: r.UUID, SizeBytes: int64(r.Blocks) * blockBytes, BlockBytes: r.BlockBytes}
	if m := l.p.table.luns[l.id]; m != nil {
		i.AllocatedBytes = int64(m.used) * int64(l.p.sb.ExtentBlocks) * blockBytes
	}
	return i
}

// LUNs returns the LUNs by id, without those being deleted.
func (p *Pool) LUNs() []*LUN {
	p.mu.Lock()
	defer p.mu.Unlock()
	var ls []*LUN
	for _, l := range p.luns {
		if l.rec.State == lunLive {
			ls = append(ls, l)
		}
	}
	slices.SortFunc(ls, func(a, b *LUN) int { return cmp.Compare(a.id, b.id) })
	return ls
}

// LUN finds a LUN by name.
func (p *Pool) LUN(name string) (*LUN, bool) {
	for _, l := range p.LUNs() {
		if l.record().Name == name {
			return l, true
		}
	}
	return nil, false
}

// CreateLUN makes a LUN, durably. ErrExists, ErrName, ErrSize, ErrLimit.
func (p *Pool) CreateLUN(ctx context.Context, spec LUNSpec) (*LUN, error) {
	if err := p.admin.take(ctx); err != nil {
		return nil, err
	}
	defer p.admin.give()
	if spec.BlockBytes == 0 {
		spec.BlockBytes = blockBytes
		if spec.Kind == KindPlain {
			spec.BlockBytes = 512
		}
	}
	r := lunRecord{Blocks: uint64(spec.Bytes) / blockBytes, BlockBytes: spec.BlockBytes, Kind: spec.Kind, State: lunLive, Name: spec.Name}
	if err := checkName(spec.Name, maxName); err != nil {
		return nil, fmt.Errorf("shelf: create LUN: %w", err)
	}
	if err := r.validate(); err != nil || spec.Bytes < 0 || spec.Bytes%blockBytes != 0 || p.extentsOf(r.Blocks) > math.MaxUint32 {
		return nil, fmt.Errorf("shelf: create LUN %s: %w: %s LUN of %d bytes in %d-byte blocks", spec.Name, ErrSize, spec.Kind, spec.Bytes, spec.BlockBytes)
	}
	p.mu.Lock()
	for id := uint32(1); id <= p.sb.MaxLUNs && r.ID == 0; id++ {
		if p.luns[id] == nil {
			r.ID = id
		}
	}
	exists := false
	for _, l := range p.luns {
		exists = exists || l.rec.Name == spec.Name && l.rec.State == lunLive
	}
	p.mu.Unlock()
	switch {
	case exists:
		return nil, fmt.Errorf("shelf: create LUN %s: %w", spec.Name, ErrExists)
	case r.ID == 0:
		return nil, fmt.Errorf("shelf: create LUN %s: %w", spec.Name, ErrLimit)
	}
	p.opts.Random(r.UUID[:])
	r.UUID[6], r.UUID[8] = r.UUID[6]&0x0f|0x40, r.UUID[8]&0x3f|0x80 // version 4, RFC 9562
	l := &LUN{p: p, id: r.ID, rec: r}
	err := p.logBlock(ctx, r.ID, r.encode(), func() { p.luns[r.ID] = l })
	if err != nil {
		return nil, fmt.Errorf("shelf: create LUN %s: %w", spec.Name, err)
	}
	return l, nil
}

func (p *Pool) extentsOf(blocks uint64) uint64 {
	return (blocks + uint64(p.sb.ExtentBlocks) - 1) / uint64(p.sb.ExtentBlocks)
}

// ResizeLUN grows a LUN. It never shrinks one (ErrSize): data would be lost at a slip of the keyboard.
func (p *Pool) ResizeLUN(ctx context.Context, name string, bytes int64) error {
	if err := p.admin.take(ctx); err != nil {
		return err
	}
	defer p.admin.give()
	l, ok := p.LUN(name)
	if !ok {
		return fmt.Errorf("shelf: resize LUN %s: %w", name, ErrNotFound)
	}
	r := l.record()
	if bytes < int64(r.Blocks)*blockBytes || bytes%blockBytes != 0 || bytes/blockBytes > maxLUNBlocks || p.extentsOf(uint64(bytes/blockBytes)) > math.MaxUint32 {
		return fmt.Errorf("shelf: resize LUN %s to %d bytes: %w", name, bytes, ErrSize)
	}
	r.Blocks = uint64(bytes) / blockBytes
	return p.logBlock(ctx, r.ID, r.encode(), func() { l.rec = r })
}

// metaBlock is a metadata block's next content.
type metaBlock struct {
	block uint32
	data  []byte
}

// logBlock logs a metadata block and, when it is durable, makes the change that it describes.
func (p *Pool) logBlock(ctx context.Context, block uint32, data []byte, change func()) error {
	return p.logBlocks(ctx, []metaBlock{{block, data}}, change)
}

// logBlocks does the same with blocks that change together.
func (p *Pool) logBlocks(ctx context.Context, blocks []metaBlock, change func()) error {
	if err := p.admit(ctx, len(blocks), len(blocks)); err != nil {
		return err
	}
	defer p.release(len(blocks))
	sets := make([]nvram.Set, len(blocks))
	for i, b := range blocks {
		sets[i] = nvram.Set{Kind: setMeta, Extents: []nvram.Extent{{LUN: 0, Blocks: 1, LBA: uint64(b.block)}}, Payload: [][]byte{b.data}}
	}
	return p.append(func(lsn uint64) {
		change()
		for _, b := range blocks {
			p.over.touch(b.block, lsn)
		}
	}, sets...)
}

// DeleteLUN marks a LUN for deletion, durably, and returns; its extents are freed in the background, also
// after a restart. Its I/O gets ErrUnavailable.
func (p *Pool) DeleteLUN(ctx context.Context, name string) error {
	if err := p.admin.take(ctx); err != nil {
		return err
	}
	defer p.admin.give()
	l, ok := p.LUN(name)
	if !ok {
		return fmt.Errorf("shelf: delete LUN %s: %w", name, ErrNotFound)
	}
	r := l.record()
	r.State = lunDeleting
	if err := p.logBlock(ctx, r.ID, r.encode(), func() { l.rec = r }); err != nil {
		return fmt.Errorf("shelf: delete LUN %s: %w", name, err)
	}
	if p.opts.Inline {
		return p.reap(ctx, l)
	}
	select {
	case p.reapCh <- struct{}{}:
	default:
	}
	return nil
}

// reaper finishes deletions until the pool stops.
func (p *Pool) reaper() {
	defer p.wg.Done()
	for {
		for _, l := range p.condemned() {
			if err := p.reap(p.ctx, l); err != nil {
				if p.Err() == nil && !errors.Is(err, target.ErrTransition) {
					p.opts.Logger.Error("delete LUN", "lun", l.id, "err", err)
				}
				return
			}
		}
		select {
		case <-p.reapCh:
		case <-p.ctx.Done():
			return
		}
	}
}

func (p *Pool) condemned() []*LUN {
	p.mu.Lock()
	defer p.mu.Unlock()
	var ls []*LUN
	for _, l := range p.luns {
		if l.rec.State == lunDeleting {
			ls = append(ls, l)
		}
	}
	slices.SortFunc(ls, func(a, b *LUN) int { return cmp.Compare(a.id, b.id) })
	return ls
}

// reap frees a condemned LUN's extents, a delta block at a time, then its record, so that its id can be
// used again only when nothing of it is left.
func (p *Pool) reap(ctx context.Context, l *LUN) error {
	c, err := l.lock.lock(ctx, 0, math.MaxUint64, accessLong) // the commands that it was doing
	if err != nil {
		return err
	}
	defer l.lock.unlock(c)
	for {
		keys := p.extentsFrom(l.id, 0, math.MaxUint32, maxDeltas)
		if len(keys) == 0 {
			break
		}
		if err := p.free(ctx, keys); err != nil {
			return err
		}
	}
	// With its reservations: they must not meet the next LUN of this id.
	gone := []metaBlock{{l.id, zeroBlock}}
	_, reserved, _ := p.placeReservations(l.id, 0)
	for _, at := range reserved {
		gone = append(gone, metaBlock{p.sb.reservationBlock() + uint32(at), zeroBlock})
	}
	return p.logBlocks(ctx, gone, func() {
		delete(p.luns, l.id)
		for _, at := range reserved {
			p.reservations[at] = reservationBlock{}
		}
	})
}

// checkName: printable ASCII without spaces, as initiators and shells want it.
func checkName(s string, most int) error {
	if s == "" || len(s) > most {
		return fmt.Errorf("%w: %d characters, 1 to %d allowed", ErrName, len(s), most)
	}
	for _, c := range []byte(s) {
		if c <= ' ' || c > '~' {
			return fmt.Errorf("%w: %q", ErrName, s)
		}
	}
	return nil
}
