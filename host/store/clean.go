package store

import (
	"cmp"
	"context"
	"errors"
	"slices"

	"github.com/ledge-storage/ledge/host/dedup"
)

// Cleaning turns segments of which little is referenced into free ones: what is referenced moves to
// the open segment, and the next checkpoint finds the old one without references. The maps themselves
// are looked through for references, so that counts alone never decide what is kept.

const (
	mostMoved      = 1 << 13 // blocks moved by one pass: fewer than the spare segments take, and the packer does nothing else meanwhile
	deadWorthIt    = 16      // segments without references that are worth a checkpoint
	victimPercent  = 80      // of a segment in use, above which it is left alone
	garbagePercent = 30      // of all segments' bytes not in use, above which cleaning is due
	fullPercent    = 80      // of the capacity allocated, above which cleaning is due
)

// maintain is called by the packer after each step.
func (st *Store) maintain(ctx context.Context) error {
	st.mu.Lock()
	if len(st.dying) > 0 && !st.discardSome() {
		st.notify()
	}
	st.mu.Unlock()
	st.mu.RLock()
	due := st.opt.CheckpointSegments
	if due == 0 {
		due = max(64, 8*st.ckptSegments)
	}
	busy := st.recovering || st.closed // Close gives unused segment numbers back: none may be taken behind it
	allocated := int64(len(st.segs)+st.ckptSegments+spareSegments) * SegmentBytes
	tight := allocated*100 > st.opt.CapacityBytes*fullPercent
	st.mu.RUnlock()
	if busy {
		return nil
	}
	if st.sinceCkpt >= due {
		return st.writeCheckpoint(ctx)
	}
	if st.sinceLook++; st.sinceLook < 64 && !tight {
		return nil
	}
	st.sinceLook = 0
	least := 4
	if tight {
		least = 1
	}
	victims, dead, garbage := st.survey(least)
	if dead >= deadWorthIt || tight && dead > 0 {
		return st.writeCheckpoint(ctx)
	}
	if len(victims) == 0 || !tight && garbage < garbagePercent || st.cleanAfter > st.nextSegment {
		return nil
	}
	if err := st.clean(ctx, victims); err != nil {
		return err
	}
	if err := st.writeCheckpoint(ctx); err != nil {
		return err
	}
	st.cleanAfter = st.nextSegment + 1
	if !tight {
		st.cleanAfter += 8 // no hurry: let more be overwritten first
	}
	return nil
}

// survey picks what to clean, emptiest first, and counts what is empty already. It measures in
// bytes against whole segments, because a segment that was sealed early wastes its rest too.
// victims is empty when cleaning them would not free least segments.
func (st *Store) survey(least int) (victims []uint32, dead int, garbagePercent int64) {
	st.mu.RLock()
	defer st.mu.RUnlock()
	live := map[uint32]int64{} // bytes; counts may say more where blocks are shared
	total := int64(0)
	for n, s := range st.segs {
		if st.inMemory[n] != nil {
			continue
		}
		if s.live == 0 {
			dead++
			continue
		}
		bytes := int64(s.bytes)
		if s.slots > 0 {
			bytes = bytes * min(s.live, int64(s.slots)) / int64(s.slots)
		}
		live[n] = bytes
		total += bytes
		if bytes*100 < SegmentBytes*victimPercent && !s.stuck {
			victims = append(victims, n)
		}
	}
	slices.SortFunc(victims, func(a, b uint32) int { return cmp.Compare(live[a], live[b]) })
	blocks, bytes := int64(0), int64(0)
	for i, n := range victims {
		if blocks+st.segs[n].live > mostMoved {
			victims = victims[:i]
			break
		}
		blocks, bytes = blocks+st.segs[n].live, bytes+live[n]
	}
	if len(victims)-int((bytes+SegmentBytes-1)/SegmentBytes) < least {
		victims = nil
	}
	if len(live) > 0 {
		garbagePercent = 100 - total*100/(int64(len(live))*SegmentBytes)
	}
	return victims, dead, garbagePercent
}

// reference is a block of a volume that is stored in a segment to be cleaned.
type reference struct {
	v   *Volume
	lba uint64
	at  loc
}

