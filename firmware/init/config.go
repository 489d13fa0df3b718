package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/ledge-storage/ledge/boards"
)

type boardFile = boards.Board

const (
	shelfdPath = "/bin/shelfd"
	configPath = "/run/ledge/shelfd.json"
	fwCfgRoot  = "/sys/firmware/qemu_fw_cfg/by_name"
	// maxConfigBytes bounds what a hypervisor or a disk may hand us.
	maxConfigBytes = 1 << 20
)

// arguments are what the kernel's command line tells this controller about itself.
type arguments struct {
	Board, Controller string
	Rescue            bool
}

func bootArguments() arguments {
	text, _ := os.ReadFile("/proc/cmdline")
	return parseArguments(string(text))
}

func parseArguments(cmdline string) arguments {
	var a arguments
	for _, word := range strings.Fields(cmdline) {
		key, value, _ := strings.Cut(word, "=")
		switch key {
		case "ledge.board":
			a.Board = value
		case "ledge.controller":
			a.Controller = value
		case "ledge.rescue":
			a.Rescue = true
		}
	}
	return a
}

// board loads the board that the command line names. The board comes back with an error, too, when only
// the controller's letter is wrong: the console and the modules work without it. Without a letter (a burnt image,
// the same for both) the configuration has it.
func (a arguments) board() (*boardFile, error) {
	if a.Board == "" {
		return nil, errors.New("ledge.board= is not on the kernel's command line")
	}
	b, err := boards.Load(a.Board)
	if err != nil {
		return nil, err
	}
	if a.Controller != "A" && a.Controller != "B" && a.Controller != "" {
		return b, fmt.Errorf("ledge.controller=%q on the kernel's command line: a controller is A or B", a.Controller)
	}
	return b, nil
}

// config is shelfd's configuration, complete, and which controller this is.
type config struct {
	path, summary, controller string
}

// readConfig fetches the configuration from where the board says, else from the boot disk, completes it and
// writes it to configPath, readable by root only: it carries the shelf's secret. The controller's letter comes
// back with an error, too, where it is known: the links work without shelfd.
func readConfig(ctx context.Context, con *console, b *boardFile, controller string) (c config, err error) {
	if controller == "A" || controller == "B" {
		c.controller = controller
	}
	var data []byte
	from := b.Config.Name + " from fw_cfg"
	err = fs.ErrNotExist
	if b.Config.Kind == "fw_cfg" {
		data, err = readBounded(filepath.Join(fwCfgRoot, b.Config.Name, "raw"))
	}
	if errors.Is(err, fs.ErrNotExist) {
		data, from, err = readBootDisk(ctx, con, b)
	}
	if err == nil {
		c.controller, err = controllerOf(data, controller)
	}
	if err != nil {
		return c, fmt.Errorf("%s: %w", from, err)
	}
	data, added, err := completeConfig(data, b, c.controller)
	if err != nil {
		return c, fmt.Errorf("%s: %w", from, err)
	}
	if err := os.MkdirAll(filepath.Dir(configPath), 0o700); err != nil {
		return c, err
	}
	if err := os.WriteFile(configPath, data, 0o600); err != nil {
		return c, err
	}
	c.path, c.summary = configPath, fmt.Sprintf("controller %s; %s; %s from the board", c.controller, from, added)
	return c, nil
}

// controllerOf is the letter of the command line, else the configuration's.
func controllerOf(data []byte, controller string) (string, error) {
	if controller == "" {
		var says struct {
			Controller string `json:"controller"`
		}
		if err := json.Unmarshal(data, &says); err != nil {
			return "", err
		}
		controller = says.Controller
	}
	if controller != "A" && controller != "B" {
		return "", fmt.Errorf("controller: %q: a controller is A or B", controller)
	}
	return controller, nil
}

// completeConfig adds what the board knows and the configuration leaves out: controller, drives, nvram and
// mirror. What it does not know it passes on: shelfd checks each field, and names the wrong one.
func completeConfig(data []byte, b *boardFile, controller string) (complete []byte, added string, err error) {
	fields := map[string]json.RawMessage{}
	if err := json.Unmarshal(data, &fields); err != nil {
		return nil, "", err
	}
	if text, ok := fields["controller"]; ok {
		var says string
		if err := json.Unmarshal(text, &says); err != nil || says != controller {
			return nil, "", fmt.Errorf("controller: %s, but this is controller %s", text, controller)
		}
	}
	// A listens on the partner link and B dials: one of the two must, and A is there first by habit.
	a := b.Links.Partner.Address("A").Addr().String()
	mirror, way := map[string]string{}, "dial"
	if controller == "A" {
		way = "listen"
	}
	mirror[way] = net.JoinHostPort(a, strconv.Itoa(b.MirrorPort))
	if b.MirrorWindow != "" {
		mirror["window"] = b.MirrorWindow
	}
	var names []string
	for _, d := range []struct {
		name  string
		value any
	}{
		{"controller", controller},
		{"drives", b.Drives.Globs},
		{"nvram", map[string]any{"path": b.NVRAM.Path, "kind": b.NVRAM.Kind, "trust_plp": b.NVRAM.TrustPLP}},
		{"mirror", mirror},
	} {
		if _, ok := fields[d.name]; ok {
			continue
		}
		text, err := json.Marshal(d.value)
		if err != nil {
			return nil, "", err
		}
		fields[d.name] = text
		names = append(names, d.name)
	}
	complete, err = json.MarshalIndent(fields, "", "  ")
	if len(names) == 0 {
		names = []string{"nothing"}
	}
	return complete, strings.Join(names, ", "), err
}
