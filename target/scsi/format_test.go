package scsi

import (
	"bytes"
	"errors"
	"testing"

	"github.com/ledge-storage/ledge/target"
)

// TestFormatUnit: what the lists may hold and what the unit holds afterwards.
func TestFormatUnit(t *testing.T) {
	tgt, dev := newUnitFor(t, UnitOptions{})
	n := connect(tgt, "a", 1)
	pattern := append([]byte{0, 0x88, 0, 0, 0, 1, 0, 3}, 0xA1, 0xB2, 0xC3)
	zeros := make([]byte, 512)
	for _, x := range []struct {
		name string
		flag byte // byte 1 of the CDB
		list []byte
		code asc
		want []byte
	}{
		{"no list", 0, nil, 0, zeros},
		{"short header", 0x10, []byte{0, 0, 0, 0}, 0, zeros},
		{"long header", 0x30, []byte{0, 0x80, 0, 0, 0, 0, 0, 0}, 0, zeros},
		{"DCRT and the like", 0x18, []byte{0, 0xF0, 0, 0}, 0, zeros},
		{"pattern", 0x10, pattern, 0, bytes.Repeat([]byte{0xA1, 0xB2, 0xC3}, 171)[:512]},
		{"default pattern", 0x10, []byte{0, 0x88, 0, 0, 0, 0, 0, 0}, 0, zeros},
		{"protection information", 0x90, []byte{0, 0, 0, 0}, ascInvalidFieldCDB, nil},
		{"LONGLIST without list", 0x20, nil, ascInvalidFieldCDB, nil},
		{"CMPLST without list", 0x08, nil, ascInvalidFieldCDB, nil},
		{"half a header", 0x30, []byte{0, 0, 0, 0}, ascParameterListLength, nil},
		{"protection field usage", 0x10, []byte{1, 0, 0, 0}, ascInvalidFieldParameter, nil},
		{"pattern without FOV", 0x10, []byte{0, 8, 0, 0, 0, 0, 0, 0}, ascInvalidFieldParameter, nil},
		{"defects", 0x10, []byte{0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0}, ascInvalidFieldParameter, nil},
		{"protection interval", 0x30, []byte{0, 0, 0, 1, 0, 0, 0, 0}, ascInvalidFieldParameter, nil},
		{"security initialize", 0x10, []byte{0, 0x88, 0, 0, 0x20, 0, 0, 0}, ascInvalidFieldParameter, nil},
		{"pattern type", 0x10, []byte{0, 0x88, 0, 0, 0, 2, 0, 1, 1}, ascInvalidFieldParameter, nil},
		{"an empty pattern", 0x10, []byte{0, 0x88, 0, 0, 0, 1, 0, 0}, ascInvalidFieldParameter, nil},
		{"half a pattern", 0x10, []byte{0, 0x88, 0, 0, 0, 1, 0, 4, 1, 2}, ascParameterListLength, nil},
		{"a pattern beyond a block", 0x10, append([]byte{0, 0x88, 0, 0, 0, 1, 2, 1}, make([]byte, 513)...), ascInvalidFieldParameter, nil},
	} {
		old := fill(t, dev, 77, 1, 5)
		r := run(n, 0, 0, x.list, 0x04, x.flag, 0, 0, 0, 0)
		if x.want == nil {
			if r.code != x.code || !bytes.Equal(content(t, dev, 77, 1), old) {
				t.Errorf("%s: %+v", x.name, r)
			}
			continue
		}
		for _, lba := range []uint64{0, 77, dev.Info().Blocks - 1} {
			if got := content(t, dev, lba, 1); r.status != StatusGood || !bytes.Equal(got, x.want) {
				t.Errorf("%s: %+v, block %d % x", x.name, r, lba, got[:8])
			}
		}
	}
	b := connect(tgt, "b", 1)
	run(b, 0, 0, nil, 0x16, 0, 0, 0, 0, 0)
	if r := run(n, 0, 0, nil, 0x04, 0, 0, 0, 0, 0); r.status != StatusReservationConflict {
		t.Errorf("reserved by another: %+v", r)
	}
	run(b, 0, 0, nil, 0x17, 0, 0, 0, 0, 0)
	run(b, 0, 0, []byte{0, 0, 0, 0, 0x0A, 10, 0x20, 0x10, 8, 0, 0, 0, 0xFF, 0xFF, 0, 0}, 0x15, 0x10, 0, 0, 16, 0)
	run(n, 0, 0, nil, tur...)
	if r := run(n, 0, 0, nil, 0x04, 0, 0, 0, 0, 0); r.code != ascWriteProtected || r.key != keyDataProtect {
		t.Errorf("write protected: %+v", r)
	}
}

// TestFormatProgress: with IMMED others are refused with the progress; what failed stays to be seen until
// a FORMAT UNIT succeeds.
func TestFormatProgress(t *testing.T) {
	tgt, d := sanitizable(t)
	n := connect(tgt, "a", 1)
	immed := []byte{0, 0x8A, 0, 0, 0, 1, 0, 1, 9} // a pattern, in two steps
	if r := run(n, 0, 0, immed, 0x04, 0x10, 0, 0, 0, 0); r.status != StatusGood {
		t.Fatalf("%+v", r)
	}
	<-d.in
	for _, cdb := range [][]byte{tur, readOne, {0x04, 0, 0, 0, 0, 0}, immedErase, exitFailed} {
		if r := run(n, 0, 512, nil, cdb...); r.key != keyNotReady || r.code != ascFormatting {
			t.Errorf("opcode %02X in progress: %+v", cdb[0], r)
		}
	}
	d.steps <- nil
	<-d.in
	if got := run(n, 0, 18, nil, askSense...).data; got[2] != keyNotReady || got[12] != 0x04 || got[13] != 0x04 || got[15] != 0x80 || got[16] != 0x7F {
		t.Errorf("half of it: REQUEST SENSE % x", got)
	}
	s := (*tgt.units.Load())[0].sanitizing.Load()
	d.steps <- errors.New("no")
	<-s.done
	if r := run(n, 0, 512, nil, readOne...); r.key != keyMediumError || r.code != ascMediumFormatCorrupted {
		t.Errorf("a read after it failed: %+v", r)
	}
	d.steps <- target.ErrMediumWrite
	if r := run(n, 0, 0, nil, 0x04, 0, 0, 0, 0, 0); r.key != keyMediumError || r.code != ascFormatFailed {
		t.Errorf("failed again: %+v", r)
	}
	d.steps <- nil
	if r := run(n, 0, 0, nil, 0x04, 0, 0, 0, 0, 0); r.status != StatusGood {
		t.Errorf("%+v", r)
	}
	if r := run(n, 0, 512, nil, readOne...); r.status != StatusGood {
		t.Errorf("a read after that: %+v", r)
	}
}
