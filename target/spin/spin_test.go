package spin

import (
	"sync/atomic"
	"testing"
	"time"
)

// TestSpinner: never more spinners at a time than are allowed, rare spins after many misses, and spins
// again after the first hit.
func TestSpinner(t *testing.T) {
	var running atomic.Int32
	spin := func() Spinner { return Spinner{limit: time.Nanosecond, running: &running, most: 1} }
	a, b := spin(), spin()
	if !a.Begin() || b.Begin() {
		t.Error("one may spin, and one only")
	}
	a.End(true)
	if !b.Begin() {
		t.Error("nobody spins, and none may")
	}
	b.End(false)
	const waits = 10000
	spins := 0
	for range waits {
		if a.Begin() {
			spins++
			a.End(false)
		}
	}
	if most := maxMisses + 6 + waits/maxSkip; spins > most {
		t.Errorf("%d of %d waits for a slow initiator spin, more than %d", spins, waits, most)
	}
	for !a.Begin() {
	}
	a.End(true)
	for range maxMisses - 1 {
		if !a.Begin() {
			t.Fatal("a hit is forgotten before there were many misses")
		}
		a.End(false)
	}
	if running.Load() != 0 {
		t.Errorf("%d spin", running.Load())
	}
	off := Spinner{running: &running, most: 1}
	if off.Begin() {
		t.Error("spins although it is off")
	}
}
