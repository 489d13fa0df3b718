// Package iscsi is an iSCSI target (RFC 7143, RFC 7144): portals, logins, sessions and the way of a
// SCSI command from a PDU to package scsi and back.
//
// It owns connections and what travels on them. It knows nothing of what a CDB means. It promises
// that no bytes from a peer stop the process, hold memory beyond the limits of Options, or delay
// another session; a peer that breaks the protocol gets a reject, a login status or a closed
// connection. One thing that an initiator may ask for does reach others, because the standard
// says so: resets, of which TARGET COLD RESET ends every session with the target.
//
// # Where to look
//
// A connection's life is in conn.go, what its session makes of it in session.go, a login in
// login.go, keys.go and chap.go. A command's way is in command.go and dataout.go, the order of the
// commands of several connections in order.go. tmf.go, logout.go, nop.go and text.go serve the
// other PDUs. send.go and reader.go are the two ends of the socket, socket.go its system calls.
//
// # Goroutines
//
// Each connection has one, its reader, which runs commands of devices that never block. Beside it
// there are a worker for each other command (at most as many as the command window is wide, and a
// bound of immediate ones), one for each task management function (maxControls), and, while held
// commands of a session of several connections are served, one a session. The server has one
// more, which finds idle initiators, late commands and logouts that did not come; what it has to
// say to a connection it leaves to a goroutine that may wait for the socket. All end before Close
// returns.
//
// # Limits
//
// Error recovery level 0, data in order, so that nothing is kept to be sent again: SNACK is
// rejected, a lost data segment fails its command, a wrong header digest or a broken connection
// ends the session, all its connections with it (RFC 7143 7.1.4.4), and TASK REASSIGN is refused.
// Markers, bidirectional commands, ACA and redirection at login are not offered. A session has at
// most Options.SessionConnections connections, through portals of this server.
//
// A command that is rejected has used up its CmdSN. RFC 7143 7.3 would have the number stay due until
// the initiator fills the gap; the commands that were on their way behind it would end the session.
//
// A task that is aborted while it waits for data is ended at once, against the letter of 4.2.3.3 a;
// tmf.go says why.
//
// Memory is bounded by Options: Memory for the data of commands and for the commands that came
// before their turn, 1 MiB of answers for each connection, and 256 KiB of read buffer for each that
// is being read at the moment: one that waits holds none.
//
// # Order of locks
//
// conn.turn, then ordering.mu, then Server.mu, then conn.mu, then sendQueue.mu. conn.answering is
// taken before conn.mu. conn.turn and conn.answering are held while a connection is served or
// answered, so also while a device is called and a socket is waited for; nobody who holds the
// turn of one connection asks for that of another, unless the other has been closed. None of the
// rest is held across either.
package iscsi
