package store

import (
	"context"
	"crypto/rand"
	"fmt"
	"slices"
	"strings"

	"github.com/ledge-storage/ledge/host/meter"
)

// Volume is a virtual disk of 4 KiB blocks. Two states are told apart: what requests see, from
// the moment they are in a record (size, deleted, dirty, zeros), and what the packer has applied
// to the map in the log's order, which is what a checkpoint holds.
type Volume struct {
	st   *Store
	id   uint32
	uuid [16]byte
	name string

	// Guarded by st.mu.
	size    int64
	deleted bool
	dirty   map[uint64]*pending
	zeros   []*pending // ranges longer than smallZero
	created bool       // applied
	applied int64      // size, applied
	m       blockMap
	// snapshot: nobody writes it. from is the volume that a snapshot is of, or the snapshot that a clone is of; 0: none.
	snapshot           bool
	from               uint32
	appliedFrom        uint32
	appliedName        string
	compression        Compression
	appliedCompression Compression
	taken              int64    // when, nanoseconds since 1970
	group              [16]byte // the snapshots of one instant have one
	// copying counts copies of this volume, and replacing ones of others to here, that are in the log and not applied.
	copying, replacing int
	slots              int64         // blocks that this volume's writes brought into segments that exist
	bytes              int64         // and what they take there, with their metadata
	metered            *meter.Volume // set before the first handle is given out; nil: not metered
}

// VolumeInfo describes a volume.
type VolumeInfo struct {
	Name string
	UUID [16]byte
	// SizeBytes is what an initiator sees.
	SizeBytes int64
	// LogicalBytes is what of it holds data: not zeros, not unmapped.
	LogicalBytes int64
	// UniqueBytes and StoredBytes are what this volume's writes brought into segments that exist,
	// before and after compression; StoredBytes with metadata and with the bytes that are still
	// in no segment. Blocks that were there before are not counted; overwritten ones are
	// until the cleaner has freed them.
	UniqueBytes, StoredBytes int64
	// PendingBytes are acknowledged and not yet packed.
	PendingBytes int64
	// Origin is the snapshot that a clone is of, as volume@snapshot; empty: no clone, or the snapshot is deleted.
	Origin string
	// Snapshots that the volume has.
	Snapshots int
	// Compression of what is written from now on.
	Compression Compression
}

// describe is the payload of a creation: UUID, size, name; of snapshots and clones also, since version 2, what they are
// of, when, and the group; since version 3, where it is not S2, the compression.
func (v *Volume) describe() []byte {
	p := make([]byte, 0, 64+len(v.appliedName))
	p = append(p, v.uuid[:]...)
	p = le.AppendUint64(p, uint64(v.applied))
	p = le.AppendUint16(p, uint16(len(v.appliedName)))
	p = append(p, v.appliedName...)
	if v.appliedFrom == 0 && v.appliedCompression == 0 {
		return p
	}
	kind := byte(0)
	if v.snapshot {
		kind = 1
	}
	p = append(p, kind)
	p = le.AppendUint32(p, v.appliedFrom)
	p = le.AppendUint64(p, uint64(v.taken))
	p = append(p, v.group[:]...)
	if v.appliedCompression != 0 {
		p = append(p, byte(v.appliedCompression))
	}
	return p
}

const originBytes = 1 + 4 + 8 + 16

// parseDescription reads what describe wrote; zeros may follow.
func parseDescription(p []byte) (v Volume, err error) {
	if len(p) < 26 || int(le.Uint16(p[24:])) > len(p)-26 {
		return v, fmt.Errorf("volume description: %w", ErrCorrupt)
	}
	copy(v.uuid[:], p)
	size := le.Uint64(p[16:])
	v.name = string(p[26 : 26+int(le.Uint16(p[24:]))])
	v.appliedName = v.name
	if size > MaxVolume || size%BlockBytes != 0 || checkName(v.name) != nil {
		return v, fmt.Errorf("volume description of %q: %w", v.name, ErrCorrupt)
	}
	v.size, v.applied = int64(size), int64(size)
	if p = p[26+len(v.name):]; len(p) >= originBytes {
		v.snapshot, v.from, v.taken = p[0] == 1, le.Uint32(p[1:]), int64(le.Uint64(p[5:]))
		copy(v.group[:], p[13:])
		if v.appliedFrom = v.from; p[0] > 1 || v.snapshot && v.from == 0 {
			return v, fmt.Errorf("description of %q: %w", v.name, ErrCorrupt)
		}
		if p = p[originBytes:]; len(p) > 0 {
			v.compression = Compression(p[0])
			v.appliedCompression = v.compression
			p = p[1:]
		}
		if v.compression >= compressions {
			return v, fmt.Errorf("description of %q: compression %d: %w", v.name, v.compression, ErrCorrupt)
		}
	}
	if !isZero(p) {
		return v, fmt.Errorf("description of %q: %w", v.name, ErrCorrupt)
	}
	return v, nil
}

