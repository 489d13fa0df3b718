package agent

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/ledge-storage/ledge/host/qcow2"
)

// fetch exports a volume, and opens what came.
func (r *running) fetch(t *testing.T, path string) (raw []byte, m *qcow2.Image) {
	t.Helper()
	resp, err := r.client.Get(context.Background(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if raw, err = io.ReadAll(resp.Body); err != nil || int64(len(raw)) != resp.ContentLength || resp.Header.Get("Content-Type") != api.ImageType {
		t.Fatalf("%d bytes of %d, %q: %v", len(raw), resp.ContentLength, resp.Header.Get("Content-Type"), err)
	}
	if m, err = qcow2.Open(bytes.NewReader(raw), int64(len(raw))); err != nil {
		t.Fatal(err)
	}
	return raw, m
}

func (r *running) send(name string, body io.Reader, bytes int64, query string) (v api.Volume, err error) {
	return v, r.client.Send(context.Background(), "/v1/volumes/"+name+"/import"+query, body, bytes, &v)
}

// A volume leaves and comes back, of the instant of the order and of a snapshot; what is refused, and that it leaves nothing.
func TestTransfer(t *testing.T) {
	shelf, dir, ctx := standIn(t), t.TempDir(), context.Background()
	r, end := beginAgent(t, shelf, dir, "a.sock")
	r.wait(t, api.PhaseServing)
	v, err := r.create("db", 64*mib)
	if err != nil {
		t.Fatal(err)
	}
	write := func(c byte, off int64, n int) {
		t.Helper()
		dev := dial(t, v)
		defer dev.Close()
		if err := dev.WriteAt(ctx, bytes.Repeat([]byte{c}, n), off); err != nil {
			t.Fatal(err)
		}
	}
	want := func(m qcow2.Source, c byte, off int64, n int) {
		t.Helper()
		got := make([]byte, n)
		if err := m.ReadAt(ctx, got, off); err != nil || !bytes.Equal(got, bytes.Repeat([]byte{c}, n)) {
			t.Errorf("%d bytes at %d: %q…, want %q: %v", n, off, got[:1], c, err)
		}
	}
	write('a', 4*mib, mib)
	write('z', 64*mib-4096, 4096)
	r.ask(t, http.MethodPost, "/v1/snapshots", api.SnapshotRequest{Name: "monday", Volumes: []string{"db"}}, nil)
	write('b', 4*mib, 4096)

	now, m := r.fetch(t, "/v1/volumes/db/export")
	if m.Size() != 64*mib || len(now) > 3*mib {
		t.Errorf("disk of %d bytes in %d", m.Size(), len(now))
	}
	want(m, 'b', 4*mib, 4096)
	want(m, 'a', 4*mib+4096, mib-4096)
	want(m, 0, 10*mib, 4096)
	want(m, 'z', 64*mib-4096, 4096)
	_, m = r.fetch(t, "/v1/volumes/db/export?snapshot=monday")
	want(m, 'a', 4*mib, mib)
	var list struct{ Snapshots []api.Snapshot }
	r.ask(t, http.MethodGet, "/v1/snapshots", nil, &list)
	if len(list.Snapshots) != 1 {
		t.Errorf("an export leaves snapshots: %+v", list.Snapshots)
	}

	copied, err := r.send("copy", bytes.NewReader(now), int64(len(now)), "?size_bytes=134217728&compression=zstd")
	if err != nil || copied.SizeBytes != 128*mib || copied.Compression != "zstd" || copied.Origin != "" || copied.Snapshots != 0 {
		t.Fatalf("import: %+v, %v", copied, err)
	}
	dev := dial(t, copied)
	got := make([]byte, mib)
	if err := dev.ReadAt(ctx, got, 4*mib); err != nil || got[0] != 'b' || got[4096] != 'a' || got[mib-1] != 'a' {
		t.Errorf("imported: %q %q, %v", got[0], got[4096], err)
	}
	dev.Close()

	for _, c := range []struct {
		name, query string
		body        io.Reader
		status      int
		says        string
	}{
		{"copy", "", bytes.NewReader(now), http.StatusConflict, "exists"},
		{"no_name", "", bytes.NewReader(now), http.StatusBadRequest, "volume name"},
		{"rubbish", "", strings.NewReader(strings.Repeat("rubbish ", 100)), http.StatusBadRequest, "not a valid image"},
		{"short", "", bytes.NewReader(now[:len(now)/2]), http.StatusBadRequest, "ends at byte"},
		{"small", "?size_bytes=4096", bytes.NewReader(now), http.StatusBadRequest, "64 MiB"},
		{"odd", "?compression=lz4", bytes.NewReader(now), http.StatusBadRequest, "zstd"},
		{"odd", "?size_bytes=many", bytes.NewReader(now), http.StatusBadRequest, "size_bytes"},
	} {
		if _, err := r.send(c.name, c.body, -1, c.query); status(err) != c.status || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want %d %q", c.name, err, c.status, c.says)
		}
	}
	for path, want := range map[string]int{"/v1/volumes/none/export": 404, "/v1/volumes/db/export?snapshot=none": 404, "/v1/volumes/_reservations/export": 400, "/v1/volumes/db/export?snapshot=_x": 400} {
		if _, err := r.client.Get(ctx, path); status(err) != want {
			t.Errorf("%s: %v, want %d", path, err, want)
		}
	}
	if all, _ := r.Agent.volumes(); len(all) != 2 {
		t.Errorf("volumes: %+v", all)
	}

	// The agent ends in mid-import, and the store is opened elsewhere.
	body, half := io.Pipe()
	failed := make(chan error, 1)
	go func() {
		_, err := r.send("half", body, int64(len(now)), "")
		failed <- err
	}()
	if _, err := half.Write(now[:len(now)-1000]); err != nil {
		t.Fatal(err)
	}
	for began := time.Now(); time.Since(began) < time.Minute; time.Sleep(10 * time.Millisecond) {
		if e, err := r.current(); err == nil {
			if _, err := e.(Transferrer).Blocks(importPrefix+"half", ""); err == nil {
				break
			}
		}
	}
	if _, err := r.send("half", bytes.NewReader(now), int64(len(now)), ""); status(err) != http.StatusConflict || !strings.Contains(err.Error(), "another import") {
		t.Errorf("a second import of the same name: %v", err)
	}
	end()
	half.CloseWithError(errors.New("gone"))
	if err := <-failed; err == nil {
		t.Error("an import whose agent ended succeeded")
	}
	r, end = beginAgent(t, shelf, dir, "b.sock")
	defer end()
	r.wait(t, api.PhaseServing)
	if all, err := r.Agent.volumes(); err != nil || len(all) != 2 {
		t.Errorf("after an interrupted import: %+v, %v", all, err)
	}
	e, _ := r.current()
	if _, err := e.(Transferrer).Blocks(importPrefix+"half", ""); err == nil {
		t.Error("the hidden volume is still there")
	}
	if _, err := r.send("half", bytes.NewReader(now), int64(len(now)), ""); err != nil {
		t.Errorf("the same import again: %v", err)
	}
}
