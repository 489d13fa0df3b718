package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/ledge-storage/ledge/firmware/control"
	"github.com/ledge-storage/ledge/firmware/shelf"
	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/raid"
)

// storage is the owner's open pool and array as package control sees them. Pool and array are those of one moment: what
// is asked of them after the ownership has moved answers that it is closed.
type storage struct {
	a     *api
	pool  *shelf.Pool
	array *raid.Array
	log   *nvram.Log
	key   uint64
}

func (a *api) Storage() (control.Storage, error) {
	if _, err := a.Catalog(); err != nil {
		return nil, err
	}
	a.b.mu.Lock()
	defer a.b.mu.Unlock()
	if a.b.pool == nil || a.b.array == nil || a.b.nvlog == nil {
		return nil, fmt.Errorf("%w: the pool is being closed", control.ErrUnavailable)
	}
	return &storage{a, a.b.pool, a.b.array, a.b.nvlog, a.b.key}, nil
}

func (s *storage) Pool(ctx context.Context) (control.PoolInfo, error) {
	b := s.a.b
	st, as := s.pool.Status(), s.array.Status()
	state, _, _ := s.a.driver.State()
	out := control.PoolInfo{UUID: raid.UUID(st.UUID).String(), Controller: b.conf.Controller, Epoch: state.Seen.Epoch, State: st.State,
		CapacityBytes: st.CapacityBytes, AllocatedBytes: st.AllocatedBytes, FreeBytes: st.CapacityBytes - st.AllocatedBytes,
		WarnPercent: s.pool.WarnPercent(), DirtyBytes: st.DirtyBytes, LogBytes: st.LogBytes, LogUsedBytes: st.LogUsedBytes, Mirror: mirrorState(s.log.Stats().Mirror),
		Counters: control.PoolCounters{Reads: st.Counters.Reads, Writes: st.Counters.Writes, OverlayHits: st.Counters.OverlayHits, FullStripes: st.Counters.FullStripes,
			PartialStripes: st.Counters.PartialStripes, DestagedBlocks: st.Counters.Blocks, DestageRounds: st.Counters.Rounds, LostBlocks: st.Counters.LostBlocks, Stalls: st.Counters.Stalls, StuckStripes: st.Counters.StuckStripes},
		Tasks: append(b.tasks.of("drain", "give-up"), s.deletions()...)}
	for _, l := range s.pool.LUNs() {
		out.LUNs++
		out.LUNBytes += l.Info().SizeBytes
	}
	judgePool(&out, st, as)
	return out, nil
}

// judgePool finds the worst that is true, and says all that is.
func judgePool(out *control.PoolInfo, st shelf.Status, as raid.Status) {
	low := st.CapacityBytes > 0 && out.WarnPercent < 100 && st.AllocatedBytes*100 > st.CapacityBytes*int64(out.WarnPercent)
	if st.Err != nil {
		out.Why = append(out.Why, "writes stopped: "+oneLine(st.Err))
	}
	if st.State == "full" {
		out.Why = append(out.Why, "no extent is free: writes to new places get an out-of-space answer; delete or unmap something, or grow the array")
	}
	if as.State != raid.Optimal {
		if st.State == "ok" {
			out.State = "degraded"
		}
		out.Why = append(out.Why, fmt.Sprintf("the array is %s: see ledge array show", as.State))
	}
	if low {
		if out.State == "ok" {
			out.State = "low"
		}
		out.Why = append(out.Why, fmt.Sprintf("%.1f %% is allocated, the warning is at %d %%", 100*float64(st.AllocatedBytes)/float64(st.CapacityBytes), out.WarnPercent))
	}
	switch out.Mirror {
	case "solo":
		out.Why = append(out.Why, "the partner is missing: acknowledged writes are in one NVRAM only, as the members record")
	case "resync":
		out.Why = append(out.Why, "the partner's mirror is being filled")
	}
	if n := st.Counters.StuckStripes; n > 0 {
		out.Why = append(out.Why, fmt.Sprintf("%d stripes cannot be destaged: they have lost more than parity rebuilds, and hold back the log", n))
	}
}

