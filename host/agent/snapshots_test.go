package agent

import (
	"bytes"
	"context"
	"net/http"
	"testing"

	"github.com/ledge-storage/ledge/host/api"
)

func (r *running) ask(t *testing.T, method, path string, in, out any) {
	t.Helper()
	if err := r.client.Do(context.Background(), method, path, in, out); err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
}

// A snapshot, its clone and a rolled back volume over iSCSI, and after the agent began anew elsewhere; what is refused, and how.
func TestSnapshots(t *testing.T) {
	shelf, dir := standIn(t), t.TempDir()
	ctx := context.Background()
	r, end := beginAgent(t, shelf, dir, "a.sock")
	r.wait(t, api.PhaseServing)
	var vols []api.Volume
	for _, name := range []string{"db", "db-log"} {
		v, err := r.create(name, 64*mib)
		if err != nil {
			t.Fatal(err)
		}
		vols = append(vols, v)
	}
	fill := func(c byte) []byte { return bytes.Repeat([]byte{c}, mib) }
	write := func(v api.Volume, c byte) {
		t.Helper()
		dev := dial(t, v)
		defer dev.Close()
		if err := dev.WriteAt(ctx, fill(c), 4*mib); err != nil {
			t.Fatal(err)
		}
	}
	want := func(r *running, name string, c byte) {
		t.Helper()
		v, err := r.volume(name)
		if err != nil {
			t.Fatal(err)
		}
		dev := dial(t, v)
		defer dev.Close()
		got := make([]byte, mib)
		if err := dev.ReadAt(ctx, got, 4*mib); err != nil || !bytes.Equal(got, fill(c)) {
			t.Errorf("%s: %q…, want %q; %v", name, got[:1], c, err)
		}
	}
	write(vols[0], 'a')
	write(vols[1], 'A')
	var list struct{ Snapshots []api.Snapshot }
	r.ask(t, http.MethodPost, "/v1/snapshots", api.SnapshotRequest{Name: "monday", Volumes: []string{"db", "db-log"}}, &list)
	if s := list.Snapshots; len(s) != 2 || s[0].Group != s[1].Group || s[0].UUID == s[1].UUID || s[0].SizeBytes != 64*mib || s[0].Created.IsZero() {
		t.Errorf("taken: %+v", s)
	}
	write(vols[0], 'b')
	r.ask(t, http.MethodPost, "/v1/snapshots", api.SnapshotRequest{Name: "tuesday", Volumes: []string{"db"}}, &list)
	var clone api.Volume
	r.ask(t, http.MethodPost, "/v1/volumes/db/snapshots/monday/clone", api.CloneRequest{Name: "look"}, &clone)
	if clone.Origin != "db@monday" || clone.IQN == vols[0].IQN || clone.SizeBytes != 64*mib {
		t.Errorf("clone: %+v", clone)
	}
	want(r, "look", 'a')
	want(r, "db", 'b')
	write(clone, 'c')
	want(r, "look", 'c')
	want(r, "db", 'b')
	var d api.Diff
	r.ask(t, http.MethodGet, "/v1/volumes/db/diff?from=monday&to=tuesday", nil, &d)
	if len(d.Ranges) != 1 || d.Ranges[0] != (api.Range{Offset: 4 * mib, Length: mib}) || d.Bytes != mib || d.Next != 0 {
		t.Errorf("diff: %+v", d)
	}
	r.ask(t, http.MethodGet, "/v1/volumes/db/diff?from=tuesday", nil, &d)
	if len(d.Ranges) != 0 {
		t.Errorf("diff since tuesday: %+v", d)
	}

	// Nobody is thrown out without being told to, and nobody for nothing.
	dev := dial(t, vols[0])
	for _, x := range []struct {
		method, path string
		in           any
		status       int
	}{
		{http.MethodPost, "/v1/volumes/db/snapshots/monday/rollback", api.RollbackRequest{}, http.StatusConflict},
		{http.MethodPost, "/v1/volumes/db/snapshots/friday/rollback", api.RollbackRequest{Force: true}, http.StatusNotFound},
		{http.MethodDelete, "/v1/volumes/db?force=true", nil, http.StatusConflict}, // it has snapshots
		{http.MethodPost, "/v1/snapshots", api.SnapshotRequest{Name: "monday", Volumes: []string{"db"}}, http.StatusConflict},
		{http.MethodPost, "/v1/snapshots", api.SnapshotRequest{Name: "x", Volumes: []string{"none"}}, http.StatusNotFound},
		{http.MethodPost, "/v1/snapshots", api.SnapshotRequest{Name: "x@y", Volumes: []string{"db"}}, http.StatusBadRequest},
		{http.MethodPost, "/v1/snapshots", api.SnapshotRequest{Name: "x"}, http.StatusBadRequest},
		{http.MethodPost, "/v1/volumes/db/snapshots/monday/clone", api.CloneRequest{Name: "db-log"}, http.StatusConflict},
		{http.MethodPost, "/v1/volumes/db/promote", nil, http.StatusConflict},
		{http.MethodDelete, "/v1/volumes/db/snapshots/friday", nil, http.StatusNotFound},
		{http.MethodGet, "/v1/volumes/db/diff?from=friday", nil, http.StatusNotFound},
		{http.MethodGet, "/v1/volumes/db/diff?offset=-1", nil, http.StatusBadRequest},
		{http.MethodGet, "/v1/snapshots?volume=none", nil, http.StatusNotFound},
	} {
		if err := r.client.Do(ctx, x.method, x.path, x.in, nil); status(err) != x.status {
			t.Errorf("%s %s: %v, want %d", x.method, x.path, err, x.status)
		}
	}
	if err := dev.ReadAt(ctx, make([]byte, mib), 4*mib); err != nil {
		t.Errorf("after what was refused: %v", err)
	}
	var v api.Volume
	r.ask(t, http.MethodPost, "/v1/volumes/db/snapshots/monday/rollback", api.RollbackRequest{Force: true}, &v)
	if v.Snapshots != 2 {
		t.Errorf("rolled back: %+v", v)
	}
	dev.Close()
	want(r, "db", 'a')

	// A volume has another name: its target, what it holds, its snapshots, and the clone's origin.
	dev = dial(t, vols[0])
	for _, x := range []struct {
		name string
		in   api.RenameRequest
		want int
	}{
		{"db", api.RenameRequest{Name: "new"}, http.StatusConflict}, // it is in use
		{"db", api.RenameRequest{Name: "look", Force: true}, http.StatusConflict},
		{"db", api.RenameRequest{Name: "New", Force: true}, http.StatusBadRequest},
		{"none", api.RenameRequest{Name: "new"}, http.StatusNotFound},
	} {
		if err := r.client.Do(ctx, http.MethodPost, "/v1/volumes/"+x.name+"/rename", x.in, nil); status(err) != x.want {
			t.Errorf("rename %s %+v: %v, want %d", x.name, x.in, err, x.want)
		}
	}
	if err := dev.ReadAt(ctx, make([]byte, mib), 4*mib); err != nil {
		t.Errorf("after renaming was refused: %v", err)
	}
	r.ask(t, http.MethodPost, "/v1/volumes/db/rename", api.RenameRequest{Name: "new", Force: true}, &v)
	if v.Name != "new" || v.UUID != vols[0].UUID || v.IQN == vols[0].IQN || v.Snapshots != 2 {
		t.Errorf("renamed: %+v", v)
	}
	dev.Close()
	want(r, "new", 'a')
	if look, err := r.volume("look"); err != nil || look.Origin != "new@monday" {
		t.Errorf("the clone of what was renamed: %+v, %v", look, err)
	}
	r.ask(t, http.MethodPost, "/v1/volumes/new/rename", api.RenameRequest{Name: "db", Force: true}, &v)
	want(r, "db", 'a')

	// The clone takes the snapshots over, and the volume can go.
	r.ask(t, http.MethodPost, "/v1/volumes/look/promote", nil, &v)
	if v.Snapshots != 1 || v.Origin != "" {
		t.Errorf("promoted: %+v", v)
	}
	r.ask(t, http.MethodDelete, "/v1/volumes/db/snapshots/tuesday", nil, nil)
	r.ask(t, http.MethodDelete, "/v1/volumes/db?force=true", nil, nil) // the last session may still be ending
	end()

	again, end := beginAgent(t, shelf, dir, "b.sock")
	again.wait(t, api.PhaseServing)
	want(again, "look", 'c')
	want(again, "db-log", 'A')
	again.ask(t, http.MethodGet, "/v1/snapshots", nil, &list)
	if s := list.Snapshots; len(s) != 2 || s[0].Name != "monday" || s[1].Name != "monday" {
		t.Errorf("elsewhere: %+v", s)
	}
	again.ask(t, http.MethodPost, "/v1/volumes/look/snapshots/monday/clone", api.CloneRequest{Name: "old"}, &v)
	want(again, "old", 'a')
	end()
}

// An engine without snapshots says so.
func TestNoSnapshots(t *testing.T) {
	r := start(t, newMemory(), newFakeShelf(t, true))
	r.wait(t, api.PhaseServing)
	err := r.client.Do(context.Background(), http.MethodGet, "/v1/snapshots", nil, nil)
	if status(err) != http.StatusNotImplemented {
		t.Error(err)
	}
}
