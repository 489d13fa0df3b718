package scsi

import (
	"fmt"
	"maps"
	"sync"
	"sync/atomic"
)

// Nexus is an I_T nexus: one initiator port logged in to one port of a target. The transport
// makes one a session.
type Nexus struct {
	Target *Target
	// Initiator is the initiator's iSCSI name; Port its SCSI port name (name,i,0xISID).
	Initiator, Port string
	// RelativePort is the relative target port identifier.
	RelativePort uint16
	// Queries is set by a transport that has, on this nexus, QUERY TASK, QUERY TASK SET, QUERY
	// ASYNCHRONOUS EVENT and I_T NEXUS RESET (RFC 7144): REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS tells.
	Queries atomic.Bool

	itls  atomic.Pointer[map[*unit]*itl]
	tally tally
	done  atomic.Bool
	// proxied: a nexus of another target, for one command that was sent here.
	proxied bool
}

// itl is what a nexus and a unit share: whether the one sees the other, and the attentions
// queued for it.
type itl struct {
	nexus    *Nexus
	unit     *unit
	allowed  atomic.Bool
	counters atomic.Pointer[counters] // made by the first command
	pending  atomic.Int32             // length of queue, to be read without the lock

	mu    sync.Mutex
	queue [maxAttentions]asc
}

// maxAttentions bounds the attentions queued for one nexus and unit; there are fewer kinds.
const maxAttentions = 16

// Connect makes a nexus. ISID is the initiator session id of RFC 7143.
func (t *Target) Connect(initiator string, isid [6]byte, relativePort uint16) *Nexus {
	n := &Nexus{
		Target:       t,
		Initiator:    initiator,
		Port:         fmt.Sprintf("%s,i,0x%x", initiator, isid),
		RelativePort: relativePort,
	}
	n.itls.Store(&map[*unit]*itl{})
	t.mu.Lock()
	defer t.mu.Unlock()
	next := maps.Clone(*t.sessions.Load())
	next[n] = struct{}{}
	t.sessions.Store(&next)
	for _, u := range *t.units.Load() {
		n.learn(u, true)
	}
	return n
}

// Close ends the nexus: its tasks are aborted and waited for, its reservation of RESERVE(6) is
// dropped. Registrations of PERSISTENT RESERVE stay, as SPC-4 asks.
func (n *Nexus) Close() {
	n.Target.mu.Lock()
	next := maps.Clone(*n.Target.sessions.Load())
	delete(next, n)
	n.Target.sessions.Store(&next)
	n.done.Store(true)
	units := *n.itls.Load()
	n.Target.mu.Unlock()
	for u, i := range units {
		u.loseNexus(n)
		if c := i.counters.Load(); c != nil {
			u.tally.leave(c)
		}
	}
}

// learn adds u. Target.mu is held.
func (n *Nexus) learn(u *unit, powerOn bool) {
	old := *n.itls.Load()
	next := make(map[*unit]*itl, len(old)+1)
	for k, v := range old {
		next[k] = v
	}
	i := &itl{nexus: n, unit: u}
	i.allowed.Store(u.allows(n.Initiator))
	if powerOn {
		i.add(uaPowerOn)
	}
	next[u] = i
	n.itls.Store(&next)
}

// forget drops u. Target.mu is held.
func (n *Nexus) forget(u *unit) {
	old := *n.itls.Load()
	next := make(map[*unit]*itl, len(old))
	for k, v := range old {
		if k != u {
			next[k] = v
		}
	}
	n.itls.Store(&next)
}

func (n *Nexus) itl(u *unit) *itl { return (*n.itls.Load())[u] }

// unit returns the unit that the nexus sees at lun, or nil.
func (n *Nexus) unit(lun uint64) (*unit, *itl) {
	u := (*n.Target.units.Load())[lun]
	if u == nil {
		return nil, nil
	}
	i := n.itl(u)
	if i == nil || !i.allowed.Load() {
		return nil, nil
	}
	return u, i
}

// add queues an attention once; the oldest stay when the queue is full. A reset replaces all that came
// before it, and is itself covered by a power on that is not told yet (SAM-5 5.14.5).
func (i *itl) add(a asc) {
	i.mu.Lock()
	defer i.mu.Unlock()
	n := int(i.pending.Load())
	if a == uaPowerOn || a == uaReset {
		if n > 0 && i.queue[0] == uaPowerOn {
			a = uaPowerOn
		}
		i.queue[0] = a
		i.pending.Store(1)
		return
	}
	for _, q := range i.queue[:n] {
		if q == a {
			return
		}
	}
	if n < maxAttentions {
		i.queue[n] = a
		i.pending.Store(int32(n + 1))
	}
}

// take removes the oldest attention.
func (i *itl) take() (a asc, ok bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	n := int(i.pending.Load())
	if n == 0 {
		return 0, false
	}
	a = i.queue[0]
	copy(i.queue[:], i.queue[1:n])
	i.pending.Store(int32(n - 1))
	return a, true
}

// drop removes one kind of attention: REPORT LUNS clears the one that asks for it.
func (i *itl) drop(a asc) {
	i.mu.Lock()
	defer i.mu.Unlock()
	n := int(i.pending.Load())
	kept := i.queue[:0]
	for _, q := range i.queue[:n] {
		if q != a {
			kept = append(kept, q)
		}
	}
	i.pending.Store(int32(len(kept)))
}
