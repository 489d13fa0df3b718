// Package shelf is the pool: LUNs, the extent map, and the path of every block between an initiator's
// command and the members.
//
// It owns the meaning of what nvram logs and of what raid stores: the overlay of acknowledged blocks
// that are not on the members yet, the map from LUN extents to stripes, LUN and host records, destage and
// replay. It promises P1 (a write returns only after log.Append returned), P3 (every update in place is
// logged whole before the first strip is touched, see destage.go) and P7 (the log always has room to
// destage all that it holds, see admit.go). It never decides who owns the pool, never writes to a member
// after the array or the log failed, and never returns a block that raid did not verify.
//
// # Where to read
//
//	write.go    a write: lock, reserve, admit, append, overlay, acknowledge
//	read.go     a read: overlay, else members
//	unmap.go    UNMAP and WRITE SAME of zeros: zero extents, whole extents freed
//	destage.go  overlay to members, the essay on crashes, Trim
//	lost.go     stripes beyond parity
//	replay.go   start-up and takeover
//	reserve.go  the last extents are for agents
//	maintain.go, scrub.go, pace.go   rebuild and scrub in the background
//	lun.go, hosts.go, reservations.go   the records
//	extents.go, lunmap.go, freemap.go   the extent map
//	grow.go     new stripes of the array become extents
//
// # Address spaces
//
// A LUN is a row of extents of ExtentBlocks blocks (8 MiB). A pool extent is the same number of blocks
// on the array: ceil(ExtentBlocks / (K*32)) stripes from stripe DataStripe + extent*ExtentStripes on. LUN 0
// is the pool's own metadata: its block b is block b%(K*32) of stripe b/(K*32), always there, never mapped.
//
//	metadata block     what
//	0                  superblock
//	1 … MaxLUNs        LUN record of the id equal to the block number; zeros: no such LUN
//	+1 … +MaxHosts     host records; zeros: empty
//	then               persistent reservations, as many blocks as the superblock says; zeros: free
//	then               extent table, 169 entries a block; of extents that came later: grow.go
//
// # Formats (version 1; little-endian; CRC-32C over the whole 4 KiB block with the crc field zero)
//
// Every block begins alike:
//
//	offset size field
//	0      4    magic: "LGsb" superblock, "LGlu" LUN, "LGho" host, "LGxt" extent table, "LGdl" deltas,
//	              "LGpr" reservations
//	4      2    version, 1; a superblock with growths 2: who does not know them must not touch the pool
//	6      2    count: entries (extent table, deltas), LUN ids (host), bytes (reservations), else 0
//	8      4    crc
//	12     4    index: the metadata block it is (deltas: 0); a misplaced block is corrupt
//
// Superblock:
//
//	16     16   pool UUID
//	32     8    stripes of the array when the pool was made
//	40     2    K; 42: M
//	44     4    extent blocks
//	48     4    MaxLUNs; 52: MaxHosts
//	56     4    extents
//	60     2    extent stripes
//	64     8    data stripe: the first stripe behind the metadata
//	72     8    generation ceiling: no stripe carries a generation, and no extent a birth, at or above it
//	80     4    blocks for reservations; 0 in pools from before 2026-11-25, which keep none
//	256    1    scrub: 0 no pass under way, 1 under way, 2 paused; all of the scrub is zero in pools from before 2026-11-26
//	264    8    next stripe of the pass
//	272    8    when it began, in Unix seconds; 280: from when the time to the next pass counts
//	288    16   when the last whole pass began and ended (8 each)
//	304    56   found so far, 8 each: stripes, unwritten ones, bad strips, repaired ones, lost blocks, stripes beyond
//	              parity, stripes whose parity does not match
//	360    56   the same of the last whole pass
//	84     4    growths, 1 to 8; version 2 only
//	88     16×n for each growth: stripes of the array then (8), extents of the pool since (4), zero (4)
//	512    1    percent of the pool that may be allocated before initiators are warned, at most 100; 0 (pools from before
//	            2026-11-26): 90
//
// LUN record:
//
//	16     16   UUID
//	32     8    size in blocks of 4 KiB
//	40     4    logical block bytes, 512 or 4096
//	44     1    kind: 1 plain, 2 journal, 3 store
//	45     1    state: 1 live, 2 being deleted
//	46     2    length of name, 1 to 64; 48: name
//
// Host record:
//
//	16     2    length of name, 1 to 64; 18: name
//	82     2    length of initiator name, 1 to 223; 84: name
//	308    4×n  LUN ids, n ≤ 256
//
// Reservations, a part of what SaveReservations was given for a LUN; the parts of one LUN may stand anywhere:
//
//	16     4    LUN id
//	20     2    number of this part, from 0; 22: parts (2), at most 96
//	32     …    bytes as the target engine made them (target/scsi: JSON with a version of its own)
//
// Extent table entry, 24 bytes from offset 32 on (16 to 31 are zero):
//
//	0      4    LUN id; 0: free
//	4      4    extent of the LUN
//	8      8    birth: the number of this allocation, from the generations; kept when freed
//	16     8    written: bit i is set when stripe i of the extent is on the members; a clear bit reads as zeros
//
// Delta block, the payload of a nvram set of kind 1: 40 bytes an entry from offset 32 on; offset 16: data
// stripe (8), 24: extent stripes (2), so that replay understands it before it can read the superblock:
//
//	0      1    op: 1 alloc, 2 free, 3 written
//	4      4    pool extent
//	8      4    LUN id; 12: extent of the LUN (4)
//	16     8    birth
//	24     8    written: stripes of the extent (op written)
//	32     8    zero
//
// Sets of the log: kind 0, block writes; 1, one delta block; 2, one superblock, LUN, host or reservations block, its
// LBA the metadata block (a record has as many sets of it as change together); 128, one encoded raid update, its LBA the stripe. A new kind, op or version gets the
// next number and a line here.
//
// # Memory and start-up
//
// An extent costs 24 bytes of table and 8 to 21 of map (lunmap.go), a free one a bit: a full pool of 100 TB, 11.9
// million extents, 400 to 550 MiB. At start the metadata stripes are read several at a time and decoded in
// parallel (replay.go); capacity_test.go does it with a pool of that size.
//
// # Locks
//
// A LUN's range lock (held by an operation from admission to acknowledgement: it guards blocks, not
// fields); then Pool.admin (a one-slot semaphore: LUN and host records and reservations have one writer); then Pool.turn (the
// same, for destage; maintainer.turn, for maintenance, is on its own); then maintainer.mu, which guards its own fields; then Pool.mu, which guards the fields below it and is never held across I/O.
package shelf
