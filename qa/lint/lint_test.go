// Package lint holds the rules of DESIGN.md, section 4, that a compiler does not: who may import whom.
package lint

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"path"
	"strings"
	"testing"
)

const module = "github.com/ledge-storage/ledge"

// pkg is what go list says of a package, tests included.
type pkg struct {
	ImportPath                         string
	Imports, TestImports, XTestImports []string
}

// leaves import the standard library, their own children and the field's libraries, never one another.
var leaves = []string{"boards", "diagnostics", "nvram", "raid", "target"}

// only maps a library to the one package that may import it.
var only = map[string]string{
	"github.com/vishvananda/netlink":    "firmware/network",
	"github.com/klauspost/reedsolomon":  "raid, qa",
	"github.com/minio/sha256-simd":      "host/dedup",
	"github.com/gostor/gotgt":           "target/gotgt, qa",
	"github.com/u-root/gobusybox":       "image",
	"github.com/diskfs/go-diskfs":       "image",
	"github.com/spf13/cobra":            "host/ledge",
	"github.com/vishvananda/netns":      "firmware/network",
	"github.com/anishathalye/porcupine": "qa, target, nvram, raid, firmware/ha, host/store",
}

// topLevel is the fixed list of directories that hold packages.
var topLevel = "boards diagnostics firmware host image nvram raid target qa"

func packages(t *testing.T) []pkg {
	t.Helper()
	out, err := exec.Command("go", "list", "-e", "-json=ImportPath,Imports,TestImports,XTestImports", module+"/...").Output()
	if err != nil {
		t.Fatal(err)
	}
	var all []pkg
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

// inside says whether the package is dir or below it; dir is relative to the module.
func inside(importPath, dir string) bool {
	full := module + "/" + dir
	return importPath == full || strings.HasPrefix(importPath, full+"/")
}

// forbidden returns why package from must not import to, or "".
func forbidden(from, to string, test bool) string {
	for _, leaf := range leaves {
		if inside(from, leaf) && strings.HasPrefix(to, module+"/") && !inside(to, leaf) {
			return leaf + " is a leaf: it imports nothing of this repository outside itself"
		}
	}
	if inside(from, "host") && inside(to, "firmware") {
		return "host never imports firmware"
	}
	if inside(to, "qa") && !inside(from, "qa") {
		return "nothing imports qa"
	}
	for library, dirs := range only {
		if to != library && !strings.HasPrefix(to, library+"/") {
			continue
		}
		for _, dir := range strings.Split(dirs, ", ") {
			if inside(from, dir) || test && inside(from, "qa") {
				return ""
			}
		}
		return library + " is imported in " + dirs + " only"
	}
	return ""
}

func TestImports(t *testing.T) {
	all := packages(t)
	if len(all) < 10 {
		t.Fatalf("only %d packages: go list looked elsewhere", len(all))
	}
	for _, p := range all {
		for _, list := range []struct {
			imports []string
			test    bool
		}{{p.Imports, false}, {p.TestImports, true}, {p.XTestImports, true}} {
			for _, to := range list.imports {
				if why := forbidden(p.ImportPath, to, list.test); why != "" {
					t.Errorf("%s imports %s: %s", p.ImportPath, to, why)
				}
			}
		}
		top, _, _ := strings.Cut(strings.TrimPrefix(p.ImportPath, module+"/"), "/")
		if !strings.Contains(" "+topLevel+" ", " "+top+" ") {
			t.Errorf("%s: the top level is fixed: %s", p.ImportPath, topLevel)
		}
		for _, banned := range []string{"pkg", "internal", "util", "common"} {
			for _, element := range strings.Split(p.ImportPath, "/") {
				if element == banned {
					t.Errorf("%s: no directory is called %s", p.ImportPath, path.Base(banned))
				}
			}
		}
	}
}

// TestForbiddenCanForbid: a rule that matches nothing would never fail.
func TestForbiddenCanForbid(t *testing.T) {
	for _, c := range []struct {
		from, to string
		ok       bool
	}{
		{module + "/raid", module + "/nvram", false},
		{module + "/raid/drive", module + "/raid", true},
		{module + "/nvram/mirror", module + "/target", false},
		{module + "/host/store", module + "/firmware/shelf", false},
		{module + "/host/store", module + "/target", true},
		{module + "/firmware/shelf", module + "/raid", true},
		{module + "/firmware/shelf", module + "/qa/sim", false},
		{module + "/qa/lab", module + "/host/initiator", true},
		{module + "/firmware/init", "github.com/vishvananda/netlink", false},
		{module + "/firmware/network", "github.com/vishvananda/netlink/nl", true},
		{module + "/host/store", "github.com/minio/sha256-simd", false},
		{module + "/raid", "github.com/klauspost/reedsolomon", true},
		{module + "/nvram", "github.com/klauspost/reedsolomon", false},
		{module + "/nvram", "github.com/klauspost/compress/zstd", true},
	} {
		if why := forbidden(c.from, c.to, false); (why == "") != c.ok {
			t.Errorf("%s → %s: %q", c.from, c.to, why)
		}
	}
}
