package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/host/api"
)

// agent is the agent's side: canned answers by method and path, and what was asked.
func agent(t *testing.T, dir string, answers map[string]any) (asked *[]string) {
	t.Helper()
	asked = new([]string)
	l, err := net.Listen("unix", filepath.Join(dir, "hostd.sock"))
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var body bytes.Buffer
		body.ReadFrom(r.Body)
		*asked = append(*asked, strings.TrimSpace(r.Method+" "+r.URL.RequestURI()+" "+body.String()))
		reply(w, answers[r.Method+" "+r.URL.Path])
	})}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	return asked
}

func reply(w http.ResponseWriter, a any) {
	if e, ok := a.(*api.Error); ok {
		w.WriteHeader(e.Status)
	}
	if a == nil {
		w.WriteHeader(http.StatusNoContent)
		return
	}
	json.NewEncoder(w).Encode(a)
}

func ledge(args ...string) (code int, stdout, stderr string) {
	var out, err bytes.Buffer
	code = run(context.Background(), args, &out, &err)
	return code, out.String(), err.String()
}

// Times are printed as the machine's zone has them; golden files know one.
func TestMain(m *testing.M) {
	time.Local = time.UTC
	os.Exit(m.Run())
}

var demo = api.Volume{Name: "demo", UUID: "u-1", SizeBytes: 16 << 30, Figures: api.Figures{LogicalBytes: 1 << 30, UniqueBytes: 512 << 20, StoredBytes: 256 << 20, DedupRatio: 2, CompressionRatio: 2},
	Cache: api.Cache{Hits: 3, Misses: 1}, IQN: "iqn.2026-11.io.ledge:demo", Portal: "127.0.0.1:3260", Compression: "zstd"}

