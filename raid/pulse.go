package raid

import (
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// pulse knows how long reads of the members take, and so what is late; and it keeps the budget of hedges (direct.go).
//
// Late is what takes lateFactor times as long as 99 of 100 reads of the members, the slowest M members left out: parity can stand
// for so many, and one slow member, with a tenth of all reads, must not make its own slowness the measure. But
// nothing is late before lateAtLeast: what a busy machine, or a drive's own housekeeping, takes now and then.
type pulse struct {
	beats atomic.Uint32
	// late is a duration; 0: not known.
	late atomic.Int64
	// credit is what hedges may yet read, in eighths of a block.
	credit  atomic.Int64
	judging sync.Mutex
}

const (
	lateFactor  = 4
	lateAtLeast = 10 * time.Millisecond
	// A hedge pays for the blocks that it reads from others with what reads earn: an eighth of a block for each block
	// read. Saved are at most hedgeCredit eighths: 16 MiB.
	hedgeCredit = 8 * 4096
	// Judged anew are firstBeats reads, then every nextBeats; older ones count half each time.
	firstBeats, nextBeats = 64, 1024
	// leastBeats of a member tell something of it.
	leastBeats = 8
)

// latencies count a member's reads by the bits of their microseconds.
type latencies [32]atomic.Uint32

// beat notes that a read of some blocks was answered.
func (a *Array) beat(m *member, took time.Duration, blocks int) {
	p := &a.pulse
	m.latencies[min(bits.Len64(uint64(took.Microseconds())), len(m.latencies)-1)].Add(1)
	if p.credit.Load() < hedgeCredit {
		p.credit.Add(int64(blocks))
	}
	if n := p.beats.Add(1); n == firstBeats || n%nextBeats == 0 {
		a.mu.Lock()
		members := slices.Clone(a.members)
		a.mu.Unlock()
		p.judge(members, a.layout.Parity())
	}
}

// bound is when a read is late; for ever while that is not known.
func (p *pulse) bound() time.Duration {
	if late := p.late.Load(); late > 0 {
		return time.Duration(late)
	}
	return 1<<63 - 1
}

// spend takes blocks from the budget, if it has them.
func (p *pulse) spend(blocks int) bool {
	if p.credit.Add(-8*int64(blocks)) >= 0 {
		return true
	}
	p.credit.Add(8 * int64(blocks))
	return false
}

func (p *pulse) judge(members []*member, parity int) {
	if !p.judging.TryLock() {
		return
	}
	defer p.judging.Unlock()
	var slow []time.Duration
	for _, m := range members {
		if d := m.latencies.percentile99(); d > 0 {
			slow = append(slow, d)
		}
		m.latencies.age()
	}
	if len(slow) <= parity {
		return
	}
	slices.Sort(slow)
	p.late.Store(int64(max(lateFactor*slow[len(slow)-1-parity], lateAtLeast)))
}

// percentile99 is above what 99 of 100 reads take; 0: too few to tell.
func (l *latencies) percentile99() time.Duration {
	var counts [len(l)]uint32
	var all uint32
	for i := range l {
		counts[i] = l[i].Load()
		all += counts[i]
	}
	if all < leastBeats {
		return 0
	}
	above := all / 100
	for i := len(l) - 1; i > 0; i-- {
		if above < counts[i] {
			return time.Microsecond << i
		}
		above -= counts[i]
	}
	return time.Microsecond
}

// age halves the counts; a beat that is lost meanwhile does not matter.
func (l *latencies) age() {
	for i := range l {
		l[i].Store(l[i].Load() / 2)
	}
}
