package raid

import (
	"testing"
	"time"

	"github.com/ledge-storage/ledge/raid/layout"
)

func TestPercentile99(t *testing.T) {
	for _, c := range []struct {
		fast, slow int // reads of 100 µs and of 50 ms
		want       time.Duration
	}{
		{7, 0, 0}, {8, 0, 128 * time.Microsecond}, {1000, 10, 128 * time.Microsecond}, {1000, 11, 65536 * time.Microsecond},
		{0, 8, 65536 * time.Microsecond},
	} {
		var l latencies
		l[7].Store(uint32(c.fast))
		l[16].Store(uint32(c.slow))
		if got := l.percentile99(); got != c.want {
			t.Errorf("%d fast, %d slow: %v, want %v", c.fast, c.slow, got, c.want)
		}
	}
}

// beats lets each member answer n reads in the time given for it.
func beats(a *Array, n int, took ...time.Duration) {
	for range n {
		for i, d := range took {
			a.beat(a.members[i], d, 1)
		}
	}
}

func pulseArray(t *testing.T) *Array {
	lay, err := layout.New(6, 3, 2, 0)
	if err != nil {
		t.Fatal(err)
	}
	a, err := newArray(&Label{N: 6, K: 3, M: 2}, lay, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range a.members {
		a.members[i] = newMember(i, nil, 1)
	}
	return a
}

// Slow members do not make their own slowness the measure, as long as parity can stand for them; an array that is slow as a whole
// waits longer.
func TestLate(t *testing.T) {
	const fast, slow = 20 * time.Millisecond, 3 * time.Second
	for _, c := range []struct {
		name string
		took []time.Duration
		want time.Duration
	}{
		{"quick", []time.Duration{1, 1, 1, 1, 1, 1}, lateAtLeast},
		{"two slow", []time.Duration{fast, slow, fast, fast, slow, fast}, lateFactor * 32768 * time.Microsecond},
		{"three slow", []time.Duration{fast, slow, slow, fast, slow, fast}, lateFactor * 4194304 * time.Microsecond},
		{"too few", []time.Duration{fast, fast}, 1<<63 - 1},
	} {
		a := pulseArray(t)
		if a.pulse.bound() != 1<<63-1 {
			t.Errorf("late at %v before anything is known", a.pulse.bound())
		}
		beats(a, firstBeats/len(c.took)+1, c.took...)
		if got := a.pulse.bound(); got != c.want {
			t.Errorf("%s: late at %v, want %v", c.name, got, c.want)
		}
	}
}

// Hedges read at most an eighth of what is read without them, and what was saved.
func TestHedgeBudget(t *testing.T) {
	a := pulseArray(t)
	if a.pulse.spend(1) {
		t.Error("a hedge before any read")
	}
	for range 8 * 10 {
		a.beat(a.members[0], 1, 1)
	}
	if !a.pulse.spend(10) || a.pulse.spend(1) {
		t.Error("80 blocks do not pay for 10")
	}
	for range hedgeCredit {
		a.beat(a.members[0], 1, 33)
	}
	if n := a.pulse.credit.Load(); n < hedgeCredit || n > hedgeCredit+33 {
		t.Errorf("%d are saved", n)
	}
}
