package raid

import (
	"context"
	"log/slog"
	"time"
)

// Options of Create and Open. The zero value of each field is given in brackets.
type Options struct {
	// K, M and Spares shape a new array; Open takes them from the label. [8, 2, 2 where n allows, else 0]
	K, M, Spares int
	// NoSpares asks Create for no spare space: Spares zero means zero.
	NoSpares bool
	// Pool is the pool of a new array, or the only one that Open accepts. [Create: random; Open: any]
	Pool UUID
	// Array is the only array that Open accepts. [the one that a majority of the labels names]
	Array UUID
	// Force lets Create overwrite drives that are not blank.
	Force bool
	// ReadOnly opens to look: nothing is written, not even a repair. A standby controller's way.
	ReadOnly bool
	// CacheBytes bounds the checksum blocks kept in memory. [32 MiB]
	CacheBytes int
	// QueueDepth bounds the I/Os in flight to one member. [32]
	QueueDepth int
	// ReadTimeout: a read that takes longer counts as failed, and parity answers. [4 s]
	ReadTimeout time.Duration
	// WriteTimeout: a write, flush or label that takes longer fails its member. [30 s]
	WriteTimeout time.Duration
	// Random makes UUIDs; simulations pass their own. [crypto/rand]
	Random func([]byte)
	// Logger hears of members that fail and blocks that are repaired. [none]
	Logger *slog.Logger
}

// Geometry is the shape of an array.
type Geometry struct {
	N, K, M, Spares int
	Stripes         uint64
	// StripeBytes is the data of a stripe: K*StripBytes.
	StripeBytes int64
}

// BlockWrite is one data block of a stripe to be changed.
type BlockWrite struct {
	Block int // 0 to K*StripBlocks-1
	Data  []byte
}

// MemberState is where a member stands.
type MemberState string

const (
	Online MemberState = "online"
	// Missing: absent, not yet recorded as failed: no write missed it so far.
	Missing MemberState = "missing"
	// Failed: recorded as failed on the other members; it must be rebuilt.
	Failed MemberState = "failed"
	// Rebuilding: its strips are being regenerated.
	Rebuilding MemberState = "rebuilding"
	// Spared: it failed, and all its strips were rebuilt to spare space.
	Spared MemberState = "spared"
)

// MemberStatus is one member as Status sees it.
type MemberStatus struct {
	Index int
	Path  string // empty when absent
	State MemberState
	// Slow: reads are outstanding beyond ReadTimeout, and parity answers in its place.
	Slow bool
	// ReadErrors, WriteErrors and Timeouts were the drive's answers; ChecksumErrors are blocks that did not
	// match; StaleStrips had lost a write; Repairs are strips rewritten in place.
	ReadErrors, WriteErrors, Timeouts, ChecksumErrors, StaleStrips, Repairs uint64
}

// Refusal is a drive that Open did not take, and why (one of the Err… above, wrapped).
type Refusal struct {
	Path string
	Err  error
}

// Counters count since Open.
type Counters struct {
	Reads, DegradedReads, FullWrites, Updates, UpdatesByDelta, UpdatesByRebuild uint64
	Repairs, ChecksumErrors, StaleStrips, Unrecoverable, CacheHits, CacheMisses uint64
}

// ArrayState sums the members up.
type ArrayState string

const (
	Optimal  ArrayState = "optimal"
	Degraded ArrayState = "degraded" // members missing, everything readable and writable
	Broken   ArrayState = "failed"   // some stripes are beyond parity, or writes stopped
	Fenced   ArrayState = "fenced"   // another controller owns the members
)

// Status is a snapshot for people and programs.
type Status struct {
	Pool, Array UUID
	Geometry    Geometry
	State       ArrayState
	// Err is why the array writes nothing more; nil while it does.
	Err      error
	Members  []MemberStatus
	Refused  []Refusal
	Counters Counters
}

