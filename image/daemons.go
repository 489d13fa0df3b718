package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
)

// buildFlags give the same bytes for the same source: no paths, no version control state, no build ID, no
// symbols.
var buildFlags = []string{"-trimpath", "-buildvcs=false", "-ldflags", "-s -w -buildid="}

// addDaemons puts PID 1 at /init and each daemon into /bin. Go's own cache makes this quick.
func addDaemons(ctx context.Context, a *archive, o Options) error {
	dir, err := os.MkdirTemp(o.Cache, "daemons-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	data, err := goBuild(ctx, o.Tree, "firmware/init", dir)
	if err != nil {
		return err
	}
	a.file("init", data, 0o755)
	sizes := []string{fmt.Sprintf("init %.1f MB", float64(len(data))/1e6)}
	for _, pkg := range o.Daemons {
		data, err := goBuild(ctx, o.Tree, pkg, dir)
		if err != nil {
			return err
		}
		a.file("bin/"+path.Base(pkg), data, 0o755)
		sizes = append(sizes, fmt.Sprintf("%s %.1f MB", path.Base(pkg), float64(len(data))/1e6))
	}
	o.Say("daemons     %s", strings.Join(sizes, ", "))
	return nil
}

// goBuild compiles one main package of the tree into dir and returns the binary.
func goBuild(ctx context.Context, tree, pkg, dir string) ([]byte, error) {
	out, err := filepath.Abs(filepath.Join(dir, path.Base(pkg)))
	if err != nil {
		return nil, err
	}
	args := append([]string{"build", "-o", out}, buildFlags...)
	cmd := exec.CommandContext(ctx, "go", append(args, "./"+pkg)...)
	cmd.Dir = tree
	// GOAMD64=v1 and no GOFLAGS: the builder's own settings must not change the bytes.
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOAMD64=v1", "GOFLAGS=")
	if said, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("go build %s: %w\n%s", pkg, err, said)
	}
	return os.ReadFile(out)
}
