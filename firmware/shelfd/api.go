package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/ledge-storage/ledge/firmware/control"
	"github.com/ledge-storage/ledge/firmware/ha"
	"github.com/ledge-storage/ledge/firmware/shelf"
	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/target"
)

// api is the shelf as package control sees it.
type api struct {
	b      *backend
	driver *ha.Driver
}

// version is set by the image's build.
var version = "dev"

func (a *api) Target() (string, []string) {
	portals := append([]string{}, a.b.conf.Portals["A"]...)
	return targetName(a.b.conf.Shelf), append(portals, a.b.conf.Portals["B"]...)
}

func (a *api) Secrets(initiator string) control.CHAP { return claimSecrets(a.b.conf.Secret, initiator) }

func targetName(shelf string) string { return "iqn.2026-11.io.ledge:shelf." + shelf }

func (a *api) Status(context.Context) control.Status {
	b := a.b
	state, since, trouble := a.driver.State()
	s := control.Status{Shelf: b.conf.Shelf, Controller: b.conf.Controller, Role: state.Phase.Role(), Phase: state.Phase.String(),
		Epoch: state.Seen.Epoch, Version: version}
	if state.Seen.Owner != ha.None {
		s.Owner = state.Seen.Owner.String()
	}
	s.Target, s.Portals = a.Target()
	s.Partner = b.link.Partner()
	s.Partner.Mirror = "stale"
	s.NVRAM.Size = b.region.Size()
	if state.Phase != ha.Owner {
		s.Trouble = trouble
	} else {
		s.ServingSince = &since
	}
	b.mu.Lock()
	array, log, pool, survey, looked := b.array, b.nvlog, b.pool, b.survey, b.looked
	b.mu.Unlock()
	if array != nil {
		s.Members = membersOf(array.Status())
	} else if looked {
		s.Members = membersSeen(survey)
	}
	if pool == nil {
		a.standbyStatus(&s, state, survey, looked)
		return s
	}
	p := pool.Status()
	s.Pool = &control.Pool{UUID: raid.UUID(p.UUID).String(), CapacityBytes: p.CapacityBytes, AllocatedBytes: p.AllocatedBytes, State: p.State}
	if array != nil && p.State == "ok" && array.Status().State != raid.Optimal {
		s.Pool.State = string(array.Status().State)
	}
	for _, u := range inventory(pool) {
		s.LUNs = append(s.LUNs, u.public())
	}
	if log != nil {
		st := log.Stats()
		s.NVRAM.Used = st.Used + st.UpdateUsed
		s.Partner.Mirror = mirrorState(st.Mirror)
	}
	return s
}

// standbyStatus is what a controller without an open pool can tell: from its last look, and from the owner.
func (a *api) standbyStatus(s *control.Status, state ha.State, survey raid.Survey, looked bool) {
	if looked && survey.Label.Epoch > 0 {
		s.Pool = &control.Pool{UUID: survey.Label.Pool.String(), State: "unknown"}
		l := &survey.Label
		switch {
		case l.Solo():
			s.Partner.Mirror = "solo"
		case a.b.mirror.Complete(nvram.ID(l.NVRAM), l.Epoch):
			s.Partner.Mirror = "in-sync"
		case s.Partner.Connected && state.Phase == ha.Standby:
			s.Partner.Mirror = "resync"
		}
	}
	for _, u := range a.b.front.units() {
		s.LUNs = append(s.LUNs, u.public())
	}
}

func (u *unitInfo) public() control.LUN {
	return control.LUN{ID: u.LUN, LUN: u.LUN, Name: u.Name, Kind: u.Kind, SizeBytes: u.Size, BlockBytes: u.Info.BlockBytes,
		AllocatedBytes: u.used, UUID: raid.UUID(u.Info.UUID).String()}
}

func membersOf(st raid.Status) []control.Member {
	var out []control.Member
	for _, m := range st.Members {
		out = append(out, control.Member{Index: m.Index, Path: m.Path, State: string(m.State),
			Errors: m.ReadErrors + m.WriteErrors + m.Timeouts + m.ChecksumErrors + m.StaleStrips})
	}
	return out
}

// membersSeen are those of the last look at the labels.
func membersSeen(s raid.Survey) []control.Member {
	out := make([]control.Member, s.Label.N)
	for i := range out {
		out[i] = control.Member{Index: i, State: string(raid.Missing)}
		if s.Label.Failed>>i&1 != 0 {
			out[i].State = string(raid.Failed)
		}
	}
	for _, d := range s.Drives {
		if d.Label != nil && d.Err == nil && d.Label.Member < len(out) {
			m := &out[d.Label.Member]
			m.Path, m.State = d.Path, string(raid.Online)
		}
	}
	return out
}

