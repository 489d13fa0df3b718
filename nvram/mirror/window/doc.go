// Package window is a connection between the two controllers through memory that both have mapped: a window of a PCIe
// non-transparent bridge, the shared memory of QEMU's ivshmem device (a BAR's file below /sys/bus/pci/devices), or an
// ordinary file, for two processes of one machine.
//
// A process that dies leaves its session standing in memory. So each side counts in its block ten times a second,
// whether there is a connection or not, and one whose counter has stood still for 1.5 s is dead (ErrDead).
//
// It owns the layout of that memory, and gives net.Conn and net.Listener, so that nvram/mirror runs over it as it runs
// over TCP, with its own authentication, checksums, heartbeats and time-outs. It promises an ordered stream of bytes
// between two ends that are both there; an end that restarts ends the connection of the other. It does not trust the
// other end: whatever stands in the window, the worst that comes of it is a connection that ends, or bytes that the
// protocol above refuses. A window that vanishes (a file that was cut off, a bridge without its other side) is an error too,
// and no fault of the process.
//
// # Layout
//
// Version 2, little endian. Each side writes its own block and its own ring only. The rings are the largest power of two, up
// to 16 MiB, of which two find room behind 64 KiB; the window's size must be the same for both.
//
//	at 4096: block of A; at 8192: block of B     at 65536: ring from A to B; behind it the one from B to A
//	   0  8 "LEDGEWIN"
//	   8  4 version
//	  12  4 bytes of a ring
//	  64  8 session of this side; 0: none
//	 128  8 session of the other side that this one has accepted; 0: none
//	 192  8 bytes that this side has put into its ring in this session; the ring has byte n at n modulo its size
//	 256  8 bytes that this side has taken from the other's ring in this session
//	 320  4 bell: changes with each of the two above
//	 384  4 how many of this side sleep until the other's bell changes
//	 448  8 alive: counts up every 100 ms while this side has the window open, from whatever it was
//
// Version 1 had no alive: whoever read from a dead process waited for the protocol's time-out. Two sides of different
// versions refuse each other (ErrLayout). A window that nobody has used is zero; each side
// writes its magic first, and Open refuses what is neither zero nor has it.
//
// A side begins a session with counters of 0 and then a number that it never had before, and accepts the other's session
// when it sees one. The connection stands while each has the other's present session accepted; whoever sees
// that it does not, has lost it.
//
// # Waiting
//
// Who finds nothing looks again for a while (Spin), since an answer over such a window takes a microsecond or two. Then it
// sleeps: where the window is a file, until the other rings the bell (futex); over a bus nobody can ring, and
// it looks again after naps, the longest of half a millisecond, which is then what an idle link answers in.
//
// Memory order: what is in a ring is written before the counter that says so, and read after it, by atomic operations, which
// on amd64 and arm64 order plain memory. A bridge's window must be mapped uncached or write-through for its reader;
// a write-combining mapping is flushed by the atomic (locked, on amd64) store of the counter.
package window
