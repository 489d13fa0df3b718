// Package nvram is the controller's log of acknowledged writes: atomic sets of block writes,
// appended with group commit to a persistent region and, through a Replicator, to the partner's.
package nvram
