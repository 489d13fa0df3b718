package nvram

import (
	"context"
	"log/slog"
	"time"
)

// FormatOptions describes a new log.
type FormatOptions struct {
	ID    ID     // required: NewID()
	Epoch uint64 // the owner's epoch
	// FirstLSN of the new log; 0 means 1. A new owner continues above the log that it took over.
	FirstLSN uint64
	// UpdateBytes of the area are the lane of KindUpdate; 0 means a quarter.
	UpdateBytes int64
}

// Options of an open log.
type Options struct {
	// ID that the area must carry, else ErrForeign; the zero ID accepts any.
	ID ID
	// Epoch of the owner; ErrStale if the log saw a newer one.
	Epoch uint64
	// Replicator mirrors the log to the partner (mirror.Link.Replicator). nil: there is no partner, and the
	// log goes solo with its first Append.
	Replicator Replicator
	// Witness records solo; nil records nothing (tools and tests).
	Witness Witness
	// MirrorTimeout: an acknowledgement that the partner holds up for so long makes the log solo; 0 means 2 s.
	MirrorTimeout time.Duration
	// ReserveBytes of the data lane are for KindInternal only; 0 means an eighth of the lane.
	ReserveBytes int64
	// MaxRecordBytes bounds one record, so one Append; 0 means 8 MiB or a quarter of the lane, the lesser.
	MaxRecordBytes int64
	// Pipeline is how many records may be in flight; 0 means 4.
	Pipeline int
	// Logger gets changes of the mirror's state; nil discards.
	Logger *slog.Logger
}

// Info is what an area says about its log.
type Info struct {
	ID    ID
	Epoch uint64
	// Run counts the openings of the log.
	Run uint64
	// Tail is the first LSN that may still be needed; Next, the one after the last record (0 if not scanned).
	Tail, Next uint64
	// Mirror: the area mirrors a partner's log. Complete: as far as the mirror itself can know.
	Mirror, Complete bool
}

// Stats of a log.
type Stats struct {
	// Bytes and Used of the data lane; Reserve is the part that hosts may not use.
	Bytes, Used, Reserve int64
	// UpdateBytes and UpdateUsed of the lane of KindUpdate.
	UpdateBytes, UpdateUsed int64
	// Tail is the oldest LSN kept in the data lane, Next the one that the next record gets; all below Acked
	// are acknowledged; all below Mirrored are durable at the partner.
	Tail, Next, Acked, Mirrored uint64
	// Mirror is one of the Mirror* constants.
	Mirror MirrorStatus
	// Records, Sets and PayloadBytes appended since Open.
	Records, Sets, PayloadBytes uint64
	// Waiting Appends: for room, and for a place in a record.
	Waiting int
}

// MirrorStatus is how the log stands to its mirror.
type MirrorStatus string

const (
	MirrorInSync  MirrorStatus = "in-sync" // every acknowledged write is in the mirror, and new ones go there first
	MirrorWaiting MirrorStatus = "waiting" // the partner is away, and nothing was acknowledged without it
	MirrorResync  MirrorStatus = "resync"  // the partner is connected and being brought current
	MirrorSolo    MirrorStatus = "solo"    // recorded solo, the partner is away
	MirrorFailed  MirrorStatus = "failed"  // the log failed: see Log.Err
)

// API under construction (signatures final):
//
//	Format(r Region, a Area, o FormatOptions) error
//	Inspect(r Region, a Area) (Info, error)                 superblock only; ErrEmpty, ErrCorrupt
//	Open(ctx, r Region, a Area, o Options) (*Log, error)    scans; does not close r
//	OpenMirror(r Region, a Area) (*Mirror, error)           an empty area is fine (State().Complete == false)
type logAPI interface {
	// Replay gives every set in LSN order; before the first Append only. It may start before the last Trim
	// (never after it), as one cut of both lanes.
	Replay(fn func(lsn uint64, s Set) error) error
	// Settle returns when everything replayed is in the mirror or recorded solo: call before serving.
	Settle(ctx context.Context) error
	// Append makes all sets durable as one and returns the record's LSN. With an error other than
	// ErrTooLarge/ErrInvalid the outcome is unknown until the next Replay.
	Append(ctx context.Context, sets ...Set) (uint64, error)
	// Trim: data-lane records with LSN < lsn are not needed. Does not block.
	Trim(lsn uint64)
	// TrimUpdates: the same for the lane of KindUpdate.
	TrimUpdates(lsn uint64)
	// MaxAppendBlocks is the most payload blocks one Append (KindWrite, or KindUpdate) takes.
	MaxAppendBlocks() int
	MaxUpdateBlocks() int
	Stats() Stats
	// Failed is closed when the log failed; Err says why.
	Failed() <-chan struct{}
	Err() error
	Close() error
}
