package shelf

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/raid"
)

// Start-up and takeover:
//
//	1. updates   every source, then the log: all redo images are applied in order, and flushed. Now each stripe
//	             that may be read is consistent, those of the metadata too.
//	2. metadata  superblock, LUN and host records, extent table are read from the members.
//	3. changes   every source, then the log, once more: blocks go into the overlay, newest last; changes of
//	             the records and the map are made again. Both are right from any starting point: the members may
//	             be ahead of the log (destaged, not trimmed), never behind it.
//	4. numbers   a new generation ceiling is logged, before a generation below it is used.
//	5. takeover  when there were sources, everything is destaged and flushed, and nothing trimmed from the own log
//	             until ReleaseSources: until the label says that the sources are done with, a crash must
//	             find the same sources and a log that goes with them.
//
// All steps can be cut short and done again: 1 and 5 write what they would write again, 2 and 3 only read.

// generationStep is how many generations a run of the pool may use: more than it can write stripes.
const generationStep = 1 << 40

// OpenPool replays the sources, then the log, and opens the pool of the array. ErrNoPool when there is none;
// ErrMetadataLost when it cannot be read.
func OpenPool(ctx context.Context, array Array, log Log, sources []Source, o Options) (*Pool, error) {
	if err := o.Maintenance.Rates.check(); err != nil {
		return nil, fmt.Errorf("shelf: open pool: %w", err)
	}
	p := newPool(array, log, o)
	p.holdTrim = len(sources) > 0
	if err := p.open(ctx, append(slices.Clone(sources), log)); err != nil {
		p.Abort()
		return nil, fmt.Errorf("shelf: open pool: %w", err)
	}
	if !p.opts.Inline {
		p.wg.Add(2)
		go p.destager()
		go p.reaper()
		if p.keeper = p.newMaintainer(); p.keeper != nil {
			p.wg.Add(1)
			go p.keeper.run()
		}
	}
	return p, nil
}

func (p *Pool) open(ctx context.Context, sources []Source) error {
	lastUpdate, err := p.replayUpdates(ctx, sources)
	if err != nil {
		return err
	}
	if err := p.acceptOld(ctx, func(stripe uint64) bool { return stripe == 0 }); err != nil {
		return err
	}
	if err := p.loadSuperblock(ctx); err != nil {
		return err
	}
	if err := p.acceptOld(ctx, func(stripe uint64) bool { _, ok := p.sb.metaOf(stripe); return ok }); err != nil {
		return err
	}
	if err := p.fitLog(); err != nil {
		return err
	}
	if err := p.loadMetadata(ctx); err != nil {
		return err
	}
	r := replayer{p: p, blocks: map[extentKey]map[int]*entry{}, meta: map[uint32]uint64{}}
	for _, s := range sources {
		if err := s.Replay(r.set); err != nil {
			return err
		}
	}
	if err := r.finish(); err != nil {
		return err
	}
	if lastUpdate > 0 {
		p.log.TrimUpdates(lastUpdate + 1)
	}
	if err := p.raiseCeiling(); err != nil {
		return err
	}
	if p.holdTrim {
		if err := p.drain(ctx, needAll, nil); err != nil {
			return err
		}
	}
	p.trim()
	return nil
}

// acceptOld does what Options.AcceptOld says to some stripes.
func (p *Pool) acceptOld(ctx context.Context, which func(stripe uint64) bool) error {
	if !p.opts.AcceptOld {
		return nil
	}
	a, ok := p.array.(interface {
		ScrubAll(ctx context.Context, o raid.ScrubOptions) (raid.ScrubReport, error)
	})
	if !ok {
		return fmt.Errorf("accept what was being changed: an array without a scrub: %w", errors.ErrUnsupported)
	}
	r, err := a.ScrubAll(ctx, raid.ScrubOptions{Used: which, AcceptOld: true, Valid: p.validMetadata})
	if err == nil && r.Repaired > 0 {
		p.opts.Logger.Warn("metadata: stripes that were being changed when the log was lost are taken as they are", "strips", r.Repaired)
	}
	return err
}

// validMetadata tells whether a block of a metadata stripe is one by its own checksum and number. Zeros are an empty record; where there
// may be none, in the extent table, loadBlock says so; and there is always a superblock.
func (p *Pool) validMetadata(stripe uint64, block int, data []byte) bool {
	if bytes.Equal(data, zeroBlock) {
		return stripe > 0 || block > 0
	}
	first := uint32(0) // of stripe 0, also before the superblock was read
	if stripe > 0 {
		n, ok := p.sb.metaOf(stripe)
		if !ok {
			return false
		}
		first = n * uint32(p.sb.stripeBlocks())
	}
	_, err := unseal(data, string(data[:4]), first+uint32(block))
	return err == nil
}

