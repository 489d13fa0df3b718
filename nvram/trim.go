package nvram

// Trim tells that data-lane records with an LSN below are not needed: their blocks are on the members, flushed.
// It does not block; the room is free once the superblock says so. What is not acknowledged yet is kept.
func (l *Log) Trim(lsn uint64) { l.trimLane(laneData, lsn) }

// TrimUpdates is Trim for the lane of KindUpdate: the updates below are applied and flushed.
func (l *Log) TrimUpdates(lsn uint64) { l.trimLane(laneUpdate, lsn) }

func (l *Log) trimLane(lane int, lsn uint64) {
	l.mu.Lock()
	l.want[lane] = max(l.want[lane], lsn)
	l.mu.Unlock()
	l.poke(l.trim)
}

// trimmer writes the superblock. Trims that come while it does so share the next.
func (l *Log) trimmer() {
	for {
		select {
		case <-l.trim:
		case <-l.failed:
			return
		case <-l.stop:
			return
		}
		if err := l.writeTails(false); err != nil {
			l.mu.Lock()
			l.fail(err)
			l.mu.Unlock()
		}
	}
}

// writeTails makes the tails that Trim wants durable, then frees the room below. The mirror hears of a tail
// (Session.Next) before any frame that reuses the room. always: also when none moved, for the sake of acked.
func (l *Log) writeTails(always bool) error {
	l.mu.Lock()
	sb, moved := l.sb, false
	for i := range lanes {
		p := l.lane[i].at(min(l.want[i], l.acked))
		if p.LSN > sb.tail[i].LSN {
			sb.tail[i] = p
			moved = true
		}
		sb.ackedSeq[i] = l.lane[i].at(l.acked).Seq
	}
	sb.acked = l.acked
	l.mu.Unlock()
	if !moved && !always {
		return nil
	}
	buf := GetBuffer(1)
	defer buf.Put()
	if err := writeSuper(l.region, l.area, &sb, buf.b); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sb = sb
	for i := range lanes {
		l.lane[i].free(sb.tail[i])
	}
	l.changed.Broadcast()
	l.kick()
	return nil
}
