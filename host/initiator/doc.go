// Package initiator makes one block device of a LUN that several portals show: sessions to all of
// them (iscsi), the asymmetric access states of SPC-4 5.15 (ALUA) to choose among them, and
// retries, so that its user never sees a takeover, a restart or a lost link as anything but time.
//
// It promises that a call returns nil only when a controller said GOOD for every byte of it, and an
// error only when the error is definite (no space, medium error, refused) or the caller's context
// ended. It keeps no data, no cache and no order between calls that overlap in time.
//
// # Choosing a path
//
// Each portal has a goroutine that connects, identifies the LUN (INQUIRY, VPD 83: the same unit on
// all paths, or the path is refused), and asks for the access states (REPORT TARGET PORT GROUPS):
// at once when a command on the path met NOT READY or a unit attention, every second otherwise, and
// five times a second while no path is usable. Commands go to the paths that are optimized, in turn.
// A path that was *seen to become* optimized on a living session goes before one that only says
// so when it is connected to: a controller that was paused while its partner took over still
// believes itself the owner when it wakes, and must not get the traffic back for that.
//
// # Why a retry is safe
//
// Only reads, writes of the same bytes to the same place, unmaps, flushes and inquiries are sent
// here, and doing one of them twice in a row is doing it once. The danger is a ghost: a write whose
// session died is retried and acknowledged, the caller writes something newer to the same
// block, and then the first sending, forgotten in the target, is applied over it. So:
//
//  1. A command is not retried on a session while its first sending may live on that session: Do
//     returns only when the command was answered, aborted or the session is dead.
//  2. On the same portal, the next session logs in with the same ISID. RFC 7143 6.3.5 makes the target
//     end the old session, all its tasks first, before it answers the login. This covers a lost
//     link, a silent target that wakes up, and our own time-outs, because a time-out of a command
//     ends the session too.
//  3. On another portal of the same controller (the same target port group) the old session may
//     still be there. The first use of that path after the loss is a LOGICAL UNIT RESET, which ends
//     the commands of every nexus on the LUN; the LUN is this host's own, so the only commands that it
//     disturbs are ours, and those are retried.
//  4. On the other controller nothing can be asked of the old one, and nothing needs to be: the other
//     controller becomes optimized only after it fenced the old one (promise P2), which can then
//     neither reach the members nor have a log record acknowledged by its partner. Its ghost
//     ends in an error that nobody reads. When it comes back it starts as a standby, with no command
//     of its former life.
//
// A write that was cut short by the caller's own context is not retried; the blocks hold the old or
// the new bytes, each block whole, and 1 to 3 still keep it from being applied later.
//
// A host that was itself replaced (its volumes opened by another host) is kept out by what is
// written, not by paths: see host/store.
//
// Lock order: Device.mu is the only lock, and is never held across I/O.
package initiator
