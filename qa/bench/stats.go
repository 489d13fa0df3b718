package main

import (
	"slices"

	"github.com/ledge-storage/ledge/qa/bench/measure"
)

// A Result is one measurement: what a client printed, and who had the cores meanwhile.
type Result struct {
	IOPS      float64 `json:"iops"`
	MBps      float64 `json:"mbps"`
	P50       float64 `json:"p50_us"`
	P99       float64 `json:"p99_us"`
	P999      float64 `json:"p999_us"`
	Seconds   float64 `json:"seconds"`
	ClientCPU float64 `json:"client_cpu"` // in cores
	TargetCPU float64 `json:"target_cpu"`
	// Others is what else ran meanwhile, and Steal what the host took, both in cores.
	Others float64 `json:"others_cpu"`
	Steal  float64 `json:"steal"`
}

// Spread is measure.Spread.
type Spread = measure.Spread

// A Figure is what a target did in a row.
type Figure struct {
	Row
	Target    string `json:"target"`
	IOPS      Spread `json:"iops"`
	MBps      Spread `json:"mbps"`
	P50       Spread `json:"p50_us"`
	P99       Spread `json:"p99_us"`
	P999      Spread `json:"p999_us"`
	ClientCPU Spread `json:"client_cpu"`
	TargetCPU Spread `json:"target_cpu"`
	// ClientCost and TargetCost are CPU time for each command, in µs: what a disturbed measurement changes least.
	ClientCost Spread   `json:"client_us_per_command"`
	TargetCost Spread   `json:"target_us_per_command"`
	Rounds     []Result `json:"rounds"`
	// Ratios of IOPS, and of p99, to the named target's in the same round.
	Ratios    map[string]Spread `json:"ratios"`
	P99Ratios map[string]Spread `json:"p99_ratios"`
	Error     string            `json:"error,omitempty"`
}

// bases are the targets that the others are compared with.
var bases = []string{"tgtd", "loopback", "loopback-batch", "loopback-memory", "loopback-spin"}

func iopsOf(r Result) float64 { return r.IOPS }
func p99Of(r Result) float64  { return r.P99 }

// summarize fills in what follows from the rounds of one row's figures.
func summarize(figures []Figure) {
	for i := range figures {
		f := &figures[i]
		for _, s := range []struct {
			to *Spread
			of func(Result) float64
		}{
			{&f.IOPS, iopsOf},
			{&f.MBps, func(r Result) float64 { return r.MBps }},
			{&f.P50, func(r Result) float64 { return r.P50 }},
			{&f.P99, p99Of},
			{&f.P999, func(r Result) float64 { return r.P999 }},
			{&f.ClientCPU, func(r Result) float64 { return r.ClientCPU }},
			{&f.TargetCPU, func(r Result) float64 { return r.TargetCPU }},
			{&f.ClientCost, func(r Result) float64 { return 1e6 * r.ClientCPU / r.IOPS }},
			{&f.TargetCost, func(r Result) float64 { return 1e6 * r.TargetCPU / r.IOPS }},
		} {
			*s.to = spread(each(f.Rounds, s.of))
		}
		f.Ratios, f.P99Ratios = map[string]Spread{}, map[string]Spread{}
		for _, base := range bases {
			k := slices.IndexFunc(figures, func(f Figure) bool { return f.Target == base })
			if k < 0 || k == i || len(figures[k].Rounds) == 0 || len(f.Rounds) == 0 {
				continue
			}
			f.Ratios[base] = spread(paired(f.Rounds, figures[k].Rounds, iopsOf))
			f.P99Ratios[base] = spread(paired(f.Rounds, figures[k].Rounds, p99Of))
		}
	}
}

// paired are the ratios of a's rounds to b's, each with its own of the same moment.
func paired(a, b []Result, of func(Result) float64) []float64 {
	return measure.Ratios(each(a, of), each(b, of))
}

func each(rounds []Result, of func(Result) float64) []float64 {
	values := make([]float64, len(rounds))
	for i, r := range rounds {
		values[i] = of(r)
	}
	return values
}

func spread(values []float64) Spread { return measure.SpreadOf(values) }

// disturbed counts the measurements, and those of them that were disturbed. Others than the
// client can't be told from a target of several processes: its measurements count as quiet.
func disturbed(figures []Figure) (n, of int) {
	for _, f := range figures {
		for _, r := range f.Rounds {
			if of++; r.Others > measure.Disturbance || r.Steal > measure.Disturbance {
				n++
			}
		}
	}
	return n, of
}
