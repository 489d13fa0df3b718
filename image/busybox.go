package main

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"sort"
	"strings"

	"github.com/u-root/gobusybox/src/pkg/bb"
	"github.com/u-root/gobusybox/src/pkg/golang"
)

// rescueCommands are u-root's commands on the console of a controller in trouble: look, do not repair. Each
// is imported in tools.go, or go mod tidy would drop what it needs.
var rescueCommands = []string{
	"cat", "chmod", "cmp", "cp", "date", "dd", "df", "dmesg", "du", "echo", "find", "free", "gosh", "grep",
	"head", "hexdump", "id", "insmod", "ip", "kill", "ln", "ls", "lsmod", "mkdir", "mknod", "more", "mount",
	"mv", "netstat", "pci", "ping", "printenv", "ps", "pwd", "rm", "rmmod", "shutdown", "sleep",
	"sort", "strace", "strings", "stty", "sync", "tail", "tee", "time", "timeout", "touch", "tr", "umount", "uname",
	"uniq", "uptime", "wc", "wget",
}

// shellTag builds gosh without its line editor: that one asks the terminal where its cursor is and waits for
// an answer, which a bare serial line never gives.
const shellTag = "goshsmall"

const commandRoot = "github.com/u-root/u-root/cmds/core/"

// busyboxKey is everything that decides the busybox's bytes: commands, Go, and the versions of u-root's
// modules and of all that they may import (go.sum has both).
func busyboxKey(tree string) (string, error) {
	sum, err := os.ReadFile(filepath.Join(tree, "go.sum"))
	if err != nil {
		return "", err
	}
	mod, err := os.ReadFile(filepath.Join(tree, "go.mod"))
	if err != nil {
		return "", err
	}
	h := sha256.New()
	io.WriteString(h, goVersion()+" amd64\n"+strings.Join(rescueCommands, " ")+"\n"+shellTag+"\n")
	for _, line := range strings.Split(string(sum), "\n") {
		if strings.HasPrefix(line, "github.com/u-root/") {
			io.WriteString(h, line+"\n")
		}
	}
	// Selected versions: the require lines, without their comments and order.
	lines := requireForm.FindAllString(string(mod), -1)
	sort.Strings(lines)
	io.WriteString(h, strings.Join(lines, "\n"))
	return hex.EncodeToString(h.Sum(nil))[:16], nil
}

var requireForm = regexp.MustCompile(`(?m)^\s+\S+/\S+ v\S+`)

func goVersion() string { return runtime.Version() }

// addBusybox puts u-root's commands into /bbin, building them when no build of these inputs is cached.
func addBusybox(a *archive, o Options) error {
	key, err := busyboxKey(o.Tree)
	if err != nil {
		return err
	}
	cached, err := filepath.Abs(filepath.Join(o.Cache, "busybox-"+key))
	if err != nil {
		return err
	}
	if _, err := os.Stat(cached); err != nil {
		o.Say("busybox     building %d commands of u-root (a minute; once)", len(rescueCommands))
		if err := buildBusybox(cached); err != nil {
			return fmt.Errorf("busybox: %w", err)
		}
	}
	data, err := os.ReadFile(cached)
	if err != nil {
		return err
	}
	o.Say("busybox     %d commands, %.1f MB", len(rescueCommands), float64(len(data))/1e6)
	a.file("bbin/bb", data, 0o755)
	for _, name := range rescueCommands {
		a.symlink("bbin/"+name, "bb")
	}
	a.symlink("bin/sh", "/bbin/gosh")
	return nil
}

// buildBusybox compiles the commands; the working directory must be in the tree, whose go.mod names u-root.
func buildBusybox(out string) error {
	src, err := os.MkdirTemp(filepath.Dir(out), "busybox-src-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(src)
	var paths []string
	for _, name := range rescueCommands {
		paths = append(paths, commandRoot+name)
	}
	// A program that was built with -trimpath (GOFLAGS may say so) does not know it itself.
	goroot, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		return fmt.Errorf("go env GOROOT: %w", err)
	}
	var said strings.Builder
	err = bb.BuildBusybox(log.New(&said, "", 0), &bb.Opts{
		Env:          golang.Default(golang.DisableCGO(), golang.WithGOARCH("amd64"), golang.WithGOOS("linux"), golang.WithBuildTag(shellTag), golang.WithGOROOT(strings.TrimSpace(string(goroot)))),
		GenSrcDir:    filepath.Join(src, "bb"),
		CommandPaths: paths,
		BinaryPath:   out + ".new",
		GoBuildOpts:  &golang.BuildOpts{ExtraArgs: []string{"-buildvcs=false"}},
	})
	if err != nil {
		return fmt.Errorf("%w\n%s", err, said.String())
	}
	return os.Rename(out+".new", out)
}