func (st *Store) clean(ctx context.Context, victims []uint32) error {
	fps := map[loc]digest{}
	set := map[uint32]bool{}
	for _, n := range victims {
		slots, err := st.table(ctx, n)
		if errors.Is(err, ErrCorrupt) {
			st.opt.Logger.Error("segment cannot be cleaned; it is left as it is", "segment", n, "err", err)
			st.mu.Lock()
			st.segs[n].stuck = true
			st.mu.Unlock()
			continue
		}
		if err != nil {
			return err
		}
		set[n] = true
		for i := range slots {
			fps[makeLoc(n, int(slots[i].off), int(slots[i].len))] = slots[i].fp
		}
	}
	refs := st.references(set)
	moved := map[loc]loc{}
	for len(refs) > 0 {
		n := min(64, len(refs))
		if err := st.move(ctx, refs[:n], fps, moved); err != nil {
			return err
		}
		refs = refs[n:]
	}
	st.mu.Lock()
	st.counters.blocksMoved += int64(len(moved))
	st.mu.Unlock()
	return nil
}

// references looks through all maps for blocks in the segments of set, and returns them as they
// lie in the segments. A page that several maps share is looked through once: a move is for all of them.
func (st *Store) references(set map[uint32]bool) []reference {
	var refs []reference
	st.pass++
	st.mu.RLock()
	volumes := make([]*Volume, 0, len(st.volumes))
	for _, v := range st.volumes {
		volumes = append(volumes, v)
	}
	st.mu.RUnlock()
	for _, v := range volumes {
		st.mu.RLock()
		nodes := len(v.m.nodes)
		st.mu.RUnlock()
		for i := range nodes {
			st.mu.RLock()
			v.m.eachOf(i, func(first uint64, p *page) {
				if p.pass == st.pass {
					return
				}
				p.pass = st.pass
				for k, l := range p.at {
					if l != 0 && set[l.segment()] {
						refs = append(refs, reference{v, first + uint64(k), l})
					}
				}
			})
			st.mu.RUnlock()
		}
	}
	slices.SortFunc(refs, func(a, b reference) int {
		if a.at != b.at {
			return int(int64(a.at>>1) - int64(b.at>>1))
		}
		if a.v.id != b.v.id {
			return int(a.v.id) - int(b.v.id)
		}
		return int(int64(a.lba) - int64(b.lba))
	})
	return refs
}

// move stores the blocks of refs again, each once, and points their maps there.
func (st *Store) move(ctx context.Context, refs []reference, fps map[loc]digest, moved map[loc]loc) error {
	var far []where
	for _, r := range refs {
		if moved[r.at] == 0 {
			far = append(far, where{place: r.at})
		}
	}
	lines, err := st.fetch(ctx, far)
	if err != nil {
		return err
	}
	defer st.lines.done(lines)
	for _, r := range refs {
		to := moved[r.at]
		var stored []byte
		if to == 0 {
			fp, known := fps[r.at]
			if stored = lines.block(r.at); checkBlock(r.at, stored) != nil {
				if stored, err = st.readStored(ctx, r.at); err != nil {
					return err
				}
			}
			if err := checkBlock(r.at, stored); err != nil || !known {
				st.opt.Logger.Error("block cannot be moved", "volume", r.v.name, "block", r.lba, "err", err)
				st.mu.Lock()
				st.segs[r.at.segment()].stuck = true
				st.mu.Unlock()
				continue // it stays, and so does its segment: a reader will be told
			}
			if err := st.roomFor(ctx, len(stored), 64, st.packed); err != nil {
				return err
			}
			st.mu.Lock()
			to = st.open.append(stored, fp)
			hint := fp.fingerprint()
			st.index.Insert(&hint, dedup.Ref{Segment: st.open.number, Slot: uint16(len(st.open.slots) - 1)})
			st.charge(st.open.info, r.v, len(stored)+slotBytes, 1)
			st.mu.Unlock()
			moved[r.at] = to
		} else if err := st.roomFor(ctx, 0, 64, st.packed); err != nil {
			return err
		}
		st.mu.Lock()
		st.open.log.move(r.v.id, r.lba, r.at, to)
		st.charge(st.open.info, r.v, costMove, 0)
		r.v.m.move(&st.maps, r.lba, r.at, to)
		st.mu.Unlock()
	}
	return nil
}

// warm enters the blocks of the given segments into the index, newest first.
func (st *Store) warm(numbers []uint32) {
	slices.SortFunc(numbers, func(a, b uint32) int { return int(b) - int(a) })
	room := st.index.Bytes() / 8
	for _, n := range numbers {
		if !st.usable(n) || room <= 0 {
			continue
		}
		_, slots, _, err := st.readTable(st.ctx, n)
		if st.ctx.Err() != nil {
			return
		}
		if err != nil {
			st.opt.Logger.Warn("segment not in the index", "segment", n, "err", err)
			continue
		}
		for i := range slots {
			hint := slots[i].fp.fingerprint()
			if _, known := st.index.Lookup(&hint); !known {
				st.index.Insert(&hint, dedup.Ref{Segment: n, Slot: uint16(i)})
			}
		}
		room -= int64(len(slots))
	}
}
