package raid

import (
	"context"
	"errors"
	"time"
)

// The life of a member: what may be asked of it, by name. Where the work is done:
//
//	Rebuild           rebuild.go   a failed member's strips → distributed spare space
//	Replace, Readd    copyback.go  a new or returning drive ← the strips of a failed member
//	Offer             offer.go     what is this drive to this array?
//	FailMember        suspect.go   by the operator, or after too many errors
//	AtRisk            risk.go      how many stripes have lost how much
//	ScrubAll          scrub.go     verify everything
//
//	          errs, hangs, rots                   a write missed it, FailMember
//	 online ───────────────────► suspect ───┐   ┌──────────────────────────────── online, suspect
//	   ▲  ◄─────────────────────            ▼   ▼
//	   │      forgotten             enough: failed ──Rebuild──► rebuilding ──► spared
//	   │                                      │                                  │
//	   └───── restoring ◄──── Replace, Readd ─┴──────────────────────────────────┘

// ErrRedundancy: what was asked would leave fewer strips than the caller allowed; the text says how many.
var ErrRedundancy = errors.New("raid: redundancy does not allow it")

const (
	// Suspect: it erred, hung or returned rot more often than Options.Suspicion allows. It has all that was written,
	// takes writes, and reads go round it.
	Suspect MemberState = "suspect"
	// Restoring: a new or returning drive is in a failed member's place, and its strips are being copied to it.
	Restoring MemberState = "restoring"
)

// RebuildOptions shape a rebuild or a copy-back. The zero value runs at full speed.
type RebuildOptions struct {
	// Pace, if not nil, is called before each stripe that needs work and may wait: that is the throttle. Its error
	// ends the call. It is called by one goroutine at a time.
	Pace func(context.Context) error
	// Progress, if not nil, hears after each batch how many stripes of the array are done. Not concurrently.
	Progress func(done, total uint64)
	// Used, if not nil, says whether a stripe holds anything that matters; others are passed over. It is asked with the
	// stripe locked, and must say true from before the first write of a stripe; a stripe that it denies must be written
	// whole before it is read again.
	Used func(stripe uint64) bool
	// Workers is how many stripes are worked on at once. [4/3 of the members, 4 to 32]
	Workers int
	// Batch is how many stripes are worked on between two flushes and label writes: what a crash repeats. [RebuildBatch]
	Batch int
}

// ReplaceOptions shape Replace.
type ReplaceOptions struct {
	RebuildOptions
	// Force takes a drive that is not blank: another pool's, or anything else but a working member of this array.
	Force bool
}

// OfferKind is what a drive is to an array.
type OfferKind string

const (
	// OfferBlank: no label and nothing else in the first 64 KiB: good for Replace.
	OfferBlank OfferKind = "blank"
	// OfferUsed: no label of ours, but not empty: Replace needs Force.
	OfferUsed OfferKind = "used"
	// OfferReturned: a member that is only missing: no write missed it. Readd takes it as it is.
	OfferReturned OfferKind = "returned"
	// OfferStale: a member that the array recorded as failed: Readd brings it up to date.
	OfferStale OfferKind = "stale"
	// OfferOldCopy: an older copy of a member that works, or that another drive took the place of.
	OfferOldCopy OfferKind = "old-copy"
	// OfferDuplicate: it claims to be a member that works, with as new a label.
	OfferDuplicate OfferKind = "duplicate"
	// OfferForeign: a member of another pool or array.
	OfferForeign OfferKind = "foreign"
	// OfferSmall: too small for a member of this array, whatever else it is.
	OfferSmall OfferKind = "small"
)

// Offer is what Array.Offer found out about a drive.
type Offer struct {
	Kind OfferKind
	// Member is the index that its label claims in this array, -1 if none.
	Member int
	// Pool and Array are what its label names; zero without one.
	Pool, Array UUID
	// Detail is a sentence for people.
	Detail string
}

// JobKind is what is being done for a member.
type JobKind string

const (
	JobRebuild  JobKind = "rebuild"
	JobCopyBack JobKind = "copy-back"
	JobReadd    JobKind = "re-add"
)

// JobStatus is how far a rebuild or copy-back is. Done and Total are stripes of the array.
type JobStatus struct {
	Kind        JobKind
	Done, Total uint64
	// Running: a call is at work on it. Else it waits for Rebuild or CopyBack to go on.
	Running bool
	// Started is when the running call began, zero if none; Done was StartedAt then. What is left takes
	// (Total-Done) × elapsed/(Done-StartedAt).
	Started   time.Time
	StartedAt uint64
}

// Risk counts stripes by what they have lost.
type Risk struct {
	// Lost[i] stripes have no place for i of their strips now; i is 0 to M.
	Lost []uint64
	// Beyond have lost more than parity can rebuild.
	Beyond uint64
}

// Suspicion sets when a member that errs is suspected, and when it is failed. Each read that errs or does not verify
// adds a point, each second that reads wait for a hung member adds one, and points halve in HalfLife. One bad block is
// one point, however often it is read before it is repaired.
type Suspicion struct {
	// Off: members are repaired for ever and never suspected.
	Off bool
	// SuspectAt points make a member suspect. [8]
	SuspectAt float64
	// FailAt points make it failed, if redundancy allows (suspect.go). [32; negative: never]
	FailAt float64
	// HalfLife of a point. [10 min]
	HalfLife time.Duration
	// Now is the clock. [time.Now]
	Now func() time.Time
}

// ScrubOptions shape ScrubAll.
type ScrubOptions struct {
	// From is the first stripe; a report's Next goes on where it ended.
	From uint64
	// Pace, if not nil, is called before each chunk that holds anything is read, with the bytes it will read, and may wait.
	Pace func(ctx context.Context, bytes int64) error
	// Progress, if not nil, hears after each chunk: all stripes below next are verified. Not concurrently.
	Progress func(next, total uint64)
	// Used, if not nil, says whether a stripe holds anything; others are passed over.
	Used func(stripe uint64) bool
	// Workers is how many chunks are verified at once. [2]
	Workers int
	// AcceptOld is for after a log was given up: where a stripe's strips are of before and after an update, more of them than parity stands for,
	// they are accepted as they are (accept.go). It makes old data of what may be lost writes of drives.
	AcceptOld bool
	// Valid, if not nil, says of a data block of such a stripe that its strip's checksum block does not know, as one that was written when the power
	// went, and its checksum block not yet, that it is right by itself: it is accepted, too. Else it is lost.
	Valid func(stripe uint64, block int, data []byte) bool
}

// MaxScrubList bounds ScrubReport.Unrecoverable.
const MaxScrubList = 256

// ScrubReport is what a scrub found.
type ScrubReport struct {
	// Next is where to go on; the number of stripes when all are done.
	Next uint64
	// Stripes were verified, Unwritten ones aside; Bytes were read.
	Stripes, Unwritten uint64
	Bytes              int64
	// Strips that were bad on working members, by kind: Rotten did not match their checksums or carried no checksum
	// block, Stale had lost a write, Unreadable answered with an error or not at all. Mismatched stripes have parity
	// that does not match data, with every checksum right.
	Rotten, Stale, Unreadable, Mismatched uint64
	// Repaired strips were rewritten in place.
	Repaired uint64
	// LostBlocks are marked as lost (lost.go).
	LostBlocks uint64
	// Lost stripes could not be repaired; Unrecoverable names the first of them, at most MaxScrubList.
	Lost          uint64
	Unrecoverable []uint64
	// Members had bad strips, bit i is member i.
	Members uint64
}
