package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fake is a shelf in memory.
type fake struct {
	standby  bool
	full     bool
	takeover error
	luns     []LUN
	hosts    []Host
	pools    int
	spec     PoolSpec
	storage  fakeStorage
}

func (f *fake) Status(context.Context) Status {
	return Status{Shelf: "s1", Controller: "A", Role: "owner", LUNs: f.luns}
}

func (f *fake) Catalog() (Catalog, error) {
	if f.standby {
		return nil, &NotOwner{Self: "B", Owner: "A", Role: "standby"}
	}
	return f, nil
}

func (f *fake) CreatePool(_ context.Context, spec PoolSpec) error {
	f.spec = spec
	if f.pools > 0 {
		return fmt.Errorf("%w: the members carry a pool", ErrConflict)
	}
	if !spec.Force {
		return &Hint{fmt.Errorf("%w: drive 3 is not blank", ErrInvalid), `send {"force":true}`}
	}
	f.pools++
	return nil
}
func (f *fake) Secrets(name string) CHAP {
	return CHAP{User: name, Secret: "of " + name, TargetUser: "t", TargetSecret: "target's of " + name}
}
func (f *fake) Takeover(_ context.Context, lose bool) error {
	if lose {
		return fmt.Errorf("%w: losing", ErrConflict)
	}
	return f.takeover
}
func (f *fake) Target() (string, []string) { return "iqn.x", []string{"127.0.0.1:3260"} }
func (f *fake) LUNs() []LUN                { return f.luns }
func (f *fake) Hosts() []Host              { return f.hosts }
func (f *fake) Deleting() []LUN            { return []LUN{{Name: "old", State: "deleting"}} }

func (f *fake) CreateLUN(_ context.Context, s LUNSpec) (LUN, error) {
	if f.full {
		return LUN{}, fmt.Errorf("%w: no room for the table", ErrNoSpace)
	}
	for _, l := range f.luns {
		if l.Name == s.Name {
			return LUN{}, fmt.Errorf("%w: LUN %q exists", ErrConflict, s.Name)
		}
	}
	l := LUN{ID: uint32(len(f.luns) + 1), LUN: uint32(len(f.luns) + 1), Name: s.Name, Kind: s.Kind, SizeBytes: s.SizeBytes, BlockBytes: s.BlockBytes}
	f.luns = append(f.luns, l)
	return l, nil
}

func (f *fake) DeleteLUN(_ context.Context, name string) error {
	for i, l := range f.luns {
		if l.Name == name {
			f.luns = append(f.luns[:i:i], f.luns[i+1:]...)
			return nil
		}
	}
	return fmt.Errorf("LUN %q: %w", name, ErrNotFound)
}

func (f *fake) PutHost(_ context.Context, h Host) error {
	for i := range f.hosts {
		if f.hosts[i].Name == h.Name {
			f.hosts[i] = h
			return nil
		}
	}
	f.hosts = append(f.hosts, h)
	return nil
}

const token = "s3cret"

