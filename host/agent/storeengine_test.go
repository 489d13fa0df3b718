package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/ledge-storage/ledge/target/iscsi"
	"github.com/ledge-storage/ledge/target/mem"
	"github.com/ledge-storage/ledge/target/scsi"
)

// standIn is a shelf of one controller: our target engine over memory, and the API that grants its LUNs.
func standIn(t *testing.T) (address string) {
	t.Helper()
	const name = "iqn.2026-11.io.ledge:shelf.test"
	// Who uses a claim's name proves that he has its secret, and the target proves itself.
	srv, err := iscsi.NewServer(iscsi.Options{Auth: func(initiator, _ string) *iscsi.CHAP {
		return &iscsi.CHAP{User: "u", Secret: "secret of " + initiator, MutualUser: "t", MutualSecret: "target's of " + initiator}
	}})
	if err != nil {
		t.Fatal(err)
	}
	tg := scsi.NewTarget(name, scsi.Options{})
	for lun, size := range map[uint64]int64{5: 64 * mib, 6: 16 * gib} {
		d, err := mem.New(mem.Options{Bytes: size, BlockBytes: 4096, Name: string(rune('a' + lun))})
		if err != nil {
			t.Fatal(err)
		}
		if err := tg.Attach(lun, d, scsi.UnitOptions{Initiators: []string{}}); err != nil {
			t.Fatal(err)
		}
	}
	if err := srv.AddTarget(tg); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { srv.Serve(context.Background(), l); close(done) }()
	var claims atomic.Int32
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// As the shelf does: only the newest claim's name sees the LUNs from here on.
		mine := fmt.Sprintf("iqn.2026-11.io.ledge:host.h1:e%d", claims.Add(1))
		for _, lun := range []uint64{5, 6} {
			if err := tg.SetInitiators(lun, []string{mine}); err != nil {
				t.Error(err)
			}
		}
		json.NewEncoder(w).Encode(api.Grant{Initiator: mine, Target: name, Portals: []string{l.Addr().String()}, JournalLUN: 5, StoreLUN: 6,
			CHAP: &api.CHAP{User: "u", Secret: "secret of " + mine, TargetUser: "t", TargetSecret: "target's of " + mine}})
	}))
	t.Cleanup(func() { web.Close(); srv.Close(); <-done })
	return web.URL
}

// beginAgent runs an agent with the real store; the function it returns ends it.
func beginAgent(t *testing.T, shelf, dir, name string) (*running, context.CancelFunc) {
	cfg := Config{Name: "h1", Initiator: "iqn.2026-11.io.ledge:host.h1", ShelfAPIs: []string{shelf}, Listen: "127.0.0.1:0", API: filepath.Join(dir, name),
		CachePath: filepath.Join(dir, name+".cache"), CacheBytes: 64 * mib, BufferBytes: 16 * mib, JournalBytes: 64 * mib, StoreBytes: tib}
	return beginWith(t, cfg, time.Now)
}

// beginWith begins an agent on the shelf's LUNs.
func beginWith(t *testing.T, cfg Config, now func() time.Time) (*running, context.CancelFunc) {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	a, err := New(cfg, Options{Logger: log, Open: OpenStore(cfg, log), CheckInterval: 5 * time.Millisecond, Now: now})
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
	return r, func() {
		cancel()
		c.Close()
		if err := <-r.done; err != nil {
			t.Error(err)
		}
	}
}

