package scsi

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ledge-storage/ledge/target"
)

// Errors of configuring a Target.
var (
	// ErrLUNInUse: Attach of a number that has a unit.
	ErrLUNInUse = errors.New("scsi: logical unit number is in use")
	// ErrNoLUN: a call that names a number without a unit.
	ErrNoLUN = errors.New("scsi: no such logical unit")
)

// MaxLUN is the highest logical unit number: the 14 bits of flat space addressing (SAM-5 4.7.7.3).
const MaxLUN = 1<<14 - 1

// MaxUnits bounds the units of one target.
const MaxUnits = 4096

// Options of a Target. The zero value is usable.
type Options struct {
	// MaxTransferBytes bounds the data of one READ or WRITE; zero: 32 MiB. It is told to
	// initiators in the block limits page. Writes are gathered whole in memory, reads are not.
	MaxTransferBytes uint32
	// SetPortGroups is asked by SET TARGET PORT GROUPS: groups holds those that the initiator names,
	// with the states that it wants. The states themselves come from Target.SetPortGroups, as ever. An
	// error refuses the command; target.ErrBusy and its like keep their meaning. It is called in the
	// command: it must return when ctx ends, and not wait for a Detach, which waits for the command.
	// Nil: the command is unknown, and access is told to be implicit only.
	SetPortGroups func(ctx context.Context, groups []target.PortGroup) error
	// TransitionTime is the longest that a change of access states takes, rounded up to seconds, at most 255;
	// zero: 60 s.
	TransitionTime time.Duration
	// Tokens holds the ROD tokens, so that targets that share it take each other's; nil: its own.
	Tokens *Tokens
}

// ReservationStore keeps the persistent reservations of a unit through power loss (APTPL).
// Both calls may block.
type ReservationStore interface {
	// Load returns what Save stored last, or nothing.
	Load() ([]byte, error)
	// Save returns when state is durable.
	Save(state []byte) error
}

// SharedReservations is a ReservationStore of a unit that moves between targets, of which one serves it at a
// time. What it keeps are the unit's reservations wherever it is served: every change is saved whole, APTPL
// or not, and a target loads them (Attach, ReloadReservations) before it serves.
type SharedReservations interface {
	ReservationStore
	// Current returns nil while this target is the one that serves the unit. PERSISTENT RESERVE IN asks it
	// after it took the state that it answers. It may block.
	Current(ctx context.Context) error
}

// UnitOptions of one logical unit.
type UnitOptions struct {
	// Initiators that see the unit, by iSCSI name (in its canonical lower-case form); nil: all.
	Initiators []string
	// Reservations keeps persistent reservations; nil: they live as long as the Target, and
	// APTPL is refused.
	Reservations ReservationStore
	// AllowSanitize serves SANITIZE, which destroys all of the unit's data. Zero: it is
	// answered as an unknown command.
	AllowSanitize bool
}

// Target is a SCSI target device: a name and its logical units. All methods may be called at any
// time, whatever sessions are doing.
type Target struct {
	name string
	opts Options
	ops  *opTable

	tokens *Tokens
	made   time.Time

	mu       sync.Mutex // guards changes of what follows; reads are of the atomic pointers
	units    atomic.Pointer[map[uint64]*unit]
	groups   atomic.Pointer[[]target.PortGroup]
	explicit atomic.Pointer[map[uint16]target.AccessState] // states that an initiator asked for
	sessions atomic.Pointer[map[*Nexus]struct{}]
}

// NewTarget returns a target without units. Name is its iSCSI name.
func NewTarget(name string, o Options) *Target {
	if o.MaxTransferBytes == 0 {
		o.MaxTransferBytes = 32 << 20
	}
	if o.TransitionTime <= 0 {
		o.TransitionTime = 60 * time.Second
	}
	if o.Tokens == nil {
		o.Tokens = NewTokens(nil)
	}
	t := &Target{name: name, opts: o, ops: newOpTable(), made: time.Now(), tokens: o.Tokens}
	t.explicit.Store(&map[uint16]target.AccessState{})
	t.sessions.Store(&map[*Nexus]struct{}{})
	t.units.Store(&map[uint64]*unit{})
	t.groups.Store(&[]target.PortGroup{})
	return t
}

