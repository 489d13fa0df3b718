package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// moduleDep is a parsed modules.dep: for each module, by name, its file and the files it needs, nearest
// first. Names have underscores whatever the file says, as in the kernel.
type moduleDep struct {
	file  map[string]string
	needs map[string][]string
}

// parseModulesDep reads lines of `path/x.ko: path/y.ko path/z.ko`.
func parseModulesDep(text string) (*moduleDep, error) {
	d := &moduleDep{file: map[string]string{}, needs: map[string][]string{}}
	sc := bufio.NewScanner(strings.NewReader(text))
	for line := 1; sc.Scan(); line++ {
		file, needs, ok := strings.Cut(sc.Text(), ":")
		if !ok || file == "" {
			return nil, fmt.Errorf("modules.dep line %d: no colon", line)
		}
		name := moduleName(file)
		d.file[name] = file
		for _, n := range strings.Fields(needs) {
			d.needs[name] = append(d.needs[name], moduleName(n))
		}
	}
	return d, sc.Err()
}

// moduleName is what the kernel calls the module in file.
func moduleName(file string) string {
	return strings.ReplaceAll(strings.TrimSuffix(filepath.Base(file), ".ko"), "-", "_")
}

// order lists the files to load for the wanted modules: each after everything it needs, none twice.
// Modules that are in builtin are left out. Unknown names are returned apart.
func (d *moduleDep) order(wanted []string, builtin map[string]bool) (files, unknown []string) {
	done := map[string]bool{}
	var visit func(name string)
	visit = func(name string) {
		if done[name] || builtin[name] {
			return
		}
		done[name] = true // before its needs: a cycle ends here
		file, ok := d.file[name]
		if !ok {
			unknown = append(unknown, name)
			return
		}
		for _, n := range d.needs[name] {
			visit(n)
		}
		files = append(files, file)
	}
	for _, name := range wanted {
		visit(strings.ReplaceAll(name, "-", "_"))
	}
	return files, unknown
}

// loadModules loads the wanted modules and says on the console what failed; it returns a summary.
func loadModules(con *console, wanted []string) string {
	dir, err := modulesDir()
	if err != nil {
		con.say("modules: %v", err)
		return "none"
	}
	text, err := os.ReadFile(filepath.Join(dir, "modules.dep"))
	if err != nil {
		con.say("modules: %v", err)
		return "none"
	}
	dep, err := parseModulesDep(string(text))
	if err != nil {
		con.say("modules: %v", err)
		return "none"
	}
	files, unknown := dep.order(wanted, builtinModules(dir))
	if len(unknown) > 0 {
		con.say("modules: not in the image: %s", strings.Join(unknown, " "))
	}
	loaded := 0
	var absent []string
	for _, file := range files {
		switch err := insertModule(filepath.Join(dir, file)); {
		case err == nil, errors.Is(err, unix.EEXIST):
			loaded++
		case errors.Is(err, unix.ENODEV):
			// A driver that found nothing to drive, or an instruction set that this CPU lacks.
			absent = append(absent, moduleName(file))
		default:
			con.say("modules: %s: %v", moduleName(file), err)
		}
	}
	if len(absent) > 0 {
		return fmt.Sprintf("%d loaded; no hardware for %s", loaded, strings.Join(absent, " "))
	}
	return fmt.Sprintf("%d loaded", loaded)
}

func insertModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), "", 0)
}

func modulesDir() (string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", err
	}
	return filepath.Join("/lib/modules", unix.ByteSliceToString(u.Release[:])), nil
}

// builtinModules reads modules.builtin: what the kernel carries itself. A missing file means nothing.
func builtinModules(dir string) map[string]bool {
	text, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil {
		return nil
	}
	names := map[string]bool{}
	for _, line := range strings.Fields(string(text)) {
		names[moduleName(line)] = true
	}
	return names
}