func checkName(name string) error {
	ok := len(name) > 0 && len(name) <= maxName && !strings.ContainsFunc(name, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' && r != '.' && r != '_'
	}) && name[0] != '-' && name[0] != '.'
	if !ok {
		return fmt.Errorf("%q: 1 to %d of a-z 0-9 - . _, not beginning with - or . : %w", name, maxName, ErrName)
	}
	return nil
}

func checkSize(bytes int64) error {
	if bytes <= 0 || bytes > MaxVolume || bytes%BlockBytes != 0 {
		return fmt.Errorf("%d bytes: a multiple of %d up to %d: %w", bytes, BlockBytes, int64(MaxVolume), ErrSize)
	}
	return nil
}

// CreateVolume makes an empty volume; it is durable on return.
func (st *Store) CreateVolume(ctx context.Context, name string, bytes int64) (VolumeInfo, error) {
	return st.CreateCompressed(ctx, name, bytes, CompressS2)
}

// CreateCompressed is CreateVolume of a volume that is compressed so.
func (st *Store) CreateCompressed(ctx context.Context, name string, bytes int64, c Compression) (VolumeInfo, error) {
	if c >= compressions {
		return VolumeInfo{}, fmt.Errorf("%s: %w", c, ErrCompression)
	}
	if err := checkName(name); err != nil {
		return VolumeInfo{}, err
	}
	if err := checkSize(bytes); err != nil {
		return VolumeInfo{}, err
	}
	v := &Volume{st: st, name: name, appliedName: name, size: bytes, applied: bytes, compression: c, appliedCompression: c, dirty: map[uint64]*pending{}}
	rand.Read(v.uuid[:])
	v.uuid[6], v.uuid[8] = v.uuid[6]&0x0f|0x40, v.uuid[8]&0x3f|0x80
	err := st.submit(ctx, func() ([]op, error) {
		if st.byName[name] != nil {
			return nil, fmt.Errorf("%q: %w", name, ErrExists)
		}
		if len(st.byName) >= MaxVolumes {
			return nil, fmt.Errorf("%q: %d exist: %w", name, MaxVolumes, ErrLimit)
		}
		v.id = st.nextVol
		st.nextVol++
		st.volumes[v.id], st.byName[name] = v, v
		return []op{{kind: opCreate, vol: v.id, data: v.describe()}}, nil
	})
	if err != nil {
		return VolumeInfo{}, err
	}
	return v.Info(), nil
}

// DeleteVolume frees the volume and all its blocks; requests to it fail from now on. ErrHasSnapshots: they are deleted first.
func (st *Store) DeleteVolume(ctx context.Context, name string) error {
	return st.submit(ctx, func() ([]op, error) {
		v := st.byName[name]
		if v == nil {
			return nil, fmt.Errorf("%q: %w", name, ErrNotFound)
		}
		if n := len(st.snaps[v.id]); n > 0 {
			return nil, fmt.Errorf("%q: %d of them: %w", name, n, ErrHasSnapshots)
		}
		v.deleted = true
		st.unlist(v)
		return []op{{kind: opDelete, vol: v.id}}, nil
	})
}

// RenameVolume gives a volume another name. Its snapshots and clones, and handles of it, stay with it.
func (st *Store) RenameVolume(ctx context.Context, name, to string) error {
	if err := checkName(to); err != nil {
		return err
	}
	return st.submit(ctx, func() ([]op, error) {
		v := st.byName[name]
		if v == nil {
			return nil, fmt.Errorf("%q: %w", name, ErrNotFound)
		}
		if st.byName[to] != nil {
			return nil, fmt.Errorf("%q: %w", to, ErrExists)
		}
		st.unlist(v)
		v.name = to
		st.list(v)
		return []op{{kind: opDescribe, vol: v.id, data: v.described()}}, nil
	})
}

// SetCompression changes what is written to the volume from now on.
func (st *Store) SetCompression(ctx context.Context, name string, c Compression) error {
	if c >= compressions {
		return fmt.Errorf("%s: %w", c, ErrCompression)
	}
	return st.submit(ctx, func() ([]op, error) {
		v := st.byName[name]
		if v == nil {
			return nil, fmt.Errorf("%q: %w", name, ErrNotFound)
		}
		v.compression = c
		return []op{{kind: opDescribe, vol: v.id, data: v.described()}}, nil
	})
}