// Name returns the iSCSI name.
func (t *Target) Name() string { return t.name }

// Attach makes dev the logical unit lun.
func (t *Target) Attach(lun uint64, dev target.Device, o UnitOptions) error {
	if lun > MaxLUN {
		return fmt.Errorf("scsi: attach lun %d: numbers end at %d", lun, MaxLUN)
	}
	if bs := dev.Info().BlockBytes; bs != 512 && bs != 4096 {
		return fmt.Errorf("scsi: attach lun %d: block size %d is neither 512 nor 4096", lun, bs)
	}
	u, err := newUnit(t, lun, dev, o)
	if err != nil {
		return fmt.Errorf("scsi: attach lun %d: %w", lun, err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	old := *t.units.Load()
	if _, used := old[lun]; used {
		return fmt.Errorf("scsi: attach lun %d: %w", lun, ErrLUNInUse)
	}
	if len(old) >= MaxUnits {
		return fmt.Errorf("scsi: attach lun %d: the target has %d units already", lun, MaxUnits)
	}
	units := make(map[uint64]*unit, len(old)+1)
	for n, u := range old {
		units[n] = u
	}
	units[lun] = u
	t.units.Store(&units)
	for n := range *t.sessions.Load() {
		n.learn(u, false)
	}
	t.lunsChanged()
	return nil
}

// Detach takes the unit away. It cancels the commands that run on it and returns when the device
// is called no more.
func (t *Target) Detach(lun uint64) error {
	t.mu.Lock()
	old := *t.units.Load()
	u, ok := old[lun]
	if !ok {
		t.mu.Unlock()
		return fmt.Errorf("scsi: detach lun %d: %w", lun, ErrNoLUN)
	}
	units := make(map[uint64]*unit, len(old))
	for n, v := range old {
		if n != lun {
			units[n] = v
		}
	}
	t.units.Store(&units)
	var gone []*itl
	for n := range *t.sessions.Load() {
		if i := n.itl(u); i != nil {
			gone = append(gone, i)
		}
		n.forget(u)
	}
	t.lunsChanged()
	t.mu.Unlock()
	u.remove()
	for _, i := range gone {
		if c := i.counters.Load(); c != nil {
			i.nexus.tally.leave(c)
		}
	}
	return nil
}

// Changed tells initiators that the unit's capacity or other parameters changed, and where its identity
// (the names in target.Info) is not what it was at the last call, that.
func (t *Target) Changed(lun uint64) {
	u := (*t.units.Load())[lun]
	if u == nil {
		return
	}
	now := u.dev.Info()
	old := u.told.Swap(&now)
	if identity(*old) != identity(now) {
		u.attention(uaInquiryChanged, nil)
		if old.Blocks == now.Blocks && old.BlockBytes == now.BlockBytes {
			return
		}
	}
	u.attention(uaCapacityChanged, nil)
}

// identity is what INQUIRY tells of a device.
func identity(i target.Info) target.Info {
	return target.Info{Vendor: i.Vendor, Product: i.Product, Revision: i.Revision, Serial: i.Serial, UUID: i.UUID}
}

// SetInitiators changes who sees the unit; nil: all. It returns when no command of an initiator that sees it no
// more runs, or ever will: what such an initiator wrote is either there now or never will be.
func (t *Target) SetInitiators(lun uint64, initiators []string) error {
	t.mu.Lock()
	u := (*t.units.Load())[lun]
	if u == nil {
		t.mu.Unlock()
		return fmt.Errorf("scsi: set initiators of lun %d: %w", lun, ErrNoLUN)
	}
	u.setInitiators(initiators)
	for n := range *t.sessions.Load() {
		if i := n.itl(u); i != nil {
			i.allowed.Store(u.allows(n.Initiator))
		}
	}
	t.lunsChanged()
	t.mu.Unlock()
	u.abort(func(t *Task) bool { return t.shutOut() })
	u.evict(func(n *Nexus) bool { return !u.allows(n.Initiator) })
	u.revokeAll(func(k *token) bool { return !u.allows(k.initiator) })
	return nil
}

// ReloadReservations loads the unit's persistent reservations from its store anew. A target that is to serve a
// unit which another served before calls it before the unit's device or its access state lets any command
// pass: in between, an initiator that was fenced through the other target could write.
func (t *Target) ReloadReservations(lun uint64) error {
	u := (*t.units.Load())[lun]
	if u == nil {
		return fmt.Errorf("scsi: reload reservations of lun %d: %w", lun, ErrNoLUN)
	}
	if err := u.reloadReservations(); err != nil {
		return fmt.Errorf("scsi: reload reservations of lun %d: %w", lun, err)
	}
	return nil
}

// SetPortGroups sets the access state of every target port group, for REPORT TARGET PORT GROUPS
// and for the commands that arrive on their ports. None: one group that is optimized.
func (t *Target) SetPortGroups(groups []target.PortGroup) {
	next := make([]target.PortGroup, len(groups))
	for i, g := range groups {
		g.Ports = slices.Clone(g.Ports)
		next[i] = g
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	old := *t.groups.Load()
	t.groups.Store(&next)
	if !statesDiffer(old, next) {
		return
	}
	for _, u := range *t.units.Load() {
		u.revokeAll(everyToken) // the partner may have written meanwhile
		u.attention(uaAccessStateChanged, nil)
	}
}

// PortGroups returns what SetPortGroups set.
func (t *Target) PortGroups() []target.PortGroup { return *t.groups.Load() }

func statesDiffer(a, b []target.PortGroup) bool {
	if len(a) == 0 {
		return false // the first setting is no change that an initiator could have seen
	}
	return !slices.EqualFunc(a, b, func(x, y target.PortGroup) bool {
		return x.ID == y.ID && x.State == y.State && x.Preferred == y.Preferred
	})
}

// lunsChanged queues REPORTED LUNS DATA HAS CHANGED everywhere. Target.mu is held.
func (t *Target) lunsChanged() {
	for _, u := range *t.units.Load() {
		u.attention(uaLUNsChanged, nil)
	}
}

// Sessions is how many nexuses are logged in.
func (t *Target) Sessions() int { return len(*t.sessions.Load()) }

// VisibleTo says whether initiator would see any unit: discovery and login ask it.
func (t *Target) VisibleTo(initiator string) bool {
	units := *t.units.Load()
	if len(units) == 0 {
		return true
	}
	for _, u := range units {
		if u.allows(initiator) {
			return true
		}
	}
	return false
}

// ports is how many ports the groups hold.
func (t *Target) ports() (n int) {
	for _, g := range *t.groups.Load() {
		n += len(g.Ports)
	}
	return n
}

// state returns the access state of the group that holds the relative port.
func (t *Target) state(port uint16) target.AccessState {
	for _, g := range *t.groups.Load() {
		if slices.Contains(g.Ports, port) {
			return g.State
		}
	}
	return target.Optimized
}

// group returns the target port group of a relative port; 1 where none is configured.
func (t *Target) group(port uint16) uint16 {
	for _, g := range *t.groups.Load() {
		if slices.Contains(g.Ports, port) {
			return g.ID
		}
	}
	return 1
}

// eachNexus calls f for every nexus without holding a lock that f could want.
func (t *Target) eachNexus(f func(*Nexus)) {
	for n := range *t.sessions.Load() {
		f(n)
	}
}
