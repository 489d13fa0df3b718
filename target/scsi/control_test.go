package scsi

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/crypt"
	"github.com/ledge-storage/ledge/target/mem"
)

// TestSetTargetPortGroups: with a hook, access can be set; the states are still what SetPortGroups says.
func TestSetTargetPortGroups(t *testing.T) {
	var asked []target.PortGroup
	var refusal error
	tgt := NewTarget("iqn.2026-11.io.ledge:x", Options{
		SetPortGroups: func(_ context.Context, g []target.PortGroup) error { asked = g; return refusal }, TransitionTime: 1500 * time.Millisecond,
	})
	if err := tgt.Attach(0, memory8(t, "a"), UnitOptions{}); err != nil {
		t.Fatal(err)
	}
	states := func(a, b target.AccessState) {
		tgt.SetPortGroups([]target.PortGroup{{ID: 1, State: a, Ports: []uint16{1}}, {ID: 2, State: b, Ports: []uint16{2}}})
	}
	states(target.Standby, target.Optimized)
	n := connect(tgt, "a", 2)
	if r := run(n, 0, 96, nil, 0x12, 0, 0, 0, 96, 0); r.data[5]>>4&3 != 3 || r.data[6]&0x10 == 0 {
		t.Errorf("standard INQUIRY data % x", r.data)
	}
	stpg := func(list ...byte) answer {
		cdb := []byte{0xA4, 0x0A, 0, 0, 0, 0, 0, 0, 0, byte(len(list)), 0, 0}
		return run(n, 0, 0, list, cdb...)
	}
	if r := stpg(0, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 2); r.status != StatusGood {
		t.Fatalf("%+v", r)
	}
	if len(asked) != 2 || asked[0].ID != 1 || asked[0].State != target.Optimized || asked[1].State != target.Standby {
		t.Errorf("asked for %+v", asked)
	}
	rtpg := func(format byte) []byte {
		return run(n, 0, 256, nil, 0xA3, 0x0A|format<<5, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0).data
	}
	if b := rtpg(0); b[4] != byte(target.Standby) || b[9] != 2 {
		t.Errorf("not changed yet % x", b)
	}
	states(target.Optimized, target.Standby)
	run(n, 0, 0, nil, tur...)
	if b := rtpg(1); !bytes.Equal(b[:14], []byte{0, 0, 0, 28, 0x10, 2, 0, 0, 0, 0x8F, 0, 1, 0, 1}) {
		t.Errorf("changed % x", b)
	}
	for _, x := range []struct {
		name string
		list []byte
		err  error
		code asc
	}{
		{"an unknown group", []byte{0, 0, 0, 0, 0, 0, 0, 3}, nil, ascInvalidFieldParameter},
		{"a group twice", []byte{0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1}, nil, ascInvalidFieldParameter},
		{"transitioning", []byte{0, 0, 0, 0, 0x0F, 0, 0, 1}, nil, ascInvalidFieldParameter},
		{"half a descriptor", []byte{0, 0, 0, 0, 0, 0}, nil, ascParameterListLength},
		{"refused", []byte{0, 0, 0, 0, 0, 0, 0, 1}, errors.New("no"), ascSetGroupsFailed},
		{"under way", []byte{0, 0, 0, 0, 0, 0, 0, 1}, target.ErrTransition, ascTransition},
	} {
		refusal = x.err
		for run(n, 0, 0, nil, tur...).key == keyUnitAttention {
		}
		if r := stpg(x.list...); r.code != x.code {
			t.Errorf("%s: %+v", x.name, r)
		}
	}
}

