package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/ledge-storage/ledge/qa/peers"
)

// lunBytes is the size of each target's LUN.
const lunBytes = 1 << 30

// A Target is something to measure.
type Target struct {
	Name string
	URL  string
	Pid  int // 0: several processes, whose CPU time is not counted
	Stop func() error
	// Runs says whether the target takes part in a row.
	Runs func(Row) bool
}

// targetNames are all targets, in the order of the tables.
var targetNames = []string{"loopback", "loopback-batch", "loopback-memory", "loopback-spin", "tgtd", "gotgt", "engine", "engine-spin", "shelf", "volume"}

func everything(Row) bool { return true }

func singles(r Row) bool { return r.Cell.single() }

// buildTargets compiles the targets of qa/peers into the directory.
func (b *bench) buildTargets(ctx context.Context) error {
	for _, name := range []string{"null", "gotgt", "engine"} {
		build := exec.CommandContext(ctx, "go", "build", "-o", filepath.Join(b.dir, name), "./qa/peers/"+name)
		if out, err := build.CombinedOutput(); err != nil {
			return fmt.Errorf("build %s: %w: %s", name, err, out)
		}
	}
	return nil
}

// start starts a target of one process.
func (b *bench) start(ctx context.Context, placement, name string) (Target, error) {
	dir := filepath.Join(b.dir, placement)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return Target{}, err
	}
	var p *peers.Peer
	t := Target{Name: name, Runs: everything}
	err := onCore(placement, targetCore, func() (err error) {
		switch name {
		case "loopback":
			p, err = peers.Null(ctx, name, dir, filepath.Join(b.dir, "null"), lunBytes, peers.NullOptions{})
		case "loopback-batch":
			p, err = peers.Null(ctx, name, dir, filepath.Join(b.dir, "null"), lunBytes, peers.NullOptions{Batch: true})
		case "loopback-memory":
			p, err = peers.Null(ctx, name, dir, filepath.Join(b.dir, "null"), lunBytes, peers.NullOptions{Batch: true, Memory: true})
		case "loopback-spin":
			t.Runs = singles
			p, err = peers.Null(ctx, name, dir, filepath.Join(b.dir, "null"), lunBytes, peers.NullOptions{Batch: true, Spin: b.spin})
		case "tgtd":
			p, err = peers.Tgtd(ctx, dir, filepath.Join(dir, "tgtd.img"))
		case "gotgt":
			p, err = peers.Gotgt(ctx, dir, filepath.Join(b.dir, "gotgt"), filepath.Join(dir, "gotgt.img"))
		case "engine":
			p, err = peers.Engine(ctx, name, dir, filepath.Join(b.dir, "engine"), lunBytes, peers.EngineOptions{})
		case "engine-spin":
			t.Runs = singles
			p, err = peers.Engine(ctx, name, dir, filepath.Join(b.dir, "engine"), lunBytes, peers.EngineOptions{Spin: b.spin})
		default:
			err = fmt.Errorf("no target is called %s", name)
		}
		return err
	})
	if err != nil {
		return Target{}, err
	}
	t.URL, t.Pid, t.Stop = p.URL, p.Pid(), p.Stop
	return t, nil
}

// startAll starts names for a placement. What it started is returned with an error too.
func (b *bench) startAll(ctx context.Context, placement string, names []string) (targets []Target, err error) {
	dir := filepath.Join(b.dir, placement)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	for _, file := range []string{"tgtd", "gotgt"} {
		if err := sparse(filepath.Join(dir, file+".img")); err != nil {
			return nil, err
		}
	}
	for _, name := range names {
		if name == "shelf" || name == "volume" {
			continue
		}
		t, err := b.start(ctx, placement, name)
		if err != nil {
			return targets, err
		}
		targets = append(targets, t)
	}
	if placement == pinned || !slices.Contains(names, "shelf") && !slices.Contains(names, "volume") {
		return targets, nil
	}
	system, err := startSystem(ctx, b.dir)
	return append(targets, system...), err
}

func stopAll(targets []Target) (err error) {
	for _, t := range targets {
		err = errors.Join(err, t.Stop())
	}
	return err
}

// chosen are the targets of the comma-separated list, in the order of the tables; all, where it is empty.
func chosen(list string, all []string) ([]string, error) {
	if list == "" {
		return all, nil
	}
	asked := strings.Split(list, ",")
	for _, name := range asked {
		if !slices.Contains(targetNames, name) {
			return nil, fmt.Errorf("no target is called %q: there are %s", name, strings.Join(targetNames, ", "))
		}
	}
	var names []string
	for _, name := range targetNames {
		if slices.Contains(asked, name) {
			names = append(names, name)
		}
	}
	return names, nil
}

func sparse(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(lunBytes), f.Close())
}

// spinDefault is long enough for a request that follows an answer, and short enough that a core is not kept from others.
const spinDefault = 50 * time.Microsecond
