package control

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
)

// fakeStorage notes what it is asked.
type fakeStorage struct {
	f     *fake
	asked []string
	err   error
	rates Rates
	warn  int
}

func (s *fakeStorage) note(format string, args ...any) error {
	s.asked = append(s.asked, fmt.Sprintf(format, args...))
	return s.err
}

func (f *fake) Storage() (Storage, error) {
	if f.standby {
		return nil, &NotOwner{Self: "B", Owner: "A", Role: "standby"}
	}
	f.storage.f = f
	return &f.storage, nil
}

func (f *fake) Drives(context.Context) (DriveList, error) {
	return DriveList{Controller: "B"}, f.storage.note("drives")
}

func (f *fake) WipeDrive(_ context.Context, path string, force bool) (Drive, error) {
	return Drive{Path: path, Label: DriveBlank}, f.storage.note("wipe %s %t", path, force)
}

func (s *fakeStorage) Pool(context.Context) (PoolInfo, error) {
	return PoolInfo{WarnPercent: s.warn}, nil
}
func (s *fakeStorage) Array(context.Context) (ArrayInfo, error) {
	return ArrayInfo{Rates: s.rates}, nil
}
func (s *fakeStorage) SetWarnPercent(_ context.Context, n int) error {
	s.warn = n
	return s.note("warn %d", n)
}
func (s *fakeStorage) Drain(context.Context) (Task, error) {
	return Task{ID: 7, Kind: "drain"}, s.note("drain")
}
func (s *fakeStorage) GiveUp(_ context.Context, force bool) (Task, error) {
	return Task{ID: 11}, s.note("give up %t", force)
}
func (s *fakeStorage) Scrub(_ context.Context, what string) error { return s.note("scrub %s", what) }
func (s *fakeStorage) SetRates(_ context.Context, r Rates) error {
	s.rates = r
	return s.note("rates %v", r)
}
func (s *fakeStorage) Grow(_ context.Context, paths []string, force bool) (Task, error) {
	return Task{ID: 8}, s.note("grow %v %t", paths, force)
}
func (s *fakeStorage) FailMember(_ context.Context, m int, force bool) error {
	return s.note("fail %d %t", m, force)
}
func (s *fakeStorage) ReplaceMember(_ context.Context, m int, path string, force bool) (Task, error) {
	return Task{ID: 9}, s.note("replace %d %s %t", m, path, force)
}
func (s *fakeStorage) ReaddMember(_ context.Context, m int, path string) (Task, error) {
	return Task{ID: 10}, s.note("readd %d %q", m, path)
}
func (s *fakeStorage) LUN(_ context.Context, name string) (LUNInfo, error) {
	return LUNInfo{LUN: LUN{Name: name}}, s.note("lun %s", name)
}
func (s *fakeStorage) ResizeLUN(_ context.Context, name string, n int64) error {
	return s.note("resize %s %d", name, n)
}
func (s *fakeStorage) RenameLUN(_ context.Context, name, to string) error {
	return s.note("rename %s %s", name, to)
}

// owned is what only the owner answers, with a body that is good.
var owned = []struct{ method, path, body, asks string }{
	{"GET", "/v1/pool", "", ""},
	{"PUT", "/v1/pool/thresholds", `{"warn_percent":75}`, "warn 75"},
	{"POST", "/v1/pool/drain", "", "drain"},
	{"POST", "/v1/pool/give-up", `{"force":true}`, "give up true"},
	{"GET", "/v1/array", "", ""},
	{"POST", "/v1/array/scrub", `{"action":"start"}`, "scrub start"},
	{"POST", "/v1/array/scrub", `{"action":"start","accept_old":true}`, "scrub start accepting old"},
	{"PUT", "/v1/array/rates", `{"rebuild":2097152}`, "rates {1 2 2097152 4}"},
	{"POST", "/v1/array/grow", `{"drives":["/dev/sdm","/dev/sdn"]}`, "grow [/dev/sdm /dev/sdn] false"},
	{"POST", "/v1/array/members/3/fail", `{"force":true}`, "fail 3 true"},
	{"POST", "/v1/array/members/3/replace", `{"path":"/dev/sdm"}`, "replace 3 /dev/sdm false"},
	{"POST", "/v1/array/members/0/readd", "", `readd 0 ""`},
	{"POST", "/v1/array/members/63/readd", `{"path":"/dev/sdm"}`, `readd 63 "/dev/sdm"`},
	{"GET", "/v1/luns/vol", "", "lun vol"},
	{"POST", "/v1/luns/vol/resize", `{"size_bytes":8388608}`, "resize vol 8388608 lun vol"},
	{"POST", "/v1/luns/vol/rename", `{"name":"vol2"}`, "rename vol vol2 lun vol2"},
}

// own is what each controller answers itself.
var own = []struct{ method, path, body, asks string }{
	{"GET", "/v1/drives", "", "drives"},
	{"POST", "/v1/drives/rescan", "", "drives"},
	{"POST", "/v1/drives/wipe", `{"path":"/dev/sdm","force":true}`, "wipe /dev/sdm true"},
}

