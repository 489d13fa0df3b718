package store

import (
	"cmp"
	"context"
	"crypto/rand"
	"fmt"
	"slices"
	"time"
)

// Snapshots and clones are volumes that begin as a copy of another: an entry of the log says so, and the copy is what the
// other is at that place of the log, whatever was packed of it by then. Requests to the copy wait until the packer is
// there. The copy shares the pages of the map (map.go), so that it takes the same time at any size. Several
// copies in one record are of one instant, and after a crash all are there or none.

const (
	// MaxSnapshots of a store.
	MaxSnapshots = 1 << 16
	// MaxGroup is how many volumes one Snapshot takes, and how many snapshots one Promote moves.
	MaxGroup = 200
)

// SnapshotInfo describes a snapshot.
type SnapshotInfo struct {
	Volume, Name string
	// UUID of the snapshot. Those that were taken together have one Group.
	UUID, Group [16]byte
	Created     time.Time
	SizeBytes   int64
	// LogicalBytes is what of it holds data.
	LogicalBytes int64
	// Clones are the volumes that began as this snapshot, by name.
	Clones []string
}

// list makes v known by its name: a volume's among volumes, a snapshot's among those of its volume. mu is held.
func (st *Store) list(v *Volume) {
	if !v.snapshot {
		st.byName[v.name] = v
		return
	}
	if st.snaps[v.from] == nil {
		st.snaps[v.from] = map[string]*Volume{}
	}
	st.snaps[v.from][v.name] = v
	st.snapshots++
}

// unlist undoes it. mu is held.
func (st *Store) unlist(v *Volume) {
	if !v.snapshot {
		if st.byName[v.name] == v {
			delete(st.byName, v.name)
		}
		return
	}
	delete(st.snaps[v.from], v.name)
	if len(st.snaps[v.from]) == 0 {
		delete(st.snaps, v.from)
	}
	st.snapshots--
}

// listed is what has v's name. mu is held.
func (st *Store) listed(v *Volume) *Volume {
	if v.snapshot {
		return st.snaps[v.from][v.name]
	}
	return st.byName[v.name]
}

// redescribe makes v what d says it is of. mu is held.
func (st *Store) redescribe(v, d *Volume) {
	st.unlist(v)
	v.from, v.name, v.compression = d.from, d.name, d.compression
	st.list(v)
}

// copyOf begins a volume as a copy of src. mu is held.
func (st *Store) copyOf(src *Volume, name string, snapshot bool, from uint32) (*Volume, op) {
	v := &Volume{st: st, id: st.nextVol, name: name, appliedName: name, size: src.size, applied: src.size, snapshot: snapshot, from: from, appliedFrom: from,
		compression: src.compression, appliedCompression: src.compression, dirty: map[uint64]*pending{}}
	rand.Read(v.uuid[:])
	v.uuid[6], v.uuid[8] = v.uuid[6]&0x0f|0x40, v.uuid[8]&0x3f|0x80
	v.taken = st.opt.Now().UnixNano()
	st.nextVol++
	st.volumes[v.id] = v
	st.list(v)
	return v, op{kind: opCopy, vol: v.id, lba: uint64(src.id)}
}

// Snapshot takes a snapshot of each of the volumes, all of the same instant: of every write that was acknowledged before
// the call, and of a write that was not for all volumes or none, if it is of one record. They are durable on return.
func (st *Store) Snapshot(ctx context.Context, name string, volumes ...string) ([]SnapshotInfo, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	if most := min(MaxGroup, st.opt.RecordBytes/BlockBytes); len(volumes) == 0 || len(volumes) > most {
		return nil, fmt.Errorf("store: snapshot of %d volumes at once; 1 to %d can be: %w", len(volumes), most, ErrLimit)
	}
	var taken []*Volume
	err := st.submitMany(ctx, len(volumes), func() (ops []op, err error) {
		var group [16]byte
		rand.Read(group[:])
		if st.snapshots+len(volumes) > MaxSnapshots {
			return nil, fmt.Errorf("snapshots: %d exist: %w", st.snapshots, ErrLimit)
		}
		for i, n := range volumes {
			v := st.byName[n]
			if v == nil {
				return nil, fmt.Errorf("%q: %w", n, ErrNotFound)
			}
			if st.snaps[v.id][name] != nil || slices.Contains(volumes[:i], n) {
				return nil, fmt.Errorf("%q: snapshot %q: %w", n, name, ErrExists)
			}
		}
		for _, n := range volumes {
			src := st.byName[n]
			v, o := st.copyOf(src, name, true, src.id)
			v.group = group
			o.data = v.describe()
			ops, taken = append(ops, o), append(taken, v)
		}
		return ops, nil
	})
	if err != nil {
		return nil, err
	}
	st.mu.RLock()
	defer st.mu.RUnlock()
	infos := make([]SnapshotInfo, len(taken))
	for i, v := range taken {
		infos[i] = v.snapshotInfo(nil)
	}
	return infos, nil
}

