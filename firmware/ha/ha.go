// Package ha decides which controller owns the pool, and moves ownership without ever having two owners.
//
// It owns the state machine (machine.go: a pure function), its driver (driver.go: the I/O, one event at a
// time) and the gate (gate.go: what an initiator's command must pass, so that a fenced owner stops at once).
//
// It promises P2: at any time at most one controller can acknowledge a write; a partner whose mirror is not
// complete refuses to take over and says so; labels are checked before and after fencing; a read is answered
// only while the owner has confirmed its reservation within the lease, and a new owner that fenced a silent
// partner waits the lease out before it serves.
//
// It never takes over by itself: only on an operator's order. It never reads or writes a member other than
// through the interfaces of driver.go, and it knows nothing of SCSI, HTTP or the log's format.
//
// # What is trusted
//
// The members. A label is written on a majority of them, a reservation is held on a majority of them, and two
// majorities meet. The mirror link is never trusted for safety: it may lose, delay or repeat messages, and a
// controller may be stopped for minutes between any two steps; the model test (model_test.go) tries them all.
package ha

import "fmt"

// Controller is 'A' or 'B'; None where nobody owns the pool.
type Controller byte

const (
	None Controller = 0
	A    Controller = 'A'
	B    Controller = 'B'
)

// Partner is the other controller of the shelf.
func (c Controller) Partner() Controller {
	switch c {
	case A:
		return B
	case B:
		return A
	}
	return None
}

func (c Controller) String() string {
	if c == None {
		return "nobody"
	}
	return string(rune(c))
}

// View is what one look at the members and at the own NVRAM says.
type View struct {
	// Blank: a majority was readable and no member carries a label of a formed pool.
	Blank bool
	// Unreadable: fewer members than needed could be read; nothing else is known.
	Unreadable bool
	// Epoch and Owner are those of the newest label.
	Epoch uint64
	Owner Controller
	// Solo: the owner recorded that its partner's mirror does not have every acknowledged write.
	Solo bool
	// SoloLSN is the first write that the mirror may lack, where Solo.
	SoloLSN uint64
	// Replaying: the owner took over and has not yet destaged all of the mirror of its partner's log.
	Replaying bool
	// Fresh: no acknowledged write depends on the owner's log: all is on the members.
	Fresh bool
	// Holder has the reservation on a majority of the members; None where no majority agrees.
	Holder Controller
	// Mirror: the own NVRAM holds a complete mirror of the partner's log at Epoch.
	Mirror bool
}

// SameLabel tells whether both views say the same of the pool's owner and its log.
func (v View) SameLabel(o View) bool {
	return v.Epoch == o.Epoch && v.Owner == o.Owner && v.Solo == o.Solo && v.Replaying == o.Replaying && v.Fresh == o.Fresh
}

func (v View) String() string {
	switch {
	case v.Unreadable:
		return "members unreadable"
	case v.Blank:
		return "members blank"
	}
	s := fmt.Sprintf("epoch %d owner %s", v.Epoch, v.Owner)
	if v.Solo {
		s += fmt.Sprintf(" solo since lsn %d", v.SoloLSN)
	}
	if v.Replaying {
		s += " replaying"
	}
	if v.Fresh {
		s += " fresh"
	}
	return s + fmt.Sprintf(", reserved by %s, mirror complete %t", v.Holder, v.Mirror)
}
