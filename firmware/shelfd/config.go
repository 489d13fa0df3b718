package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/ledge-storage/ledge/firmware/control"
	"github.com/ledge-storage/ledge/nvram/region"
	"github.com/ledge-storage/ledge/target/iscsi"
)

// Config is the configuration file: one strict JSON object. README of a field is its rule in check.
type Config struct {
	// Shelf is the shelf's name, the same on both controllers; Controller is "A" or "B".
	Shelf      string `json:"shelf"`
	Controller string `json:"controller"`
	// Secret authenticates the two controllers to each other on the mirror link.
	Secret string `json:"secret"`
	// APIToken is asked of clients of the API; it may be empty only where the API listens on a unix socket.
	APIToken string `json:"api_token"`
	// APIListen is host:port or unix:/path.
	APIListen string `json:"api_listen"`
	// PortalListen is where iSCSI listens: host:port or :port. Default ":3260".
	PortalListen string `json:"portal_listen"`
	// Portals are the addresses that initiators use, by controller.
	Portals map[string][]string `json:"portals"`
	// Drives are paths or glob patterns of the members.
	Drives []string     `json:"drives"`
	NVRAM  NVRAMConfig  `json:"nvram"`
	Mirror MirrorConfig `json:"mirror"`
	// Array shapes a new pool; later starts take it from the labels.
	Array ArrayConfig `json:"array"`
	// Maintenance rules rebuild and scrub in the background; see maintenance.go.
	Maintenance MaintenanceConfig `json:"maintenance"`
	// CHAP is who may log in. With entries, an initiator does by the entry with its name, or where none has it, by one
	// without; everybody else is refused, but agents, who have their secrets by their claims. Without entries any
	// initiator uses the plain LUNs.
	CHAP []CHAPConfig `json:"chap"`
	// SpinMicros is how long a connection looks for an initiator's next command, and the link for the partner's next message, before
	// it sleeps, in microseconds: less latency for one command at a time, for up to as much of a core each. Default 0.
	SpinMicros int64 `json:"spin_us"`
	// LogLevel is debug, info, warn or error. Default "info".
	LogLevel string `json:"log_level"`

	users iscsi.Users // of CHAP
}

// CHAPConfig is an entry of chap. A secret has 12 to 128 bytes (RFC 7143 9.2.1) and stands here or in the file named;
// neither that file nor this one may be open to everybody then.
type CHAPConfig struct {
	Initiator        string `json:"initiator"`
	User             string `json:"user"`
	Secret           string `json:"secret"`
	SecretFile       string `json:"secret_file"`
	MutualUser       string `json:"mutual_user"`
	MutualSecret     string `json:"mutual_secret"`
	MutualSecretFile string `json:"mutual_secret_file"`
}

// NVRAMConfig names the NVRAM region. Size is needed where Path is a file that does not exist yet. Kind is what Path
// must be (package region); TrustPLP vouches for an SSD with a write-back cache.
type NVRAMConfig struct {
	Path     string      `json:"path"`
	Size     int64       `json:"size"`
	Kind     region.Kind `json:"kind"`
	TrustPLP bool        `json:"trust_plp"`
}

// MirrorConfig has one of the first two: one controller listens, the other dials. host:port, unix:/path, or window:/path: that
// window and nothing else. Window, beside them, is memory that both controllers have mapped (package nvram/mirror/window); the link uses it
// where both have it, and the address where not (package nvram/mirror/fallback). WindowCreate makes a file that is not there:
// for two processes of one machine.
type MirrorConfig struct {
	Listen       string `json:"listen"`
	Dial         string `json:"dial"`
	Window       string `json:"window"`
	WindowCreate bool   `json:"window_create"`
}

// ArrayConfig is the geometry of a new pool. Default 8 data, 2 parity, and the distributed spare that package
// raid chooses.
type ArrayConfig struct {
	Data   int `json:"data"`
	Parity int `json:"parity"`
}

const (
	maxConfigBytes = 64 << 10
	minNVRAMBytes  = 16 << 20
	maxNVRAMBytes  = 64 << 30
	minSecretBytes = 16
	maxDrives      = 64
	maxUsers       = 256
	maxSunPath     = 107
)

