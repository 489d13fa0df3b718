package layout

import (
	"fmt"
	"testing"
)

// Over every geometry: no step writes where something lies that counts, each stripe is where Done and Staged say,
// the ring is never overrun, and the reshape ends.
func TestReshape(t *testing.T) {
	ran := 0
	for _, g := range reshapes() {
		old, err := New(g.n, g.k, g.m, g.spares)
		if err != nil {
			t.Fatal(err)
		}
		wide, err := New(g.n+g.more, g.k, g.m, g.spares)
		if err != nil {
			t.Fatal(err)
		}
		// So many that the last steps are direct ones.
		c, w := uint64(old.columns), uint64(old.width)
		stripes := 3*c*uint64(wide.columns)/(w*uint64(g.more)) + 40
		for _, most := range []uint64{1, 32, 1 << 20} {
			if err := checkReshape(old, wide, stripes, most); err != nil {
				t.Fatalf("%v, steps of %d: %v", g, most, err)
			}
			ran++
		}
	}
	t.Logf("%d reshapes", ran)
}

type growth struct{ n, k, m, spares, more int }

func reshapes() (out []growth) {
	for _, g := range geometries {
		for _, more := range []int{1, 2, 3, 7, MaxMembers - g.n} {
			if more > 0 && g.n+more <= MaxMembers {
				out = append(out, growth{g.n, g.k, g.m, g.spares, more})
			}
		}
	}
	for n := 3; n < 16; n++ {
		for k := 1; k < n; k++ {
			for m := 1; m <= MaxParity && k+m <= n; m++ {
				for spares := 0; spares <= 2 && k+m+spares <= n; spares++ {
					for _, more := range []int{1, 3} {
						out = append(out, growth{n, k, m, spares, more})
					}
				}
			}
		}
	}
	return out
}

// at is a slot of a member; in the ring, slot numbers are negative.
type at struct {
	member int
	slot   int64
}

// checkReshape keeps for every place the stripe whose strip lies there, and writes as the steps say.
func checkReshape(old, wide *Layout, stripes, most uint64) error {
	r, err := NewReshape(old, wide, stripes)
	if err != nil {
		return err
	}
	const where = 3
	places := func(a Action, stripe uint64) (out []at) {
		for i := range old.Width() {
			switch a {
			case Stage:
				m, s := r.Staged(stripe, i)
				if s >= StageSlots {
					return nil
				}
				out = append(out, at{m, -1 - int64(s)})
			case where:
				m, s := old.Strip(stripe, i)
				out = append(out, at{m, int64(s)})
			default:
				m, s := wide.Strip(stripe, i)
				out = append(out, at{m, int64(s)})
			}
		}
		return out
	}
	holds := make(map[at]uint64)
	now := make([][]at, stripes)
	for s := range stripes {
		now[s] = places(where, s)
		for _, p := range now[s] {
			holds[p] = s + 1
		}
	}
	var done, staged uint64
	for n := 0; ; n++ {
		step, ok := r.Next(done, staged, most)
		if !ok {
			break
		}
		if step.To <= step.From || step.To-step.From > most {
			return fmt.Errorf("at %d, %d: step %+v goes nowhere", done, staged, step)
		}
		type move struct {
			stripe uint64
			to     []at
		}
		var moves []move
		for s := step.From; s < step.To; s++ {
			to := places(step.Action, s)
			if len(to) != old.Width() {
				return fmt.Errorf("stripe %d staged outside the ring", s)
			}
			members := uint64(0)
			for _, p := range to {
				if holder := holds[p]; holder != 0 {
					return fmt.Errorf("at %d, %d: %+v writes stripe %d over stripe %d", done, staged, step, s, holder-1)
				}
				if members>>p.member&1 != 0 {
					return fmt.Errorf("stripe %d has two strips on member %d", s, p.member)
				}
				members |= 1 << p.member
			}
			moves = append(moves, move{s, to})
		}
		// No row that is written holds anything that counts, its spare columns included.
		if step.Action != Stage {
			first := r.Stripes
			if step.Action == Direct {
				first = step.From
			} else {
				first = staged
			}
			_, last := wide.Strip(step.To-1, wide.Width()-1)
			if first < r.Stripes && last >= old.firstRow(first) {
				return fmt.Errorf("at %d, %d: %+v writes row %d, where old stripe %d begins", done, staged, step, last, first)
			}
		}
		for _, m := range moves {
			for _, p := range now[m.stripe] {
				delete(holds, p)
			}
			now[m.stripe] = m.to
		}
		for _, m := range moves {
			for _, p := range m.to {
				if holds[p] != 0 {
					return fmt.Errorf("%+v writes a place twice", step)
				}
				holds[p] = m.stripe + 1
			}
		}
		switch step.Action {
		case Stage:
			staged = step.To
		case Unstage:
			done = step.To
		case Direct:
			done, staged = step.To, step.To
		}
		if staged-done > r.Ring() {
			return fmt.Errorf("%d stripes staged, the ring has %d", staged-done, r.Ring())
		}
	}
	if done != stripes || staged != stripes {
		return fmt.Errorf("ended at %d, %d of %d", done, staged, stripes)
	}
	for s := range stripes {
		for i, p := range places(Direct, s) {
			if now[s][i] != p {
				return fmt.Errorf("stripe %d ended at %v", s, now[s])
			}
		}
	}
	return nil
}
