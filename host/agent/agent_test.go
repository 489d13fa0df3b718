package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/ledge-storage/ledge/host/initiator"
	"github.com/ledge-storage/ledge/host/store"
	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/mem"
	"github.com/ledge-storage/ledge/target/scsi"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// memory is an engine of volumes in memory; it outlives the sessions of an agent, as a shelf does.
type memory struct {
	mu      sync.Mutex
	volumes map[string]*mem.Device
	sizes   map[string]int64
	err     error
	full    bool
	opened  int
	refuse  func(acceptLost bool) error // of opening
}

func newMemory() *memory {
	return &memory{volumes: map[string]*mem.Device{}, sizes: map[string]int64{}}
}

func (m *memory) open(_ context.Context, _ api.Grant, acceptLost bool) (Engine, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.opened++
	if m.refuse != nil {
		if err := m.refuse(acceptLost); err != nil {
			return nil, err
		}
	}
	m.err = nil
	return m, nil
}

func (m *memory) CreateVolume(_ context.Context, name string, n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.volumes[name] != nil {
		return fmt.Errorf("%q: %w", name, store.ErrExists)
	}
	if m.full {
		return fmt.Errorf("journal: %w", target.ErrNoSpace)
	}
	d, err := mem.New(mem.Options{Bytes: n, Name: name})
	m.volumes[name], m.sizes[name] = d, n
	return err
}

func (m *memory) ResizeVolume(_ context.Context, name string, n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sizes[name] = n
	return nil
}

func (m *memory) DeleteVolume(_ context.Context, name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.volumes[name] == nil {
		return fmt.Errorf("%q: %w", name, store.ErrNotFound)
	}
	delete(m.volumes, name)
	return nil
}

func (m *memory) Volumes() (out []VolumeInfo) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for name := range m.volumes {
		out = append(out, VolumeInfo{Name: name, SizeBytes: m.sizes[name]})
	}
	return out
}

func (m *memory) Device(name string) (target.Device, error)          { return m.volumes[name], nil }
func (m *memory) Reservations(string) (scsi.ReservationStore, error) { return nil, nil }
func (m *memory) Stats() EngineStats                                 { return EngineStats{Store: "memory"} }
func (m *memory) Close(context.Context) error                        { return nil }
func (m *memory) Err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

// fakeShelf answers PUT /v1/hosts/{name} as a controller does.
type fakeShelf struct {
	mu     sync.Mutex
	owner  bool
	asked  map[string]any
	server *httptest.Server
}

func newFakeShelf(t *testing.T, owner bool) *fakeShelf {
	s := &fakeShelf{owner: owner}
	s.server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if r.Method != http.MethodPut || r.URL.Path != "/v1/hosts/h1" || r.Header.Get("Authorization") != "Bearer secret" {
			t.Errorf("asked %s %s with %q", r.Method, r.URL.Path, r.Header.Get("Authorization"))
		}
		if !s.owner {
			w.WriteHeader(http.StatusConflict)
			fmt.Fprint(w, `{"error":"controller B does not own the pool","hint":"ask controller A"}`)
			return
		}
		json.NewDecoder(r.Body).Decode(&s.asked)
		json.NewEncoder(w).Encode(api.Grant{Initiator: "iqn.2026-11.io.ledge:host.h1:e1", Target: "iqn.2026-11.io.ledge:shelf.s1", Portals: []string{"127.0.0.1:1"}, JournalLUN: 1, StoreLUN: 2})
	}))
	t.Cleanup(s.server.Close)
	return s
}

type running struct {
	*Agent
	client *api.Client
	done   chan error
	cancel context.CancelFunc
}

func start(t *testing.T, m *memory, shelves ...*fakeShelf) *running {
	t.Helper()
	return startWith(t, m, func(*Config) {}, shelves...)
}