func call(t *testing.T, h http.Handler, method, path, body string, mod func(*http.Request)) (int, map[string]any) {
	t.Helper()
	r := httptest.NewRequest(method, path, strings.NewReader(body))
	r.Header.Set("Authorization", "Bearer "+token)
	if mod != nil {
		mod(r)
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	var v map[string]any
	if w.Body.Len() > 0 {
		if err := json.Unmarshal(w.Body.Bytes(), &v); err != nil {
			t.Fatalf("%s %s: answer %q is not JSON: %v", method, path, w.Body.String(), err)
		}
	}
	return w.Code, v
}

func newServer(t *testing.T, f *fake) http.Handler {
	t.Helper()
	s, err := NewServer(Options{Shelf: f, Token: token})
	if err != nil {
		t.Fatal(err)
	}
	return s.Handler()
}

func TestRequests(t *testing.T) {
	const host = `{"initiator":"iqn.2026-11.io.ledge:h1","journal_bytes":268435456,"store_bytes":70368744177664}`
	big := `{"name":"` + strings.Repeat("x", MaxBodyBytes) + `"}`
	for _, c := range []struct {
		name, method, path, body string
		setup                    func(*fake)
		mod                      func(*http.Request)
		code                     int
		says                     string // in error or hint
	}{
		{name: "status", method: "GET", path: "/v1/status", code: 200},
		{name: "no token", method: "GET", path: "/v1/status", mod: func(r *http.Request) { r.Header.Del("Authorization") }, code: 401, says: "Bearer"},
		{name: "wrong token", method: "GET", path: "/v1/status", mod: func(r *http.Request) { r.Header.Set("Authorization", "Bearer s3creT") }, code: 401},
		{name: "wrong scheme", method: "GET", path: "/v1/status", mod: func(r *http.Request) { r.Header.Set("Authorization", "Basic s3cret") }, code: 401},
		{name: "no such path", method: "GET", path: "/v2/status", code: 404, says: "/v1/status"},
		{name: "method", method: "DELETE", path: "/v1/status", code: 405, says: "GET"},
		{name: "pool needs force", method: "POST", path: "/v1/pool", code: 400, says: "force"},
		{name: "pool", method: "POST", path: "/v1/pool", body: `{"force":true}`, code: 200},
		{name: "pool exists", method: "POST", path: "/v1/pool", body: `{"force":true}`, setup: func(f *fake) { f.pools = 1 }, code: 409},
		{name: "force is a string", method: "POST", path: "/v1/pool", body: `{"force":"yes"}`, code: 400, says: `field "force"`},
		{name: "unknown field", method: "POST", path: "/v1/pool", body: `{"farce":true}`, code: 400, says: `"farce"`},
		{name: "trailing", method: "POST", path: "/v1/pool", body: `{"force":true} {}`, code: 400, says: "after the JSON"},
		{name: "not an object", method: "POST", path: "/v1/pool", body: `[1]`, code: 400, says: "object"},
		{name: "null", method: "POST", path: "/v1/luns", body: `null`, code: 400, says: "object"},
		{name: "cut short", method: "POST", path: "/v1/pool", body: `{"force":`, code: 400},
		{name: "syntax", method: "POST", path: "/v1/pool", body: "{\n \"force\": tru }", code: 400, says: "line 2"},
		{name: "too large", method: "POST", path: "/v1/luns", body: big, code: 413, says: "65536"},
		{name: "takeover", method: "POST", path: "/v1/takeover", code: 200},
		{name: "takeover refused", method: "POST", path: "/v1/takeover", setup: func(f *fake) { f.takeover = fmt.Errorf("%w: mirror is stale", ErrConflict) }, code: 409, says: "stale"},
		{name: "takeover that loses", method: "POST", path: "/v1/takeover", body: `{"lose_writes":true}`, code: 409, says: "losing"},
		{name: "takeover that does not know", method: "POST", path: "/v1/takeover", body: `{"lose":true}`, code: 400, says: "lose"},
		{name: "takeover fails", method: "POST", path: "/v1/takeover", setup: func(f *fake) { f.takeover = errors.New("boom") }, code: 500},
		{name: "host", method: "PUT", path: "/v1/hosts/h1", body: host, code: 200},
		{name: "host on standby", method: "PUT", path: "/v1/hosts/h1", body: host, setup: func(f *fake) { f.standby = true }, code: 409, says: "controller A"},
		{name: "host name", method: "PUT", path: "/v1/hosts/H_1", body: host, code: 400, says: "host name"},
		{name: "host name with dot", method: "PUT", path: "/v1/hosts/h1.store", body: host, code: 400, says: "host name"},
		{name: "host body", method: "PUT", path: "/v1/hosts/h1", code: 400, says: "empty"},
		{name: "host initiator", method: "PUT", path: "/v1/hosts/h1", body: strings.Replace(host, "iqn.", "iqm.", 1), code: 400, says: "initiator"},
		{name: "host journal", method: "PUT", path: "/v1/hosts/h1", body: strings.Replace(host, "268435456", "4096", 1), code: 400, says: "journal_bytes"},
		{name: "host journal negative", method: "PUT", path: "/v1/hosts/h1", body: strings.Replace(host, "268435456", "-1", 1), code: 400, says: "journal_bytes"},
		{name: "host store", method: "PUT", path: "/v1/hosts/h1", body: strings.Replace(host, "70368744177664", "9223372036854775807", 1), code: 400, says: "store_bytes"},
		{name: "host store overflow", method: "PUT", path: "/v1/hosts/h1", body: strings.Replace(host, "70368744177664", "99223372036854775807", 1), code: 400, says: "store_bytes"},
		{name: "host full", method: "PUT", path: "/v1/hosts/h1", body: host, setup: func(f *fake) { f.full = true }, code: 507},
		{name: "initiator taken", method: "PUT", path: "/v1/hosts/h1", body: host, setup: func(f *fake) { f.hosts = []Host{{Name: "h0", Initiator: "iqn.2026-11.io.ledge:h1"}} }, code: 409, says: "h0"},
		{name: "lun", method: "POST", path: "/v1/luns", body: `{"name":"vol","size_bytes":1048576}`, code: 201},
		{name: "lun name", method: "POST", path: "/v1/luns", body: `{"name":"../x","size_bytes":1048576}`, code: 400, says: "name"},
		{name: "lun kind", method: "POST", path: "/v1/luns", body: `{"name":"x","size_bytes":1048576,"kind":"fast"}`, code: 400, says: "kind"},
		{name: "lun block", method: "POST", path: "/v1/luns", body: `{"name":"x","size_bytes":1048576,"block_bytes":520}`, code: 400, says: "block_bytes"},
		{name: "lun unaligned", method: "POST", path: "/v1/luns", body: `{"name":"x","size_bytes":1048577}`, code: 400, says: "multiple"},
		{name: "lun delete", method: "DELETE", path: "/v1/luns/vol", setup: func(f *fake) { f.luns = []LUN{{Name: "vol"}} }, code: 204},
		{name: "lun delete missing", method: "DELETE", path: "/v1/luns/vol", code: 404, says: "vol"},
		{name: "events", method: "GET", path: "/v1/events?since=1", code: 200},
		{name: "events since", method: "GET", path: "/v1/events?since=x", code: 400, says: "since"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := &fake{}
			if c.setup != nil {
				c.setup(f)
			}
			code, v := call(t, newServer(t, f), c.method, c.path, c.body, c.mod)
			text := fmt.Sprint(v["error"], " ", v["hint"])
			if code != c.code || !strings.Contains(text, c.says) {
				t.Errorf("got %d %s; want %d and %q", code, text, c.code, c.says)
			}
			if code >= 400 && v["error"] == nil {
				t.Errorf("answer %v has no error", v)
			}
		})
	}
}

