package agent

import (
	"context"
	"net/http"
	"strings"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/ledge-storage/ledge/host/store"
)

// Snapshots, clones, and what is done with them. A snapshot is no target: who wants to read one clones it, which takes a
// millisecond and no space. What takes content away from under initiators (rollback) ends their sessions first: nothing in SCSI
// tells an initiator to forget what it has cached.

// Snapshotter is an engine that has snapshots. Errors are those of package store.
type Snapshotter interface {
	Snapshot(ctx context.Context, name string, volumes ...string) ([]store.SnapshotInfo, error)
	Snapshots(volume string) ([]store.SnapshotInfo, error)
	DeleteSnapshot(ctx context.Context, volume, name string) error
	Clone(ctx context.Context, volume, snapshot, name string) error
	Rollback(ctx context.Context, volume, snapshot string) error
	Promote(ctx context.Context, clone string) error
	Diff(ctx context.Context, volume, from, to string, f func(lba, blocks uint64) error) error
}

// mostRanges bounds the ranges of one answer: about 3 MB.
const mostRanges = 50_000

func snapshotter(e Engine) (Snapshotter, error) {
	if s, ok := e.(Snapshotter); ok {
		return s, nil
	}
	return nil, refuse(http.StatusNotImplemented, "", "this agent's engine has no snapshots")
}

// withSnapshots runs f as the only change of volumes.
func (a *Agent) withSnapshots(ctx context.Context, f func(Engine, Snapshotter) error) error {
	return a.change(ctx, func(e Engine) error {
		s, err := snapshotter(e)
		if err != nil {
			return err
		}
		return f(e, s)
	})
}

func checkNames(names ...string) error {
	for _, n := range names {
		if err := checkName(n); err != nil {
			return err
		}
	}
	return nil
}

func describeSnapshot(s store.SnapshotInfo) api.Snapshot {
	return api.Snapshot{Volume: s.Volume, Name: s.Name, UUID: formatUUID(s.UUID), Group: formatUUID(s.Group), Created: s.Created.UTC(),
		SizeBytes: s.SizeBytes, LogicalBytes: s.LogicalBytes, Clones: append([]string{}, s.Clones...)}
}

func describeSnapshots(list []store.SnapshotInfo) []api.Snapshot {
	out := []api.Snapshot{}
	for _, s := range list {
		out = append(out, describeSnapshot(s))
	}
	return out
}

func (a *Agent) createSnapshots(ctx context.Context, name string, volumes []string) (out []api.Snapshot, err error) {
	if err := checkNames(append([]string{name}, volumes...)...); err != nil {
		return nil, err
	}
	err = a.withSnapshots(ctx, func(_ Engine, s Snapshotter) error {
		list, err := s.Snapshot(ctx, name, volumes...)
		if err != nil {
			return answer("snapshot", strings.Join(volumes, ", "), err)
		}
		out = describeSnapshots(list)
		a.log.Info("snapshot taken", "name", name, "volumes", volumes)
		return nil
	})
	return out, err
}

func (a *Agent) snapshots(volume string) ([]api.Snapshot, error) {
	e, err := a.current()
	if err != nil {
		return nil, err
	}
	s, err := snapshotter(e)
	if err != nil {
		return nil, err
	}
	if volume != "" {
		if err := checkName(volume); err != nil {
			return nil, err
		}
	}
	list, err := s.Snapshots(volume)
	if err != nil {
		return nil, answer("snapshots of", volume, err)
	}
	return describeSnapshots(list), nil
}

func (a *Agent) deleteSnapshot(ctx context.Context, volume, name string) error {
	if err := checkNames(volume, name); err != nil {
		return err
	}
	return a.withSnapshots(ctx, func(_ Engine, s Snapshotter) error {
		if err := s.DeleteSnapshot(ctx, volume, name); err != nil {
			return answer("delete snapshot "+name+" of", volume, err)
		}
		a.log.Info("snapshot deleted", "volume", volume, "name", name)
		return nil
	})
}

