package scsi

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"testing"

	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/mem"
)

// sink collects data-in.
type sink struct{ data []byte }

func (s *sink) DataIn(b *Buffer) { s.data = append(s.data, b.B...); b.Release() }
func (s *sink) Aborted(uint64)   {}

// answer of a command.
type answer struct {
	status, key byte
	code        asc
	data        []byte
}

// run carries one command out on a nexus.
func run(n *Nexus, lun uint64, in int64, out []byte, cdb ...byte) answer {
	s := &sink{}
	t := &Task{}
	t.Reset()
	t.Sink, t.Aborter, t.Nexus, t.LUN = s, s, n, EncodeLUN(lun)
	copy(t.CDB[:], cdb)
	t.InLimit, t.OutLimit = in, int64(len(out))
	if t.Prepare() {
		t.Out = append(t.Out[:0], out[:t.OutWanted])
		t.Run()
	}
	t.Finish()
	a := answer{status: t.Status, data: s.data}
	if len(t.Sense) > 0 {
		if t.Sense[0]&0x7F == 0x72 {
			a.key, a.code = t.Sense[1]&0xF, asc(binary.BigEndian.Uint16(t.Sense[2:]))
		} else {
			a.key, a.code = t.Sense[2]&0xF, asc(binary.BigEndian.Uint16(t.Sense[12:]))
		}
	}
	return a
}

func newUnitFor(t testing.TB, o UnitOptions) (*Target, target.Device) {
	t.Helper()
	d, err := mem.New(mem.Options{Bytes: 8 << 20, Name: "unit"})
	if err != nil {
		t.Fatal(err)
	}
	tgt := NewTarget("iqn.2026-11.io.ledge:test", Options{})
	if err := tgt.Attach(0, d, o); err != nil {
		t.Fatal(err)
	}
	return tgt, d
}

// connect makes a nexus without pending attentions.
func connect(tgt *Target, name string, port uint16) *Nexus {
	n := tgt.Connect("iqn.test:"+name, [6]byte{0x80, 1}, port)
	for run(n, 0, 0, nil, 0, 0, 0, 0, 0, 0).status == StatusCheckCondition {
	}
	return n
}

var (
	tur     = []byte{0, 0, 0, 0, 0, 0}
	readOne = []byte{0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0}
	wrOne   = []byte{0x2A, 0, 0, 0, 0, 0, 0, 0, 1, 0}
	block   = make([]byte, 512)
)

func TestDeviceErrors(t *testing.T) {
	for _, x := range []struct {
		err    error
		status byte
		key    byte
		code   asc
	}{
		{nil, StatusGood, 0, 0},
		{fmt.Errorf("shelf: %w", target.ErrNoSpace), StatusCheckCondition, keyDataProtect, 0x2707},
		{target.ErrReadOnly, StatusCheckCondition, keyDataProtect, 0x2700},
		{target.ErrOverwrite, StatusCheckCondition, keyDataProtect, 0x2702},
		{target.ErrStandby, StatusCheckCondition, keyNotReady, 0x040B},
		{target.ErrTransition, StatusCheckCondition, keyNotReady, 0x040A},
		{target.ErrUnavailable, StatusCheckCondition, keyNotReady, 0x040C},
		{target.ErrNotReady, StatusCheckCondition, keyNotReady, 0x0401},
		{target.ErrMediumRead, StatusCheckCondition, keyMediumError, 0x1100},
		{target.ErrMediumWrite, StatusCheckCondition, keyMediumError, 0x0C00},
		{target.ErrRange, StatusCheckCondition, keyIllegalRequest, 0x2100},
		{target.ErrBusy, StatusBusy, 0, 0},
		{context.Canceled, StatusTaskAborted, 0, 0},
		{&target.MiscompareError{Offset: 7}, StatusCheckCondition, keyMiscompare, 0x1D00},
		{errors.New("anything"), StatusCheckCondition, keyHardwareError, 0x4400},
	} {
		status, s := toStatus(x.err)
		if status != x.status || (s != nil) != (x.status == StatusCheckCondition) {
			t.Errorf("%v: status %02X, sense %v", x.err, status, s)
			continue
		}
		if s != nil && (s.key != x.key || s.code != x.code) {
			t.Errorf("%v: %v", x.err, s)
		}
	}
}

// TestSenseFormats holds both formats to their bytes.
func TestSenseFormats(t *testing.T) {
	s := &sense{key: keyMiscompare, code: ascMiscompare, information: 0x1234, hasInfo: true}
	if got := fmt.Sprintf("%x", s.encode(nil, false)); got != "f0000e000012340a000000001d0000000000" {
		t.Errorf("fixed %s", got)
	}
	if got := fmt.Sprintf("%x", s.encode(nil, true)); got != "720e1d000000000c000a80000000000000001234" {
		t.Errorf("descriptor %s", got)
	}
	if b := badCDB(2, 5).encode(nil, false); b[15] != 0xCD || b[16] != 0 || b[17] != 2 {
		t.Errorf("field pointer % x", b[15:])
	}
}

