package nvram

import "sort"

// entry is a live record of a lane: from its allocation until a Trim that is durable.
type entry struct {
	lsn, off, seq uint64
	blocks        uint32
	// frame is what was or will be written; a pad's is one block.
	frameBlocks uint32
	run         uint64 // of what a scan found
	// rec is the record while it is in flight.
	rec *record
}

// lane is the space of one ring. Log.mu guards it.
type lane struct {
	start, size  uint64 // bytes
	head         Position
	used         uint64
	reserve      uint64
	live         []entry // by LSN; a prefix is dropped by free
	maxRecordBlk int
}

// place tells how many bytes a record of n takes, its pad included, and whether they are free.
func (ln *lane) place(n uint64, reserve bool) (pad uint64, ok bool) {
	if rest := ln.start + ln.size - ln.head.Off; n > rest {
		pad = rest
	}
	need := ln.used + n + pad
	if reserve {
		need += ln.reserve
	}
	return pad, need <= ln.size
}

// push allocates the next n bytes.
func (ln *lane) push(lsn, n uint64, frameBlocks uint32, rec *record) Position {
	p := Position{LSN: lsn, Off: ln.head.Off, Seq: ln.head.Seq}
	ln.live = append(ln.live, entry{lsn: lsn, off: p.Off, seq: p.Seq, blocks: uint32(n / BlockBytes), frameBlocks: frameBlocks, rec: rec})
	ln.used += n
	ln.head = Position{LSN: lsn + 1, Off: p.Off + n, Seq: p.Seq + 1}
	if ln.head.Off == ln.start+ln.size {
		ln.head.Off = ln.start
	}
	return p
}

// at is the lane's position at lsn: where its first record that is not below starts.
func (ln *lane) at(lsn uint64) Position {
	if i := ln.find(lsn); i < len(ln.live) {
		return Position{LSN: lsn, Off: ln.live[i].off, Seq: ln.live[i].seq}
	}
	return Position{LSN: lsn, Off: ln.head.Off, Seq: ln.head.Seq}
}

// find returns the index of the first live record that is not below lsn.
func (ln *lane) find(lsn uint64) int {
	return sort.Search(len(ln.live), func(i int) bool { return ln.live[i].lsn >= lsn })
}

// free drops the records below the position.
func (ln *lane) free(p Position) {
	n := 0
	for n < len(ln.live) && ln.live[n].seq < p.Seq {
		ln.used -= uint64(ln.live[n].blocks) * BlockBytes
		n++
	}
	if n > 0 {
		clear(ln.live[:n])
		ln.live = ln.live[n:]
	}
}
