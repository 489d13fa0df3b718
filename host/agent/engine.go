package agent

import (
	"context"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/ledge-storage/ledge/host/store"
	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/scsi"
)

// VolumeInfo is a volume as the engine knows it.
type VolumeInfo struct {
	Name      string
	UUID      [16]byte
	SizeBytes int64
	Origin    string // VOLUME@SNAPSHOT of a clone
	Snapshots int
	// Compression is s2, zstd or off; empty: the engine does not compress.
	Compression string
	Figures     api.Figures
	Cache       api.Cache
}

// Compressor is an engine that compresses, each volume in its way (store.Compression).
type Compressor interface {
	SetCompression(ctx context.Context, name string, c store.Compression) error
}

// Indexer is an engine with a dedup index whose size can be changed while it works.
type Indexer interface {
	ResizeIndex(limitBytes int64) error
}

// EngineStats are the store's figures.
type EngineStats struct {
	Store   string
	Figures api.Figures
	Cache   api.Cache
	Maps    *api.Maps // nil: there are none
	Index   *api.Index
	Work    *api.Work
	GivenUp []api.GivenUp
	Paths   []api.Path
}

// Engine is what keeps volumes: the store on the shelf's LUNs (storeEngine), or memory in tests. Errors
// of requests are those of package store. All methods may be called concurrently.
type Engine interface {
	CreateVolume(ctx context.Context, name string, bytes int64) error
	ResizeVolume(ctx context.Context, name string, bytes int64) error
	DeleteVolume(ctx context.Context, name string) error
	Volumes() []VolumeInfo
	// Device is the volume as the target engine serves it; it stays valid through a resize.
	Device(name string) (target.Device, error)
	// Reservations is where the persistent reservations of the volume's initiators are kept; nil: nowhere.
	Reservations(name string) (scsi.ReservationStore, error)
	Stats() EngineStats
	// Err is why the engine stopped for good; nil while it works.
	Err() error
	// Close makes everything durable that can be within ctx, and waits for every goroutine.
	Close(ctx context.Context) error
}

// OpenEngine opens the engine on the LUNs that the shelf granted. It may take as long as ctx lives:
// it waits for paths. acceptLost is an operator's order to give up what it cannot read of the volumes' maps (store.Options.AcceptLost).
type OpenEngine func(ctx context.Context, g api.Grant, acceptLost bool) (Engine, error)
