package scsi

import (
	"context"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/ledge-storage/ledge/target"
)

// moving is a SharedReservations. gone says that another target has the unit.
type moving struct {
	memory
	saves int
	full  bool
	gone  error
}

func (m *moving) Current(context.Context) error { return m.gone }
func (m *moving) Save(b []byte) error {
	m.saves++
	if m.full {
		return target.ErrNoSpace
	}
	return m.memory.Save(b)
}

func good(t *testing.T, r answer) answer {
	t.Helper()
	if r.status != StatusGood {
		t.Fatalf("%+v", r)
	}
	return r
}

// settle takes the attentions that are queued.
func settle(n *Nexus) (codes []asc) {
	for r := run(n, 0, 0, nil, tur...); r.key == keyUnitAttention; r = run(n, 0, 0, nil, tur...) {
		codes = append(codes, r.code)
	}
	return codes
}

// TestSharedReservations: a unit that moves keeps all of its reservations, APTPL or not, and its generation.
func TestSharedReservations(t *testing.T) {
	store := &moving{}
	tgt, dev := newUnitFor(t, UnitOptions{Reservations: store})
	a, b := connect(tgt, "a", 1), connect(tgt, "b", 1)
	good(t, run(a, 0, 0, prList(0, 0xA, 0), prOutCDB(0, 0)...))
	good(t, run(b, 0, 0, prList(0, 0xB, 0), prOutCDB(0, 0)...))
	good(t, run(a, 0, 0, prList(0xA, 0, 0), prOutCDB(1, prWriteExclusive)...))
	if store.saves != 3 {
		t.Errorf("%d saves of three changes", store.saves)
	}
	again := NewTarget(tgt.Name(), Options{})
	if err := again.Attach(0, dev, UnitOptions{Reservations: store}); err != nil {
		t.Fatal(err)
	}
	a, b = connect(again, "a", 1), connect(again, "b", 1)
	if r := run(b, 0, 0, block, wrOne...); r.status != StatusReservationConflict {
		t.Errorf("another initiator writes after the move: %+v", r)
	}
	good(t, run(a, 0, 0, block, wrOne...))
	keys := good(t, run(a, 0, 64, nil, 0x5E, 0, 0, 0, 0, 0, 0, 0, 64, 0)).data
	if g := binary.BigEndian.Uint32(keys); g != 2 {
		t.Errorf("generation %d after the move, want 2", g)
	}
	store.full = true
	if r := run(b, 0, 0, prList(0xB, 0xC, 0), prOutCDB(0, 0)...); r.code != ascInsufficientRegister {
		t.Errorf("a store without room: %+v", r)
	}
	store.full = false
	good(t, run(a, 0, 0, prList(0xA, 0, 0), prOutCDB(3, 0)...)) // CLEAR
	good(t, run(b, 0, 0, nil, 0x12, 0, 0, 0, 0, 0))
	if err := again.ReloadReservations(0); err != nil {
		t.Fatal(err)
	}
	settle(b)
	good(t, run(b, 0, 0, block, wrOne...))
}

