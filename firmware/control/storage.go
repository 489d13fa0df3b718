package control

import (
	"context"
	"time"
)

// The storage half of the contract: pool, array, drives and LUNs. Everything here is the owner's to answer, and another
// controller answers NotOwner, but for the drives: each controller has ports of its own and tells what it sees.

// Task is long work. A request that begins one returns at once; it is then in the pool's and the array's answer, where
// it stays for a while after its end. A task ends with the ownership of the pool; what matters of it is on the members, and the
// next owner goes on.
type Task struct {
	ID uint64 `json:"id"`
	// Kind is rebuild, copy-back, replace, readd, grow, scrub, drain or delete; Subject what it works on, in words.
	Kind    string `json:"kind"`
	Subject string `json:"subject,omitempty"`
	// State is running, waiting, done, failed or stopped.
	State string `json:"state"`
	// Done of Total are Units: "stripes" or "bytes". Total zero: not known yet.
	Done  uint64 `json:"done"`
	Total uint64 `json:"total"`
	Unit  string `json:"unit"`
	// BytesPerSecond is the speed so far, of data; SecondsLeft at this speed, and absent where that cannot be told.
	BytesPerSecond int64      `json:"bytes_per_second,omitempty"`
	SecondsLeft    *int64     `json:"seconds_left,omitempty"`
	Started        time.Time  `json:"started"`
	Ended          *time.Time `json:"ended,omitempty"`
	// Note is what it found or why it waits; Error why it failed.
	Note  string `json:"note,omitempty"`
	Error string `json:"error,omitempty"`
}

// PoolInfo is the answer of GET /v1/pool.
type PoolInfo struct {
	UUID       string `json:"uuid"`
	Controller string `json:"controller"`
	Epoch      uint64 `json:"epoch"`
	// State is ok, low (below a threshold), degraded, full or failed, the worst that is true; Why says it in words, one
	// line for each reason.
	State          string   `json:"state"`
	Why            []string `json:"why"`
	CapacityBytes  int64    `json:"capacity_bytes"`
	AllocatedBytes int64    `json:"allocated_bytes"`
	FreeBytes      int64    `json:"free_bytes"`
	// LUNBytes is what the LUNs promise together: more than the capacity in a thin pool.
	LUNs     int   `json:"luns"`
	LUNBytes int64 `json:"lun_bytes"`
	// WarnPercent: a pool of which more is allocated is low, and initiators get the soft threshold's unit attention.
	WarnPercent int `json:"warn_percent"`
	// DirtyBytes are acknowledged and not on the members yet; they and what describes them are in the log.
	DirtyBytes   int64        `json:"dirty_bytes"`
	LogBytes     int64        `json:"log_bytes"`
	LogUsedBytes int64        `json:"log_used_bytes"`
	Mirror       string       `json:"mirror"`
	Counters     PoolCounters `json:"counters"`
	Tasks        []Task       `json:"tasks"`
}

// PoolCounters count since this controller opened the pool.
type PoolCounters struct {
	Reads          uint64 `json:"reads"`
	Writes         uint64 `json:"writes"`
	OverlayHits    uint64 `json:"overlay_hits"`
	FullStripes    uint64 `json:"full_stripes"`
	PartialStripes uint64 `json:"partial_stripes"`
	DestagedBlocks uint64 `json:"destaged_blocks"`
	DestageRounds  uint64 `json:"destage_rounds"`
	LostBlocks     uint64 `json:"lost_blocks"`
	Stalls         uint64 `json:"stalls"`
	StuckStripes   int    `json:"stuck_stripes"`
}

// ArrayInfo is the answer of GET /v1/array.
type ArrayInfo struct {
	UUID string `json:"uuid"`
	Pool string `json:"pool"`
	// State is optimal, degraded, failed or fenced; Why as in PoolInfo.
	State        string   `json:"state"`
	Why          []string `json:"why"`
	Data         int      `json:"data"`
	Parity       int      `json:"parity"`
	SpareColumns int      `json:"spare_columns"`
	Stripes      uint64   `json:"stripes"`
	StripeBytes  int64    `json:"stripe_bytes"`
	// Checksums is the kind of the block checksums: xxh3, or crc32c of arrays made before 2026-11-28.
	Checksums string        `json:"checksums"`
	Members   []ArrayMember `json:"members"`
	// AtRisk counts the stripes by how many of their strips are nowhere now: AtRisk[0] have all, AtRisk[Parity] bear no
	// further loss. Beyond have lost more than parity can rebuild.
	AtRisk []uint64   `json:"at_risk"`
	Beyond uint64     `json:"beyond_parity"`
	Spare  SpareSpace `json:"spare"`
	// Grow is the growth that is under way.
	Grow     *GrowInfo     `json:"grow,omitempty"`
	Rates    Rates         `json:"rates"`
	Scrub    ScrubInfo     `json:"scrub"`
	Counters ArrayCounters `json:"counters"`
	Tasks    []Task        `json:"tasks"`
}

