package scsi

import (
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/ledge-storage/ledge/target"
)

// unit is a logical unit: a device and what SCSI makes it remember.
type unit struct {
	target *Target
	lun    uint64
	dev    target.Device
	inline target.Inline      // dev, where it is one
	lender target.Lender      // dev, where it is one
	fetch  target.Fetcher     // dev, where it is one
	pool   target.Provisioned // dev, where it is one
	eraser target.Eraser      // dev, where it is one
	store  ReservationStore
	shared SharedReservations // store, where it is one
	proxy  ReservationProxy   // store, where it is one

	acl atomic.Pointer[map[string]struct{}]
	// mode holds the bits that MODE SELECT and START STOP UNIT change; see mode.go.
	mode atomic.Uint32
	// restricted says that a reservation of either kind exists, so that the common case
	// takes no lock.
	restricted atomic.Bool
	// low says that initiators were warned of a pool below its threshold.
	low atomic.Bool
	// told is what Changed saw last.
	told   atomic.Pointer[target.Info]
	copies copyLog
	// sanitizing is changed under mu.
	sanitizing    atomic.Pointer[sanitize]
	allowSanitize bool
	tally         tally

	// prMu serialises PERSISTENT RESERVE OUT; it is held while state is stored.
	prMu sync.Mutex

	mu       sync.Mutex // guards what follows
	left     *sync.Cond // a running task has left
	first    *Task      // the task set, oldest first
	last     *Task
	ordered  int    // ORDERED tasks in the task set
	turns    uint64 // tasks that have begun
	removed  bool
	visits   map[*visit]struct{}
	tokens   []*token // that stand for blocks of this unit
	reserved *Nexus   // holder of RESERVE(6), RESERVE(10)
	pr       reservations
}

func newUnit(t *Target, lun uint64, dev target.Device, o UnitOptions) (*unit, error) {
	u := &unit{target: t, lun: lun, dev: dev, store: o.Reservations, allowSanitize: o.AllowSanitize}
	u.left = sync.NewCond(&u.mu)
	u.shared, _ = o.Reservations.(SharedReservations)
	u.proxy, _ = o.Reservations.(ReservationProxy)
	u.inline, _ = dev.(target.Inline)
	u.lender, _ = dev.(target.Lender)
	u.fetch, _ = dev.(target.Fetcher)
	u.eraser, _ = dev.(target.Eraser)
	info := dev.Info()
	u.told.Store(&info)
	if info.Thin {
		u.pool, _ = dev.(target.Provisioned)
	}
	u.setInitiators(o.Initiators)
	if err := u.loadReservations(); err != nil {
		return nil, fmt.Errorf("load reservations: %w", err)
	}
	return u, nil
}

func (u *unit) setInitiators(names []string) {
	if names == nil {
		u.acl.Store(nil)
		return
	}
	m := make(map[string]struct{}, len(names))
	for _, n := range names {
		m[n] = struct{}{}
	}
	u.acl.Store(&m)
}

func (u *unit) allows(initiator string) bool {
	m := u.acl.Load()
	if m == nil {
		return true
	}
	_, ok := (*m)[initiator]
	return ok
}

// neverBlocks says whether the device may be called from a connection's reader.
func (u *unit) neverBlocks() bool { return u.inline != nil && u.inline.NeverBlocks() }

// attention queues a for every nexus but one.
func (u *unit) attention(a asc, but *Nexus) {
	u.attentionWhere(a, func(n *Nexus) bool { return n != but })
}

func (u *unit) attentionWhere(a asc, where func(*Nexus) bool) {
	u.target.eachNexus(func(n *Nexus) {
		if where(n) {
			if i := n.itl(u); i != nil {
				i.add(a)
			}
		}
	})
}

// enter puts t in the task set.
func (u *unit) enter(t *Task) {
	u.mu.Lock()
	t.unit = u
	t.state = taskWaiting
	t.prev, t.next = u.last, nil
	if u.last != nil {
		u.last.next = t
	} else {
		u.first = t
	}
	u.last = t
	if t.Attribute == Ordered {
		u.ordered++
	}
	t.waits = u.ordered > 0 && u.mustWait(t)
	u.mu.Unlock()
}

// mustWait says whether an older task of the same nexus must end before t begins: any for an
// ORDERED task, an ORDERED one for a SIMPLE task (SAM-5 8.9). The mode page says that each nexus
// has a task set of its own (TST 001b), so that nobody can hold up another's commands.
// unit.mu is held.
func (u *unit) mustWait(t *Task) bool {
	if t.Attribute == HeadOfQueue {
		return false
	}
	for o := u.first; o != t; o = o.next {
		if o.Nexus == t.Nexus && (t.Attribute == Ordered || o.Attribute == Ordered) {
			return true
		}
	}
	return false
}