// TestHostIdempotent: asking again changes nothing; asking with a new initiator changes only that; another size is
// refused.
func TestHostIdempotent(t *testing.T) {
	f := &fake{}
	h := newServer(t, f)
	body := `{"initiator":"iqn.2026-11.io.ledge:h1","journal_bytes":16777216,"store_bytes":67108864}`
	_, first := call(t, h, "PUT", "/v1/hosts/h1", body, nil)
	_, again := call(t, h, "PUT", "/v1/hosts/h1", body, nil)
	if fmt.Sprint(first) != fmt.Sprint(again) || len(f.luns) != 2 || len(f.hosts) != 1 {
		t.Fatalf("first %v, again %v, luns %v, hosts %v", first, again, f.luns, f.hosts)
	}
	if f.luns[0].Kind != "journal" || f.luns[1].Kind != "store" || f.luns[0].BlockBytes != 4096 {
		t.Fatalf("luns %v", f.luns)
	}
	call(t, h, "PUT", "/v1/hosts/h1", strings.Replace(body, ":h1", ":h1b", 1), nil)
	if len(f.luns) != 2 || len(f.hosts) != 1 || f.hosts[0].Initiator != "iqn.2026-11.io.ledge:h1b" {
		t.Fatalf("luns %v, hosts %v", f.luns, f.hosts)
	}
	if code, _ := call(t, h, "PUT", "/v1/hosts/h1", strings.Replace(body, "67108864", "671088640", 1), nil); code != 409 {
		t.Fatalf("another size: %d", code)
	}
}

// TestBusy: one request more than the limit is told to come back, and does not wait.
func TestBusy(t *testing.T) {
	s, _ := NewServer(Options{Shelf: &fake{}, Token: token})
	for range MaxRequests {
		s.slots <- struct{}{}
	}
	if code, _ := call(t, s.Handler(), "GET", "/v1/status", "", nil); code != 503 {
		t.Fatalf("got %d", code)
	}
}

func TestServeOnUnixSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s, _ := NewServer(Options{Shelf: &fake{}})
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(l) }()
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}}}
	r, err := c.Get("http://shelf/v1/status")
	if err != nil || r.StatusCode != 200 {
		t.Fatal(r, err)
	}
	r.Body.Close()
	if err := s.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
}

func TestEvents(t *testing.T) {
	e := NewEvents(4)
	log := slog.New(e.Handler(slog.DiscardHandler)).With("who", "A")
	log.Debug("not kept")
	for i := range 6 {
		log.Info("n", "i", i)
	}
	list, next := e.Since(0, 100)
	if len(list) != 4 || list[0].Seq != 3 || list[3].Text != "n who=A i=5" || next != 7 {
		t.Fatalf("%v %d", list, next)
	}
	list, next = e.Since(4, 2)
	if len(list) != 2 || list[0].Seq != 4 || next != 6 {
		t.Fatalf("%v %d", list, next)
	}
	if list, next = e.Since(7, 2); len(list) != 0 || next != 7 {
		t.Fatalf("%v %d", list, next)
	}
}

func FuzzStrict(f *testing.F) {
	f.Add([]byte(`{"force":true}`))
	f.Add([]byte("{\n\"force\": 1}"))
	f.Add([]byte(`{"x":`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var v struct {
			Force bool   `json:"force"`
			Name  string `json:"name"`
			Size  int64  `json:"size"`
		}
		if err := Strict(b, &v); err != nil && err.Error() == "" {
			t.Fatal("an error without words")
		}
	})
}
