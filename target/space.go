package target

// Space is what a thin unit uses and can still get, in bytes.
type Space struct {
	// UsedBytes are allocated to the unit; AvailableBytes is what it could still allocate.
	UsedBytes, AvailableBytes uint64
	// Shared says that other units allocate from the same pool.
	Shared bool
	// ThresholdBytes is the availability below which initiators are warned; zero: never.
	ThresholdBytes uint64
}

// Provisioned is implemented by a thin Device that knows its pool. An engine shows the figures to
// initiators and warns them when the threshold is crossed.
type Provisioned interface {
	Device
	// Space is asked after each command that writes; it must itself be cheap.
	Space() Space
}
