package main

import (
	"encoding/json"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func good() map[string]any {
	return map[string]any{
		"shelf": "s1", "controller": "A", "secret": "0123456789abcdef", "api_token": "token", "api_listen": "127.0.0.1:8443",
		"portal_listen": ":3260", "portals": map[string]any{"A": []string{"10.0.0.1:3260"}, "B": []string{"10.0.0.2:3260"}},
		"drives": []string{"/dev/sd*"}, "nvram": map[string]any{"path": "/dev/pmem0", "size": 0},
		"mirror": map[string]any{"listen": "169.254.77.1:7700"}, "log_level": "info",
	}
}

func TestConfigGood(t *testing.T) {
	text, _ := json.Marshal(good())
	c, err := ParseConfig(text)
	if err != nil || c.Array.Data != 8 {
		t.Fatal(c, err)
	}
	small := good()
	for _, k := range []string{"portal_listen", "log_level", "api_token"} {
		delete(small, k)
	}
	small["api_listen"] = "unix:/run/ledge/api.sock"
	small["mirror"] = map[string]any{"dial": "unix:/run/mirror.sock"}
	text, _ = json.Marshal(small)
	if c, err = ParseConfig(text); err != nil || c.PortalListen != ":3260" || c.LogLevel != "info" {
		t.Fatal(c, err)
	}
}

// TestConfigEachFieldWrong: the error names the field and says what is allowed.
func TestConfigEachFieldWrong(t *testing.T) {
	long := strings.Repeat("x", 200)
	for _, c := range []struct {
		field string
		value any
		says  []string
	}{
		{"shelf", "", []string{`"shelf"`, "1 to 32"}},
		{"shelf", "Shelf 1", []string{`"shelf"`, "Shelf 1"}},
		{"shelf", 7, []string{`"shelf"`, "number", "string"}},
		{"shelf", long, []string{`"shelf"`, "…"}},
		{"controller", "C", []string{`"controller"`, `"A" or "B"`}},
		{"controller", "a", []string{`"controller"`}},
		{"secret", "short", []string{`"secret"`, "5 bytes"}},
		{"api_token", "", []string{`"api_token"`, "unix"}},
		{"api_token", "has space", []string{`"api_token"`}},
		{"api_listen", "", []string{`"api_listen"`}},
		{"api_listen", "8443", []string{`"api_listen"`, "host:port"}},
		{"api_listen", "127.0.0.1:99999", []string{`"api_listen"`}},
		{"api_listen", "unix:relative", []string{`"api_listen"`, "absolute"}},
		{"api_listen", "unix:/" + long, []string{`"api_listen"`, "107"}},
		{"portal_listen", "unix:/x", []string{`"portal_listen"`}},
		{"portal_listen", "x", []string{`"portal_listen"`}},
		{"portals", map[string]any{"A": []string{"a:1"}}, []string{"portals.B"}},
		{"portals", map[string]any{"A": []string{"a:1"}, "B": []string{"b:1"}, "C": []string{"c:1"}}, []string{`"portals"`, `"C"`}},
		{"portals", map[string]any{"A": []string{":3260"}, "B": []string{"b:1"}}, []string{"portals.A[0]", ":3260"}},
		{"portals", map[string]any{"A": []string{"a:0"}, "B": []string{"b:1"}}, []string{"portals.A[0]"}},
		{"portals", "a:1", []string{`"portals"`}},
		{"drives", []string{}, []string{`"drives"`}},
		{"drives", []string{"sd*"}, []string{"drives[0]", "absolute"}},
		{"drives", []string{"/dev/sd["}, []string{"drives[0]", "malformed"}},
		{"drives", "/dev/sd*", []string{`"drives"`, "list"}},
		{"nvram", map[string]any{"path": "pmem0"}, []string{"nvram.path", "pmem0"}},
		{"nvram", map[string]any{"path": "/dev/pmem0", "size": 4096}, []string{"nvram.size", "4096"}},
		{"nvram", map[string]any{"path": "/dev/pmem0", "kind": "tape"}, []string{"nvram.kind", "tape"}},
		{"nvram", map[string]any{"path": "/dev/pmem0", "size": -1}, []string{"nvram.size"}},
		{"nvram", map[string]any{"path": "/dev/pmem0", "size": 67108865}, []string{"nvram.size", "multiple"}},
		{"nvram", map[string]any{"path": "/dev/pmem0", "sise": 1}, []string{"sise"}},
		{"mirror", map[string]any{}, []string{`"mirror"`, "exactly one"}},
		{"mirror", map[string]any{"listen": ":1", "dial": "a:1"}, []string{`"mirror"`, "exactly one"}},
		{"mirror", map[string]any{"listen": "x"}, []string{"mirror.listen", "window:/path"}},
		{"mirror", map[string]any{"listen": "window:relative"}, []string{"mirror.listen", "absolute"}},
		{"mirror", map[string]any{"listen": ":1", "window": "mirror.window"}, []string{"mirror.window", "absolute"}},
		{"mirror", map[string]any{"listen": "window:/x", "window": "/y"}, []string{"mirror.window", "stands in"}},
		{"mirror", map[string]any{"window": "/y"}, []string{`"mirror"`, "exactly one"}},
		{"mirror", map[string]any{"dial": "a:1", "window_create": true}, []string{"mirror.window_create", "only with"}},
		{"portal_listen", "window:/x", []string{"portal_listen"}},
		{"mirror", map[string]any{"dial": ":1"}, []string{"mirror.dial"}},
		{"array", map[string]any{"data": 0, "parity": 2}, []string{"array.data", "1 to 32"}},
		{"array", map[string]any{"data": 8, "parity": 5}, []string{"array.parity", "1 to 4"}},
		{"spin_us", 1001, []string{"spin_us", "0 to 1000"}},
		{"spin_us", -1, []string{"spin_us", "0 to 1000"}},
		{"maintenance", map[string]any{"scrub_every_h": -2}, []string{"maintenance.scrub_every_h", "-1 for never"}},
		{"maintenance", map[string]any{"rebuild_delay_s": 604801}, []string{"maintenance.rebuild_delay_s", "604800"}},
		{"maintenance", map[string]any{"scrub_floor_mib": -1}, []string{"maintenance.scrub_floor_mib"}},
		{"maintenance", map[string]any{"scrub": true}, []string{`"scrub"`}},
		{"log_level", "verbose", []string{`"log_level"`, "debug"}},
		{"colour", "red", []string{`"colour"`}},
	} {
		m := maps.Clone(good())
		m[c.field] = c.value
		text, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		_, err = ParseConfig(text)
		if err == nil {
			t.Errorf("%s = %v: accepted", c.field, c.value)
			continue
		}
		for _, s := range c.says {
			if !strings.Contains(err.Error(), s) {
				t.Errorf("%s = %v: %q does not say %q", c.field, c.value, err, s)
			}
		}
		if strings.Contains(err.Error(), "0123456789abcdef") {
			t.Errorf("%s: the error shows the secret", c.field)
		}
	}
	// All wrong fields are named in one run.
	m := maps.Clone(good())
	m["shelf"], m["controller"] = "", ""
	text, _ := json.Marshal(m)
	if _, err := ParseConfig(text); err == nil || strings.Count(err.Error(), "field") != 2 {
		t.Errorf("two fields are wrong: %v", err)
	}
}

// TestCHAPConfig: who may log in to plain LUNs, beside the agents with their claims; no secret in an error, none in a
// file that everybody can read.
func TestCHAPConfig(t *testing.T) {
	dir := t.TempDir()
	file, path := filepath.Join(dir, "secret"), filepath.Join(dir, "A.json")
	if err := os.WriteFile(file, []byte("hush, from a file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	m := good()
	m["chap"] = []any{map[string]any{"initiator": "iqn.a", "user": "u", "secret": "hush, the first", "mutual_user": "t", "mutual_secret_file": file}}
	text, _ := json.Marshal(m)
	for mode, ok := range map[os.FileMode]bool{0o600: true, 0o640: true, 0o604: false} {
		if err := errors.Join(os.RemoveAll(path), os.WriteFile(path, text, 0o600), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
		c, err := LoadConfig(path)
		if (err == nil) != ok {
			t.Fatalf("mode %04o: %v", mode, err)
		}
		if !ok {
			continue
		}
		if got := c.auth("iqn.a", "iqn.t"); got.User != "u" || got.Secret != "hush, the first" || got.MutualSecret != "hush, from a file" {
			t.Errorf("%+v", got)
		}
		if got := c.auth("iqn.stranger", "iqn.t"); got == nil || strings.HasPrefix(got.Secret, "hush") {
			t.Errorf("a stranger needs %+v", got)
		}
		if got, want := c.auth("iqn.host:e3", "iqn.t"), claimSecrets(c.Secret, "iqn.host:e3"); got.Secret != want.Secret || got.User != want.User {
			t.Errorf("a claim needs %+v", got)
		}
	}
	plain, err := ParseConfig(func() []byte { b, _ := json.Marshal(good()); return b }())
	if err != nil || plain.auth("iqn.stranger", "iqn.t") != nil || plain.auth("iqn.host:e3", "") == nil {
		t.Errorf("without entries: %v", err)
	}
	a, b := claimSecrets("0123456789abcdef", "iqn.h:e1"), claimSecrets("0123456789abcdef", "iqn.h:e2")
	c := claimSecrets("another secret of a shelf", "iqn.h:e1")
	if a.Secret == b.Secret || a.Secret == c.Secret || a.Secret == a.TargetSecret || len(a.Secret) != 43 {
		t.Error("secrets of claims are not each other's")
	}
	for _, c := range []struct {
		field string
		value any
		says  string
	}{
		{"secret", "hush", "12 to 128"}, {"secret_file", file, "not both"}, {"mutual_secret_file", file + ".none", "no such file"},
		{"initiator", "iqn.H", "lower case"}, {"initiator", "iqn.h:e4", "no claim"}, {"user", "", "user name"}, {"sekret", "hush", "sekret"}, {"mutual_secret", "hush, but whose?", "belong together"},
	} {
		e := map[string]any{"initiator": "iqn.a", "user": "u", "secret": "hush, the first"}
		e[c.field] = c.value
		m["chap"] = []any{e}
		text, _ := json.Marshal(m)
		if _, err := ParseConfig(text); err == nil || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "hush") {
			t.Errorf("%s %v: %v, want %q and no secret", c.field, c.value, err, c.says)
		}
	}
}
