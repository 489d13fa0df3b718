package api

import (
	"fmt"
	"log/slog"
	"time"
)

// Phases of an agent, in their order. It goes back to joining when the store has to be opened anew.
const (
	PhaseJoining = "joining" // looking for a controller that owns the pool
	PhaseOpening = "opening" // sessions, recovery of the store
	PhaseServing = "serving"
	PhaseClosing = "closing"
)

// Path is one session of the agent to a portal of the shelf.
type Path struct {
	LUN       string `json:"lun"` // journal or store
	Portal    string `json:"portal"`
	Connected bool   `json:"connected"`
	State     string `json:"state"` // optimized, standby, …, down
	InUse     bool   `json:"in_use"`
	Error     string `json:"error,omitempty"`
}

// Cache tells how well reads are served without the shelf.
type Cache struct {
	Hits    uint64  `json:"hits"`
	Misses  uint64  `json:"misses"`
	HitRate float64 `json:"hit_rate"` // 0 to 1; 0 before the first read
	Bytes   int64   `json:"bytes"`    // held; size of the cache in a Status
	Size    int64   `json:"size_bytes"`
}

// Figures are what data take: as written, after dedup, after compression with metadata.
type Figures struct {
	LogicalBytes     int64   `json:"logical_bytes"`
	UniqueBytes      int64   `json:"unique_bytes"`
	StoredBytes      int64   `json:"stored_bytes"`
	PendingBytes     int64   `json:"pending_bytes"` // acknowledged, not packed yet
	DedupRatio       float64 `json:"dedup_ratio"`
	CompressionRatio float64 `json:"compression_ratio"`
}

// Volume is one virtual disk.
type Volume struct {
	Name      string `json:"name"`
	UUID      string `json:"uuid"`
	SizeBytes int64  `json:"size_bytes"`
	Figures
	Cache    Cache  `json:"cache"`
	IQN      string `json:"iqn"`
	LUN      uint16 `json:"lun"`
	Portal   string `json:"portal"`
	Sessions int    `json:"sessions"` // of initiators
	// Origin is the snapshot that a clone began as, VOLUME@SNAPSHOT.
	Origin    string `json:"origin,omitempty"`
	Snapshots int    `json:"snapshots"`
	// Compression of what is written from now on: s2, zstd or off.
	Compression string `json:"compression,omitempty"`
}

// Snapshot is a volume as it was at one instant.
type Snapshot struct {
	Volume string `json:"volume"`
	Name   string `json:"name"`
	UUID   string `json:"uuid"`
	// Group is the same for all that were taken together.
	Group        string    `json:"group"`
	Created      time.Time `json:"created"`
	SizeBytes    int64     `json:"size_bytes"`
	LogicalBytes int64     `json:"logical_bytes"`
	Clones       []string  `json:"clones"` // volumes
}

// Diff is what differs between two snapshots of a volume; To "": between a snapshot and the volume as it is.
type Diff struct {
	Volume string  `json:"volume"`
	From   string  `json:"from"`
	To     string  `json:"to"`
	Ranges []Range `json:"ranges"` // in order; contents there may differ, elsewhere they do not
	Bytes  int64   `json:"bytes"`  // of Ranges
	// Next is the offset to ask for what is behind Ranges; 0: nothing is.
	Next int64 `json:"next_offset,omitempty"`
}

// Range is a run of bytes.
type Range struct {
	Offset int64 `json:"offset"`
	Length int64 `json:"length"`
}

// RenameRequest, SnapshotRequest, CloneRequest and RollbackRequest are the bodies of POSTs.
type RenameRequest struct {
	Name  string `json:"name"`
	Force bool   `json:"force,omitempty"`
}
type SnapshotRequest struct {
	Name    string   `json:"name"`
	Volumes []string `json:"volumes"`
}
type CloneRequest struct {
	Name string `json:"name"`
}
type RollbackRequest struct {
	Force bool `json:"force"`
}

// Status of an agent.
type Status struct {
	Host      string `json:"host"`
	Initiator string `json:"initiator"`
	Version   string `json:"version"`
	Phase     string `json:"phase"`
	// Trouble is why the phase is not serving, or what failed last; "" where nothing did.
	Trouble string    `json:"trouble,omitempty"`
	Since   time.Time `json:"since"` // of the phase
	Portal  string    `json:"portal"`
	Store   string    `json:"store,omitempty"` // UUID
	Figures
	Cache Cache  `json:"cache"`
	Maps  *Maps  `json:"maps,omitempty"`
	Index *Index `json:"index,omitempty"`
	Work  *Work  `json:"work,omitempty"`
	// GivenUp is what an operator's order gave up when the store was opened: those bytes are read errors until they are written.
	GivenUp  []GivenUp `json:"given_up,omitempty"`
	Volumes  int       `json:"volumes"`
	Sessions int       `json:"sessions"`
	Paths    []Path    `json:"paths"`
	// Schedules are the entries of "snapshots" in the configuration.
	Schedules     []Schedule `json:"schedules"`
	MaxVolumes    int        `json:"max_volumes"`
	MaxSizeBytes  int64      `json:"max_volume_bytes"`
	SizeStepBytes int64      `json:"volume_step_bytes"`
}

// Maps is the memory that the volumes' maps take: Bytes of LimitBytes ("memory.map"). Of their Pages, of 2 MiB of a volume each, Resident are
// there; others were read, PagesRead times since the agent began: where that grows fast, a larger limit makes reads faster.
type Maps struct {
	Bytes      int64 `json:"bytes"`
	LimitBytes int64 `json:"limit_bytes"`
	Pages      int64 `json:"pages"`
	Resident   int64 `json:"resident_pages"`
	PagesRead  int64 `json:"pages_read"`
}

