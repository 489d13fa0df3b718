// Bench compares Ledge's targets with other targets and with the machine's floor, in one run, alternating.
//
// Usage:
//
//	go run ./qa/bench [-seconds 2] [-rounds 3] [-targets a,b] [-json FILE]
//
// Every target gets the same load from the same client (qa/bench/client/iscsiload.c, over Debian's
// libiscsi), on files in /dev/shm. A cell is one load; in each round of a cell every target is measured once, in an order
// that turns from round to round, so that a slow second of the machine hits all alike. A figure is the median of its rounds;
// ratios are of medians. What stands in the table is what was measured in this run, nothing else.
//
// Targets: "loopback" and "loopback-batch" (qa/peers/null: they only answer), "tgtd" and "gotgt" on a file,
// "engine" (Ledge's engine on memory), "shelf" (a plain LUN of a shelf of two controllers, mirrored NVRAM and
// 8+2 over twelve drives, as processes) and "volume" (a volume of an agent on that shelf).
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// A Cell is one load.
type Cell struct {
	Op      string `json:"op"`      // read or write
	Pattern string `json:"pattern"` // rand or seq
	Bytes   int    `json:"bytes"`
	Depth   int    `json:"depth"`
}

func (c Cell) String() string {
	pattern := map[string]string{"rand": "random", "seq": "sequential"}[c.Pattern]
	return fmt.Sprintf("%d KiB %s %s, QD %d", c.Bytes>>10, pattern, c.Op, c.Depth)
}

var cells = []Cell{
	{"read", "rand", 4 << 10, 1}, {"read", "rand", 4 << 10, 32},
	{"write", "rand", 4 << 10, 1}, {"write", "rand", 4 << 10, 32},
	{"read", "seq", 128 << 10, 8}, {"write", "seq", 128 << 10, 8},
}

// A Result is what iscsiload prints.
type Result struct {
	IOPS float64 `json:"iops"`
	MBps float64 `json:"mbps"`
	P50  float64 `json:"p50_us"`
	P99  float64 `json:"p99_us"`
}

// A Figure is a target's median in a cell.
type Figure struct {
	Cell   Cell   `json:"cell"`
	Target string `json:"target"`
	Result
	Rounds []float64 `json:"rounds_iops"`
	Error  string    `json:"error,omitempty"`
}

// A Target is something to measure.
type Target struct {
	Name string
	URL  string
	Stop func() error
}

// spanMiB is the part of each LUN that is read and written: larger than a CPU cache, smaller than memory.
const spanMiB = 512

