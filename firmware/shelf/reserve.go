package shelf

// The last free extents are not for everybody. A host's agent frees space by writing: what it deletes is freed only when a
// checkpoint without it is durable (host/store), and that checkpoint, and the segments before it, need extents. In a pool
// that plain LUNs have filled to the last extent, nothing could be freed any more. So plain LUNs get ErrNoSpace when
// reserveExtents are left, and only journal and store LUNs get those.
//
// What an agent stores counts against the same reserve: one that goes on writing data in a full pool can use it up.

const (
	reservePercent = 1
	reserveLeast   = 2
	reserveMost    = 512 // 4 GiB
	// A pool so small that reserveLeast would be more than this part of it keeps this part.
	reservePart = 8
)

// reserveExtents is the reserve of a pool.
func reserveExtents(extents int) int {
	n := min(max(extents*reservePercent/100, reserveLeast), reserveMost)
	return min(n, extents/reservePart)
}

// keepFrom is how many free extents a LUN must leave. Called with mu held.
func (p *Pool) keepFrom(lun uint32) int {
	if l := p.luns[lun]; l != nil && l.rec.Kind != KindPlain {
		return 0
	}
	return reserveExtents(p.sb.capacity())
}
