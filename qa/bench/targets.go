package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/ledge-storage/ledge/qa/peers"
)

// lunBytes is the size of each target's LUN.
const lunBytes = 1 << 30

// startTargets starts the targets that only names (all, where it is empty). What it started is returned with an error too.
func startTargets(ctx context.Context, dir, only string) ([]Target, error) {
	for _, name := range []string{"null", "gotgt", "engine"} {
		build := exec.CommandContext(ctx, "go", "build", "-o", filepath.Join(dir, name), "./qa/peers/"+name)
		if out, err := build.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("build %s: %w: %s", name, err, out)
		}
	}
	starters := []struct {
		name  string
		start func() (*peers.Peer, error)
	}{
		{"loopback", func() (*peers.Peer, error) {
			return peers.Null(ctx, dir, filepath.Join(dir, "null"), lunBytes, false)
		}},
		{"loopback-batch", func() (*peers.Peer, error) {
			return peers.Null(ctx, dir, filepath.Join(dir, "null"), lunBytes, true)
		}},
		{"tgtd", func() (*peers.Peer, error) {
			file, err := sparse(dir, "tgtd.img")
			if err != nil {
				return nil, err
			}
			return peers.Tgtd(ctx, dir, file)
		}},
		{"gotgt", func() (*peers.Peer, error) {
			file, err := sparse(dir, "gotgt.img")
			if err != nil {
				return nil, err
			}
			return peers.Gotgt(ctx, dir, filepath.Join(dir, "gotgt"), file)
		}},
		{"engine", func() (*peers.Peer, error) {
			return peers.Engine(ctx, dir, filepath.Join(dir, "engine"), "", lunBytes)
		}},
	}
	var targets []Target
	for _, s := range starters {
		if !wanted(only, s.name) {
			continue
		}
		p, err := s.start()
		if err != nil {
			return targets, err
		}
		targets = append(targets, Target{Name: s.name, URL: p.URL, Stop: p.Stop})
	}
	if !wanted(only, "shelf") && !wanted(only, "volume") {
		return targets, nil
	}
	system, err := startSystem(ctx, dir)
	return append(targets, system...), err
}

func wanted(only, name string) bool {
	if only == "" {
		return true
	}
	for _, o := range strings.Split(only, ",") {
		if o == name {
			return true
		}
	}
	return false
}

func sparse(dir, name string) (string, error) {
	path := filepath.Join(dir, name)
	f, err := os.Create(path)
	if err != nil {
		return "", err
	}
	if err := f.Truncate(lunBytes); err != nil {
		return "", err
	}
	return path, f.Close()
}
