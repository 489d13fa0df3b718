// Package nvram is the controller's log of acknowledged writes: atomic sets of block writes, appended with
// group commit to a persistent region and, through a Replicator, to the partner's.
//
// It owns an area of a Region, and promises: a set for which Append returned nil is in the area, whole, and
// in the partner's mirror or else the Witness had recorded "solo" before (P1); Replay gives whole records,
// in order, up to the first that is missing, and nothing of an earlier lap, run or log; a log full of host
// data always has room for the sets that destage needs. It never interprets a set, never writes to the
// pool's members (the Witness does), and never picks who owns the pool.
//
// # The area
//
// Little endian. Everything is in blocks of 4096 bytes. An area is two superblock copies, then the data
// lane, then the update lane:
//
//	block 0   superblock, written when its sequence number is even
//	block 1   superblock, written when it is odd
//	block 2…  data lane (dataBytes), then update lane (updateBytes); offsets below count from block 2
//
// A lane is a ring of records. A record never wraps: where it does not fit before the lane's end, a pad
// record covers the rest. LSNs count records of both lanes; a lane's own sequence number counts its records.
//
// Superblock:
//
//	off  size  field
//	  0     8  magic "LEDGENVS"
//	  8     4  version, 2; 1: there are no records of version 2
//	 12     4  CRC32C of the 4096 bytes, these four taken as zero
//	 16     8  sequence number; the valid copy with the higher one is true
//	 24    16  log ID, fresh for each Format
//	 40     8  epoch of the owner
//	 48     8  run: counts the openings of the log
//	 56     8  runLSN: first LSN of this run; a record is of this run exactly when its LSN is not below
//	 64     8  dataBytes
//	 72     8  updateBytes
//	 80    24  tail of the data lane: LSN, offset, lane sequence number; the oldest record that is needed
//	104    24  tail of the update lane
//	128     8  acked: all LSNs below were acknowledged
//	136    16  the lanes' sequence numbers at acked: records of the lane below were acknowledged
//	152     1  flags: 1 a mirror of the partner's log, 2 incomplete (mirror only)
//	153     1  controller that the region belongs to, 'A' or 'B'; 0 where none is recorded: made before 2026-11-26
//	154     1  length of the shelf's name, at most 64; 155: zero (5)
//	160     8  size of the region, of which the area is a part
//	168    64  the shelf's name
//	232        zero
//
// Record: header blocks, then payload blocks.
//
//	off  size  field
//	  0     8  magic "LEDGEREC"
//	  8     2  version, 2
//	 10     1  lane: 0 data, 1 update
//	 11     1  flags: 1 pad (one header block is written; the rest of the record is not)
//	 12     4  zero; version 1: CRC32C of all bytes of the record (pad: of the header block), these four taken as zero
//	 16     8  LSN
//	 24     8  lane sequence number
//	 32    16  log ID
//	 48     8  epoch
//	 56     8  run
//	 64     8  acked when the record was built
//	 72     4  blocks of the record
//	 76     4  header blocks
//	 80     4  sets
//	 84     4  extents
//	 88     8  XXH3-64 of bytes 96 to the record's end (pad: the block's), seeded with XXH3-64 of bytes 0 to 87; version 1: zero
//	 96   8·s  per set: kind 1, zero 3, extents 4
//	      24·e per extent: LUN 4, blocks 4, LBA 8, flags 4 (1: zero, no payload), zero 4
//	           zero up to the block's end, then the payload
//
// # Why a stale record is never replayed
//
// Lane sequence and LSN tell apart the laps of the ring. They are not enough after a crash: records are
// written in parallel, so n can be torn while n+1 is whole; the next run writes another n, and were it as
// long as the first, the old n+1 would follow it. Hence each Open starts a run, which the superblock records
// with its first LSN (both copies, before anything is appended), and a record counts only in its own run.
//
// Of runs before the last the superblock does not know where they began. So a stale record that no later one was written over, because it lies in the
// other lane, would count when the run after next begins: it would stand in for the acknowledged record of its LSN, or, where that was trimmed,
// bring back what a host wrote before. Hence Open wipes, before it starts the run, whatever in the ring has an LSN that is not below the log's end; and a mirror, when
// a session begins, the records of other runs where the session goes on. Areas from before 2026-11-28 may have stale records still: of two that claim an LSN,
// or of one that is of an earlier run than the one before it, the later run's counts.
//
// # Why the checksum is no CRC
//
// Writers put blocks into the log that end in the CRC-32C of the rest of the block (directories of ext4 do). Over such a block the
// register of a CRC-32C reaches a state that does not depend on the block: a record whose header was written and whose payload was not,
// or not all, would pass for whole, and the blocks of an earlier lap for what was acknowledged. Version 1 had that; it is
// read until the log goes on.
//
// # Why damage is not taken for the log's end
//
// A record that is missing ends the log, as a torn tail does. What tells rot from a tear is that nothing at or
// above a torn record was acknowledged. Superblock and records say up to where all was, so a log that ends
// below is ErrCorrupt; Open looks through the whole ring for such records. Then the mirror is the
// good copy.
//
// # Limits
//
// An Append takes at most MaxAppendBlocks; the pipeline holds Options.Pipeline records; a caller has one
// Append in the queue. Lock order: Log.mu only; no I/O and no Witness or Replicator call under it.
package nvram
