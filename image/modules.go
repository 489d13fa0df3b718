package main

import (
	"context"
	"os"
	"path/filepath"

	"github.com/ledge-storage/ledge/image/modules"
)

// addModules puts the modules, modules.dep and modules.builtin into the archive.
func addModules(ctx context.Context, a *archive, k *kernel, wanted []string, cache string) (count int, err error) {
	s, err := modules.Open(ctx, k.modules, cache)
	if err != nil {
		return 0, err
	}
	names, err := s.Closure(wanted)
	if err != nil {
		return 0, err
	}
	dir := "lib/modules/" + k.release + "/"
	for _, name := range names {
		path, data := s.File(name)
		a.file(dir+path, data, 0o644)
	}
	a.file(dir+"modules.dep", []byte(s.Dep(names)), 0o644)
	builtin, err := os.ReadFile(filepath.Join(k.modules, "modules.builtin"))
	if err != nil {
		return 0, err
	}
	a.file(dir+"modules.builtin", builtin, 0o644)
	return len(names), nil
}
