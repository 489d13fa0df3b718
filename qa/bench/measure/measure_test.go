package measure

import (
	"math"
	"slices"
	"testing"
)

func TestSpread(t *testing.T) {
	for _, c := range []struct {
		values []float64
		want   Spread
	}{
		{nil, Spread{}},
		{[]float64{3}, Spread{3, 3, 3}},
		{[]float64{9, 1, 2}, Spread{2, 1, 9}},
		{[]float64{4, 1, 2, 9}, Spread{3, 1, 9}},
	} {
		before := slices.Clone(c.values)
		if got := SpreadOf(c.values); got != c.want {
			t.Errorf("spread(%v) = %v, want %v", c.values, got, c.want)
		}
		if !slices.Equal(before, c.values) {
			t.Errorf("spread changed its argument to %v: rounds would lose their order", c.values)
		}
	}
}

func TestParseStat(t *testing.T) {
	m := parseStat("cpu  100 20 300 4000 50 6 70 8 9 10\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
	if math.Abs(m.Busy-4.96) > 1e-9 || math.Abs(m.Steal-.08) > 1e-9 {
		t.Errorf("busy %v, steal %v; want 4.96 (without idle, iowait, steal and guests) and 0.08", m.Busy, m.Steal)
	}
	if m := parseStat(""); m != (Machine{}) {
		t.Errorf("of nothing: %v", m)
	}
}
