package nvram

// Stats of a log.
type Stats struct {
	// Bytes and Used of the data lane; Reserve is the part that hosts may not use.
	Bytes, Used, Reserve int64
	// UpdateBytes and UpdateUsed of the lane of KindUpdate.
	UpdateBytes, UpdateUsed int64
	// Tail is the oldest LSN that the data lane keeps, Next the one that the next record gets; all below Acked
	// are acknowledged; all below Mirrored are durable at the partner (0: not known).
	Tail, Next, Acked, Mirrored uint64
	// Mirror is one of the Mirror* constants.
	Mirror MirrorStatus
	// Records, Sets and PayloadBytes appended since Open.
	Records, Sets, PayloadBytes uint64
	// Waiting Appends: for room, for a place in a record, for durability.
	Waiting int
}

// MirrorStatus is how the log stands to its mirror.
type MirrorStatus string

const (
	MirrorInSync  MirrorStatus = "in-sync" // every acknowledged write is in the mirror, and new ones go there first
	MirrorWaiting MirrorStatus = "waiting" // the partner is away, and nothing was acknowledged without it
	MirrorResync  MirrorStatus = "resync"  // the partner is connected and is being brought current
	MirrorSolo    MirrorStatus = "solo"    // solo is recorded, the partner is away
	MirrorFailed  MirrorStatus = "failed"  // the log failed: see Log.Err
)

// Stats are a snapshot.
func (l *Log) Stats() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.stats
	d, u := &l.lane[laneData], &l.lane[laneUpdate]
	s.Bytes, s.Used, s.Reserve = int64(d.size), int64(d.used), int64(d.reserve)
	s.UpdateBytes, s.UpdateUsed = int64(u.size), int64(u.used)
	s.Tail, s.Next, s.Acked = l.sb.tail[laneData].LSN, l.next, l.acked
	s.Mirrored = l.partner.mirrored
	s.Mirror = l.status()
	return s
}
