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

// goner is a port that knows when its path does not lead to it any more (raid/drive).
type goner interface{ Gone() bool }

// drives are this controller's ports to the members. A drive that is plugged in is opened at the next scan; one that
// is pulled out, or whose name another drive took, is retired: it is handed to nobody any more, and closed when the
// last array that has it closes it. A drive that nothing happens to stays open for the life of the process, whichever
// array is opened and closed over it.
type drives struct {
	patterns []string
	open     func(path string) (port, error)
	log      *slog.Logger
	// changed has a word in it after drives came or went; hotplug.go takes it.
	changed chan struct{}

	mu      sync.Mutex // guards the rest
	closed  bool
	ports   map[string]*openPort
	retired map[*openPort]bool
	failed  map[string]string  // why a path could not be opened, said once
	opening map[string]bool    // paths whose open has not returned yet
	asking  map[*openPort]bool // drives that have not answered holders yet
	asked   sync.WaitGroup     // questions and opens that are on their way
	// lent is the drive that was lent last under a path: the one that an array means by it.
	lent map[string]*openPort
}

// openPort is a drive that is open. users are the arrays that have it.
type openPort struct {
	port
	users int
	// offered: an array has had it, or hotplug.go has looked at it for the open one.
	offered bool
}

// openLimit is how long a scan waits for drives that it opens: a drive that hangs when it is opened must not cost
// the owner its lease. It is there at a later scan.
const openLimit = 500 * time.Millisecond

func newDrives(patterns []string, open func(string) (port, error), log *slog.Logger) *drives {
	return &drives{patterns: patterns, open: open, log: log, changed: make(chan struct{}, 1), ports: map[string]*openPort{}, retired: map[*openPort]bool{},
		failed: map[string]string{}, opening: map[string]bool{}, asking: map[*openPort]bool{}, lent: map[string]*openPort{}}
}

// scan opens what the patterns match now, retires what is gone, and returns all open drives in the order of their
// paths, to look at. An array gets them from lend.
func (d *drives) scan() []raid.Drive {
	d.refresh()
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []raid.Drive
	for _, p := range d.list() {
		out = append(out, shared{openPort: p})
	}
	return out
}

// lend is scan for an array: each drive is closed by the array, and only then by us. With paths only those, in their
// order; an error names one that is no open drive.
func (d *drives) lend(paths ...string) ([]raid.Drive, error) {
	d.refresh()
	d.mu.Lock()
	defer d.mu.Unlock()
	list := d.list()
	if len(paths) > 0 {
		list = list[:0]
		for _, path := range paths {
			p := d.ports[path]
			switch {
			case p == nil && d.failed[path] != "":
				return nil, fmt.Errorf("drive %s cannot be opened: %s", path, d.failed[path])
			case p == nil:
				return nil, fmt.Errorf("no drive %s", path)
			case slices.Contains(list, p):
				return nil, fmt.Errorf("drive %s is named twice", path)
			}
			list = append(list, p)
		}
	}
	var out []raid.Drive
	for _, p := range list {
		p.users++
		d.lent[p.Name()] = p
		p.offered = true // the array looks at it itself
		out = append(out, shared{p, &lease{d: d, p: p}})
	}
	return out, nil
}

// giveBack closes drives of lend that no array took.
func giveBack(list []raid.Drive) {
	for _, x := range list {
		x.Close() // nothing to hear: it counts
	}
}

// shared is a drive that outlives the array that uses it.
type shared struct {
	*openPort
	lease *lease // nil: only looked at
}

// lease is one loan. It ends once.
type lease struct {
	d    *drives
	p    *openPort
	once sync.Once
}

// Close ends the loan and leaves the drive open; a retired drive is closed with its last loan.
func (s shared) Close() error {
	if s.lease != nil {
		s.lease.once.Do(func() { s.lease.d.giveUp(s.lease.p) })
	}
	return nil
}

func (d *drives) giveUp(p *openPort) {
	d.mu.Lock()
	p.users--
	last := p.users == 0 && d.retired[p]
	if last {
		delete(d.retired, p)
	}
	d.mu.Unlock()
	if last {
		d.shut(p)
	}
}

func (d *drives) shut(p *openPort) {
	if err := p.Close(); err != nil {
		d.log.Debug("drive", "path", p.Name(), "err", err)
	}
}

// paths are what the patterns match now, without partitions of drives that are among them, and without sidecars.
func (d *drives) paths() []string {
	var paths []string
	for _, p := range d.patterns {
		found, _ := filepath.Glob(p) // the configuration was checked
		for _, f := range found {
			if !strings.HasSuffix(f, ".pr") && !slices.Contains(paths, f) {
				paths = append(paths, f)
			}
		}
	}
	return slices.DeleteFunc(slices.Clone(paths), func(path string) bool {
		whole := wholeDisk(path)
		return whole != "" && slices.Contains(paths, whole)
	})
}

// refresh brings ports up to date with what is plugged in.
func (d *drives) refresh() {
	paths := d.paths()
	d.mu.Lock()
	known := d.list()
	d.mu.Unlock()
	var gone []*openPort
	for _, p := range known {
		if g, ok := p.port.(goner); ok && g.Gone() || !ok && !slices.Contains(paths, p.Name()) {
			gone = append(gone, p)
		}
	}
	d.retire(gone)

	d.mu.Lock()
	var fresh []string
	for _, path := range paths {
		if !d.closed && d.ports[path] == nil && !d.opening[path] && len(d.ports)+len(d.opening) < maxDrives {
			d.opening[path] = true
			fresh = append(fresh, path)
		}
	}
	for path := range d.failed {
		if !slices.Contains(paths, path) {
			delete(d.failed, path)
		}
	}
	d.mu.Unlock()
	if len(fresh) == 0 {
		return
	}
	opened := make(chan struct{}, len(fresh))
	for _, path := range fresh {
		d.asked.Go(func() {
			p, err := d.open(path)
			d.adopt(path, p, err)
			opened <- struct{}{}
		})
	}
	t := time.NewTimer(openLimit)
	defer t.Stop()
	for range fresh {
		select {
		case <-opened:
		case <-t.C:
			d.log.Warn("drives take long to open; going on without them for now", "paths", strings.Join(fresh, " "))
			return
		}
	}
}

