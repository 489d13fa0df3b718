package main

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/ledge-storage/ledge/qa/bench/measure"
)

// table writes a report as Markdown: for each placement the figures, then who was busy; the idle targets; the verdicts.
func table(w io.Writer, r Report) {
	fmt.Fprintf(w, "%s, commit %s, %d cores (%s), Linux %s, %s; %g s a measurement, %d rounds, alternating; files in /dev/shm, LUNs of %d MiB read and written.\n",
		r.Date, r.Commit, r.Cores, r.Processor, r.Kernel, r.Go, r.Seconds, r.Rounds, spanMiB)
	if n, of := disturbed(r.Figures); n > 0 {
		fmt.Fprintf(w, "\n**%d of %d measurements were disturbed**: others of this machine or host had over %.0f %% of a core.\n", n, of, 100*measure.Disturbance)
	}
	for _, placement := range []string{pinned, free} {
		figures := slices.DeleteFunc(slices.Clone(r.Figures), func(f Figure) bool { return f.Placement != placement })
		if len(figures) == 0 {
			continue
		}
		fmt.Fprintf(w, "\n### %s\n\n", map[string]string{
			pinned: "Pinned: target on core 0, client on core 1", free: "Free: the scheduler places both"}[placement])
		fmt.Fprintf(w, "A cell: thousand IOPS (MB/s from 128 KiB up), least–greatest of the rounds · × tgtd · × loopback-batch · × loopback-memory (medians of the rounds' ratios) · p99 in µs\n\n")
		grid(w, figures, func(f Figure) string {
			return fmt.Sprintf("%s · %s · %s · %s · %.0f", speed(f), times(f.Ratios, "tgtd"), times(f.Ratios, "loopback-batch"), times(f.Ratios, "loopback-memory"), f.P99.Median)
		})
		fmt.Fprintf(w, "\nCPU of client / target: %% of a core · µs for each command\n\n")
		grid(w, figures, func(f Figure) string {
			if f.TargetCPU.Max == 0 {
				return fmt.Sprintf("%.0f / – · %.1f / –", 100*f.ClientCPU.Median, f.ClientCost.Median)
			}
			return fmt.Sprintf("%.0f / %.0f · %.1f / %.1f", 100*f.ClientCPU.Median, 100*f.TargetCPU.Median, f.ClientCost.Median, f.TargetCost.Median)
		})
	}
	if len(r.Idle) > 0 {
		fmt.Fprintf(w, "\n### Idle\n\n| | %% of a core, %d sessions | KiB a session, %d sessions | failures |\n| --- | --- | --- | --- |\n", idleSessions, manySessions)
		for _, i := range r.Idle {
			fmt.Fprintf(w, "| %s | %.3f | %.1f | %s |\n", i.Target, 100*i.CPU, i.SessionBytes/1024, i.Error)
		}
	}
	if len(r.Verdicts) > 0 {
		fmt.Fprintf(w, "\n### What is asked\n\n%d of %d met.\n\n```\n", met(r.Verdicts), len(r.Verdicts))
		for _, v := range r.Verdicts {
			fmt.Fprintln(w, v)
		}
		fmt.Fprintln(w, "```")
	}
}

// grid writes figures of one placement: a line for each cell and client, a column for each target that has figures.
func grid(w io.Writer, figures []Figure, cell func(Figure) string) {
	var columns []string
	for _, name := range targetNames {
		if slices.ContainsFunc(figures, func(f Figure) bool { return f.Target == name }) {
			columns = append(columns, name)
		}
	}
	fmt.Fprintf(w, "| | client | %s |\n|%s\n", strings.Join(columns, " | "), strings.Repeat(" --- |", len(columns)+2))
	var last Row
	for _, f := range figures {
		if f.Row == last {
			continue
		}
		last = f.Row
		fmt.Fprintf(w, "| %s | %s |", f.Cell, f.Client)
		for _, name := range columns {
			k := slices.IndexFunc(figures, func(g Figure) bool { return g.Row == f.Row && g.Target == name })
			switch {
			case k < 0:
				fmt.Fprintf(w, " |")
			case figures[k].Error != "":
				fmt.Fprintf(w, " failed: %s |", strings.ReplaceAll(figures[k].Error, "|", "/"))
			default:
				fmt.Fprintf(w, " %s |", cell(figures[k]))
			}
		}
		fmt.Fprintln(w)
	}
}

// speed is thousands of IOPS, or MB/s, with the least and the greatest.
func speed(f Figure) string {
	if f.Cell.Bytes >= 128<<10 {
		return fmt.Sprintf("**%.0f** %.0f–%.0f", f.MBps.Median, f.MBps.Min, f.MBps.Max)
	}
	return fmt.Sprintf("**%.1f** %.1f–%.1f", f.IOPS.Median/1000, f.IOPS.Min/1000, f.IOPS.Max/1000)
}

// times is the ratio to base, or a dash for the base itself and where it was not measured.
func times(ratios map[string]Spread, base string) string {
	if r, ok := ratios[base]; ok {
		return fmt.Sprintf("%.2f", r.Median)
	}
	return "–"
}