// LoadConfig reads and checks path. The error names each wrong field.
func LoadConfig(path string) (*Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() > maxConfigBytes {
		return nil, fmt.Errorf("%s: %d bytes, at most %d are read", path, info.Size(), maxConfigBytes)
	}
	text, err := io.ReadAll(f)
	if err != nil {
		return nil, err
	}
	c, err := ParseConfig(text)
	if err == nil && len(c.users) > 0 {
		err = iscsi.CheckPrivate(f)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// ParseConfig decodes, fills in defaults and checks.
func ParseConfig(text []byte) (*Config, error) {
	c := &Config{}
	if err := control.Strict(text, c); err != nil {
		return nil, err
	}
	if c.PortalListen == "" {
		c.PortalListen = ":3260"
	}
	if c.LogLevel == "" {
		c.LogLevel = "info"
	}
	if c.Array == (ArrayConfig{}) {
		c.Array = ArrayConfig{Data: 8, Parity: 2}
	}
	if err := c.check(); err != nil {
		return nil, err
	}
	return c, nil
}

var shelfPattern = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,31}$`)

// check looks at every field, so that one run names all that is wrong.
func (c *Config) check() error {
	var bad []error
	wrong := func(field string, value any, allowed string) {
		bad = append(bad, fmt.Errorf("field %q: %s; %s", field, quoteValue(value), allowed))
	}
	if !shelfPattern.MatchString(c.Shelf) {
		wrong("shelf", c.Shelf, "1 to 32 of a-z, 0-9 and '-', beginning with a letter or digit")
	}
	if c.Controller != "A" && c.Controller != "B" {
		wrong("controller", c.Controller, `"A" or "B"`)
	}
	if len(c.Secret) < minSecretBytes || len(c.Secret) > 1024 {
		// Its value is never shown.
		bad = append(bad, fmt.Errorf("field %q: %d bytes; %d to 1024, the same on both controllers", "secret", len(c.Secret), minSecretBytes))
	}
	if why := checkListen(c.APIListen, true); why != "" {
		wrong("api_listen", c.APIListen, why)
	}
	if c.APIToken == "" && !strings.HasPrefix(c.APIListen, "unix:") {
		bad = append(bad, errors.New(`field "api_token": empty; a token is required unless api_listen is unix:/path`))
	} else if len(c.APIToken) > 1024 || strings.ContainsFunc(c.APIToken, func(r rune) bool { return r <= ' ' || r > '~' }) {
		bad = append(bad, fmt.Errorf(`field "api_token": %d bytes; at most 1024 of printable ASCII without spaces`, len(c.APIToken)))
	}
	if why := checkListen(c.PortalListen, false); why != "" {
		wrong("portal_listen", c.PortalListen, why)
	}
	bad = append(bad, c.checkCHAP())
	c.checkPortals(wrong)
	c.checkDrives(wrong)
	c.checkNVRAM(wrong)
	c.checkWindow(wrong)
	switch {
	case (c.Mirror.Listen == "") == (c.Mirror.Dial == ""):
		bad = append(bad, errors.New(`field "mirror": exactly one of "listen" and "dial" must be set; one controller listens, the other dials`))
	case c.Mirror.Listen != "":
		if why := checkMirror(c.Mirror.Listen, checkListen); why != "" {
			wrong("mirror.listen", c.Mirror.Listen, why)
		}
	default:
		if why := checkMirror(c.Mirror.Dial, checkDial); why != "" {
			wrong("mirror.dial", c.Mirror.Dial, why)
		}
	}
	if c.Array.Data < 1 || c.Array.Data > 32 {
		wrong("array.data", c.Array.Data, "1 to 32 data strips")
	}
	if c.Array.Parity < 1 || c.Array.Parity > 4 {
		wrong("array.parity", c.Array.Parity, "1 to 4 parity strips")
	}
	c.checkMaintenance(wrong)
	if most := iscsi.MaxSpin.Microseconds(); c.SpinMicros < 0 || c.SpinMicros > most {
		wrong("spin_us", c.SpinMicros, fmt.Sprintf("0 to %d microseconds", most))
	}
	if _, ok := logLevels[c.LogLevel]; !ok {
		wrong("log_level", c.LogLevel, "debug, info, warn or error")
	}
	return errors.Join(bad...)
}

var logLevels = map[string]slog.Level{"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError}

// checkCHAP reads the secrets. Errors never show one.
func (c *Config) checkCHAP() error {
	if len(c.CHAP) > maxUsers {
		return fmt.Errorf("field %q: %d entries; at most %d", "chap", len(c.CHAP), maxUsers)
	}
	var bad []error
	secret := func(field, inline, path string) string {
		switch {
		case inline != "" && path != "":
			bad = append(bad, fmt.Errorf("field %q: one of it and %q, not both", field, field+"_file"))
		case path != "":
			s, err := iscsi.ReadSecret(path)
			if err != nil {
				bad = append(bad, fmt.Errorf("field %q: %w", field+"_file", err))
			}
			return s
		}
		return inline
	}
	for i, e := range c.CHAP {
		field := fmt.Sprintf("chap[%d]", i)
		if e.Initiator != strings.ToLower(e.Initiator) || control.IsClaim(e.Initiator) || strings.ContainsAny(e.Initiator, " \t\n") {
			bad = append(bad, fmt.Errorf("field %q: %s; an iSCSI name in lower case that no claim gives", field+".initiator", quoteValue(e.Initiator)))
		}
		c.users = append(c.users, iscsi.User{Initiator: e.Initiator, CHAP: iscsi.CHAP{
			User: e.User, Secret: secret(field+".secret", e.Secret, e.SecretFile),
			MutualUser: e.MutualUser, MutualSecret: secret(field+".mutual_secret", e.MutualSecret, e.MutualSecretFile)}})
	}
	if len(bad) == 0 {
		if err := c.users.Check(); err != nil {
			bad = append(bad, fmt.Errorf("field %q: %w", "chap", err))
		}
	}
	return errors.Join(bad...)
}

func (c *Config) checkPortals(wrong func(string, any, string)) {
	for name, list := range c.Portals {
		if name != "A" && name != "B" {
			wrong("portals", name, `the keys are "A" and "B"`)
			continue
		}
		if len(list) > 16 {
			wrong("portals."+name, len(list), "at most 16 addresses")
		}
		for i, p := range list {
			if why := checkDial(p, false); why != "" {
				wrong(fmt.Sprintf("portals.%s[%d]", name, i), p, why)
			}
		}
	}
	for _, name := range []string{"A", "B"} {
		if len(c.Portals[name]) == 0 {
			wrong("portals."+name, []string{}, "at least one host:port at which initiators reach controller "+name)
		}
	}
}

func (c *Config) checkDrives(wrong func(string, any, string)) {
	if len(c.Drives) == 0 || len(c.Drives) > maxDrives {
		wrong("drives", len(c.Drives), "1 to 64 paths or patterns, as /dev/sd*")
	}
	for i, d := range c.Drives {
		field := fmt.Sprintf("drives[%d]", i)
		switch _, err := filepath.Match(d, "x"); {
		case !filepath.IsAbs(d):
			wrong(field, d, "an absolute path or pattern")
		case err != nil:
			wrong(field, d, "the pattern is malformed (* ? [a-z] are known)")
		}
	}
}

func (c *Config) checkNVRAM(wrong func(string, any, string)) {
	if !filepath.IsAbs(c.NVRAM.Path) {
		wrong("nvram.path", c.NVRAM.Path, "an absolute path of a device or file")
	}
	if k := c.NVRAM.Kind; k != "" && !slices.Contains(region.Kinds, k) {
		wrong("nvram.kind", k, "dax, pmem, ssd, file, or nothing: whatever the path is")
	}
	if s := c.NVRAM.Size; s != 0 && (s < minNVRAMBytes || s > maxNVRAMBytes || s%8192 != 0) {
		wrong("nvram.size", s, fmt.Sprintf("0 (the device's own size), or %d to %d bytes, a multiple of 8192", minNVRAMBytes, int64(maxNVRAMBytes)))
	}
}

func (c *Config) checkWindow(wrong func(string, any, string)) {
	m := c.Mirror
	only := strings.HasPrefix(m.Listen+m.Dial, "window:")
	switch {
	case m.Window != "" && only:
		wrong("mirror.window", m.Window, `not beside window:/path: "listen" or "dial" is what stands in for the window`)
	case m.Window != "" && !filepath.IsAbs(m.Window):
		wrong("mirror.window", m.Window, "an absolute path of a PCI device's BAR, or of a file")
	case m.WindowCreate && m.Window == "" && !only:
		wrong("mirror.window_create", m.WindowCreate, `only with "window"`)
	}
}

// checkListen says what is wrong with an address to listen on; "" where nothing is.
func checkListen(addr string, unix bool) string {
	if path, ok := strings.CutPrefix(addr, "unix:"); ok && unix {
		return checkSocket(path)
	}
	if _, port, err := net.SplitHostPort(addr); err != nil || !validPort(port, true) {
		if unix {
			return "host:port, :port or unix:/path"
		}
		return "host:port or :port"
	}
	return ""
}

// checkDial is for an address that somebody connects to: host and port are needed.
func checkDial(addr string, unix bool) string {
	if path, ok := strings.CutPrefix(addr, "unix:"); ok && unix {
		return checkSocket(path)
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil || host == "" || strings.ContainsAny(host, " \t/") || !validPort(port, false) {
		if unix {
			return "host:port or unix:/path"
		}
		return "host:port"
	}
	return ""
}

// checkMirror is for the mirror link, which may also be a window.
func checkMirror(addr string, check func(addr string, unix bool) string) string {
	if path, ok := strings.CutPrefix(addr, "window:"); ok {
		if !filepath.IsAbs(path) {
			return "window:/path, absolute"
		}
		return ""
	}
	if why := check(addr, true); why != "" {
		return why + ", or window:/path"
	}
	return ""
}

func checkSocket(path string) string {
	if !filepath.IsAbs(path) || len(path) > maxSunPath {
		return fmt.Sprintf("unix:/path, absolute and at most %d bytes", maxSunPath)
	}
	return ""
}

// validPort: a number; zero (any free port) only for listening.
func validPort(port string, zero bool) bool {
	n, err := strconv.ParseUint(port, 10, 16)
	return err == nil && (n > 0 || zero)
}

func quoteValue(v any) string {
	s := fmt.Sprintf("%q", fmt.Sprint(v))
	if len(s) > 80 {
		s = s[:80] + `…"`
	}
	return s
}
