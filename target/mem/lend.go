package mem

import (
	"sync"
	"sync/atomic"

	"github.com/ledge-storage/ledge/target"
)

var _ target.Lender = (*Device)(nil)

// page is a piece of the unit. While it is lent it does not change: who writes to it puts a copy in
// its place.
type page struct {
	data []byte // pageBytes
	// loans is raised with the page's lock held, shared or exclusive, and falls without it.
	loans atomic.Int32
}

// own returns page n, which is there, to be changed. The page's lock is held exclusively.
func (d *Device) own(n int64) []byte {
	m := d.pages[n]
	if m.loans.Load() == 0 {
		return m.data
	}
	c := &page{data: make([]byte, pageBytes)}
	copy(c.data, m.data)
	d.pages[n] = c
	return c.data
}

type loan struct{ pages []*page }

var loans = sync.Pool{New: func() any { return new(loan) }}

// Lend implements target.Lender where Options.Huge is set. Each block is as it was at some time
// during the call.
func (d *Device) Lend(lba uint64, n int, dst [][]byte) ([][]byte, target.Loan) {
	off, err := d.check(lba, int64(n))
	if err != nil || d.region == nil {
		return dst, nil
	}
	o := loans.Get().(*loan)
	d.whole.RLock()
	defer d.whole.RUnlock()
	for left := int64(n); left > 0; {
		i, at := off/pageBytes, off%pageBytes
		size := min(left, pageBytes-at)
		l := &d.locks[i%stripes]
		l.RLock()
		data := zeroPage[:]
		if m := d.pages[i]; m != nil {
			m.loans.Add(1)
			o.pages = append(o.pages, m)
			data = m.data
		}
		l.RUnlock()
		dst = append(dst, data[at:at+size])
		off, left = off+size, left-size
	}
	return dst, o
}

// Return implements target.Loan.
func (o *loan) Return() {
	for i, m := range o.pages {
		m.loans.Add(-1)
		o.pages[i] = nil
	}
	o.pages = o.pages[:0]
	loans.Put(o)
}