func TestSnapshots(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("LEDGE_RUN", dir)
	t.Setenv("LEDGE_SOCKET", "")
	monday := map[string]any{"snapshots": []api.Snapshot{{Volume: "db", Name: "monday", SizeBytes: 16 << 30, LogicalBytes: 1 << 30, Clones: []string{"look", "test"}}}}
	asked := agent(t, dir, map[string]any{
		"POST /v1/snapshots": monday, "GET /v1/snapshots": monday, "POST /v1/volumes/db/snapshots/monday/clone": demo,
		"POST /v1/volumes/db/snapshots/monday/rollback": demo, "POST /v1/volumes/look/promote": demo,
		"GET /v1/volumes/db/diff":              api.Diff{Ranges: []api.Range{{Offset: 4096, Length: 8192}}, Bytes: 8192},
		"DELETE /v1/volumes/db/snapshots/none": &api.Error{Status: 404, Message: "no such snapshot", Hint: "look"},
	})
	for _, c := range []struct {
		args string
		code int
		says []string
		asks string
	}{
		{"snapshot create db@monday", 0, []string{"took db@monday, 16 GiB"}, `POST /v1/snapshots {"name":"monday","volumes":["db"]}`},
		{"snapshot create db@monday log@monday --json", 0, []string{`"name": "monday"`}, `POST /v1/snapshots {"name":"monday","volumes":["db","log"]}`},
		{"snapshot create db@monday log@tuesday", 2, []string{"one name"}, ""},
		{"snapshot create db", 2, []string{"db@monday"}, ""},
		{"snapshot create", 2, []string{"VOLUME@NAME"}, ""},
		{"snapshot list", 0, []string{"db@monday", "1 GiB", "look test"}, "GET /v1/snapshots"},
		{"snapshot ls db --json", 0, []string{`"look"`}, "GET /v1/snapshots?volume=db"},
		{"snapshot diff db@monday tuesday", 0, []string{"4096 8192", "8 KiB in all"}, "GET /v1/volumes/db/diff?from=monday&offset=0&to=tuesday"},
		{"snapshot diff db@monday db@tuesday --json", 0, []string{`"offset": 4096`}, "GET /v1/volumes/db/diff?from=monday&offset=0&to=tuesday"},
		{"snapshot diff", 2, []string{"VOLUME@FROM"}, ""},
		{"snapshot rollback db@monday", 2, []string{"will be lost", "--yes"}, ""},
		{"snapshot rollback db@monday --yes", 0, []string{"demo is what db@monday was"}, `POST /v1/volumes/db/snapshots/monday/rollback {"force":false}`},
		{"snapshot rollback db@monday --yes --force --json", 0, nil, `POST /v1/volumes/db/snapshots/monday/rollback {"force":true}`},
		{"snapshot delete db@monday db@friday", 2, []string{"these 2 snapshots", "nothing was done", "--yes"}, ""},
		{"snapshot delete db@monday db@friday --yes", 0, []string{"deleted db@monday", "deleted db@friday"}, "DELETE /v1/volumes/db/snapshots/monday\nDELETE /v1/volumes/db/snapshots/friday"},
		{"snapshot rm db@none --yes", 1, []string{"no such snapshot", "→ look"}, "DELETE /v1/volumes/db/snapshots/none"},
		{"volume clone db@monday look", 0, []string{"cloned db@monday as demo", "iscsi://"}, `POST /v1/volumes/db/snapshots/monday/clone {"name":"look"}`},
		{"volume clone db look", 2, []string{"is no snapshot"}, ""},
		{"volume clone db@monday", 2, []string{"NEW"}, ""},
		{"volume promote look", 0, []string{"snapshot(s) now"}, "POST /v1/volumes/look/promote"},
		{"snapshot", 2, []string{"needs a command"}, ""},
		{"snapshot --help", 0, []string{"crash-consistent", "volume clone"}, ""},
	} {
		*asked = nil
		code, out, errs := ledge(strings.Fields(c.args)...)
		if code != c.code {
			t.Errorf("ledge %s: code %d, want %d: %s%s", c.args, code, c.code, out, errs)
		}
		for _, s := range c.says {
			if !strings.Contains(out+errs, s) {
				t.Errorf("ledge %s: no %q in %s%s", c.args, s, out, errs)
			}
		}
		if got := strings.Join(*asked, "\n"); got != c.asks {
			t.Errorf("ledge %s asks %q, want %q", c.args, got, c.asks)
		}
		if code == 0 && strings.Contains(c.args, "--json") && !json.Valid([]byte(out)) {
			t.Errorf("ledge %s prints no JSON: %s", c.args, out)
		}
	}
}

func TestPrintHost(t *testing.T) {
	var out bytes.Buffer
	tool := &tool{out: &out}
	if err := tool.printHost(api.Status{Host: "h1", Phase: api.PhaseServing, Work: &api.Work{Stored: 7, Duplicates: 5, Overwritten: 3, Moved: 2}}); err != nil {
		t.Fatal(err)
	}
	if want := "7 new blocks, 5 stored before, 3 overwritten at once; 2 moved by the cleaner"; !strings.Contains(out.String(), want) {
		t.Errorf("no %q in %s", want, out.String())
	}
}

