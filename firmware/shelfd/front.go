package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/ledge-storage/ledge/firmware/control"
	"github.com/ledge-storage/ledge/firmware/ha"
	"github.com/ledge-storage/ledge/firmware/shelf"
	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/scsi"
)

// The front is what initiators see: one target on both controllers, one unit for each LUN of the pool, and the
// access states of two target port groups. A unit stays attached while ownership moves; only the device behind
// it comes and goes, so that an initiator sees an access state change and nothing else.

// msgLUNs carries the owner's inventory to the standby: {"units": […]} of unitInfo.
const msgLUNs = "shelf.luns"

// unitInfo is one LUN as both controllers must show it.
type unitInfo struct {
	LUN  uint32      `json:"lun"`
	Name string      `json:"name"`
	Kind string      `json:"kind"`
	Size int64       `json:"size_bytes"`
	Info target.Info `json:"info"`
	// Initiators that see it; nil: all.
	Initiators []string `json:"initiators"`
	// Space as it was when the owner told; the owner itself asks the device.
	Space target.Space `json:"space"`

	// On the owner:
	device       target.Device
	reservations reservations
	used         int64
}

// reservations is where a LUN's persistent reservations live: *shelf.LUN.
type reservations interface {
	LoadReservations() ([]byte, error)
	SaveReservations(state []byte) error
}

const maxUnits = 1023

func encodeInventory(inv []unitInfo) ([]byte, error) {
	return json.Marshal(struct {
		Units []unitInfo `json:"units"`
	}{inv})
}

// decodeInventory checks what came from the partner: it is another version of us at worst, and a bug must not
// become an outage of both.
func decodeInventory(body []byte) ([]unitInfo, error) {
	var v struct {
		Units []unitInfo `json:"units"`
	}
	if err := json.Unmarshal(body, &v); err != nil {
		return nil, fmt.Errorf("inventory: %w", err)
	}
	if len(v.Units) > maxUnits {
		return nil, fmt.Errorf("inventory: %d units, %d at most", len(v.Units), maxUnits)
	}
	seen := map[uint32]bool{}
	for _, u := range v.Units {
		if u.LUN == 0 || u.LUN > maxUnits || seen[u.LUN] || u.Info.BlockBytes != 512 && u.Info.BlockBytes != 4096 {
			return nil, fmt.Errorf("inventory: unit %d (block size %d)", u.LUN, u.Info.BlockBytes)
		}
		seen[u.LUN] = true
	}
	return v.Units, nil
}

// inventory lists the pool's LUNs, in the order of p.LUNs.
func inventory(p *shelf.Pool) []unitInfo {
	hosts := p.Hosts()
	var inv []unitInfo
	for _, l := range p.LUNs() {
		i := l.Info()
		u := unitInfo{LUN: i.ID, Name: i.Name, Kind: i.Kind.String(), Size: i.SizeBytes, Info: l.Device().Info(), device: l.Device(), reservations: l, used: i.AllocatedBytes}
		if p, ok := u.device.(target.Provisioned); ok {
			u.Space = p.Space()
		}
		owned := i.Kind != shelf.KindPlain
		for _, h := range hosts {
			if slices.Contains(h.LUNs, i.ID) {
				owned = true
				u.Initiators = append(u.Initiators, h.Initiator)
			}
		}
		if owned && u.Initiators == nil {
			u.Initiators = []string{} // a host's LUN without its host: nobody
		}
		inv = append(inv, u)
	}
	return inv
}

// role is what the front shows of ownership.
type role uint8

const (
	roleGone    role = iota // starting, fenced
	roleStandby             // the partner owns
	roleMoving              // a takeover or handover is under way
	roleOwner
)

// groups returns the two target port groups as this controller sees them.
func groups(self ha.Controller, r role, partner bool) []target.PortGroup {
	mine, theirs := target.Unavailable, target.Unavailable
	switch r {
	case roleStandby:
		mine = target.Standby
		if partner {
			theirs = target.Optimized
		}
	case roleMoving:
		mine, theirs = target.Transitioning, target.Transitioning
	case roleOwner:
		mine = target.Optimized
		if partner {
			theirs = target.Standby
		}
	}
	a, b := mine, theirs
	if self == ha.B {
		a, b = theirs, mine
	}
	return []target.PortGroup{{ID: 1, State: a, Ports: []uint16{1}}, {ID: 2, State: b, Ports: []uint16{2}}}
}

