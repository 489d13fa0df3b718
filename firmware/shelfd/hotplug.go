package main

import (
	"context"
	"fmt"
	"time"

	"github.com/ledge-storage/ledge/firmware/control"
	"github.com/ledge-storage/ledge/raid"
)

// Drives that are plugged in and pulled out while the shelf runs.
//
//	pulled out   the owner records the member as failed at once, where its redundancy allows: nothing can be read from
//	             it or written to it any more, and its rebuild should not wait for the first write that misses it
//	plugged in   a member's own drive, also one that was out for a while, or in another slot: taken back at once. What it
//	             missed is copied to it
//	             anything else (blank, another pool's, a copy): left alone; what it is, and what can be done with it,
//	             is in the log and in ledge drive list
//
// A drive that was there when the array was opened is the array's to judge, and is never taken back here: an operator,
// or too many errors, may have failed it.

// rescanInterval is how often a controller looks for drives. The owner also looks whenever it confirms its lease.
const rescanInterval = 2 * time.Second

// hotplug runs until ctx ends.
func (a *api) hotplug(ctx context.Context) {
	t := time.NewTicker(rescanInterval)
	defer t.Stop()
	var known stripesOf
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			a.b.drives.refresh()
		case <-a.b.drives.changed:
		}
		s, err := a.Storage()
		if err != nil {
			continue // a standby only keeps its list
		}
		s.(*storage).failPulled(ctx)
		s.(*storage).takeBack(ctx)
		known = s.(*storage).takeSpace(ctx, known)
	}
}

// stripesOf remembers how many stripes of an array its pool has taken in.
type stripesOf struct {
	array   *raid.Array
	stripes uint64
}

// takeSpace gives the pool the stripes that its array has gained, when a growth has ended.
func (s *storage) takeSpace(ctx context.Context, known stripesOf) stripesOf {
	now := stripesOf{s.array, s.array.Geometry().Stripes}
	if now == known || s.array.GrowStatus().Growing {
		return known
	}
	if err := s.pool.Grow(ctx); err != nil {
		if s.pool.Err() == nil {
			s.a.b.log.Error("the pool does not take in what its array has gained", "stripes", now.stripes, "err", err)
		}
		return now // not again and again: the next owner tries
	}
	return now
}

func (s *storage) failPulled(ctx context.Context) {
	for _, m := range s.array.Status().Members {
		if m.State != raid.Online && m.State != raid.Suspect || !s.a.b.drives.pulled(m.Path) {
			continue
		}
		if err := s.array.FailMember(ctx, m.Index, false); err != nil {
			// It stays what it is until a write misses it: the array knows best what it can bear.
			s.a.b.log.Warn("a member's drive was pulled out", "member", m.Index, "path", m.Path, "err", err)
			continue
		}
		s.a.b.log.Error("a member's drive was pulled out; the member is failed", "member", m.Index, "path", m.Path)
	}
}

func (s *storage) takeBack(ctx context.Context) {
	for _, d := range s.a.b.drives.fresh() {
		o, err := s.array.Offer(ctx, d)
		if err != nil {
			s.a.b.log.Warn("a drive was plugged in, and cannot be looked at", "path", d.Name(), "err", err)
			continue
		}
		if o.Kind != raid.OfferReturned && o.Kind != raid.OfferStale {
			s.a.b.log.Info("a drive was plugged in", "path", d.Name(), "is", o.Kind, "detail", o.Detail, "todo", todo(d.Name(), o))
			continue
		}
		s.a.b.log.Info("a member's drive is back", "path", d.Name(), "member", o.Member, "detail", o.Detail)
		if t, err := s.ReaddMember(ctx, o.Member, d.Name()); err != nil {
			s.a.b.log.Warn("a member's drive is back and was not taken", "path", d.Name(), "member", o.Member, "err", err)
		} else {
			s.a.b.log.Info("a member's drive is taken back", "path", d.Name(), "member", o.Member, "task", t.ID, "state", t.State)
		}
	}
}

// todo is what an operator can do with a drive.
func todo(path string, o raid.Offer) string {
	switch o.Kind {
	case raid.OfferBlank:
		return "fill a failed member's place: ledge drive replace N --with " + path
	case raid.OfferSmall:
		return "it is too small for this array"
	default:
		return fmt.Sprintf("nothing is done with it; to use it, first: ledge drive wipe %s", path)
	}
}

var _ control.Storage = (*storage)(nil)