func TestStorageRequests(t *testing.T) {
	for _, c := range append(owned, own...) {
		f := &fake{storage: fakeStorage{rates: Rates{RebuildFloor: 1, ScrubFloor: 2, Rebuild: 3, Scrub: 4}}}
		if code, v := call(t, newServer(t, f), c.method, c.path, c.body, nil); code/100 != 2 || strings.Join(f.storage.asked, " ") != c.asks {
			t.Errorf("%s %s: %d %v, asked %q, want %q", c.method, c.path, code, v, f.storage.asked, c.asks)
		}
	}
	// A standby names the owner, and the drives are its own affair.
	for _, c := range owned {
		f := &fake{standby: true}
		if code, v := call(t, newServer(t, f), c.method, c.path, c.body, nil); code != 409 || v["owner"] != "A" || len(f.storage.asked) > 0 {
			t.Errorf("%s %s on a standby: %d %v", c.method, c.path, code, v)
		}
	}
	for _, c := range own {
		f := &fake{standby: true}
		if code, v := call(t, newServer(t, f), c.method, c.path, c.body, nil); code != 200 {
			t.Errorf("%s %s on a standby: %d %v", c.method, c.path, code, v)
		}
	}
	// Without the token nothing is done.
	for _, c := range append(owned, own...) {
		f := &fake{}
		code, _ := call(t, newServer(t, f), c.method, c.path, c.body, func(r *http.Request) { r.Header.Del("Authorization") })
		if code != 401 || len(f.storage.asked) > 0 {
			t.Errorf("%s %s without a token: %d, asked %q", c.method, c.path, code, f.storage.asked)
		}
	}
}

// TestStorageBadInput: whatever is wrong with a request is said, and nothing is done.
func TestStorageBadInput(t *testing.T) {
	many := make([]string, 65)
	for i := range many {
		many[i] = fmt.Sprintf("/dev/d%d", i)
	}
	tooMany, _ := json.Marshal(map[string]any{"drives": many})
	for _, c := range []struct {
		method, path, body string
		code               int
		says               string
	}{
		{"PUT", "/v1/pool/thresholds", `{}`, 400, "warn_percent"},
		{"PUT", "/v1/pool/thresholds", `{"warn_percent":0}`, 400, "1 to 100"},
		{"PUT", "/v1/pool/thresholds", `{"warn_percent":101}`, 400, "1 to 100"},
		{"PUT", "/v1/pool/thresholds", `{"warn_percent":"75"}`, 400, "whole number"},
		{"PUT", "/v1/pool/thresholds", `{"warn":75}`, 400, `"warn"`},
		{"PUT", "/v1/pool/thresholds", ``, 400, "empty"},
		{"POST", "/v1/pool", `{"force":true,"data":4}`, 400, "both"},
		{"POST", "/v1/pool", `{"force":true,"data":33,"parity":2}`, 400, "data 33"},
		{"POST", "/v1/pool", `{"force":true,"data":4,"parity":5}`, 400, "parity 5"},
		{"POST", "/v1/pool", `{"force":true,"data":-4,"parity":-2}`, 400, "data -4"},
		{"POST", "/v1/pool", `{"force":true,"spares":9}`, 400, "spares 9"},
		{"POST", "/v1/pool", `{"force":true,"spares":-1}`, 400, "spares -1"},
		{"POST", "/v1/pool", `{"force":true,"drives":["sda"]}`, 400, "absolute"},
		{"POST", "/v1/pool", `{"force":true,"drives":["/dev/sda","/dev/sda"]}`, 400, "twice"},
		{"POST", "/v1/pool", `{"force":true,"drives":"/dev/sda"}`, 400, "a list"},
		{"POST", "/v1/pool/drain", `{"now":true}`, 400, `"now"`},
		{"DELETE", "/v1/pool/drain", ``, 405, "POST"},
		{"DELETE", "/v1/pool", ``, 405, "GET, POST"},
		{"POST", "/v1/array/scrub", `{}`, 400, "start, pause or stop"},
		{"POST", "/v1/array/scrub", `{"action":"begin"}`, 400, `"begin"`},
		{"POST", "/v1/array/scrub", `{"action":"stop","accept_old":true}`, 400, "start alone"},
		{"POST", "/v1/array/scrub", ``, 400, "empty"},
		{"PUT", "/v1/array/rates", `{}`, 400, "at least one"},
		{"PUT", "/v1/array/rates", `{"rebuild":1}`, 400, "1 MiB"},
		{"PUT", "/v1/array/rates", `{"rebuild":-2}`, 400, "rebuild -2"},
		{"PUT", "/v1/array/rates", `{"rebuild_floor":-1}`, 400, "rebuild_floor -1"},
		{"PUT", "/v1/array/rates", `{"scrub":99999999999999}`, 400, "1 TiB"},
		{"PUT", "/v1/array/rates", `{"scrub":"fast"}`, 400, "whole number"},
		{"POST", "/v1/array/grow", `{}`, 400, "paths of the drives"},
		{"POST", "/v1/array/grow", `{"drives":[]}`, 400, "paths of the drives"},
		{"POST", "/v1/array/grow", `{"drives":["/dev/../etc/passwd"]}`, 400, "drives[0]"},
		{"POST", "/v1/array/grow", `{"drives":["/dev/sd\u0000"]}`, 400, "drives[0]"},
		{"POST", "/v1/array/grow", string(tooMany), 400, "at most 64"},
		{"POST", "/v1/array/members/64/fail", ``, 400, `member "64"`},
		{"POST", "/v1/array/members/-1/fail", ``, 400, `member "-1"`},
		{"POST", "/v1/array/members/x/replace", `{"path":"/dev/sda"}`, 400, `member "x"`},
		{"POST", "/v1/array/members/1/replace", `{}`, 400, "path"},
		{"POST", "/v1/array/members/1/replace", `{"path":1}`, 400, "path"},
		{"POST", "/v1/array/members/1/readd", `{"path":"sda"}`, 400, "absolute"},
		{"POST", "/v1/array/members/1/explode", ``, 404, "no such resource"},
		{"GET", "/v1/array/members/1/fail", ``, 405, "POST"},
		{"POST", "/v1/drives/wipe", `{}`, 400, "path"},
		{"POST", "/v1/drives/wipe", `{"path":"` + strings.Repeat("/x", 600) + `"}`, 400, "absolute"},
		{"POST", "/v1/drives/rescan", `{"deep":1}`, 400, `"deep"`},
		{"GET", "/v1/luns/..%2Fx", ``, 400, "LUN name"},
		{"POST", "/v1/luns/vol/resize", `{"size_bytes":1}`, 400, "size_bytes"},
		{"POST", "/v1/luns/vol/resize", `{"size_bytes":9223372036854775807}`, 400, "size_bytes"},
		{"POST", "/v1/luns/vol/rename", `{"name":"A B"}`, 400, "name"},
		{"DELETE", "/v1/luns/vol?force=1", ``, 400, "true or false"},
	} {
		f := &fake{}
		code, v := call(t, newServer(t, f), c.method, c.path, c.body, nil)
		text := fmt.Sprint(v["error"], " ", v["hint"])
		if code != c.code || !strings.Contains(text, c.says) || len(f.storage.asked) > 0 || f.pools > 0 {
			t.Errorf("%s %s %.60s: %d %s, asked %q; want %d and %q", c.method, c.path, c.body, code, text, f.storage.asked, c.code, c.says)
		}
	}
	// A body beyond the limit, on every request that has one.
	huge := `{"x":"` + strings.Repeat("x", MaxBodyBytes) + `"}`
	for _, c := range append(owned, own...) {
		if c.method == "GET" {
			continue
		}
		f := &fake{}
		if code, _ := call(t, newServer(t, f), c.method, c.path, huge, nil); code != 413 || len(f.storage.asked) > 0 {
			t.Errorf("%s %s with %d bytes: %d", c.method, c.path, len(huge), code)
		}
	}
}

