package agent

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/ledge-storage/ledge/target/iscsi"
)

const (
	kib = 1 << 10
	mib = 1 << 20
	gib = 1 << 30
	tib = 1 << 40

	maxConfigBytes = 64 << 10
	maxAPIs        = 8
)

// Config of an agent. The JSON file has the same names; sizes are numbers of bytes or strings such as
// "16GiB". A zero in brackets is what an absent field means.
//
//	{
//	  "name": "demo-host",                          host's name at the shelf: [a-z0-9][a-z0-9-]{0,39}
//	  "initiator": "iqn.2026-11.io.ledge:demo",     [iqn.2026-11.io.ledge:host.<name>]
//	  "shelf": {"apis": ["http://127.0.0.1:8081", "unix:/run/a.sock"], "token": "…"},
//	  "listen": "127.0.0.1:3260",                   the volumes' portal
//	  "portal": "host.example:3260",                the address that initiators are told [listen]
//	  "api": "run/hostd.sock",                      the operator's socket
//	  "cache": {"path": "run/cache.img", "size": "4GiB"},   [no cache]
//	  "journal_bytes": "256MiB", "store_bytes": "64TiB",
//	  "memory": {"buffer": "64MiB", "map": "1GiB", "index": "64MiB", "lines": "64MiB"},   [64MiB, 1GiB, by the cache's size, 64MiB]
//	  "chap": [{"initiator": "iqn…", "volumes": ["db"], "user": "…", "secret": "…",
//	            "mutual_user": "…", "mutual_secret": "…"}],   who may use the volumes; see CHAP below [everybody]
//	  "snapshots": [{"name": "hourly", "volumes": ["db", "db-log"], "every": "1h", "keep": 24}],   taken by themselves, of all
//	                                                volumes of an entry at one instant (schedule.go) [none]
//	  "spin_us": 0,                                 look for an initiator's next command this long before sleeping: less
//	                                                latency for one command at a time, for up to as much of a core [0]
//	  "log_level": "info"
//	}
//
// CHAP: with entries, an initiator logs in, for discovery too, by the entry with its name, or where none has it, by one
// without "initiator", and to the "volumes" of the entry [all]; everybody else is refused. A secret has 12 to 128 bytes
// (RFC 7143 9.2.1); "secret_file" and "mutual_secret_file" name files in its place. Neither those files nor a
// configuration with entries may be open to everybody. The target proves itself where the initiator asks and
// the entry has mutual_user and its secret.
type Config struct {
	Name, Initiator          string
	ShelfAPIs                []string
	ShelfToken               string
	Listen, Portal           string
	API                      string
	CachePath                string
	CacheBytes               int64
	JournalBytes, StoreBytes int64
	BufferBytes, MapBytes    int64 // zero: the store's own
	IndexBytes, LineBytes    int64
	CHAP                     iscsi.Users
	Snapshots                []Schedule
	Spin                     time.Duration
	LogLevel                 slog.Level
}

// ErrConfig: a configuration is wrong; the error names every field that is, its value and what is allowed.
var ErrConfig = errors.New("bad configuration")

