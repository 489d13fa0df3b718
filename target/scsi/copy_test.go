package scsi

import (
	"bytes"
	"context"
	"encoding/binary"
	"testing"

	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/mem"
)

// gated is a device that does not copy by itself and whose reads wait, each for a step.
type gated struct {
	target.Device
	in    chan struct{}
	steps chan error
}

func newGated(d target.Device) *gated {
	return &gated{d, make(chan struct{}, 64), make(chan error, 64)}
}

func (g *gated) Read(ctx context.Context, lba uint64, dst [][]byte) error {
	g.in <- struct{}{}
	select {
	case err := <-g.steps:
		if err != nil {
			return err
		}
	case <-ctx.Done():
		return ctx.Err()
	}
	return g.Device.Read(ctx, lba, dst)
}

func memory8(t testing.TB, name string) *mem.Device {
	t.Helper()
	d, err := mem.New(mem.Options{Bytes: 8 << 20, Name: name})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// pair serves dev as unit 0 and a plain unit as unit 1.
func pair(t testing.TB, dev target.Device) (*Target, target.Device) {
	t.Helper()
	tgt, other := NewTarget("iqn.2026-11.io.ledge:test", Options{}), memory8(t, "other")
	for lun, d := range []target.Device{dev, other} {
		if err := tgt.Attach(uint64(lun), d, UnitOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	return tgt, other
}

// connectAll makes a nexus without pending attentions on units 0 and 1.
func connectAll(tgt *Target, name string) *Nexus {
	n := connect(tgt, name, 1)
	for run(n, 1, 0, nil, tur...).status == StatusCheckCondition {
	}
	return n
}

// segment of a copy: from and to are indexes of CSCD descriptors.
type segment struct {
	from, to       uint16
	fromLBA, toLBA uint64
	blocks         uint16
}

// copyDescriptors makes CSCD and segment descriptors.
func copyDescriptors(units []target.Device, segments []segment) (cscd, seg []byte) {
	for _, d := range units {
		c := make([]byte, 32)
		id := naa(d.Info())
		c[0], c[4], c[5], c[7] = 0xE4, 1, 3, 16
		copy(c[8:], id[:])
		c[30], c[31] = byte(d.Info().BlockBytes>>8), byte(d.Info().BlockBytes)
		cscd = append(cscd, c...)
	}
	for _, s := range segments {
		b := make([]byte, 28)
		b[0], b[3] = 0x02, 24
		binary.BigEndian.PutUint16(b[4:], s.from)
		binary.BigEndian.PutUint16(b[6:], s.to)
		binary.BigEndian.PutUint16(b[10:], s.blocks)
		binary.BigEndian.PutUint64(b[12:], s.fromLBA)
		binary.BigEndian.PutUint64(b[20:], s.toLBA)
		seg = append(seg, b...)
	}
	return cscd, seg
}

func list1(id byte, units []target.Device, segments ...segment) []byte {
	cscd, seg := copyDescriptors(units, segments)
	b := make([]byte, 16)
	b[0] = id
	binary.BigEndian.PutUint16(b[2:], uint16(len(cscd)))
	binary.BigEndian.PutUint32(b[8:], uint32(len(seg)))
	return append(append(b, cscd...), seg...)
}

func list4(id uint32, immed bool, units []target.Device, segments ...segment) []byte {
	cscd, seg := copyDescriptors(units, segments)
	b := make([]byte, 48)
	b[0], b[3], b[16] = 1, 32, 0xFF
	if immed {
		b[15] = 1
	}
	binary.BigEndian.PutUint32(b[20:], id)
	binary.BigEndian.PutUint16(b[42:], uint16(len(cscd)))
	binary.BigEndian.PutUint16(b[44:], uint16(len(seg)))
	return append(append(b, cscd...), seg...)
}

func copyCDB(action byte, list []byte) []byte {
	b := make([]byte, 16)
	b[0], b[1] = 0x83, action
	binary.BigEndian.PutUint32(b[10:], uint32(len(list)))
	return b
}

// listCDB is a third-party copy command that names a list identifier in bytes 2 to 5.
func listCDB(code, action byte, id uint32) []byte {
	b := make([]byte, 16)
	b[0], b[1] = code, action
	if code == 0x84 {
		b[12] = 16 // room for 4 KiB
	}
	binary.BigEndian.PutUint32(b[2:], id)
	return b
}

func status4(n *Nexus, id uint32) answer { return run(n, 0, 4096, nil, listCDB(0x84, 5, id)...) }

func fill(t testing.TB, d target.Device, lba, blocks uint64, seed byte) []byte {
	t.Helper()
	b := make([]byte, blocks*uint64(d.Info().BlockBytes))
	for i := range b {
		b[i] = seed + byte(i>>9)*7 + byte(i)
	}
	if err := d.Write(context.Background(), lba, [][]byte{b}, false); err != nil {
		t.Fatal(err)
	}
	return b
}

func content(t testing.TB, d target.Device, lba, blocks uint64) []byte {
	t.Helper()
	b := make([]byte, blocks*uint64(d.Info().BlockBytes))
	if err := d.Read(context.Background(), lba, [][]byte{b}); err != nil {
		t.Fatal(err)
	}
	return b
}

// plainCopy hides that a device copies by itself.
type plainCopy struct{ target.Device }

// TestExtendedCopy: LID1 and LID4 copy the same, between units and within one in either direction, with
// and without the device's help, and tell how they ended.
func TestExtendedCopy(t *testing.T) {
	for name, dev := range map[string]target.Device{"by the device": memory8(t, "a"), "through memory": plainCopy{memory8(t, "a")}} {
		tgt, other := pair(t, dev)
		n := connectAll(tgt, "a")
		units := []target.Device{dev, other}
		want := fill(t, dev, 100, 6000, 1)
		if r := run(n, 0, 0, list1(7, units, segment{0, 1, 100, 3, 6000}), copyCDB(0, list1(7, units, segment{}))...); r.status != StatusGood {
			t.Fatalf("%s: LID1: %+v", name, r)
		}
		if !bytes.Equal(content(t, other, 3, 6000), want) {
			t.Errorf("%s: LID1 copied other data", name)
		}
		l := list4(0x01020304, false, units, segment{0, 1, 100, 5000, 2000}, segment{1, 0, 5000, 20, 60}, segment{0, 0, 100, 101, 6000}, segment{0, 0, 101, 90, 6000})
		if r := run(n, 0, 0, l, copyCDB(1, l)...); r.status != StatusGood {
			t.Fatalf("%s: LID4: %+v", name, r)
		}
		if !bytes.Equal(content(t, other, 5000, 2000), want[:2000*512]) || !bytes.Equal(content(t, dev, 90, 6000), want) ||
			!bytes.Equal(content(t, dev, 20, 60), want[:60*512]) {
			t.Errorf("%s: LID4 copied other data", name)
		}
		if r := run(n, 0, 64, nil, 0x84, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0); !bytes.Equal(r.data, []byte{0, 0, 0, 8, 1, 0, 1, 0, 0, 0x2E, 0xE0, 0}) {
			t.Errorf("%s: RECEIVE COPY STATUS(LID1) %+v", name, r)
		}
		r := status4(n, 0x01020304)
		if len(r.data) != 32 || r.data[3] != 28 || r.data[4] != 1 || r.data[5] != copyDone || binary.BigEndian.Uint64(r.data[16:]) != 14060*512 || r.data[25] != 4 {
			t.Errorf("%s: RECEIVE COPY STATUS(LID4) % x", name, r.data)
		}
		if r := run(n, 0, 4096, nil, listCDB(0x84, 6, 0x01020304)...); len(r.data) != 36 || r.data[3] != 32 {
			t.Errorf("%s: RECEIVE COPY DATA(LID4) %+v", name, r)
		}
		if r := run(connectAll(tgt, "b"), 0, 4096, nil, listCDB(0x84, 5, 0x01020304)...); r.code != ascInvalidFieldCDB {
			t.Errorf("%s: another nexus is told: %+v", name, r)
		}
	}
}

// TestCopyFields: what the LID4 list may hold.
func TestCopyFields(t *testing.T) {
	dev := memory8(t, "a")
	tgt, other := pair(t, dev)
	n := connectAll(tgt, "a")
	units := []target.Device{dev, other}
	for _, x := range []struct {
		name   string
		change func([]byte)
		code   asc
		key    byte
	}{
		{"format", func(b []byte) { b[0] = 0 }, ascInvalidFieldParameter, keyIllegalRequest},
		{"header length", func(b []byte) { b[3] = 16 }, ascInvalidFieldParameter, keyIllegalRequest},
		{"header type", func(b []byte) { b[16] = 0xE4 }, ascInvalidFieldParameter, keyIllegalRequest},
		{"usage 01b", func(b []byte) { b[1] = 0x08 }, ascInvalidFieldParameter, keyIllegalRequest},
		{"an identifier that is not used", func(b []byte) { b[1] = 0x18 }, ascInvalidFieldParameter, keyIllegalRequest},
		{"IMMED without identifier", func(b []byte) { b[1], b[15] = 0x18, 1; clear(b[20:24]) }, ascInvalidFieldParameter, keyIllegalRequest},
		{"inline data", func(b []byte) { b[47] = 4 }, ascInlineDataLength, keyIllegalRequest},
		{"too many CSCD descriptors", func(b []byte) { b[42] = 0xFF }, ascTooManyTargets, keyIllegalRequest},
		{"too many segments", func(b []byte) { b[44] = 0xFF }, ascTooManySegments, keyIllegalRequest},
		{"CSCD type", func(b []byte) { b[48] = 0xE5 }, ascUnsupportedTarget, keyIllegalRequest},
		{"an unknown unit", func(b []byte) { b[60] ^= 1 }, ascCopyTargetUnreachable, keyCopyAborted},
		{"segment type", func(b []byte) { b[48+64] = 0x03 }, ascUnsupportedSegment, keyIllegalRequest},
		{"a source beyond the list", func(b []byte) { b[48+64+5] = 2 }, ascCopyTargetUnreachable, keyCopyAborted},
		{"a range beyond the unit", func(b []byte) { b[48+64+14] = 1 }, ascNone, keyCopyAborted},
	} {
		l := list4(9, false, units, segment{0, 1, 0, 0, 8})
		x.change(l)
		if r := run(n, 0, 0, l, copyCDB(1, l)...); r.code != x.code || r.key != x.key {
			t.Errorf("%s: %+v", x.name, r)
		}
	}
}

// TestCopyInBackground: with IMMED the command ends at once; the copy is seen, its identifier is taken, it
// can be aborted, and it is bounded.
func TestCopyInBackground(t *testing.T) {
	dev := newGated(memory8(t, "a"))
	tgt, other := pair(t, dev)
	n := connectAll(tgt, "a")
	units := []target.Device{dev, other}
	want := fill(t, dev.Device, 0, 4096, 3)
	l := list4(5, true, units, segment{0, 1, 0, 0, 4096}) // two pieces
	if r := run(n, 0, 0, l, copyCDB(1, l)...); r.status != StatusGood {
		t.Fatalf("%+v", r)
	}
	<-dev.in
	if r := status4(n, 5); r.data[5] != copyBackground || binary.BigEndian.Uint32(r.data[8:]) == 0 {
		t.Errorf("in progress % x", r.data)
	}
	if r := run(n, 0, 0, l, copyCDB(1, l)...); r.code != ascOperationInProgress {
		t.Errorf("the identifier again: %+v", r)
	}
	u, _ := n.unit(0)
	o := u.copies.find(n, 5)
	dev.steps <- nil
	<-dev.in
	if r := status4(n, 5); binary.BigEndian.Uint64(r.data[16:]) != 1<<20 || r.data[7] != 1 {
		t.Errorf("half of it % x", r.data)
	}
	dev.steps <- nil
	<-o.done
	if r := status4(n, 5); r.data[5] != copyDone || !bytes.Equal(content(t, other, 0, 4096), want) {
		t.Errorf("done % x", r.data)
	}

	// Aborted.
	if r := run(n, 0, 0, l, copyCDB(1, l)...); r.status != StatusGood {
		t.Fatalf("%+v", r)
	}
	<-dev.in
	if r := run(connectAll(tgt, "b"), 0, 0, nil, listCDB(0x83, 0x1C, 5)...); r.code != ascInvalidFieldCDB {
		t.Errorf("another nexus aborts it: %+v", r)
	}
	if r := run(n, 0, 0, nil, listCDB(0x83, 0x1C, 5)...); r.status != StatusGood {
		t.Errorf("COPY OPERATION ABORT: %+v", r)
	}
	r := status4(n, 5)
	if r.data[5] != copyTerminated || r.data[12] != StatusCheckCondition || r.data[14] != 18 || r.data[34] != keyCopyAborted {
		t.Errorf("aborted % x", r.data)
	}
	if r := run(n, 0, 0, nil, listCDB(0x83, 0x1C, 5)...); r.code != ascInvalidFieldCDB {
		t.Errorf("aborted twice: %+v", r)
	}

	// Bounded.
	for i := range uint32(maxBackground) {
		l := list4(100+i, true, units, segment{0, 1, 0, 0, 8})
		if r := run(n, 0, 0, l, copyCDB(1, l)...); r.status != StatusGood {
			t.Fatalf("copy %d: %+v", i, r)
		}
	}
	l = list4(99, true, units, segment{0, 1, 0, 0, 8})
	if r := run(n, 0, 0, l, copyCDB(1, l)...); r.status != StatusTaskSetFull {
		t.Errorf("one too many: %+v", r)
	}
	n.Close() // returns when all have ended
	if len(u.copies.ops) != 0 || len(u.visits) != 0 {
		t.Errorf("%d copies and %d visits are left", len(u.copies.ops), len(u.visits))
	}
}

// TestCopyIsFenced: whatever shuts an initiator out of a unit ends its copies from and to it, and returns
// only then.
func TestCopyIsFenced(t *testing.T) {
	for _, x := range []struct {
		name  string
		fence func(*Target, *Nexus) // of unit 1, the destination
	}{
		{"detach", func(tgt *Target, _ *Nexus) { tgt.Detach(1) }},
		{"detach the source", func(tgt *Target, _ *Nexus) { tgt.Detach(0) }},
		{"initiators", func(tgt *Target, _ *Nexus) { tgt.SetInitiators(1, []string{"iqn.test:b"}) }},
		{"unit reset", func(_ *Target, b *Nexus) { b.ResetUnit(EncodeLUN(1)) }},
		{"preempt and abort", func(_ *Target, b *Nexus) {
			run(b, 1, 0, prList(0xB, 0xA, 0), prOutCDB(5, prWriteRegistrants)...)
		}},
	} {
		for _, immed := range []bool{true, false} {
			dev := newGated(memory8(t, "a"))
			tgt, other := pair(t, dev)
			a, b := connectAll(tgt, "a"), connectAll(tgt, "b")
			run(a, 1, 0, prList(0, 0xA, 0), prOutCDB(0, 0)...)
			run(b, 1, 0, prList(0, 0xB, 0), prOutCDB(0, 0)...)
			l := list4(1, immed, []target.Device{dev, other}, segment{0, 1, 0, 0, 4096})
			ended := make(chan answer, 1)
			go func() { ended <- run(a, 0, 0, l, copyCDB(1, l)...) }()
			<-dev.in
			x.fence(tgt, b)
			for u := range *b.itls.Load() {
				u.mu.Lock()
				if len(u.visits) != 0 {
					t.Errorf("%s (immed %v): a copy goes on", x.name, immed)
				}
				u.mu.Unlock()
			}
			if r := <-ended; !immed && r.status == StatusGood {
				t.Errorf("%s: the copy ended well: %+v", x.name, r)
			}
			a.Close()
		}
	}
}

// TestCopyObeysReservations: a reservation that is made while a copy runs behind its command ends it.
func TestCopyObeysReservations(t *testing.T) {
	dev := newGated(memory8(t, "a"))
	tgt, other := pair(t, dev)
	a, b := connectAll(tgt, "a"), connectAll(tgt, "b")
	l := list4(1, true, []target.Device{dev, other}, segment{0, 1, 0, 0, 6144}) // three pieces
	run(a, 0, 0, l, copyCDB(1, l)...)
	<-dev.in
	run(b, 1, 0, prList(0, 0xB, 0), prOutCDB(0, 0)...)
	if r := run(b, 1, 0, prList(0xB, 0, 0), prOutCDB(1, prWriteExclusive)...); r.status != StatusGood {
		t.Fatalf("%+v", r)
	}
	u, _ := a.unit(0)
	o := u.copies.find(a, 1)
	dev.steps <- nil
	<-o.done
	if r := status4(a, 1); r.data[5] != copyFailed {
		t.Errorf("% x", r.data)
	}
	if len(dev.in) != 0 {
		t.Error("it read on")
	}
}

// TestCopyFailure: the sense data of a copy that failed are kept for those who ask.
func TestCopyFailure(t *testing.T) {
	dev := newGated(memory8(t, "a"))
	tgt, other := pair(t, dev)
	n := connectAll(tgt, "a")
	l := list1(3, []target.Device{dev, other}, segment{0, 1, 0, 0, 8})
	details := []byte{0x84, 4, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0}
	dev.steps <- &target.MediumError{LBA: 5}
	if r := run(n, 0, 0, l, copyCDB(0, l)...); r.key != keyMediumError {
		t.Fatalf("%+v", r)
	}
	r := run(n, 0, 256, nil, details...)
	if len(r.data) != 78 || r.data[3] != 74 || r.data[56] != 2 || r.data[59] != 18 || r.data[60] != 0xF0 || r.data[66] != 5 {
		t.Errorf("RECEIVE COPY FAILURE DETAILS % x", r.data)
	}
	if r := run(n, 0, 256, nil, details...); r.code != ascInvalidFieldCDB {
		t.Errorf("told twice: %+v", r)
	}
	dev.steps <- nil
	run(n, 0, 0, l, copyCDB(0, l)...)
	if r := run(n, 0, 256, nil, details...); r.code != ascInvalidFieldCDB {
		t.Errorf("of one that did not fail: %+v", r)
	}
}
