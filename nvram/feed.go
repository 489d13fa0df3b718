package nvram

// Replicator carries the log to the partner (nvram/mirror implements it, tests have their own). It pulls:
// Open calls Attach once, the replicator reads records from the Feed at its own pace, and tells what
// became durable there. Detach returns when it will not touch the feed any more.
type Replicator interface {
	Attach(f *Feed)
	Detach()
}

// Feed is the log as its Replicator sees it.
type Feed struct {
	_ byte
}
