package layout

import (
	"fmt"
	"testing"
)

var geometries = []struct{ n, k, m, spares int }{{12, 8, 2, 2}, {12, 8, 2, 0}, {10, 8, 2, 0}, {24, 8, 2, 2}, {5, 2, 1, 1}, {3, 1, 1, 0},
	{7, 4, 2, 1}, {14, 8, 3, 1}, {23, 10, 3, 3}, {36, 32, 4, 0}, {64, 32, 4, 8}, {64, 8, 2, 4}, {37, 5, 1, 2}}

// Every strip has a place of its own, no two of a stripe on one member; Locate is the inverse; the rest is spare space.
func TestBijection(t *testing.T) {
	for _, g := range geometries {
		t.Run(fmt.Sprint(g), func(t *testing.T) {
			l, err := New(g.n, g.k, g.m, g.spares)
			if err != nil {
				t.Fatal(err)
			}
			slots := l.Slots(uint64(3*g.n) * l.groupRows)
			used := make(map[[2]uint64]bool)
			for s := range l.Stripes(slots) {
				var members uint64
				for i := range l.Width() {
					m, slot := l.Strip(s, i)
					at := [2]uint64{uint64(m), slot}
					if slot >= slots || m >= g.n || used[at] || members>>m&1 != 0 {
						t.Fatalf("stripe %d strip %d at %v", s, i, at)
					}
					used[at] = true
					members |= 1 << m
					if s2, i2 := l.Locate(m, slot); s2 != s || i2 != i {
						t.Fatalf("stripe %d strip %d located as %d %d", s, i, s2, i2)
					}
				}
			}
			for slot := range slots {
				for j := range g.spares {
					m := l.Spare(slot, j)
					at := [2]uint64{uint64(m), slot}
					if used[at] {
						t.Fatalf("spare %d of slot %d is used", j, slot)
					}
					used[at] = true
					if s, i := l.Locate(m, slot); s != uint64(j) || i != -1 {
						t.Fatalf("spare %d of slot %d located as %d %d", j, slot, s, i)
					}
				}
			}
			if len(used) != g.n*int(slots) {
				t.Fatalf("%d of %d places used", len(used), g.n*int(slots))
			}
		})
	}
}

// Over one cycle every member carries each strip index, and each spare column, exactly equally often; and when a member
// fails, no other member reads or writes more than 5 % above the mean for its rebuild to spare space.
func TestBalance(t *testing.T) {
	for _, g := range geometries {
		t.Run(fmt.Sprint(g), func(t *testing.T) {
			l, err := New(g.n, g.k, g.m, g.spares)
			if err != nil {
				t.Fatal(err)
			}
			// Develop by rotation: n groups carry every column on every member once; so any n groups do for exactness.
			counts := make(map[[2]int]int)
			n := uint64(g.n) * l.groupStripes
			for s := range n {
				for i := range l.Width() {
					m, _ := l.Strip(s, i)
					counts[[2]int{m, i}]++
				}
			}
			for m := range g.n {
				for i := range l.Width() {
					if c := counts[[2]int{m, i}]; c != int(l.groupStripes) {
						t.Fatalf("member %d is strip %d %d times of %d", m, i, c, l.groupStripes)
					}
				}
			}
			const failed = 1
			reads, writes := make([]int, g.n), make([]int, g.n)
			for s := range l.CycleStripes() {
				hit, slot := false, uint64(0)
				for i := range l.Width() {
					if m, at := l.Strip(s, i); m == failed {
						hit, slot = true, at
					}
				}
				if !hit {
					continue
				}
				for i := range l.Width() {
					m, _ := l.Strip(s, i)
					reads[m]++
				}
				if g.spares > 0 {
					writes[l.Spare(slot, 0)]++
				}
			}
			check := func(what string, load []int) {
				sum, most := 0, 0
				for m, c := range load {
					if m != failed {
						sum += c
						most = max(most, c)
					}
				}
				mean := float64(sum) / float64(g.n-1)
				if sum > 0 && float64(most) > 1.05*mean {
					t.Errorf("%s: a member does %d, the mean is %.0f", what, most, mean)
				}
				t.Logf("%s: worst member %.3f of the mean", what, float64(most)/mean)
			}
			check("reads", reads)
			if g.spares > 0 {
				check("writes", writes)
			}
		})
	}
}

func TestLimits(t *testing.T) {
	for _, g := range []struct{ n, k, m, spares int }{{65, 8, 2, 0}, {9, 8, 2, 0}, {40, 33, 2, 0}, {10, 4, 5, 0}, {10, 4, 0, 0}, {4, 0, 2, 0}, {11, 8, 2, 2}, {30, 4, 2, 9}} {
		if _, err := New(g.n, g.k, g.m, g.spares); err == nil {
			t.Errorf("%v accepted", g)
		}
	}
}

// The arrangement is on the media: it must never change.
func TestFrozen(t *testing.T) {
	l, err := New(12, 8, 2, 2)
	if err != nil {
		t.Fatal(err)
	}
	h := uint64(14695981039346656037)
	for s := range uint64(12 * 40) {
		for i := range 10 {
			m, slot := l.Strip(s*7, i)
			h = (h ^ uint64(m)) * 1099511628211
			h = (h ^ slot) * 1099511628211
		}
	}
	if h != frozen {
		t.Fatalf("the arrangement changed: %#x", h)
	}
}

func BenchmarkStrip(b *testing.B) {
	l, err := New(64, 8, 2, 2)
	if err != nil {
		b.Fatal(err)
	}
	for i := range b.N {
		l.Strip(uint64(i), i%10)
	}
}

// frozen is what version 1 of the label means.
const frozen = 0x99881b72b4fbba3a
