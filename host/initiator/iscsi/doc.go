// Package iscsi is the host's iSCSI initiator: one session of one connection to one portal
// (RFC 7143), in user space, with many commands in flight.
//
// It owns the connection, the login, the numbering of commands and the movement of data. It
// promises that Do returns only when the command is over for good on this session: answered,
// aborted and the abort answered, or the session dead with no goroutine left that could touch the
// command's buffers. It never retries, never reconnects and knows nothing of what a CDB means:
// package initiator does all that with several sessions. Error recovery level is 0: whatever is
// not understood ends the session, and a new login with the same ISID reinstates it (RFC 7143
// 6.3.5), which makes the target end every task of the old one first.
//
// # Flow
//
//  1. Do takes one of Config.QueueDepth slots, waits for the CmdSN window (MaxCmdSN), numbers the
//     command and queues it with its immediate and unsolicited data (write.go).
//  2. Whoever finds nobody writing becomes the writer, and sends all that is queued with one
//     writev; under load one system call carries the commands of many callers (queue.go).
//  3. The reader goroutine reads Data-In straight into the caller's buffer, answers R2T by queueing
//     Data-Out, and wakes the caller with the status (read.go). It never writes to the socket
//     itself: two sides that both wait for the other to read would wait for ever.
//  4. The keeper goroutine sends a NOP-Out when nothing came for PingInterval, and ends the session
//     when nothing came for PingTimeout after it, or a command is older than CommandTimeout.
//
// # PDU
//
// Every PDU is a basic header segment of 48 bytes, big-endian, followed by
//
//	size                field
//	4 × TotalAHSLength  additional headers: skipped here, never sent
//	4                   header digest, CRC32C of all before it, little-endian; if negotiated
//	DataSegmentLength   data
//	0–3                 zeros up to a multiple of 4
//	4                   data digest, CRC32C of data and zeros, little-endian; if negotiated
//
// The header's common fields (RFC 7143 11.2):
//
//	offset size field
//	0      1    opcode (bits 0–5), immediate (bit 6)
//	1      1    flags: final (bit 7), the rest is the opcode's
//	2      2    the opcode's: response, status, version
//	4      1    TotalAHSLength, in words of 4 bytes
//	5      3    DataSegmentLength, bounded by the MaxRecvDataSegmentLength that we declared
//	8      8    LUN; ISID and TSIH in a login
//	16     4    initiator task tag
//	20     4    target transfer tag; expected data transfer length in a command
//	24     4    CmdSN, or StatSN from the target
//	28     4    ExpStatSN, or ExpCmdSN from the target
//	32     4    MaxCmdSN from the target; a command's CDB is at 32–47
//	36     4    DataSN, R2TSN; login status (2 bytes)
//	40     4    buffer offset
//	44     4    residual count; desired length of an R2T
//
// Everything that the target sends is a stranger's: lengths are compared with what was negotiated,
// offsets with the command's own buffer, tags with the table of tasks. What fails ends this
// session with ErrProtocol, and nothing else.
//
// Lock order: Session.mu is the only lock, and is never held across I/O.
package iscsi