// TestAccessStates: what each state lets through, and that a change is told.
func TestAccessStates(t *testing.T) {
	tgt, _ := newUnitFor(t, UnitOptions{})
	groups := func(a, b target.AccessState) {
		tgt.SetPortGroups([]target.PortGroup{{ID: 1, State: a, Ports: []uint16{1}}, {ID: 2, State: b, Ports: []uint16{2}}})
	}
	groups(target.Optimized, target.Standby)
	a, b := connect(tgt, "x", 1), tgt.Connect("iqn.test:x", [6]byte{1}, 2)
	run(b, 0, 0, nil, tur...) // power on
	if r := run(a, 0, 512, nil, readOne...); r.status != StatusGood {
		t.Errorf("optimized: %+v", r)
	}
	for _, x := range []struct {
		state target.AccessState
		code  asc
	}{{target.Standby, ascStandby}, {target.Unavailable, ascUnavailable}, {target.Transitioning, ascTransition}} {
		groups(target.Optimized, x.state)
		for run(b, 0, 0, nil, tur...).key == keyUnitAttention {
		}
		if r := run(b, 0, 512, nil, readOne...); r.key != keyNotReady || r.code != x.code {
			t.Errorf("%s: %+v", x.state, r)
		}
		for _, cdb := range [][]byte{{0x12, 0, 0, 0, 96, 0}, {0xA0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0}, {0xA3, 0x0A, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0}, {3, 0, 0, 0, 18, 0}} {
			if r := run(b, 0, 256, nil, cdb...); r.status != StatusGood {
				t.Errorf("%s: opcode %02X: %+v", x.state, cdb[0], r)
			}
		}
		// The capacity in standby too: a host that finds the path then would not ask again after a takeover.
		for _, cdb := range [][]byte{{0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0}, {0x9E, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0}} {
			r := run(b, 0, 256, nil, cdb...)
			if (r.status == StatusGood) != (x.state == target.Standby) || r.status != StatusGood && r.code != x.code {
				t.Errorf("%s: opcode %02X: %+v", x.state, cdb[0], r)
			}
		}
	}
	groups(target.Standby, target.Optimized)
	if r := run(a, 0, 512, nil, readOne...); r.key != keyUnitAttention || r.code != uaAccessStateChanged {
		t.Errorf("first command after the change: %+v", r)
	}
	r := run(a, 0, 256, nil, 0xA3, 0x0A, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0)
	want := []byte{0, 0, 0, 24, 2, 0x8F, 0, 1, 0, 2, 0, 1, 0, 0, 0, 1, 0, 0x8F, 0, 2, 0, 2, 0, 1, 0, 0, 0, 2}
	if !bytes.Equal(r.data, want) {
		t.Errorf("REPORT TARGET PORT GROUPS\n% x, want\n% x", r.data, want)
	}
}

// TestStatesAreTheTargets: access is implicit (TPGS 01b), so that an initiator cannot set it.
func TestStatesAreTheTargets(t *testing.T) {
	tgt, _ := newUnitFor(t, UnitOptions{})
	n := connect(tgt, "a", 1)
	if r := run(n, 0, 96, nil, 0x12, 0, 0, 0, 96, 0); r.data[5]>>4&3 != 1 {
		t.Errorf("standard INQUIRY data % x", r.data)
	}
	if r := run(n, 0, 0, make([]byte, 8), 0xA4, 0x0A, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0); r.key != keyIllegalRequest || r.code != ascInvalidOpcode {
		t.Errorf("SET TARGET PORT GROUPS: %+v", r)
	}
	if r := run(n, 0, 64, nil, 0xA3, 0x0C, 3, 0xA4, 0, 0x0A, 0, 0, 0, 64, 0, 0); r.data[1] != 1 {
		t.Errorf("REPORT SUPPORTED OPERATION CODES of SET TARGET PORT GROUPS % x", r.data)
	}
}

