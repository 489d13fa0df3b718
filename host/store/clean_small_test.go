//go:build smallstore

package store

import "testing"

// Where few blocks are overwritten often, those that are not are kept apart, and what is free among them is used (Store.decline); so they are when they are overwritten (aside.go). Without either: 2.5; without the second: 1.7. The
// emptiest segments first would be 2.5 here, this is 1.7.
func TestCleaningAmplification(t *testing.T) {
	bed := cleaningBeds[1]
	written, moved, checkpoints := cleaning(t, 2048, bed.pick)
	t.Logf("%s: %.2f written, %.2f moved, %d checkpoints", bed.name, written, moved, checkpoints)
	if written > 2.1 {
		t.Errorf("%s: %.2f are written for each block that is overwritten", bed.name, written)
	}
}
