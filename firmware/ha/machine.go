package ha

import "fmt"

// Ownership as a state machine.
//
// Each controller runs one Machine. Step takes an event and returns the next state and the actions to
// perform, in order; an action that does I/O reports back with one event. At most one such action is under
// way at a time. Orders from the operator and messages from the partner may come at any moment. Not drawn: a failed action that shut nothing leads back to where its attempt began; one
// that leaves the pool in doubt leads to Failed, exit 2.
//
//	                    ┌──────────┐ blank           ┌─────────┐  create   ┌─────────┐
//	   start ──────────►│ Starting ├────────────────►│ NoPool  ├──────────►│ Forming │
//	                    └┬──┬────▲─┘                 └────▲────┘           └──┬───┬──┘
//	      label: owner me│  │    │label appears ◄─────────┴── failed ─────────┘   │ formed
//	  ┌──────────────────┘  │label: partner, or nobody                            │ (epoch 1)
//	  ▼                     ▼                                                     ▼
//	┌────────────┐       ┌─────────┐ order, partner alive ┌────────┐          ┌─────────┐
//	│ Reclaiming │       │ Standby ├─────────────────────►│ Asking │          │         │
//	└┬───┬───────┘       └┬───▲────┘                      └┬────┬──┘   ┌─────►│  Owner  │
//	 │   │own log empty   │   │refused (said why)          │    │      │      │         │
//	 │   ▼                │   ├──────────────◄─────────────┘    │      │      └┬──────┬─┘
//	 │ ┌─────────┐        │   │              handed over, or    │      │ asked │      │ reservation
//	 │ │ Refused │  order,│   │  silent and mirror complete     │      │       ▼      │ lost
//	 │ └─────────┘ partner│   │                                 ▼      │  ┌─────────┐ │
//	 │            silent, └───┼─► Fencing ─► Rechecking ─► Claiming    │  │ Handing │ │
//	 │            mirror      │      │            │            │       │  │  Over   │ │
//	 │            complete    └──────┴────────────┴──┐         ▼       │  └┬───────┬┘ │
//	 │                              refused          │     Replaying ──┘   │label: │  │
//	 └─ reserve, look again, label, replay own log ──┼─────────────────►   │nobody ▼  ▼
//	                                                 └─► Standby ◄─────────┘     ┌────────┐
//	                                                                             │ Fenced │ exit 3
//	                                                                             └────────┘
//
// An operator may order to become owner even where acknowledged writes are lost by it (State.Lose): then a stale mirror, "solo" and a
// takeover that was not finished are no reasons to refuse, and Refused reclaims without its log. What is claimed like that is claimed
// as fresh, with nothing to replay. All else stays: the fence, the looks, the lease.
//
// Why each step is where it is:
//
//   - *Look before fencing*: a refusal must disturb nobody. *Look after fencing*: until the fence the owner
//     could still record solo and acknowledge what the mirror lacks; after it, it cannot.
//   - *Freeze before fencing*: once frozen the mirror acknowledges nothing, so what it holds is final. The
//     owner's only other way to acknowledge is to record solo on a majority, which the fence takes away.
//     So between fence and second look the set of acknowledged writes stands still, and it is in the mirror
//     or the second look says solo.
//   - *Claim only over the label of that look*: between the two this controller may have been stopped, and the partner
//     have fenced it in turn, become owner, recorded solo and acknowledged. So a claim fences again, reads the labels, and
//     is a conflict unless they say what was seen (View.SameLabel).
//   - *Fresh*: a clean claim says in the label that nobody needs the new log, until just before its first acknowledgement. A
//     fresh pool is claimed clean, by the partner as if it had been handed over, and by its owner that lost its NVRAM.
//   - *Claim after the second look* raises the epoch on a majority with the mark Replaying. A crash after it
//     restarts in Reclaiming and replays the same mirror again: replay is idempotent, and the mirror stays
//     frozen until the mark is cleared.
//   - *Reserve, then look, then rewrite the label* when the own pool is taken up again after a restart: the
//     partner may be fencing at this very moment, or an earlier claim of ours may stand on a minority only.
//     RESERVE fails where the partner holds the reservation; the look after it sees a claim of the partner;
//     rewriting the label on a majority makes what we saw what everybody will see.
//   - A restarted controller whose label names it owner, but whose partner holds the reservation, waits: the
//     partner is between fence and claim, or died there. When the partner returns it gives the reservation
//     back (Standby begins with Release). An operator's takeover order ends the wait with a fence.
//   - *Handing over* drains everything to the members first and then writes "owner nobody", so no mirror is
//     needed by who comes next: either controller may claim such a pool, on an operator's order. A drain that takes
//     too long ends the attempt: the owner serves on, says so, and the other side decides as if it were silent. The
//     answer over the link is a hint that saves time; the label is what counts, and Asking looks at it too.
//   - *Drained, and the partner that asked is gone*: the label still says who owns, so that one starts over, as after a restart. handshake.go
//     tells how it knows.
//   - A claim that failed may still stand on a minority of members: the controller goes back to Starting and
//     looks, rather than to assume either outcome; the mirror stays frozen till a look says that the partner
//     owns.
//   - An owner that is fenced while it writes "owner nobody" has drained and closed everything before, so it
//     goes back to Starting and looks, like after a claim of unknown outcome. It is usual: the partner fences as
//     soon as a majority says nobody, and the last members' labels are still under way.
//   - Any other fenced owner ends its process (exit 3): nothing that is in its memory, and no command in flight, can
//     outlive the fence.