func main() {
	seconds := flag.Float64("seconds", 2, "seconds a measurement")
	rounds := flag.Int("rounds", 3, "measurements of each target in each cell")
	only := flag.String("targets", "", "comma-separated targets; empty: all")
	out := flag.String("json", "", "also write the figures to this file")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *seconds, *rounds, *only, *out); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, seconds float64, rounds int, only, out string) (err error) {
	dir, err := os.MkdirTemp("/dev/shm", "ledge-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	client := filepath.Join(dir, "iscsiload")
	if o, err := exec.CommandContext(ctx, "gcc", "-O2", "-o", client, "qa/bench/client/iscsiload.c", "-liscsi").CombinedOutput(); err != nil {
		return fmt.Errorf("compile iscsiload (packages gcc, libiscsi-dev): %w: %s", err, o)
	}
	targets, err := startTargets(ctx, dir, only)
	defer func() {
		for _, t := range targets {
			err = errors.Join(err, t.Stop())
		}
	}()
	if err != nil {
		return err
	}
	// A first write of the whole span, so that no target answers reads from blocks never written.
	for _, t := range targets {
		fmt.Fprintf(os.Stderr, "filling %s\n", t.Name)
		if err := fill(ctx, client, t); err != nil {
			return err
		}
	}
	var figures []Figure
	for _, c := range cells {
		figures = append(figures, measure(ctx, client, c, targets, seconds, rounds)...)
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	print(figures, targets, seconds, rounds)
	if out == "" {
		return nil
	}
	b, err := json.MarshalIndent(figures, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(out, append(b, '\n'), 0o644)
}

// fill writes the span once in order; targets that are slow get as long as they need.
func fill(ctx context.Context, client string, t Target) error {
	img := filepath.Join(filepath.Dir(client), "fill.raw")
	defer os.Remove(img)
	if t.Name == "loopback" || t.Name == "loopback-batch" {
		return nil
	}
	var r struct {
		Ops int `json:"ops"`
	}
	for written := 0; written < spanMiB<<20; written += r.Ops * (128 << 10) {
		b, err := load(ctx, client, t.URL, Cell{"write", "seq", 128 << 10, 8}, 2)
		if err != nil {
			return fmt.Errorf("fill %s: %w", t.Name, err)
		}
		if err := json.Unmarshal(b, &r); err != nil || r.Ops == 0 {
			return fmt.Errorf("fill %s: no progress: %s", t.Name, b)
		}
		if r.Ops*(128<<10) < spanMiB<<20 && written == 0 {
			// Slower than the span in one go: one long run covers it, as each run starts at zero.
			longer := 2.5 * float64(spanMiB<<20) / float64(r.Ops*(128<<10))
			if b, err = load(ctx, client, t.URL, Cell{"write", "seq", 128 << 10, 8}, longer); err != nil {
				return fmt.Errorf("fill %s: %w", t.Name, err)
			}
			return nil
		}
	}
	return nil
}

func measure(ctx context.Context, client string, c Cell, targets []Target, seconds float64, rounds int) []Figure {
	figures := make([]Figure, len(targets))
	results := make([][]Result, len(targets))
	for i, t := range targets {
		figures[i] = Figure{Cell: c, Target: t.Name}
	}
	for round := range rounds {
		for j := range targets {
			i := (j + round) % len(targets)
			if figures[i].Error != "" || ctx.Err() != nil {
				continue
			}
			fmt.Fprintf(os.Stderr, "%s: round %d: %-14s ", c, round+1, targets[i].Name)
			b, err := load(ctx, client, targets[i].URL, c, seconds)
			var r Result
			if err == nil {
				err = json.Unmarshal(b, &r)
			}
			if err != nil {
				figures[i].Error = err.Error()
				fmt.Fprintln(os.Stderr, err)
				continue
			}
			fmt.Fprintf(os.Stderr, "%9.0f IOPS %8.1f MB/s p99 %8.1f us\n", r.IOPS, r.MBps, r.P99)
			results[i] = append(results[i], r)
			figures[i].Rounds = append(figures[i].Rounds, r.IOPS)
		}
	}
	for i, rs := range results {
		if len(rs) > 0 {
			slices.SortFunc(rs, func(a, b Result) int { return cmp.Compare(a.IOPS, b.IOPS) })
			figures[i].Result = rs[len(rs)/2]
		}
	}
	return figures
}

func load(ctx context.Context, client, url string, c Cell, seconds float64) ([]byte, error) {
	cmd := exec.CommandContext(ctx, client, url, c.Op, c.Pattern, strconv.Itoa(c.Bytes), strconv.Itoa(c.Depth),
		strconv.FormatFloat(seconds, 'f', 2, 64), strconv.Itoa(spanMiB))
	var msg strings.Builder
	cmd.Stderr = &msg
	b, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, strings.TrimSpace(msg.String()))
	}
	return b, nil
}

// print writes the table as Markdown: for each cell the figure, and its ratio to tgtd's and to the loopback's.
func print(figures []Figure, targets []Target, seconds float64, rounds int) {
	fmt.Printf("%d cores, %s, %.0f s a measurement, median of %d, alternating; client and targets share the cores; files in /dev/shm.\n",
		runtime.NumCPU(), runtime.Version(), seconds, rounds)
	fmt.Printf("A cell: IOPS (MB/s from 128 KiB up) · ratio to tgtd · ratio to loopback · p99\n\n|  |")
	for _, t := range targets {
		fmt.Printf(" %s |", t.Name)
	}
	fmt.Printf("\n| --- |%s\n", strings.Repeat(" --- |", len(targets)))
	for _, c := range cells {
		fmt.Printf("| %s |", c)
		base := map[string]float64{}
		for _, f := range figures {
			if f.Cell == c {
				base[f.Target] = f.IOPS
			}
		}
		for _, f := range figures {
			if f.Cell != c {
				continue
			}
			if f.Error != "" {
				fmt.Printf(" failed: %s |", f.Error)
				continue
			}
			value := fmt.Sprintf("%.1fk", f.IOPS/1000)
			if c.Bytes >= 128<<10 {
				value = fmt.Sprintf("%.0f", f.MBps)
			}
			fmt.Printf(" %s · %s · %s · %.0f µs |", value, ratio(f.IOPS, base["tgtd"]), ratio(f.IOPS, base["loopback"]), f.P99)
		}
		fmt.Println()
	}
}

func ratio(a, b float64) string {
	if b == 0 {
		return "–"
	}
	return fmt.Sprintf("%.2f", a/b)
}