// LoadConfig reads a file.
func LoadConfig(path string) (Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return Config{}, fmt.Errorf("%w: %w", ErrConfig, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return Config{}, fmt.Errorf("%w: %w", ErrConfig, err)
	}
	if info.Size() > maxConfigBytes {
		return Config{}, fmt.Errorf("%w: %s has %d bytes; at most %d are read", ErrConfig, path, info.Size(), maxConfigBytes)
	}
	b, err := io.ReadAll(f)
	if err != nil {
		return Config{}, fmt.Errorf("%w: %w", ErrConfig, err)
	}
	c, err := ParseConfig(b)
	if err == nil && len(c.CHAP) > 0 {
		if err := iscsi.CheckPrivate(f); err != nil {
			return Config{}, fmt.Errorf("%w: field \"chap\": %w", ErrConfig, err)
		}
	}
	if err != nil {
		return c, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

var (
	hostName      = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,39}$`)
	initiatorName = regexp.MustCompile(`^(iqn|eui|naa)\.[a-z0-9.:-]{1,219}$`)
	levels        = map[string]slog.Level{"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError}
)

// ParseConfig reads JSON and checks all of it.
func ParseConfig(b []byte) (Config, error) {
	c := Config{Listen: "127.0.0.1:3260", API: "run/hostd.sock", JournalBytes: 256 * mib, StoreBytes: 64 * tib}
	if err := syntax(b); err != nil {
		return c, fmt.Errorf("%w: %w", ErrConfig, err)
	}
	var errs []error
	o := parseObject(b, "", &errs)
	o.text("name", &c.Name, "1 to 40 of a-z, 0-9 and -, not beginning with -", hostName.MatchString)
	c.Initiator = "iqn.2026-11.io.ledge:host." + c.Name
	o.text("initiator", &c.Initiator, "an iSCSI name in lower case, such as iqn.2026-11.io.ledge:host.demo", initiatorName.MatchString)
	if s, present := o.sub("shelf"); s != nil {
		s.list("apis", &c.ShelfAPIs, fmt.Sprintf("1 to %d addresses: http://host:port, https://host:port or unix:/path", maxAPIs),
			func(v string) bool { return api.CheckAddress(v) == nil }, maxAPIs)
		s.text("token", &c.ShelfToken, "at most 512 visible ASCII characters", visible)
		s.end()
	} else if !present {
		o.missing("shelf", `{"apis": […], "token": "…"}`)
	}
	o.text("listen", &c.Listen, "address:port with a numeric port", address)
	o.text("portal", &c.Portal, "host:port with a numeric port other than 0", func(v string) bool { return v == "" || address(v) && !strings.HasSuffix(v, ":0") && v[0] != ':' })
	o.text("api", &c.API, "the path of a unix socket, 1 to 100 bytes", func(v string) bool { return len(v) > 0 && len(v) <= 100 && !strings.ContainsRune(v, 0) })
	if s, _ := o.sub("cache"); s != nil {
		s.text("path", &c.CachePath, "the path of a file or a block device", func(v string) bool { return v != "" && !strings.ContainsRune(v, 0) })
		if c.CacheBytes = 0; s.fields["size"] == nil {
			s.missing("size", "a size from 64 MiB to 64 TiB")
		}
		s.size("size", &c.CacheBytes, 64*mib, 64*tib, 4*kib)
		s.end()
	}
	o.size("journal_bytes", &c.JournalBytes, 64*mib, 64*gib, 8*mib)
	// The store LUN is thin and its segments' numbers are never used again, so it is made far larger than the
	// pool: at 1 TiB, numbers for 131072 segments, of which every opening may skip some.
	o.size("store_bytes", &c.StoreBytes, tib, 2048*tib, 8*mib)
	if s, _ := o.sub("memory"); s != nil {
		s.size("buffer", &c.BufferBytes, 8*mib, 4*gib, 4*kib)
		s.size("map", &c.MapBytes, 16*mib, 64*gib, 4*kib)
		s.size("index", &c.IndexBytes, leastIndex, mostIndex, 4*kib)
		s.size("lines", &c.LineBytes, 4*mib, 64*gib, 4*kib)
		s.end()
	}
	c.CHAP = o.users("chap")
	c.Snapshots = o.schedules("snapshots")
	micros := int64(0)
	o.number("spin_us", &micros, 0, iscsi.MaxSpin.Microseconds(), "microseconds")
	c.Spin = time.Duration(micros) * time.Microsecond
	level := "info"
	o.text("log_level", &level, "debug, info, warn or error", func(v string) bool { _, ok := levels[v]; return ok })
	c.LogLevel = levels[level]
	o.end()
	if len(errs) > 0 {
		return c, fmt.Errorf("%w: %w", ErrConfig, errors.Join(errs...))
	}
	return c, nil
}

func visible(s string) bool {
	return len(s) <= 512 && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' })
}

func address(v string) bool {
	host, port, err := net.SplitHostPort(v)
	if err != nil || strings.ContainsAny(host, " /") {
		return false
	}
	n, err := strconv.ParseUint(port, 10, 16)
	return err == nil && strconv.FormatUint(n, 10) == port
}

// Check looks at what the configuration names on this host, without changing anything.
func (c *Config) Check() error {
	var errs []error
	for _, d := range []struct{ field, path string }{{"api", c.API}, {"cache.path", c.CachePath}} {
		if d.path == "" {
			continue
		}
		dir := filepath.Dir(d.path)
		if info, err := os.Stat(dir); err != nil || !info.IsDir() {
			errs = append(errs, fmt.Errorf("field %q: value %q: directory %s does not exist", d.field, d.path, dir))
		}
	}
	if len(errs) > 0 {
		return fmt.Errorf("%w: %w", ErrConfig, errors.Join(errs...))
	}
	return nil
}