type front struct {
	self ha.Controller
	t    *scsi.Target
	log  *slog.Logger

	mu    sync.Mutex // guards slots, role, known
	slots map[uint32]*slot
	role  role
	known bool // slots are the pool's LUNs: they were shown once

	// forward sends PERSISTENT RESERVE to the owner; set before the portal opens. nil: refused in standby.
	forward func(context.Context, scsi.PersistCommand) (scsi.PersistAnswer, error)
}

func newFront(self ha.Controller, name string, log *slog.Logger) *front {
	f := &front{self: self, t: scsi.NewTarget(name, scsi.Options{}), log: log, slots: map[uint32]*slot{}}
	f.t.SetPortGroups(groups(self, roleGone, false))
	return f
}

func (f *front) states(r role, partner bool) {
	f.mu.Lock()
	f.role = r
	f.mu.Unlock()
	f.t.SetPortGroups(groups(f.self, r, partner))
}

// partner shows that the partner came or went.
func (f *front) partner(connected bool) {
	f.mu.Lock()
	r := f.role
	f.mu.Unlock()
	f.t.SetPortGroups(groups(f.self, r, connected))
}

// show makes the units those of inv.
func (f *front) show(inv []unitInfo) {
	f.mu.Lock()
	defer f.mu.Unlock()
	defer func() { f.known = true }() // a login that comes now finds all of them
	want := map[uint32]bool{}
	for _, u := range inv {
		want[u.LUN] = true
		old := f.slots[u.LUN]
		if old != nil && old.info().Info.UUID != u.Info.UUID {
			// The number was given to another LUN.
			f.remove(u.LUN)
			old = nil
		}
		if old == nil {
			f.add(u)
			continue
		}
		was := old.info()
		f.place(old, u)
		if was.Info.Blocks != u.Info.Blocks {
			f.t.Changed(uint64(u.LUN))
		}
		if !slices.Equal(was.Initiators, u.Initiators) || (was.Initiators == nil) != (u.Initiators == nil) {
			if err := f.t.SetInitiators(uint64(u.LUN), u.Initiators); err != nil {
				f.log.Error("unit", "lun", u.LUN, "err", err)
			}
		}
	}
	for lun := range f.slots {
		if !want[lun] {
			f.remove(lun)
		}
	}
}

// place puts u into a slot. A device comes only after the reservations that the pool has were loaded: those in
// memory are of the time when this controller served the LUN last, and an initiator that was fenced through the
// partner since must never write here. Where they cannot be loaded the LUN stays without its device.
func (f *front) place(s *slot, u unitInfo) {
	if was := s.info(); was.device == nil && u.device != nil {
		blind := u
		blind.device = nil
		s.set(blind)
		if err := f.t.ReloadReservations(uint64(u.LUN)); err != nil {
			f.log.Error("unit is not served: its persistent reservations are not known", "lun", u.LUN, "err", err)
			return
		}
	}
	s.set(u)
}

func (f *front) add(u unitInfo) {
	s := &slot{front: f}
	s.set(u)
	// Attach loads the reservations before anybody sees the unit.
	if err := f.t.Attach(uint64(u.LUN), s, scsi.UnitOptions{Initiators: u.Initiators, Reservations: s}); err != nil {
		f.log.Error("unit", "lun", u.LUN, "err", err)
		return
	}
	f.slots[u.LUN] = s
}

func (f *front) remove(lun uint32) {
	if err := f.t.Detach(uint64(lun)); err != nil {
		f.log.Error("unit", "lun", lun, "err", err)
	}
	delete(f.slots, lun)
}

// ready says why initiators cannot log in yet: this controller has neither opened the pool nor been told of its LUNs
// by the partner. Without a pool there are none, and they can.
func (f *front) ready(p ha.Phase) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.known || p == ha.NoPool || p == ha.Forming {
		return nil
	}
	return fmt.Errorf("the pool's LUNs are not known yet (controller %s is %s)", f.self, p)
}

// withdraw takes the devices away and leaves the units.
func (f *front) withdraw() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.slots {
		u := *s.info()
		u.Space = s.Space()
		u.device, u.reservations = nil, nil
		s.set(u)
	}
}

// units returns what is shown, by LUN.
func (f *front) units() []unitInfo {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []unitInfo
	for _, s := range f.slots {
		out = append(out, *s.info())
	}
	slices.SortFunc(out, func(a, b unitInfo) int { return int(a.LUN) - int(b.LUN) })
	return out
}

// slot is a unit whose device comes and goes.
type slot struct {
	front *front
	p     atomic.Pointer[unitInfo]
	stats slotStats
}

