package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/ledge-storage/ledge/firmware/ha"
	"github.com/ledge-storage/ledge/firmware/shelf"
	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/raid"
)

// A registration key is 8 bytes, most significant first:
//
//	offset size field
//	0      5    "LEDGE"
//	5      2    epoch, its low 16 bits
//	7      1    controller: 'A' or 'B'
const keyTag = uint64('L')<<56 | uint64('E')<<48 | uint64('D')<<40 | uint64('G')<<32 | uint64('E')<<24

func keyOf(c ha.Controller, epoch uint64) uint64 {
	return keyTag | (epoch&0xffff)<<8 | uint64(c)
}

// controllerOf is None for a key that is not Ledge's.
func controllerOf(key uint64) ha.Controller {
	c := ha.Controller(key & 0xff)
	if key&^0xffffff != keyTag || c != ha.A && c != ha.B {
		return ha.None
	}
	return c
}

// backend is what the driver of package ha acts on: ha.Members here, ha.Pool in pool.go, ha.Mirror in link.go.
// Its methods that change something are called by the driver's worker, one at a time.
type backend struct {
	self   ha.Controller
	conf   *Config
	log    *slog.Logger
	drives *drives
	region nvram.Region
	own    nvram.Area
	mirror *nvram.Mirror
	link   link
	front  *front
	gate   *ha.Gate
	began  time.Time
	tasks  *tasks
	// lost and broken report what the open pool meets to the driver.
	lost, broken func()
	// placing is held while it is decided what a drive is and what becomes of it: one at a time. Before mu.
	placing sync.Mutex

	mu     sync.Mutex // guards the rest, which status reads
	array  *raid.Array
	nvlog  *nvram.Log
	pool   *shelf.Pool
	survey raid.Survey
	looked bool
	key    uint64
	watch  chan struct{} // closed when the watcher of the open pool ends

	// shows makes what the front shows follow the pool: publish and withdraw one at a time. Taken before mu.
	shows sync.Mutex
}

func (b *backend) mine(key uint64) bool { return controllerOf(key) == b.self }

// conflict marks the errors that mean "another controller holds the members".
func conflict(err error) error {
	if errors.Is(err, raid.ErrReservation) || errors.Is(err, raid.ErrStaleEpoch) {
		return fmt.Errorf("%w: %w", ha.ErrConflict, err)
	}
	return err
}

// Look reads labels and reservations from the drives themselves, whatever is open.
func (b *backend) Look(ctx context.Context) (ha.View, error) {
	s, err := raid.ReadLabels(ctx, b.drives.scan(), raid.UUID{})
	b.mu.Lock()
	b.survey, b.looked = s, err == nil
	b.mu.Unlock()
	switch {
	case errors.Is(err, raid.ErrBlank) && len(s.Drives) > 0, err == nil && s.Label.Epoch == 0:
		// Epoch 0: labels of an array whose pool was never finished.
		return ha.View{Blank: true}, nil
	case err != nil:
		return ha.View{Unreadable: true}, err
	case s.Members < s.Label.K:
		return ha.View{Unreadable: true}, fmt.Errorf("%d members can be used, %d are needed at least", s.Members, s.Label.K)
	case b.stragglers(&s) > 0 && time.Since(b.began) < straggleTime:
		// A kernel that still probes its buses: a member that is passed over now counts as failed from the
		// first write on.
		return ha.View{Unreadable: true}, fmt.Errorf("%d members are still missing; waiting for them", b.stragglers(&s))
	case s.Lost > s.Label.M:
		return ha.View{Unreadable: true}, fmt.Errorf("members %s are missing, parity stands for %d of them: nothing is given up, and the pool opens when enough are back; 'ledge drive list' shows why a drive that is there is refused",
			setText(s.Absent), s.Label.M)
	}
	l := &s.Label
	v := ha.View{Epoch: l.Epoch, Owner: ha.Controller(l.Owner), Solo: l.Solo(), SoloLSN: l.SoloLSN, Replaying: l.Replaying(), Fresh: l.Fresh(),
		Mirror: b.mirror.Complete(nvram.ID(l.NVRAM), l.Epoch)}
	if !v.Solo {
		v.SoloLSN = 0
	}
	if s.HolderMembers > l.N/2 {
		v.Holder = controllerOf(s.Holder)
	}
	return v, nil
}

