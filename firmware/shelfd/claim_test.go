package main

import (
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/firmware/control"
	"github.com/ledge-storage/ledge/firmware/ha"
	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/nvram/nvramtest"
	"github.com/ledge-storage/ledge/nvram/region"
	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/raid/drive"
)

// partner is controller B of the shelf, with NVRAM in a file.
func (f *shelfFiles) partner() *backend {
	f.t.Helper()
	log := slog.New(slog.DiscardHandler)
	b := &backend{self: ha.B, log: log, conf: &Config{Shelf: "s1", Controller: "B"}, tasks: newTasks(log)}
	b.drives = newDrives([]string{filepath.Join(f.dir, "d*")}, func(path string) (port, error) { return drive.Open(path, drive.Options{Controller: "s1.B"}) }, log)
	r, err := region.Open(filepath.Join(f.dir, "nvram-B"), region.Options{Create: true, Size: 16 << 20})
	if err != nil {
		f.t.Fatal(err)
	}
	var mirrored nvram.Area
	b.region = r
	b.own, mirrored = nvram.Areas(r.Size())
	if b.mirror, err = nvram.OpenMirror(r, mirrored); err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() {
		b.closeArray()
		b.drives.close()
		if err := r.Close(); err != nil {
			f.t.Error(err)
		}
	})
	return b
}

// heldPort is a port whose label writes wait while hold is not nil.
type heldPort struct {
	port
	hold *atomic.Pointer[chan struct{}]
}

func (p *heldPort) WriteAt(b []byte, off int64) (int, error) {
	if c := p.hold.Load(); c != nil && off < raid.DataOffset {
		<-*c
	}
	return p.port.WriteAt(b, off)
}

// mirrored is a link whose partner mirrors at once.
type mirrored struct {
	link
	partner *nvramtest.Partner
}

func (m mirrored) Replicator() nvram.Replicator { return m.partner }
func (mirrored) Connected() bool                { return true }
func (mirrored) StopReceiving()                 {}

