package ha

import "testing"

// drive feeds events and returns what the last one asked for.
func drive(s State, events ...Event) (State, []Action) {
	var a []Action
	for _, e := range events {
		s, a = s.Step(e)
	}
	return s, a
}

func asks(a []Action, op Op) bool {
	for _, x := range a {
		if x.Op == op {
			return true
		}
	}
	return false
}

// A fresh pool is claimed without its log: by the partner of a silent owner, whatever its mirror has, and by an owner whose NVRAM
// lost the log. Either would otherwise wait for the other for ever. One that is not fresh is left alone.
func TestFresh(t *testing.T) {
	for _, fresh := range []bool{true, false} {
		v := View{Epoch: 3, Owner: A, Fresh: fresh}
		fenced := v
		fenced.Holder = B
		s, a := drive(State{Self: B, Phase: Standby, Seen: v}, Event{Kind: EvTakeover}, Event{Kind: EvLooked, View: v})
		if fresh != asks(a, Fence) || !fresh && !asks(a, Refuse) {
			t.Errorf("fresh %t: the partner looked, and does %v", fresh, a)
		}
		if fresh {
			if s, a = drive(s, Event{Kind: EvFenced}, Event{Kind: EvLooked, View: fenced}); !asks(a, Claim) || !s.Clean || !s.Silent {
				t.Errorf("the partner fenced a fresh pool, and does %v in %+v", a, s)
			}
			// In between the owner left the state: then its log counts.
			gone := fenced
			gone.Fresh, gone.Solo = false, true
			s, _ := drive(State{Self: B, Phase: Standby, Seen: v}, Event{Kind: EvTakeover}, Event{Kind: EvLooked, View: v}, Event{Kind: EvFenced})
			if _, a := s.Step(Event{Kind: EvLooked, View: gone}); asks(a, Claim) || !asks(a, Refuse) {
				t.Errorf("the owner went solo before the fence, and the partner does %v", a)
			}
		}
		mine := v
		mine.Holder = A
		s, a = drive(State{Self: A, Phase: Starting}, Event{Kind: EvLooked, View: v}, Event{Kind: EvReserved}, Event{Kind: EvLooked, View: mine}, Event{Kind: EvClaimed},
			Event{Kind: EvOpened, Result: Unfit})
		if fresh != asks(a, Claim) || fresh != s.Clean || fresh == (s.Phase == Refused) {
			t.Errorf("fresh %t: the owner lost its log, is %v and does %v", fresh, s.Phase, a)
		}
	}
}
