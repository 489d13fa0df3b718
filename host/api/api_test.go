package api

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

func TestParseSize(t *testing.T) {
	for s, want := range map[string]int64{
		"0": 0, "4096": 4096, "1KiB": 1024, "16GiB": 16 << 30, "1.5TiB": 3 << 39, "0.5KiB": 512, "1.25MiB": 5 << 18, "2PiB": 2 << 50, "9223372036854775807": 1<<63 - 1, "1.50GiB": 3 << 29,
	} {
		if n, err := ParseSize(s); err != nil || n != want {
			t.Errorf("%q: %d, %v; want %d", s, n, err, want)
		}
	}
	for _, s := range []string{"", "GiB", "16GB", "16G", "16 GiB", "-1", "+1", "1.5", "1.", ".5GiB", "1e3", "0x10", "16gib", "1.2.3GiB", "9223372036854775808", "8192PiB", "9999999999999999PiB", "0.1KiB", "1.3KiB", "１GiB", "1GiBGiB"} {
		if n, err := ParseSize(s); err == nil {
			t.Errorf("%q is taken as %d", s, n)
		}
	}
}

func FuzzParseSize(f *testing.F) {
	for _, s := range []string{"16GiB", "1.5TiB", "0.000000000000001PiB"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := ParseSize(s)
		if err == nil && n < 0 {
			t.Fatalf("%q is %d", s, n)
		}
	})
}

func TestFormatSize(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1024: "1 KiB", 1536: "1.5 KiB", 16 << 30: "16 GiB", -4096: "-4 KiB", 3 << 39: "1.5 TiB"} {
		if got := FormatSize(n); got != want {
			t.Errorf("%d: %q, want %q", n, got, want)
		}
	}
}

// A server that is no Ledge API gets an error that says so; endless and broken answers are bounded.
func TestStrangeServers(t *testing.T) {
	for body, says := range map[string]string{"<html>": "is it a Ledge API", strings.Repeat("x", maxAnswer+2): "more than"} {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if len(body) < 100 {
				w.WriteHeader(http.StatusTeapot)
			}
			w.Write([]byte(body))
		}))
		c, err := New(s.URL, "")
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Do(context.Background(), "GET", "/", nil, new(Status)); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%.10q: %v", body, err)
		}
		c.Close()
		s.Close()
		if err := c.Do(context.Background(), "GET", "/", nil, nil); !errors.Is(err, ErrNoServer) {
			t.Errorf("closed: %v", err)
		}
	}
	for _, bad := range []string{"", "x", "unix:", "unix://", "ftp://a", "http://", "http://a/path", "http://u:p@a", "http://a?x=1"} {
		if _, err := New(bad, ""); err == nil {
			t.Errorf("%q is taken for an address", bad)
		}
	}
}
