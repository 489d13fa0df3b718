package main

import (
	"encoding/json"
	"maps"
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
		{"nvram", map[string]any{"path": "/dev/pmem0", "size": -1}, []string{"nvram.size"}},
		{"nvram", map[string]any{"path": "/dev/pmem0", "size": 67108865}, []string{"nvram.size", "multiple"}},
		{"nvram", map[string]any{"path": "/dev/pmem0", "sise": 1}, []string{"sise"}},
		{"mirror", map[string]any{}, []string{`"mirror"`, "exactly one"}},
		{"mirror", map[string]any{"listen": ":1", "dial": "a:1"}, []string{`"mirror"`, "exactly one"}},
		{"mirror", map[string]any{"listen": "x"}, []string{"mirror.listen"}},
		{"mirror", map[string]any{"dial": ":1"}, []string{"mirror.dial"}},
		{"array", map[string]any{"data": 0, "parity": 2}, []string{"array.data", "1 to 32"}},
		{"array", map[string]any{"data": 8, "parity": 5}, []string{"array.parity", "1 to 4"}},
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
