// Package iscsi is an iSCSI target (RFC 7143): portals, logins, sessions and the way of a SCSI
// command from a PDU to package scsi and back.
//
// It owns connections and what travels on them. It knows nothing of what a CDB means. It promises
// that no bytes from a peer stop the process, hold memory beyond the limits of Options, or delay
// another session; a peer that breaks the protocol gets a reject, a login status or a closed
// connection.
//
// # Goroutines
//
// Each connection has one, its reader, which runs commands of devices that never block and starts
// a worker for each other command (at most as many as the command window is wide). The server has
// one more, which pings idle initiators and drops silent ones. All end before Close returns.
//
// # Limits
//
// A session has one connection, error recovery level 0 and data in order, so that nothing is kept
// to be sent again: SNACK is rejected, a lost data segment fails its command, a wrong header digest
// ends the connection. Markers, bidirectional commands and ACA are not offered. Memory is bounded
// by Options: Memory for the data of commands, 1 MiB of answers and at most 256 KiB of read
// buffer for each connection.
//
// # Order of locks
//
// Server.mu, then conn.mu, then sendQueue.mu. None is held while a device is called or a
// socket is waited for.
package iscsi
