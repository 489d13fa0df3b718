package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/ledge-storage/ledge/host/store"
)

// Snapshots by schedule: each entry of "snapshots" in the configuration takes one of its volumes, all at one instant, in every
// period, and keeps the newest so many. Everything that it needs to know is in the snapshots' names,
//
//	NAME-20261127-013000      of the period that begins then, UTC
//
// so that nothing is kept on the host: an agent that starts elsewhere goes on, and takes no second one of a period. Periods
// are multiples of "every" since 1970, UTC: "1h" is the full hour, "24h" midnight. One that passed while no agent served is not made up for.
// It deletes only what has such a name; a snapshot that somebody made a clone of goes too, and the clone stays.

// Schedule is an entry.
type Schedule struct {
	Name    string
	Volumes []string
	Every   time.Duration
	Keep    int
}

const (
	maxSchedules  = 32
	maxKeep       = 1000
	leastEvery    = time.Minute
	mostEvery     = 366 * 24 * time.Hour
	stampLayout   = "20060102-150405"
	scheduleLimit = 30 * time.Second // for what is due of one entry
	retryAfter    = 30 * time.Second // a failure
)

// schedules reads the entries of "snapshots".
func (o *object) schedules(field string) (list []Schedule) {
	v, ok := o.take(field)
	if !ok {
		return nil
	}
	var raw []json.RawMessage
	if json.Unmarshal(v, &raw) != nil || string(v) == "null" || len(raw) > maxSchedules {
		o.fail(field, v, fmt.Sprintf(`at most %d entries: [{"name": …, "volumes": […], "every": "1h", "keep": 24}]`, maxSchedules))
		return nil
	}
	seen := map[string]bool{}
	for i, r := range raw {
		s := parseObject(r, fmt.Sprintf("%s%s[%d].", o.path, field, i), o.errs)
		var e Schedule
		var every string
		keep := int64(0)
		s.text("name", &e.Name, "1 to 40 of a-z, 0-9 and -, beginning with a letter or digit", hostName.MatchString)
		s.list("volumes", &e.Volumes, fmt.Sprintf("1 to %d names of volumes", store.MaxGroup), volumeName.MatchString, store.MaxGroup)
		s.text("every", &every, `whole minutes up to 366 days, such as "15m", "1h", "24h"`, func(v string) bool {
			d, err := time.ParseDuration(v)
			return err == nil && d >= leastEvery && d <= mostEvery && d%time.Minute == 0
		})
		e.Every, _ = time.ParseDuration(every)
		if s.fields["keep"] == nil {
			s.missing("keep", fmt.Sprintf("1 to %d snapshots", maxKeep))
		}
		s.number("keep", &keep, 1, maxKeep, "snapshots")
		e.Keep = int(keep)
		s.end()
		if slices.Sort(e.Volumes); len(slices.Compact(slices.Clone(e.Volumes))) < len(e.Volumes) {
			s.fail("volumes", s.fields["volumes"], "each volume once")
		}
		if seen[e.Name] {
			s.fail("name", s.fields["name"], "a name that no other entry has")
		}
		seen[e.Name] = true
		list = append(list, e)
	}
	return list
}

// stamp is the name of the snapshot of the period that t is in.
func (s *Schedule) stamp(t time.Time) string {
	return s.Name + "-" + s.begin(t).UTC().Format(stampLayout)
}

// begin of the period that t is in.
func (s *Schedule) begin(t time.Time) time.Time {
	every := int64(s.Every / time.Second)
	return time.Unix(t.Unix()/every*every, 0)
}

// taken tells from the name when a snapshot of the schedule was due.
func (s *Schedule) taken(name string) (time.Time, bool) {
	rest, ok := strings.CutPrefix(name, s.Name+"-")
	if !ok {
		return time.Time{}, false
	}
	t, err := time.Parse(stampLayout, rest)
	return t, err == nil
}

