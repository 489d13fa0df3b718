package shelf

import (
	"testing"
	"time"
)

func TestWaitFor(t *testing.T) {
	const ms, mib = time.Millisecond, 1 << 20
	for _, x := range []struct {
		took         time.Duration
		u            float64
		bytes        int64
		floor, most  int64
		want         time.Duration
		wantThrottle bool
	}{
		{10 * ms, 0, mib, mib, 0, 0, false},              // idle: full speed
		{10 * ms, 0, mib, mib, 10 * mib, 90 * ms, false}, // but no more than allowed
		{10 * ms, 0.5, mib, mib, 0, 10 * ms, true},       // half loaded: half the time
		{10 * ms, 0.9, mib, mib, 0, 90 * ms, true},
		{10 * ms, 5, mib, mib, 0, 990 * ms, true}, // overloaded: the floor
		{10 * ms, 5, mib, 50 * mib, 0, 10 * ms, true},
		{10 * ms, 0.96, mib, 50 * mib, 0, 10 * ms, true}, // never below the floor
		{2000 * ms, 5, mib, mib, 0, 0, false},            // slower than the floor as it is
		{10 * ms, 5, mib, 0, 0, 0, false},                // without redundancy: no throttle
		{10 * ms, 0.01, mib, mib, 0, 101010, false},
	} {
		if got, throttled := waitFor(x.took, x.u, x.bytes, x.floor, x.most); got/1000 != x.want/1000 || throttled != x.wantThrottle {
			t.Errorf("%+v: waits %v, throttled %v", x, got, throttled)
		}
	}
}

// The load is the mean number of operations that wait.
func TestLoad(t *testing.T) {
	l := load{epoch: time.Now()}
	at := l.now()
	before := l.integral(at)
	l.enter()
	l.enter()
	time.Sleep(5 * time.Millisecond)
	mid := l.now()
	if u := float64(l.integral(mid)-before) / float64(mid-at); u < 1 || u > 2.01 {
		t.Fatalf("two wait: load %f", u)
	}
	l.leave()
	l.leave()
	one := l.integral(l.now())
	if two := l.integral(l.now() + 1e9); one != two {
		t.Fatalf("nobody waits: %d, then %d", one, two)
	}
}