// setText lists the members of a set.
func setText(set uint64) string {
	var parts []string
	for ; set != 0; set &= set - 1 {
		parts = append(parts, fmt.Sprint(bits.TrailingZeros64(set)))
	}
	return strings.Join(parts, ", ")
}

// straggleTime is how long after the start members may take to appear.
const straggleTime = 8 * time.Second

// stragglers counts the members that are neither here nor recorded as failed.
func (b *backend) stragglers(s *raid.Survey) int {
	return max(0, s.Label.N-bits.OnesCount64(s.Label.Failed)-s.Members)
}

// openArray opens the array as the labels are now. The caller closes it.
func (b *backend) openArray(ctx context.Context) (*raid.Array, error) {
	lent, err := b.drives.lend()
	if err != nil {
		return nil, err
	}
	a, err := raid.Open(ctx, lent, raid.Options{Logger: b.log, CacheBytes: sumBytes()})
	if err != nil {
		giveBack(lent)
	}
	return a, err
}

func (b *backend) Reserve(ctx context.Context, seen ha.View) error {
	a, err := b.openArray(ctx)
	if err != nil {
		return err
	}
	defer a.Close()
	return conflict(a.Acquire(ctx, keyOf(b.self, seen.Epoch)))
}

func (b *backend) Fence(ctx context.Context, seen ha.View) error {
	a, err := b.openArray(ctx)
	if err != nil {
		return err
	}
	defer a.Close()
	return a.Preempt(ctx, keyOf(b.self, seen.Epoch+1))
}

// Release also closes an array that was opened to write labels.
func (b *backend) Release(ctx context.Context) error {
	b.closeArray()
	return b.drives.release(ctx, b.mine)
}

func (b *backend) closeArray() {
	b.tasks.stop() // they use it
	b.mu.Lock()
	a := b.array
	b.array, b.key = nil, 0
	b.mu.Unlock()
	if a != nil {
		if err := a.Close(); err != nil {
			b.log.Warn("closing the array", "err", err)
		}
	}
}

// hold keeps the array open for what follows.
func (b *backend) hold(a *raid.Array, key uint64) {
	b.closeArray()
	b.mu.Lock()
	b.array, b.key = a, key
	b.mu.Unlock()
	b.tasks.resume()
}

// Claim opens the array anew, so that it starts from the labels as the fence left them; fences again, so that
// members that cannot be fenced are left out; and makes the label ours, if the members still say what was seen: since the
// look after the first fence this controller may have been stopped for minutes, in which the partner owned the pool.
func (b *backend) Claim(ctx context.Context, seen ha.View, clean, lose bool) error {
	a, err := b.openArray(ctx)
	if err != nil {
		return err
	}
	key := keyOf(b.self, seen.Epoch+1)
	b.hold(a, key)
	if err := a.Preempt(ctx, key); err != nil {
		return conflict(err)
	}
	if err := unchanged(ctx, a, seen); err != nil {
		return err
	}
	first := uint64(1)
	if !clean {
		first = b.mirror.State().Next
	}
	id := nvram.NewID()
	if err := nvram.Format(b.region, b.own, nvram.FormatOptions{ID: id, Identity: b.conf.identity(), Epoch: seen.Epoch + 1, FirstLSN: max(first, 1)}); err != nil {
		return err
	}
	return conflict(a.WriteLabel(ctx, func(l *raid.Label) {
		was := l.NVRAM
		l.Epoch, l.Owner, l.NVRAM = seen.Epoch+1, byte(b.self), raid.UUID(id)
		l.Flags, l.SoloLSN, l.Opaque = raid.FlagFresh, 0, nil
		if !clean {
			// The log whose mirror is to be replayed, for a restart.
			l.Flags, l.Opaque = raid.FlagReplaying, []byte(hex.EncodeToString(was[:]))
		}
		if lose {
			l.Opaque = []byte(gaveUp) // Clear takes it away when the pool is open, also after a restart
		}
	}))
}

// gaveUp in a label's Opaque: the log of before was given up, and the pool has not been opened since.
const gaveUp = "the log was given up"

// unchanged is nil if the members say what was seen. Nobody else can write them now.
func unchanged(ctx context.Context, a *raid.Array, seen ha.View) error {
	l, err := a.ReadLabel(ctx)
	if err != nil {
		return err
	}
	v := ha.View{Epoch: l.Epoch, Owner: ha.Controller(l.Owner), Solo: l.Solo(), Replaying: l.Replaying(), Fresh: l.Fresh()}
	if !v.SameLabel(seen) {
		return fmt.Errorf("%w: the labels changed since they were looked at: %v, then %v", ha.ErrConflict, v, seen)
	}
	return nil
}

