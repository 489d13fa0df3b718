package shelf

import "sort"

// lsnRefs counts, for each LSN, what still needs its record: blocks of the overlay whose newest copy it
// holds, changes of the extent table that are not on the members. The lowest is where Trim must stop.
// Guarded by Pool.mu.
type lsnRefs struct {
	q []lsnRef // rising; entries before head are gone
	// head is the first entry that is needed.
	head int
}

type lsnRef struct {
	lsn uint64
	n   int
}

func (r *lsnRefs) find(lsn uint64) int {
	live := r.q[r.head:]
	if n := len(live); n == 0 || live[n-1].lsn < lsn {
		return len(r.q)
	}
	return r.head + sort.Search(len(live), func(i int) bool { return live[i].lsn >= lsn })
}

func (r *lsnRefs) add(lsn uint64, n int) {
	i := r.find(lsn)
	if i < len(r.q) && r.q[i].lsn == lsn {
		r.q[i].n += n
		return
	}
	r.q = append(r.q, lsnRef{})
	copy(r.q[i+1:], r.q[i:])
	r.q[i] = lsnRef{lsn, n}
}

func (r *lsnRefs) drop(lsn uint64) {
	i := r.find(lsn)
	if i == len(r.q) || r.q[i].lsn != lsn || r.q[i].n == 0 {
		panic("shelf: an LSN is released that nothing holds")
	}
	r.q[i].n--
	for r.head < len(r.q) && r.q[r.head].n == 0 {
		r.head++
	}
	if r.head > 1024 && r.head > len(r.q)/2 {
		r.q = append(r.q[:0], r.q[r.head:]...)
		r.head = 0
	}
}

// first is the lowest LSN that is needed.
func (r *lsnRefs) first() (uint64, bool) {
	if r.head == len(r.q) {
		return 0, false
	}
	return r.q[r.head].lsn, true
}

// floors are the Appends in flight. An Append that has not returned will get, or has got, an LSN at or
// above its floor, so Trim must stop at the lowest: its record may be on the media while nothing refers to
// it yet. Guarded by Pool.mu.
type floors struct {
	q []*floor // in order of start, so floors never fall
}

type floor struct {
	lsn  uint64
	done bool
}

func (f *floors) begin(lsn uint64) *floor {
	x := &floor{lsn: lsn}
	f.q = append(f.q, x)
	return x
}

func (f *floors) end(x *floor) {
	x.done = true
	for len(f.q) > 0 && f.q[0].done {
		f.q = f.q[1:]
	}
}

func (f *floors) first() (uint64, bool) {
	if len(f.q) == 0 {
		return 0, false
	}
	return f.q[0].lsn, true
}