// TestTaskAborted: with TAS, a command that another nexus ends is answered, and its initiator has no
// attention for it; one's own are not. Without, it is the other way round.
func TestTaskAborted(t *testing.T) {
	for _, tas := range []bool{false, true} {
		dev := &held{Device: memory8(t, "held"), in: make(chan struct{}, 2), leave: make(chan struct{})}
		close(dev.leave)
		tgt := NewTarget("iqn.2026-11.io.ledge:test", Options{})
		if err := tgt.Attach(0, dev, UnitOptions{}); err != nil {
			t.Fatal(err)
		}
		a, b := connect(tgt, "a", 1), connect(tgt, "b", 1)
		if tas {
			page := run(a, 0, 64, nil, 0x1A, 8, 0x4A, 0, 64, 0).data
			if page[4+5] != 0x40 {
				t.Fatalf("what can be changed % x", page)
			}
			list := append([]byte{0, 0, 0, 0}, run(a, 0, 64, nil, 0x1A, 8, 0x0A, 0, 64, 0).data[4:]...)
			list[4+5] |= 0x40
			if r := run(a, 0, 0, list, 0x15, 0x10, 0, 0, byte(len(list)), 0); r.status != StatusGood {
				t.Fatalf("MODE SELECT: %+v", r)
			}
			if r := run(b, 0, 0, nil, tur...); r.code != uaModeChanged {
				t.Errorf("%+v", r)
			}
		}
		run(a, 0, 0, prList(0, 0xA, 0), prOutCDB(0, 0)...)
		run(b, 0, 0, prList(0, 0xB, 0), prOutCDB(0, 0)...)
		begin := func(n *Nexus) (*Task, chan struct{}) {
			s, task, done := &sink{}, &Task{}, make(chan struct{})
			task.Reset()
			task.Sink, task.Aborter, task.Nexus = s, s, n
			copy(task.CDB[:], wrOne)
			task.OutLimit = 512
			if !task.Prepare() {
				t.Fatalf("status %02X", task.Status)
			}
			task.Out = append(task.Out, block)
			go func() { task.Run(); task.Finish(); close(done) }()
			<-dev.in
			return task, done
		}
		task, done := begin(b)
		if r := run(a, 0, 0, prList(0xA, 0xB, 0), prOutCDB(5, prWriteRegistrants)...); r.status != StatusGood {
			t.Fatalf("%+v", r)
		}
		<-done
		if status, respond := task.AbortStatus(); !task.WasAborted() || respond != tas || status != StatusTaskAborted {
			t.Errorf("TAS %v: aborted %v, status %02X, to be answered: %v", tas, task.WasAborted(), status, respond)
		}
		cleared := false
		for r := run(b, 0, 0, nil, tur...); r.key == keyUnitAttention; r = run(b, 0, 0, nil, tur...) {
			cleared = cleared || r.code == uaCommandsCleared
		}
		if cleared == tas {
			t.Errorf("TAS %v: the attention is there: %v", tas, cleared)
		}
		task, done = begin(a)
		a.ResetUnit(0)
		<-done
		if _, respond := task.AbortStatus(); respond {
			t.Errorf("TAS %v: one's own command is answered", tas)
		}
		if tgt.units.Load(); (*tgt.units.Load())[0].mode.Load() != 0 {
			t.Error("a reset leaves mode parameters")
		}
		task.Reset()
		if _, respond := task.AbortStatus(); respond || task.WasAborted() {
			t.Error("a new task is answered")
		}
	}
}

// TestTimeouts: each command of the table has a time-out, and those that may take long have a long one.
func TestTimeouts(t *testing.T) {
	tgt, _ := newUnitFor(t, UnitOptions{})
	n := connect(tgt, "a", 1)
	one := func(code, action byte) (nominal, recommended uint32) {
		options := byte(0x83)
		r := run(n, 0, 64, nil, 0xA3, 0x0C, options, code, 0, action, 0, 0, 0, 64, 0, 0).data
		d := r[len(r)-12:]
		if r[1] != 0x83 || d[1] != 10 {
			t.Fatalf("command %02X/%02X: % x", code, action, r)
		}
		return binary.BigEndian.Uint32(d[4:]), binary.BigEndian.Uint32(d[8:])
	}
	for _, x := range []struct {
		code, action byte
		recommended  uint32
	}{{0x12, 0, 10}, {0x28, 0, 60}, {0x41, 0, 600}, {0x83, 1, 600}, {0x04, 0, 172800}, {0x5F, 1, 60}} {
		if nominal, got := one(x.code, x.action); got != x.recommended || nominal == 0 || nominal >= got {
			t.Errorf("command %02X/%02X: nominal %d s, recommended %d s, want %d", x.code, x.action, nominal, got, x.recommended)
		}
	}
	all := run(n, 0, 1<<16, nil, 0xA3, 0x0C, 0x80, 0, 0, 0, 0, 0, 0xFF, 0, 0, 0).data
	if (len(all)-4)%20 != 0 {
		t.Fatalf("%d bytes", len(all))
	}
	for d := all[4:]; len(d) > 0; d = d[20:] {
		if binary.BigEndian.Uint32(d[12:]) == 0 || binary.BigEndian.Uint32(d[16:]) == 0 {
			t.Errorf("command %02X has no time-out", d[0])
		}
	}
}

