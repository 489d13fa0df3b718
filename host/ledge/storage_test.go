package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/spf13/cobra"
)

var update = flag.Bool("update", false, "write the golden files")

// twoControllers are the shelf's side: canned answers of the owner, by method and path, and NotOwner from the other.
type twoControllers struct {
	mu      sync.Mutex // guards the rest
	owner   string
	answers map[string]any // a func() any is asked each time
	asked   []string       // of the owner, without statuses
}

func (s *twoControllers) serve(name string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var body bytes.Buffer
		body.ReadFrom(r.Body)
		s.mu.Lock()
		defer s.mu.Unlock()
		switch {
		case r.URL.Path == "/v1/status" && name == s.owner:
			fmt.Fprintf(w, `{"controller":%q,"role":"owner","epoch":7}`, name)
			return
		case r.URL.Path == "/v1/status":
			fmt.Fprintf(w, `{"controller":%q,"role":"standby","owner":%q}`, name, s.owner)
			return
		case strings.HasPrefix(r.URL.Path, "/v1/drives") && r.URL.Path != "/v1/drives/wipe":
			if a, ok := s.answers[name+" "+r.Method+" "+r.URL.Path]; ok {
				reply(w, a)
				return
			}
		case name != s.owner && r.URL.Path+r.Method != "/v1/poolPOST":
			reply(w, &api.Error{Status: 409, Message: "controller " + name + " (standby) does not own the pool: controller " + s.owner + " does", Owner: s.owner})
			return
		}
		s.asked = append(s.asked, strings.TrimSpace(r.Method+" "+r.URL.RequestURI()+" "+body.String()))
		a, ok := s.answers[r.Method+" "+r.URL.Path]
		if f, is := a.(func() any); is {
			a = f()
		}
		if !ok {
			a = &api.Error{Status: 404, Message: "the test has no answer to " + r.URL.Path}
		}
		reply(w, a)
	})
}

