// Package boards owns what Ledge knows about machines: one JSON file per board, and the loader that
// refuses a file that is not exactly right. A board says which kernel modules a machine needs, where its
// NVRAM, drives, links and watchdog are, and where a controller finds its configuration. The image is
// built from the module list; PID 1 reads the rest.
//
// The loader promises that a Board it returned is complete and consistent, and that everything wrong with
// a file is named in one error, each field by its path in the file:
//
//	boards: my.json: links.partner.addresses.B: "169.254.77.2": not an address with a prefix length
//
// It never probes the machine: whether the NVRAM is there is firmware/init's question.
//
// # Fields
//
//	name                  [a-z0-9-]+, equal to the file's name; the kernel argument ledge.board=NAME chooses it
//	description           one line for people
//	console               the serial console's device in /dev, without the directory
//	kernel_args           arguments of the kernel's command line that the board always needs
//	modules               kernel modules in load order; dependencies are found, soft dependencies listed here
//	config.kind, .name    where the controller's configuration comes from: "fw_cfg" and the file's name there, or
//	                      "disk": the boot disk (image/disk.go)
//	config.disk_modules   modules for reading the boot disk; with fw_cfg optional: for a machine without the file there
//	nvram.kind, .path     "pmem", "dax", "ssd" or "file", and its device
//	nvram.trust_plp       optional, ssd only: the drive has power-loss protection, though the kernel sees a write-back cache
//	links.management      the NIC of portal and API: PCI or MAC address, address of each controller, gateway
//	links.partner         the NIC of the mirror link: the two addresses differ and share a network
//	mirror_port           TCP port of the mirror link; A listens, B dials
//	mirror_window         optional: memory that both controllers see, for the mirror link: the file of a PCI device's BAR (a
//	                      non-transparent bridge's window, ivshmem), below /sys/bus/pci/devices. TCP stands in for it
//	drives.globs, .count  where the shared drives appear, and how many a complete shelf has
//	watchdog              optional: device and time after which the machine is reset, 2 s to 255 s
package boards

import (
	"bytes"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"path"
	"sort"
	"strings"
	"time"
)

//go:embed *.json
var files embed.FS

// ErrUnknown is returned for a board that no file describes.
var ErrUnknown = errors.New("boards: unknown board")

// Board describes one kind of machine. See the package comment for the fields.
type Board struct {
	Name        string   `json:"name"`
	Description string   `json:"description"`
	Console     string   `json:"console"`
	KernelArgs  []string `json:"kernel_args"`
	Modules     []string `json:"modules"`
	Config      Config   `json:"config"`
	NVRAM       NVRAM    `json:"nvram"`
	Links       Links    `json:"links"`
	MirrorPort  int      `json:"mirror_port"`
	// MirrorWindow is empty on a machine without one.
	MirrorWindow string `json:"mirror_window,omitempty"`
	Drives       Drives `json:"drives"`
	// Watchdog is nil on a machine without one.
	Watchdog *Watchdog `json:"watchdog,omitempty"`
}

// Config says where a controller finds its configuration.
type Config struct {
	// Kind is "fw_cfg", a file that the hypervisor passes in, or "disk", a file on the boot disk.
	Kind string `json:"kind"`
	// Name is the file's with fw_cfg, else empty.
	Name string `json:"name,omitempty"`
	// DiskModules are loaded when the configuration is looked for on the boot disk: drivers of the disk and of FAT.
	// With fw_cfg that is when the file is not there; empty: it is not looked for.
	DiskModules []string `json:"disk_modules,omitempty"`
}

// NVRAM says what holds the log.
type NVRAM struct {
	Kind string `json:"kind"`
	Path string `json:"path"`
	// TrustPLP vouches for an SSD with a write-back cache: it has power-loss protection. Without it such a drive is refused.
	TrustPLP bool `json:"trust_plp,omitempty"`
}

// Links are the controller's network interfaces.
type Links struct {
	Management Link `json:"management"`
	Partner    Link `json:"partner"`
}

// Link is one interface. Device is a PCI address (0000:00:04.0) or a MAC address: names like eth0 depend
// on the order in which drivers probe, so a board never uses them.
type Link struct {
	Device    string            `json:"device"`
	Addresses map[string]string `json:"addresses"`
	Gateway   string            `json:"gateway,omitempty"`
}

// Address is the link's address on controller "A" or "B".
func (l Link) Address(controller string) netip.Prefix {
	p, _ := netip.ParsePrefix(l.Addresses[controller])
	return p
}

// Drives says where the shared drives appear.
type Drives struct {
	Globs []string `json:"globs"`
	// Count is how many drives a complete shelf has. A shelf starts with fewer after a time.
	Count int `json:"count"`
}

// Watchdog is the hardware that resets a hung controller.
type Watchdog struct {
	Path           string `json:"path"`
	TimeoutSeconds int    `json:"timeout_seconds"`
}

// Timeout is the time without a sign of life after which the machine is reset.
func (w Watchdog) Timeout() time.Duration { return time.Duration(w.TimeoutSeconds) * time.Second }

// Names lists the boards, sorted.
func Names() []string {
	entries, err := files.ReadDir(".")
	if err != nil {
		panic(err) // an embedded directory always lists
	}
	var names []string
	for _, e := range entries {
		names = append(names, strings.TrimSuffix(e.Name(), ".json"))
	}
	sort.Strings(names)
	return names
}

// Load returns the board of that name, or ErrUnknown.
func Load(name string) (*Board, error) {
	data, err := files.ReadFile(path.Base(name) + ".json")
	if err != nil || path.Base(name) != name {
		return nil, fmt.Errorf("%w: %q; known: %s", ErrUnknown, name, strings.Join(Names(), ", "))
	}
	return Parse(name+".json", data)
}

// Parse decodes and checks a board file; file is its name, for messages and for the rule that the board
// is called like its file.
func Parse(file string, data []byte) (*Board, error) {
	b := new(Board)
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(b); err != nil {
		return nil, fmt.Errorf("boards: %s: %w", file, decodeError(data, err))
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, fmt.Errorf("boards: %s: more follows after the board's closing brace", file)
	}
	if problems := b.check(strings.TrimSuffix(path.Base(file), ".json")); len(problems) > 0 {
		for i, p := range problems {
			problems[i] = fmt.Errorf("boards: %s: %w", file, p)
		}
		return nil, errors.Join(problems...)
	}
	return b, nil
}

// decodeError puts the line, and where known the field, in front of what encoding/json says.
func decodeError(data []byte, err error) error {
	var syntax *json.SyntaxError
	var kind *json.UnmarshalTypeError
	switch {
	case errors.As(err, &syntax):
		return fmt.Errorf("line %d: %w", lineOf(data, syntax.Offset), err)
	case errors.As(err, &kind):
		return fmt.Errorf("line %d: %s: a %s where a %s belongs", lineOf(data, kind.Offset), kind.Field, kind.Value, kind.Type)
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return fmt.Errorf("line %d: the file ends inside the board", lineOf(data, int64(len(data))))
	}
	return fmt.Errorf("%s", strings.TrimPrefix(err.Error(), "json: "))
}

func lineOf(data []byte, offset int64) int {
	offset = min(offset, int64(len(data)))
	return 1 + bytes.Count(data[:offset], []byte("\n"))
}