func (a *Agent) cloneSnapshot(ctx context.Context, volume, snapshot, name string) (v api.Volume, err error) {
	if err := checkNames(volume, snapshot, name); err != nil {
		return v, err
	}
	err = a.withSnapshots(ctx, func(e Engine, s Snapshotter) error {
		if n := len(e.Volumes()); n >= MaxVolumes {
			return refuse(http.StatusConflict, "delete a volume", "%d volumes exist, and an agent takes no more", n)
		}
		if err := s.Clone(ctx, volume, snapshot, name); err != nil {
			return answer("clone "+volume+"@"+snapshot+" as", name, err)
		}
		if err := a.begin(e, name); err != nil {
			return err
		}
		a.log.Info("snapshot cloned", "volume", volume, "name", snapshot, "clone", name)
		return nil
	})
	if err != nil {
		return v, err
	}
	return a.volume(name)
}

// begin exports a volume and remembers its target.
func (a *Agent) begin(e Engine, name string) error {
	t, err := a.export(e, name)
	if err != nil {
		return answer("export", name, err)
	}
	a.mu.Lock()
	a.targets[name] = t
	a.mu.Unlock()
	return nil
}

// rollback ends all sessions with the volume, then puts it back, then lets initiators in again.
func (a *Agent) rollback(ctx context.Context, volume, snapshot string, force bool) (v api.Volume, err error) {
	if err := checkNames(volume, snapshot); err != nil {
		return v, err
	}
	err = a.withSnapshots(ctx, func(e Engine, s Snapshotter) error {
		v, err := a.volume(volume)
		if err != nil {
			return err
		}
		list, err := s.Snapshots(volume)
		if err != nil {
			return answer("roll back", volume, err)
		}
		found := false
		for _, x := range list {
			found = found || x.Name == snapshot
		}
		if !found { // before anybody is thrown out for nothing
			return refuse(http.StatusNotFound, "'ledge snapshot list "+volume+"' shows what exists", "volume %q has no snapshot %q", volume, snapshot)
		}
		if v.Sessions > 0 && !force {
			return refuse(http.StatusConflict, "unmount, and log the initiators out; or pass --force: they are thrown out, and what they have cached is no longer what the volume holds",
				"volume %q is in use by %d session(s)", volume, v.Sessions)
		}
		a.withdraw(volume)
		err = s.Rollback(ctx, volume, snapshot)
		if again := a.begin(e, volume); again != nil && err == nil {
			return again
		}
		if err != nil {
			return answer("roll back", volume, err)
		}
		a.log.Info("volume rolled back", "volume", volume, "to", snapshot)
		return nil
	})
	if err != nil {
		return v, err
	}
	return a.volume(volume)
}

func (a *Agent) promote(ctx context.Context, name string) (v api.Volume, err error) {
	if err := checkName(name); err != nil {
		return v, err
	}
	err = a.withSnapshots(ctx, func(_ Engine, s Snapshotter) error {
		if err := s.Promote(ctx, name); err != nil {
			return answer("promote", name, err)
		}
		a.log.Info("clone promoted", "volume", name)
		return nil
	})
	if err != nil {
		return v, err
	}
	return a.volume(name)
}

// diff returns what differs from offset on, mostRanges ranges at most.
func (a *Agent) diff(ctx context.Context, volume, from, to string, offset int64) (d api.Diff, err error) {
	names := []string{volume}
	for _, n := range []string{from, to} {
		if n != "" {
			names = append(names, n)
		}
	}
	if err := checkNames(names...); err != nil {
		return d, err
	}
	e, err := a.current()
	if err != nil {
		return d, err
	}
	s, err := snapshotter(e)
	if err != nil {
		return d, err
	}
	d = api.Diff{Volume: volume, From: from, To: to, Ranges: []api.Range{}}
	err = s.Diff(ctx, volume, from, to, func(lba, blocks uint64) error {
		r := api.Range{Offset: int64(lba) * store.BlockBytes, Length: int64(blocks) * store.BlockBytes}
		switch {
		case r.Offset < offset:
		case len(d.Ranges) < mostRanges:
			d.Ranges = append(d.Ranges, r)
			d.Bytes += r.Length
		case d.Next == 0:
			d.Next = r.Offset
		}
		return nil
	})
	if err != nil {
		return d, answer("compare snapshots of", volume, err)
	}
	return d, nil
}
