package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"math"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/ledge-storage/ledge/host/meter"
	"github.com/ledge-storage/ledge/host/store"
)

// What an initiator does is in the volume's figures, and in no other's; they begin anew with the agent.
func TestStats(t *testing.T) {
	shelf, dir := standIn(t), t.TempDir()
	ctx := context.Background()
	r, cancel := beginAgent(t, shelf, dir, "a.sock")
	end := sync.OnceFunc(cancel)
	defer end()
	r.wait(t, api.PhaseServing)
	v, err := r.create("db", 64*mib)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.create("idle", 64*mib); err != nil {
		t.Fatal(err)
	}
	dev := dial(t, v)
	p := bytes.Repeat([]byte("ledge123"), mib/8)
	for range 2 {
		if err := dev.WriteAt(ctx, p, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := dev.ReadAt(ctx, p, 0); err != nil {
		t.Fatal(err)
	}
	if err := dev.Unmap(ctx, mib/2, mib/2); err != nil {
		t.Fatal(err)
	}
	var s api.Stats
	r.ask(t, http.MethodGet, "/v1/stats?volume=db", nil, &s)
	if len(s.Volumes) != 1 || len(s.BoundsMicros) != meter.Buckets || s.BoundsMicros[4] != 4 {
		t.Fatalf("%+v", s)
	}
	db := s.Volumes[0]
	if db.Name != "db" || db.UUID != v.UUID || db.Seconds <= 0 || s.At.Sub(db.Since).Seconds() > db.Seconds+1 {
		t.Errorf("%+v", db)
	}
	if db.Writes.Bytes != 2*mib || db.Reads.Bytes < mib || db.Unmaps.Bytes != mib/2 || db.Reads.Errors+db.Writes.Errors+db.Unmaps.Errors != 0 {
		t.Errorf("%+v", db)
	}
	if w := db.Writes; w.Ops == 0 || w.Ops != w.Latency.Count || w.Journal.Count < w.Ops || w.Queue.Count != w.Journal.Count || w.Journal.SumMicros == 0 || w.Journal.SumMicros > w.Latency.SumMicros+db.Unmaps.Latency.SumMicros {
		t.Errorf("%+v", w)
	}
	r.ask(t, http.MethodGet, "/v1/stats", nil, &s)
	if len(s.Volumes) != 2 || s.Volumes[0].Name != "db" || s.Volumes[1].Name != "idle" || s.Volumes[1].Writes.Ops != 0 || s.Volumes[1].Packed.DedupRatio != nil {
		t.Errorf("%+v", s.Volumes)
	}
	if err := r.client.Do(ctx, http.MethodGet, "/v1/stats?volume=none", nil, nil); status(err) != http.StatusNotFound {
		t.Errorf("no such volume: %v", err)
	}
	dev.Close()
	end()
	r, cancel = beginAgent(t, shelf, dir, "a.sock")
	defer cancel()
	r.wait(t, api.PhaseServing)
	r.ask(t, http.MethodGet, "/v1/stats?volume=db", nil, &s)
	if n := s.Volumes[0]; n.Writes.Ops != 0 || !n.Since.After(db.Since) {
		t.Errorf("after a restart: %+v", n)
	}
}

// Ratios are told where there is something to tell, and the longest answer is one that a client takes.
func TestDescribeStats(t *testing.T) {
	m := meter.New()
	m.Duplicates.Store(30)
	if s := describeStats(store.Metered{Meter: m}); s.Packed.Blocks != 30 || s.Packed.DedupRatio != nil {
		t.Errorf("%+v", s.Packed)
	}
	m.Uniques.Store(10)
	m.StoredBytes.Store(20 << 10)
	m.FromCache(0, 100)
	m.FromCache(0, 100)
	m.FromCache(0, 100)
	m.FromShelf(0, 50)
	s := describeStats(store.Metered{Meter: m})
	if *s.Packed.DedupRatio != 4 || *s.Packed.CompressionRatio != 2 {
		t.Errorf("dedup %v, compression %v", *s.Packed.DedupRatio, *s.Packed.CompressionRatio)
	}
	if want := (api.ReadCache{Hits: 3, Misses: 1, HitRate: 0.75, HitBytes: 300, MissBytes: 50}); s.Cache != want {
		t.Errorf("%+v", s.Cache)
	}

	m = meter.New()
	for i, h := range []*meter.Histogram{&m.Reads.Histogram, &m.ReadQueue, &m.Cache, &m.Miss, &m.Shelf, &m.Decode, &m.Writes.Histogram, &m.WriteQueue, &m.Journal, &m.Unmaps.Histogram} {
		for range i + 1 {
			h.Add(0)
		}
	}
	s = describeStats(store.Metered{Meter: m})
	all := []*api.Latency{&s.Reads.Latency, &s.Reads.Queue, &s.Reads.Cache, &s.Reads.Miss, &s.Reads.Shelf, &s.Reads.Decode, &s.Writes.Latency, &s.Writes.Queue, &s.Writes.Journal, &s.Unmaps.Latency}
	for i, l := range all {
		if l.Count != uint64(i+1) {
			t.Errorf("histogram %d counts %d", i, l.Count)
		}
	}

	full := s.Reads.Cache
	full.Buckets = make([]uint64, meter.Buckets)
	for i := range full.Buckets {
		full.Buckets[i] = math.MaxUint32
	}
	for _, l := range all {
		*l = full
	}
	b, err := json.MarshalIndent(s, "    ", "  ")
	if most := 8 << 20; err != nil || len(b)*MaxVolumes > most {
		t.Errorf("%d bytes for %d volumes: %v", len(b)*MaxVolumes, MaxVolumes, err)
	}
}

func TestNoStats(t *testing.T) {
	r := start(t, newMemory(), newFakeShelf(t, true))
	r.wait(t, api.PhaseServing)
	err := r.client.Do(context.Background(), http.MethodGet, "/v1/stats", nil, nil)
	var e *api.Error
	if !errors.As(err, &e) || e.Status != http.StatusNotImplemented || !strings.Contains(e.Message, "no statistics") {
		t.Errorf("%v", err)
	}
}
