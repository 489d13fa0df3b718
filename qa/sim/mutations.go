package sim

// Mutation breaks the product on purpose, at the edges of the pool. The name says what the code would do.
type Mutation string

// The mutations, each of which the simulation must catch. README.md has the list with seeds.
const (
	None              Mutation = ""
	SkipFlush         Mutation = "skip-flush"
	AckBeforeAppend   Mutation = "ack-before-append"
	SkipUpdateLog     Mutation = "skip-update-log"
	ApplyBeforeLog    Mutation = "apply-before-log"
	TrimEarly         Mutation = "trim-early"
	TrimUpdatesEarly  Mutation = "trim-updates-early"
	ReplayNoUpdates   Mutation = "replay-no-updates"
	ReplayReversed    Mutation = "replay-reversed"
	SkipMap           Mutation = "skip-map"
	SplitAppend       Mutation = "split-append"
	ZerosAreForgotten Mutation = "zeros-forgotten"
	TrimBeforeFlush   Mutation = "trim-before-flush"

	AckWithoutMirror Mutation = "ack-without-mirror"
	MirrorAcksEarly  Mutation = "mirror-acks-early"
	LeaveSoloEarly   Mutation = "leave-solo-early"
	SkipSolo         Mutation = "skip-solo"
	NoFence          Mutation = "no-fence"
	OldOwnerWrites   Mutation = "old-owner-writes"
	NoLease          Mutation = "no-lease"
	StaleTakeover    Mutation = "stale-takeover"
	IgnoreSolo       Mutation = "ignore-solo"
	ReplayNoChecksum Mutation = "replay-no-checksum"
	ClaimBlindly     Mutation = "claim-blindly"
	StayFresh        Mutation = "stay-fresh"
)

// Mutations of what verifies.
const (
	IgnoreGenerations Mutation = "ignore-generations"
	IgnoreChecksums   Mutation = "ignore-checksums"
)

// Mutations in the order of README.md, each with the world that it is of.
var Mutations = []struct {
	Name  Mutation
	World World
}{
	{SkipFlush, PoolWorld}, {AckBeforeAppend, PoolWorld}, {SkipUpdateLog, PoolWorld}, {ApplyBeforeLog, PoolWorld}, {TrimEarly, PoolWorld},
	{TrimUpdatesEarly, PoolWorld}, {ReplayNoUpdates, PoolWorld}, {ReplayReversed, PoolWorld}, {SkipMap, PoolWorld}, {SplitAppend, PoolWorld},
	{ZerosAreForgotten, PoolWorld}, {TrimBeforeFlush, PoolWorld}, {IgnoreGenerations, PoolWorld}, {IgnoreChecksums, PoolWorld},
	{AckWithoutMirror, ShelfWorld}, {MirrorAcksEarly, ShelfWorld}, {LeaveSoloEarly, ShelfWorld}, {SkipSolo, ShelfWorld}, {NoFence, ShelfWorld},
	{OldOwnerWrites, ShelfWorld}, {NoLease, ShelfWorld}, {StaleTakeover, ShelfWorld}, {IgnoreSolo, ShelfWorld}, {ReplayNoChecksum, ShelfWorld},
	{ClaimBlindly, ShelfWorld}, {StayFresh, ShelfWorld},
}
