package agent

import (
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func good() map[string]any {
	return map[string]any{
		"name": "h1", "initiator": "iqn.2026-11.io.ledge:h1", "listen": "127.0.0.1:3260", "portal": "host.example:3260", "api": "run/hostd.sock",
		"shelf":         map[string]any{"apis": []any{"http://127.0.0.1:8081", "unix:/run/a.sock"}, "token": "t"},
		"cache":         map[string]any{"path": "run/cache.img", "size": "4GiB"},
		"journal_bytes": "256MiB", "store_bytes": float64(64 * tib), "log_level": "warn", "spin_us": 50,
		"memory": map[string]any{"buffer": "64MiB", "map": "1GiB", "index": "64MiB", "lines": "64MiB"},
	}
}

func parse(t *testing.T, m map[string]any) (Config, error) {
	t.Helper()
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return ParseConfig(b)
}

func TestConfig(t *testing.T) {
	c, err := parse(t, good())
	if err != nil {
		t.Fatal(err)
	}
	if c.CacheBytes != 4*gib || c.StoreBytes != 64*tib || c.LogLevel != slog.LevelWarn || len(c.ShelfAPIs) != 2 || c.MapBytes != gib {
		t.Fatalf("%+v", c)
	}
	c, err = ParseConfig([]byte(`{"name":"x","shelf":{"apis":["http://a:1"]}}`))
	if err != nil || c.Initiator != "iqn.2026-11.io.ledge:host.x" || c.Listen != "127.0.0.1:3260" || c.JournalBytes != 256*mib {
		t.Fatalf("%v, %+v", err, c)
	}
}

// Each field wrong in turn: the error names the field, the value and what is allowed.
func TestConfigWrong(t *testing.T) {
	for _, c := range []struct {
		field string
		value any
		says  string
	}{
		{"name", "Host 1", "a-z"}, {"name", 7, "a-z"}, {"name", nil, "a-z"}, {"name", strings.Repeat("x", 41), "40"},
		{"initiator", "host", "iSCSI name"}, {"initiator", "iqn.A", "lower case"},
		{"shelf", "x", "JSON object"}, {"shelf.apis", []any{}, "1 to 8"}, {"shelf.apis", "http://a", "1 to 8"}, {"shelf.apis[1]", []any{"http://a", "ftp://b"}, "unix:"},
		{"shelf.apis[0]", []any{"http://a/path"}, "unix:"}, {"shelf.token", "a b", "visible"}, {"shelf.tokens", "x", "apis, token"},
		{"listen", "3260", "port"}, {"listen", "127.0.0.1:http", "port"}, {"listen", "127.0.0.1:65536", "port"}, {"portal", "host:0", "other than 0"},
		{"api", "", "socket"}, {"api", strings.Repeat("x", 101), "100"},
		{"cache", []any{}, "JSON object"}, {"cache.path", "", "path"}, {"cache.size", "12XB", "64 MiB to 64 TiB"}, {"cache.size", "1MiB", "64 MiB to 64 TiB"}, {"cache.size", true, "64 MiB"}, {"cache.sizes", 1, "path, size"},
		{"journal_bytes", "1GB", "64 MiB to 64 GiB"}, {"journal_bytes", 1.5, "multiple of 8 MiB"}, {"journal_bytes", 67108865, "multiple of 8 MiB"}, {"store_bytes", -1, "1 TiB"}, {"store_bytes", "512GiB", "1 TiB"},
		{"memory", 3, "JSON object"}, {"memory.buffer", "1KiB", "8 MiB"}, {"memory.map", nil, "16 MiB"}, {"memory.index", "x", "4 MiB"}, {"memory.lines", "x", "4 MiB"}, {"memory.other", 1, "buffer, map, index, lines"},
		{"spin_us", 1001, "0 to 1000 microseconds"}, {"spin_us", "50us", "microseconds"}, {"spin_us", nil, "microseconds"}, {"spin_us", 1.5, "microseconds"},
		{"log_level", "loud", "debug, info, warn or error"}, {"colour", "red", "no such field"},
	} {
		m := good()
		at, name := m, c.field
		if head, tail, ok := strings.Cut(c.field, "."); ok {
			at, name = m[head].(map[string]any), tail
		}
		name, _, _ = strings.Cut(name, "[")
		at[name] = c.value
		_, err := parse(t, m)
		if !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), `field "`+c.field+`": value `) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s = %v: %v", c.field, c.value, err)
		}
		if err != nil && strings.Count(err.Error(), "field ") != 1 {
			t.Errorf("%s = %v: more than the one error: %v", c.field, c.value, err)
		}
	}
	for _, field := range []string{"name", "shelf", "shelf.apis", "cache.size", "cache.path"} {
		m := good()
		at, name := m, field
		if head, tail, ok := strings.Cut(field, "."); ok {
			at, name = m[head].(map[string]any), tail
		}
		delete(at, name)
		if _, err := parse(t, m); !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), `field "`+field+`": missing`) {
			t.Errorf("without %s: %v", field, err)
		}
	}
	for text, says := range map[string]string{"": "line 1", "{\n\"name\": }": "line 2", "{} {}": "follows", "[]": "the whole file", `{"name":"a","name":"b","shelf":{"apis":["http://a:1"]}}`: "only once"} {
		if _, err := ParseConfig([]byte(text)); !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func FuzzConfig(f *testing.F) {
	b, _ := json.Marshal(good())
	f.Add(b)
	f.Add([]byte(`{"name":"x","shelf":{"apis":["http://a:1"]},"cache":{"path":"p","size":"1.5GiB"}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := ParseConfig(b)
		if err == nil && (c.Name == "" || len(c.ShelfAPIs) == 0 || c.JournalBytes <= 0) {
			t.Fatalf("%+v", c)
		}
	})
}

// TestCHAPConfig: who may log in; no secret in an error, none in a file that everybody can read.
func TestCHAPConfig(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "secret")
	write := func(path, text string, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	write(file, "hush, from a file\n", 0o600)
	m := good()
	m["chap"] = []any{
		map[string]any{"initiator": "iqn.a", "volumes": []any{"db"}, "user": "u", "secret": "hush, the first", "mutual_user": "t", "mutual_secret_file": file},
		map[string]any{"user": "any", "secret": "hush, the second"},
	}
	c, err := parse(t, m)
	if err != nil {
		t.Fatal(err)
	}
	if got := c.CHAP.Auth("iqn.a", IQN("db")); got.User != "u" || got.MutualSecret != "hush, from a file" {
		t.Errorf("%+v", got)
	}
	if got := c.CHAP.Auth("iqn.a", IQN("other")); got.User == "u" || got.User == "any" {
		t.Error("an entry for one volume is for others")
	}
	if got := c.CHAP.Auth("iqn.z", IQN("other")); got.User != "any" {
		t.Errorf("%+v", got)
	}
	path := filepath.Join(dir, "hostd.json")
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	for mode, ok := range map[os.FileMode]bool{0o600: true, 0o640: true, 0o644: false} {
		write(path, string(b), mode)
		if _, err := LoadConfig(path); (err == nil) != ok {
			t.Errorf("a configuration of mode %04o: %v", mode, err)
		}
	}
	entry := func(k string, v any) map[string]any {
		e := map[string]any{"user": "u", "secret": "hush, long enough"}
		if e[k] = v; v == nil {
			delete(e, k)
		}
		return e
	}
	for _, c := range []struct {
		chap any
		says string
	}{
		{"hush", "1 to 256 entries"}, {[]any{}, "1 to 256 entries"}, {[]any{"hush"}, "JSON object"}, {[]any{entry("secret", "hush")}, "12 to 128"}, {[]any{entry("secret", 7)}, "12 to 128"},
		{[]any{entry("secret", nil)}, `"secret_file"`}, {[]any{entry("secret_file", file)}, "not both"}, {[]any{entry("mutual_secret", "hush, but whose?")}, "belong together"},
		{[]any{entry("mutual_secret_file", file+".none")}, "no such file"}, {[]any{entry("sekret", "hush, misspelt")}, "no such field"}, {[]any{entry("user", "hush hush")}, "255 visible"},
		{[]any{entry("volumes", []any{"Not A Name"})}, "names of volumes"}, {[]any{entry("initiator", "hush")}, "iSCSI name"}, {[]any{entry("a", nil), entry("a", nil)}, "another entry"},
	} {
		m["chap"] = c.chap
		if _, err := parse(t, m); err == nil || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "hush") {
			t.Errorf("%v: %v, want %q and no secret", c.chap, err, c.says)
		}
	}
}
