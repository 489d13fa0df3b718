package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/ledge-storage/ledge/host/cache"
	"github.com/ledge-storage/ledge/host/initiator"
	"github.com/ledge-storage/ledge/host/initiator/iscsi"
	"github.com/ledge-storage/ledge/host/store"
	"github.com/ledge-storage/ledge/host/volume"
	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/scsi"
)

// storeEngine is the real engine: two multipath devices, the store on them, the flash cache before it.
type storeEngine struct {
	cfg               Config
	journal, segments *initiator.Device
	cache             *cache.Cache // nil: none
	st                *store.Store
	reservations      *volume.Reservations
}

// OpenStore opens the store on the LUNs that the shelf grants.
func OpenStore(cfg Config, log *slog.Logger) OpenEngine {
	return func(ctx context.Context, g api.Grant, acceptLost bool) (Engine, error) {
		return openStore(ctx, cfg, g, acceptLost, log)
	}
}

func openStore(ctx context.Context, cfg Config, g api.Grant, acceptLost bool, log *slog.Logger) (_ Engine, err error) {
	e := &storeEngine{cfg: cfg}
	defer func() {
		if err != nil {
			e.closeDevices()
		}
	}()
	if e.journal, err = e.device(ctx, g, g.JournalLUN, log.With("lun", "journal")); err != nil {
		return nil, err
	}
	if e.segments, err = e.device(ctx, g, g.StoreLUN, log.With("lun", "store")); err != nil {
		return nil, err
	}
	opt := store.Options{
		Journal: e.journal, Segments: e.segments, CapacityBytes: g.CapacityBytes, Logger: log.With("part", "store"),
		BufferBytes: cfg.BufferBytes, MapBytes: cfg.MapBytes, IndexBytes: indexBytes(&cfg), LineBytes: cfg.LineBytes,
		AcceptLost: acceptLost,
	}
	if cfg.CachePath != "" {
		if e.cache, err = cache.Open(ctx, cache.Options{Path: cfg.CachePath, SizeBytes: cfg.CacheBytes, Logger: log.With("part", "cache")}); err != nil {
			return nil, fmt.Errorf("cache %s: %w", cfg.CachePath, err)
		}
		opt.Cache = e.cache
	}
	if e.st, err = store.Open(ctx, opt); err != nil {
		return nil, err
	}
	if e.reservations, err = volume.OpenReservations(ctx, e.st); err != nil {
		end, cancel := context.WithTimeout(context.Background(), closeTimeout)
		defer cancel()
		return nil, errors.Join(err, e.st.Close(end))
	}
	if err := e.sweep(ctx); err != nil {
		log.Warn("what an interrupted import or export left stays for now", "error", err)
	}
	return e, nil
}

// sweep deletes what imports and exports left that ended with the agent.
func (e *storeEngine) sweep(ctx context.Context) error {
	list, err := e.st.Snapshots("")
	for _, s := range list {
		if strings.HasPrefix(s.Name, exportPrefix) {
			err = errors.Join(err, e.st.DeleteSnapshot(ctx, s.Volume, s.Name))
		}
	}
	for _, v := range e.st.Volumes() {
		if strings.HasPrefix(v.Name, importPrefix) {
			err = errors.Join(err, sweepImport(ctx, e, v.Name))
		}
	}
	return err
}

// RenameVolume implements Transferrer.
func (e *storeEngine) RenameVolume(ctx context.Context, name, to string) error {
	return e.st.RenameVolume(ctx, name, to)
}

// Blocks implements Transferrer.
func (e *storeEngine) Blocks(volume, snapshot string) (Blocks, error) {
	if snapshot == "" {
		return e.st.Volume(volume)
	}
	return e.st.OpenSnapshot(volume, snapshot)
}

func (e *storeEngine) device(ctx context.Context, g api.Grant, lun uint32, log *slog.Logger) (*initiator.Device, error) {
	c := initiator.Config{Portals: g.Portals, Target: g.Target, LUN: uint16(lun), Initiator: g.Initiator, Logger: log}
	if s := g.CHAP; s != nil {
		c.CHAP = &iscsi.CHAP{User: s.User, Secret: s.Secret, TargetUser: s.TargetUser, TargetSecret: s.TargetSecret}
	}
	return initiator.Open(ctx, c)
}

// closeDevices ends what was opened, in the reverse order.
func (e *storeEngine) closeDevices() (err error) {
	if e.cache != nil {
		err = e.cache.Close()
	}
	for _, d := range []*initiator.Device{e.segments, e.journal} {
		if d != nil {
			err = errors.Join(err, d.Close())
		}
	}
	return err
}

func (e *storeEngine) CreateVolume(ctx context.Context, name string, bytes int64) error {
	_, err := e.st.CreateVolume(ctx, name, bytes)
	return err
}

// SetCompression implements Compressor.
func (e *storeEngine) SetCompression(ctx context.Context, name string, c store.Compression) error {
	return e.st.SetCompression(ctx, name, c)
}

// ResizeIndex implements Indexer.
func (e *storeEngine) ResizeIndex(limitBytes int64) error { return e.st.ResizeIndex(limitBytes) }

func (e *storeEngine) ResizeVolume(ctx context.Context, name string, bytes int64) error {
	return e.st.ResizeVolume(ctx, name, bytes)
}

