// Package store keeps the volumes of a store on two LUNs of the shelf: a journal of what was
// acknowledged and not packed yet, and a log of segments that holds everything else. It owns the
// formats of both, the map from a volume's block to its place, deduplication, compression,
// checkpoints, recovery, and cleaning.
//
// It promises: what was acknowledged is read back, on this host or on any other that opens the
// store, whatever happened in between (P6); what is read is verified, or an error (P4); memory,
// queues and journal have limits, and a request waits or is refused at a limit (P7). It keeps
// nothing on the host that matters. It never overwrites a segment and never uses a segment's
// number twice. It does not keep two hosts from writing at once: the shelf does, with the claim that an agent makes of its
// LUNs and that shuts out the one before (P5, firmware/control); the epoch in the superblock tells who was overtaken.
//
// write.go tells the path of a write up to its acknowledgement, pack.go how it gets into segments
// and the map (not at once: what is overwritten within PackDelay never does), aside.go which blocks lie apart from the others, seal.go how segments become durable and the journal is released, read.go the path
// of a read, checkpoint.go, recover.go and clean.go the rest of a block's life; snapshot.go tells of snapshots and
// clones, map.go of the map that they share, paging.go of how its pages come into memory and leave it.
//
// # Limits
//
// Volumes: 1024 of 256 TiB, and 65,536 snapshots. Memory, besides the options' bounds: 8 MiB for each of at most four
// segments that are open or being written, 128 bytes for each pending block, up to twice
// RecordBytes for each of four records on their way and once for the packer, and 2 MiB of lines' buffers. Map: 8 bytes a block in pages of 512, shared by
// snapshots and clones until one of them is written there. MapBytes of them are in memory, at least 64 pages, and for a moment
// what one record changes; what is not there costs one read more. 64 bytes of each page are always
// in memory: 32 MiB for each TiB of a volume; where that is more than three quarters of MapBytes, it is on top. Index: 8 bytes for each
// stored block; beyond IndexBytes it keeps a sample (package dedup), beside which near.go finds the rest of a run. Segment numbers: 2^28, or what the segment LUN holds.
//
// A block that the shelf cannot give back is ErrMediumRead for who reads it, and for nobody else; the cleaner leaves its segment where it
// is. A page that it cannot give back is that for its blocks; the packer, when it must change such a page,
// stops the store (ErrMap): the page may come back, and so may not be replaced. Where it will not, an operator gives it up (giveup.go).
// A piece of the journal that cannot be read keeps the store shut (ErrJournal), in the same way.
//
// # Formats
//
// Little endian; crc is CRC-32C (Castagnoli); LUN blocks are 4 KiB. Version 2 added snapshots and clones: kinds 6 to
// 8 of a record, 8 to 10 of a segment's log, 7 of a checkpoint, the end of a description, narrow slots,
// and segments of what the cleaner moved. Version 3 added stored pages: codecs 2 and 3, kinds 8 and 9 of a checkpoint, the
// trailer's last field; and codec 4, and the last byte of a description. Version 4 has another checksum in its records. Version 5 added kind 11 of a
// segment's log, the second copy of a checkpoint, and the third superblock. Stores of
// earlier versions are read, and are of version 5 from then on; an older agent refuses them.
//
//	superblock, 4 KiB, at 0 and at 4096 of the journal LUN, and in its last block if that is behind the ring
//	  0  8 "LEDGESB1"                         88  8 start of the journal in the ring, bytes
//	  8  4 crc of 12…4096                     96  8 seq of the record there
//	 12  4 version                           104  8 size of the ring, bytes
//	 16 16 UUID of the store                 112  4 segment numbers below may have been used
//	 32 32 key of the fingerprints           116  4 segments of the checkpoint; 0: none
//	 64  8 seq; the highest valid one counts 120  8 id of the checkpoint
//	 72  8 epoch, raised by each open        128  4 number of its first segment
//	 80  8 epoch of the records that count   132  4 segments of its second copy, behind the first
//	                                         136  4 last segment of the log that is not in the journal
//	                                         140    zeros
//
//	record, whole 4 KiB blocks, in the ring from 65536 on; none crosses the ring's end
//	  0  8 "LEDGEJR2"                         entry:
//	  8  8 XXH3-64 of 16…length                0 1 kind: 1 write, 2 zero, 3 create, 4 delete, 5 resize
//	                                           1 3 zeros
//	 16 16 UUID of the store                   4 4 volume
//	 32  8 epoch                               8 8 first block; resize: bytes
//	 40  8 seq                                16 8 blocks
//	 48  4 entries; 0: a pad                   6 copy, 7 roll back: first block is the other volume; 8 describe
//	 52  4 length, bytes                     payload: from the next 4 KiB boundary on, in the entries'
//	 56  8 bytes to the next record            order: write: the blocks; create, copy, describe: one block, a
//	 64    entries, 24 bytes each              description, then zeros
//	before version 4: "LEDGEJR1"; 8: crc of 12…length (4), length (4); 52: zero
//
//	description: UUID (16), bytes (8), length of the name (2), name; of snapshots and clones also: 1 for a snapshot or
//	0 (1), volume that it is of or snapshot that the clone is of (4), nanoseconds since 1970 (8), group (16); of a volume that is not
//	compressed with S2, behind those: 1 Zstandard, 2 nothing (1). A later
//	one changes what the volume is of, its name and its compression; an agent from before 2026-11-27 leaves the name as it was
//
//	segment, 8 MiB: stored blocks from its start, slots and log just before the trailer, the trailer
//	last. Stripes of 1 MiB without anything in them are not written.
//	stored block: crc (4) of segment number (4), offset (4), codec and content; codec (1): 0 raw, 1 S2, 4 Zstandard (RFC 8878); content
//	stored page, in checkpoint segments: the same; codec 2: 512 places of 8 bytes; 3: runs, see appendRuns
//	place: segment number (28 bits, the highest), offset (23), stored length (13); 0: nothing; 1: nothing is known any more (giveup.go)
//	slot, 22 bytes: the first 20 of the fingerprint, stored length (2); the blocks lie one behind the other
//	wide slot, of version 1, 40 bytes: fingerprint (32), offset (4), stored length (2), zero (2)
//	log: entries of a kind (1 byte) and varints; see footer.go. That of a segment beside the log has moves only; its predecessor and
//	its cover are zero: it is not of the log's order, see clean.go and aside.go
//	trailer, 4 KiB
//	  0  8 "LEDGESG1"                         64  4 bytes of blocks (checkpoint: of pages and items)
//	  8  4 crc of 12…4096                     68  4 slots
//	 12  1 kind: 1 data with wide slots,      72  4 bytes of the log
//	     2 checkpoint, 3 data, 4 beside the log
//	 13  3 zeros                              76  4 crc of slots and log
//	 16 16 UUID of the store                  80  4 crc of the last stripe up to the trailer
//	 32  8 epoch                              84  4 zero
//	 40  4 number of this segment             88  8 checkpoint: its id
//	 44  4 data: the data segment before it   96  4 checkpoint: index of this segment in it
//	 48  8 data: journal seq and              100 4 checkpoint: crc of the items
//	 56  8 units of it that are covered       104 4 checkpoint: where the items begin
//	                                          108   zeros
//
//	checkpoint: pages, then items of a kind (1 byte) and varints; see checkpoint.go
//
// # Decisions
//
// 2026-11-22. A block's name is (segment, byte offset, length), 64 bits, and not (segment, slot):
// a read then needs no table. The slot number lives in the dedup index only, where the table is read
// anyhow, to verify.
//
// 2026-11-27. A checkpoint writes the pages of maps that have changed, and the place of every page, and is due when so many times
// what it would write has been written in segments (dueOf). In between, the logs of segments carry
// every change, and the journal is released without a checkpoint. Before, it held the whole map, which had to be in memory
// whole. A page is a stored block, so the caches, the checksum and the cleaner's rule (a segment goes when nothing
// in it counts) are those of data. The list of pages stays in memory and is written whole, 13 bytes a page or less: a third
// level would make a checkpoint of 100 TiB cheaper, and every lookup dearer.
//
// 2026-11-28. An index that is too small for all blocks is a sample of them, and the tables of segments that had hits lately are looked in for
// what it does not know. Ten root file systems with room for a tenth of their blocks: 99.98 % of the duplicates are found,
// before it was 11 %, which is what an index that forgets at random finds. A full index of 4 bytes a block would
// find duplicates that come alone, too, but 1 TB of blocks needs 1 GB of it, and 8 TB 8.
//
// 2026-11-28. Victims are chosen by how little is gained by waiting with them (Store.decline), and what is moved is sorted by how often it
// is overwritten. Write amplification at 80 % full, in the steady state, of 4096 segments: 90 % of overwrites in 10 % of the
// blocks 1.75, the emptiest first 2.50; uniform 2.94, 2.97 (2.88 before what waits to be packed was counted as taken, without which writers wait). A store of 192 segments, whose reserves weigh more: 3.75 and 4.14, 3.81 and
// 4.34. There are half as many checkpoints as there were: what they write was an eighth of all, of uniform overwrites.
// Cost-benefit with the age of segments was 1.93 and 2.79 in a model of this, the emptiest first 2.56 and 2.27, this 1.68 and 2.31.
//
// 2026-11-28. What a user overwrites after a long time goes to the segments beside the log, where the cleaner's blocks go (aside.go). 90/10 is
// 1.49 then, uniform 2.99 (before there was a second copy of a checkpoint: 1.44 to 1.45, and 2.93). A log of its own for them, or one log with entries of both, would have needed an order between the two;
// so the one log has all entries, and only blocks are elsewhere. It costs that the journal is kept until those are durable, up to half the ring.
//
// 2026-11-28. Of all that is on the LUNs the checkpoint's items and the superblock are needed to open the store at all. So there are two of the first, and
// three of the second, one of which is far from the others. The first costs 0.05 of write amplification in a store of 1 GiB, and less in larger ones, where a
// checkpoint comes after more.
//
// 2026-11-28. A segment of the log that is damaged or cannot be read was taken for its end, even where the journal no more had what was in it: then
// acknowledged writes were gone, and nobody was told. Now the superblock says how far the log reached when the journal was released. (The number of the journal's
// first record does not: records that were overwritten by others are in no segment.)
//
// 2026-11-28. What is given up is a place of its own in an ordinary page, and no new version: an agent that does not know it takes the
// page for damaged, which for its readers is the same.
//
// 2026-11-28. A record's checksum is XXH3-64 and no CRC. A block that ends in the CRC-32C of the rest of it, as those of ext4's
// directories do, brings the register of a CRC-32C to a state that does not depend on the block. So a record whose header had
// reached the shelf, and whose blocks had not, when its host was lost, passed for whole, and what had been in the ring a lap before became
// what the volume holds. The stored blocks keep their CRC-32C: each begins with its address, an address is written once, and
// 4096 + 5 bytes never lie as the medium's blocks do. XXH3 takes half of a CRC-32C's time, too.
//
// 2026-11-26. A snapshot is a volume that nobody writes, made by an entry of the log that says "a copy of that one, here";
// a clone is the same without "nobody writes". Requests to a copy wait until the packer has come to the entry. The
// other way, to pack everything first and then copy the map, makes taking one as slow as the backlog, and a group of
// volumes needs all of them stopped. Moving a block changes the shared page in place, for all who have it, so cleaning
// costs the same with a thousand snapshots.
//
// 2026-11-26. The cleaner works in rounds between the packer's batches, moves into segments of its own, and who writes waits
// for it instead of being refused: at 80 % in use a store that cleaned in one go refused overwrites for good. Segments kept back: a
// sixteenth, 8 to 24.
//
// 2026-11-26. A slot keeps 160 bits of the fingerprint, and a hit of them is believed: the whole of it and the offset made a
// slot a hundredth of an incompressible block, and the table cache twice as large.
//
// 2026-11-22. "Runs kept together" (a lone duplicate in a unique run is stored again) is not done:
// it trades space, and nothing has measured yet what the seek costs behind a flash cache.
package store
