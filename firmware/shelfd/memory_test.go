package main

import "testing"

func TestBoundSums(t *testing.T) {
	for memory, want := range map[uint64]int{0: 64 << 20, 1 << 30: 64 << 20, 4 << 30: 128 << 20, 8 << 30: 256 << 20, 1 << 40: 256 << 20} {
		if got := boundSums(memory); got != want {
			t.Errorf("of %d bytes of memory: %d, want %d", memory, got, want)
		}
	}
	if n := sumBytes(); n < leastSums || n > mostSums {
		t.Errorf("here: %d", n)
	}
}
