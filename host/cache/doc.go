// Package cache is the flash cache of a host: lines of segments on an SSD, a partition or a file.
//
// It owns the medium and the little memory that says what is where. It promises: a line that it
// gives is the line that was put in under this name, proved at every read, block by block, by a
// checksum and the name itself; what was there before a restart or a power cut is there after it,
// but for what came in the last 10 s and a few regions that may have been half overwritten; a
// medium that errs, hangs or lies is bypassed, reported, tried again later, and every call
// returns in the meantime. It never holds anything that is not on the shelf too, never overwrites a
// medium that holds something else, and needs not be told that something changed: a line's name
// is never used for other bytes.
//
// # Medium, version 2
//
// Units of one length, that of a region (1 to 32 MiB, a power of 2, about 1/8192 of the medium). Unit 0 has
// the head; then come groups, each one unit of tables and 256 regions. Little endian; crc32c
// (Castagnoli) from byte 12 to the end of the block, 4 KiB.
//
//	head      0  8  "LEDGECH2"           at 0; copy at 8 KiB
//	          8  4  crc32c
//	         12  4  version, 2
//	         16 16  id of this formatting: what has another does not count
//	         32  4  bytes of a region
//	         36  4  bytes of a line, 65536
//	state     0  8  "LEDGECS2"           at 4 KiB
//	          8  4  crc32c
//	         12  4  1: closed, the tables tell all; 0: being written
//	         16 16  id of the formatting
//	         32  8  number of the newest region, when this was written
//	         40  4  region that is written after it
//	table     0  8  "LEDGECT2"           of region r: block r mod 256 of its group's first unit
//	          8  4  crc32c
//	         12  4  region
//	         16 16  id of the formatting
//	         32  8  number: how many regions were filled before this one, from 1
//	         40  2  entries
//	         42  1  stores, 12 at most
//	         48     stores × 16: their UUIDs
//	        240     entries × 8, by slot:
//	                 0 4  segment; 0: nothing that counts
//	                 4 1  line in the segment, 0 to 127
//	                 5 1  which of the stores
//	                 6 1  how often it was read, up to 3
//	                 7 1  zero
//	region          slots, each of a line in 17 blocks:
//	          0 4080  the line's bytes, the next 4080 in the next block; zeros behind the end
//	       4080    4  crc32c of id, store's UUID, bytes 0 to 4079, and what follows
//	       4084    4  segment
//	       4088    1  line
//	       4090    1  block in the line
//	       4092    4  first bytes of the store's UUID
//
// What is not named is zero. A block proves itself, so that 4 KiB are read with one or two blocks, and a whole
// line with one read; it costs 6 % of the flash. (A checksum of a line would make each
// read one of 64 KiB; checksums in memory would cost 64 bytes a line; in a block of
// their own, a second read.) Version 1 had a table in each region, which took 121,000 reads at the start of 1 TB.
//
// Region by region is written round the medium, each in one sweep: lines, barrier, table (write.go tells
// why). At the start the tables are read, 1 MiB at a time: 1 TB has 122 MB of them in 119 reads. After a
// power cut those regions are dropped that may be half overwritten (load.go).
//
// # What is kept
//
// A line comes in when it is missed a second time while its name is remembered (ghost.go), or where nothing
// has to leave for it. So a scan, however long, is not written at all, and neither is most of what
// is read once; a drive's life is spent on what is read. Of a region that is overwritten the eighth that was read
// most stays. Against LRU (trace_test.go; a tenth of the lines fit): Zipf 0.7 0.40 for 0.34, 0.9 0.62 for
// 0.58, 1.1 0.83 for 0.80, with a fifth of the writes; a scan of forty times the cache leaves 0.997 of
// a hot set's hits. More of a region kept is a point or two more hits, for as many more writes.
//
// # Reads
//
// Past the page cache the kernel has a read, and who wants it waits for the answer himself (async.go). 2026-11-28, 8 KiB at random of a
// virtual disk: 59 to 71 µs so, by a goroutine that is handed the request 77 to 90, by a bare pread 63 to 75.
//
// # Memory
//
// 13 bytes for each line and 4 for its ghost: 0.26 GB for 1 TB; and two regions, 256 lines
// that wait and 128 that are read, at most 95 MiB. Measured (large_test.go): 327 MB for 1 TB, 570 MB for 2, 2.0 GB for 8.
package cache
