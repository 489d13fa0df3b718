package agent

import (
	"golang.org/x/sys/unix"

	"github.com/ledge-storage/ledge/host/store"
)

// The memory of the dedup index where the configuration does not say: what finds all blocks of the first TB of flash, and for each TB more a
// quarter of that, so that the agent keeps to 7.5 GB for the first TB and 1 GB for each more (P7); of what is stored beyond that it keeps a
// sample. 64 MiB at least, an eighth of the machine's memory at most.
const (
	indexEntry  = 8
	sampledPart = 4
	tb          = 1e12
)

func indexBytes(c *Config) int64 {
	if c.IndexBytes > 0 {
		return c.IndexBytes
	}
	var m unix.Sysinfo_t
	memory := int64(0)
	if unix.Sysinfo(&m) == nil { // it has no other errors than a bad pointer
		memory = int64(m.Totalram) * int64(m.Unit)
	}
	return defaultIndex(c.CacheBytes, memory)
}

func defaultIndex(flash, memory int64) int64 {
	first := min(flash, tb)
	n := (first + (flash-first)/sampledPart) / store.BlockBytes * indexEntry
	return max(64*mib, min(n, memory/8, mostIndex))
}
