// Package scsi is a SCSI device server (SAM-5, SPC-4, SBC-3) for direct-access block devices:
// it decodes command descriptor blocks, keeps what a logical unit must remember (unit
// attentions, reservations, mode parameters, tasks in flight) and calls a target.Device.
//
// It owns the meaning of commands. It knows no transport: package iscsi hands it Tasks, and it
// hands back data, a status and sense data. It starts a goroutine only for SANITIZE, never opens a
// file and never trusts a length that a CDB or a parameter list names.
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
// # Limits
//
// Not served, and answered as the standard asks: protection information, anchored blocks,
// CRYPTO ERASE, FORMAT UNIT, LOG SELECT, EXTENDED COPY by LID4 and by token, ACA, and TASK ABORTED status (TAS).
//
// # Locks
//
// Target.mu is taken before unit.mu; itl.mu is a leaf. None is held across a call of a Device.
// unit.prMu, taken before unit.mu, serialises PERSISTENT RESERVE OUT and is held while a
// ReservationStore saves.
package scsi