// due does what is due of an entry at the time now.
func (s *Schedule) due(ctx context.Context, e Engine, x Snapshotter, now time.Time) (took bool, err error) {
	exists := map[string]bool{}
	for _, v := range e.Volumes() {
		exists[v.Name] = true
	}
	var volumes, missing []string
	for _, v := range s.Volumes {
		if exists[v] {
			volumes = append(volumes, v)
		} else {
			missing = append(missing, v)
		}
	}
	want, fresh := s.stamp(now), []string{} // volumes without one of this period
	var old []store.SnapshotInfo
	for _, v := range volumes {
		list, lerr := x.Snapshots(v)
		err = errors.Join(err, lerr)
		var ours []store.SnapshotInfo
		has := false
		for _, i := range list {
			if _, ok := s.taken(i.Name); ok {
				ours = append(ours, i)
				has = has || i.Name == want
			}
		}
		room := s.Keep
		if !has && lerr == nil {
			fresh = append(fresh, v)
			room--
		}
		// Newest first: these names sort as their times do.
		slices.SortFunc(ours, func(a, b store.SnapshotInfo) int { return strings.Compare(b.Name, a.Name) })
		if len(ours) > room {
			old = append(old, ours[room:]...)
		}
	}
	if len(fresh) > 0 {
		_, terr := x.Snapshot(ctx, want, fresh...)
		took = terr == nil
		if err = errors.Join(err, terr); err != nil {
			return took, err // the old ones stay while there is no new one
		}
	}
	for _, i := range old {
		if i.Name != want {
			err = errors.Join(err, x.DeleteSnapshot(ctx, i.Volume, i.Name))
		}
	}
	if len(missing) > 0 {
		err = errors.Join(err, fmt.Errorf("no volume %s", strings.Join(missing, ", ")))
	}
	return took, err
}

// scheduler is the state of all entries in one session.
type scheduler struct {
	a     *Agent
	next  []time.Time // when each is looked at again
	state []api.Schedule
}

func (a *Agent) newScheduler() *scheduler {
	s := &scheduler{a: a, next: make([]time.Time, len(a.cfg.Snapshots))}
	for _, e := range a.cfg.Snapshots {
		s.state = append(s.state, api.Schedule{Name: e.Name, Volumes: e.Volumes, EverySeconds: int64(e.Every / time.Second), Keep: e.Keep})
	}
	s.show()
	return s
}

// run does what is due.
func (s *scheduler) run(ctx context.Context, e Engine) {
	x, ok := e.(Snapshotter)
	if !ok {
		return
	}
	for i := range s.next {
		now, entry, st := s.a.opt.Now(), &s.a.cfg.Snapshots[i], &s.state[i]
		if now.Before(s.next[i]) {
			// A clock that was set back is not waited for: at most a period.
			if s.next[i].Sub(now) <= entry.Every {
				continue
			}
		}
		limited, cancel := context.WithTimeout(ctx, scheduleLimit)
		var took bool
		err := s.a.change(limited, func(Engine) (err error) {
			took, err = entry.due(limited, e, x, now)
			return err
		})
		cancel()
		s.next[i] = entry.begin(now).Add(entry.Every)
		trouble := ""
		if err != nil {
			s.next[i] = now.Add(min(retryAfter, entry.Every))
			trouble = strings.ReplaceAll(err.Error(), "\n", "; ")
			if trouble != st.Trouble {
				s.a.log.Warn("scheduled snapshot", "schedule", entry.Name, "error", err)
			}
		}
		if took {
			last := now.UTC()
			st.Last = &last
			s.a.log.Info("scheduled snapshot taken", "schedule", entry.Name, "snapshot", entry.stamp(now), "volumes", entry.Volumes)
		}
		next := s.next[i].UTC()
		st.Trouble, st.Next = trouble, &next
		s.show()
	}
}

// show gives the state to status.
func (s *scheduler) show() {
	s.a.mu.Lock()
	defer s.a.mu.Unlock()
	s.a.schedules = slices.Clone(s.state)
}
