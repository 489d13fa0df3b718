package main

import (
	"fmt"
	"slices"
)

// An Ask is one line of what the engine's speed must be (issue 3, "Speed"): a bound on the ratio of target to base.
type Ask struct {
	Cell   string // its ID
	Target string
	Base   string
	P99    bool // of p99, at most; otherwise of IOPS, at least
	Bound  float64
}

var asks = []Ask{
	{Cell: "4k-read-qd32", Target: "engine", Base: "tgtd", Bound: 3.5},
	{Cell: "4k-write-qd32", Target: "engine", Base: "tgtd", Bound: 2.4},
	{Cell: "4k-read-qd1", Target: "engine", Base: "tgtd", Bound: 1.2},
	{Cell: "4k-write-qd1", Target: "engine", Base: "tgtd", Bound: 1.2},
	{Cell: "4k-read-qd1", Target: "engine-spin", Base: "tgtd", Bound: 2},
	{Cell: "4k-write-qd1", Target: "engine-spin", Base: "tgtd", Bound: 2},
	{Cell: "128k-read-qd8", Target: "engine", Base: "tgtd", Bound: 5},
	{Cell: "128k-write-qd8", Target: "engine", Base: "tgtd", Bound: 5},
	{Cell: "1024k-read-qd4", Target: "engine", Base: "tgtd", Bound: 5},
	{Cell: "1024k-write-qd4", Target: "engine", Base: "tgtd", Bound: 5},
	{Cell: "4k-read-qd32", Target: "engine", Base: "tgtd", P99: true, Bound: 1},
	{Cell: "4k-write-qd32", Target: "engine", Base: "tgtd", P99: true, Bound: 1},
	{Cell: "4k-read-qd1", Target: "engine", Base: "loopback-batch", Bound: .85},
	{Cell: "4k-write-qd1", Target: "engine", Base: "loopback-batch", Bound: .85},
	{Cell: "4k-read-qd32", Target: "engine", Base: "loopback-batch", Bound: .85},
	{Cell: "4k-write-qd32", Target: "engine", Base: "loopback-batch", Bound: .85},
	{Cell: "128k-read-qd8", Target: "engine", Base: "loopback-batch", Bound: .85},
	{Cell: "128k-write-qd8", Target: "engine", Base: "loopback-batch", Bound: .85},
	{Cell: "1024k-read-qd4", Target: "engine", Base: "loopback-batch", Bound: .85},
	{Cell: "1024k-write-qd4", Target: "engine", Base: "loopback-batch", Bound: .85},
	{Cell: "4k-read-8x8", Target: "engine", Base: "loopback-batch", Bound: .9},
	{Cell: "4k-write-8x8", Target: "engine", Base: "loopback-batch", Bound: .9},
	// Not asked for: what is left when the bytes are those of a memory (loopback-memory), which is
	// the bound of a target that keeps data.
	{Cell: "4k-read-qd32", Target: "engine", Base: "loopback-memory", Bound: .85},
	{Cell: "4k-write-qd32", Target: "engine", Base: "loopback-memory", Bound: .85},
	{Cell: "128k-read-qd8", Target: "engine", Base: "loopback-memory", Bound: .85},
	{Cell: "128k-write-qd8", Target: "engine", Base: "loopback-memory", Bound: .85},
	{Cell: "1024k-read-qd4", Target: "engine", Base: "loopback-memory", Bound: .85},
	{Cell: "1024k-write-qd4", Target: "engine", Base: "loopback-memory", Bound: .85},
	{Cell: "4k-read-8x8", Target: "engine", Base: "loopback-memory", Bound: .9},
	{Cell: "4k-write-8x8", Target: "engine", Base: "loopback-memory", Bound: .9},
}

// Bounds of an idle target.
const (
	idleCPU          = .005     // of a core, with idleSessions
	idleSessionBytes = 64 << 10 // with manySessions
)

// busy is the share of its core from which a client is taken for the limit.
const busy = .95

// A Verdict is what was measured of an Ask in one placement with one client.
type Verdict struct {
	Placement string  `json:"placement"`
	Client    string  `json:"client,omitempty"`
	What      string  `json:"what"`
	Asked     string  `json:"asked"`
	Measured  Spread  `json:"measured"`
	Met       bool    `json:"met"`
	ClientCPU float64 `json:"client_cpu,omitempty"`
	TargetCPU float64 `json:"target_cpu,omitempty"`
	Note      string  `json:"note,omitempty"`
}

func (v Verdict) String() string {
	word := "not met"
	if v.Met {
		word = "met"
	}
	where := v.Placement
	if v.Client != "" {
		where += ", " + v.Client
	}
	s := fmt.Sprintf("%-7s %-15s %s: asked %s, measured %.4g (%.4g–%.4g)", word, where, v.What, v.Asked, v.Measured.Median, v.Measured.Min, v.Measured.Max)
	if v.Note != "" {
		s += "; " + v.Note
	}
	return s
}

// judge holds the figures against the asks: a verdict for every figure that an ask is about.
func judge(figures []Figure, idle []Idle) []Verdict {
	var verdicts []Verdict
	for _, a := range asks {
		for _, f := range figures {
			if f.Cell.ID() == a.Cell && f.Target == a.Target {
				if v, ok := a.judge(f); ok {
					verdicts = append(verdicts, v)
				}
			}
		}
	}
	for _, i := range idle {
		if i.Target != "engine" {
			continue
		}
		verdicts = append(verdicts, Verdict{
			Placement: free, What: fmt.Sprintf("%% of a core with %d idle sessions", idleSessions), Asked: fmt.Sprintf("< %g", 100*idleCPU),
			Measured: spread([]float64{100 * i.CPU}), Met: i.Error == "" && i.Seconds > 0 && i.CPU < idleCPU, Note: i.Error,
		}, Verdict{
			Placement: free, What: fmt.Sprintf("KiB for each of %d idle sessions", manySessions), Asked: fmt.Sprintf("< %d", idleSessionBytes>>10),
			Measured: spread([]float64{i.SessionBytes / 1024}), Met: i.Error == "" && i.SessionBytes < idleSessionBytes, Note: i.Error,
		})
	}
	return verdicts
}

func (a Ask) judge(f Figure) (Verdict, bool) {
	ratios, what, asked := f.Ratios, "IOPS", "≥"
	if a.P99 {
		ratios, what, asked = f.P99Ratios, "p99", "≤"
	}
	r, ok := ratios[a.Base]
	if !ok && f.Error == "" {
		return Verdict{}, false // the base was not in the run
	}
	v := Verdict{
		Placement: f.Placement, Client: f.Client, What: fmt.Sprintf("%s, %s of %s to %s", f.Cell, what, a.Target, a.Base),
		Asked: fmt.Sprintf("%s %g", asked, a.Bound), Measured: r, ClientCPU: f.ClientCPU.Median, TargetCPU: f.TargetCPU.Median, Note: f.Error,
	}
	v.Met = f.Error == "" && (a.P99 && r.Median <= a.Bound || !a.P99 && r.Median >= a.Bound)
	if v.Note == "" && f.ClientCPU.Median >= busy {
		v.Note = fmt.Sprintf("the client is the limit (%.0f %% of a core; the target has %.0f %%)", 100*f.ClientCPU.Median, 100*f.TargetCPU.Median)
	}
	return v, true
}

// met counts the verdicts that are.
func met(verdicts []Verdict) int {
	return len(verdicts) - len(slices.DeleteFunc(slices.Clone(verdicts), func(v Verdict) bool { return v.Met }))
}