// replayUpdates applies all redo images.
func (p *Pool) replayUpdates(ctx context.Context, sources []Source) (last uint64, err error) {
	apply := func(lsn uint64, s nvram.Set) error {
		p.stats.Replayed++
		if s.Kind != setUpdate {
			return nil
		}
		u, err := raid.DecodeUpdate(s.Payload)
		if err != nil {
			return fmt.Errorf("lsn %d: stripe update: %w", lsn, err)
		}
		defer u.Release()
		if err := p.array.Apply(ctx, u); err != nil {
			return fmt.Errorf("lsn %d: apply update of stripe %d: %w", lsn, u.Stripe(), err)
		}
		p.stats.ReplayedUpdates++
		last = max(last, lsn)
		return nil
	}
	for _, s := range sources {
		if err := s.Replay(apply); err != nil {
			return 0, err
		}
	}
	if last > 0 {
		err = p.array.Flush(ctx)
	}
	return last, err
}

func (p *Pool) loadSuperblock(ctx context.Context) error {
	b := nvram.AlignedBlocks(1)
	if err := p.array.Read(ctx, 0, 0, [][]byte{b}); err != nil {
		switch {
		case errors.Is(err, raid.ErrUnwritten):
			return fmt.Errorf("%w: %w", ErrNoPool, err)
		case errors.Is(err, raid.ErrUnrecoverable):
			return p.metadataLost(0, 1, err)
		}
		return err
	}
	sb, err := decodeSuperblock(b)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNoPool, err)
	}
	if want := p.opts.PoolUUID; want != ([16]byte{}) && want != sb.UUID {
		return fmt.Errorf("%w: %x, want %x", ErrForeign, sb.UUID, want)
	}
	p.sb = sb
	if err := p.checkStripes(); err != nil {
		return err
	}
	p.table = newExtentTable(&p.sb)
	p.over = newOverlay(&p.sb, &p.refs)
	p.hosts = make([]Host, sb.MaxHosts)
	p.reservations = make([]reservationBlock, sb.Reservations)
	return nil
}

// fitLog fits the limits to the log, or says that it is too small.
func (p *Pool) fitLog() error {
	s := p.log.Stats()
	o := &p.opts
	o.PieceBlocks = min(max(o.PieceBlocks, p.sb.stripeBlocks()), p.log.MaxAppendBlocks()-overheadBlocks)
	if o.OverlayBlocks == 0 {
		o.OverlayBlocks = int(2 * s.Bytes / blockBytes)
	}
	need := int64(2*(p.sb.stripeBlocks()+overheadBlocks)) * blockBytes
	switch {
	case o.PieceBlocks < p.sb.stripeBlocks() || need > s.Bytes-s.Reserve:
		return fmt.Errorf("%w: %d bytes for writes, stripes of %d blocks", ErrLogSize, s.Bytes-s.Reserve, p.sb.stripeBlocks())
	case min(s.UpdateBytes/4/blockBytes, int64(p.log.MaxUpdateBlocks())) < int64(p.updateBlocks(1)):
		return fmt.Errorf("%w: %d bytes for stripe updates", ErrLogSize, s.UpdateBytes)
	}
	for 2*int64(o.PieceBlocks+overheadBlocks)*blockBytes > s.Bytes-s.Reserve {
		o.PieceBlocks = max(o.PieceBlocks/2, p.sb.stripeBlocks())
	}
	o.OverlayBlocks = max(o.OverlayBlocks, 2*o.PieceBlocks)
	return nil
}

// loadMetadata reads the records and the extent table as the members have them: whole stripes, several at a time.
// The table is decoded where it is read, each block into entries of its own; the records one stripe after the other.
func (p *Pool) loadMetadata(ctx context.Context) error {
	if err := p.loadBlocks(ctx, 0, p.sb.tableBlock()+p.sb.tableBlocks()); err != nil {
		return err
	}
	for i := 1; i <= p.sb.growths; i++ {
		r := &p.sb.regions[i]
		if err := p.loadBlocks(ctx, r.block, r.block+r.blocks()); err != nil {
			return err
		}
	}
	return nil
}

