//go:build smallstore

package store

import "testing"

// Where few blocks are overwritten often, those that are not are kept apart: by the cleaner, which uses what is free among them (Store.decline), and when they
// are overwritten (aside.go). Without the second it would be 1.7 here, without both, the emptiest segments first, 2.5.
func TestCleaningAmplification(t *testing.T) {
	bed := cleaningBeds[1]
	written, moved, checkpoints := cleaning(t, 2048, bed.pick)
	t.Logf("%s: %.2f written, %.2f moved, %d checkpoints", bed.name, written, moved, checkpoints)
	if written > 1.6 {
		t.Errorf("%s: %.2f are written for each block that is overwritten", bed.name, written)
	}
}