func TestVolumes(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("LEDGE_RUN", dir)
	t.Setenv("LEDGE_SOCKET", "")
	asked := agent(t, dir, map[string]any{
		"POST /v1/volumes": demo, "GET /v1/volumes": map[string]any{"volumes": []api.Volume{demo}}, "GET /v1/volumes/demo": demo, "GET /v1/volumes/empty": api.Volume{Name: "empty", SizeBytes: 1 << 30}, "POST /v1/volumes/demo/resize": demo, "POST /v1/volumes/demo/rename": demo,
		"POST /v1/volumes/demo/compression": demo,
		"POST /v1/index":                    api.Index{Entries: 77, Bytes: 2 << 30, Sampled: true},
		"POST /v1/store/accept-lost":        api.Status{Phase: api.PhaseServing, GivenUp: []api.GivenUp{{Volume: "demo", Snapshot: "s1", OffsetBytes: 4 << 20, Bytes: 2 << 20}, {Journal: true}}},
		"GET /v1/volumes/none":              &api.Error{Status: 404, Message: `no volume "none"`, Hint: "look with list"},
		"GET /v1/status":                    api.Status{Host: "h1", Phase: api.PhaseJoining, Trouble: "no owner", Paths: []api.Path{{LUN: "store", Portal: "p:1", State: "standby"}}},
	})
	for _, c := range []struct {
		args string
		code int
		says []string // in either stream
		asks string
	}{
		{"volume create demo 16GiB", 0, []string{"created demo, 16 GiB", "iscsi://127.0.0.1:3260/iqn.2026-11.io.ledge:demo/0"}, `POST /v1/volumes {"name":"demo","size_bytes":17179869184}`},
		{"volume create demo 1.5TiB --json", 0, []string{`"name": "demo"`}, `POST /v1/volumes {"name":"demo","size_bytes":1649267441664}`},
		{"volume create demo 16GiB --compression zstd", 0, nil, `POST /v1/volumes {"name":"demo","size_bytes":17179869184,"compression":"zstd"}`},
		{"volume compression demo off", 0, []string{"written to demo from now on is compressed: zstd"}, `POST /v1/volumes/demo/compression {"compression":"off"}`},
		{"volume compression demo", 2, []string{"needs s2, zstd or off"}, ""},
		{"volume create --help", 0, []string{"--compression", "zstd"}, ""},
		{"volume list", 0, []string{"NAME", "demo", "16 GiB", "256 MiB"}, "GET /v1/volumes"},
		{"volume ls --json", 0, []string{`"stored_bytes": 268435456`}, "GET /v1/volumes"},
		{"volume show demo", 0, []string{"75.0 %", "2.00 to 1", "u-1"}, "GET /v1/volumes/demo"},
		{"volume show demo --json", 0, []string{`"hits": 3`}, "GET /v1/volumes/demo"},
		{"volume show none", 1, []string{`no volume "none"`, "→ look with list"}, "GET /v1/volumes/none"},
		{"volume resize demo 32GiB", 0, []string{"demo has"}, `POST /v1/volumes/demo/resize {"size_bytes":34359738368,"shrink":false}`},
		{"volume resize demo 4096 --shrink", 0, nil, `POST /v1/volumes/demo/resize {"size_bytes":4096,"shrink":true}`},
		{"volume rename demo db", 0, []string{"demo is demo now, iqn.2026-11.io.ledge:demo"}, `POST /v1/volumes/demo/rename {"name":"db"}`},
		{"volume rename demo db --force --json", 0, []string{`"iqn"`}, `POST /v1/volumes/demo/rename {"name":"db","force":true}`},
		{"volume rename demo", 2, []string{"needs"}, ""},
		{"volume delete demo", 2, []string{"of which 1 GiB have data; nothing was done", "--yes"}, "GET /v1/volumes/demo"},
		{"volume delete demo --yes", 0, []string{"deleted demo"}, "DELETE /v1/volumes/demo"},
		{"volume delete empty", 0, []string{"deleted empty"}, "GET /v1/volumes/empty\nDELETE /v1/volumes/empty"},
		{"volume delete none", 1, []string{`no volume "none"`}, "GET /v1/volumes/none"},
		{"volume delete demo --force --yes", 0, nil, "DELETE /v1/volumes/demo?force=true"},
		{"volume delete a/../b --yes", 0, nil, "DELETE /v1/volumes/a%2F..%2Fb"},
		{"host status", 1, []string{"joining", "no owner", "standby", "not serving"}, "GET /v1/status"},
		{"host status --json", 1, []string{`"phase": "joining"`}, "GET /v1/status"},
		{"host index", 1, []string{"no index: joining"}, "GET /v1/status"},
		{"host index 2GiB", 0, []string{"2 GiB, 77 blocks of 268435456, a sample of what is stored, still being filled"}, `POST /v1/index {"size_bytes":2147483648}`},
		{"host index 2GiB --json", 0, []string{`"sampled": true`}, `POST /v1/index {"size_bytes":2147483648}`},
		{"host accept-lost", 2, []string{"for good", "of the journal with all that was acknowledged after it", "nothing was done"}, ""},
		{"host accept-lost --yes", 0, []string{"demo@s1", "4194304", "2097152", "the writes acknowledged last, of all volumes"}, `POST /v1/store/accept-lost {}`},
		{"host accept-lost --yes --json", 0, []string{`"offset_bytes": 4194304`}, `POST /v1/store/accept-lost {}`},
		{"host accept-lost now", 2, nil, ""},
		{"host index much", 2, []string{`"much" is no size`}, ""},
		{"host index 1GiB 2GiB", 2, nil, ""},

		{"volume create demo 16GB", 2, []string{`"16GB" is no size`, "16GiB"}, ""},
		{"volume create demo 16gib", 2, []string{"no size"}, ""},
		{"volume create demo -1", 2, nil, ""},
		{"volume create demo", 2, []string{"needs a SIZE"}, ""},
		{"volume create demo 1GiB more", 2, []string{`takes no "more"`}, ""},
		{"volume frobnicate", 2, []string{`no command "frobnicate"`}, ""},
		{"volume", 2, []string{"needs a command"}, ""},
		{"frobnicate", 2, []string{"unknown command"}, ""},
		{"volume list --colour", 2, []string{"unknown flag"}, ""},
		{"shelf takeover C", 2, []string{"A or B"}, ""},
		{"--help", 0, []string{"ledge volume create db 16GiB"}, ""},
		{"volume resize --help", 0, []string{"--shrink", "8GiB"}, ""},
		{"completion bash", 0, []string{"complete"}, ""},
	} {
		*asked = nil
		code, out, errs := ledge(strings.Fields(c.args)...)
		if code != c.code {
			t.Errorf("ledge %s: code %d, want %d: %s%s", c.args, code, c.code, out, errs)
		}
		for _, s := range c.says {
			if !strings.Contains(out+errs, s) {
				t.Errorf("ledge %s: no %q in %s%s", c.args, s, out, errs)
			}
		}
		if got := strings.Join(*asked, "\n"); got != c.asks {
			t.Errorf("ledge %s asks %q, want %q", c.args, got, c.asks)
		}
		if strings.Contains(c.args, "--json") && !json.Valid([]byte(out)) {
			t.Errorf("ledge %s prints no JSON: %s", c.args, out)
		}
	}
}

