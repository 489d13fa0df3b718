package main

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/ledge-storage/ledge/host/meter"
)

// looks answers GET /v1/stats with one after the other, the last again and again. A function is called, and nothing answered.
func looks(t *testing.T, answers ...any) {
	t.Helper()
	dir := t.TempDir()
	t.Setenv("LEDGE_RUN", dir)
	t.Setenv("LEDGE_SOCKET", "")
	l, err := net.Listen("unix", filepath.Join(dir, "hostd.sock"))
	if err != nil {
		t.Fatal(err)
	}
	var n atomic.Int32
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet || r.URL.Path != "/v1/stats" {
			t.Errorf("asked %s %s", r.Method, r.URL)
		}
		a := answers[min(int(n.Add(1)), len(answers))-1]
		if hang, ok := a.(context.CancelFunc); ok {
			hang()
			<-r.Context().Done()
			return
		}
		reply(w, a)
	})}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
}

var opened = time.Date(2026, 11, 27, 8, 0, 0, 0, time.UTC)

// spread is n durations from lo to hi.
func spread(n int, lo, hi time.Duration) api.Latency {
	var h meter.Histogram
	for i := range n {
		h.Add(lo + (hi-lo)*time.Duration(i)/time.Duration(n))
	}
	return api.LatencyOf(h.Counts())
}

// statsOf is a volume after so many reads and half as many writes.
func statsOf(name string, ops int, seconds float64) api.VolumeStats {
	v := api.VolumeStats{Name: name, UUID: "u-" + name, Since: opened, Seconds: seconds, LogicalBytes: 1 << 30}
	v.Reads.Operations = api.Operations{Ops: uint64(ops), Bytes: uint64(ops) << 12, Latency: spread(ops, 50*time.Microsecond, 5*time.Millisecond)}
	v.Reads.Cache, v.Reads.Shelf, v.Reads.Decode = spread(ops/2, 50*time.Microsecond, 120*time.Microsecond), spread(ops/4, time.Millisecond, 5*time.Millisecond), spread(ops/16, 0, 3*time.Microsecond)
	v.Writes.Operations = api.Operations{Ops: uint64(ops / 2), Bytes: uint64(ops/2) << 16, Errors: uint64(ops / 100), Latency: spread(ops/2, time.Millisecond, 1200*time.Millisecond)}
	v.Writes.Queue, v.Writes.Journal = spread(ops/2, 0, 100*time.Microsecond), spread(ops/2, time.Millisecond, 1199*time.Millisecond)
	v.Cache = api.ReadCache{Hits: uint64(ops / 2), Misses: uint64(ops / 4), HitBytes: uint64(ops/2) << 12, MissBytes: uint64(ops/4) << 16, Memory: uint64(ops / 4)}
	if ops > 0 {
		dedup, compression := 1.5, 2.25
		v.Packed = api.Packed{Blocks: uint64(ops * 8), Duplicates: uint64(ops * 8 / 3), StoredBytes: uint64(ops) << 13, DedupRatio: &dedup, CompressionRatio: &compression}
	}
	return v
}

func statsAnswer(volumes ...api.VolumeStats) api.Stats {
	return api.Stats{At: opened.Add(time.Hour), Volumes: volumes}
}

