package main

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
)

// moduleSet finds kernel modules by name in an unpacked package and reads what they depend on. Debian's
// package ships no modules.dep: it is made on installation, from the modules' own .modinfo. So do we.
type moduleSet struct {
	ctx   context.Context
	root  string // …/lib/modules/RELEASE
	cache string // decompressed modules

	paths   map[string]string // name → path relative to root, without .xz
	builtin map[string]bool
	data    map[string][]byte
	depends map[string][]string
}

func openModules(ctx context.Context, root, cache string) (*moduleSet, error) {
	s := &moduleSet{ctx: ctx, root: root, cache: cache, paths: map[string]string{}, builtin: map[string]bool{},
		data: map[string][]byte{}, depends: map[string][]string{}}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(root, strings.TrimSuffix(path, ".xz"))
		if err == nil && strings.HasSuffix(rel, ".ko") {
			s.paths[moduleName(rel)] = rel
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile(filepath.Join(root, "modules.builtin"))
	if err != nil {
		return nil, err
	}
	for _, line := range strings.Fields(string(text)) {
		s.builtin[moduleName(line)] = true
	}
	return s, nil
}

// moduleName is what the kernel calls the module in a file: hyphens are underscores.
func moduleName(file string) string {
	return strings.ReplaceAll(strings.TrimSuffix(filepath.Base(file), ".ko"), "-", "_")
}

// closure returns the wanted modules and everything they depend on, sorted. Built-in ones need nothing.
func (s *moduleSet) closure(wanted []string) ([]string, error) {
	seen := map[string]bool{}
	var visit func(name, by string) error
	visit = func(name, by string) error {
		if seen[name] || s.builtin[name] {
			return nil
		}
		if _, ok := s.paths[name]; !ok {
			return fmt.Errorf("module %s, wanted by %s: not in the kernel's package", name, by)
		}
		seen[name] = true
		if err := s.load(name); err != nil {
			return err
		}
		for _, d := range s.depends[name] {
			if err := visit(d, name); err != nil {
				return err
			}
		}
		return nil
	}
	for _, name := range wanted {
		if err := visit(strings.ReplaceAll(name, "-", "_"), "the board"); err != nil {
			return nil, err
		}
	}
	names := make([]string, 0, len(seen))
	for name := range seen {
		names = append(names, name)
	}
	sort.Strings(names)
	return names, nil
}

// load reads a module, decompressed, and its dependencies.
func (s *moduleSet) load(name string) error {
	data, err := s.read(s.paths[name])
	if err != nil {
		return fmt.Errorf("module %s: %w", name, err)
	}
	depends, err := moduleDepends(data)
	if err != nil {
		return fmt.Errorf("module %s: %w", name, err)
	}
	s.data[name], s.depends[name] = data, depends
	return nil
}

func (s *moduleSet) read(rel string) ([]byte, error) {
	plain := filepath.Join(s.root, rel)
	data, err := os.ReadFile(plain)
	if !errors.Is(err, fs.ErrNotExist) {
		return data, err
	}
	cached := filepath.Join(s.cache, rel)
	if data, err := os.ReadFile(cached); err == nil {
		return data, nil
	}
	if data, err = run(s.ctx, "", "xz", "-dc", plain+".xz"); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(cached), 0o755); err != nil {
		return nil, err
	}
	return data, writeFile(cached, data, 0o644)
}

// moduleDepends reads depends= of the ELF section .modinfo: strings key=value, each ended by a zero byte.
func moduleDepends(ko []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(ko))
	if err != nil {
		return nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, errors.New("no .modinfo: not a kernel module")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	var names []string
	for _, entry := range strings.Split(string(info), "\x00") {
		if list, ok := strings.CutPrefix(entry, "depends="); ok {
			for _, d := range strings.FieldsFunc(list, func(r rune) bool { return r == ',' }) {
				names = append(names, strings.ReplaceAll(d, "-", "_"))
			}
		}
	}
	return names, nil
}

// modulesDep writes modules.dep for the named modules: direct dependencies only, which is what PID 1 wants.
// No space follows the colon of a module that needs nothing: u-root's reader takes it for a name.
func (s *moduleSet) modulesDep(names []string) string {
	var b strings.Builder
	for _, name := range names {
		b.WriteString(s.paths[name] + ":")
		for _, d := range s.depends[name] {
			if !s.builtin[d] {
				b.WriteString(" " + s.paths[d])
			}
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// addModules puts the modules, modules.dep and modules.builtin into the archive.
func addModules(ctx context.Context, a *archive, k *kernel, wanted []string, cache string) (count int, err error) {
	s, err := openModules(ctx, k.modules, cache)
	if err != nil {
		return 0, err
	}
	names, err := s.closure(wanted)
	if err != nil {
		return 0, err
	}
	dir := "lib/modules/" + k.release + "/"
	for _, name := range names {
		a.file(dir+s.paths[name], s.data[name], 0o644)
	}
	a.file(dir+"modules.dep", []byte(s.modulesDep(names)), 0o644)
	builtin, err := os.ReadFile(filepath.Join(k.modules, "modules.builtin"))
	if err != nil {
		return 0, err
	}
	a.file(dir+"modules.builtin", builtin, 0o644)
	return len(names), nil
}