// Phase is where a controller stands.
type Phase uint8

const (
	Starting Phase = iota
	NoPool
	Forming
	Reclaiming
	Refused
	Standby
	Checking // standby, ordered to take over: first look
	Asking
	Fencing
	Rechecking
	Claiming
	Replaying
	Owner
	HandingOver
	Fenced
	Failed
	phases // count
)

var phaseNames = [phases]string{"starting", "no-pool", "forming", "reclaiming", "refused", "standby", "checking", "asking",
	"fencing", "rechecking", "claiming", "replaying", "owner", "handing-over", "fenced", "failed"}

func (p Phase) String() string {
	if p < phases {
		return phaseNames[p]
	}
	return fmt.Sprintf("phase(%d)", uint8(p))
}

// Role is the word for people and for GET /v1/status.
func (p Phase) Role() string {
	switch p {
	case NoPool, Forming:
		return "no-pool"
	case Standby, Checking, Asking, Refused:
		return "standby"
	case Fencing, Rechecking, Claiming, Replaying:
		return "taking-over"
	case Owner:
		return "owner"
	case HandingOver:
		return "handing-over"
	case Fenced, Failed:
		return "fenced"
	}
	return "starting"
}

// Serves tells whether commands of initiators may be answered from the pool in this phase.
func (p Phase) Serves() bool { return p == Owner }

// State is everything that Step depends on. It is comparable, so that the tests can enumerate it.
type State struct {
	Self  Controller
	Phase Phase
	// Seen is the newest look.
	Seen View
	// Reserved: RESERVE succeeded since we began to reclaim, so that the look under way is the second one.
	Reserved bool
	// Forced: the operator ordered a takeover of our own pool while the partner holds the reservation.
	Forced bool
	// Ordered: an operator's order waits for an answer.
	Ordered bool
	// Silent: the partner was fenced without having handed over, so its lease must run out before we serve.
	Silent bool
	// Asked: the partner was asked, or cannot be; do not ask again for this order.
	Asked bool
	// Clean: what we are about to claim was handed over, or never owned: there is nothing to replay. In HandingOver:
	// all is destaged and closed.
	Clean bool
	// Lose: the operator ordered to become owner even where acknowledged writes are lost by it.
	Lose bool
}

// Kind of an Event.
type Kind uint8

const (
	EvStart          Kind = iota
	EvTick                // time to look at the labels again, where a phase waits for them
	EvLooked              // answer of Look: View
	EvReserved            // answer of Reserve: Result
	EvFenced              // answer of Fence: Result
	EvClaimed             // answer of Claim and of Refresh: Result
	EvOpened              // answer of Open: Result
	EvCleared             // answer of Clear: Result
	EvFormed              // answer of Form: Result
	EvDrained             // answer of Drain: Result
	EvDisowned            // answer of Disown: Result
	EvLost                // a member answered RESERVATION CONFLICT, or a label of a newer epoch was seen
	EvBroken              // the log or the pool failed and acknowledges nothing more
	EvCreate              // the operator orders a new pool
	EvTakeover            // the operator orders a takeover; Connected tells whether the partner can be asked
	EvHandoverAsked       // the partner asks us to hand over
	EvHandedOver          // the partner says that it did
	EvHandoverDenied      // the partner says that it does not own the pool now
	EvTimeout             // the partner did not answer in time
	EvNothing             // answer of an action that cannot fail
	kinds
)

var kindNames = [kinds]string{"start", "tick", "looked", "reserved", "fenced", "claimed", "opened", "cleared", "formed", "drained",
	"disowned", "lost", "broken", "create", "takeover", "handover-asked", "handed-over", "handover-denied", "timeout", "nothing"}

func (k Kind) String() string { return kindNames[k] }

// Result of an action.
type Result uint8

const (
	OK Result = iota
	// Conflict: a member answered RESERVATION CONFLICT.
	Conflict
	// Unfit: the NVRAM does not carry the log that the label asks for (empty, foreign, or an old one).
	Unfit
	// Failure: anything else; the driver logs the error.
	Failure
	// Broken: what was open is closed, and not as it should be.
	Broken
	// Unwanted: all is destaged and closed, and who asked for it is gone.
	Unwanted
)

func (r Result) String() string {
	return [...]string{"ok", "conflict", "unfit", "failure", "broken", "unwanted"}[r]
}

// Event is what happened.
type Event struct {
	Kind      Kind
	View      View   // EvLooked
	Result    Result // answers
	Connected bool   // EvTakeover: the partner answers on the link
	Lose      bool   // EvTakeover: even where acknowledged writes are lost by it
}

// Op is an action for the driver.
type Op uint8

