// Bench compares Ledge's targets with other targets and with the machine's floor, in one run, alternating, and holds
// the engine's figures against what is asked of it.
//
// Usage:
//
//	go run ./qa/bench [-quick] [-seconds 1] [-rounds 5] [-targets a,b] [-cells REGEXP] [-placement pinned,free]
//		[-client auto|libiscsi|raw|both] [-spin 50µs] [-idle 40s] [-nice 0] [-realtime] [-json FILE]
//
// Loads. A cell is one load (cell.go); cells have short names, as 4k-read-qd32, that -cells matches. Every target gets the same
// load from the same client, on memory or files in /dev/shm. In each round of a cell every target is measured once, in an
// order that turns from round to round, so that a slow second of the machine hits all alike. A figure is the median of its
// rounds, with the least and the greatest; a ratio is the median of the rounds' ratios, each of two measurements of the
// same round. What stands in the table is what was measured in this run, nothing else.
//
// Placements. Each cell is measured with target and client pinned, each to a core of its own (placement.go), and free. The
// targets are started anew for each. The whole system ("shelf", "volume") is six processes: it runs free only.
//
// Clients (qa/bench/client). libiscsi, compiled against Debian's, is what users' initiators resemble; it makes a system call
// for each request and two for each answer, and so is the limit where many small commands are in flight. There rawload, with few
// system calls for many commands, shows what the target could. The CPU time of both sides stands beside every figure.
//
// Targets. "loopback" and "loopback-batch" (qa/peers/null: they only answer, a request at a time or all that have come),
// "loopback-memory" (the same as the latter, but with the bytes of a memory as large as the LUN: the bound of a target that keeps data),
// "tgtd" and "gotgt" on a file, "engine" (Ledge's engine on memory), "loopback-spin" and "engine-spin" (the same, looking for the next
// request for -spin before they sleep; where one command is in flight), "shelf" (a plain LUN of a shelf of two controllers, mirrored
// NVRAM and 8+2 over twelve drives, as processes) and "volume" (a volume of an agent on that shelf).
//
// Idle. With -idle above 0, fresh targets hold idle sessions: their CPU time with 100, their memory with 1000 (idle.go).
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// A Report is all that a run found.
type Report struct {
	Date      string    `json:"date"`
	Commit    string    `json:"commit"`
	Cores     int       `json:"cores"`
	Processor string    `json:"processor"`
	Kernel    string    `json:"kernel"`
	Go        string    `json:"go"`
	Seconds   float64   `json:"seconds"`
	Rounds    int       `json:"rounds"`
	Figures   []Figure  `json:"figures"`
	Idle      []Idle    `json:"idle"`
	Verdicts  []Verdict `json:"verdicts"`
}

// options are the flags.
type options struct {
	quick, realtime                            bool
	seconds                                    float64
	rounds, nice                               int
	targets, cells, placements, client, report string
	spin, idle                                 time.Duration
}

