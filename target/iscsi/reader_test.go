package iscsi

import (
	"sync/atomic"
	"testing"
	"time"
)

// TestSpinner: never more spinners at a time than are allowed, rare spins after many misses, and spins
// again after the first hit.
func TestSpinner(t *testing.T) {
	var running atomic.Int32
	spin := func() spinner { return spinner{limit: time.Nanosecond, running: &running, most: 1} }
	a, b := spin(), spin()
	if !a.begin() || b.begin() {
		t.Error("one may spin, and one only")
	}
	a.end(true)
	if !b.begin() {
		t.Error("nobody spins, and none may")
	}
	b.end(false)
	const waits = 10000
	spins := 0
	for range waits {
		if a.begin() {
			spins++
			a.end(false)
		}
	}
	if most := maxMisses + 6 + waits/maxSpinSkip; spins > most {
		t.Errorf("%d of %d waits for a slow initiator spin, more than %d", spins, waits, most)
	}
	for !a.begin() {
	}
	a.end(true)
	for range maxMisses - 1 {
		if !a.begin() {
			t.Fatal("a hit is forgotten before there were many misses")
		}
		a.end(false)
	}
	if running.Load() != 0 {
		t.Errorf("%d spin", running.Load())
	}
	off := spinner{running: &running, most: 1}
	if off.begin() {
		t.Error("spins although it is off")
	}
}
