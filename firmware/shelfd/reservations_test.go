package main

import (
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"testing"

	"github.com/ledge-storage/ledge/firmware/ha"
	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/scsi"
)

// disk takes every write; its gate may be shut.
type disk struct {
	target.Device
	writes int
	shut   error
	space  target.Space
}

func (d *disk) Info() target.Info {
	return target.Info{Blocks: 1000, BlockBytes: 4096, Thin: true, UUID: [16]byte{1}}
}
func (d *disk) Write(context.Context, uint64, [][]byte, bool) error { d.writes++; return nil }
func (d *disk) Flush(context.Context) error                         { return d.shut }
func (d *disk) Space() target.Space                                 { return d.space }

// keeper is the pool's record of reservations.
type keeper struct {
	state  []byte
	err    error
	onLoad func()
}

func (k *keeper) LoadReservations() ([]byte, error) {
	if k.onLoad != nil {
		k.onLoad()
	}
	return k.state, k.err
}
func (k *keeper) SaveReservations(b []byte) error { k.state = b; return nil }

func ledUnit(d *disk, k *keeper) unitInfo {
	u := unitInfo{LUN: 1, Name: "v", Kind: "plain", Size: 1000 * 4096, Info: (&disk{}).Info()}
	if d != nil {
		u.device, u.reservations = d, k
	}
	return u
}

// Each command of an initiator: its bytes for the target are out.
func command(n *scsi.Nexus, out []byte, cdb ...byte) (status byte, sense uint16) {
	for {
		t := &scsi.Task{}
		t.Reset()
		t.Sink, t.Aborter, t.Nexus, t.LUN = drain{}, drain{}, n, scsi.EncodeLUN(1)
		copy(t.CDB[:], cdb)
		t.InLimit, t.OutLimit = 4096, int64(len(out))
		if t.Prepare() {
			t.Out = append(t.Out[:0], out[:t.OutWanted])
			t.Run()
		}
		t.Finish()
		if len(t.Sense) > 13 && t.Sense[2]&0xF == 6 {
			continue // a unit attention
		}
		if len(t.Sense) > 13 {
			sense = binary.BigEndian.Uint16(t.Sense[12:])
		}
		return t.Status, sense
	}
}

type drain struct{}

func (drain) DataIn(b *scsi.Buffer) { b.Release() }
func (drain) Aborted(uint64)        {}

func prOut(n *scsi.Nexus, action, kind byte, key, serviceKey uint64) byte {
	list := make([]byte, 24)
	binary.BigEndian.PutUint64(list, key)
	binary.BigEndian.PutUint64(list[8:], serviceKey)
	list[20] = 0x04 // on all ports
	status, _ := command(n, list, 0x5F, action, kind, 0, 0, 0, 0, 0, 24, 0)
	return status
}

func writeBlock(n *scsi.Nexus) (byte, uint16) {
	return command(n, make([]byte, 4096), 0x2A, 0, 0, 0, 0, 0, 0, 0, 1, 0)
}