// The real agent on a stand-in shelf: what was written is there after a clean restart and on another host
// without the first one's cache (P6), and the figures show dedup.
func TestStoreEngine(t *testing.T) {
	shelf, dir := standIn(t), t.TempDir()
	begin := func(name string) (*running, context.CancelFunc) { return beginAgent(t, shelf, dir, name) }
	ctx := context.Background()
	data := make([]byte, 8*mib)
	words := strings.Fields("journal segment stripe member epoch lease shelf host volume mirror")
	r := rand.New(rand.NewPCG(1, 2))
	for i := range data {
		if i%8 == 0 {
			copy(data[i:], words[r.IntN(len(words))])
		}
	}

	first, end := begin("a.sock")
	first.wait(t, api.PhaseServing)
	v, err := first.create("demo", 256*mib)
	if err != nil {
		t.Fatal(err)
	}
	compressed := func(r *running, name, want string) {
		t.Helper()
		if v, err := r.volume(name); err != nil || v.Compression != want {
			t.Errorf("volume %s is compressed with %q, not %q: %v", name, v.Compression, want, err)
		}
	}
	compressed(first, "demo", "s2")
	for name, c := range map[string]string{"packed": "zstd", "plain": "off"} {
		if err := first.client.Do(ctx, "POST", "/v1/volumes", api.CreateRequest{Name: name, SizeBytes: mib, Compression: c}, nil); err != nil {
			t.Error(err)
		}
		compressed(first, name, c)
	}
	if err := first.client.Do(ctx, "POST", "/v1/volumes/plain/compression", api.CompressionRequest{Compression: "zstd"}, nil); err != nil {
		t.Error(err)
	}
	dev := dial(t, v)
	for _, off := range []int64{0, 64 * mib} { // the same data twice
		if err := dev.WriteAt(ctx, data, off); err != nil {
			t.Fatal(err)
		}
	}
	dev.Close()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		w := first.wait(t, api.PhaseServing).Work
		if w != nil && w.Stored+w.Duplicates+w.Overwritten >= 2*int64(len(data))/4096 && w.Duplicates >= int64(len(data))/4096*9/10 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("work: %+v", w)
		}
	}
	end()

	for _, name := range []string{"a.sock", "b.sock"} {
		again, end := begin(name)
		s := again.wait(t, api.PhaseServing)
		compressed(again, "packed", "zstd")
		compressed(again, "plain", "zstd")
		compressed(again, "demo", "s2")
		if m := s.Maps; m == nil || m.LimitBytes < mib || m.Pages == 0 || m.Bytes == 0 {
			t.Errorf("%s: maps %+v", name, m)
		}
		var x api.Index
		if err := again.client.Do(ctx, "POST", "/v1/index", map[string]int64{"size_bytes": 16 << 20}, &x); err != nil || x.Bytes != 16<<20 {
			t.Errorf("%s: index %+v, %v", name, x, err)
		}
		if s = again.wait(t, api.PhaseServing); s.Index == nil || s.Index.Bytes != 16<<20 || s.Index.Sampled {
			t.Errorf("%s: index %+v", name, s.Index)
		}
		if s.Volumes != 3 || len(s.Paths) != 2 || s.LogicalBytes != 2*int64(len(data)) || s.UniqueBytes > int64(len(data))*11/10 {
			t.Errorf("%s: %+v", name, s)
		}
		if v, err = again.volume("demo"); err != nil {
			t.Fatal(err)
		}
		dev := dial(t, v)
		got := make([]byte, len(data))
		for _, off := range []int64{0, 64 * mib} {
			if err := dev.ReadAt(ctx, got, off); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%s: read at %d: %v", name, off, err)
			}
		}
		dev.Close()
		end()
	}
}

// Two agents of one host: the one that came first is shut out, so that it acknowledges nothing which the one that
// came last, and everybody after it, would not know (P5, P6).
func TestEarlierAgentIsShutOut(t *testing.T) {
	shelf, dir := standIn(t), t.TempDir()
	first, endFirst := beginAgent(t, shelf, dir, "a.sock")
	first.wait(t, api.PhaseServing)
	v, err := first.create("demo", 256*mib)
	if err != nil {
		t.Fatal(err)
	}
	old := dial(t, v)
	defer old.Close()
	block := bytes.Repeat([]byte{1}, 4096)
	if err := old.WriteAt(t.Context(), block, 0); err != nil {
		t.Fatal(err)
	}

	last, endLast := beginAgent(t, shelf, dir, "b.sock")
	last.wait(t, api.PhaseServing)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if err := old.WriteAt(ctx, bytes.Repeat([]byte{2}, 4096), 0); err == nil {
		t.Error("an agent that was shut out acknowledged a write")
	}
	if v, err = last.volume("demo"); err != nil {
		t.Fatal(err)
	}
	dev := dial(t, v)
	got := make([]byte, 4096)
	if err := dev.ReadAt(t.Context(), got, 0); err != nil || !bytes.Equal(got, block) {
		t.Errorf("the newer agent reads %x…: %v", got[:4], err)
	}
	dev.Close()
	endLast()
	endFirst()
}
