package cache

import (
	"fmt"
	"math/bits"
)

const (
	minRegionBytes = 1 << 20
	maxRegionBytes = 32 << 20
	leastRegion    = 64 << 10 // that a head may tell of; tests use it
	groupRegions   = 256      // their tables fill minRegionBytes
	minRegions     = 4
	maxBytes       = 16 << 40 // what 28 bits of a slot's number reach
)

// layout of a medium: where its regions, tables and slots are. See the package comment.
type layout struct {
	regionBytes int64
	lineBytes   int
	slotBytes   int    // of a line with its checksums
	perRegion   uint32 // slots
	perGroup    uint32 // regions, whose tables come first
	regions     uint32
}

// idealRegion is the length of regions for a medium: 1/8192 of it, a power of 2, so that the
// buffers stay small beside a small cache and the tables small beside a large one.
func idealRegion(size int64) uint32 {
	return uint32(min(max(1<<bits.Len64(uint64(size/8192)), minRegionBytes), maxRegionBytes))
}

func layoutOf(h *head, size int64) (l layout, err error) {
	l = layout{regionBytes: int64(h.regionBytes), lineBytes: int(h.lineBytes)}
	l.slotBytes = (l.lineBytes + payloadBytes - 1) / payloadBytes * blockBytes
	l.perRegion = uint32(min(l.regionBytes/int64(l.slotBytes), maxEntries))
	l.perGroup = min(groupRegions, h.regionBytes/blockBytes)
	units := size/l.regionBytes - 1
	groups, rest := units/int64(l.perGroup+1), units%int64(l.perGroup+1)
	l.regions = uint32(min(groups*int64(l.perGroup)+max(0, rest-1), slotMask/int64(l.perRegion)))
	if l.regions < minRegions {
		return l, fmt.Errorf("cache: %d bytes; at least %d are needed: %w", size, (minRegions+2)*l.regionBytes, ErrSize)
	}
	return l, nil
}

func (l *layout) groupAt(region uint32) int64 {
	return l.regionBytes * (1 + int64(region/l.perGroup)*int64(l.perGroup+1))
}

func (l *layout) tableAt(region uint32) int64 {
	return l.groupAt(region) + int64(region%l.perGroup)*blockBytes
}

func (l *layout) regionAt(region uint32) int64 {
	return l.groupAt(region) + l.regionBytes*(1+int64(region%l.perGroup))
}

func (l *layout) slotAt(slot uint32) int64 {
	return l.regionAt(slot/l.perRegion) + int64(slot%l.perRegion)*int64(l.slotBytes)
}

func (l *layout) slots() uint32     { return l.regions * l.perRegion }
func (l *layout) endBytes() int64   { return l.regionAt(l.regions-1) + l.regionBytes }
func (l *layout) linesBytes() int64 { return int64(l.slots()) * int64(l.lineBytes) }
func (l *layout) bufferBytes() int  { return int(l.perRegion) * l.slotBytes }
func (l *layout) blocksOf(at, n int) (first, count int) {
	first = at / payloadBytes
	return first, (at+n-1)/payloadBytes - first + 1
}
