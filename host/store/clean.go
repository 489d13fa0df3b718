package store

import (
	"context"
	"errors"
	"slices"

	"github.com/ledge-storage/ledge/host/dedup"
)

// Cleaning turns segments of which little is referenced into free ones: what is referenced moves to
// the open segment, and the next checkpoint finds the old one without references. The maps themselves
// are looked through for references, so that counts alone never decide what is kept.

const (
	mostMoved      = 1 << 16 // blocks moved by one pass: the packer does nothing else meanwhile
	deadWorthIt    = 16      // segments without references that are worth a checkpoint
	victimPercent  = 70      // references per stored block, above which a segment is left alone
	garbagePercent = 30      // of all stored blocks unreferenced, above which cleaning is due
	fullPercent    = 80      // of the capacity allocated, above which cleaning is due
)

// maintain is called by the packer after each step.
func (st *Store) maintain(ctx context.Context) error {
	st.mu.RLock()
	due := st.opt.CheckpointSegments
	if due == 0 {
		due = max(64, 8*st.ckptSegments)
	}
	busy := st.recovering
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
	victims, dead, garbage := st.survey()
	if dead >= deadWorthIt || tight && dead > 0 {
		return st.writeCheckpoint(ctx)
	}
	if len(victims) == 0 || !tight && garbage < garbagePercent || st.cleanAfter > st.nextSegment {
		return nil
	}
	st.cleanAfter = st.nextSegment + 8
	if err := st.clean(ctx, victims); err != nil {
		return err
	}
	return st.writeCheckpoint(ctx)
}

// survey picks what to clean, emptiest first, and counts what is empty already.
func (st *Store) survey() (victims []uint32, dead int, garbagePercent int64) {
	st.mu.RLock()
	defer st.mu.RUnlock()
	var slots, live int64
	for n, s := range st.segs {
		if st.inMemory[n] != nil {
			continue
		}
		slots += int64(s.slots)
		live += min(s.live, int64(s.slots))
		if s.live == 0 {
			dead++
		} else if s.live*100 < int64(s.slots)*victimPercent {
			victims = append(victims, n)
		}
	}
	slices.SortFunc(victims, func(a, b uint32) int { return int(st.segs[a].live - st.segs[b].live) })
	sum := int64(0)
	for i, n := range victims {
		if sum += st.segs[n].live; sum > mostMoved {
			victims = victims[:i]
			break
		}
	}
	if len(victims) == 1 && dead == 0 && st.segs[victims[0]].live > maxSlots/8 {
		victims = nil // one segment for another is no gain
	}
	if slots > 0 {
		garbagePercent = (slots - live) * 100 / slots
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
	fps := map[loc]dedup.Fingerprint{}
	set := map[uint32]bool{}
	for _, n := range victims {
		slots, err := st.table(ctx, n)
		if errors.Is(err, ErrCorrupt) {
			st.opt.Logger.Error("segment cannot be cleaned", "segment", n, "err", err)
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
// lie in the segments.
func (st *Store) references(set map[uint32]bool) []reference {
	var refs []reference
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
				for k, l := range p {
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
func (st *Store) move(ctx context.Context, refs []reference, fps map[loc]dedup.Fingerprint, moved map[loc]loc) error {
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
				continue // it stays, and so does its segment: a reader will be told
			}
			if err := st.roomFor(ctx, len(stored), 64, st.packed); err != nil {
				return err
			}
			st.mu.Lock()
			to = st.open.append(stored, fp)
			st.index.Insert(&fp, dedup.Ref{Segment: st.open.number, Slot: uint16(len(st.open.slots) - 1)})
			st.open.info.share(r.v.id).slots++
			r.v.slots++
			st.charge(st.open, r.v, len(stored)+slotBytes)
			st.mu.Unlock()
			moved[r.at] = to
		} else if err := st.roomFor(ctx, 0, 64, st.packed); err != nil {
			return err
		}
		st.mu.Lock()
		was := st.open.used()
		st.open.log.move(r.v.id, r.lba, r.at, to)
		st.charge(st.open, r.v, st.open.used()-was)
		st.point(r.v, r.lba, to)
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
			if _, known := st.index.Lookup(&slots[i].fp); !known {
				st.index.Insert(&slots[i].fp, dedup.Ref{Segment: n, Slot: uint16(i)})
			}
		}
		room -= int64(len(slots))
	}
}