func (a *api) Catalog() (control.Catalog, error) {
	a.b.mu.Lock()
	pool := a.b.pool
	a.b.mu.Unlock()
	state, _, _ := a.driver.State()
	switch {
	case state.Phase == ha.Owner && pool != nil:
		return &catalog{a.b, pool}, nil
	case state.Phase == ha.Starting || state.Seen.Owner == state.Self || state.Phase.Role() == "taking-over":
		return nil, fmt.Errorf("%w: controller %s is %s", control.ErrUnavailable, state.Self, state.Phase)
	}
	e := &control.NotOwner{Self: state.Self.String(), Role: state.Phase.Role()}
	if state.Seen.Owner != ha.None {
		e.Owner = state.Seen.Owner.String()
	}
	return nil, e
}

func (a *api) CreatePool(ctx context.Context, spec control.PoolSpec) error {
	err := a.explain(a.driver.Create(ctx, spec))
	if errors.Is(err, control.ErrConflict) {
		err = &control.Hint{Err: err, Hint: "a pool is made once: 'ledge shelf status' shows what there is"}
	}
	return err
}

func (a *api) Takeover(ctx context.Context, lose bool) error {
	if lose {
		return a.explain(a.driver.TakeoverLosing(ctx))
	}
	return a.explain(a.driver.Takeover(ctx))
}

// explain turns the driver's answers into the API's.
func (a *api) explain(err error) error {
	switch {
	case errors.Is(err, ha.ErrRefused):
		return fmt.Errorf("%w: %w", control.ErrConflict, err)
	case errors.Is(err, ha.ErrStopped):
		return fmt.Errorf("%w: %w", control.ErrUnavailable, err)
	}
	return err
}

// catalog is the open pool.
type catalog struct {
	b *backend
	p *shelf.Pool
}

func (c *catalog) LUNs() []control.LUN {
	var out []control.LUN
	for _, u := range inventory(c.p) {
		out = append(out, u.public())
	}
	return out
}

func (c *catalog) CreateLUN(ctx context.Context, s control.LUNSpec) (control.LUN, error) {
	kind, ok := shelf.ParseKind(s.Kind)
	if !ok {
		return control.LUN{}, fmt.Errorf("%w: kind %q", control.ErrInvalid, s.Kind)
	}
	l, err := c.p.CreateLUN(ctx, shelf.LUNSpec{Name: s.Name, Kind: kind, Bytes: s.SizeBytes, BlockBytes: s.BlockBytes})
	if err != nil {
		return control.LUN{}, poolError(err)
	}
	c.b.publish()
	for _, u := range c.LUNs() {
		if u.ID == l.ID() {
			return u, nil
		}
	}
	return control.LUN{}, fmt.Errorf("LUN %q: %w", s.Name, control.ErrNotFound)
}

func (c *catalog) DeleteLUN(ctx context.Context, name string) error {
	if err := c.p.DeleteLUN(ctx, name); err != nil {
		return poolError(err)
	}
	c.b.publish()
	return nil
}

func (c *catalog) Hosts() []control.Host {
	var out []control.Host
	for _, h := range c.p.Hosts() {
		out = append(out, control.Host{Name: h.Name, Initiator: h.Initiator, LUNs: h.LUNs})
	}
	return out
}

func (c *catalog) PutHost(ctx context.Context, h control.Host) error {
	for _, old := range c.p.Hosts() {
		if old.Name == h.Name && old.Initiator == h.Initiator && equalLUNs(old.LUNs, h.LUNs) {
			return nil
		}
	}
	if err := c.p.PutHost(ctx, shelf.Host{Name: h.Name, Initiator: h.Initiator, LUNs: h.LUNs}); err != nil {
		return poolError(err)
	}
	c.b.publish()
	return nil
}

func equalLUNs(a, b []uint32) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

// poolError is the one table from the pool's errors to the API's.
func poolError(err error) error {
	for _, x := range []struct {
		from, to error
		hint     string
	}{
		{shelf.ErrExists, control.ErrConflict, "'ledge lun list' shows the names that are taken"},
		{shelf.ErrNotFound, control.ErrNotFound, "'ledge lun list' shows what there is"},
		{shelf.ErrName, control.ErrInvalid, ""}, {shelf.ErrSize, control.ErrInvalid, ""},
		{shelf.ErrLimit, control.ErrNoSpace, "delete something: 'ledge lun list' shows what there is"},
		{target.ErrNoSpace, control.ErrNoSpace, "delete or unmap something, or grow the array: 'ledge pool show' tells what is free"},
		{shelf.ErrFailed, control.ErrUnavailable, "'ledge pool show' tells why"}, {target.ErrUnavailable, control.ErrUnavailable, ""},
	} {
		if !errors.Is(err, x.from) {
			continue
		}
		err = fmt.Errorf("%w: %w", x.to, err)
		if x.hint != "" {
			err = &control.Hint{Err: err, Hint: x.hint}
		}
		return err
	}
	return err
}

// uptime is for the last words of a clean stop.
func uptime(since time.Time) string { return time.Since(since).Round(time.Second).String() }