// loadBlocks reads the metadata blocks from first, the first of a stripe, to end.
func (p *Pool) loadBlocks(ctx context.Context, first, end uint32) error {
	n := uint32(p.sb.stripeBlocks())
	table := p.sb.tableBlock()
	bufs := sync.Pool{New: func() any { return nvram.AlignedBlocks(int(n)) }}
	var records sync.Mutex
	return inParallel(p.loadWorkers(), int((end-first+n-1)/n), func(i int) error {
		buf := bufs.Get().([]byte)
		defer bufs.Put(buf)
		first := first + uint32(i)*n
		count := min(n, end-first)
		if err := p.array.Read(ctx, p.sb.metaStripe(first/n), 0, [][]byte{buf[:count*blockBytes]}); err != nil {
			if errors.Is(err, raid.ErrUnrecoverable) {
				return p.metadataLost(first, count, err)
			}
			return fmt.Errorf("metadata: %w", err)
		}
		if first < table {
			records.Lock()
			defer records.Unlock()
		}
		for i := range count {
			if err := p.loadBlock(first+i, buf[i*blockBytes:][:blockBytes]); err != nil {
				return err
			}
		}
		return nil
	})
}

// loadWorkers is how many stripes are read at a time at start-up: enough to keep all members busy, and 8 MiB
// or so of buffers.
func (p *Pool) loadWorkers() int {
	if p.opts.Inline {
		return 1
	}
	return 8
}

