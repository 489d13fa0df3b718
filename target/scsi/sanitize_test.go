package scsi

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/mem"
)

// stepped is a device each of whose erasing calls waits for a step, and may be told to fail.
type stepped struct {
	*mem.Device
	in    chan struct{}
	steps chan error
}

// NeverBlocks hides that of memory.
func (s *stepped) NeverBlocks() bool { return false }

func (s *stepped) wait(ctx context.Context) error {
	s.in <- struct{}{}
	select {
	case err := <-s.steps:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *stepped) Unmap(ctx context.Context, r []target.Range) error {
	if err := s.wait(ctx); err != nil {
		return err
	}
	return s.Device.Unmap(ctx, r)
}

func (s *stepped) WriteSame(ctx context.Context, lba, n uint64, block []byte) error {
	if err := s.wait(ctx); err != nil {
		return err
	}
	return s.Device.WriteSame(ctx, lba, n, block)
}

// sanitizable serves a stepped unit of two steps of OVERWRITE, one of BLOCK ERASE.
func sanitizable(t *testing.T) (*Target, *stepped) {
	t.Helper()
	m, err := mem.New(mem.Options{Bytes: 2 * overwriteStepBytes, Name: "sanitize"})
	if err != nil {
		t.Fatal(err)
	}
	d := &stepped{Device: m, in: make(chan struct{}, 16), steps: make(chan error, 16)}
	tgt := NewTarget("iqn.2026-11.io.ledge:test", Options{})
	if err := tgt.Attach(0, d, UnitOptions{AllowSanitize: true}); err != nil {
		t.Fatal(err)
	}
	return tgt, d
}

var (
	immedErase = []byte{0x48, 0x80 | 0x02, 0, 0, 0, 0, 0, 0, 0, 0}
	askSense   = []byte{0x03, 0, 0, 0, 18, 0}
	exitFailed = []byte{0x48, 0x1F, 0, 0, 0, 0, 0, 0, 0, 0}
)

// TestSanitizeIsOff: unless the unit allows it, the command does not exist.
func TestSanitizeIsOff(t *testing.T) {
	tgt, _ := newUnitFor(t, UnitOptions{})
	n := connect(tgt, "a", 1)
	for _, action := range []byte{0, sanitizeOverwrite, sanitizeBlockErase, 3, sanitizeExitFailure} {
		if r := run(n, 0, 0, nil, 0x48, action, 0, 0, 0, 0, 0, 0, 0, 0); r.code != ascInvalidOpcode {
			t.Errorf("action %02X: %+v", action, r)
		}
	}
	if r := run(n, 0, 64, nil, 0xA3, 0x0C, 3, 0x48, 0, 2, 0, 0, 0, 64, 0, 0); r.data[1] != 1 {
		t.Errorf("REPORT SUPPORTED OPERATION CODES % x", r.data)
	}
	all := run(n, 0, 4096, nil, 0xA3, 0x0C, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0).data
	for d := all[4:]; len(d) > 0; d = d[8:] {
		if d[0] == 0x48 {
			t.Error("SANITIZE is among the supported commands")
		}
	}
}

// TestSanitizeFields: what the CDB and the list may hold.
func TestSanitizeFields(t *testing.T) {
	tgt, d := sanitizable(t)
	n := connect(tgt, "a", 1)
	for _, x := range []struct {
		name string
		cdb  []byte
		list []byte
		code asc
	}{
		{"crypto erase", []byte{0x48, 3, 0, 0, 0, 0, 0, 0, 0, 0}, nil, ascInvalidFieldCDB},
		{"erase with a list", []byte{0x48, 2, 0, 0, 0, 0, 0, 0, 8, 0}, make([]byte, 8), ascInvalidFieldCDB},
		{"no pattern", []byte{0x48, 1, 0, 0, 0, 0, 0, 0, 4, 0}, []byte{1, 0, 0, 0}, ascInvalidFieldCDB},
		{"no pass", []byte{0x48, 1, 0, 0, 0, 0, 0, 0, 5, 0}, []byte{0, 0, 0, 1, 7}, ascInvalidFieldCDB},
		{"pattern shorter than said", []byte{0x48, 1, 0, 0, 0, 0, 0, 0, 5, 0}, []byte{1, 0, 0, 2, 7}, ascInvalidFieldCDB},
		{"list shorter than said", []byte{0x48, 1, 0, 0, 0, 0, 0, 0, 6, 0}, []byte{1, 0, 0, 1, 7}, ascParameterListLength},
		{"pattern beyond a block", []byte{0x48, 1, 0, 0, 0, 0, 0, 2, 5, 0}, make([]byte, 517), ascInvalidFieldCDB},
		{"ZNR", []byte{0x48, 0x42, 0, 0, 0, 0, 0, 0, 0, 0}, nil, ascInvalidFieldCDB},
	} {
		if r := run(n, 0, 0, x.list, x.cdb...); r.code != x.code {
			t.Errorf("%s: %+v", x.name, r)
		}
	}
	if r := run(n, 0, 0, nil, exitFailed...); r.status != StatusGood {
		t.Errorf("EXIT FAILURE MODE where nothing failed: %+v", r)
	}
	b := connect(tgt, "b", 1)
	run(b, 0, 0, nil, 0x16, 0, 0, 0, 0, 0)
	if r := run(n, 0, 0, nil, immedErase...); r.status != StatusReservationConflict {
		t.Errorf("reserved by another: %+v", r)
	}
	if len(d.in) != 0 {
		t.Error("a refused command reached the device")
	}
}

// TestSanitizeProgress: with IMMED the command ends at once, others are refused with the progress
// until it is done, and resets and the end of the session do not end it.
func TestSanitizeProgress(t *testing.T) {
	tgt, d := sanitizable(t)
	a, b := connect(tgt, "a", 1), connect(tgt, "b", 1)
	run(a, 0, 0, bytes.Repeat([]byte{1}, 512), wrOne...)
	list := []byte{0x80 | 2, 0, 0, 3, 0xA1, 0xB2, 0xC3} // two passes, the second inverted
	if r := run(a, 0, 0, list, 0x48, 0x80|1, 0, 0, 0, 0, 0, 0, 7, 0); r.status != StatusGood {
		t.Fatalf("%+v", r)
	}
	<-d.in
	for _, cdb := range [][]byte{tur, readOne, {0x1B, 0, 0, 0, 1, 0}, immedErase, exitFailed} {
		if r := run(b, 0, 512, nil, cdb...); r.key != keyNotReady || r.code != ascSanitizing {
			t.Errorf("opcode %02X in progress: %+v", cdb[0], r)
		}
	}
	if r := run(b, 0, 0, block, wrOne...); r.code != ascSanitizing {
		t.Errorf("a write in progress: %+v", r)
	}
	for _, cdb := range [][]byte{{0x12, 0, 0, 0, 96, 0}, {0xA0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0}} {
		if r := run(b, 0, 256, nil, cdb...); r.status != StatusGood {
			t.Errorf("opcode %02X in progress: %+v", cdb[0], r)
		}
	}
	b.ResetUnit(0)
	a.Close()
	run(b, 0, 18, nil, askSense...) // the reset
	d.steps <- nil
	<-d.in // a quarter is done
	got := run(b, 0, 18, nil, askSense...).data
	if want := []byte{0x70, 0, 2, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x04, 0x1B, 0, 0x80, 0x3F, 0xFF}; !bytes.Equal(got, want) {
		t.Errorf("REQUEST SENSE % x, want % x", got, want)
	}
	s := (*tgt.units.Load())[0].sanitizing.Load()
	for range 3 {
		d.steps <- nil
	}
	<-s.done
	if r := run(b, 0, 512, nil, readOne...); r.status != StatusGood || !bytes.HasPrefix(r.data, []byte{0x5E, 0x4D, 0x3C, 0x5E}) {
		t.Errorf("afterwards: %+v", r)
	}
	if r := run(b, 0, 512, nil, 0x28, 0, 0, 0, 0xFF, 0xFF, 0, 0, 1, 0); !bytes.HasPrefix(r.data, []byte{0x5E, 0x4D, 0x3C}) {
		t.Errorf("the last block: %+v", r)
	}
}

// TestSanitizeFailure: a failure is shown until it is left behind, which AUSE allows.
func TestSanitizeFailure(t *testing.T) {
	tgt, d := sanitizable(t)
	n := connect(tgt, "a", 1)
	d.steps <- target.ErrMediumWrite
	if r := run(n, 0, 0, nil, 0x48, 2, 0, 0, 0, 0, 0, 0, 0, 0); r.key != keyMediumError || r.code != ascSanitizeFailed {
		t.Errorf("%+v", r)
	}
	if r := run(n, 0, 512, nil, readOne...); r.key != keyMediumError || r.code != ascSanitizeFailed {
		t.Errorf("a read after it: %+v", r)
	}
	if r := run(n, 0, 0, nil, exitFailed...); r.code != ascInvalidFieldCDB {
		t.Errorf("a restricted failure is left: %+v", r)
	}
	d.steps <- nil
	if r := run(n, 0, 0, nil, 0x48, 2, 0, 0, 0, 0, 0, 0, 0, 0); r.status != StatusGood {
		t.Errorf("the second try: %+v", r)
	}
	d.steps <- errors.New("anything")
	run(n, 0, 0, nil, 0x48, 0x20|2, 0, 0, 0, 0, 0, 0, 0, 0)
	if r := run(n, 0, 0, nil, exitFailed...); r.status != StatusGood {
		t.Errorf("EXIT FAILURE MODE: %+v", r)
	}
	if r := run(n, 0, 512, nil, readOne...); r.status != StatusGood {
		t.Errorf("a read after that: %+v", r)
	}
}

// TestSanitizeWaits: it begins when older writes have ended, and Detach ends it.
func TestSanitizeWaits(t *testing.T) {
	tgt, d := sanitizable(t)
	n := connect(tgt, "a", 1)
	u, _ := n.unit(0)
	older := make(chan answer)
	go func() { older <- run(n, 0, 0, block, append([]byte{0x41}, wrOne[1:]...)...) }() // WRITE SAME
	<-d.in
	run(n, 0, 0, nil, immedErase...)
	s := u.sanitizing.Load()
	u.mu.Lock()
	if !u.atWork() || len(d.in) != 0 {
		t.Error("the erasure does not wait for a write that runs")
	}
	u.mu.Unlock()
	d.steps <- nil
	if r := <-older; r.status != StatusGood {
		t.Errorf("the older write: %+v", r)
	}
	<-d.in
	if _, err := u.enterVisit(&copyOp{nexus: n}, false, 0, 1); err == nil {
		t.Error("a copy from another unit is let in")
	}
	if err := tgt.Detach(0); err != nil {
		t.Fatal(err)
	}
	select {
	case <-s.done:
	default:
		t.Error("Detach left it running")
	}
}
