package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/ledge-storage/ledge/qa/bench/measure"
)

// spanMiB is the part of each LUN that is read and written: larger than a CPU cache, smaller than memory.
const spanMiB = 512

// A bench is one run's settings and what it built.
type bench struct {
	dir     string // of binaries, files and logs
	seconds float64
	rounds  int
	spin    time.Duration
}

// buildClients compiles both clients into the directory.
func (b *bench) buildClients(ctx context.Context) error {
	for _, args := range [][]string{
		{"-o", filepath.Join(b.dir, libiscsi), "qa/bench/client/iscsiload.c", "-liscsi"},
		{"-o", filepath.Join(b.dir, raw), "qa/bench/client/rawload.c"},
	} {
		out, err := exec.CommandContext(ctx, "gcc", append([]string{"-O2"}, args...)...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("compile %s (packages gcc, libiscsi-dev): %w: %s", args[2], err, out)
		}
	}
	return nil
}

// measure runs a row: in each round every target once, in an order that turns from round to round. A target that fails
// is left out of the rest of the row.
func (b *bench) measure(ctx context.Context, row Row, targets []Target) []Figure {
	var figures []Figure
	var of []Target
	for _, t := range targets {
		if t.Runs(row) {
			of = append(of, t)
			figures = append(figures, Figure{Row: row, Target: t.Name})
		}
	}
	for round := range b.rounds {
		for j := range of {
			i := (j + round) % len(of)
			f := &figures[i]
			if f.Error != "" || ctx.Err() != nil {
				continue
			}
			fmt.Fprintf(os.Stderr, "%s %s %s %d: %-14s ", row.Placement, row.Client, row.Cell.ID(), round+1, f.Target)
			r, err := b.once(ctx, row, of[i])
			if err != nil {
				f.Error = err.Error()
				fmt.Fprintln(os.Stderr, err)
				continue
			}
			fmt.Fprintf(os.Stderr, "%9.0f IOPS %8.1f MB/s p99 %8.1f us CPU %%: client %3.0f target %3.0f others %3.0f\n",
				r.IOPS, r.MBps, r.P99, 100*r.ClientCPU, 100*r.TargetCPU, 100*(r.Others+r.Steal))
			f.Rounds = append(f.Rounds, r)
		}
	}
	summarize(figures)
	return figures
}

func (b *bench) once(ctx context.Context, row Row, t Target) (Result, error) {
	c := row.Cell
	cpu, all, begin := measure.CPUSeconds(t.Pid), measure.Now(), time.Now()
	out, err := b.client(ctx, row.Placement, row.Client, t.URL, c.Op, c.Pattern, strconv.Itoa(c.Bytes), strconv.Itoa(c.Depth),
		strconv.FormatFloat(b.seconds, 'f', 2, 64), strconv.Itoa(spanMiB), strconv.Itoa(c.Conns))
	if err != nil {
		return Result{}, err
	}
	var r Result
	if err := json.Unmarshal(out, &r); err != nil {
		return Result{}, fmt.Errorf("%s said %q: %w", row.Client, out, err)
	}
	if r.IOPS <= 0 || r.Seconds <= 0 {
		return Result{}, errors.New("no command completed")
	}
	took, now := time.Since(begin).Seconds(), measure.Now() // logins and logouts are in it, and hardly show
	r.Steal = (now.Steal - all.Steal) / took
	if t.Pid != 0 {
		r.TargetCPU = (measure.CPUSeconds(t.Pid) - cpu) / r.Seconds
		r.Others = max(0, (now.Busy-all.Busy)/took-(r.TargetCPU+r.ClientCPU)*r.Seconds/took)
	}
	return r, nil
}

// fill writes the span once, so that no target answers reads from blocks never written.
func (b *bench) fill(ctx context.Context, t Target) error {
	fmt.Fprintf(os.Stderr, "filling %s\n", t.Name)
	_, err := b.client(ctx, free, libiscsi, t.URL, "fill", strconv.Itoa(spanMiB))
	if err != nil {
		return fmt.Errorf("fill %s: %w", t.Name, err)
	}
	return nil
}

// client runs a client to its end and returns what it printed.
func (b *bench) client(ctx context.Context, placement, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(b.dir, name), args...)
	var out, msg strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &msg
	if err := onCore(placement, clientCore, cmd.Start); err != nil {
		return nil, err
	}
	if err := cmd.Wait(); err != nil {
		return nil, fmt.Errorf("%w: %s", err, strings.TrimSpace(msg.String()))
	}
	return []byte(out.String()), nil
}
