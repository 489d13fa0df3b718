// Package spin decides whether to look at a socket again and again for a while before its goroutine is
// parked. Parking costs a sleeping core's wake-up, tens of microseconds in a virtual machine, when
// the other side's next message is only a few microseconds away; but a core that spins is a core
// that nobody else has. So: never longer than the limit; never more spinners at a time than there
// are processors but one (or one); and when maxMisses in a row found nothing the next ones become
// rarer, up to one in maxSkip, so that a slow other side costs next to nothing. (One that
// is idle costs one spin, whatever the rule.) Not after the first miss: where messages come just as
// far apart as the limit, each miss that is not repeated is a hit.
package spin

import (
	"runtime"
	"sync/atomic"
	"time"
)

// Spinner is one goroutine's that reads a socket. Its zero value never spins.
type Spinner struct {
	limit   time.Duration
	running *atomic.Int32
	most    int32
	until   time.Time
	skip    int // attempts to let pass
	misses  int // successive spins that found nothing
}

const (
	maxMisses = 8
	maxSkip   = 64
)

// New returns a spinner that looks for limit at most; 0: not at all. running counts those of all goroutines that share it.
func New(limit time.Duration, running *atomic.Int32) Spinner {
	return Spinner{limit: limit, running: running, most: int32(max(1, runtime.GOMAXPROCS(0)-1))}
}

// Alone returns a spinner that shares with nobody.
func Alone(limit time.Duration) *Spinner {
	s := New(limit, new(atomic.Int32))
	return &s
}

// Begin says whether to look again and again: until Over, or until something was found. End follows.
func (s *Spinner) Begin() bool {
	if s.limit == 0 {
		return false
	}
	if s.skip > 0 {
		s.skip--
		return false
	}
	if s.running.Add(1) > s.most {
		s.running.Add(-1)
		return false
	}
	s.until = time.Now().Add(s.limit)
	return true
}

// Over says that the time is.
func (s *Spinner) Over() bool { return !time.Now().Before(s.until) }

// End follows a Begin that was true.
func (s *Spinner) End(found bool) {
	s.running.Add(-1)
	if found {
		s.misses = 0
		return
	}
	if s.misses++; s.misses >= maxMisses {
		s.skip = min(1<<min(s.misses-maxMisses, 6), maxSkip)
	}
}