func (e *storeEngine) DeleteVolume(ctx context.Context, name string) error {
	v, err := e.st.Volume(name)
	if err != nil {
		return err
	}
	if err := e.st.DeleteVolume(ctx, name); err != nil {
		return err
	}
	return e.reservations.Forget(ctx, v.UUID())
}

func (e *storeEngine) Snapshot(ctx context.Context, name string, volumes ...string) ([]store.SnapshotInfo, error) {
	return e.st.Snapshot(ctx, name, volumes...)
}

func (e *storeEngine) Snapshots(volume string) ([]store.SnapshotInfo, error) {
	return e.st.Snapshots(volume)
}

func (e *storeEngine) DeleteSnapshot(ctx context.Context, volume, name string) error {
	return e.st.DeleteSnapshot(ctx, volume, name)
}

func (e *storeEngine) Clone(ctx context.Context, volume, snapshot, name string) error {
	_, err := e.st.Clone(ctx, volume, snapshot, name)
	return err
}

func (e *storeEngine) Rollback(ctx context.Context, volume, snapshot string) error {
	return e.st.Rollback(ctx, volume, snapshot)
}

func (e *storeEngine) Promote(ctx context.Context, clone string) error {
	return e.st.Promote(ctx, clone)
}

func (e *storeEngine) Diff(ctx context.Context, volume, from, to string, f func(lba, blocks uint64) error) error {
	return e.st.Diff(ctx, volume, from, to, f)
}

func (e *storeEngine) Reservations(name string) (scsi.ReservationStore, error) {
	v, err := e.st.Volume(name)
	if err != nil {
		return nil, err
	}
	return e.reservations.Of(v.UUID()), nil
}

func (e *storeEngine) Device(name string) (target.Device, error) {
	return volume.Open(e.st, name, volume.Options{})
}

func (e *storeEngine) Volumes() (out []VolumeInfo) {
	c := e.cacheFigures()
	for _, v := range e.st.Volumes() {
		if own(v.Name) { // volume.SystemVolume, and what is being imported
			continue
		}
		out = append(out, VolumeInfo{Name: v.Name, UUID: v.UUID, SizeBytes: v.SizeBytes, Origin: v.Origin, Snapshots: v.Snapshots, Compression: v.Compression.String(), Cache: c, Figures: api.Figures{
			LogicalBytes: v.LogicalBytes, UniqueBytes: v.UniqueBytes, StoredBytes: v.StoredBytes, PendingBytes: v.PendingBytes,
			DedupRatio: ratio(v.LogicalBytes, v.UniqueBytes), CompressionRatio: ratio(v.UniqueBytes, v.StoredBytes),
		}})
	}
	return out
}

func ratio(a, b int64) float64 {
	if a == 0 || b == 0 {
		return 1
	}
	return float64(a) / float64(b)
}

// cacheFigures are the store's: the flash cache holds lines of segments, which volumes share.
func (e *storeEngine) cacheFigures() (c api.Cache) {
	s := e.st.Stats()
	c.Hits, c.Misses = uint64(s.CacheHits), uint64(s.CacheMisses)
	if n := c.Hits + c.Misses; n > 0 {
		c.HitRate = float64(c.Hits) / float64(n)
	}
	if e.cache != nil {
		c.Bytes, c.Size = int64(e.cache.Stats().Bytes), e.cfg.CacheBytes
	}
	return c
}

func (e *storeEngine) Stats() EngineStats {
	s := e.st.Stats()
	out := EngineStats{Store: formatUUID(e.st.UUID()), Cache: e.cacheFigures(), Figures: api.Figures{
		LogicalBytes: s.LogicalBytes, UniqueBytes: s.UniqueBytes, StoredBytes: s.StoredBytes, PendingBytes: s.PendingBytes,
		DedupRatio: s.DedupRatio, CompressionRatio: s.CompressionRatio,
	}, Maps: &api.Maps{Bytes: s.MapBytes, LimitBytes: s.MapLimit, Pages: s.MapPages, Resident: s.MapResident, PagesRead: s.PagesRead},
		Index: &api.Index{Entries: int64(s.IndexEntries), Bytes: s.IndexBytes, Sampled: s.IndexSampled, Ready: s.IndexReady},
		Work:  &api.Work{Stored: s.Uniques, Duplicates: s.Duplicates, Overwritten: s.Absorbed, Moved: s.BlocksMoved}}
	for _, x := range e.st.GivenUp() {
		out.GivenUp = append(out.GivenUp, api.GivenUp(x))
	}
	for _, d := range []struct {
		name string
		dev  *initiator.Device
	}{{"journal", e.journal}, {"store", e.segments}} {
		for _, p := range d.dev.Paths() {
			out.Paths = append(out.Paths, api.Path{LUN: d.name, Portal: p.Portal, Connected: p.Connected, State: p.State, InUse: p.InUse, Error: p.Error})
		}
	}
	return out
}

// Metered implements Metered.
func (e *storeEngine) Metered() []store.Metered { return e.st.Metered() }

func (e *storeEngine) Err() error { return e.st.Err() }

func (e *storeEngine) Close(ctx context.Context) error {
	return errors.Join(e.st.Close(ctx), e.closeDevices())
}