// TestTaskManagementIsTold: the queries are told where the transport has them.
func TestTaskManagementIsTold(t *testing.T) {
	tgt, _ := newUnitFor(t, UnitOptions{})
	n := connect(tgt, "a", 1)
	ask := []byte{0xA3, 0x0D, 0x80, 0, 0, 0, 0, 0, 0, 64, 0, 0}
	if r := run(n, 0, 64, nil, ask...); !bytes.Equal(r.data, []byte{0xDA, 0, 0, 12, 0, 0, 0, 1, 0, 0, 2, 0x58, 0, 0, 0, 100}) {
		t.Errorf("% x", r.data)
	}
	n.Queries.Store(true)
	if r := run(n, 0, 64, nil, ask...); r.data[0] != 0xDE || r.data[1] != 0x07 {
		t.Errorf("% x", r.data)
	}
}

// restricted has atomic writes of 4 blocks at multiples of 8.
type restricted struct{ target.Device }

func (r restricted) Info() target.Info {
	i := r.Device.Info()
	i.AtomicBlocks, i.AtomicGranularityBlocks, i.AtomicAlignmentBlocks = 18, 4, 8
	return i
}

// TestAtomicLimits: the block limits page tells what WRITE ATOMIC takes, and it takes nothing else.
func TestAtomicLimits(t *testing.T) {
	tgt := NewTarget("iqn.2026-11.io.ledge:x", Options{})
	if err := tgt.Attach(0, restricted{memory8(t, "a")}, UnitOptions{}); err != nil {
		t.Fatal(err)
	}
	n := connect(tgt, "a", 1)
	page := run(n, 0, 64, nil, 0x12, 1, 0xB0, 0, 64, 0).data
	if !bytes.Equal(page[44:64], []byte{0, 0, 0, 16, 0, 0, 0, 8, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0}) {
		t.Errorf("block limits % x", page[44:])
	}
	for _, x := range []struct{ lba, boundary, blocks byte }{{0, 0, 4}, {8, 0, 16}, {4, 0, 4}, {0, 0, 2}, {0, 0, 20}, {1, 0, 1}, {0, 8, 8}} {
		good := x.lba%8 == 0 && x.blocks%4 == 0 && x.blocks <= 16 && x.boundary == 0
		r := run(n, 0, 0, make([]byte, int(x.blocks)*512), 0x9C, 0, 0, 0, 0, 0, 0, 0, 0, x.lba, 0, x.boundary, 0, x.blocks, 0, 0)
		if good != (r.status == StatusGood) || !good && (r.key != keyIllegalRequest || r.code != ascInvalidFieldCDB) {
			t.Errorf("%+v: %+v", x, r)
		}
	}
}

// keys is a crypt.Keys.
type keys struct{ b []byte }

func (k *keys) Load() ([]byte, error)  { return k.b, nil }
func (k *keys) Replace(b []byte) error { k.b = bytes.Clone(b); return nil }