// TestMasking: a unit is there for those whom it is for, and changes are told.
func TestMasking(t *testing.T) {
	tgt, _ := newUnitFor(t, UnitOptions{Initiators: []string{"iqn.test:a"}})
	a, b := connect(tgt, "a", 1), tgt.Connect("iqn.test:b", [6]byte{}, 1)
	luns := func(n *Nexus) int {
		return int(binary.BigEndian.Uint32(run(n, 0, 256, nil, 0xA0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0).data)) / 8
	}
	if luns(a) != 1 || luns(b) != 0 {
		t.Errorf("%d and %d units", luns(a), luns(b))
	}
	if r := run(b, 0, 512, nil, readOne...); r.code != ascUnsupportedLUN {
		t.Errorf("a hidden unit: %+v", r)
	}
	if err := tgt.SetInitiators(0, []string{"iqn.test:b"}); err != nil {
		t.Fatal(err)
	}
	if r := run(a, 0, 512, nil, readOne...); r.code != ascUnsupportedLUN {
		t.Errorf("a unit taken away: %+v", r)
	}
	if luns(b) != 1 {
		t.Error("a unit given is not reported")
	}
	if tgt.VisibleTo("iqn.test:a") || !tgt.VisibleTo("iqn.test:b") {
		t.Error("VisibleTo does not follow")
	}
}

// TestChanged: a new capacity is an attention for everybody, once.
func TestChanged(t *testing.T) {
	tgt, _ := newUnitFor(t, UnitOptions{})
	a, b := connect(tgt, "a", 1), connect(tgt, "b", 1)
	tgt.Changed(0)
	tgt.Changed(0)
	for _, n := range []*Nexus{a, b} {
		if r := run(n, 0, 0, nil, tur...); r.code != uaCapacityChanged {
			t.Errorf("%+v", r)
		}
		if r := run(n, 0, 0, nil, tur...); r.status != StatusGood {
			t.Errorf("%+v", r)
		}
	}
}

// memory is a ReservationStore.
type memory struct {
	b    []byte
	fail bool
}

func (m *memory) Load() ([]byte, error) { return m.b, nil }
func (m *memory) Save(b []byte) error {
	if m.fail {
		return errors.New("no")
	}
	m.b = bytes.Clone(b)
	return nil
}

func prOutCDB(action, kind byte) []byte { return []byte{0x5F, action, kind, 0, 0, 0, 0, 0, 24, 0} }

func prList(key, action uint64, flags byte) []byte {
	b := make([]byte, 24)
	binary.BigEndian.PutUint64(b, key)
	binary.BigEndian.PutUint64(b[8:], action)
	b[20] = flags
	return b
}

// TestReservationsSurvive: with APTPL, a fenced writer is fenced after a restart too.
func TestReservationsSurvive(t *testing.T) {
	store := &memory{}
	tgt, dev := newUnitFor(t, UnitOptions{Reservations: store})
	a, b := connect(tgt, "a", 1), connect(tgt, "b", 1)
	must := func(r answer) {
		t.Helper()
		if r.status != StatusGood {
			t.Fatalf("%+v", r)
		}
	}
	must(run(a, 0, 0, prList(0, 0xA, 1), prOutCDB(0, 0)...))
	must(run(a, 0, 0, prList(0xA, 0, 0), prOutCDB(1, prWriteRegistrants)...))
	must(run(b, 0, 0, prList(0, 0xB, 1), prOutCDB(0, 0)...))
	must(run(b, 0, 0, prList(0xB, 0xA, 0), prOutCDB(4, prWriteRegistrants)...))
	if r := run(a, 0, 0, block, wrOne...); r.code != uaRegistrationsPreempted {
		t.Errorf("the preempted one is not told: %+v", r)
	}
	if r := run(a, 0, 0, block, wrOne...); r.status != StatusReservationConflict {
		t.Errorf("a preempted initiator writes: %+v", r)
	}
	again := NewTarget(tgt.Name(), Options{})
	if err := again.Attach(0, dev, UnitOptions{Reservations: store}); err != nil {
		t.Fatal(err)
	}
	a, b = connect(again, "a", 1), connect(again, "b", 1)
	if r := run(a, 0, 0, block, wrOne...); r.status != StatusReservationConflict {
		t.Errorf("after a restart a preempted initiator writes: %+v", r)
	}
	must(run(a, 0, 512, nil, readOne...))
	must(run(b, 0, 0, block, wrOne...))
	store.fail = true
	if r := run(b, 0, 0, prList(0xB, 0, 1), prOutCDB(3, 0)...); r.key != keyHardwareError {
		t.Errorf("a clear that could not be stored: %+v", r)
	}
	if r := run(a, 0, 0, block, wrOne...); r.status != StatusReservationConflict {
		t.Errorf("a clear that failed took effect: %+v", r)
	}
}