func startWith(t *testing.T, m *memory, change func(*Config), shelves ...*fakeShelf) *running {
	t.Helper()
	cfg := Config{Name: "h1", Initiator: "iqn.2026-11.io.ledge:host.h1", ShelfToken: "secret", Listen: "127.0.0.1:0", API: filepath.Join(t.TempDir(), "a.sock"), JournalBytes: 256 * mib, StoreBytes: tib}
	for _, s := range shelves {
		cfg.ShelfAPIs = append(cfg.ShelfAPIs, s.server.URL)
	}
	change(&cfg)
	a, err := New(cfg, Options{Open: m.open, CheckInterval: 5 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	c, err := api.New("unix:"+cfg.API, "")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{a, c, make(chan error, 1), cancel}
	go func() { r.done <- a.Run(ctx) }()
	t.Cleanup(func() { cancel(); c.Close(); <-r.done })
	return r
}

func (r *running) status(t *testing.T) (s api.Status) {
	t.Helper()
	if err := r.client.Do(context.Background(), "GET", "/v1/status", nil, &s); err != nil {
		t.Fatal(err)
	}
	return s
}

func (r *running) wait(t *testing.T, phase string) api.Status {
	t.Helper()
	for {
		if s := r.status(t); s.Phase == phase {
			return s
		}
		time.Sleep(time.Millisecond)
	}
}

func (r *running) create(name string, n int64) (v api.Volume, err error) {
	err = r.client.Do(context.Background(), "POST", "/v1/volumes", api.CreateRequest{Name: name, SizeBytes: n}, &v)
	return v, err
}

// What the store cannot read of the maps, or of the journal, is given up by an order, for one opening, and only where that is why it is not open.
func TestAcceptLost(t *testing.T) {
	t.Run("map", func(t *testing.T) { testAcceptLost(t, store.ErrMap) })
	t.Run("journal", func(t *testing.T) { testAcceptLost(t, store.ErrJournal) })
}

func testAcceptLost(t *testing.T, cause error) {
	m := newMemory()
	var mu sync.Mutex
	lost, order := error(errors.New("no path")), []bool{}
	m.refuse = func(acceptLost bool) error {
		mu.Lock()
		defer mu.Unlock()
		if order = append(order, acceptLost); acceptLost && canBeGivenUp(lost) {
			return nil
		}
		return lost
	}
	shelf := newFakeShelf(t, true)
	r := start(t, m, shelf)
	trouble := func(want string) {
		t.Helper()
		for !strings.Contains(r.status(t).Trouble, want) {
			time.Sleep(time.Millisecond)
		}
	}
	accept := func() error {
		return r.client.Do(context.Background(), "POST", "/v1/store/accept-lost", map[string]any{}, new(api.Status))
	}
	trouble("no path")
	if err := accept(); status(err) != http.StatusConflict || !strings.Contains(err.Error(), "no path") {
		t.Errorf("ordered where it is of no use: %v", err)
	}
	mu.Lock()
	lost = fmt.Errorf("store: recover: %w: %w", target.ErrNoSpace, target.ErrMediumRead)
	mu.Unlock()
	trouble("store: recover")
	if err := accept(); status(err) != http.StatusConflict {
		t.Errorf("ordered where a checkpoint is lost: %v", err)
	}
	mu.Lock()
	lost = fmt.Errorf("store: %w: %w", cause, target.ErrMediumRead)
	mu.Unlock()
	trouble("ledge host accept-lost")
	if err := accept(); err != nil {
		t.Fatal(err)
	}
	r.wait(t, api.PhaseServing)
	if err := accept(); status(err) != http.StatusConflict {
		t.Errorf("ordered of a store that is open: %v", err)
	}
	mu.Lock()
	before := len(order)
	if !order[before-1] || slices.Contains(order[:before-1], true) {
		t.Errorf("openings that may give up: %v", order)
	}
	mu.Unlock()
	m.mu.Lock()
	m.err = lost // another page, later
	m.mu.Unlock()
	trouble("ledge host accept-lost")
	opened := func() int {
		mu.Lock()
		defer mu.Unlock()
		return len(order)
	}
	for opened() == before { // until it was tried once more
		time.Sleep(time.Millisecond)
	}
	mu.Lock()
	defer mu.Unlock()
	if slices.Contains(order[before:], true) {
		t.Errorf("the order was kept: %v", order)
	}
}

// The agent waits for an owner, says so meanwhile, and exports what is created to a real initiator;
// after the engine failed it opens again with the same volumes.
func TestLife(t *testing.T) {
	a, b := newFakeShelf(t, false), newFakeShelf(t, false)
	m := newMemory()
	r := start(t, m, a, b)
	for s := r.status(t); !strings.Contains(s.Trouble, "ask controller A"); s = r.status(t) {
		if s.Phase != api.PhaseJoining {
			t.Fatalf("phase %s", s.Phase)
		}
		time.Sleep(time.Millisecond)
	}
	if _, err := r.create("early", 4096); status(err) != http.StatusServiceUnavailable {
		t.Fatalf("create while joining: %v", err)
	}
	b.mu.Lock()
	b.owner = true
	b.mu.Unlock()
	if s := r.wait(t, api.PhaseServing); s.Trouble != "" || s.Store != "memory" {
		t.Fatalf("serving: %+v", s)
	}
	if b.asked["initiator"] != "iqn.2026-11.io.ledge:host.h1" || b.asked["journal_bytes"] != float64(256*mib) {
		t.Fatalf("asked the shelf %v", b.asked)
	}

	v, err := r.create("demo", 16*mib)
	if err != nil {
		t.Fatal(err)
	}
	dev := dial(t, v)
	data := bytes.Repeat([]byte("ledge123"), 1<<17)
	if err := dev.WriteAt(context.Background(), data, 4096); err != nil {
		t.Fatal(err)
	}
	m.mu.Lock()
	m.err = errors.New("journal lost")
	m.mu.Unlock()
	for {
		m.mu.Lock()
		opened := m.opened
		m.mu.Unlock()
		if opened == 2 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	got := make([]byte, len(data))
	if err := dev.ReadAt(context.Background(), got, 4096); err != nil || !bytes.Equal(got, data) { // through the restart
		t.Fatalf("read after the engine's restart: %v", err)
	}
	dev.Close()
	r.cancel()
	if err := <-r.done; err != nil {
		t.Fatal(err)
	}
	r.done <- nil
	if _, err := net.Dial("unix", r.cfg.API); err == nil {
		t.Fatal("the API answers after Run returned")
	}
}

func dial(t *testing.T, v api.Volume) *initiator.Device {
	t.Helper()
	dev, err := initiator.Open(context.Background(), initiator.Config{Portals: []string{v.Portal}, Target: v.IQN, LUN: v.LUN, Initiator: "iqn.2026-11.test:client"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dev.Close() })
	return dev
}

func status(err error) int {
	var e *api.Error
	if errors.As(err, &e) {
		return e.Status
	}
	return 0
}

// Every refused request has the right status, names what is wrong, and changes nothing.
func TestVolumeRequests(t *testing.T) {
	m := newMemory()
	r := start(t, m, newFakeShelf(t, true))
	r.wait(t, api.PhaseServing)
	if _, err := r.create("one", 8*mib); err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	for _, c := range []struct {
		method, path string
		in           any
		status       int
		says         string
	}{
		{"POST", "/v1/volumes", api.CreateRequest{Name: "one", SizeBytes: 4096}, 409, "exists already"},
		{"POST", "/v1/volumes", api.CreateRequest{Name: "Big", SizeBytes: 4096}, 400, `"Big"`},
		{"POST", "/v1/volumes", api.CreateRequest{Name: "-x", SizeBytes: 4096}, 400, `"-x"`},
		{"POST", "/v1/volumes", api.CreateRequest{Name: strings.Repeat("x", 64), SizeBytes: 4096}, 400, "1 to 63"},
		{"POST", "/v1/volumes", api.CreateRequest{Name: "two", SizeBytes: 4097}, 400, "no multiple of 4096"},
		{"POST", "/v1/volumes", api.CreateRequest{Name: "two", SizeBytes: 0}, 400, "at least"},
		{"POST", "/v1/volumes", api.CreateRequest{Name: "two", SizeBytes: -4096}, 400, "-4096"},
		{"POST", "/v1/volumes", api.CreateRequest{Name: "two", SizeBytes: MaxVolumeBytes + 4096}, 400, "the largest volume is 64 TiB"},
		{"POST", "/v1/volumes", map[string]any{"name": "two", "size_bytes": 4096, "colour": 1}, 400, `field "colour"`},
		{"POST", "/v1/volumes", map[string]any{"name": "two", "size_bytes": "16GiB"}, 400, `field "size_bytes": value "16GiB"`},
		{"POST", "/v1/volumes", map[string]any{"name": "two"}, 400, `field "size_bytes": missing`},
		{"POST", "/v1/volumes", []int{1}, 400, "JSON object"},
		{"POST", "/v1/volumes", strings.Repeat("x", 70<<10), 413, "65536"},
		{"POST", "/v1/volumes", api.CreateRequest{Name: "two", SizeBytes: 4096, Compression: "lz4"}, 400, "zstd"},
		{"POST", "/v1/volumes", api.CreateRequest{Name: "two", SizeBytes: 4096, Compression: "zstd"}, 501, "does not compress"},
		{"POST", "/v1/volumes/one/compression", api.CompressionRequest{Compression: "lz4"}, 400, `"lz4"`},
		{"POST", "/v1/volumes/one/compression", map[string]any{}, 400, `field "compression": missing`},
		{"POST", "/v1/volumes/nope/compression", api.CompressionRequest{Compression: "off"}, 404, `"nope"`},
		{"POST", "/v1/index", map[string]any{"size_bytes": 1 << 20}, 400, "4 MiB to 64 GiB"},
		{"POST", "/v1/index", map[string]any{"size_bytes": 1 << 30}, 501, "no index"},
		{"POST", "/v1/index", map[string]any{}, 400, `field "size_bytes": missing`},
		{"POST", "/v1/store/accept-lost", map[string]any{}, 409, "the store is open"},
		{"POST", "/v1/store/accept-lost", map[string]any{"force": true}, 400, `field "force"`},
		{"GET", "/v1/volumes/nope", nil, 404, `"nope"`},
		{"DELETE", "/v1/volumes/nope", nil, 404, `"nope"`},
		{"POST", "/v1/volumes/nope/resize", api.ResizeRequest{SizeBytes: 4096}, 404, `"nope"`},
		{"POST", "/v1/volumes/one/resize", api.ResizeRequest{SizeBytes: 4096}, 409, "cut off"},
		{"POST", "/v1/volumes/one/resize", api.ResizeRequest{SizeBytes: 100}, 400, "multiple"},
		{"GET", "/v2/volumes", nil, 404, "/v2/volumes"},
		{"PATCH", "/v1/volumes", nil, 404, "PATCH"},
	} {
		var out any
		err := r.client.Do(ctx, c.method, c.path, c.in, &out)
		if status(err) != c.status || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s %s %.60v: got %v (%d), want %d with %q", c.method, c.path, c.in, err, status(err), c.status, c.says)
		}
	}
	var list struct{ Volumes []api.Volume }
	if err := r.client.Do(ctx, "GET", "/v1/volumes", nil, &list); err != nil || len(list.Volumes) != 1 || list.Volumes[0].SizeBytes != 8*mib {
		t.Fatalf("%v, %+v", err, list)
	}
	var v api.Volume
	if err := r.client.Do(ctx, "POST", "/v1/volumes/one/resize", api.ResizeRequest{SizeBytes: 4 * mib, Shrink: true}, &v); err != nil || v.SizeBytes != 4*mib {
		t.Fatalf("%v, %+v", err, v)
	}
	m.full = true
	if _, err := r.create("three", 4096); status(err) != http.StatusInsufficientStorage {
		t.Fatalf("full: %v", err)
	}
	m.full = false
	for i := 1; i < MaxVolumes; i++ {
		if _, err := r.create(fmt.Sprint("v", i), 4096); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := r.create("v256", 4096); status(err) != http.StatusConflict || !strings.Contains(err.Error(), "256 volumes") {
		t.Fatalf("one too many: %v", err)
	}
	if err := r.client.Do(ctx, "DELETE", "/v1/volumes/one", nil, nil); err != nil {
		t.Fatal(err)
	}
	// The initiator tries until its context ends. On a busy machine it takes more than a moment to hear why.
	for limit := 100 * time.Millisecond; ; limit *= 4 {
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		_, err := initiator.Open(ctx, initiator.Config{Portals: []string{v.Portal}, Target: v.IQN, Initiator: "iqn.2026-11.test:client"})
		cancel()
		if err != nil && strings.Contains(err.Error(), "not found") {
			break
		}
		if err == nil || limit > time.Minute {
			t.Fatalf("the target of a deleted volume: %v", err)
		}
	}
}

// Another host has the store: the agent ends, and says so.
func TestFenced(t *testing.T) {
	m := newMemory()
	r := start(t, m, newFakeShelf(t, true))
	r.wait(t, api.PhaseServing)
	m.mu.Lock()
	m.err = fmt.Errorf("%w: %w", store.ErrFailed, store.ErrFenced)
	m.mu.Unlock()
	if err := <-r.done; !errors.Is(err, store.ErrFenced) {
		t.Fatalf("got %v", err)
	}
	r.done <- nil
}

// Two agents on one socket: the second says so, and the first goes on.
func TestSocketInUse(t *testing.T) {
	m := newMemory()
	r := start(t, m, newFakeShelf(t, true))
	cfg := r.cfg
	cfg.Listen = "127.0.0.1:0"
	if _, err := New(cfg, Options{Open: m.open}); err == nil || !strings.Contains(err.Error(), "another agent") {
		t.Fatalf("got %v", err)
	}
	cfg.API, cfg.Listen = filepath.Join(t.TempDir(), "b.sock"), r.Portal()
	if _, err := New(cfg, Options{Open: m.open}); err == nil || !strings.Contains(err.Error(), `"listen"`) {
		t.Fatalf("got %v", err)
	}
	r.wait(t, api.PhaseServing)
}
