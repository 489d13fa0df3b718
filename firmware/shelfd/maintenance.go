package main

import (
	"time"

	"github.com/ledge-storage/ledge/firmware/shelf"
)

// MaintenanceConfig rules the background work on the array. A field that is left out, or zero, has its default.
type MaintenanceConfig struct {
	// Off starts no rebuild and no scrub by itself.
	Off bool `json:"off"`
	// RebuildDelay is how many seconds a member must have been failed before it is rebuilt to spare space. Default 60.
	RebuildDelay int64 `json:"rebuild_delay_s"`
	// ScrubEvery is the time from the end of a scrub to the next, in hours; -1: only when ordered. Default 168: a week.
	ScrubEvery int64 `json:"scrub_every_h"`
	// Rates in MiB of stripe data a second: the least that a rebuild and a scrub do however busy the shelf is
	// (defaults 32 and 4), and the most when it is idle (defaults: none, and 200; -1: none).
	RebuildFloor int64 `json:"rebuild_floor_mib"`
	RebuildMost  int64 `json:"rebuild_most_mib"`
	ScrubFloor   int64 `json:"scrub_floor_mib"`
	ScrubMost    int64 `json:"scrub_most_mib"`
}

const (
	maxRebuildDelay = 7 * 24 * 3600
	maxScrubEvery   = 10 * 365 * 24
	maxMaintainMiB  = 1 << 20
)

func (c *Config) checkMaintenance(wrong func(field string, value any, allowed string)) {
	m := &c.Maintenance
	if m.RebuildDelay < 0 || m.RebuildDelay > maxRebuildDelay {
		wrong("maintenance.rebuild_delay_s", m.RebuildDelay, "0 to 604800 seconds")
	}
	if m.ScrubEvery < -1 || m.ScrubEvery > maxScrubEvery {
		wrong("maintenance.scrub_every_h", m.ScrubEvery, "1 to 87600 hours, or -1 for never")
	}
	for _, r := range []struct {
		field string
		v     int64
		least int64
	}{{"rebuild_floor_mib", m.RebuildFloor, 0}, {"rebuild_most_mib", m.RebuildMost, -1}, {"scrub_floor_mib", m.ScrubFloor, 0}, {"scrub_most_mib", m.ScrubMost, -1}} {
		if r.v < r.least || r.v > maxMaintainMiB {
			wrong("maintenance."+r.field, r.v, "1 to 1048576 MiB/s; 0 for the default; for the most, -1 for no bound")
		}
	}
}

func (m *MaintenanceConfig) options() shelf.MaintenanceOptions {
	o := shelf.MaintenanceOptions{Off: m.Off, RebuildDelay: time.Duration(m.RebuildDelay) * time.Second, ScrubEvery: time.Duration(m.ScrubEvery) * time.Hour}
	o.Rates = shelf.MaintenanceRates{Floor: m.RebuildFloor << 20, ScrubFloor: m.ScrubFloor << 20, Scrub: m.ScrubMost << 20, Rebuild: m.RebuildMost << 20}
	return o
}