func main() {
	var o options
	flag.BoolVar(&o.quick, "quick", false, "0.4 s a measurement, 3 rounds, 3 s idle, without gotgt, shelf and volume (flags that are given stay)")
	flag.Float64Var(&o.seconds, "seconds", 1, "seconds a measurement")
	flag.IntVar(&o.rounds, "rounds", 5, "measurements of each target in each cell")
	flag.IntVar(&o.nice, "nice", 0, "nice value of all that is measured; below 0 needs root")
	flag.BoolVar(&o.realtime, "realtime", false, "real-time scheduling of all that is measured (root): for a machine that others keep busy; not for figures to publish")
	flag.StringVar(&o.targets, "targets", "", "comma-separated targets; empty: all")
	flag.StringVar(&o.cells, "cells", "", "only the cells whose short names match this expression, e.g. 'qd32|8x8'")
	flag.StringVar(&o.placements, "placement", pinned+","+free, "comma-separated placements")
	flag.StringVar(&o.client, "client", "auto", "libiscsi, raw, both, or auto: libiscsi, and raw where it likely is the limit")
	flag.StringVar(&o.report, "json", "", "also write the report to this file")
	flag.DurationVar(&o.spin, "spin", spinDefault, "how long the spinning targets look for a request before they sleep")
	flag.DurationVar(&o.idle, "idle", 40*time.Second, "how long idle sessions are watched; 0: not. The engine pings a silent one after 30 s")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) (err error) {
	names, filter, err := o.settle()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("/dev/shm", "ledge-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	b := &bench{dir: dir, seconds: o.seconds, rounds: o.rounds, spin: o.spin}
	if err := errors.Join(b.buildClients(ctx), b.buildTargets(ctx)); err != nil {
		return err
	}
	undo, err := prefer(o.nice, o.realtime)
	defer func() { err = errors.Join(err, undo()) }()
	if err != nil {
		return err
	}
	report := newReport(ctx, o)
	for _, placement := range strings.Split(o.placements, ",") {
		if placement == pinned && runtime.NumCPU() < 2 {
			fmt.Fprintln(os.Stderr, "pinned: there is one core only")
			continue
		}
		figures, err := b.place(ctx, placement, rows(placement, filter, o.client), names)
		report.Figures = append(report.Figures, figures...)
		if err != nil {
			return err
		}
	}
	if o.idle > 0 {
		if report.Idle, err = b.idle(ctx, names, o.idle); err != nil {
			return err
		}
	}
	report.Verdicts = judge(report.Figures, report.Idle)
	table(os.Stdout, report)
	if o.report == "" {
		return nil
	}
	j, err := json.MarshalIndent(report, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(o.report, append(j, '\n'), 0o644)
}

// settle checks the flags, and applies -quick to those that were not given.
func (o *options) settle() (names []string, filter *regexp.Regexp, err error) {
	all := targetNames
	if o.quick {
		given := map[string]bool{}
		flag.Visit(func(f *flag.Flag) { given[f.Name] = true })
		if !given["seconds"] {
			o.seconds = .4
		}
		if !given["rounds"] {
			o.rounds = 3
		}
		if !given["idle"] {
			o.idle = 3 * time.Second
		}
		all = []string{"loopback", "loopback-batch", "loopback-memory", "loopback-spin", "tgtd", "engine", "engine-spin"}
	}
	if names, err = chosen(o.targets, all); err != nil {
		return nil, nil, err
	}
	if filter, err = regexp.Compile(o.cells); err != nil {
		return nil, nil, fmt.Errorf("-cells: %w", err)
	}
	for _, p := range strings.Split(o.placements, ",") {
		if p != pinned && p != free {
			return nil, nil, fmt.Errorf("-placement %q: pinned, free, or both", p)
		}
	}
	switch {
	case o.client != "auto" && o.client != "both" && o.client != libiscsi && o.client != raw:
		err = fmt.Errorf("-client %q: auto, libiscsi, raw or both", o.client)
	case o.seconds <= 0 || o.rounds < 1:
		err = errors.New("-seconds and -rounds are above 0")
	}
	return names, filter, err
}

// place starts the targets for a placement, measures the rows, and stops them.
func (b *bench) place(ctx context.Context, placement string, rows []Row, names []string) (figures []Figure, err error) {
	if len(rows) == 0 {
		return nil, nil
	}
	targets, err := b.startAll(ctx, placement, names)
	defer func() { err = errors.Join(err, stopAll(targets), os.RemoveAll(b.dir+"/"+placement)) }()
	if err != nil {
		return nil, err
	}
	for _, t := range targets {
		if err := b.fill(ctx, t); err != nil {
			return nil, err
		}
	}
	for _, row := range rows {
		figures = append(figures, b.measure(ctx, row, targets)...)
		if ctx.Err() != nil {
			return figures, ctx.Err()
		}
	}
	return figures, nil
}

func newReport(ctx context.Context, o options) Report {
	r := Report{Date: time.Now().Format(time.DateOnly), Cores: runtime.NumCPU(), Go: runtime.Version(), Seconds: o.seconds, Rounds: o.rounds}
	commit, _ := exec.CommandContext(ctx, "git", "describe", "--always", "--dirty").Output() // empty outside a checkout
	r.Commit = strings.TrimSpace(string(commit))
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	r.Kernel = strings.TrimSpace(string(kernel))
	cpu, _ := os.ReadFile("/proc/cpuinfo")
	_, model, _ := strings.Cut(string(cpu), "model name")
	model, _, _ = strings.Cut(model, "\n")
	r.Processor = strings.Trim(model, "\t :")
	return r
}
