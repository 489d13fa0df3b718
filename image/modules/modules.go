// Package modules finds kernel modules in an unpacked package of Debian's and what they depend on. The package ships
// no modules.dep: it is made on installation, from the modules' own .modinfo. So it is here.
package modules

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
)

// Set is the modules of one kernel, by name.
type Set struct {
	ctx   context.Context
	root  string // …/lib/modules/RELEASE
	cache string // decompressed modules

	paths   map[string]string // name → path relative to root, without .xz
	builtin map[string]bool
	data    map[string][]byte
	depends map[string][]string
}

// Open lists the modules of root, …/lib/modules/RELEASE. What it decompresses is kept in cache.
func Open(ctx context.Context, root, cache string) (*Set, error) {
	s := &Set{ctx: ctx, root: root, cache: cache, paths: map[string]string{}, builtin: map[string]bool{},
		data: map[string][]byte{}, depends: map[string][]string{}}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(root, strings.TrimSuffix(path, ".xz"))
		if err == nil && strings.HasSuffix(rel, ".ko") {
			s.paths[Name(rel)] = rel
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
		s.builtin[Name(line)] = true
	}
	return s, nil
}

// Name is what the kernel calls the module in a file: hyphens are underscores.
func Name(file string) string {
	return strings.ReplaceAll(strings.TrimSuffix(filepath.Base(file), ".ko"), "-", "_")
}

// Closure returns the wanted modules and everything they depend on, sorted. Built-in ones need nothing.
func (s *Set) Closure(wanted []string) ([]string, error) {
	names, err := s.Order(wanted)
	sort.Strings(names)
	return names, err
}

// Order is Closure in the order to load them: each after everything it depends on, else as wanted.
func (s *Set) Order(wanted []string) ([]string, error) {
	var names []string
	seen := map[string]bool{}
	var visit func(name, by string) error
	visit = func(name, by string) error {
		if seen[name] || s.builtin[name] {
			return nil
		}
		if _, ok := s.paths[name]; !ok {
			return fmt.Errorf("module %s, wanted by %s: not in the kernel's package", name, by)
		}
		seen[name] = true // before its needs: a cycle ends here
		if err := s.load(name); err != nil {
			return err
		}
		for _, d := range s.depends[name] {
			if err := visit(d, name); err != nil {
				return err
			}
		}
		names = append(names, name)
		return nil
	}
	for _, name := range wanted {
		if err := visit(strings.ReplaceAll(name, "-", "_"), "the list"); err != nil {
			return nil, err
		}
	}
	return names, nil
}

// File returns a module of a closure: its path below root, and its bytes, decompressed.
func (s *Set) File(name string) (path string, data []byte) { return s.paths[name], s.data[name] }

// load reads a module, decompressed, and its dependencies.
func (s *Set) load(name string) error {
	data, err := s.read(s.paths[name])
	if err != nil {
		return fmt.Errorf("module %s: %w", name, err)
	}
	needs, err := depends(data)
	if err != nil {
		return fmt.Errorf("module %s: %w", name, err)
	}
	s.data[name], s.depends[name] = data, needs
	return nil
}

func (s *Set) read(rel string) ([]byte, error) {
	plain := filepath.Join(s.root, rel)
	data, err := os.ReadFile(plain)
	if !errors.Is(err, fs.ErrNotExist) {
		return data, err
	}
	cached := filepath.Join(s.cache, rel)
	if data, err := os.ReadFile(cached); err == nil {
		return data, nil
	}
	if data, err = exec.CommandContext(s.ctx, "xz", "-dc", plain+".xz").Output(); err != nil {
		return nil, fmt.Errorf("xz -dc %s.xz: %w", plain, err)
	}
	if err := os.MkdirAll(filepath.Dir(cached), 0o755); err != nil {
		return nil, err
	}
	// In one step: a build that is interrupted leaves no half module.
	if err := os.WriteFile(cached+".new", data, 0o644); err != nil {
		return nil, err
	}
	return data, os.Rename(cached+".new", cached)
}

// depends reads depends= of the ELF section .modinfo: strings key=value, each ended by a zero byte.
func depends(ko []byte) ([]string, error) {
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

// Dep is modules.dep for the named modules: direct dependencies only, which is what PID 1 wants.
// No space follows the colon of a module that needs nothing: u-root's reader takes it for a name.
func (s *Set) Dep(names []string) string {
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