// GrowInfo is how far a growth by members is: Done of Total stripes lie over the new number of members, Staged are on their
// way. Carried ones could not be verified and were moved as they were.
type GrowInfo struct {
	From         int    `json:"from"`
	To           int    `json:"to"`
	Done         uint64 `json:"done"`
	Total        uint64 `json:"total"`
	Staged       uint64 `json:"staged"`
	StripesAfter uint64 `json:"stripes_after"`
	Carried      uint64 `json:"carried"`
}

// ArrayMember is one place of the array and the drive that fills it.
type ArrayMember struct {
	Index int `json:"index"`
	// State is online, suspect, missing, failed, rebuilding (to spare space), spared (by spare space) or restoring (a new
	// or returned drive is being filled).
	State string `json:"state"`
	// Slow: reads are outstanding too long, and parity answers in its place.
	Slow      bool   `json:"slow"`
	Path      string `json:"path"`
	Slot      string `json:"slot,omitempty"`
	Serial    string `json:"serial,omitempty"`
	Model     string `json:"model,omitempty"`
	SizeBytes int64  `json:"size_bytes,omitempty"`
	// Job is rebuild, copy-back or re-add, Done of Total stripes of it; Running: somebody is at work on it.
	Job         string       `json:"job,omitempty"`
	Done        uint64       `json:"done,omitempty"`
	Total       uint64       `json:"total,omitempty"`
	Running     bool         `json:"running,omitempty"`
	SecondsLeft *int64       `json:"seconds_left,omitempty"`
	LastError   string       `json:"last_error,omitempty"`
	LastErrorAt *time.Time   `json:"last_error_at,omitempty"`
	Errors      MemberErrors `json:"errors"`
}

// MemberErrors count since the array was opened: what the drive answered, and what the checksums found.
type MemberErrors struct {
	Read     uint64 `json:"read"`
	Write    uint64 `json:"write"`
	Timeout  uint64 `json:"timeout"`
	Checksum uint64 `json:"checksum"`
	Stale    uint64 `json:"stale"`
	Repaired uint64 `json:"repaired"`
}

// SpareSpace is the distributed spare space: each column can stand for one member.
type SpareSpace struct {
	Columns int `json:"columns"`
	Used    int `json:"used"`
	Free    int `json:"free"`
	// ColumnBytes is what a column holds: the share of one member.
	ColumnBytes int64 `json:"column_bytes"`
}

// Rates bound what maintenance takes from the members, in bytes of data a second. Zero: the built-in one.
type Rates struct {
	// The floors are kept however busy the pool is, so that the work ends.
	RebuildFloor int64 `json:"rebuild_floor"`
	ScrubFloor   int64 `json:"scrub_floor"`
	// Rebuild (also copy-back and re-add) and Scrub are the most on an idle pool; negative: no bound.
	Rebuild int64 `json:"rebuild"`
	Scrub   int64 `json:"scrub"`
}

// ScrubInfo is the pass that runs or waits, and what the last whole one found.
type ScrubInfo struct {
	// State is idle, running, waiting (something more urgent runs) or paused.
	State    string      `json:"state"`
	Position uint64      `json:"position"` // the next stripe of Total
	Total    uint64      `json:"total"`
	Began    *time.Time  `json:"began,omitempty"`
	Next     *time.Time  `json:"next,omitempty"` // when the next begins by itself
	Now      ScrubReport `json:"now"`
	Last     ScrubReport `json:"last"` // its ended is absent where there was none
}

// ScrubReport sums up a pass. Bad strips were rotten, stale or unreadable; repaired of them were rewritten.
type ScrubReport struct {
	Began                *time.Time `json:"began,omitempty"`
	Ended                *time.Time `json:"ended,omitempty"`
	Stripes              uint64     `json:"stripes"`
	Unwritten            uint64     `json:"unwritten"`
	BadStrips            uint64     `json:"bad_strips"`
	Repaired             uint64     `json:"repaired"`
	LostBlocks           uint64     `json:"lost_blocks"`
	UnrecoverableStripes uint64     `json:"unrecoverable_stripes"`
	ParityErrors         uint64     `json:"parity_errors"`
}