// snapshotInfo is called with mu held.
func (v *Volume) snapshotInfo(clones []string) SnapshotInfo {
	i := SnapshotInfo{Name: v.name, UUID: v.uuid, Group: v.group, Created: time.Unix(0, v.taken), SizeBytes: v.size, LogicalBytes: v.m.mapped * BlockBytes, Clones: clones}
	if of := v.st.volumes[v.from]; of != nil {
		i.Volume = of.name
	}
	slices.Sort(i.Clones)
	return i
}

// Snapshots lists the snapshots of a volume, or with "" those of all volumes, as they were taken.
func (st *Store) Snapshots(volume string) ([]SnapshotInfo, error) {
	st.mu.RLock()
	defer st.mu.RUnlock()
	only := st.byName[volume]
	if volume != "" && only == nil {
		return nil, fmt.Errorf("store: volume %q: %w", volume, ErrNotFound)
	}
	clones := map[uint32][]string{}
	for _, v := range st.byName {
		if v.from != 0 {
			clones[v.from] = append(clones[v.from], v.name)
		}
	}
	var list []SnapshotInfo
	for of, snaps := range st.snaps {
		if only == nil || only.id == of {
			for _, s := range snaps {
				list = append(list, s.snapshotInfo(clones[s.id]))
			}
		}
	}
	slices.SortFunc(list, func(a, b SnapshotInfo) int {
		return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.Volume, b.Volume), cmp.Compare(a.Name, b.Name))
	})
	return list, nil
}

// find returns a snapshot by its names. mu is held.
func (st *Store) find(volume, name string) (v, s *Volume, err error) {
	if v = st.byName[volume]; v == nil {
		return nil, nil, fmt.Errorf("%q: %w", volume, ErrNotFound)
	}
	if s = st.snaps[v.id][name]; s == nil {
		return nil, nil, fmt.Errorf("%q: snapshot %q: %w", volume, name, ErrNotFound)
	}
	return v, s, nil
}

// OpenSnapshot returns the handle of a snapshot for reading; to write it is target.ErrReadOnly.
func (st *Store) OpenSnapshot(volume, name string) (*Volume, error) {
	st.mu.RLock()
	defer st.mu.RUnlock()
	_, s, err := st.find(volume, name)
	return s, err
}

// Snapshot tells whether v is a snapshot.
func (v *Volume) Snapshot() bool { return v.snapshot }

// DeleteSnapshot frees what only the snapshot has. Its clones stay: they have maps of their own.
func (st *Store) DeleteSnapshot(ctx context.Context, volume, name string) error {
	return st.submit(ctx, func() ([]op, error) {
		_, s, err := st.find(volume, name)
		if err != nil {
			return nil, err
		}
		s.deleted = true
		st.unlist(s)
		return []op{{kind: opDelete, vol: s.id}}, nil
	})
}

// Clone makes a volume that begins as the snapshot is; it is durable on return.
func (st *Store) Clone(ctx context.Context, volume, snapshot, name string) (VolumeInfo, error) {
	if err := checkName(name); err != nil {
		return VolumeInfo{}, err
	}
	var c *Volume
	err := st.submit(ctx, func() ([]op, error) {
		_, s, err := st.find(volume, snapshot)
		if err != nil {
			return nil, err
		}
		if st.byName[name] != nil {
			return nil, fmt.Errorf("%q: %w", name, ErrExists)
		}
		if len(st.byName) >= MaxVolumes {
			return nil, fmt.Errorf("%q: %d exist: %w", name, MaxVolumes, ErrLimit)
		}
		var o op
		c, o = st.copyOf(s, name, false, s.id)
		o.data = c.describe()
		return []op{o}, nil
	})
	if err != nil {
		return VolumeInfo{}, err
	}
	return c.Info(), nil
}

// Rollback makes the volume what its snapshot is, its size too; what was written since is gone. Other snapshots stay.
func (st *Store) Rollback(ctx context.Context, volume, snapshot string) error {
	return st.submit(ctx, func() ([]op, error) {
		v, s, err := st.find(volume, snapshot)
		if err != nil {
			return nil, err
		}
		v.size = s.size
		return []op{{kind: opRollback, vol: v.id, lba: uint64(s.id)}}, nil
	})
}