// slotStats count commands that reached the device, since the unit was attached.
type slotStats struct {
	reads, readBytes, writes, writeBytes, failed atomic.Uint64
}

func (s *slotStats) count(commands, bytes *atomic.Uint64, bufs [][]byte, err error) error {
	if err != nil {
		s.failed.Add(1)
		return err
	}
	n := 0
	for _, b := range bufs {
		n += len(b)
	}
	commands.Add(1)
	bytes.Add(uint64(n))
	return nil
}

// stats of a unit; zeros of one that is not shown.
func (f *front) stats(lun uint32) control.LUNStats {
	f.mu.Lock()
	s := f.slots[lun]
	f.mu.Unlock()
	if s == nil {
		return control.LUNStats{}
	}
	c := &s.stats
	return control.LUNStats{Reads: c.reads.Load(), ReadBytes: c.readBytes.Load(), Writes: c.writes.Load(), WriteBytes: c.writeBytes.Load(), Failed: c.failed.Load()}
}

func (s *slot) info() *unitInfo { return s.p.Load() }
func (s *slot) set(u unitInfo)  { s.p.Store(&u) }

// Info is that of the device where there is one: its size may have changed since it was shown.
func (s *slot) Info() target.Info {
	u := s.info()
	if u.device != nil {
		return u.device.Info()
	}
	return u.Info
}

var (
	_ target.Provisioned    = (*slot)(nil)
	_ scsi.ReservationProxy = (*slot)(nil)
)

// Space is the device's, or what was last known.
func (s *slot) Space() target.Space {
	u := s.info()
	if p, ok := u.device.(target.Provisioned); ok {
		return p.Space()
	}
	return u.Space
}

// Load implements scsi.ReservationStore: the pool's, where we own it. The standby knows of none: it asks the owner
// (Forward).
func (s *slot) Load() ([]byte, error) {
	if r := s.info().reservations; r != nil {
		return r.LoadReservations()
	}
	return nil, nil
}

// Save implements scsi.ReservationStore. A fenced owner's log takes nothing, so it acknowledges nothing.
func (s *slot) Save(state []byte) error {
	if r := s.info().reservations; r != nil {
		return r.SaveReservations(state)
	}
	return target.ErrStandby
}

// Current implements scsi.SharedReservations: what lets a flush through is the gate, and so the lease.
func (s *slot) Current(ctx context.Context) error { return s.Flush(ctx) }

// Forward implements scsi.ReservationProxy.
func (s *slot) Forward(ctx context.Context, c scsi.PersistCommand) (scsi.PersistAnswer, error) {
	if s.front.forward == nil {
		return scsi.PersistAnswer{}, target.ErrStandby
	}
	return s.front.forward(ctx, c)
}

// dev returns the device, or the error of a controller that does not own the pool.
func (s *slot) dev() (target.Device, error) {
	if d := s.info().device; d != nil {
		return d, nil
	}
	return nil, target.ErrStandby
}

func (s *slot) Read(ctx context.Context, lba uint64, dst [][]byte) error {
	d, err := s.dev()
	if err != nil {
		return err
	}
	return s.stats.count(&s.stats.reads, &s.stats.readBytes, dst, d.Read(ctx, lba, dst))
}

func (s *slot) Write(ctx context.Context, lba uint64, src [][]byte, fua bool) error {
	d, err := s.dev()
	if err != nil {
		return err
	}
	return s.stats.count(&s.stats.writes, &s.stats.writeBytes, src, d.Write(ctx, lba, src, fua))
}

func (s *slot) Unmap(ctx context.Context, ranges []target.Range) error {
	d, err := s.dev()
	if err != nil {
		return err
	}
	return d.Unmap(ctx, ranges)
}

func (s *slot) WriteSame(ctx context.Context, lba, blocks uint64, block []byte) error {
	d, err := s.dev()
	if err != nil {
		return err
	}
	return d.WriteSame(ctx, lba, blocks, block)
}

func (s *slot) CompareAndWrite(ctx context.Context, lba uint64, compare, write []byte) error {
	d, err := s.dev()
	if err != nil {
		return err
	}
	return d.CompareAndWrite(ctx, lba, compare, write)
}

func (s *slot) Flush(ctx context.Context) error {
	d, err := s.dev()
	if err != nil {
		return err
	}
	return d.Flush(ctx)
}

func (s *slot) Mapped(ctx context.Context, lba, blocks uint64) (bool, uint64, error) {
	d, err := s.dev()
	if err != nil {
		return false, 0, err
	}
	return d.Mapped(ctx, lba, blocks)
}
