package scsi

import (
	"context"
)

// PERSISTENT RESERVE through a target in standby.
//
// SPC-4 5.15.2.4.4 has a port in standby serve PERSISTENT RESERVE IN and OUT, and multipath initiators need it:
// a registration is of an initiator port on a target port, so they register on every path, those in standby too,
// or have no access after the takeover for which the paths are there. The reservations are where the unit
// is served. So the target in standby sends the command there, as it came, and answers what comes back.

// PersistCommand is a PERSISTENT RESERVE IN or OUT that came to a target in standby.
type PersistCommand struct {
	LUN uint64 `json:"lun"`
	// Initiator, Port and RelativePort are those of the nexus on which it came.
	Initiator    string `json:"initiator"`
	Port         string `json:"port"`
	RelativePort uint16 `json:"relative_port"`
	// CDB has ten bytes; List is the parameter list of an OUT.
	CDB  []byte `json:"cdb"`
	List []byte `json:"list,omitempty"`
}

// PersistAnswer is what became of it.
type PersistAnswer struct {
	Status byte   `json:"status"`
	Sense  []byte `json:"sense,omitempty"`
	Data   []byte `json:"data,omitempty"`
}

// ReservationProxy is a SharedReservations that reaches the target that serves the unit while this one is in standby.
type ReservationProxy interface {
	SharedReservations
	// Forward has the command carried out there (Target.Persist). After an error it is not known to have been.
	Forward(ctx context.Context, c PersistCommand) (PersistAnswer, error)
}

// forward runs a command elsewhere.
func (t *Task) forward() error {
	c := PersistCommand{LUN: t.unit.lun, Initiator: t.Nexus.Initiator, Port: t.Nexus.Port, RelativePort: t.Nexus.RelativePort, CDB: t.CDB[:10:10]}
	if t.OutTotal > 0 {
		list, err := t.list()
		if err != nil {
			return err
		}
		c.List = list
	}
	a, err := t.unit.proxy.Forward(t.ctx, c)
	if err != nil {
		return err
	}
	return foreignAnswer(a)
}

// foreignAnswer is another target's answer on its way through this one's.
type foreignAnswer PersistAnswer

func (foreignAnswer) Error() string { return "another target's answer" }

// endForeign makes a the task's outcome.
func (t *Task) endForeign(a foreignAnswer) {
	t.Status = a.Status
	if a.Status == StatusCheckCondition {
		t.Sense = append(t.sense[:0], a.Sense[:min(len(a.Sense), maxSense)]...)
	}
	if a.Status == StatusGood && len(a.Data) > 0 {
		t.end(t.answer(a.Data, t.be16(7)))
	}
}

// Persist carries out a command that came to another target of the unit, which is in standby. The caller knows that this
// target serves the unit; where it does no more, the unit's SharedReservations refuse. Attentions for nexuses of
// the other target are not sent there.
func (t *Target) Persist(ctx context.Context, c PersistCommand) PersistAnswer {
	n := &Nexus{Target: t, Initiator: c.Initiator, Port: c.Port, RelativePort: c.RelativePort, proxied: true}
	n.itls.Store(&map[*unit]*itl{})
	if u := (*t.units.Load())[c.LUN]; u != nil {
		n.learn(u, false)
	}
	defer n.Close()
	s := &collector{}
	k := &Task{}
	k.Reset()
	k.Sink, k.Aborter, k.Nexus, k.LUN = s, s, n, EncodeLUN(c.LUN)
	copy(k.CDB[:], c.CDB)
	k.InLimit, k.OutLimit = maxReservationsBytes, int64(len(c.List))
	if op := t.ops.lookup(k.CDB[0], k.CDB[1]); op == nil || op.flags&opReservation == 0 {
		return PersistAnswer{Status: StatusCheckCondition, Sense: illegal(ascInvalidOpcode).encode(nil, false)}
	}
	defer context.AfterFunc(ctx, k.ctx.cancel)()
	if k.Prepare() {
		k.Out = append(k.Out[:0], c.List[:k.OutWanted])
		k.Run()
	}
	k.Finish()
	return PersistAnswer{Status: k.Status, Sense: append([]byte(nil), k.Sense...), Data: s.data}
}

// collector keeps data-in.
type collector struct{ data []byte }

func (s *collector) DataIn(b *Buffer) { s.data = append(s.data, b.B...); b.Release() }
func (s *collector) Aborted(uint64)   {}
