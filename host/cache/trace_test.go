package cache

import (
	"container/list"
	"math"
	"math/rand/v2"
	"sort"
	"testing"
)

// lru is what the cache is compared with: least recently used, everything let in.
type lru struct {
	limit  int
	order  list.List
	at     map[int]*list.Element
	hits   int
	writes int
}

func (l *lru) get(key int) bool {
	if e := l.at[key]; e != nil {
		l.order.MoveToFront(e)
		l.hits++
		return true
	}
	l.writes++
	l.at[key] = l.order.PushFront(key)
	if l.order.Len() > l.limit {
		delete(l.at, l.order.Remove(l.order.Back()).(int))
	}
	return false
}

// zipf draws from n lines with exponent s, the most wanted strewn over all segments.
type zipf struct {
	sum []float64
	to  []int
	rng *rand.Rand
}

func newZipf(n int, s float64) *zipf {
	z := &zipf{sum: make([]float64, n), rng: rand.New(rand.NewPCG(1, uint64(n)))}
	total := 0.0
	for i := range n {
		total += math.Pow(float64(i+1), -s)
		z.sum[i] = total
	}
	z.to = z.rng.Perm(n)
	return z
}

func (z *zipf) next() int {
	return z.to[sort.SearchFloat64s(z.sum, z.rng.Float64()*z.sum[len(z.sum)-1])]
}

// trace drives a cache and an LRU of the same size with the same reads.
type trace struct {
	t    *testing.T
	c    *Cache
	lru  lru
	hits int
	n    int
}

func newTrace(t *testing.T, regions int64) *trace {
	d := newDisk(smallSize(regions))
	c := openWith(t, small(d))
	return &trace{t: t, c: c, lru: lru{limit: int(c.layout.slots()), at: map[int]*list.Element{}}}
}

func (tr *trace) get(key int) bool {
	tr.n++
	tr.lru.get(key)
	hit := fill(tr.t, tr.c, storeA, uint32(key/segmentLines+1), key%segmentLines)
	if hit {
		tr.hits++
	}
	return hit
}

func (tr *trace) reset() { tr.hits, tr.n, tr.lru.hits = 0, 0, 0 }

func (tr *trace) rates() (ours, lru float64) {
	return float64(tr.hits) / float64(tr.n), float64(tr.lru.hits) / float64(tr.n)
}

// On skewed reads the hit rate is no worse than LRU's, and a fraction of its writes goes to flash.
func TestZipfAgainstLRU(t *testing.T) {
	for _, s := range []float64{0.7, 0.9, 1.1} {
		tr := newTrace(t, 128) // 2048 lines
		z := newZipf(20480, s)
		for range 60000 {
			tr.get(z.next())
		}
		tr.reset()
		writes := tr.lru.writes
		before := tr.c.Stats()
		for range 60000 {
			tr.get(z.next())
		}
		ours, lru := tr.rates()
		st := tr.c.Stats()
		written := st.Written - before.Written
		wa := float64(st.MediumBytes-before.MediumBytes) / float64(written*smallLine)
		t.Logf("zipf %.1f: hit rate %.3f, LRU %.3f; lines written %d, LRU %d; write amplification %.2f", s, ours, lru, written, tr.lru.writes-writes, wa)
		if ours < lru {
			t.Errorf("zipf %.1f: hit rate %.3f, LRU has %.3f", s, ours, lru)
		}
	}
}

// A backup that reads forty times the cache's size, beside a working set: the set stays.
func TestScanPasses(t *testing.T) {
	tr := newTrace(t, 128)
	lines := int(tr.c.layout.slots())
	hot := newZipf(lines/2, 0.6)
	for range 20 * lines {
		tr.get(hot.next())
	}
	tr.reset()
	for range 5 * lines {
		tr.get(hot.next())
	}
	before, _ := tr.rates()
	written := tr.c.Stats().Written
	var hits, reads, lruHits int
	for i := range 40 * lines {
		tr.get(1<<20 + i)
		if i%8 == 0 { // one read in nine is the working set's
			was := tr.lru.hits
			if reads++; tr.get(hot.next()) {
				hits++
			}
			lruHits += tr.lru.hits - was
		}
	}
	during := float64(hits) / float64(reads)
	t.Logf("hit rate of the hot set %.3f before, %.3f during a scan of 40 × the cache (LRU %.3f); the scan wrote %d lines of %d",
		before, during, float64(lruHits)/float64(reads), tr.c.Stats().Written-written, 40*lines)
	if before < 0.99 || during < 0.97*before {
		t.Errorf("hit rate of the hot set %.3f, during a scan %.3f", before, during)
	}
	if n := int(tr.c.Stats().Written - written); n > lines {
		t.Errorf("the scan wrote %d lines into a cache of %d", n, lines)
	}
}

// A line that is read all the time stays, though all around it is replaced again and again.
func TestHotLineStays(t *testing.T) {
	tr := newTrace(t, 8)
	tr.get(0)
	for i := 1; i < 5000; i++ {
		tr.get(i)
		tr.get(i) // twice: let in
		if i%20 == 0 && !tr.get(0) {
			t.Fatalf("gone after %d others", i)
		}
	}
	if s := tr.c.Stats(); s.Kept < 30 || s.Lines > int(tr.c.layout.slots()) || s.Evicted < 4000 {
		t.Errorf("%+v", s)
	}
}

// When other lines become hot, the cache follows.
func TestWorkingSetMoves(t *testing.T) {
	tr := newTrace(t, 64)
	lines := int(tr.c.layout.slots())
	for phase := range 3 {
		hot := newZipf(lines/2, 0.6)
		for range 10 * lines {
			tr.get(phase<<20 + hot.next())
		}
		tr.reset()
		for range 3 * lines {
			tr.get(phase<<20 + hot.next())
		}
		if ours, lru := tr.rates(); ours < 0.97 {
			t.Errorf("phase %d: hit rate %.3f, LRU %.3f", phase, ours, lru)
		}
	}
}

// Reads round and round through more than fits, which LRU never hits.
func TestLoop(t *testing.T) {
	tr := newTrace(t, 64)
	lines := int(tr.c.layout.slots())
	for round := range 8 {
		if round == 4 {
			tr.reset()
		}
		for i := range lines * 3 / 2 {
			tr.get(i)
		}
	}
	if ours, lru := tr.rates(); ours < 0.3 || lru > 0 {
		t.Errorf("hit rate %.3f, LRU %.3f", ours, lru)
	} else {
		t.Logf("hit rate %.3f, LRU %.3f", ours, lru)
	}
}