func TestNobodyThere(t *testing.T) {
	t.Setenv("LEDGE_RUN", t.TempDir())
	t.Setenv("LEDGE_SOCKET", "")
	for args, says := range map[string]string{
		"volume list":                      "no agent found",
		"volume list --socket /nowhere/s":  "does not answer",
		"shelf status":                     "no shelf found",
		"shelf status --shelf /nowhere/sh": "no such file",
	} {
		if code, _, errs := ledge(strings.Fields(args)...); code != 1 || !strings.Contains(errs, says) || !strings.Contains(errs, "→") {
			t.Errorf("ledge %s: code %d: %s", args, code, errs)
		}
	}
}

func TestShelf(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("LEDGE_RUN", dir)
	role := map[string]string{"A": "owner", "B": "standby"}
	var posted []string
	refuse, hung := false, ""
	controller := func(name string) string {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Authorization") != "Bearer t" {
				reply(w, &api.Error{Status: 401, Message: "no token"})
				return
			}
			if name == hung {
				<-r.Context().Done()
				return
			}
			if r.Method == "POST" {
				posted = append(posted, name+r.URL.Path)
				if refuse {
					reply(w, &api.Error{Status: 409, Message: "the mirror is stale", Hint: "start controller A"})
					return
				}
				role["A"], role["B"] = "standby", "standby"
				role[name] = "owner"
			}
			fmt.Fprintf(w, `{"shelf":"s1","controller":%q,"role":%q,"epoch":7,"owner":"A","partner":{"connected":true,"mirror":"in-sync","transport":"tcp","transport_since":"2026-11-27T12:00:01Z","fallback":{"at":"2026-11-27T12:00:01Z","reason":"the bridge is gone"}},"nvram":{"size":1048576,"used":0},
				"pool":{"uuid":"p-1","capacity_bytes":1073741824,"allocated_bytes":0,"state":"ok"},"members":[{"index":0,"path":"/dev/sda","state":"ok","errors":0}],
				"luns":[{"id":1,"lun":1,"name":"h1.store","kind":"store","size_bytes":1073741824}],"serving_since":null,"version":"x"}`, name, role[name])
		}))
		t.Cleanup(s.Close)
		return s.URL
	}
	file := fmt.Sprintf(`{"apis":{"A":%q,"B":%q},"token":"t"}`, controller("A"), controller("B"))
	if err := os.WriteFile(filepath.Join(dir, "shelf.json"), []byte(file), 0o600); err != nil {
		t.Fatal(err)
	}
	code, out, errs := ledge("shelf", "status")
	for _, s := range []string{"owner", "standby", "in-sync", "LINK", "tcp", "over tcp since 2026-11-27", "without its window at 2026-11-27", "the bridge is gone", "p-1", "/dev/sda", "h1.store"} {
		if code != 0 || !strings.Contains(out, s) {
			t.Fatalf("code %d, no %q in %s%s", code, s, out, errs)
		}
	}
	if code, out, errs = ledge("shelf", "takeover"); code != 0 || !strings.Contains(out, "controller B owns the pool at epoch 7") || fmt.Sprint(posted) != "[B/v1/takeover]" {
		t.Fatalf("code %d, posted %v: %s%s", code, posted, out, errs)
	}
	if code, out, errs = ledge("shelf", "takeover", "B", "--lose-writes"); code != 2 || !strings.Contains(errs, "nothing was done") || len(posted) != 1 {
		t.Fatalf("code %d, posted %v: %s%s", code, posted, out, errs)
	}
	if code, out, errs = ledge("shelf", "takeover", "B", "--lose-writes", "--yes"); code != 0 || !strings.Contains(errs, "scrub") || len(posted) != 2 {
		t.Fatalf("code %d, posted %v: %s%s", code, posted, out, errs)
	}
	refuse = true
	if code, out, errs = ledge("shelf", "takeover", "A"); code != 1 || !strings.Contains(errs, "controller A: the mirror is stale") || !strings.Contains(errs, "→ start controller A") {
		t.Fatalf("code %d: %s%s", code, out, errs)
	}
	role["A"], role["B"] = "standby", "standby"
	if code, _, errs = ledge("shelf", "status"); code != 1 || !strings.Contains(errs, "no controller serves") {
		t.Fatalf("code %d: %s", code, errs)
	}
	if code, _, errs = ledge("shelf", "takeover"); code != 1 || !strings.Contains(errs, "name one") {
		t.Fatalf("code %d: %s", code, errs)
	}
	// A controller that accepts connections and says nothing does not keep its partner from taking over.
	refuse, hung = false, "A"
	if code, out, errs = ledge("shelf", "takeover"); code != 0 || !strings.Contains(out, "controller B owns") {
		t.Fatalf("code %d: %s%s", code, out, errs)
	}
	for _, bad := range []string{"", "[]", `{"apis":{}}`, `{"apis":{"C":"http://a:1"}}`, `{"apis":{"A":"nonsense"}}`} {
		os.WriteFile(filepath.Join(dir, "shelf.json"), []byte(bad), 0o600)
		if code, _, errs = ledge("shelf", "status"); code != 1 || !strings.Contains(errs, "→ want") {
			t.Fatalf("%q: code %d: %s", bad, code, errs)
		}
	}
}
