// Package scsi is a SCSI device server (SAM-5, SPC-4, SBC-3) for direct-access block devices:
// it decodes command descriptor blocks, keeps what a logical unit must remember (unit
// attentions, reservations, mode parameters, tasks in flight, copies and tokens) and calls a
// target.Device.
//
// It owns the meaning of commands. It knows no transport: package iscsi hands it Tasks, and it
// hands back data, a status and sense data. It starts a goroutine only for SANITIZE, FORMAT UNIT and
// copies with IMMED, at most 17 a unit, each waited for by Detach. It never opens a file and never trusts a
// length that a CDB or a parameter list names.
//
// # The path of a command
//
//  1. Nexus.Prepare finds the unit, decodes the CDB by the table in ops.go, applies ACL, unit
//     attentions, reservations and access state, and says how many bytes of data-out it needs.
//     A command that is refused here has its status already.
//  2. The transport gathers those bytes into Task.Out.
//  3. Task.Run calls the device. Data-in is handed to Sink.DataIn piece by piece, so that a
//     large read never holds more than one piece of memory.
//  4. Task.Finish takes the task out of its unit's task set.
//
// Any number of tasks are between 1 and 4 at once. Task.NeverBlocks says whether Run may be
// called on the goroutine that reads the connection.
//
// A copy (EXTENDED COPY, WRITE USING TOKEN) lives in the copy manager of its unit (copyop.go) and visits
// the units that it reads and writes (visit.go), so that whatever ends a unit's tasks ends its visits.
// Tokens stand for blocks as long as nothing changes them (token.go).
//
// # Limits
//
// Not served, and answered as the standard asks: protection information, anchored blocks, LOG SELECT, saved
// mode pages, ACA, self-tests other than the default, READ and WRITE BUFFER, copies of other kinds than
// block to block and between targets by descriptor, ROD types that outlive a write.
//
// A device is to be attached to one unit: what is written to it by another way than that unit's commands
// revokes no token and is told to nobody.
//
// PERSISTENT RESERVE through a target in standby (remote.go) queues its unit attentions for the nexuses of the
// target that serves the unit only. RESERVE(6) and (10) are forgotten when a unit moves to another target.
//
// # Locks
//
// Target.mu is taken before unit.mu, copyLog.mu before unit.mu; itl.mu, copyOp.mu and Tokens.mu are
// leaves. None is held across a call of a Device.
// unit.prMu, taken before unit.mu, serialises PERSISTENT RESERVE OUT and is held while a
// ReservationStore saves.
package scsi