// TestStatsGolden: what 'ledge volume stats' and 'ledge volume top' print, for people.
func TestStatsGolden(t *testing.T) {
	again := statsOf("again", 400, 2)
	again.Since = opened.Add(time.Hour)
	for name, c := range map[string]struct {
		args  string
		looks []any
	}{
		"volume-stats":      {"volume stats", []any{statsAnswer(statsOf("db", 4000, 3600), statsOf("idle", 0, 90))}},
		"volume-stats-one":  {"volume stats db", []any{statsAnswer(statsOf("db", 4000, 3600))}},
		"volume-stats-idle": {"volume stats idle", []any{statsAnswer(statsOf("idle", 0, 90))}},
		"volume-stats-help": {"volume stats --help", []any{nil}},
		"volume-top-help":   {"volume top --help", []any{nil}},
		"volume-top": {"volume top --interval 100ms --count 2", []any{
			statsAnswer(statsOf("again", 90_000, 3600), statsOf("busy", 4000, 3600), statsOf("gone", 1, 1), statsOf("idle", 4000, 3600)),
			statsAnswer(again, statsOf("busy", 8000, 3602), statsOf("idle", 4000, 3602), statsOf("new", 16, 1)),
			statsAnswer(again, statsOf("busy", 8000, 3604), statsOf("idle", 4800, 3604), statsOf("new", 16, 3)),
		}},
	} {
		t.Run(name, func(t *testing.T) {
			looks(t, c.looks...)
			code, out, errs := ledge(strings.Fields(c.args)...)
			if code != 0 || errs != "" {
				t.Fatalf("code %d: %s", code, errs)
			}
			path := filepath.Join("testdata", name+".golden")
			if *update {
				if err := os.WriteFile(path, []byte(out), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if out != string(want) {
				t.Errorf("got\n%s\nwant\n%s", out, want)
			}
		})
	}
}

// Rates are of the time between two looks; a volume that was opened anew begins with nothing.
func TestRates(t *testing.T) {
	fresh := statsOf("again", 30, 3)
	fresh.Since = opened.Add(time.Minute)
	r := ratesOf(statsAnswer(statsOf("busy", 4000, 100), statsOf("again", 4000, 100), statsOf("quiet", 5, 100)), statsAnswer(fresh, statsOf("busy", 5000, 104), statsOf("quiet", 5, 104)))
	if len(r.Volumes) != 3 || r.Volumes[0].Name != "busy" || r.Volumes[1].Name != "again" || r.Volumes[2].Name != "quiet" {
		t.Fatalf("%+v", r)
	}
	busy, again, quiet := r.Volumes[0], r.Volumes[1], r.Volumes[2]
	if busy.Seconds != 4 || busy.Reads.Ops != 250 || busy.Reads.Bytes != 250<<12 || busy.Writes.Ops != 125 || busy.Writes.Errors != 2.5 || busy.Cache.Hits != 500 || busy.Cache.Misses != 250 {
		t.Errorf("%+v", busy)
	}
	if again.Seconds != 3 || again.Reads.Ops != 10 || again.Reads.P50Micros == 0 {
		t.Errorf("%+v", again)
	}
	if quiet.ops() != 0 || quiet.Reads.P99Micros != 0 {
		t.Errorf("%+v", quiet)
	}
}

func TestStatsCommands(t *testing.T) {
	missing := &api.Error{Status: 404, Message: `no volume "none"`, Hint: "look with list"}
	for _, c := range []struct {
		args   string
		answer any
		code   int
		says   string
	}{
		{"volume stats db --json", statsAnswer(statsOf("db", 100, 10)), 0, `"p99_us"`},
		{"volume stats --json", statsAnswer(), 0, `"volumes": null`},
		{"volume stats", statsAnswer(), 0, "no volumes"},
		{"volume stats none", missing, 1, "→ look with list"},
		{"volume stats a b", nil, 2, `takes no "b"`},
		{"volume top --json --count 1 --interval 100ms", statsAnswer(statsOf("db", 100, 10)), 0, `"ops_per_second": 0`},
		{"volume top --interval 1ms", nil, 2, "100ms"},
		{"volume top --count -1", nil, 2, "--count"},
		{"volume top db", nil, 2, `takes no "db"`},
		{"volume top --count 1", &api.Error{Status: 503, Message: "the agent is not serving yet"}, 1, "not serving"},
	} {
		looks(t, c.answer)
		code, out, errs := ledge(strings.Fields(c.args)...)
		if code != c.code || !strings.Contains(out+errs, c.says) {
			t.Errorf("ledge %s: code %d, want %d and %q: %s%s", c.args, code, c.code, c.says, out, errs)
		}
		if code == 0 && strings.Contains(c.args, "--json") && !json.Valid([]byte(out)) {
			t.Errorf("ledge %s prints no JSON: %s", c.args, out)
		}
	}
}

// Ctrl-C is how 'ledge volume top' ends, between two looks or during one.
func TestTopEnds(t *testing.T) {
	for _, during := range []bool{false, true} {
		limit := time.Second
		if during {
			limit = time.Minute
		}
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		if during {
			looks(t, statsAnswer(statsOf("db", 100, 10)), statsAnswer(statsOf("db", 200, 11)), cancel)
		} else {
			looks(t, statsAnswer(statsOf("db", 100, 10)))
		}
		var out, errs strings.Builder
		if code := run(ctx, []string{"volume", "top", "--interval", "100ms"}, &out, &errs); code != 0 || errs.Len() > 0 || strings.Count(out.String(), "NAME") < 1 {
			t.Errorf("during a look %v: code %d: %s%s", during, code, out.String(), errs.String())
		}
		cancel()
	}
}
