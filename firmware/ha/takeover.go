package ha

// The way of ownership from one controller to the other: Standby, Checking, Asking, Fencing, Rechecking,
// Claiming, Replaying on the side that takes; Owner, HandingOver on the side that gives.

func (s State) standby(e Event) (State, []Action) {
	switch e.Kind {
	case EvTick:
		return s, do(Look)
	case EvLooked:
		v := e.View
		if v.Unreadable || v.Blank {
			return s, do(Wait)
		}
		s.Seen = v
		if v.Owner == s.Self {
			// An earlier claim of ours, seen again with members that had been away.
			return s.decide(v)
		}
		return s, do(Wait)
	case EvTakeover:
		s.Phase, s.Ordered, s.Asked, s.Lose = Checking, true, !e.Connected, e.Lose
		return s, do(Look)
	case EvCreate:
		return s, []Action{refuse("the members carry a pool already; controller %s owns it", s.Seen.Owner)}
	}
	return s, nil
}

// checking: the first look. It disturbs nobody.
func (s State) checking(e Event) (State, []Action) {
	if e.Kind != EvLooked {
		return s.busy(e)
	}
	v := e.View
	switch {
	case v.Unreadable || v.Blank:
		return s.back("fewer members than needed can be read")
	case v.Owner == s.Self:
		return s.decide(v)
	}
	s.Seen = v
	if v.Owner == None {
		s.Phase = Fencing
		return s, do(Fence)
	}
	if !s.Asked {
		// A living owner destages everything before it hands over, so a stale mirror does not matter.
		s.Phase, s.Asked = Asking, true
		return s, do(Ask, Wait)
	}
	if why := s.unfit(v); why != "" && !s.Lose {
		return s.back(why)
	}
	s.Phase = Fencing
	return s, do(Fence)
}

func (s State) asking(e Event) (State, []Action) {
	switch e.Kind {
	case EvHandedOver, EvHandoverDenied, EvTimeout:
		// Whatever it says, the members know: look again, and do not ask twice.
		s.Phase = Checking
		return s, do(Look)
	case EvTick:
		return s, do(Look)
	case EvLooked:
		// The message may be lost, the label is not.
		v := e.View
		if v.Unreadable || v.Blank || v.Owner != None {
			return s, do(Wait)
		}
		s.Seen, s.Phase = v, Fencing
		return s, do(Fence)
	}
	return s.busy(e)
}

func (s State) fencing(e Event) (State, []Action) {
	if e.Kind != EvFenced {
		return s.busy(e)
	}
	if e.Result != OK {
		return s.back("the members could not be fenced")
	}
	s.Phase = Rechecking
	return s, do(Look)
}

// rechecking: the second look. The partner can acknowledge nothing more; what does it say about before?
func (s State) rechecking(e Event) (State, []Action) {
	if e.Kind != EvLooked {
		return s.busy(e)
	}
	v, before := e.View, s.Seen
	switch {
	case v.Unreadable || v.Blank:
		return s.back("fewer members than needed can be read after the fence")
	case v.Owner == s.Self:
		return s.decide(v)
	case v.Owner == None:
		s.Seen, s.Phase, s.Clean = v, Claiming, true
		s.Silent = before.Owner != None
		return s, do(Claim)
	case v.Epoch != before.Epoch:
		s.Seen = v
		return s.back("the labels changed during the takeover")
	}
	s.Seen = v
	why := s.unfit(v)
	if why != "" && !s.Lose {
		return s.back(why)
	}
	// What is given up is not replayed in part either: a mirror that is not complete is older than what is on the members.
	s.Phase, s.Clean, s.Silent = Claiming, v.Fresh || why != "", true
	return s, do(Claim)
}

// unfit tells why this controller may not become owner in place of a silent partner; "" where it may.
func (s State) unfit(v View) string {
	switch {
	case v.Fresh:
		return "" // all is on the members
	case v.Solo:
		return staleReason(s.Self, v)
	case v.Replaying:
		return "controller " + v.Owner.String() + " had not finished its own takeover: only it has the log; start controller " + v.Owner.String() + " again" + giveUp(s.Self)
	case !v.Mirror:
		return "mirror is stale: controller " + s.Self.String() + "'s NVRAM does not hold a complete mirror of the owner's log; start controller " + v.Owner.String() + " again and wait for in-sync" + giveUp(s.Self)
	}
	return ""
}

func (s State) claiming(e Event) (State, []Action) {
	if e.Kind != EvClaimed {
		return s.busy(e)
	}
	if e.Result != OK {
		// It may stand on a minority: look, with the mirror still frozen.
		n, a := s.reset(Starting, "the label could not be written on a majority of the members")
		return n, append(a, do(Release, Look)...)
	}
	s.Seen.Epoch++
	s.Seen.Owner, s.Seen.Holder, s.Seen.Solo, s.Seen.SoloLSN = s.Self, s.Self, false, 0
	s.Seen.Replaying, s.Seen.Fresh = !s.Clean, s.Clean
	s.Phase = Replaying
	return s, do(Transition, Open)
}

func (s State) replaying(e Event) (State, []Action) {
	switch e.Kind {
	case EvOpened:
		switch e.Result {
		case OK:
			return s.opened()
		case Conflict:
			return s.fenced()
		}
		return s.failed()
	case EvCleared:
		return s.cleared(e.Result)
	}
	return s.busy(e)
}

func (s State) owner(e Event) (State, []Action) {
	switch e.Kind {
	case EvTakeover:
		return s, do(Done)
	case EvCreate:
		return s, []Action{refuse("this controller owns a pool already")}
	case EvHandoverAsked:
		s.Phase = HandingOver
		return s, do(Transition, Drain)
	}
	return s, nil
}

func (s State) handingOver(e Event) (State, []Action) {
	switch e.Kind {
	case EvDrained:
		switch e.Result {
		case OK:
			s.Clean = true
			return s, do(Disown)
		case Conflict:
			return s.fenced()
		case Failure:
			// It took too long, and the pool is still open: go on. The partner decides what to do without us.
			s.Phase = Owner
			return s, do(Serve, Deny)
		case Unwanted:
			n, a := s.reset(Starting, "the partner that asked for the pool is gone")
			return n, append(a, do(Look)...)
		}
		return s.failed()
	case EvDisowned:
		switch e.Result {
		case OK:
			n, a := s.reset(Standby, "the pool was handed over")
			n.Seen.Owner, n.Seen.Holder = None, None
			return n, append(a, do(Release, Answer, Thaw, Follow, Wait)...)
		case Conflict:
			// The partner saw the label on a majority and fenced us while the last members got it; or it lost
			// patience. Either way nothing is open here and all is on the members: who owns them is theirs to say.
			n, a := s.reset(Starting, "the partner fenced this controller while the pool was handed over")
			return n, append(a, do(Release, Answer, Look)...)
		}
		return s.failed()
	}
	return s.busy(e)
}

// back returns to Standby after a takeover that must not be.
func (s State) back(reason string) (State, []Action) {
	n, a := s.reset(Standby, reason)
	return n, append(a, do(Release, Thaw, Follow, Wait)...)
}