// Work is what became of blocks (4 KiB) since the agent opened its store. Of those that were written, Stored were new, Duplicates were there
// already, and Overwritten never had to be stored, as they were overwritten at once. Moved were stored again by the cleaner, which makes
// room of what was overwritten later.
type Work struct {
	Stored      int64 `json:"stored_blocks"`
	Duplicates  int64 `json:"duplicate_blocks"`
	Overwritten int64 `json:"overwritten_blocks"`
	Moved       int64 `json:"moved_blocks"`
}

// GivenUp are bytes of a volume, or of one of its snapshots, of which nothing is known any more. Some of them may never have been written.
type GivenUp struct {
	Volume      string `json:"volume"`
	Snapshot    string `json:"snapshot,omitempty"`
	OffsetBytes int64  `json:"offset_bytes"`
	Bytes       int64  `json:"bytes"`
	// Journal: it is the writes acknowledged last, of all volumes, that are gone: the journal's end. Nothing else is set.
	Journal bool `json:"journal,omitempty"`
}

// Index is the dedup index: Entries in Bytes of memory, the largest power of two within "memory.index". Sampled: there is no room for all
// blocks, and of those that are old it has a sample, by which duplicates that come in runs are still found. Ready: it was filled with what was
// there when the agent began, or when its size was changed.
type Index struct {
	Entries int64 `json:"entries"`
	Bytes   int64 `json:"bytes"`
	Sampled bool  `json:"sampled"`
	Ready   bool  `json:"ready"`
}

// Schedule is snapshots that the agent takes by itself.
type Schedule struct {
	Name         string   `json:"name"`
	Volumes      []string `json:"volumes"`
	EverySeconds int64    `json:"every_seconds"`
	Keep         int      `json:"keep"`
	// Last is when one was taken since the agent serves; Next when it looks again; Trouble what failed last.
	Last    *time.Time `json:"last,omitempty"`
	Next    *time.Time `json:"next,omitempty"`
	Trouble string     `json:"trouble,omitempty"`
}

// CreateRequest, ResizeRequest and CompressionRequest are the bodies of the three POSTs.
type CreateRequest struct {
	Name        string `json:"name"`
	SizeBytes   int64  `json:"size_bytes"`
	Compression string `json:"compression,omitempty"`
}
type CompressionRequest struct {
	Compression string `json:"compression"`
}
type ResizeRequest struct {
	SizeBytes int64 `json:"size_bytes"`
	Shrink    bool  `json:"shrink"`
}

// Grant is a shelf's answer to a host that joins.
type Grant struct {
	// Initiator is the name to log in with: it ends in the number of this claim.
	Initiator  string   `json:"initiator"`
	Target     string   `json:"target"`
	Portals    []string `json:"portals"`
	JournalLUN uint32   `json:"journal_lun"`
	StoreLUN   uint32   `json:"store_lun"`
	// CapacityBytes bounds what the store takes of the pool; zero: not known.
	CapacityBytes int64 `json:"capacity_bytes"`
	// CHAP are the claim's secrets.
	CHAP *CHAP `json:"chap,omitempty"`
}

// CHAP is a pair of secrets (RFC 7143 12.1.3): the initiator's and the target's. It is never printed.
type CHAP struct {
	User         string `json:"user"`
	Secret       string `json:"secret"`
	TargetUser   string `json:"target_user"`
	TargetSecret string `json:"target_secret"`
}

// Format keeps the secrets out of logs and errors, whatever the verb.
func (c CHAP) Format(f fmt.State, _ rune) { fmt.Fprint(f, "(CHAP secrets)") }

// LogValue does the same for package slog.
func (c CHAP) LogValue() slog.Value { return slog.StringValue("(CHAP secrets)") }

// Shelf is one controller's status.
type Shelf struct {
	Shelf      string `json:"shelf"`
	Controller string `json:"controller"`
	Role       string `json:"role"`
	Phase      string `json:"phase"`
	Epoch      uint64 `json:"epoch"`
	Owner      string `json:"owner"`
	Partner    struct {
		Connected bool   `json:"connected"`
		Mirror    string `json:"mirror"`
		// What the link is over ("window", "tcp", "unix"), and since when, while it is connected.
		Transport      string     `json:"transport,omitempty"`
		TransportSince *time.Time `json:"transport_since,omitempty"`
		// The last time that another transport stood in for the window.
		Fallback *struct {
			At     time.Time `json:"at"`
			Reason string    `json:"reason"`
		} `json:"fallback,omitempty"`
	} `json:"partner"`
	NVRAM struct {
		Size int64 `json:"size"`
		Used int64 `json:"used"`
	} `json:"nvram"`
	Pool *struct {
		UUID           string `json:"uuid"`
		CapacityBytes  int64  `json:"capacity_bytes"`
		AllocatedBytes int64  `json:"allocated_bytes"`
		State          string `json:"state"`
	} `json:"pool"`
	Members []struct {
		Index  int    `json:"index"`
		Path   string `json:"path"`
		State  string `json:"state"`
		Errors uint64 `json:"errors"`
	} `json:"members"`
	LUNs []struct {
		ID             uint32 `json:"id"`
		LUN            uint32 `json:"lun"`
		Name           string `json:"name"`
		Kind           string `json:"kind"`
		SizeBytes      int64  `json:"size_bytes"`
		AllocatedBytes int64  `json:"allocated_bytes"`
	} `json:"luns"`
	ServingSince *time.Time `json:"serving_since"`
	Trouble      string     `json:"trouble,omitempty"`
	Version      string     `json:"version"`
}