// inParallel calls f for 0 to n-1, in order when workers is 1, and returns the error of the lowest that failed. After
// an error no new call starts.
func inParallel(workers, n int, f func(i int) error) error {
	if workers <= 1 || n <= 1 {
		for i := range n {
			if err := f(i); err != nil {
				return err
			}
		}
		return nil
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	next, failed, first := 0, n, error(nil)
	for range min(workers, n) {
		wg.Go(func() {
			for {
				mu.Lock()
				i := next
				next++
				stop := first != nil
				mu.Unlock()
				if stop || i >= n {
					return
				}
				if err := f(i); err != nil {
					mu.Lock()
					if i < failed {
						failed, first = i, err
					}
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	return first
}

// loadBlock takes in a metadata block, from the members or from the log.
func (p *Pool) loadBlock(block uint32, b []byte) error {
	empty := bytes.Equal(b, zeroBlock)
	switch sb := &p.sb; {
	case block == 0:
		s, err := decodeSuperblock(b)
		if err != nil {
			return err
		}
		if s.UUID != sb.UUID || s.Stripes != sb.Stripes {
			return fmt.Errorf("%w: superblock of pool %x", ErrForeign, s.UUID)
		}
		sb.GenCeiling, sb.WarnPercent, sb.Scrub = max(sb.GenCeiling, s.GenCeiling), s.WarnPercent, s.Scrub
		return p.takeGrowths(&s)
	case block < sb.hostBlock():
		if empty {
			delete(p.luns, block)
			return nil
		}
		r, err := decodeLUN(b, block)
		if err != nil {
			return err
		}
		if l := p.luns[block]; l != nil {
			l.rec = r
			return nil
		}
		p.luns[block] = &LUN{p: p, id: block, rec: r}
	case block < sb.reservationBlock():
		h := Host{}
		if !empty {
			var err error
			if h, err = decodeHost(b, block); err != nil {
				return err
			}
		}
		p.hosts[block-sb.hostBlock()] = h
	case block < sb.tableBlock():
		r := reservationBlock{}
		if !empty {
			var err error
			if r, err = decodeReservation(b, block); err != nil {
				return err
			}
		}
		p.reservations[block-sb.reservationBlock()] = r
	default:
		entries, ok := p.table.block(block)
		if !ok {
			return fmt.Errorf("%w: metadata block %d", ErrCorrupt, block)
		}
		if empty && p.opts.AcceptOld {
			return p.metadataLost(block, 1, fmt.Errorf("%w: zeros in the extent table", ErrCorrupt))
		}
		return decodeTable(b, block, entries)
	}
	return nil
}

// replayer collects what the log says.
type replayer struct {
	p      *Pool
	blocks map[extentKey]map[int]*entry
	// meta are the metadata blocks that changed, with the lowest LSN that did it.
	meta map[uint32]uint64
}

func (r *replayer) set(lsn uint64, s nvram.Set) error {
	p := r.p
	p.maxLSN = max(p.maxLSN, lsn)
	var err error
	switch s.Kind {
	case setData:
		err = r.data(lsn, s)
	case setMap:
		err = r.deltas(lsn, s)
	case setMeta:
		if len(s.Extents) != 1 || len(s.Payload) != 1 || len(s.Payload[0]) != blockBytes {
			return fmt.Errorf("lsn %d: %w: metadata set", lsn, ErrCorrupt)
		}
		block := uint32(s.Extents[0].LBA)
		r.touch(block, lsn)
		err = p.loadBlock(block, s.Payload[0])
	case setUpdate:
	default:
		err = fmt.Errorf("%w: set of kind %d", ErrCorrupt, s.Kind)
	}
	if err != nil {
		return fmt.Errorf("lsn %d: %w", lsn, err)
	}
	return nil
}

func (r *replayer) touch(block uint32, lsn uint64) {
	if old, ok := r.meta[block]; !ok || lsn < old {
		r.meta[block] = lsn
	}
}

func (r *replayer) data(lsn uint64, s nvram.Set) error {
	eb := uint64(r.p.sb.ExtentBlocks)
	payload := flatten(s.Payload)
	for _, x := range s.Extents {
		for i := range uint64(x.Blocks) {
			e := &entry{lsn: lsn}
			if !x.Zero {
				if len(payload) == 0 {
					return fmt.Errorf("%w: set without its payload", ErrCorrupt)
				}
				e.data = bytes.Clone(payload[0])
				payload = payload[1:]
			}
			lba := x.LBA + i
			k := extentKey{x.LUN, uint32(lba / eb)}
			if r.blocks[k] == nil {
				r.blocks[k] = map[int]*entry{}
			}
			r.blocks[k][int(lba%eb)] = e
		}
	}
	return nil
}

func flatten(bufs [][]byte) [][]byte {
	var blocks [][]byte
	for _, b := range bufs {
		for ; len(b) >= blockBytes; b = b[blockBytes:] {
			blocks = append(blocks, b[:blockBytes])
		}
	}
	return blocks
}

func (r *replayer) deltas(lsn uint64, s nvram.Set) error {
	t := r.p.table
	for _, b := range flatten(s.Payload) {
		db, err := decodeDeltas(b)
		if err != nil {
			return err
		}
		for i := range db.deltas {
			d := &db.deltas[i]
			if n := r.p.sb.extents(); d.extent >= n {
				return fmt.Errorf("%w: delta of extent %d of %d", ErrCorrupt, d.extent, n)
			}
			t.alter(d)
			// Also when the members were ahead: their copy may not have been flushed.
			r.touch(t.tableBlock(d.extent), lsn)
			if d.op == opFree {
				delete(r.blocks, extentKey{d.lun, d.ext})
			}
		}
	}
	return nil
}

// finish builds the maps and the overlay from what was collected.
func (r *replayer) finish() error {
	p := r.p
	p.maxLSN = max(p.maxLSN, p.log.Stats().Next-1)
	if err := p.table.build(p.loadWorkers()); err != nil {
		return fmt.Errorf("extent table: %w", err)
	}
	p.strayReservations()
	keys := slices.SortedFunc(maps.Keys(r.blocks), func(a, b extentKey) int {
		return cmp.Or(cmp.Compare(a.lun, b.lun), cmp.Compare(a.ext, b.ext))
	})
	for _, k := range keys {
		if _, ok := p.table.lookup(k); !ok {
			return fmt.Errorf("%w: the log has blocks of extent %d of LUN %d, which is not mapped", ErrCorrupt, k.ext, k.lun)
		}
		for _, b := range slices.Sorted(maps.Keys(r.blocks[k])) {
			e := r.blocks[k][b]
			p.over.put(k, b, e.data, e.lsn)
		}
	}
	for _, b := range slices.Sorted(maps.Keys(r.meta)) {
		p.over.touch(b, r.meta[b])
	}
	return nil
}

// raiseCeiling makes generations for this run: all of earlier runs are below the old ceiling.
func (p *Pool) raiseCeiling() error {
	p.gen = p.sb.GenCeiling
	next := p.sb
	next.GenCeiling += generationStep
	set := nvram.Set{Kind: setMeta, Extents: []nvram.Extent{{LUN: 0, Blocks: 1, LBA: 0}}, Payload: [][]byte{next.encode()}}
	return p.append(func(lsn uint64) {
		p.sb.GenCeiling = next.GenCeiling
		p.over.touch(0, lsn)
	}, set)
}
