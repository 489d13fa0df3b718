package main

import (
	"fmt"
	"io"

	"github.com/ledge-storage/ledge/qa/bench/measure"
)

// table writes a report as Markdown.
func table(w io.Writer, r Report) {
	fmt.Fprintf(w, "Storage: %s, commit %s, %d cores, %s; %g s a measurement, %d rounds, alternating.\n", r.Date, r.Commit, r.Cores, r.Go, r.Seconds, r.Rounds)
	disturbed, of := 0, 0
	for _, f := range r.Figures {
		for _, o := range f.Others {
			if of++; o > measure.Disturbance {
				disturbed++
			}
		}
	}
	if disturbed > 0 {
		fmt.Fprintf(w, "\n**%d of %d measurements were disturbed**: others of this machine or host had over %.0f %% of a core.\n", disturbed, of, 100*measure.Disturbance)
	}
	fmt.Fprintf(w, "\n| | | median | least–greatest | | CPU µs by MB or command |\n| --- | --- | --- | --- | --- | --- |\n")
	for _, f := range r.Figures {
		cost := "–"
		if len(f.Cost) > 0 {
			cost = measure.Number(measure.SpreadOf(f.Cost).Median)
		}
		fmt.Fprintf(w, "| %s | %s | **%s** | %s–%s | %s | %s |\n", f.Bed, f.Name, measure.Number(f.Value.Median), measure.Number(f.Value.Min), measure.Number(f.Value.Max), f.Unit, cost)
	}
	met := 0
	for _, v := range r.Verdicts {
		if v.Met {
			met++
		}
	}
	fmt.Fprintf(w, "\n### What is asked of storage\n\n%d of %d met.\n\n```\n", met, len(r.Verdicts))
	for _, v := range r.Verdicts {
		fmt.Fprintln(w, v)
	}
	fmt.Fprintln(w, "```")
	for _, n := range r.Notes {
		fmt.Fprintf(w, "\n%s\n", n)
	}
}

func (v Verdict) String() string {
	word := "not met"
	if v.Met {
		word = "met"
	}
	s := fmt.Sprintf("%-7s %-10s %s: asked %s, measured %.3g (%.3g–%.3g)", word, v.Bed, v.What, v.Asked, v.Measured.Median, v.Measured.Min, v.Measured.Max)
	if v.Note != "" {
		s += "; " + v.Note
	}
	return s
}
