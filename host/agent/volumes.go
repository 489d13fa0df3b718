package agent

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"sort"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/ledge-storage/ledge/host/store"
	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/scsi"
)

// Limits on volumes.
const (
	MaxVolumes     = 256
	MaxVolumeBytes = 64 * tib
	VolumeStep     = 4 * kib
	volumeLUN      = 0
)

var volumeName = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,62}$`)

// IQN is the name of a volume's target: one target for each, so that an initiator attaches just what it wants.
func IQN(volume string) string { return "iqn.2026-11.io.ledge:" + volume }

// refuse makes the answer of a request that failed.
func refuse(status int, hint, format string, args ...any) *api.Error {
	return &api.Error{Status: status, Message: fmt.Sprintf(format, args...), Hint: hint}
}

func checkName(name string) error {
	if !volumeName.MatchString(name) {
		return refuse(http.StatusBadRequest, "choose a name such as db-1", "volume name %q: want 1 to 63 of a-z, 0-9 and -, beginning with a letter or digit", clip(name))
	}
	return nil
}

// clip keeps a stranger's words short in an answer.
func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}

func checkSize(n int64) error {
	switch {
	case n <= 0:
		return refuse(http.StatusBadRequest, "", "size of %d bytes: want at least %d", n, VolumeStep)
	case n > MaxVolumeBytes:
		return refuse(http.StatusBadRequest, "create several volumes", "size of %s (%d bytes): the largest volume is %s (%d bytes)", api.FormatSize(n), n, api.FormatSize(MaxVolumeBytes), int64(MaxVolumeBytes))
	case n%VolumeStep != 0:
		return refuse(http.StatusBadRequest, fmt.Sprintf("%d or %d", max(1, n/VolumeStep)*VolumeStep, (n/VolumeStep+1)*VolumeStep), "size of %d bytes is no multiple of %d", n, VolumeStep)
	}
	return nil
}

// answer turns the engine's errors into the API's.
func answer(op, name string, err error) error {
	var e *api.Error
	if err == nil || errors.As(err, &e) {
		return err
	}
	status, hint := http.StatusInternalServerError, "see the agent's log, and 'ledge host status'"
	switch {
	case errors.Is(err, store.ErrExists):
		status, hint = http.StatusConflict, "'ledge volume list' shows what exists"
	case errors.Is(err, store.ErrNotFound):
		status, hint = http.StatusNotFound, "'ledge volume list' and 'ledge snapshot list' show what exists"
	case errors.Is(err, store.ErrHasSnapshots):
		status, hint = http.StatusConflict, "'ledge snapshot list' shows them; delete them first, or promote a clone, which takes them over"
	case errors.Is(err, store.ErrNoClone):
		status, hint = http.StatusConflict, "only a clone whose snapshot still exists can be promoted; 'ledge volume show' tells the origin"
	case errors.Is(err, store.ErrName), errors.Is(err, store.ErrSize):
		status, hint = http.StatusBadRequest, ""
	case errors.Is(err, store.ErrLimit):
		status, hint = http.StatusConflict, "delete volumes or snapshots"
	case errors.Is(err, target.ErrNoSpace):
		status, hint = http.StatusInsufficientStorage, "delete volumes, or add members to the pool"
	case errors.Is(err, store.ErrFenced):
		status, hint = http.StatusServiceUnavailable, "another host has opened this store; this agent ends"
	case errors.Is(err, store.ErrFailed), errors.Is(err, store.ErrClosed), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		status, hint = http.StatusServiceUnavailable, "ask again in a moment; 'ledge host status' tells why"
	}
	return refuse(status, hint, "%s volume %q: %v", op, clip(name), err)
}

// current is the engine while it serves.
func (a *Agent) current() (Engine, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.engine != nil {
		return a.engine, nil
	}
	why := ""
	if a.failure != nil {
		why = ": " + a.failure.Error()
	}
	return nil, refuse(http.StatusServiceUnavailable, "'ledge host status' shows what the agent waits for", "the agent is not serving yet (%s)%s", a.phase, why)
}

// change runs f as the only change of volumes.
func (a *Agent) change(ctx context.Context, f func(Engine) error) error {
	select {
	case a.admin <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-a.admin }()
	e, err := a.current()
	if err != nil {
		return err
	}
	return f(e)
}

// export makes the volume's target and adds it to the portal.
func (a *Agent) export(e Engine, name string) (*scsi.Target, error) {
	dev, err := e.Device(name)
	if err != nil {
		return nil, err
	}
	reservations, err := e.Reservations(name)
	if err != nil {
		return nil, err
	}
	t := scsi.NewTarget(IQN(name), scsi.Options{Tokens: a.tokens})
	if err := t.Attach(volumeLUN, dev, scsi.UnitOptions{Reservations: reservations}); err != nil {
		return nil, err
	}
	return t, a.server.AddTarget(t)
}

func (a *Agent) createVolume(ctx context.Context, name string, bytes int64, how store.Compression) (v api.Volume, err error) {
	if err := checkName(name); err != nil {
		return v, err
	}
	if err := checkSize(bytes); err != nil {
		return v, err
	}
	err = a.change(ctx, func(e Engine) error {
		if n := len(e.Volumes()); n >= MaxVolumes {
			return refuse(http.StatusConflict, "delete a volume", "%d volumes exist, and an agent takes no more", n)
		}
		if err := e.CreateVolume(ctx, name, bytes); err != nil {
			return answer("create", name, err)
		}
		if how != store.CompressS2 {
			if err := compress(ctx, e, name, how); err != nil {
				return errors.Join(err, e.DeleteVolume(ctx, name))
			}
		}
		if err := a.begin(e, name); err != nil {
			return err
		}
		a.log.Info("volume created", "volume", name, "bytes", bytes)
		return nil
	})
	if err != nil {
		return v, err
	}
	return a.volume(name)
}

// setCompression is for what is written from now on.
func (a *Agent) setCompression(ctx context.Context, name string, how store.Compression) (v api.Volume, err error) {
	err = a.change(ctx, func(e Engine) error {
		if _, err := a.volume(name); err != nil {
			return err
		}
		if err := compress(ctx, e, name, how); err != nil {
			return err
		}
		a.log.Info("volume's compression changed", "volume", name, "compression", how.String())
		return nil
	})
	if err != nil {
		return v, err
	}
	return a.volume(name)
}

// The least and the greatest dedup index.
const (
	leastIndex = 4 << 20
	mostIndex  = 64 << 30
)

// resizeIndex changes the memory of the dedup index until the agent ends.
func (a *Agent) resizeIndex(ctx context.Context, bytes int64) (x *api.Index, err error) {
	if bytes < leastIndex || bytes > mostIndex {
		return nil, refuse(http.StatusBadRequest, "", "size_bytes: want %s to %s", api.FormatSize(leastIndex), api.FormatSize(mostIndex))
	}
	err = a.change(ctx, func(e Engine) error {
		i, ok := e.(Indexer)
		if !ok {
			return refuse(http.StatusNotImplemented, "", "this agent's engine has no index")
		}
		if err := i.ResizeIndex(bytes); err != nil {
			return err
		}
		x = e.Stats().Index
		a.log.Info("dedup index has another size", "bytes", x.Bytes)
		return nil
	})
	return x, err
}

// canBeGivenUp: what keeps the store shut is what an operator can give up.
func canBeGivenUp(err error) bool {
	return errors.Is(err, store.ErrMap) || errors.Is(err, store.ErrJournal)
}

// orderAcceptLost has the next opening of the store give up the pages of maps, and the end of the journal, that cannot be read. It is refused unless that is why
// the store is not open: nothing is given up by a command that was typed too early, or on the wrong host.
func (a *Agent) orderAcceptLost() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.engine != nil:
		return refuse(http.StatusConflict, "", "the store is open: nothing has to be given up")
	case !canBeGivenUp(a.failure):
		why := "nothing failed yet"
		if a.failure != nil {
			why = a.failure.Error()
		}
		return refuse(http.StatusConflict, "'ledge host status' shows what the agent waits for", "no page of a volume's map and no piece of the journal is why the store is not open: %s", why)
	}
	a.acceptLost = true
	a.log.Warn("ordered: what cannot be read of the volumes' maps and of the journal is given up", "error", a.failure)
	return nil
}

func compress(ctx context.Context, e Engine, name string, how store.Compression) error {
	c, ok := e.(Compressor)
	if !ok {
		return refuse(http.StatusNotImplemented, "", "this agent's engine does not compress")
	}
	if err := c.SetCompression(ctx, name, how); err != nil {
		return answer("compress", name, err)
	}
	return nil
}

func (a *Agent) resizeVolume(ctx context.Context, name string, bytes int64, shrink bool) (v api.Volume, err error) {
	if err := checkSize(bytes); err != nil {
		return v, err
	}
	err = a.change(ctx, func(e Engine) error {
		old, err := a.volume(name)
		if err != nil {
			return err
		}
		if bytes < old.SizeBytes && !shrink {
			return refuse(http.StatusConflict, "pass --shrink if the data beyond the new end may be lost", "volume %q has %s; %s would cut off its end", name, api.FormatSize(old.SizeBytes), api.FormatSize(bytes))
		}
		if err := e.ResizeVolume(ctx, name, bytes); err != nil {
			return answer("resize", name, err)
		}
		a.mu.Lock()
		t := a.targets[name]
		a.mu.Unlock()
		if t != nil {
			t.Changed(volumeLUN)
		}
		a.log.Info("volume resized", "volume", name, "from", old.SizeBytes, "to", bytes)
		return nil
	})
	if err != nil {
		return v, err
	}
	return a.volume(name)
}

// renameVolume gives a volume another name, and its target with it: no initiator may be logged in, but with force, which
// throws it out. Snapshots, reservations and figures stay with the volume.
func (a *Agent) renameVolume(ctx context.Context, name, to string, force bool) (v api.Volume, err error) {
	err = a.change(ctx, func(e Engine) error {
		v, err := a.volume(name)
		if err != nil {
			return err
		}
		r, ok := e.(interface {
			RenameVolume(ctx context.Context, name, to string) error
		})
		switch {
		case !ok:
			return refuse(http.StatusNotImplemented, "", "this agent's engine renames nothing")
		case name == to:
			return nil
		case v.Sessions > 0 && !force:
			return refuse(http.StatusConflict, "its target has another name then: log the initiators out, or pass --force", "volume %q is in use by %d session(s)", name, v.Sessions)
		}
		if _, err := a.volume(to); err == nil { // before anybody is thrown out for nothing
			return answer("rename", name, fmt.Errorf("%q: %w", to, store.ErrExists))
		}
		a.withdraw(name)
		is := to
		err = r.RenameVolume(ctx, name, to)
		if err != nil {
			is = name
			err = answer("rename", name, err)
		}
		if again := a.begin(e, is); again != nil {
			return errors.Join(err, again)
		}
		if err == nil {
			a.log.Info("volume renamed", "volume", name, "to", to)
		}
		return err
	})
	if err != nil {
		return v, err
	}
	return a.volume(to)
}

// withdraw takes a volume's target away, and ends its sessions; begin brings it back.
func (a *Agent) withdraw(name string) {
	a.server.RemoveTarget(IQN(name))
	a.mu.Lock()
	delete(a.targets, name)
	a.mu.Unlock()
}

// deleteVolume takes the target away first, so that no initiator writes to what is going.
func (a *Agent) deleteVolume(ctx context.Context, name string, force bool) error {
	return a.change(ctx, func(e Engine) error {
		v, err := a.volume(name)
		if err != nil {
			return err
		}
		if v.Snapshots > 0 { // before anybody is thrown out for nothing
			return refuse(http.StatusConflict, "'ledge snapshot list "+name+"' shows them; delete them first, or promote a clone, which takes them over", "volume %q has %d snapshot(s)", name, v.Snapshots)
		}
		if v.Sessions > 0 && !force {
			return refuse(http.StatusConflict, "log the initiators out, or pass --force", "volume %q is in use by %d session(s)", name, v.Sessions)
		}
		a.withdraw(name)
		if err := e.DeleteVolume(ctx, name); err != nil {
			if again := a.begin(e, name); again != nil {
				a.log.Error("volume not exported again", "volume", name, "err", again)
			}
			return answer("delete", name, err)
		}
		a.log.Info("volume deleted", "volume", name)
		return nil
	})
}

func (a *Agent) volumes() ([]api.Volume, error) {
	e, err := a.current()
	if err != nil {
		return nil, err
	}
	sessions := a.sessions()
	out := []api.Volume{}
	for _, v := range e.Volumes() {
		out = append(out, api.Volume{
			Name: v.Name, UUID: formatUUID(v.UUID), SizeBytes: v.SizeBytes, Figures: v.Figures, Cache: v.Cache,
			Origin: v.Origin, Snapshots: v.Snapshots, Compression: v.Compression, IQN: IQN(v.Name), LUN: volumeLUN, Portal: a.cfg.Portal, Sessions: sessions[IQN(v.Name)],
		})
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	return out, nil
}

func (a *Agent) volume(name string) (api.Volume, error) {
	all, err := a.volumes()
	if err != nil {
		return api.Volume{}, err
	}
	for _, v := range all {
		if v.Name == name {
			return v, nil
		}
	}
	return api.Volume{}, refuse(http.StatusNotFound, "'ledge volume list' shows what exists", "no volume %q", clip(name))
}

func formatUUID(u [16]byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}

// sessions counts the initiators of each target.
func (a *Agent) sessions() map[string]int {
	a.mu.Lock()
	defer a.mu.Unlock()
	n := map[string]int{}
	for _, t := range a.targets {
		if c, ok := any(t).(interface{ Sessions() int }); ok {
			n[t.Name()] = c.Sessions()
		}
	}
	return n
}