// TestPoolSpec: what is not said stays the configuration's.
func TestPoolSpec(t *testing.T) {
	for body, want := range map[string]string{
		`{"force":true}`: "{true 0 0 -1 []}",
		`{"force":true,"data":4,"parity":2,"spares":0,"drives":["/dev/sda"]}`: "{true 4 2 0 [/dev/sda]}",
	} {
		f := &fake{}
		if code, v := call(t, newServer(t, f), "POST", "/v1/pool", body, nil); code != 200 || fmt.Sprint(f.spec) != want {
			t.Errorf("%s: %d %v, asked for %v", body, code, v, f.spec)
		}
	}
}

// TestHostsLUNs: what a host's agent made is deleted only by force, and neither resized nor renamed.
func TestHostsLUNs(t *testing.T) {
	f := &fake{luns: []LUN{{ID: 1, Name: "h1.store"}, {ID: 2, Name: "plain"}}, hosts: []Host{{Name: "h1", LUNs: []uint32{1}}}}
	h := newServer(t, f)
	for _, c := range []struct{ method, path, body string }{
		{"DELETE", "/v1/luns/h1.store", ""}, {"POST", "/v1/luns/h1.store/resize", `{"size_bytes":8388608}`}, {"POST", "/v1/luns/h1.store/rename", `{"name":"x"}`},
	} {
		code, v := call(t, h, c.method, c.path, c.body, nil)
		if code != 409 || !strings.Contains(fmt.Sprint(v["error"]), `host "h1"`) || len(f.storage.asked) > 0 || len(f.luns) != 2 {
			t.Errorf("%s %s: %d %v", c.method, c.path, code, v)
		}
	}
	if code, _ := call(t, h, "DELETE", "/v1/luns/plain", "", nil); code != 204 {
		t.Errorf("a plain LUN: %d", code)
	}
	if code, _ := call(t, h, "DELETE", "/v1/luns/h1.store?force=true", "", nil); code != 204 || len(f.luns) != 0 {
		t.Errorf("by force: %d, left %v", code, f.luns)
	}
	if _, v := call(t, h, "GET", "/v1/luns", "", nil); !strings.Contains(fmt.Sprint(v), "deleting") {
		t.Errorf("what is being deleted is not listed: %v", v)
	}
}