// described is a description of v as the next entry of the log has it. mu is held.
func (v *Volume) described() []byte {
	d := *v
	d.appliedName, d.appliedFrom, d.applied, d.appliedCompression = v.name, v.from, v.size, v.compression
	return d.describe()
}

// ResizeVolume changes the size. What is cut off is gone: it reads as zeros if the volume grows again.
func (st *Store) ResizeVolume(ctx context.Context, name string, bytes int64) error {
	if err := checkSize(bytes); err != nil {
		return err
	}
	return st.submit(ctx, func() ([]op, error) {
		v := st.byName[name]
		if v == nil {
			return nil, fmt.Errorf("%q: %w", name, ErrNotFound)
		}
		old := v.size
		v.size = bytes
		ops := []op{{kind: opResize, vol: v.id, lba: uint64(bytes)}}
		if bytes < old {
			ops = append(ops, op{kind: opZero, vol: v.id, lba: uint64(bytes / BlockBytes), count: uint64((old - bytes) / BlockBytes)})
		}
		return ops, nil
	})
}

// Volume returns the handle of a volume for reading and writing. From the first time on, the volume is metered.
func (st *Store) Volume(name string) (*Volume, error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if v := st.byName[name]; v != nil {
		if v.metered == nil {
			v.metered = meter.New()
		}
		return v, nil
	}
	return nil, fmt.Errorf("%q: %w", name, ErrNotFound)
}

// Volumes lists the volumes by name.
func (st *Store) Volumes() []VolumeInfo {
	st.mu.RLock()
	defer st.mu.RUnlock()
	list := make([]VolumeInfo, 0, len(st.byName))
	for _, v := range st.byName {
		list = append(list, v.info())
	}
	slices.SortFunc(list, func(a, b VolumeInfo) int { return strings.Compare(a.Name, b.Name) })
	return list
}

// Size is what Info says, for who asks it with every request.
func (v *Volume) Size() int64 {
	v.st.mu.RLock()
	defer v.st.mu.RUnlock()
	return v.size
}

// Space is what of the volume holds data (in segments; not what is pending), what can be written until the store is
// full, what the cleaner can free for it included, and what the store may hold.
func (v *Volume) Space() (used, available, capacity int64) {
	st := v.st
	st.mu.RLock()
	defer st.mu.RUnlock()
	if !st.full {
		usable := st.opt.CapacityBytes - int64(st.taken()-len(st.segs)+st.spare)*SegmentBytes - st.buffered
		available = max(0, usable-int64(len(st.segs))*SegmentBytes) // as admit counts
		if live := st.surveyed.live; live > 0 && !st.gaveUp {
			live += max(0, st.references-st.surveyed.references) * (blockHeader + BlockBytes + slotBytes) // what came since, at most
			available = max(available, usable-live*10/9)                                                  // fuller than nine tenths, cleaning gains too little
		}
	}
	return v.m.mapped * BlockBytes, available, st.opt.CapacityBytes
}

// Meter is what counts the requests to v: what they do below, the store adds; they as a whole, who serves them. Snapshots
// share one, which nobody reads: there may be too many of them.
func (v *Volume) Meter() *meter.Volume {
	if v.metered == nil {
		return v.st.unmetered
	}
	return v.metered
}

// UUID identifies the volume for ever.
func (v *Volume) UUID() [16]byte { return v.uuid }

// Info describes the volume as it is now.
func (v *Volume) Info() VolumeInfo {
	v.st.mu.RLock()
	defer v.st.mu.RUnlock()
	return v.info()
}

func (v *Volume) info() VolumeInfo {
	i := VolumeInfo{Name: v.name, UUID: v.uuid, SizeBytes: v.size, LogicalBytes: v.m.mapped * BlockBytes,
		UniqueBytes: v.slots * BlockBytes, StoredBytes: v.bytes, Snapshots: len(v.st.snaps[v.id]), Compression: v.compression}
	if s := v.st.volumes[v.from]; s != nil && !s.deleted && s.snapshot {
		i.Origin = v.st.volumes[s.from].name + "@" + s.name
	}
	for lba, p := range v.dirty {
		if p.data == nil {
			continue
		}
		i.PendingBytes += BlockBytes
		// Where the page is not in memory the block counts as one that was there.
		if m := v.m.page(lba); m == nil || m.at != nil && m.at[lba%pageEntries] == 0 {
			i.LogicalBytes += BlockBytes
		}
	}
	i.UniqueBytes += i.PendingBytes
	i.StoredBytes += i.PendingBytes
	return i
}