// TestCryptoErase: SANITIZE, CRYPTOGRAPHIC ERASE is served by devices that forget a key, and by no other.
func TestCryptoErase(t *testing.T) {
	m, k := memory8(t, "a"), &keys{}
	dev, err := crypt.New(m, k)
	if err != nil {
		t.Fatal(err)
	}
	tgt := NewTarget("iqn.2026-11.io.ledge:x", Options{})
	if err := tgt.Attach(0, dev, UnitOptions{AllowSanitize: true}); err != nil {
		t.Fatal(err)
	}
	n := connect(tgt, "a", 1)
	old := fill(t, dev, 0, 8, 1)
	stored, key := content(t, m, 0, 8), bytes.Clone(k.b)
	if r := run(n, 0, 64, nil, 0xA3, 0x0C, 3, 0x48, 0, 3, 0, 0, 0, 64, 0, 0); r.data[1] != 3 {
		t.Errorf("REPORT SUPPORTED OPERATION CODES % x", r.data)
	}
	if r := run(n, 0, 64, nil, 0x12, 1, 0xB1, 0, 64, 0); r.data[7] != 0x50 {
		t.Errorf("block device characteristics % x", r.data)
	}
	if r := run(n, 0, 0, nil, 0x48, 3, 0, 0, 0, 0, 0, 0, 0, 0); r.status != StatusGood {
		t.Fatalf("%+v", r)
	}
	if bytes.Equal(k.b, key) {
		t.Error("the key is still there")
	}
	if err := m.Write(context.Background(), 0, [][]byte{stored}, true); err != nil { // what a thief kept of the medium
		t.Fatal(err)
	}
	if got := content(t, dev, 0, 8); bytes.Equal(got, old) {
		t.Error("the old data can be read")
	}
}

// TestMediumErrorSense: the address of the block is told, in either format, as far as the field goes.
func TestMediumErrorSense(t *testing.T) {
	for _, x := range []struct {
		err       error
		fixed     string
		described string
	}{
		{&target.MediumError{LBA: 0x12345678}, "f00003123456780a000000001100000000000000"[:36], "72031100" + "0000000c" + "000a8000" + "0000000012345678"},
		{fmt.Errorf("x: %w", &target.MediumError{LBA: 0x1_0000_0000, Write: true, Err: errors.New("y")}), "700003000000000a000000000c0000000000", "72030c00" + "0000000c" + "000a8000" + "0000000100000000"},
		{target.ErrMediumRead, "700003000000000a00000000110000000000", "7203110000000000"},
	} {
		_, s := toStatus(x.err)
		if got := fmt.Sprintf("%x", s.encode(nil, false)); got != x.fixed {
			t.Errorf("%v: fixed %s, want %s", x.err, got, x.fixed)
		}
		if got := fmt.Sprintf("%x", s.encode(nil, true)); got != x.described {
			t.Errorf("%v: descriptor %s, want %s", x.err, got, x.described)
		}
	}
}

// named is a device whose identity can change.
type named struct {
	target.Device
	revision string
}

func (n *named) Info() target.Info {
	i := n.Device.Info()
	i.Revision = n.revision
	return i
}

// TestAttentionOrder: attentions come one a command in the order of their causes, once each; a power on
// covers a reset, a reset covers what came before it; REPORT LUNS clears its own.
func TestAttentionOrder(t *testing.T) {
	dev := &named{memory8(t, "a"), "0001"}
	tgt := NewTarget("iqn.2026-11.io.ledge:x", Options{})
	if err := tgt.Attach(0, dev, UnitOptions{}); err != nil {
		t.Fatal(err)
	}
	fresh := tgt.Connect("iqn.test:fresh", [6]byte{}, 1)
	n := connect(tgt, "a", 1)
	take := func(n *Nexus) (got []asc) {
		for r := run(n, 0, 0, nil, tur...); r.key == keyUnitAttention; r = run(n, 0, 0, nil, tur...) {
			got = append(got, r.code)
		}
		return got
	}
	expect := func(what string, n *Nexus, want ...asc) {
		t.Helper()
		if got := take(n); !slices.Equal(got, want) {
			t.Errorf("%s: %04X, want %04X", what, got, want)
		}
	}
	tgt.Changed(0)
	dev.revision = "0002"
	tgt.Changed(0)
	tgt.Changed(0)
	other, err := mem.New(mem.Options{Bytes: 1 << 20, Name: "b"})
	if err != nil {
		t.Fatal(err)
	}
	if err := tgt.Attach(1, other, UnitOptions{}); err != nil {
		t.Fatal(err)
	}
	expect("in order", n, uaCapacityChanged, uaInquiryChanged, uaLUNsChanged)
	tgt.Changed(0)
	n.ResetUnit(0)
	tgt.Changed(0)
	expect("a reset", n, uaReset, uaCapacityChanged)
	expect("power on, then a reset", fresh, uaPowerOn, uaCapacityChanged)
	if err := tgt.Detach(1); err != nil {
		t.Fatal(err)
	}
	run(n, 0, 256, nil, 0xA0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0)
	expect("after REPORT LUNS", n)
	run(n, 0, 96, nil, 0x12, 0, 0, 0, 96, 0)
	expect("INQUIRY clears nothing", fresh, uaLUNsChanged)
}