func mirrorState(m nvram.MirrorStatus) string {
	switch m {
	case nvram.MirrorInSync:
		return "in-sync"
	case nvram.MirrorResync, nvram.MirrorWaiting:
		return "resync"
	case nvram.MirrorSolo:
		return "solo"
	}
	return "stale"
}

// deletions are the LUNs whose space is coming back, as tasks: what is left of them is all that is known.
func (s *storage) deletions() []control.Task {
	var out []control.Task
	for _, l := range s.pool.Deleting() {
		out = append(out, control.Task{ID: uint64(l.ID), Kind: "delete", Subject: "LUN " + l.Name, State: "running", Unit: "bytes",
			Note: fmt.Sprintf("%d bytes are still to be freed", l.AllocatedBytes)})
	}
	return out
}

func (s *storage) Array(ctx context.Context) (control.ArrayInfo, error) {
	st, label := s.array.Status(), s.array.Label()
	g := st.Geometry
	risk := s.array.AtRisk()
	out := control.ArrayInfo{UUID: st.Array.String(), Pool: st.Pool.String(), State: string(st.State), Data: g.K, Parity: g.M, SpareColumns: g.Spares,
		Stripes: g.Stripes, StripeBytes: g.StripeBytes, Checksums: st.Checksums.String(), AtRisk: risk.Lost, Beyond: risk.Beyond,
		Spare:    control.SpareSpace{Columns: g.Spares, ColumnBytes: int64(label.Slots) * raid.StripBytes},
		Counters: arrayCounters(st.Counters)}
	now := s.a.b.tasks.now()
	for _, m := range st.Members {
		out.Members = append(out.Members, memberInfo(m, now))
	}
	for j := range g.Spares {
		if label.SpareOf[j] != 0 || label.RebuildMember >= 0 && label.RebuildSpare == j {
			out.Spare.Used++
		}
	}
	out.Spare.Free = out.Spare.Columns - out.Spare.Used
	m := s.pool.Maintenance()
	if grow := s.array.GrowStatus(); grow.Growing {
		out.Grow = &control.GrowInfo{From: grow.From, To: grow.To, Done: grow.Done, Total: grow.Total, Staged: grow.Staged, StripesAfter: grow.StripesAfter, Carried: grow.Carried}
	}
	out.Rates = control.Rates{RebuildFloor: m.Rates.Floor, ScrubFloor: m.Rates.ScrubFloor, Rebuild: m.Rates.Rebuild, Scrub: m.Rates.Scrub}
	out.Scrub = scrubInfo(m.Scrub)
	out.Tasks = append(s.a.b.tasks.of("replace", "readd"), maintenanceTask(m)...)
	judgeArray(&out, st)
	return out, nil
}

func arrayCounters(c raid.Counters) control.ArrayCounters {
	return control.ArrayCounters{Reads: c.Reads, DegradedReads: c.DegradedReads, FullWrites: c.FullWrites, Updates: c.Updates, Repairs: c.Repairs,
		ChecksumErrors: c.ChecksumErrors, StaleStrips: c.StaleStrips, Unrecoverable: c.Unrecoverable}
}

func memberInfo(m raid.MemberStatus, now time.Time) control.ArrayMember {
	out := control.ArrayMember{Index: m.Index, State: string(m.State), Slow: m.Slow, Path: m.Path, Serial: m.Serial, SizeBytes: m.Bytes, LastError: m.LastError,
		Errors: control.MemberErrors{Read: m.ReadErrors, Write: m.WriteErrors, Timeout: m.Timeouts, Checksum: m.ChecksumErrors, Stale: m.StaleStrips, Repaired: m.Repairs}}
	if m.Path != "" {
		who := identify(m.Path)
		out.Slot, out.Model = who.Slot, who.Model
		if out.Serial == "" {
			out.Serial = who.Serial
		}
	}
	if !m.LastErrorAt.IsZero() {
		out.LastErrorAt = &m.LastErrorAt
	}
	if j := m.Job; j != nil {
		out.Job, out.Done, out.Total, out.Running = string(j.Kind), j.Done, j.Total, j.Running
		if j.Running && j.Done > j.StartedAt {
			_, out.SecondsLeft = speed(j.Done-j.StartedAt, j.Total-j.StartedAt, 1, now.Sub(j.Started))
		}
	}
	return out
}