// TestReloadReservations: what the other target did to the unit counts here from the reload on, for commands too
// that came before it; and a target that lost the unit without noticing does not tell what it remembers.
func TestReloadReservations(t *testing.T) {
	store := &moving{}
	here, dev := newUnitFor(t, UnitOptions{Reservations: store})
	a, b := connect(here, "a", 1), connect(here, "b", 1)
	good(t, run(a, 0, 0, prList(0, 0xA, 4), prOutCDB(0, 0)...))
	good(t, run(b, 0, 0, prList(0, 0xB, 4), prOutCDB(0, 0)...))
	good(t, run(a, 0, 0, prList(0xA, 0, 0), prOutCDB(1, prWriteRegistrants)...))

	// A write of b waits for its data while the unit moves there and back.
	s := &sink{}
	waiting := &Task{}
	waiting.Reset()
	waiting.Sink, waiting.Aborter, waiting.Nexus, waiting.LUN = s, s, b, EncodeLUN(0)
	copy(waiting.CDB[:], wrOne)
	waiting.OutLimit = int64(len(block))
	if !waiting.Prepare() {
		t.Fatalf("a registrant's write: %+v", waiting)
	}
	there := NewTarget(here.Name(), Options{})
	if err := there.Attach(0, dev, UnitOptions{Reservations: store}); err != nil {
		t.Fatal(err)
	}
	good(t, run(connect(there, "a", 2), 0, 0, prList(0xA, 0xB, 0), prOutCDB(4, prWriteRegistrants)...)) // registered on all ports
	store.gone = target.ErrUnavailable
	if r := run(a, 0, 64, nil, 0x5E, 0, 0, 0, 0, 0, 0, 0, 64, 0); r.status == StatusGood {
		t.Error("a target that lost the unit tells its registrations")
	}
	store.gone = nil
	if err := here.ReloadReservations(0); err != nil {
		t.Fatal(err)
	}
	if !waiting.WasAborted() {
		t.Error("a fenced initiator's write from before the move goes on")
	}
	waiting.Finish()
	if got := settle(b); len(got) != 2 || got[0] != uaRegistrationsPreempted || got[1] != uaCommandsCleared {
		t.Errorf("the preempted one is told %x", got)
	}
	if r := run(b, 0, 0, block, wrOne...); r.status != StatusReservationConflict {
		t.Errorf("a preempted initiator writes: %+v", r)
	}
	if got := settle(a); len(got) != 0 {
		t.Errorf("the holder is told %x", got)
	}
	good(t, run(a, 0, 0, block, wrOne...))

	store.b = []byte("{")
	if err := here.ReloadReservations(0); err == nil {
		t.Error("damaged reservations are taken")
	}
	if r := run(b, 0, 0, block, wrOne...); r.status != StatusReservationConflict {
		t.Errorf("a reload that failed frees the unit: %+v", r)
	}
	if err := here.ReloadReservations(9); !errors.Is(err, ErrNoLUN) {
		t.Errorf("no such unit: %v", err)
	}
}

// TestStateBeforeReservations: a target in standby does not know the reservations, and does not answer with them.
func TestStateBeforeReservations(t *testing.T) {
	tgt, _ := newUnitFor(t, UnitOptions{})
	a, b := connect(tgt, "a", 1), connect(tgt, "b", 1)
	good(t, run(a, 0, 0, prList(0, 0xA, 0), prOutCDB(0, 0)...))
	good(t, run(a, 0, 0, prList(0xA, 0, 0), prOutCDB(1, prExclusiveAccess)...))
	tgt.SetPortGroups([]target.PortGroup{{ID: 1, State: target.Optimized, Ports: []uint16{1}}})
	tgt.SetPortGroups([]target.PortGroup{{ID: 1, State: target.Standby, Ports: []uint16{1}}})
	settle(b)
	if r := run(b, 0, 512, nil, readOne...); r.code != ascStandby {
		t.Errorf("a read in standby: %+v", r)
	}
}

// linked is a moving store that sends what a target in standby gets to the other.
type linked struct {
	moving
	to   *Target
	cut  bool
	sent int
}

func (l *linked) Forward(ctx context.Context, c PersistCommand) (PersistAnswer, error) {
	if l.cut {
		return PersistAnswer{}, target.ErrStandby
	}
	l.sent++
	return l.to.Persist(ctx, c), nil
}