// ArrayCounters count since this controller opened the array.
type ArrayCounters struct {
	Reads          uint64 `json:"reads"`
	DegradedReads  uint64 `json:"degraded_reads"`
	FullWrites     uint64 `json:"full_writes"`
	Updates        uint64 `json:"updates"`
	Repairs        uint64 `json:"repairs"`
	ChecksumErrors uint64 `json:"checksum_errors"`
	StaleStrips    uint64 `json:"stale_strips"`
	Unrecoverable  uint64 `json:"unrecoverable"`
}

// DriveList is what one controller sees through its ports.
type DriveList struct {
	Controller string `json:"controller"`
	// Pool is the pool whose members a majority of the labels names; "" where there is none.
	Pool   string  `json:"pool"`
	Drives []Drive `json:"drives"`
}

// What a drive is, as its label says.
const (
	DriveMember     = "member"      // of the pool; in use
	DriveStale      = "stale"       // was a member; the array went on without it
	DriveOld        = "older-copy"  // a member's label of an earlier time than the array's
	DriveDuplicate  = "duplicate"   // another drive carries the same member's label
	DriveForeign    = "foreign"     // a member of another pool
	DriveBlank      = "blank"       // zeros where a label would be
	DriveData       = "data"        // no label, but not blank
	DriveUnreadable = "unreadable"  // its label cannot be read
	DriveSilent     = "no-answer"   // it does not answer
	DriveUnopened   = "cannot-open" // the system refuses it
)

// Drive is one drive as a controller sees it.
type Drive struct {
	Path      string `json:"path"`
	Slot      string `json:"slot,omitempty"`
	Serial    string `json:"serial,omitempty"`
	Model     string `json:"model,omitempty"`
	SizeBytes int64  `json:"size_bytes"`
	Label     string `json:"label"` // one of the Drive… above
	// Member, Pool, Epoch and Seq are what the label says; Member is absent without a label.
	Member *int   `json:"member,omitempty"`
	Pool   string `json:"pool,omitempty"`
	Epoch  uint64 `json:"epoch,omitempty"`
	Seq    uint64 `json:"seq,omitempty"`
	// InUse: the array reads or writes it now.
	InUse bool `json:"in_use"`
	// Detail says more, in words.
	Detail string `json:"detail,omitempty"`
}

// LUNInfo is a LUN with what is known only of one that is asked for.
type LUNInfo struct {
	LUN
	// Hosts may see it; empty: every initiator.
	Hosts []string `json:"hosts"`
	Stats LUNStats `json:"stats"`
}

// LUNStats count initiators' commands since this controller began to serve the LUN.
type LUNStats struct {
	Reads      uint64 `json:"reads"`
	ReadBytes  uint64 `json:"read_bytes"`
	Writes     uint64 `json:"writes"`
	WriteBytes uint64 `json:"write_bytes"`
	Failed     uint64 `json:"failed"`
}

// PoolSpec asks for a new pool. Zero Data and Parity, and Spares -1: as configured.
type PoolSpec struct {
	Force                bool
	Data, Parity, Spares int
	Drives               []string // empty: all that are there
}

// Storage is the owner's pool and array as this package uses them. Implementations wrap the errors above; what would
// lose data or redundancy is refused with ErrConflict and a Hint, without force where the method has it.
type Storage interface {
	Pool(ctx context.Context) (PoolInfo, error)
	Array(ctx context.Context) (ArrayInfo, error)
	SetWarnPercent(ctx context.Context, percent int) error
	// Scrub does "start", "start accepting old", "pause" or "stop".
	Scrub(ctx context.Context, what string) error
	// Drain, Grow, ReplaceMember and ReaddMember begin tasks.
	Drain(ctx context.Context) (Task, error)
	// GiveUp marks as lost what holds back the log because too many members are missing. Never without force.
	GiveUp(ctx context.Context, force bool) (Task, error)
	SetRates(ctx context.Context, r Rates) error
	Grow(ctx context.Context, paths []string, force bool) (Task, error)
	FailMember(ctx context.Context, member int, force bool) error
	ReplaceMember(ctx context.Context, member int, path string, force bool) (Task, error)
	// ReaddMember with path "" looks for the drive itself.
	ReaddMember(ctx context.Context, member int, path string) (Task, error)
	LUN(ctx context.Context, name string) (LUNInfo, error)
	ResizeLUN(ctx context.Context, name string, bytes int64) error
	RenameLUN(ctx context.Context, name, to string) error
}