// TestFreshPoolOpensAfterItsLabel: an owner in sync acknowledges nothing, and so does not even open, before the members say that its
// log may be needed (P1: else who finds them so may drop it).
func TestFreshPoolOpensAfterItsLabel(t *testing.T) {
	f := &shelfFiles{t: t, dir: t.TempDir()}
	for i := range 5 {
		if err := drive.Create(f.path(i), raid.DataOffset+200*raid.SlotBytes); err != nil {
			t.Fatal(err)
		}
	}
	var hold atomic.Pointer[chan struct{}]
	b := f.partner()
	b.conf.Array = ArrayConfig{Data: 2, Parity: 2}
	b.drives.close()
	b.drives = newDrives([]string{filepath.Join(f.dir, "d*")}, func(path string) (port, error) {
		d, err := drive.Open(path, drive.Options{Controller: "s1.B"})
		return &heldPort{d, &hold}, err
	}, b.log)
	f.b = b
	r, err := region.Open(filepath.Join(f.dir, "nvram-A"), region.Options{Create: true, Size: 16 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	_, area := nvram.Areas(r.Size())
	m, err := nvram.OpenMirror(r, area)
	if err != nil {
		t.Fatal(err)
	}
	b.link, b.front, b.gate = mirrored{partner: nvramtest.NewPartner(m)}, newFront(ha.B, "iqn.2026-11.io.ledge:t", b.log), ha.NewGate(nil)
	b.lost, b.broken = func() {}, func() {}
	if err := b.Form(t.Context(), control.PoolSpec{Spares: 0}); err != nil {
		t.Fatal(err)
	}
	if l := f.says(); !l.Fresh() {
		t.Fatalf("a new pool's label has flags %d", l.Flags)
	}
	released := make(chan struct{})
	hold.Store(&released)
	opened := make(chan error, 1)
	go func() { opened <- b.Open(t.Context(), ha.View{Epoch: 1, Owner: ha.B, Fresh: true}) }()
	select {
	case err := <-opened:
		t.Errorf("the pool is open (%v), and the members still call its log fresh", err)
		opened <- err
	case <-time.After(time.Second):
	}
	hold.Store(nil)
	close(released)
	if err := <-opened; err != nil {
		t.Fatal(err)
	}
	if l := f.says(); l.Flags != 0 {
		t.Errorf("in sync the label has flags %d", l.Flags)
	}
	b.Abort()
}

// says is the label on the members now.
func (f *shelfFiles) says() raid.Label {
	f.t.Helper()
	s, err := raid.ReadLabels(f.t.Context(), f.b.drives.scan(), raid.UUID{})
	if err != nil {
		f.t.Fatal(err)
	}
	return s.Label
}

// TestClaimTooLate: B fenced and looked, and was stopped; A took the pool up meanwhile and recorded something. What B saw is
// no longer so, and it must not claim over it (P1, P2).
func TestClaimTooLate(t *testing.T) {
	for name, change := range map[string]func(l *raid.Label){
		"solo":      func(l *raid.Label) { l.Flags, l.SoloLSN = raid.FlagSolo, 7 },
		"fresh":     func(l *raid.Label) { l.Flags = raid.FlagFresh },
		"replaying": func(l *raid.Label) { l.Flags = raid.FlagReplaying },
		"claimed":   func(l *raid.Label) { l.Epoch = 2 },
		"disowned":  func(l *raid.Label) { l.Owner = 0 },
	} {
		t.Run(name, func(t *testing.T) {
			f := newShelfFiles(t, 5)
			f.create(5)
			f.b.closeArray()
			b := f.partner()
			seen := ha.View{Epoch: 1, Owner: ha.A, Mirror: true}
			if err := b.Fence(t.Context(), seen); err != nil {
				t.Fatal(err)
			}
			if err := f.b.Fence(t.Context(), seen); err != nil {
				t.Fatal(err)
			}
			a, err := f.b.openArray(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(a.WriteLabel(t.Context(), change), a.Close()); err != nil {
				t.Fatal(err)
			}
			want := f.says()
			if err := b.Claim(t.Context(), seen, false, false); !errors.Is(err, ha.ErrConflict) || !strings.Contains(err.Error(), "changed since") {
				t.Fatalf("claim over %s: %v", name, err)
			}
			if got := f.says(); got.Epoch != want.Epoch || got.Owner != want.Owner || got.Flags != want.Flags || got.SoloLSN != want.SoloLSN {
				t.Fatalf("the members say epoch %d owner %c flags %d, A had written epoch %d owner %c flags %d", got.Epoch, got.Owner, got.Flags, want.Epoch, want.Owner, want.Flags)
			}
		})
	}
}

// TestFreshLabel: a clean claim says that nobody needs its log, a takeover with replay does not; solo and in sync both end it.
func TestFreshLabel(t *testing.T) {
	for _, test := range []struct {
		name  string
		clean bool
		then  func(b *backend) error
		want  uint64
	}{
		{"handed over", true, nil, raid.FlagFresh},
		{"in sync", true, func(b *backend) error { return b.LeaveSolo(t.Context()) }, 0},
		{"alone", true, func(b *backend) error { return b.EnterSolo(t.Context(), 3) }, raid.FlagSolo},
		{"alone, then in sync", true, func(b *backend) error { return errors.Join(b.EnterSolo(t.Context(), 3), b.LeaveSolo(t.Context())) }, 0},
		{"with replay", false, nil, raid.FlagReplaying},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := newShelfFiles(t, 5)
			f.create(5)
			f.b.closeArray()
			b := f.partner()
			seen := ha.View{Epoch: 1, Owner: ha.A}
			if err := errors.Join(b.Fence(t.Context(), seen), b.Claim(t.Context(), seen, test.clean, false)); err != nil {
				t.Fatal(err)
			}
			if test.then != nil {
				if err := test.then(b); err != nil {
					t.Fatal(err)
				}
			}
			if l := f.says(); l.Epoch != 2 || l.Owner != 'B' || l.Flags != test.want || l.Fresh() != (test.want == raid.FlagFresh) {
				t.Fatalf("epoch %d owner %c flags %d, want flags %d", l.Epoch, l.Owner, l.Flags, test.want)
			}
		})
	}
}

// TestConfirmHalf: with half of an even number of members a majority can never be ours again, though nobody else has one.
func TestConfirmHalf(t *testing.T) {
	f := newShelfFiles(t, 6)
	f.create(6)
	if err := f.b.Confirm(t.Context()); err != nil {
		t.Fatal(err)
	}
	key := keyOf(ha.A, 1)
	for i := range 3 { // drives that lost their power, and the reservation with it
		p, err := drive.Open(f.path(i), drive.Options{Controller: "s1.A"})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(p.Release(key), p.Unregister(key), p.Close()); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.b.Confirm(t.Context()); !errors.Is(err, ha.ErrConflict) {
		t.Fatalf("three of six members confirm us: %v", err)
	}
}
