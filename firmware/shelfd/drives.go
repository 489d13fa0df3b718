package main

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/ledge-storage/ledge/raid"
)

// port is an open drive, with its reservations.
type port interface {
	raid.Drive
	raid.Reserver
}

// drives are this controller's ports to the members. They stay open for the life of the process, whichever
// array is opened and closed over them; a drive that appears later is opened at the next look.
type drives struct {
	patterns []string
	open     func(path string) (port, error)
	log      *slog.Logger

	mu     sync.Mutex // guards the rest
	ports  map[string]port
	failed map[string]string // why a path could not be opened, said once
	asking map[string]bool   // drives that have not answered holders yet
	asked  sync.WaitGroup
}

func newDrives(patterns []string, open func(string) (port, error), log *slog.Logger) *drives {
	return &drives{patterns: patterns, open: open, log: log, ports: map[string]port{}, failed: map[string]string{}, asking: map[string]bool{}}
}

// scan opens what the patterns match now and returns all open drives, in the order of their paths.
func (d *drives) scan() []raid.Drive {
	d.mu.Lock()
	defer d.mu.Unlock()
	var paths []string
	for _, p := range d.patterns {
		found, _ := filepath.Glob(p) // the configuration was checked
		for _, f := range found {
			// The sidecar of a file's reservation is no drive.
			if !strings.HasSuffix(f, ".pr") && !slices.Contains(paths, f) {
				paths = append(paths, f)
			}
		}
	}
	for _, path := range paths {
		if d.ports[path] != nil || len(d.ports) >= maxDrives {
			continue
		}
		p, err := d.open(path)
		if err != nil {
			if d.failed[path] != err.Error() {
				d.failed[path] = err.Error()
				d.log.Warn("drive cannot be opened", "path", path, "err", err)
			}
			continue
		}
		delete(d.failed, path)
		d.ports[path] = p
	}
	return d.list()
}

// list is in the order of paths; mu is held.
func (d *drives) list() []raid.Drive {
	var paths []string
	for p := range d.ports {
		paths = append(paths, p)
	}
	// sda … sdz before sdaa: shorter names first.
	slices.SortFunc(paths, func(a, b string) int {
		if len(a) != len(b) {
			return len(a) - len(b)
		}
		return strings.Compare(a, b)
	})
	out := make([]raid.Drive, len(paths))
	for i, p := range paths {
		out[i] = shared{d.ports[p]}
	}
	return out
}

// close closes every drive; nothing may use them any more. A drive that still hangs in holders is not waited for
// longer than a moment: closing it under the question only makes that fail.
func (d *drives) close() {
	answered := make(chan struct{})
	go func() { d.asked.Wait(); close(answered) }()
	select {
	case <-answered:
	case <-time.After(2 * time.Second):
		d.log.Warn("a drive does not answer; not waiting for it")
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for path, p := range d.ports {
		if err := p.Close(); err != nil {
			d.log.Warn("drive", "path", path, "err", err)
		}
	}
	d.ports = map[string]port{}
}

// shared is a drive that outlives the array that uses it.
type shared struct{ port }

// Close leaves the drive open: drives.close closes it.
func (shared) Close() error { return nil }

// holders asks every drive who holds its reservation and counts the answers that come within limit. A drive
// that hangs is asked once, and not again before it answered; it holds nobody else up.
func (d *drives) holders(ctx context.Context, limit time.Duration) map[uint64]int {
	answers := make(chan uint64, maxDrives)
	n := 0
	list := d.scan()
	d.mu.Lock()
	for _, x := range list {
		p, name := x.(shared), x.Name()
		if d.asking[name] {
			continue
		}
		d.asking[name] = true
		n++
		d.asked.Go(func() {
			_, holder, err := p.Keys()
			if err != nil {
				holder = 0
			}
			d.mu.Lock()
			delete(d.asking, name)
			d.mu.Unlock()
			answers <- holder
		})
	}
	d.mu.Unlock()
	t := time.NewTimer(limit)
	defer t.Stop()
	count := map[uint64]int{}
	for range n {
		select {
		case key := <-answers:
			if key != 0 {
				count[key]++
			}
		case <-t.C:
			return count
		case <-ctx.Done():
			return count
		}
	}
	return count
}

// registrations: reservations on all drives at once, without an array: before there is one, and where the
// controller only wants to let go.

// release drops this controller's reservation and registration wherever they are.
func (d *drives) release(ctx context.Context, mine func(key uint64) bool) error {
	var first error
	for _, x := range d.scan() {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := releaseOne(x.(shared), mine); err != nil && first == nil {
			first = fmt.Errorf("%s: %w", x.Name(), err)
		}
	}
	return first
}

func releaseOne(p port, mine func(key uint64) bool) error {
	registered, holder, err := p.Keys()
	if err != nil {
		return err
	}
	if holder != 0 && mine(holder) {
		if err := p.Release(holder); err != nil {
			return err
		}
	}
	for _, k := range registered {
		if mine(k) {
			return p.Unregister(k)
		}
	}
	return nil
}

// reserveAll takes the reservation on every drive, preempting nobody, or on none.
func (d *drives) reserveAll(ctx context.Context, key uint64, mine func(uint64) bool) error {
	for _, x := range d.scan() {
		p := x.(shared)
		err := p.Register(key)
		if err == nil {
			err = p.Reserve(key)
		}
		if err != nil {
			if undo := d.release(ctx, mine); undo != nil {
				d.log.Warn("reservations could not all be dropped", "err", undo)
			}
			return fmt.Errorf("%s: reserve: %w", p.Name(), err)
		}
	}
	return nil
}