// TestPersistThroughStandby: a multipath initiator registers through both targets while one serves the unit, learns the
// same through both, and has access through the other after the move; a stranger has none. What the unit's
// own checks refuse is refused through the standby too.
func TestPersistThroughStandby(t *testing.T) {
	store := &linked{}
	serving, dev := newUnitFor(t, UnitOptions{Reservations: &store.moving, Initiators: []string{"iqn.test:a", "iqn.test:b"}})
	store.to = serving
	standby := NewTarget(serving.Name(), Options{})
	if err := standby.Attach(0, dev, UnitOptions{Reservations: store}); err != nil {
		t.Fatal(err)
	}
	states := func(one, two target.AccessState) {
		for _, x := range []*Target{serving, standby} {
			x.SetPortGroups([]target.PortGroup{{ID: 1, State: one, Ports: []uint16{1}}, {ID: 2, State: two, Ports: []uint16{2}}})
		}
	}
	states(target.Optimized, target.Standby)
	a1, a2 := connect(serving, "a", 1), standby.Connect("iqn.test:a", [6]byte{9}, 2)
	b1, b2 := connect(serving, "b", 1), standby.Connect("iqn.test:b", [6]byte{1}, 2)
	settle(a2)
	settle(b2)
	good(t, run(a1, 0, 0, prList(0, 0xA, 0), prOutCDB(0, 0)...))
	good(t, run(a2, 0, 0, prList(0, 0xA, 0), prOutCDB(0, 0)...))
	good(t, run(b2, 0, 0, prList(0, 0xB, 0), prOutCDB(0, 0)...))
	good(t, run(a2, 0, 0, prList(0xA, 0, 0), prOutCDB(1, prWriteRegistrants)...))
	if r := run(b2, 0, 0, prList(0xB, 0, 0), prOutCDB(1, prWriteExclusive)...); r.status != StatusReservationConflict {
		t.Errorf("a second reservation through the standby: %+v", r)
	}
	if r := run(b2, 0, 0, prList(0xB, 0, 0), prOutCDB(1, 2)...); r.key != keyIllegalRequest || r.code != ascInvalidFieldCDB {
		t.Errorf("a type that is none: %+v", r)
	}
	if r := run(b1, 0, 0, block, wrOne...); r.status != StatusReservationConflict {
		t.Errorf("registered on the standby's port only: %+v", r)
	}
	for action := byte(0); action < 4; action++ {
		cdb := []byte{0x5E, action, 0, 0, 0, 0, 0, 2, 0, 0}
		if one, two := good(t, run(a1, 0, 512, nil, cdb...)), good(t, run(a2, 0, 512, nil, cdb...)); string(one.data) != string(two.data) || len(two.data) < 8 {
			t.Errorf("PERSISTENT RESERVE IN %d: % x, through the standby % x", action, one.data, two.data)
		}
	}
	if r := good(t, run(a2, 0, 512, nil, 0x5E, 0, 0, 0, 0, 0, 0, 0, 12, 0)); len(r.data) != 12 {
		t.Errorf("allocation length 12: %d bytes", len(r.data))
	}
	stranger := standby.Connect("iqn.test:stranger", [6]byte{1}, 2)
	settle(stranger)
	if r := run(stranger, 0, 0, prList(0, 0xC, 0), prOutCDB(0, 0)...); r.status != StatusCheckCondition || r.code != ascUnsupportedLUN {
		t.Errorf("a stranger registers through the standby: %+v", r)
	}
	if r := run(a2, 0, 512, nil, readOne...); r.code != ascStandby {
		t.Errorf("a read in standby: %+v", r)
	}
	store.cut = true
	if r := run(a2, 0, 512, nil, 0x5E, 0, 0, 0, 0, 0, 0, 2, 0, 0); r.code != ascStandby {
		t.Errorf("the other target does not answer: %+v", r)
	}
	if a := serving.Persist(t.Context(), PersistCommand{LUN: 0, Initiator: "iqn.test:a", CDB: wrOne, List: block}); a.Status != StatusCheckCondition {
		t.Errorf("a WRITE from the other target: %+v", a)
	}
	if a := serving.Persist(t.Context(), PersistCommand{LUN: 7, Initiator: "iqn.test:a", CDB: prOutCDB(0, 0), List: prList(0, 1, 0)}); a.Status != StatusCheckCondition {
		t.Errorf("no such unit: %+v", a)
	}

	// The move.
	store.b = store.moving.b
	if err := standby.ReloadReservations(0); err != nil {
		t.Fatal(err)
	}
	states(target.Standby, target.Optimized)
	sent := store.sent
	settle(a2)
	settle(b2)
	good(t, run(a2, 0, 0, block, wrOne...))
	good(t, run(b2, 0, 0, block, wrOne...))
	good(t, run(a2, 0, 0, prList(0xA, 0xB, 0), prOutCDB(4, prWriteRegistrants)...))
	settle(b2)
	if r := run(b2, 0, 0, block, wrOne...); r.status != StatusReservationConflict || store.sent != sent {
		t.Errorf("a preempted initiator writes after the move: %+v; %d sent", r, store.sent-sent)
	}
}
