// Package mirror carries a controller's nvram log to its partner, over one authenticated connection (TCP, or shared memory by
// package window; package fallback has both and chooses) that also takes control messages both ways.
//
// It owns the connection and the order of what goes over it. It promises: frames reach the partner's mirror
// in log order, each acknowledged once it is durable there; a partner that is not of this shelf, or does
// not know its secret, gets nothing; a malformed message costs the connection and never the process; an
// owner of an older epoch than the standby saw is refused. It never acknowledges a write to a host, never decides who
// owns the pool, and never judges completeness alone (nvram.Mirror says what the mirror knows, the members the rest).
//
// # Messages
//
// Little endian, over a stream of bytes. Each side numbers its messages from 1.
//
//	off  size  field
//	  0     4  magic "LMR1"
//	  4     1  type
//	  5     3  zero
//	  8     8  sequence number
//	 16     4  payload length
//	 20     4  CRC32C of bytes 0 to 19 and the payload; of a Frame's payload only the first 16 bytes: the record
//	           has its own, which the standby verifies before it writes
//
//	type              from     payload
//	 1  Hello         both     version 4 (1), controller 1 ('A', 'B'), role 1 (0 none, 1 owner, 2 standby), zero 2,
//	                           epoch 8, nonce 32, length of the shelf's name 1, name
//	 2  Proof         both     HMAC-SHA256 32, keyed with the shelf's secret, of "ledge mirror 1", the sender's
//	                           controller letter, the payload of its Hello, the payload of the other's Hello
//	 3  Heartbeat     both     none
//	 4  Control       both     length of kind 1, kind, body (opaque, JSON by convention; at most 1 MiB)
//	 5  Offer         standby  log ID 16, epoch 8, run 8, runLSN 8, bytes of the lanes 16, next 8, complete 1
//	 6  Start         owner    log ID 16, epoch 8, run 8, runLSN 8, bytes of the lanes 16, tails 48 (LSN, offset, sequence
//	                           number of each lane), full 1, resume LSN 8, heads 48
//	 7  Ready         standby  none
//	 8  Frame         owner    LSN 8, offset 8, record
//	 9  Trim          owner    tails 48
//	10  Complete      owner    LSN 8
//	11  Ack           standby  LSN 8: all records below are durable
//	12  Completed     standby  LSN 8: the answer to Complete
//	13  Refuse        both     code 1 (1 malformed or out of turn, 2 stale epoch, 3 cannot hold the log, 4 region error), text; the connection ends
//
// Version 1 is the first.
//
// # A connection
//
//	A (either role)                          B
//	Hello ────────────────────────────────► Hello      names, roles, epochs, nonces
//	Proof ◄───────────────────────────────► Proof      both before anything else is read
//	── owner ─────────────────────────────── standby ──
//	      ◄─────────────────────────── Offer           what the mirror holds
//	Start ────────────────────────────────►            full: void it; else go on at the resume LSN
//	      ◄─────────────────────────── Ready           durable: epoch, run, incomplete
//	Frame, Trim … ────────────────────────►  ◄─── Ack
//	Complete ─────────────────────────────►            all that acknowledgements may rely on was sent
//	      ◄─────────────────────── Completed           durable; now acknowledgements rely on the mirror,
//	Frame, Trim … ────────────────────────►  ◄─── Ack  and LeaveSolo is called
//
// A change of role ends the connection: the next Hello says the new one.
//
// # Every way to lose it
//
// "Eligible" is the standby that may take over: solo is not recorded on the members for this epoch, and its own
// superblock says complete, for the label's log ID and epoch. To show: a standby that is eligible has every
// acknowledged write. Notation: R the last record acknowledged.
//
//  1. Link lost, or either side crashes, in sync. R is in the mirror: the owner acknowledges only what an Ack named,
//     and an Ack follows the durable write. Until EnterSolo is durable nothing more is acknowledged. Eligible, rightly.
//  2. Owner went solo, standby alive, cut off, or off. The members say solo: not eligible, whatever the mirror believes.
//  3. Partition: the standby reads the members before EnterSolo, fences, and the owner's EnterSolo comes after. It
//     meets the reservation: the log fails, and nothing beyond R was acknowledged. The other order: the standby's
//     second look at the members, after fencing, shows solo, and it gives up.
//  4. Standby returns while solo. Incremental: its mirror stays a prefix, the members say solo until LeaveSolo, and
//     LeaveSolo follows Completed, which follows every record below Join's LSN; records from Join on are acknowledged by both.
//     Full: incomplete is durable before Ready, before the first frame; Completed clears it first.
//  5. Either side dies between Completed and LeaveSolo: members say solo, not eligible though it could be. Safe;
//     the next session ends it.
//  6. LeaveSolo's outcome unknown: the owner counts itself in sync, so both answers are right.
//  7. The owner restarts. Its log may end below the mirror's (records that were torn here, never acknowledged): Start
//     names the new run and its first LSN, and the mirror takes nothing older from there on. It may end above: those are
//     sent, and Settle holds the owner back from serving them until they are. Runs further apart: full.
//  8. A full session in sync (the standby's NVRAM was exchanged, or its content is of another run) would void a mirror that the
//     members call as good as the log: nvram.ErrSoloFirst has solo recorded before. Only where the members say that nobody needs
//     the log (nvram.Options.Fresh), or it never acknowledged anything, is nothing recorded.
//  9. Standby's NVRAM comes back empty: no superblock, not complete, not eligible. Comes back as an older copy of itself,
//     with the owner dead and nothing solo: it cannot be told from case 1. The medium's promise is broken; the
//     members would have to count for it.
//  10. Tails moved while the standby lagged: Trim makes it incomplete in the same superblock write.
//  11. Old owner, fenced, still connected or reconnecting: the standby that takes over stops receiving before it
//     replays, and its next Hello is an owner's of a newer epoch. A standby that saw a newer epoch refuses Start.
//  12. Two connections at once (the partner restarted, its old TCP lives; or one comes over TCP while the window's is not known
//     to be lost, or the other way about): the newer authenticated one ends the older, and receiving starts only when the older's last write is over.
//  13. Replayed or reordered bytes on the wire: nonces are fresh, sequence numbers and checksums end the connection.
//     Who can alter TCP payload in flight can forge records after the handshake: the link is a cable between
//     two boards, or is to be carried by something that authenticates it.
package mirror
