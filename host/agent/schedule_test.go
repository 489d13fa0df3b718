package agent

import (
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/host/api"
)

func TestScheduleConfig(t *testing.T) {
	entry := func(field string, value any) []any {
		e := map[string]any{"name": "hourly", "volumes": []any{"db", "db-log"}, "every": "1h", "keep": 24}
		if value == nil {
			delete(e, field)
		} else if field != "" {
			e[field] = value
		}
		return []any{e}
	}
	m := good()
	m["snapshots"] = entry("", nil)
	c, err := parse(t, m)
	if err != nil || len(c.Snapshots) != 1 || c.Snapshots[0].Every != time.Hour || c.Snapshots[0].Keep != 24 || !slices.Equal(c.Snapshots[0].Volumes, []string{"db", "db-log"}) {
		t.Fatalf("%+v, %v", c.Snapshots, err)
	}
	for _, bad := range []struct {
		value any
		says  string
	}{
		{"daily", "at most 32 entries"}, {nil, "at most 32 entries"}, {[]any{7}, "JSON object"},
		{entry("name", "Bad Name"), "snapshots[0].name"}, {entry("name", nil), "snapshots[0].name"}, {entry("volumes", []any{}), "names of volumes"}, {entry("volumes", []any{"db", "db"}), "each volume once"},
		{entry("every", "90s"), "whole minutes"}, {entry("every", "0m"), "whole minutes"}, {entry("every", 60), "whole minutes"}, {entry("every", nil), "whole minutes"}, {entry("every", "9000h"), "366 days"},
		{entry("keep", 0), "1 to 1000"}, {entry("keep", nil), "1 to 1000"}, {entry("keep", 1.5), "1 to 1000"}, {entry("until", 1), "no such field"},
		{append(entry("", nil), entry("", nil)...), "no other entry"},
	} {
		m["snapshots"] = bad.value
		if _, err := parse(t, m); err == nil || !strings.Contains(err.Error(), bad.says) {
			t.Errorf("%v: %v, want %q", bad.value, err, bad.says)
		}
	}
}

// One snapshot a period and no more, whichever host it is; the newest are kept; what is no schedule's is left alone.
func TestSchedule(t *testing.T) {
	shelf, dir := standIn(t), t.TempDir()
	var clock atomic.Int64
	now := func() time.Time { return time.Unix(clock.Load(), 0) }
	start := time.Date(2026, 11, 27, 1, 10, 0, 0, time.UTC)
	at := func(minutes int) { clock.Store(start.Add(time.Duration(minutes) * time.Minute).Unix()) }
	begin := func(name string) (*running, func()) {
		cfg := Config{Name: "h1", Initiator: "iqn.2026-11.io.ledge:host.h1", ShelfAPIs: []string{shelf}, Listen: "127.0.0.1:0", API: filepath.Join(dir, name),
			BufferBytes: 16 * mib, JournalBytes: 64 * mib, StoreBytes: tib,
			Snapshots: []Schedule{{"half", []string{"db", "log"}, 30 * time.Minute, 3}, {"daily", []string{"db"}, 24 * time.Hour, 2}}}
		r, end := beginWith(t, cfg, now)
		r.wait(t, api.PhaseServing)
		return r, end
	}
	names := func(r *running, volume string) (list []string) {
		t.Helper()
		var out struct{ Snapshots []api.Snapshot }
		r.ask(t, http.MethodGet, "/v1/snapshots?volume="+volume, nil, &out)
		for _, s := range out.Snapshots {
			list = append(list, s.Name)
		}
		slices.Sort(list)
		return list
	}
	want := func(r *running, volume string, list ...string) {
		t.Helper()
		slices.Sort(list)
		var got []string
		for began := time.Now(); time.Since(began) < time.Minute; time.Sleep(5 * time.Millisecond) {
			if got = names(r, volume); slices.Equal(got, list) {
				time.Sleep(20 * time.Millisecond) // and it stays so
				if got = names(r, volume); slices.Equal(got, list) {
					return
				}
			}
		}
		t.Fatalf("%s has %v, want %v", volume, got, list)
	}
	at(0)
	r, end := begin("a.sock")
	for _, v := range []string{"db", "other"} {
		if _, err := r.create(v, mib); err != nil {
			t.Fatal(err)
		}
	}
	at(1) // it failed for want of volumes, and is tried again
	const daily = "daily-20261127-000000"
	want(r, "db", "half-20261127-010000", daily)
	var st api.Status
	r.ask(t, http.MethodGet, "/v1/status", nil, &st)
	if s := st.Schedules; len(s) != 2 || !strings.Contains(s[0].Trouble, "no volume log") || s[0].Last == nil || s[1].Trouble != "" || !s[1].Next.Equal(time.Date(2026, 11, 28, 0, 0, 0, 0, time.UTC)) {
		t.Errorf("status: %+v", s)
	}
	if _, err := r.create("log", mib); err != nil {
		t.Fatal(err)
	}
	at(2) // late, but of this period
	want(r, "log", "half-20261127-010000")
	r.ask(t, http.MethodPost, "/v1/snapshots", api.SnapshotRequest{Name: "half-mine", Volumes: []string{"db"}}, nil)
	at(21)
	want(r, "db", "half-20261127-010000", "half-20261127-013000", "half-mine", daily)
	at(50)
	want(r, "db", "half-20261127-010000", "half-20261127-013000", "half-20261127-020000", "half-mine", daily)
	end()

	// Elsewhere, in the same period, and then two periods later.
	r, end = begin("b.sock")
	defer func() { end() }()
	at(60)
	want(r, "db", "half-20261127-010000", "half-20261127-013000", "half-20261127-020000", "half-mine", daily)
	r.ask(t, http.MethodPost, "/v1/volumes/db/snapshots/half-20261127-010000/clone", api.CloneRequest{Name: "look"}, nil)
	at(140)
	want(r, "db", "half-20261127-013000", "half-20261127-020000", "half-20261127-033000", "half-mine", daily)
	want(r, "log", "half-20261127-013000", "half-20261127-020000", "half-20261127-033000")
	if _, err := r.volume("look"); err != nil {
		t.Errorf("the clone of a snapshot that was given up: %v", err)
	}
	// The clock is set back a day, and goes on from there.
	at(-24 * 60)
	want(r, "log", "half-20261126-010000", "half-20261127-020000", "half-20261127-033000")
	at(24 * 60 * 3)
	want(r, "db", "half-20261127-020000", "half-20261127-033000", "half-20261130-010000", "half-mine", daily, "daily-20261130-000000")
	if len(names(r, "other")) > 0 {
		t.Error("a volume of no schedule has snapshots")
	}
}