// Promote turns a clone and the volume that it came from round: the snapshots of that volume up to the clone's origin become
// the clone's, and the volume becomes a clone of the origin. So the volume can be deleted and the clone kept.
func (st *Store) Promote(ctx context.Context, clone string) error {
	most := min(MaxGroup, st.opt.RecordBytes/BlockBytes)
	return st.submitMany(ctx, most, func() (ops []op, err error) {
		c := st.byName[clone]
		if c == nil {
			return nil, fmt.Errorf("%q: %w", clone, ErrNotFound)
		}
		origin := st.volumes[c.from]
		if origin == nil || origin.deleted || !origin.snapshot {
			return nil, fmt.Errorf("%q: %w", clone, ErrNoClone)
		}
		v := st.volumes[origin.from]
		var moved []*Volume
		for _, s := range st.snaps[v.id] {
			if s.id > origin.id {
				continue
			}
			if st.snaps[c.id][s.name] != nil {
				return nil, fmt.Errorf("%q: snapshot %q: %w", clone, s.name, ErrExists)
			}
			moved = append(moved, s)
		}
		if len(moved)+2 > most {
			return nil, fmt.Errorf("%q: %d snapshots to move at once, %d can be: %w", clone, len(moved), most-2, ErrLimit)
		}
		slices.SortFunc(moved, func(a, b *Volume) int { return cmp.Compare(a.id, b.id) })
		change := func(x *Volume, from uint32) {
			st.unlist(x)
			x.from = from
			st.list(x)
			ops = append(ops, op{kind: opDescribe, vol: x.id, data: x.described()})
		}
		// The snapshots go last, so that a volume that a snapshot is of is never one that is none.
		was := v.from
		change(v, origin.id)
		change(c, was)
		for _, s := range moved {
			change(s, c.id)
		}
		return ops, nil
	})
}

// Diff calls f for each run of blocks that may differ between two snapshots of a volume, or, with to "", between a snapshot
// and the volume as it is; from "" stands for an empty volume. Runs come in order and do not overlap. It costs what differs, not
// what there is.
func (st *Store) Diff(ctx context.Context, volume, from, to string, f func(lba, blocks uint64) error) error {
	open := func(name string) (*Volume, error) {
		if name == "" {
			return st.Volume(volume)
		}
		return st.OpenSnapshot(volume, name)
	}
	b, err := open(to)
	if err != nil {
		return err
	}
	a := &Volume{st: st}
	if from != "" {
		if a, err = open(from); err != nil {
			return err
		}
	}
	if err := st.Sync(ctx); err != nil {
		return err
	}
	for _, v := range []*Volume{a, b} {
		if err := v.ready(ctx); err != nil {
			return err
		}
	}
	var at, n uint64
	flush := func() error {
		if n == 0 {
			return nil
		}
		defer func() { n = 0 }()
		return f(at, n)
	}
	for i := 0; ; i++ {
		pairs, more := st.differing(&a.m, &b.m, i)
		for _, d := range pairs {
			x, err := st.copyOfPage(ctx, d.a)
			if err != nil {
				return err
			}
			y, err := st.copyOfPage(ctx, d.b)
			if err != nil {
				return err
			}
			for k := range x {
				if x[k] == y[k] {
					continue
				}
				if lba := d.first + uint64(k); n > 0 && at+n == lba {
					n++
					continue
				}
				if err := flush(); err != nil {
					return err
				}
				at, n = d.first+uint64(k), 1
			}
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if !more {
			return flush()
		}
	}
}

// pair is two pages in one place of two maps; nil: none.
type pair struct {
	first uint64
	a, b  *page
}

// differing are the pages that nodes number i of two maps do not share.
func (st *Store) differing(a, b *blockMap, i int) (pairs []pair, more bool) {
	st.mu.RLock()
	defer st.mu.RUnlock()
	nodeOf := func(m *blockMap) *node {
		if i < len(m.nodes) {
			return m.nodes[i]
		}
		return nil
	}
	x, y := nodeOf(a), nodeOf(b)
	more = i+1 < max(len(a.nodes), len(b.nodes))
	if x == y {
		return nil, more
	}
	for j := range nodePages {
		d := pair{first: (uint64(i)*nodePages + uint64(j)) * pageEntries}
		if x != nil {
			d.a = x.pages[j]
		}
		if y != nil {
			d.b = y.pages[j]
		}
		if d.a != d.b {
			pairs = append(pairs, d)
		}
	}
	return pairs, more
}

// copyOfPage is the content of p as it is at some moment of the call.
func (st *Store) copyOfPage(ctx context.Context, p *page) (at places, err error) {
	for p != nil {
		st.mu.RLock()
		here, gone := p.at, p.refs == 0
		if here != nil {
			at = *here
		}
		st.mu.RUnlock()
		if here != nil || gone {
			return at, nil
		}
		if err := st.want(ctx, st.unmetered, p); err != nil {
			return at, err
		}
	}
	return at, nil
}
