package ha

// The way from start to a standing role: Starting, NoPool, Forming, Reclaiming, Refused.

func (s State) starting(e Event) (State, []Action) {
	switch e.Kind {
	case EvStart, EvTick:
		return s, do(Look)
	case EvLooked:
		return s.decide(e.View)
	case EvTakeover:
		// Our own pool, but the partner holds the reservation and does not come back: the operator decides.
		if s.Seen.Owner != s.Self || s.Seen.Holder != s.Self.Partner() {
			return s.busy(e)
		}
		if e.Connected {
			return s, []Action{refuse("the pool is ours, but partner %s is alive and holds the reservation: it is in the middle of a takeover", s.Self.Partner())}
		}
		s.Forced, s.Ordered, s.Lose = true, true, e.Lose
		return s, do(Look)
	}
	return s.busy(e)
}

// decide takes up the role that the labels give.
func (s State) decide(v View) (State, []Action) {
	s.Seen = v
	switch {
	case v.Unreadable:
		n, a := s.reset(Starting, "fewer members than needed can be read")
		return n, append(a, do(Wait)...)
	case v.Blank:
		n, a := s.reset(NoPool, "the members carry no pool")
		return n, append(a, do(Thaw, Wait)...)
	case v.Owner == s.Self && v.Holder == s.Self.Partner() && !s.Forced:
		return s, do(Wait)
	case v.Owner == s.Self && v.Holder == s.Self.Partner():
		s.Phase, s.Reserved = Reclaiming, false
		return s, do(Fence)
	case v.Owner == s.Self:
		s.Phase, s.Reserved = Reclaiming, false
		return s, do(Freeze, Reserve)
	}
	n, a := s.reset(Standby, "controller "+v.Owner.String()+" owns the pool")
	return n, append(a, do(Release, Thaw, Follow, Wait)...)
}

func (s State) noPool(e Event) (State, []Action) {
	switch e.Kind {
	case EvTick:
		return s, do(Look)
	case EvLooked:
		s.Seen = e.View
		if e.View.Blank || e.View.Unreadable {
			return s, do(Wait)
		}
		return s.decide(e.View)
	case EvCreate:
		s.Phase, s.Ordered = Forming, true
		return s, do(Freeze, Form)
	case EvTakeover:
		return s, []Action{refuse("there is no pool to take over: the members are blank")}
	}
	return s, nil
}

func (s State) forming(e Event) (State, []Action) {
	if e.Kind != EvFormed {
		return s.busy(e)
	}
	switch e.Result {
	case OK:
		// The label of a new pool is like that of a handed over one: epoch 1, ours, nothing to replay.
		s.Phase, s.Seen = Replaying, View{Epoch: 1, Owner: s.Self, Fresh: true, Holder: s.Self}
		s.Clean = true
		return s, do(Open)
	case Conflict:
		n, a := s.reset(NoPool, "the partner holds a reservation on the members: it is creating a pool itself")
		return n, append(a, do(Release, Thaw, Wait)...)
	}
	n, a := s.reset(NoPool, "the pool could not be created")
	return n, append(a, do(Release, Thaw, Wait)...)
}

func (s State) reclaiming(e Event) (State, []Action) {
	switch e.Kind {
	case EvReserved, EvFenced:
		if s.Reserved {
			return s, nil
		}
		if e.Result != OK {
			n, a := s.reset(Starting, "the members could not be reserved")
			return n, append(a, do(Release, Wait)...)
		}
		s.Reserved = true
		return s, do(Look)
	case EvLooked:
		v := e.View
		if v.Unreadable || v.Blank || v.Owner != s.Self || v.Epoch < s.Seen.Epoch {
			s.Seen = v
			n, a := s.reset(Starting, "the labels changed meanwhile")
			return n, append(a, do(Release, Look)...)
		}
		s.Seen = v
		return s, do(Refresh)
	case EvClaimed:
		switch e.Result {
		case OK:
			return s, do(Open)
		case Conflict:
			return s.fenced()
		}
		return s.failed()
	case EvOpened:
		switch e.Result {
		case OK:
			return s.opened()
		case Conflict:
			return s.fenced()
		case Unfit:
			if s.Seen.Fresh || s.Lose {
				// The log is lost, and nothing is missing without it, or it is given up: begin another.
				s.Phase, s.Clean, s.Silent = Claiming, true, true
				return s, do(Claim)
			}
			n, a := s.reset(Refused, "this controller's NVRAM does not hold the pool's log")
			return n, append(a, do(Release, Wait)...)
		}
		return s.failed()
	case EvCleared:
		return s.cleared(e.Result)
	}
	return s.busy(e)
}

// refused: the label names us owner, but our NVRAM lacks the log. A takeover by the partner helps, so we
// hold no reservation, and look whether it came; or the operator gives up what only the log had. A partner that is there is the
// one to order that of: it loses nothing where it has the mirror.
func (s State) refused(e Event) (State, []Action) {
	switch e.Kind {
	case EvTick:
		return s, do(Look)
	case EvLooked:
		s.Seen = e.View
		if !e.View.Unreadable && !e.View.Blank && e.View.Owner != s.Self {
			return s.decide(e.View)
		}
		return s, do(Wait)
	case EvTakeover:
		if e.Lose && !e.Connected {
			s.Phase, s.Ordered, s.Lose, s.Reserved = Reclaiming, true, true, false
			return s, do(Freeze, Reserve)
		}
		return s, []Action{refuse("this controller's NVRAM does not hold the pool's log; order the takeover on controller %s; if that one is gone for good, 'ledge shelf takeover %s --lose-writes' here gives up what only the lost log had",
			s.Self.Partner(), s.Self)}
	case EvCreate:
		return s, []Action{refuse("the members carry a pool")}
	}
	return s, nil
}

// opened goes on to serve, or first clears the mark that says that the partner's log is not destaged yet. Who starts on a fresh label
// may have ended between its claim over a silent partner and the end of that one's lease.
func (s State) opened() (State, []Action) {
	if s.Seen.Replaying || s.Silent || s.Seen.Fresh && !s.Clean {
		return s, do(Clear)
	}
	return s.serve()
}

func (s State) cleared(r Result) (State, []Action) {
	switch r {
	case OK:
		s.Seen.Replaying = false
		return s.serve()
	case Conflict:
		return s.fenced()
	}
	return s.failed()
}

func (s State) serve() (State, []Action) {
	n := State{Self: s.Self, Phase: Owner, Seen: s.Seen}
	n.Seen.Holder = s.Self
	if s.Ordered {
		return n, do(Serve, Done)
	}
	return n, do(Serve)
}