// maintenanceTask is what the pool's background work does now, as a task.
func maintenanceTask(m shelf.MaintenanceStatus) []control.Task {
	if m.Task == shelf.TaskNone {
		if m.Err == nil {
			return nil
		}
		return []control.Task{{Kind: "maintenance", State: "waiting", Unit: "stripes", Note: "it is tried again at " + m.RetryAt.UTC().Format(time.RFC3339), Error: oneLine(m.Err)}}
	}
	t := control.Task{Kind: string(m.Task), State: "running", Done: m.Done, Total: m.Total, Unit: "stripes", BytesPerSecond: m.Rate, Started: m.Started}
	if m.Member >= 0 {
		t.Subject = fmt.Sprintf("member %d", m.Member)
	}
	if m.ETA > 0 {
		left := int64(m.ETA.Seconds())
		t.SecondsLeft = &left
	}
	if m.Throttled {
		t.Note = "held at its floor by foreground I/O"
	}
	return []control.Task{t}
}

func scrubInfo(s shelf.ScrubStatus) control.ScrubInfo {
	state := string(s.State)
	if state == "" {
		state = string(shelf.ScrubIdle)
	}
	return control.ScrubInfo{State: state, Position: s.Position, Total: s.Total, Began: known(s.Began), Next: known(s.Next), Now: scrubReport(s.Now), Last: scrubReport(s.Last)}
}

func scrubReport(r shelf.ScrubReport) control.ScrubReport {
	return control.ScrubReport{Began: known(r.Begin), Ended: known(r.End), Stripes: r.Stripes, Unwritten: r.Unwritten, BadStrips: r.BadStrips, Repaired: r.Repaired,
		LostBlocks: r.LostBlocks, UnrecoverableStripes: r.UnrecoverableStripes, ParityErrors: r.ParityErrors}
}