const (
	Look       Op = iota // read labels, reservations and the own mirror → EvLooked
	Wait                 // look again later: the next EvTick comes after a while
	Reserve              // register and reserve, preempting nobody → EvReserved
	Fence                // freeze the mirror, register, preempt every other key → EvFenced
	Release              // drop reservation and registration; errors are only logged
	Freeze               // the mirror accepts nothing more
	Thaw                 // the mirror accepts frames of the owner again
	Claim                // format the own log; label: epoch+1, owner me, that log, replaying unless Clean → EvClaimed
	Refresh              // label: rewritten as seen, on a majority → EvClaimed
	Open                 // open array, log and pool; replay the mirror too where Seen.Replaying → EvOpened
	Clear                // wait out the lease of a fenced partner; label: not replaying → EvCleared
	Form                 // reserve, create array, pool and labels (epoch 1, owner me) → EvFormed
	Serve                // open the gate; paths optimized
	Halt                 // shut the gate at once; no answer leaves after it
	Transition           // paths: transitioning
	Drain                // finish commands, destage everything, close → EvDrained
	Disown               // label: owner nobody → EvDisowned
	Follow               // be the standby: paths standby, the mirror takes frames
	Ask                  // ask the partner to hand over; EvTimeout follows if it is silent
	Answer               // tell the partner that we handed over
	Deny                 // tell the partner that we do not own the pool
	Done                 // the operator's order succeeded
	Refuse               // the operator's order is refused: Reason
	Exit                 // end the process: Code
)

var opNames = [...]string{"look", "wait", "reserve", "fence", "release", "freeze", "thaw", "claim", "refresh", "open", "clear", "form",
	"serve", "halt", "transition", "drain", "disown", "follow", "ask", "answer", "deny", "done", "refuse", "exit"}

func (o Op) String() string { return opNames[o] }

// Exit codes of shelfd that this machine asks for.
const (
	ExitFailed = 2
	ExitFenced = 3
)

// Action is what the driver must do.
type Action struct {
	Op     Op
	Reason string // Refuse
	Code   int    // Exit
}

func do(ops ...Op) []Action {
	a := make([]Action, len(ops))
	for i, o := range ops {
		a[i].Op = o
	}
	return a
}

func refuse(format string, args ...any) Action {
	return Action{Op: Refuse, Reason: fmt.Sprintf(format, args...)}
}

// Step is the whole of the decision. It never blocks, has no memory but s, and ignores what does not belong
// to the phase: late answers and repeated messages are normal.
func (s State) Step(e Event) (State, []Action) {
	// What ends a process comes first, whatever the phase.
	switch {
	case s.Phase == Fenced || s.Phase == Failed:
		return s, nil
	case e.Kind == EvLost && s.Phase == HandingOver && s.Clean:
		return s, nil // drained and closed: Disown's answer tells
	case e.Kind == EvLost && s.holdsPool():
		return s.fenced()
	case e.Kind == EvBroken && s.holdsPool():
		return s.failed()
	case e.Kind == EvHandoverAsked && s.Phase != Owner && s.Phase != HandingOver:
		return s, do(Deny)
	}
	switch s.Phase {
	case Starting:
		return s.starting(e)
	case NoPool:
		return s.noPool(e)
	case Forming:
		return s.forming(e)
	case Reclaiming:
		return s.reclaiming(e)
	case Refused:
		return s.refused(e)
	case Standby:
		return s.standby(e)
	case Checking:
		return s.checking(e)
	case Asking:
		return s.asking(e)
	case Fencing:
		return s.fencing(e)
	case Rechecking:
		return s.rechecking(e)
	case Claiming:
		return s.claiming(e)
	case Replaying:
		return s.replaying(e)
	case Owner:
		return s.owner(e)
	case HandingOver:
		return s.handingOver(e)
	}
	panic(fmt.Sprintf("ha: phase %d", s.Phase))
}

// holdsPool: the pool is open or being opened here, so that losing the reservation means to be fenced.
func (s State) holdsPool() bool {
	switch s.Phase {
	case Reclaiming, Replaying, Owner, HandingOver:
		return true
	}
	return false
}

func (s State) fenced() (State, []Action) {
	s.Phase = Fenced
	return s, []Action{{Op: Halt}, {Op: Exit, Code: ExitFenced}}
}

func (s State) failed() (State, []Action) {
	s.Phase = Failed
	return s, []Action{{Op: Halt}, {Op: Exit, Code: ExitFailed}}
}

// reset forgets what belonged to an attempt, and answers the operator who waits for it.
func (s State) reset(p Phase, reason string) (State, []Action) {
	var a []Action
	if s.Ordered {
		a = append(a, refuse("%s", reason))
	}
	return State{Self: s.Self, Phase: p, Seen: s.Seen}, a
}

// busy answers an operator's order that cannot be taken now.
func (s State) busy(e Event) (State, []Action) {
	if e.Kind == EvTakeover || e.Kind == EvCreate {
		return s, []Action{refuse("controller %s is %s; try again in a moment", s.Self, s.Phase)}
	}
	return s, nil
}