func TestDecodeLUN(t *testing.T) {
	for _, x := range []struct {
		wire uint64
		lun  uint64
		ok   bool
	}{
		{0, 0, true}, {5 << 48, 5, true}, {0x4123 << 48, 0x123, true}, {0x0105 << 48, 0, false},
		{5<<48 | 1, 0, false}, {0xD200_0123_4500_0000, 0, false}, {0xD201_2345_0000_0000, 0x012345, true}, {0xC101 << 48, 0, false},
	} {
		if lun, ok := DecodeLUN(x.wire); ok != x.ok || ok && lun != x.lun {
			t.Errorf("%016x: %d %v", x.wire, lun, ok)
		}
	}
	for _, lun := range []uint64{0, 255, 256, MaxLUN} {
		if got, ok := DecodeLUN(EncodeLUN(lun)); !ok || got != lun {
			t.Errorf("%d comes back as %d", lun, got)
		}
	}
}

// TestNoAllocations: in steady state a READ(10) and a WRITE(10) of 4 KiB allocate nothing here.
func TestNoAllocations(t *testing.T) {
	tgt, _ := newUnitFor(t, UnitOptions{})
	n := connect(tgt, "a", 1)
	task, s, data := &Task{}, &drop{}, make([]byte, 4096)
	one := func(cdb []byte, in, out int64) func() {
		return func() {
			task.Reset()
			task.Sink, task.Aborter, task.Nexus = s, s, n
			copy(task.CDB[:], cdb)
			task.InLimit, task.OutLimit = in, out
			if task.Prepare() {
				if out > 0 {
					task.Out = append(task.Out, data)
				}
				task.Run()
			}
			task.Finish()
			if task.Status != StatusGood {
				t.Fatalf("status %02X", task.Status)
			}
		}
	}
	for name, f := range map[string]func(){
		"read":  one([]byte{0x28, 0, 0, 0, 0, 0, 0, 0, 8, 0}, 4096, 0),
		"write": one([]byte{0x2A, 0, 0, 0, 0, 0, 0, 0, 8, 0}, 0, 4096),
	} {
		f()
		if a := testing.AllocsPerRun(1000, f); a != 0 {
			t.Errorf("%s: %v allocations", name, a)
		}
	}
}

type drop struct{}

func (*drop) DataIn(b *Buffer) { b.Release() }
func (*drop) Aborted(uint64)   {}

// held is a device whose writes wait for their context, then for leave.
type held struct {
	target.Device
	in    chan struct{}
	leave chan struct{}
}

func (h *held) Write(ctx context.Context, _ uint64, _ [][]byte, _ bool) error {
	h.in <- struct{}{}
	<-ctx.Done()
	<-h.leave
	return ctx.Err()
}

// TestPreemptAndAbort: both preempt each other at once while a write of each runs; nobody waits for
// ever, one wins, and neither returns while a write of the other runs.
func TestPreemptAndAbort(t *testing.T) {
	m, err := mem.New(mem.Options{Bytes: 1 << 20, Name: "held"})
	if err != nil {
		t.Fatal(err)
	}
	dev := &held{Device: m, in: make(chan struct{}, 2), leave: make(chan struct{})}
	tgt := NewTarget("iqn.2026-11.io.ledge:test", Options{})
	if err := tgt.Attach(0, dev, UnitOptions{}); err != nil {
		t.Fatal(err)
	}
	a, b := connect(tgt, "a", 1), connect(tgt, "b", 1)
	run(a, 0, 0, prList(0, 0xA, 0), prOutCDB(0, 0)...)
	run(b, 0, 0, prList(0, 0xB, 0), prOutCDB(0, 0)...)
	writes := make(chan answer, 2)
	for _, n := range []*Nexus{a, b} {
		go func() { writes <- run(n, 0, 0, block, wrOne...) }()
		<-dev.in
	}
	preempts := make(chan answer, 2)
	go func() { preempts <- run(a, 0, 0, prList(0xA, 0xB, 0), prOutCDB(5, prWriteRegistrants)...) }()
	go func() { preempts <- run(b, 0, 0, prList(0xB, 0xA, 0), prOutCDB(5, prWriteRegistrants)...) }()
	cleared := 0
	loser := <-preempts // has nothing to wait for
	if loser.status == StatusGood {
		t.Error("a preemption is done while the other's write runs")
	}
	close(dev.leave)
	if winner := <-preempts; winner.status != StatusGood {
		t.Errorf("nobody won: %+v", winner)
	}
	// The preempted write ends; the winner's own ends with its nexus.
	<-writes
	for _, n := range []*Nexus{a, b} {
		for r := run(n, 0, 0, nil, tur...); r.key == keyUnitAttention; r = run(n, 0, 0, nil, tur...) {
			if r.code == uaCommandsCleared {
				cleared++
			} else if r.code != uaRegistrationsPreempted { // which the loser's own preemption may have met
				t.Errorf("%+v", r)
			}
		}
	}
	if cleared != 1 {
		t.Errorf("%d were told that their commands are gone, want the loser", cleared)
	}
	a.Close()
	b.Close()
	<-writes
}