func (b *backend) Refresh(ctx context.Context) error {
	a, err := b.openArray(ctx)
	if err != nil {
		return err
	}
	l := a.Label()
	key := keyOf(b.self, l.Epoch)
	b.hold(a, key)
	if err := a.Acquire(ctx, key); err != nil {
		return conflict(err)
	}
	return conflict(a.WriteLabel(ctx, func(*raid.Label) {}))
}

func (b *backend) Clear(ctx context.Context) error {
	a, err := b.held()
	if err != nil {
		return err
	}
	if err := a.WriteLabel(ctx, func(l *raid.Label) {
		l.Flags &^= raid.FlagReplaying
		l.Opaque = nil
	}); err != nil {
		return conflict(err)
	}
	b.mu.Lock()
	p := b.pool
	b.mu.Unlock()
	if p != nil {
		p.ReleaseSources()
	}
	return nil
}

func (b *backend) Disown(ctx context.Context) error {
	a, err := b.held()
	if err != nil {
		return err
	}
	return conflict(a.WriteLabel(ctx, func(l *raid.Label) {
		l.Owner, l.Flags, l.SoloLSN, l.Opaque = 0, 0, 0, nil
	}))
}

// confirmLimit is how long a confirmation waits for drives that hang: well below the lease.
const confirmLimit = 2 * time.Second

// Confirm asks the drives, not the array: a drive that does not answer here is not failed for it.
func (b *backend) Confirm(ctx context.Context) error {
	b.mu.Lock()
	a, key := b.array, b.key
	b.mu.Unlock()
	if a == nil {
		return errors.New("no array is open")
	}
	paths := memberPaths(a.Status())
	held := b.drives.holders(ctx, confirmLimit, func(path string) bool { return paths[path] })
	most, others := a.Geometry().N/2+1, 0
	for k, n := range held {
		if k != key {
			others += n
		}
	}
	switch {
	case held[key] >= most:
		return nil
	case others > 0 && len(paths)-others < most:
		// Taken over, or nobody's: a partner that fenced us and let go, or drives that forgot. A new start finds out which.
		return fmt.Errorf("%w: reservations are held by %s", ha.ErrConflict, keysText(held))
	}
	return fmt.Errorf("only %d members confirm our reservation, %d are needed (held by %s)", held[key], most, keysText(held))
}

// memberPaths picks the drives that the array reads and writes. The others may hold a reservation of ours from before:
// a drive that was failed or replaced proves nothing about who owns the members.
func memberPaths(st raid.Status) map[string]bool {
	paths := map[string]bool{}
	for _, m := range st.Members {
		if m.Path != "" && (m.State == raid.Online || m.State == raid.Suspect) {
			paths[m.Path] = true
		}
	}
	return paths
}

func keysText(held map[uint64]int) string {
	var parts []string
	for k, n := range held {
		who := "nobody"
		if k != 0 {
			who = fmt.Sprintf("%016x", k)
		}
		parts = append(parts, fmt.Sprintf("%s on %d", who, n))
	}
	slices.Sort(parts)
	return strings.Join(parts, ", ")
}

func (b *backend) held() (*raid.Array, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.array == nil {
		return nil, errors.New("no array is open")
	}
	return b.array, nil
}

// EnterSolo and LeaveSolo make the backend the log's witness.
func (b *backend) EnterSolo(ctx context.Context, lsn uint64) error {
	a, err := b.held()
	if err != nil {
		return err
	}
	b.log.Warn("partner is missing: recording solo on the members", "lsn", lsn)
	return a.WriteLabel(ctx, func(l *raid.Label) {
		if l.Flags&raid.FlagSolo == 0 || lsn < l.SoloLSN {
			l.SoloLSN = lsn
		}
		l.Flags = l.Flags&^raid.FlagFresh | raid.FlagSolo
	})
}

func (b *backend) LeaveSolo(ctx context.Context) error {
	a, err := b.held()
	if err != nil {
		return err
	}
	l := a.Label()
	if !l.Solo() && !l.Fresh() {
		return nil
	}
	if l.Solo() {
		b.log.Info("partner's mirror is complete again: solo ends")
	}
	return a.WriteLabel(ctx, func(l *raid.Label) { l.Flags, l.SoloLSN = l.Flags&^(raid.FlagSolo|raid.FlagFresh), 0 })
}