// TestReservationsMoveWithThePool: the new owner knows the reservations before its device lets anything pass, and
// a LUN whose reservations it cannot read is not served.
func TestReservationsMoveWithThePool(t *testing.T) {
	k, d := &keeper{}, &disk{}
	a := newFront(ha.A, targetName("s1"), slog.New(slog.DiscardHandler))
	b := newFront(ha.B, targetName("s1"), slog.New(slog.DiscardHandler))
	b.show([]unitInfo{ledUnit(nil, nil)})
	b.states(roleStandby, true)
	a.show([]unitInfo{ledUnit(d, k)})
	a.states(roleOwner, true)
	type pair struct{ a, b *scsi.Nexus }
	login := func(name string) pair {
		return pair{a.t.Connect(name, [6]byte{1}, 1), b.t.Connect(name, [6]byte{1}, 2)}
	}
	good, fenced := login("iqn.good"), login("iqn.fenced")
	for _, s := range []byte{prOut(fenced.a, 0, 0, 0, 2), prOut(good.a, 0, 0, 0, 1), prOut(good.a, 1, 5, 1, 0), prOut(good.a, 4, 5, 1, 2)} {
		if s != scsi.StatusGood {
			t.Fatalf("status %02x", s)
		}
	}
	if s, code := command(fenced.b, nil, 0x5E, 0, 0, 0, 0, 0, 0, 0, 64, 0); s == scsi.StatusGood || code != 0x040B {
		t.Errorf("the standby tells of reservations: %02x %04x", s, code)
	}
	if s := prOut(fenced.b, 0, 0, 0, 9); s == scsi.StatusGood {
		t.Error("the standby takes a registration that nobody keeps")
	}
	a.withdraw()
	a.states(roleStandby, true)

	// A command that passed all checks of the engine just before: nothing may be let through while the
	// reservations are not loaded.
	slot := b.slots[1]
	early := errors.New("not asked")
	k.onLoad = func() { early = slot.Write(t.Context(), 0, nil, false) }
	b.show([]unitInfo{ledUnit(d, k)})
	k.onLoad = nil
	if !errors.Is(early, target.ErrStandby) {
		t.Errorf("a write while the reservations are loaded: %v", early)
	}
	b.states(roleOwner, true)
	if s, _ := writeBlock(fenced.b); s != scsi.StatusReservationConflict || d.writes != 0 {
		t.Errorf("the fenced initiator writes through the new owner: %02x", s)
	}
	if s, _ := writeBlock(good.b); s != scsi.StatusGood || d.writes != 1 {
		t.Errorf("the holder does not write: %02x", s)
	}

	// Back to A, whose memory still has what was at its time.
	if s := prOut(good.b, 3, 0, 1, 0); s != scsi.StatusGood {
		t.Fatalf("clear: %02x", s)
	}
	b.withdraw()
	k.err = errors.New("unreadable")
	a.show([]unitInfo{ledUnit(d, k)})
	a.states(roleOwner, true)
	if s, _ := writeBlock(good.a); s == scsi.StatusGood {
		t.Error("a LUN whose reservations are not known is served")
	}
	k.err = nil
	a.show([]unitInfo{ledUnit(d, k)})
	if s, _ := writeBlock(fenced.a); s != scsi.StatusGood {
		t.Errorf("after CLEAR through the other controller: %02x", s)
	}
	d.shut = target.ErrUnavailable
	if s, _ := command(good.a, nil, 0x5E, 0, 0, 0, 0, 0, 0, 0, 64, 0); s == scsi.StatusGood {
		t.Error("an owner without a lease tells of reservations")
	}
}

// TestThresholdOnALUN: initiators of every unit hear that the pool runs out, once for each fall, also on the
// controller that took over; the standby tells the figures that it was told.
func TestThresholdOnALUN(t *testing.T) {
	d := &disk{space: target.Space{UsedBytes: 5 << 30, AvailableBytes: 9 << 30, Shared: true, ThresholdBytes: 2 << 30}}
	gate := ha.NewGate(nil)
	f := newFront(ha.A, targetName("s1"), slog.New(slog.DiscardHandler))
	u := ledUnit(d, &keeper{})
	u.device = gate.Device(d)
	gate.Open()
	gate.Extend(1 << 62)
	f.show([]unitInfo{u})
	f.states(roleOwner, true)
	n := f.t.Connect("iqn.x", [6]byte{1}, 1)
	attentions := func() (codes []uint16) {
		for {
			tk := &scsi.Task{}
			tk.Reset()
			tk.Sink, tk.Aborter, tk.Nexus, tk.LUN = drain{}, drain{}, n, scsi.EncodeLUN(1)
			if tk.Prepare() {
				tk.Run()
			}
			tk.Finish()
			if tk.Status == scsi.StatusGood {
				return codes
			}
			codes = append(codes, binary.BigEndian.Uint16(tk.Sense[12:]))
		}
	}
	attentions()
	if s, _ := writeBlock(n); s != scsi.StatusGood || len(attentions()) != 0 {
		t.Fatalf("a write into a pool with room: %02x", s)
	}
	d.space.AvailableBytes = 1 << 30
	writeBlock(n)
	if got := attentions(); len(got) != 1 || got[0] != 0x3807 {
		t.Errorf("below the threshold: attentions %04x, want THIN PROVISIONING SOFT THRESHOLD REACHED", got)
	}
	writeBlock(n)
	if got := attentions(); len(got) != 0 {
		t.Errorf("told twice: %04x", got)
	}
	f.withdraw()
	if s := f.slots[1].Space(); s != d.space {
		t.Errorf("without a device: %+v", s)
	}
}