// begin makes t a running task when its turn has come, unless it was aborted meanwhile or the
// unit is gone. It waits only for a task that NeverBlocks denied.
func (u *unit) begin(t *Task) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	for t.waits && !t.aborted.Load() && u.mustWait(t) {
		u.left.Wait()
	}
	if t.aborted.Load() {
		return errAborted
	}
	if u.removed || t.shutOut() {
		return illegal(ascUnsupportedLUN)
	}
	if err := u.sanitizeError(t.op); err != nil {
		return err
	}
	t.state = taskRunning
	u.turns++
	t.turn = u.turns
	if len(u.tokens) > 0 && t.op.flags&opRange != 0 {
		u.revoke(t.lba, t.blocks)
	}
	return nil
}

// leave takes t out of the task set.
func (u *unit) leave(t *Task) {
	u.mu.Lock()
	if t.prev != nil {
		t.prev.next = t.next
	} else {
		u.first = t.next
	}
	if t.next != nil {
		t.next.prev = t.prev
	} else {
		u.last = t.prev
	}
	t.prev, t.next = nil, nil
	if t.state == taskRunning || u.ordered > 0 {
		u.left.Broadcast()
	}
	if t.Attribute == Ordered {
		u.ordered--
	}
	t.state = taskIdle
	u.mu.Unlock()
}

// abort cancels every task that match picks and returns when none of them runs any more. Those
// that wait for data never will; their transport is told. It returns how many there were.
func (u *unit) abort(match func(*Task) bool) (count int) { return u.abortBy(nil, match) }

// abortBy is abort by a nexus: where TAS is set, the tasks of others are answered with TASK ABORTED.
func (u *unit) abortBy(by *Nexus, match func(*Task) bool) (count int) {
	type waiter struct {
		aborter Aborter
		tag     uint64
	}
	var waiting []waiter
	tas := by != nil && u.mode.Load()&modeTaskAborted != 0
	u.mu.Lock()
	for t := u.first; t != nil; t = t.next {
		if !match(t) {
			continue
		}
		count++
		if tas && t.Nexus != by && !t.aborted.Load() {
			t.answered.Store(true)
		}
		if !t.aborted.Swap(true) {
			t.ctx.cancel()
		}
		if t.state == taskWaiting {
			waiting = append(waiting, waiter{t.Aborter, t.Tag})
		}
	}
	if count > 0 {
		u.left.Broadcast() // for those that wait for their turn
	}
	for u.ending(match) {
		u.left.Wait()
	}
	u.mu.Unlock()
	for _, w := range waiting {
		w.aborter.Aborted(w.tag)
	}
	return count
}

// ending says whether a task that match picks was aborted and still runs. unit.mu is held.
func (u *unit) ending(match func(*Task) bool) bool {
	for t := u.first; t != nil; t = t.next {
		if t.state == taskRunning && t.aborted.Load() && match(t) {
			return true
		}
	}
	return false
}

// loseNexus ends what the unit holds for n.
func (u *unit) loseNexus(n *Nexus) {
	u.abort(func(t *Task) bool { return t.Nexus == n })
	u.copies.stop(func(o *copyOp) bool { return o.nexus == n })
	u.copies.drop(func(o *copyOp) bool { return o.nexus == n })
	u.mu.Lock()
	if u.reserved == n {
		u.reserved = nil
		u.updateRestricted()
	}
	u.mu.Unlock()
}

// remove refuses every task from now on and waits for those that run.
func (u *unit) remove() {
	u.mu.Lock()
	u.removed = true
	u.mu.Unlock()
	u.abort(func(*Task) bool { return true })
	u.copies.stop(func(*copyOp) bool { return true })
	u.expel(everyNexus)
	u.endSanitize()
	u.revokeAll(everyToken)
	u.target.tokens.forget(u)
}

// gone says whether the unit was detached.
func (u *unit) gone() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.removed
}

// evict ends what the nexuses that match picks do here, or in other units' names to this one, and
// waits for it.
func (u *unit) evict(match func(*Nexus) bool) {
	u.copies.stop(func(o *copyOp) bool { return match(o.nexus) })
	u.expel(match)
}

// reset is LOGICAL UNIT RESET (SAM-5 6.3.3): tasks end, RESERVE is dropped, mode parameters
// return to their defaults, everyone learns of it. Persistent reservations stay.
// The tasks that spare picks, where it is not nil, are left alone.
func (u *unit) reset(by *Nexus, spare func(*Task) bool) int {
	count := u.abortBy(by, func(t *Task) bool { return spare == nil || !spare(t) })
	u.evict(everyNexus)
	u.mu.Lock()
	u.reserved = nil
	u.updateRestricted()
	u.mu.Unlock()
	u.mode.Store(0)
	u.attention(uaReset, nil)
	return count
}

// updateRestricted follows a change of either reservation. unit.mu is held.
func (u *unit) updateRestricted() {
	u.restricted.Store(u.reserved != nil || u.pr.held())
}