// known is nil for a time that is not.
func known(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

func judgeArray(out *control.ArrayInfo, st raid.Status) {
	if st.Err != nil {
		out.Why = append(out.Why, "writes stopped: "+oneLine(st.Err))
	}
	for _, m := range out.Members {
		if m.State == string(raid.Online) && !m.Slow {
			continue
		}
		what := fmt.Sprintf("member %d is %s", m.Index, m.State)
		switch raid.MemberState(m.State) {
		case raid.Online:
			what = fmt.Sprintf("member %d hangs, and parity answers in its place", m.Index)
		case raid.Missing:
			what += ": its drive is not plugged in, or does not answer; no write has missed it so far"
		case raid.Failed:
			what += ": its strips are to be rebuilt"
		case raid.Rebuilding:
			what += " to spare space"
		case raid.Spared:
			what += ": spare space has its strips; a new drive gives the spare space back"
		case raid.Suspect:
			what += ": it erred often, and reads go round it"
		}
		if m.LastError != "" {
			what += " (last error: " + m.LastError + ")"
		}
		out.Why = append(out.Why, what)
	}
	if out.Beyond > 0 {
		out.Why = append(out.Why, fmt.Sprintf("%d stripes have lost more than parity can rebuild", out.Beyond))
	}
	if m := out.Parity; m < len(out.AtRisk) && out.AtRisk[m] > 0 {
		out.Why = append(out.Why, fmt.Sprintf("%d stripes bear no further loss", out.AtRisk[m]))
	}
}

func (s *storage) SetWarnPercent(ctx context.Context, percent int) error {
	err := s.pool.SetWarnPercent(ctx, percent)
	if err == nil {
		s.a.b.publish() // the standby's paths show the threshold too
	}
	return poolError(err)
}

// Drain puts all that is in the log now on the members. What initiators write meanwhile is not waited for.
func (s *storage) Drain(context.Context) (control.Task, error) {
	return s.a.b.tasks.start("drain", "", "bytes", 1, func(ctx context.Context, tell report) (string, error) {
		return "", s.pool.DrainWith(ctx, func(left, total int64) { tell(uint64(max(total-left, 0)), uint64(total)) })
	})
}

// GiveUp ends the wait for members that will not come back: what only they have is marked as lost, and reads as errors.
func (s *storage) GiveUp(_ context.Context, force bool) (control.Task, error) {
	stuck := s.pool.Status().Counters.StuckStripes
	switch {
	case stuck == 0:
		return control.Task{}, fmt.Errorf("%w: nothing is stuck: every stripe can be destaged, and nothing need be given up", control.ErrConflict)
	case !force:
		return control.Task{}, &control.Hint{Err: fmt.Errorf("%w: %d stripes have lost more than parity rebuilds; what only the missing members have of them would be lost for good", control.ErrConflict, stuck),
			Hint: "bring the missing drives back: 'ledge drive list'; where they will not come back, force it"}
	}
	return s.a.b.tasks.start("give-up", "", "bytes", 1, func(ctx context.Context, _ report) (string, error) {
		lost, err := s.pool.GiveUp(ctx)
		return fmt.Sprintf("%d blocks of 4 KiB were given up", lost), err
	})
}

func (s *storage) Scrub(ctx context.Context, what string) error {
	var err error
	switch what {
	case "start":
		err = s.pool.StartScrub(ctx)
	case "start accepting old":
		err = s.pool.StartScrubAcceptingOld(ctx)
	case "pause":
		err = s.pool.PauseScrub(ctx)
	case "stop":
		err = s.pool.StopScrub(ctx)
	}
	return maintenanceError(err)
}

func (s *storage) SetRates(_ context.Context, r control.Rates) error {
	return maintenanceError(s.pool.SetRates(shelf.MaintenanceRates{Floor: r.RebuildFloor, ScrubFloor: r.ScrubFloor, Rebuild: r.Rebuild, Scrub: r.Scrub}))
}

func maintenanceError(err error) error {
	switch {
	case errors.Is(err, shelf.ErrScrubState):
		return &control.Hint{Err: fmt.Errorf("%w: %w", control.ErrConflict, err), Hint: "'ledge array scrub status' tells its state"}
	case errors.Is(err, shelf.ErrRates):
		return fmt.Errorf("%w: %w", control.ErrInvalid, err)
	case errors.Is(err, shelf.ErrNoMaintenance):
		return fmt.Errorf("%w: %w", control.ErrConflict, err)
	}
	return poolError(err)
}

func (s *storage) LUN(_ context.Context, name string) (control.LUNInfo, error) {
	hosts := s.pool.Hosts()
	for _, u := range inventory(s.pool) {
		if u.Name != name {
			continue
		}
		out := control.LUNInfo{LUN: u.public(), Stats: s.a.b.front.stats(u.LUN)}
		for _, h := range hosts {
			for _, id := range h.LUNs {
				if id == u.LUN {
					out.Hosts = append(out.Hosts, h.Name)
				}
			}
		}
		return out, nil
	}
	return control.LUNInfo{}, &control.Hint{Err: fmt.Errorf("%w: no LUN %q", control.ErrNotFound, name), Hint: "'ledge lun list' shows them"}
}

func (s *storage) ResizeLUN(ctx context.Context, name string, bytes int64) error {
	l, ok := s.pool.LUN(name)
	if ok && bytes < l.Info().SizeBytes {
		return &control.Hint{Err: fmt.Errorf("%w: LUN %q has %d bytes, and a LUN never shrinks: what lies beyond %d would be lost", control.ErrInvalid, name, l.Info().SizeBytes, bytes),
			Hint: "make a smaller LUN and copy what is needed"}
	}
	if err := s.pool.ResizeLUN(ctx, name, bytes); err != nil {
		return poolError(err)
	}
	s.a.b.publish()
	return nil
}

func (s *storage) RenameLUN(ctx context.Context, name, to string) error {
	if err := s.pool.RenameLUN(ctx, name, to); err != nil {
		return poolError(err)
	}
	s.a.b.publish()
	return nil
}

func (c *catalog) Deleting() []control.LUN {
	var out []control.LUN
	for _, l := range c.p.Deleting() {
		out = append(out, control.LUN{ID: l.ID, LUN: l.ID, Name: l.Name, Kind: l.Kind.String(), SizeBytes: l.SizeBytes, BlockBytes: l.BlockBytes,
			AllocatedBytes: l.AllocatedBytes, UUID: raid.UUID(l.UUID).String(), State: "deleting"})
	}
	return out
}