// TestPages holds the pages that nothing else looks at to their bytes.
func TestPages(t *testing.T) {
	tgt, _ := newUnitFor(t, UnitOptions{})
	n := connect(tgt, "a", 1)
	page := func(code byte) []byte { return run(n, 0, 255, nil, 0x12, 1, code, 0, 255, 0).data }
	want := make([]byte, 64)
	copy(want, []byte{0, 0x86, 0, 60, 0, 0x07, 0, 0x01, 0, 0, 0, 0, 0, maxSense})
	if got := page(0x86); !bytes.Equal(got, want) {
		t.Errorf("extended INQUIRY data % x", got)
	}
	if got := page(0x87); !bytes.Equal(got, []byte{0, 0x87, 0, 4, 0x3F, 0xFF, 0, 0}) {
		t.Errorf("mode page policy % x", got)
	}
	if got := page(0x00); !bytes.Equal(got, []byte{0, 0, 0, 10, 0, 0x80, 0x83, 0x86, 0x87, 0x88, 0x8F, 0xB0, 0xB1, 0xB2}) {
		t.Errorf("supported pages % x", got)
	}
	mode := func(control, page, sub byte) []byte {
		return run(n, 0, 255, nil, 0x1A, 8, control<<6|page, sub, 255, 0).data[4:]
	}
	for _, x := range []struct {
		name         string
		page, sub    byte
		now, changed []byte
	}{
		{"control", 0x0A, 0, []byte{0x0A, 10, 0x20, 0x10, 0, 0, 0, 0, 0xFF, 0xFF, 0, 0}, []byte{0x0A, 10, 4, 0, 8, 0x40, 0, 0, 0, 0, 0, 0}},
		{"control extension", 0x0A, 1, append([]byte{0x4A, 1, 0, 28, 1, 0, maxSense}, make([]byte, 25)...), append([]byte{0x4A, 1, 0, 28}, make([]byte, 28)...)},
		{"caching", 0x08, 0, append([]byte{0x08, 18}, make([]byte, 18)...), append([]byte{0x08, 18}, make([]byte, 18)...)},
		{"informational exceptions", 0x1C, 0, append([]byte{0x1C, 10}, make([]byte, 10)...), append([]byte{0x1C, 10}, make([]byte, 10)...)},
		{"read-write error recovery", 0x01, 0, append([]byte{0x01, 10, 0, 0, 0, 0, 0, 0x80}, make([]byte, 4)...), append([]byte{0x01, 10}, make([]byte, 10)...)},
	} {
		if got := mode(0, x.page, x.sub); !bytes.Equal(got, x.now) {
			t.Errorf("%s % x, want % x", x.name, got, x.now)
		}
		if got := mode(1, x.page, x.sub); !bytes.Equal(got, x.changed) {
			t.Errorf("%s, what can be changed % x, want % x", x.name, got, x.changed)
		}
		if got := mode(2, x.page, x.sub); !bytes.Equal(got, x.now) {
			t.Errorf("%s, defaults % x, want % x", x.name, got, x.now)
		}
	}
	if r := run(n, 0, 0, make([]byte, 4), 0x1D, 0x10, 0, 0, 4, 0); r.code != ascInvalidFieldCDB {
		t.Errorf("SEND DIAGNOSTIC with a list: %+v", r)
	}
	for _, cdb := range [][]byte{{0x16, 0x10, 0, 0, 0, 0}, {0x56, 0x10, 0, 5, 0, 0, 0, 0, 0, 0}, {0x17, 0x10, 0, 0, 0, 0}, {0x57, 0x12, 0, 0, 0, 0, 0, 0, 0, 0}} {
		if r := run(n, 0, 0, nil, cdb...); r.code != ascInvalidFieldCDB {
			t.Errorf("third-party reservation %02X: %+v", cdb[0], r)
		}
	}
}
