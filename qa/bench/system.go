package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/ledge-storage/ledge/firmware/control"
	"github.com/ledge-storage/ledge/qa/lab"
)

// startSystem starts the whole system as processes, with everything it writes in dir: two controllers that mirror their
// NVRAM, twelve drives, an agent. Its targets are a plain LUN of the shelf and a volume of the agent; the last one's Stop ends it all.
func startSystem(ctx context.Context, dir string) (targets []Target, err error) {
	bin := filepath.Join(dir, "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		return nil, err
	}
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", bin+"/", "./firmware/shelfd", "./host/hostd")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the daemons: %w: %s", err, out)
	}
	l, err := lab.New(lab.Options{
		Dir: filepath.Join(dir, "system"), Binaries: bin, Local: true,
		Say: func(format string, args ...any) { fmt.Fprintf(os.Stderr, "system: "+format+"\n", args...) },
	})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			l.Close()
		}
	}()
	if err := l.Start(ctx); err != nil {
		return nil, err
	}
	v, _, err := l.EnsureVolume(ctx, "bench", lunBytes)
	if err != nil {
		return nil, err
	}
	owner, err := l.WaitOwner(ctx)
	if err != nil {
		return nil, err
	}
	var made control.LUN
	spec := map[string]any{"name": "bench", "kind": "plain", "size_bytes": lunBytes}
	if err := owner.Do(ctx, "POST", "/v1/luns", spec, &made); err != nil {
		return nil, err
	}
	st, err := owner.Status(ctx)
	if err != nil {
		return nil, err
	}
	runs := func(r Row) bool { return r.Client == libiscsi && r.Cell.system() }
	return []Target{
		{Name: "shelf", URL: fmt.Sprintf("iscsi://%s/%s/%d", owner.Portal(), st.Target, made.LUN), Runs: runs, Stop: func() error { return nil }},
		{Name: "volume", URL: fmt.Sprintf("iscsi://%s/%s/%d", v.Portal, v.IQN, v.LUN), Runs: runs, Stop: l.Close},
	}, nil
}