// retire takes drives that are gone out of ports.
func (d *drives) retire(gone []*openPort) {
	for _, p := range gone {
		d.mu.Lock()
		mine := d.ports[p.Name()] == p
		idle := mine && p.users == 0
		if mine {
			delete(d.ports, p.Name())
			if !idle {
				d.retired[p] = true
			}
		}
		d.mu.Unlock()
		if !mine {
			continue // somebody else retired it
		}
		d.log.Warn("drive is gone", "path", p.Name())
		if idle {
			d.shut(p)
		}
		d.note()
	}
}

// adopt ends an open.
func (d *drives) adopt(path string, p port, err error) {
	d.mu.Lock()
	delete(d.opening, path)
	late := d.closed
	switch {
	case late:
	case err == nil:
		delete(d.failed, path)
		d.ports[path] = &openPort{port: p}
	case d.failed[path] != err.Error():
		d.failed[path] = err.Error()
		d.log.Warn("drive cannot be opened", "path", path, "err", err)
	}
	d.mu.Unlock()
	switch {
	case err != nil:
	case late:
		d.shut(&openPort{port: p})
	default:
		d.log.Info("drive is here", "path", path, "bytes", p.Size())
		d.note()
	}
}

// note says that something changed, without waiting.
func (d *drives) note() {
	select {
	case d.changed <- struct{}{}:
	default:
	}
}

// unopened are the paths that cannot be opened, and why.
func (d *drives) unopened() map[string]string {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := map[string]string{}
	for path, why := range d.failed {
		out[path] = why
	}
	for path := range d.opening {
		out[path] = "does not answer"
	}
	return out
}

// find returns the open drive at a path.
func (d *drives) find(path string) (shared, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	p := d.ports[path]
	return shared{openPort: p}, p != nil
}

// has says that an array which has a drive of this path has the one that is there now.
func (d *drives) has(path string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	p := d.ports[path]
	return p != nil && d.lent[path] == p && p.users > 0
}

// pulled says that the drive which an array has of this path is gone.
func (d *drives) pulled(path string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.retired[d.lent[path]]
}

// fresh returns the drives that were plugged in since the array was opened, each once.
func (d *drives) fresh() []shared {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []shared
	for _, p := range d.list() {
		if !p.offered {
			p.offered = true
			out = append(out, shared{openPort: p})
		}
	}
	return out
}

// list is in the order of paths; mu is held.
func (d *drives) list() []*openPort {
	var paths []string
	for p := range d.ports {
		paths = append(paths, p)
	}
	slices.SortFunc(paths, comparePaths)
	out := make([]*openPort, len(paths))
	for i, p := range paths {
		out[i] = d.ports[p]
	}
	return out
}

// comparePaths: sda … sdz before sdaa: shorter names first.
func comparePaths(a, b string) int {
	if len(a) != len(b) {
		return len(a) - len(b)
	}
	return strings.Compare(a, b)
}

// close closes every drive; nothing may use them any more. A drive that still hangs in a question is not waited for
// longer than a moment: closing it under the question only makes that fail.
func (d *drives) close() {
	d.mu.Lock()
	d.closed = true
	d.mu.Unlock()
	answered := make(chan struct{})
	go func() { d.asked.Wait(); close(answered) }()
	select {
	case <-answered:
	case <-time.After(2 * time.Second):
		d.log.Warn("a drive does not answer; not waiting for it")
	}
	d.mu.Lock()
	all := d.list()
	for p := range d.retired {
		all = append(all, p)
	}
	d.ports, d.retired = map[string]*openPort{}, map[*openPort]bool{}
	d.mu.Unlock()
	for _, p := range all {
		d.shut(p)
	}
}

// holders asks every drive that counts who holds its reservation and counts the answers that come within limit; 0 is
// nobody. A drive that hangs is asked once, and not again before it answered; it holds nobody else up.
func (d *drives) holders(ctx context.Context, limit time.Duration, counts func(path string) bool) map[uint64]int {
	type answer struct {
		holder uint64
		err    error
	}
	answers := make(chan answer, maxDrives)
	n := 0
	d.refresh()
	d.mu.Lock()
	for _, p := range d.list() {
		if d.closed || d.asking[p] || !counts(p.Name()) {
			continue
		}
		d.asking[p] = true
		n++
		d.asked.Go(func() {
			_, holder, err := p.Keys()
			d.mu.Lock()
			delete(d.asking, p)
			d.mu.Unlock()
			answers <- answer{holder, err}
		})
	}
	d.mu.Unlock()
	t := time.NewTimer(limit)
	defer t.Stop()
	count := map[uint64]int{}
	for range n {
		select {
		case a := <-answers:
			if a.err == nil {
				count[a.holder]++
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
		if err := releaseOne(x.(shared).port, mine); err != nil && first == nil {
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

// reserveAll takes the reservation on every one of the drives, preempting nobody, or on none.
func (d *drives) reserveAll(ctx context.Context, list []raid.Drive, key uint64, mine func(uint64) bool) error {
	for _, x := range list {
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