func newTwo(t *testing.T, answers map[string]any) *twoControllers {
	t.Helper()
	s := &twoControllers{owner: "B", answers: answers}
	dir := t.TempDir()
	apis := map[string]string{}
	for _, name := range []string{"A", "B"} {
		srv := httptest.NewServer(s.serve(name))
		t.Cleanup(srv.Close)
		apis[name] = srv.URL
	}
	text, _ := json.Marshal(map[string]any{"apis": apis, "token": "t"})
	if err := os.WriteFile(filepath.Join(dir, "shelf.json"), text, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("LEDGE_RUN", dir)
	return s
}

// quick runs a command whose waits are short; in, where not empty, is typed at a terminal.
func quick(in string, args ...string) (code int, stdout, stderr string) {
	var out, err bytes.Buffer
	t := &tool{out: &out, in: strings.NewReader(in), tty: in != "", pause: time.Millisecond}
	code = t.run(context.Background(), args, &out, &err)
	return code, out.String(), err.String()
}

func p[T any](v T) *T { return &v }

var when = time.Date(2026, 11, 26, 8, 30, 0, 0, time.UTC)

// sickArray is 8+2 over 12 with every state in it.
func sickArray() api.ArrayInfo {
	a := api.ArrayInfo{UUID: "5f2c8a10-0000-4000-8000-000000000001", Pool: "d9ae7d64-1ac8-4989-af4f-5bcfad386777", State: "degraded",
		Why:  []string{"member 3 is failed: its strips are to be rebuilt (last error: drive: /dev/sdd: write 135168 bytes at 1048576: input/output error)", "41 stripes bear no further loss"},
		Data: 8, Parity: 2, SpareColumns: 2, Stripes: 4000, StripeBytes: 1 << 20, AtRisk: []uint64{2959, 1000, 41},
		Spare: api.SpareSpace{Columns: 2, Used: 1, Free: 1, ColumnBytes: 3 << 29},
		Scrub: api.ScrubInfo{State: "paused", Position: 1000, Total: 4000, Now: api.ScrubReport{Stripes: 1000, BadStrips: 3, Repaired: 3}, Last: api.ScrubReport{Ended: &when, Stripes: 4000}},
		Rates: api.Rates{RebuildFloor: 32 << 20, ScrubFloor: 4 << 20, Scrub: 200 << 20, Rebuild: -1},
		Tasks: []api.Task{{ID: 4, Kind: "rebuild", Subject: "member 6", State: "running", Done: 1800, Total: 4000, Unit: "stripes", BytesPerSecond: 123 << 20, SecondsLeft: p(int64(130)), Note: "held at its floor by foreground I/O"},
			{ID: 2, Kind: "replace", Subject: "member 2", State: "done"}}}
	for i := range 12 {
		a.Members = append(a.Members, api.ArrayMember{Index: i, State: "online", Path: fmt.Sprintf("/dev/sd%c", 'a'+i), Slot: fmt.Sprintf("2:0:%d:0", i), Serial: fmt.Sprintf("lab-drive-%02d", i+1), SizeBytes: 4 << 30})
	}
	set := func(i int, state string) *api.ArrayMember { a.Members[i].State = state; return &a.Members[i] }
	set(1, "suspect").Errors = api.MemberErrors{Read: 9, Timeout: 1, Checksum: 120, Stale: 2, Repaired: 122, Write: 12345678}
	set(3, "failed").Errors.Write = 1
	a.Members[4].Slow = true
	*set(5, "missing") = api.ArrayMember{Index: 5, State: "missing"}
	m := set(6, "rebuilding")
	m.Job, m.Done, m.Total, m.Running = "rebuild", 1800, 4000, true
	set(7, "spared")
	m = set(8, "restoring")
	m.Path, m.Serial = "/dev/disk/by-path/pci-0000:3b:00.0-sas-phy8-lun-0", "S4NNNG0M900123X4567"
	m.Job, m.Done, m.Total = "copy-back", 10, 4000
	return a
}

func wideArray() api.ArrayInfo {
	a := api.ArrayInfo{UUID: "5f2c8a10-1", Pool: "d9ae7d64-1", State: "optimal", Data: 16, Parity: 3, SpareColumns: 2, Stripes: 1 << 30, StripeBytes: 2 << 20, Checksums: "crc32c", AtRisk: []uint64{1 << 30, 0, 0, 0},
		Spare: api.SpareSpace{Columns: 2, Free: 2, ColumnBytes: 8 << 40}, Scrub: api.ScrubInfo{State: "idle", Last: api.ScrubReport{Ended: &when, Stripes: 1 << 30, BadStrips: 1, Repaired: 1}, Next: p(when.Add(7 * 24 * time.Hour))},
		Tasks: []api.Task{{Kind: "grow", State: "running", Done: 99, Total: 1 << 30, SecondsLeft: p(int64(400000)), BytesPerSecond: 2 << 30}, {Kind: "maintenance", State: "waiting", Error: "raid: busy", Note: "it is tried again at 2026-11-26T08:31:00Z"}}}
	for i := range 60 {
		a.Members = append(a.Members, api.ArrayMember{Index: i, State: "online", Path: fmt.Sprintf("/dev/nvme%dn1", i), Serial: fmt.Sprintf("S%07d", i)})
	}
	return a
}

func drives() []api.Drive {
	return []api.Drive{
		{Path: "/dev/sda", Slot: "2:0:0:0", Serial: "lab-drive-01", SizeBytes: 4 << 30, Label: "member", Member: p(0), Pool: "d9ae7d64", InUse: true, Epoch: 7, Seq: 40},
		{Path: "/dev/sdb", SizeBytes: 4 << 30, Label: "blank"},
		{Path: "/dev/sdc", SizeBytes: 4 << 30, Label: "stale", Member: p(3), Pool: "d9ae7d64", Detail: "the array went on without it"},
		{Path: "/dev/sdd", SizeBytes: 4 << 30, Label: "foreign", Member: p(1), Pool: "aaaaaaaa-1", Detail: "a member of another pool"},
		{Path: "/dev/sde", Label: "cannot-open", Detail: "no medium"},
	}
}

var thePool = api.PoolInfo{UUID: "d9ae7d64-1ac8-4989-af4f-5bcfad386777", Controller: "B", Epoch: 7, State: "low", Why: []string{"the array is degraded: see ledge array show", "91.0 % is allocated, the warning is at 90 %"},
	CapacityBytes: 100 << 30, AllocatedBytes: 91 << 30, FreeBytes: 9 << 30, LUNs: 3, LUNBytes: 1 << 40, WarnPercent: 90, DirtyBytes: 96 << 10, LogBytes: 60 << 20, LogUsedBytes: 120 << 10, Mirror: "in-sync",
	Counters: api.PoolCounters{FullStripes: 10, PartialStripes: 3, DestageRounds: 4, Stalls: 2},
	Tasks:    []api.Task{{ID: 5, Kind: "delete", Subject: "LUN old", State: "running", Unit: "bytes", Note: "8388608 bytes are still to be freed"}}}

var theLUN = api.LUNInfo{ShelfLUN: api.ShelfLUN{ID: 3, LUN: 3, Name: "db", Kind: "plain", SizeBytes: 1 << 40, BlockBytes: 4096, AllocatedBytes: 8 << 30, UUID: "u-3"}, Stats: api.LUNStats{Reads: 7, ReadBytes: 7 << 20, Writes: 2, WriteBytes: 8192}}

func answers() map[string]any {
	return map[string]any{
		"GET /v1/pool": thePool, "PUT /v1/pool/thresholds": thePool, "GET /v1/array": sickArray(), "POST /v1/array/scrub": sickArray(), "PUT /v1/array/rates": sickArray(),
		"A GET /v1/drives": api.DriveList{Controller: "A", Drives: drives()}, "B GET /v1/drives": api.DriveList{Controller: "B", Drives: drives()},
		"A POST /v1/drives/rescan": api.DriveList{Controller: "A", Drives: drives()}, "B POST /v1/drives/rescan": api.DriveList{Controller: "B", Drives: drives()[:2]},
		"POST /v1/drives/wipe": api.Drive{Path: "/dev/sdd", Label: "blank"},
		"GET /v1/luns":         map[string]any{"luns": []api.ShelfLUN{theLUN.ShelfLUN, {LUN: 4, Name: "old", Kind: "plain", SizeBytes: 1 << 30, BlockBytes: 512, AllocatedBytes: 8 << 20, State: "deleting"}}},
		"GET /v1/luns/db":      theLUN, "POST /v1/luns": theLUN.ShelfLUN, "POST /v1/luns/db/resize": theLUN, "POST /v1/luns/db/rename": theLUN, "DELETE /v1/luns/db": nil,
		"POST /v1/array/members/3/fail": sickArray(), "POST /v1/array/members/3/replace": api.Task{ID: 9, Kind: "replace", State: "running"},
		"POST /v1/array/members/3/readd": api.Task{ID: 9, Kind: "readd", State: "done"}, "POST /v1/array/grow": api.Task{ID: 9, Kind: "grow", State: "running"},
		"POST /v1/pool/give-up": &api.Error{Status: 409, Message: "3 stripes would be lost for good", Hint: "bring the drives back"},
		"POST /v1/pool/drain":   api.Task{ID: 9, Kind: "drain", State: "running"}, "POST /v1/pool": api.Shelf{Epoch: 1},
	}
}

// TestGolden: what the commands print, for people. Nothing of the picture is wider than a terminal.
func TestGolden(t *testing.T) {
	for name, c := range map[string]struct {
		args    string
		answers map[string]any
	}{
		"pool-show":         {args: "pool show"},
		"array-show":        {args: "array show"},
		"array-wide":        {args: "array show", answers: map[string]any{"GET /v1/array": wideArray()}},
		"scrub-status":      {args: "array scrub status"},
		"array-rate":        {args: "array rate"},
		"drive-list":        {args: "drive list"},
		"drive-list-differ": {args: "drive rescan"},
		"lun-list":          {args: "lun list"},
		"lun-show":          {args: "lun show db"},
		"help":              {args: "--help"},
	} {
		t.Run(name, func(t *testing.T) {
			a := answers()
			for k, v := range c.answers {
				a[k] = v
			}
			newTwo(t, a)
			code, out, errs := quick("", strings.Fields(c.args)...)
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
			for line := range strings.Lines(out) {
				if n := len([]rune(strings.TrimRight(line, "\n"))); strings.HasPrefix(name, "array-") && n > columns {
					t.Errorf("a line of %d columns: %s", n, line)
				}
			}
		})
	}
}

// TestStorageCommands: what is asked of the shelf, and how the command ends.
func TestStorageCommands(t *testing.T) {
	for _, c := range []struct {
		args, in string
		code     int
		says     string // in either stream
		asks     string // last of the owner
	}{
		{args: "pool show --json", says: `"warn_percent": 90`, asks: "GET /v1/pool"},
		{args: "pool set --warn 80", says: "warns at", asks: `PUT /v1/pool/thresholds {"warn_percent":80}`},
		{args: "pool set", code: 2, says: "--warn takes"},
		{args: "pool set --warn 101", code: 2, says: "1 to 100"},
		{args: "pool drain --background", says: "being destaged", asks: "POST /v1/pool/drain {}"},
		{args: "pool give-up", code: 1, says: "would be lost for good", asks: `POST /v1/pool/give-up {"force":false}`},
		{args: "pool give-up --force", code: 2, says: "--yes"},
		{args: "pool create", says: "epoch 1", asks: `POST /v1/pool {"force":false}`},
		{args: "pool create --data 6 --parity 3 --spares 0 --drives /dev/sda,/dev/sdb", says: "epoch 1", asks: `POST /v1/pool {"data":6,"drives":["/dev/sda","/dev/sdb"],"force":false,"parity":3,"spares":0}`},
		{args: "pool create --data 6", code: 2, says: "go together"},
		{args: "pool create --force", code: 2, says: "--yes"},
		{args: "pool create --force", in: "erase\n", says: "epoch 1", asks: `POST /v1/pool {"force":true}`},
		{args: "pool create --force", in: "no\n", code: 1, says: "not confirmed"},
		{args: "array show --json", says: `"beyond_parity"`, asks: "GET /v1/array"},
		{args: "array show --interval 1ms", code: 2, says: "100ms"},
		{args: "array scrub start --accept-old", code: 2, says: "nothing was done"},
		{args: "array scrub start --accept-old --yes", says: "runs", asks: `POST /v1/array/scrub {"accept_old":true,"action":"start"}`},
		{args: "array scrub start", says: "runs", asks: `POST /v1/array/scrub {"action":"start"}`},
		{args: "array scrub pause", says: "paused", asks: `POST /v1/array/scrub {"action":"pause"}`},
		{args: "array scrub stop --json", says: `"state"`, asks: `POST /v1/array/scrub {"action":"stop"}`},
		{args: "array scrub", code: 2, says: "'ledge array scrub' needs a command"},
		{args: "array scrub status --json", says: `"position": 1000`, asks: "GET /v1/array"},
		{args: "array rate --rebuild unlimited --scrub-floor 8MiB", says: "rebuild", asks: `PUT /v1/array/rates {"rebuild":-1,"scrub_floor":8388608}`},
		{args: "array rate --rebuild default --json", says: `"rebuild_floor"`, asks: `PUT /v1/array/rates {"rebuild":0}`},
		{args: "array rate --rebuild-floor unlimited", code: 2, says: "a floor is a size"},
		{args: "array rate --scrub fast", code: 2, says: "no size"},
		{args: "array rate --scrub 1KiB", code: 2, says: "less than 1MiB"},
		{args: "array grow", code: 2, says: "--drives"},
		{args: "array grow --drives /dev/sdm", code: 2, says: "cannot be undone"},
		{args: "array grow --drives /dev/sdm,/dev/sdn --yes", says: "is growing", asks: `POST /v1/array/grow {"drives":["/dev/sdm","/dev/sdn"],"force":false}`},
		{args: "array grow --drives /dev/sdm", in: "grow\n", says: "is growing", asks: `POST /v1/array/grow {"drives":["/dev/sdm"],"force":false}`},
		{args: "drive list --json", says: `"cannot-open"`},
		{args: "drive fail 3", code: 2, says: "--yes"},
		{args: "drive fail 3", in: "3\n", says: "may be pulled", asks: `POST /v1/array/members/3/fail {"force":false}`},
		{args: "drive fail 3 --yes --force --json", says: `"members"`, asks: `POST /v1/array/members/3/fail {"force":true}`},
		{args: "drive fail x --yes", code: 2, says: "no member"},
		{args: "drive fail 64 --yes", code: 2, says: "no member"},
		{args: "drive fail", code: 2, says: "a member's number"},
		{args: "drive fail 4 --yes", code: 1, says: "controller B: the test has no answer", asks: `POST /v1/array/members/4/fail {"force":false}`},
		{args: "drive replace 3", code: 2, says: "--with"},
		{args: "drive replace 3 --with /dev/sdb", says: "being filled on /dev/sdb", asks: `POST /v1/array/members/3/replace {"force":false,"path":"/dev/sdb"}`},
		{args: "drive replace 3 --with /dev/sdd --force", code: 2, says: "erases what is on /dev/sdd"},
		{args: "drive replace 3 --with /dev/sdd --force --yes --json", says: `"id": 9`, asks: `POST /v1/array/members/3/replace {"force":true,"path":"/dev/sdd"}`},
		{args: "drive readd 3", says: "member 3 is back", asks: "POST /v1/array/members/3/readd {}"},
		{args: "drive readd 3 --drive /dev/sdc", says: "back", asks: `POST /v1/array/members/3/readd {"path":"/dev/sdc"}`},
		{args: "drive wipe /dev/sdd", code: 2, says: "foreign, member 1 of pool aaaaaaaa-1"},
		{args: "drive wipe /dev/sdd", in: "/dev/sdd\n", says: "/dev/sdd is blank now", asks: `POST /v1/drives/wipe {"force":false,"path":"/dev/sdd"}`},
		{args: "drive wipe /dev/sdd", in: "/dev/sda\n", code: 1, says: "nothing was done"},
		{args: "lun list --json", says: `"deleting"`, asks: "GET /v1/luns"},
		{args: "lun ls", says: "deleting", asks: "GET /v1/luns"},
		{args: "lun create db 1TiB", says: "created db, 1 TiB, as LUN 3", asks: `POST /v1/luns {"name":"db","size_bytes":1099511627776}`},
		{args: "lun create db 1TiB --block 4096 --kind plain --json", says: `"lun": 3`, asks: `POST /v1/luns {"block_bytes":4096,"kind":"plain","name":"db","size_bytes":1099511627776}`},
		{args: "lun create db 1TB", code: 2, says: "no size"},
		{args: "lun create db", code: 2, says: "a SIZE"},
		{args: "lun resize db 2TiB", says: "db has", asks: `POST /v1/luns/db/resize {"size_bytes":2199023255552}`},
		{args: "lun rename db db2", says: "is db now", asks: `POST /v1/luns/db/rename {"name":"db2"}`},
		{args: "lun show a/../b", code: 1, says: "no answer"},
		{args: "lun delete db", code: 2, says: "8 GiB allocated"},
		{args: "lun delete db", in: "db\n", says: "in the background", asks: "DELETE /v1/luns/db"},
		{args: "lun delete db --yes --force", says: "deleted db", asks: "DELETE /v1/luns/db?force=true"},
		{args: "lun delete none --yes", code: 1, says: "no answer"},
		{args: "pool frobnicate", code: 2, says: `no command "frobnicate"`},
	} {
		s := newTwo(t, answers())
		code, out, errs := quick(c.in, strings.Fields(c.args)...)
		if code != c.code || !strings.Contains(out+errs, c.says) {
			t.Errorf("ledge %s (%q): code %d, want %d and %q: %s%s", c.args, c.in, code, c.code, c.says, out, errs)
		}
		last := ""
		if n := len(s.asked); n > 0 {
			last = s.asked[n-1]
		}
		if code == 0 && c.asks != last {
			t.Errorf("ledge %s asks %q, want %q", c.args, last, c.asks)
		}
		if code == 2 && strings.Contains(strings.Join(s.asked, " "), "POST") {
			t.Errorf("ledge %s was wrong usage, and yet asked %q", c.args, s.asked)
		}
		if code != 0 && !strings.Contains(errs, "→") && c.in == "" && !strings.Contains(c.says, "no answer") {
			t.Errorf("ledge %s does not say what to do: %s", c.args, errs)
		}
		if code == 0 && strings.Contains(c.args, "--json") && !json.Valid([]byte(out)) {
			t.Errorf("ledge %s prints no JSON: %s", c.args, out)
		}
	}
}

// TestEveryCommandHelps: each has a sentence, an example and a help that ends well.
func TestEveryCommandHelps(t *testing.T) {
	root := new(tool).root()
	n := 0
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		if c.Name() == "completion" || c.Name() == "help" {
			return
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
		if c.HasSubCommands() {
			return
		}
		n++
		if c.Short == "" || c.Example == "" {
			t.Errorf("%s has no sentence or no example", c.CommandPath())
		}
		for line := range strings.Lines(c.Example) {
			if !strings.Contains(line, strings.TrimPrefix(c.CommandPath(), "ledge")) && !strings.Contains(line, "ledge drive list") && !strings.Contains(line, "ledge pool show") {
				t.Errorf("%s: an example of something else: %s", c.CommandPath(), line)
			}
		}
		args := append(strings.Fields(c.CommandPath())[1:], "--help")
		if code, out, _ := quick("", args...); code != 0 || !strings.Contains(out, "Examples:") || !strings.Contains(out, "--json") {
			t.Errorf("%s --help: code %d: %s", c.CommandPath(), code, out)
		}
	}
	walk(root)
	if n < 28 {
		t.Fatalf("only %d commands", n)
	}
}

// growing is the array on its way from 12 to 13 members; done zero: it has arrived.
func growing(done uint64, running bool) api.ArrayInfo {
	a := sickArray()
	a.Members = append(a.Members, api.ArrayMember{Index: 12, State: "online"})
	if done > 0 {
		a.Grow = &api.GrowInfo{From: 12, To: 13, Done: done, Total: 4000}
	}
	if running {
		a.Tasks = []api.Task{{Kind: "grow", State: "running", Done: done, Total: 4000}}
	}
	return a
}

// TestWaiting: a command that waits shows how far the work is, goes through a takeover, and ends as the work does.
func TestWaiting(t *testing.T) {
	healthy := func(state string, done uint64) api.ArrayInfo {
		a := sickArray()
		a.Members[3].State, a.Members[3].Done, a.Members[3].Total = state, done, 4000
		return a
	}
	for _, c := range []struct {
		name, args string
		path       string
		steps      []any
		code       int
		says       []string
	}{
		{name: "replace over a takeover", args: "drive replace 3 --with /dev/sdb --wait", path: "GET /v1/array",
			steps: []any{healthy("restoring", 1000), &api.Error{Status: 503, Message: "starting"}, "takeover", healthy("restoring", 3000), healthy("online", 0)}, says: []string{"25.0 %", "member 3 is on /dev/sdb"}},
		{name: "replace fails", args: "drive replace 3 --with /dev/sdb --wait", path: "GET /v1/array", code: 1,
			steps: []any{healthy("restoring", 1000), func() api.ArrayInfo {
				a := healthy("failed", 0)
				a.Tasks = []api.Task{{ID: 9, Kind: "replace", Subject: "member 3", State: "failed", Error: "drive: /dev/sdb: input/output error"}}
				return a
			}()}, says: []string{"replace member 3: drive: /dev/sdb: input/output error"}},
		{name: "the new drive dies", args: "drive readd 3 --drive /dev/sdc --wait", path: "GET /v1/array", code: 1,
			steps: []any{healthy("restoring", 1000), healthy("failed", 0)}, says: []string{"member 3 is failed again"}},
		{name: "grow", args: "array grow --drives /dev/sdm --yes --wait", path: "GET /v1/array",
			steps: []any{sickArray(), growing(1000, true), growing(3000, false), growing(0, false)}, says: []string{"25.0 %", "the array has grown"}},
		{name: "drain", args: "pool drain", path: "GET /v1/pool",
			steps: []any{api.PoolInfo{Tasks: []api.Task{{ID: 9, Kind: "drain", State: "running", Done: 1, Total: 4}}}, api.PoolInfo{Tasks: []api.Task{{ID: 8, Kind: "drain", State: "failed"}, {ID: 9, Kind: "drain", State: "done", Done: 4, Total: 4}}}},
			says:  []string{"25.0 %", "all of the log is on the members"}},
		{name: "drain with the owner gone", args: "pool drain", path: "GET /v1/pool", code: 1, steps: []any{api.PoolInfo{}}, says: []string{"ownership has moved"}},
		{name: "delete", args: "lun delete db --yes --wait", path: "GET /v1/luns",
			steps: []any{map[string]any{"luns": []api.ShelfLUN{{UUID: "u-3", AllocatedBytes: 2 << 30, State: "deleting"}}}, map[string]any{"luns": []api.ShelfLUN{{UUID: "u-9", Name: "db"}}}},
			says:  []string{"75.0 %", "its space is free"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := answers()
			s := newTwo(t, a)
			at := 0
			a[c.path] = func() any {
				step := c.steps[min(at, len(c.steps)-1)]
				if at++; step == "takeover" {
					s.owner = "A" // the lock is held
					return &api.Error{Status: 409, Message: "not the owner", Owner: "A"}
				}
				return step
			}
			code, out, errs := quick("", strings.Fields(c.args)...)
			if code != c.code {
				t.Errorf("code %d, want %d: %s%s", code, c.code, out, errs)
			}
			for _, says := range c.says {
				if !strings.Contains(out+errs, says) {
					t.Errorf("no %q in %s%s", says, out, errs)
				}
			}
		})
	}
}

// TestNoOwner: with nobody who owns the pool every command says so, and what to do.
func TestNoOwner(t *testing.T) {
	s := newTwo(t, answers())
	s.owner = "C"
	for _, args := range []string{"pool show", "array show", "lun list", "drive fail 1 --yes", "drive wipe /dev/sdb --yes"} {
		if code, out, errs := quick("", strings.Fields(args)...); code != 1 || !strings.Contains(errs, "no controller serves the pool") || !strings.Contains(errs, "→ 'ledge shelf takeover") {
			t.Errorf("ledge %s: code %d: %s%s", args, code, out, errs)
		}
	}
	if code, out, _ := quick("", "drive", "list"); code != 0 || !strings.Contains(out, "/dev/sdb") {
		t.Errorf("the drives are not listed without an owner: code %d: %s", code, out)
	}
	// A failed array is shown, and makes the code 1.
	a := answers()
	broken := sickArray()
	broken.State, broken.Beyond, broken.AtRisk = "failed", 12, []uint64{1, 2, 3}
	a["GET /v1/array"] = broken
	newTwo(t, a)
	if code, out, errs := quick("", "array", "show"); code != 1 || !strings.Contains(out, "12 LOST MORE THAN PARITY") || !strings.Contains(errs, "→") {
		t.Errorf("code %d: %s%s", code, out, errs)
	}
}

// TestFollow: the owner that a status named may be none any more when it is asked; its answer says who is. Two that
// point to each other end the command, not the operator's patience.
func TestFollow(t *testing.T) {
	for _, circle := range []bool{false, true} {
		var asked []string
		apis := map[string]string{}
		for _, name := range []string{"A", "B"} {
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				other := map[string]string{"A": "B", "B": "A"}[name]
				switch {
				case r.URL.Path == "/v1/status":
					fmt.Fprintf(w, `{"controller":%q,"role":%q}`, name, map[string]string{"A": "standby", "B": "owner"}[name])
				case name == "B" || circle:
					asked = append(asked, name)
					reply(w, &api.Error{Status: 409, Message: "controller " + name + " does not own the pool", Owner: other})
				default:
					asked = append(asked, name)
					reply(w, thePool)
				}
			}))
			defer srv.Close()
			apis[name] = srv.URL
		}
		dir := t.TempDir()
		text, _ := json.Marshal(map[string]any{"apis": apis, "token": "t"})
		if err := os.WriteFile(filepath.Join(dir, "shelf.json"), text, 0o600); err != nil {
			t.Fatal(err)
		}
		t.Setenv("LEDGE_RUN", dir)
		code, out, errs := quick("", "pool", "show")
		got := strings.Join(asked, "")
		if !circle && (code != 0 || got != "BA" || !strings.Contains(out, thePool.UUID)) || circle && (code != 1 || len(got) != maxHops) {
			t.Errorf("circle %t: code %d, asked %s: %s%s", circle, code, got, out, errs)
		}
	}
}
