package target

// Inline is implemented by a Device some or all of whose calls never wait for anything but a
// short lock: memory, in the main. An engine calls such a device from the goroutine that reads
// the connection, which saves two goroutine switches a command; every other device is called
// from a worker, so that a slow medium never stops the connection from being read.
type Inline interface {
	Device
	// NeverBlocks is asked for each command; it must itself be cheap.
	NeverBlocks() bool
}
