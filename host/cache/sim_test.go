package cache

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"
)

var (
	seeds    = flag.Int("seeds", 100, "how many seeds TestSimulation runs")
	fromSeed = flag.Uint64("from", 1, "the first of them")
)

// run is a host and its flash drive over a few lives. What it may never see is a wrong byte.
type run struct {
	t       *testing.T
	rng     *rand.Rand
	d       *fakeDisk
	clock   fakeClock
	c       *Cache
	honest  bool // the drive: it only loses its power
	regions int64
	gone    map[uint32]bool // segments of storeA freed in this life
	next    uint32
	seen    map[string]int
}

// TestSimulation: reads, fills, freed segments, restarts, resizes; power cuts at any write, torn and
// reordered; drives that flip bits, err, hang, lose writes and write elsewhere. A read gives the
// right bytes or misses. After a power cut of an honest drive nearly all is warm, and nothing looks bad.
func TestSimulation(t *testing.T) {
	total := map[string]int{}
	for i := range *seeds {
		seed := *fromSeed + uint64(i)
		r := simulate(t, seed)
		if t.Failed() {
			t.Fatalf("replay with -run TestSimulation -from %d -seeds 1", seed)
		}
		for k, v := range r.seen {
			total[k] += v
		}
	}
	t.Log(total)
	if *seeds < 100 {
		return
	}
	for _, k := range []string{"hit", "cut", "warm lines after a cut", "restart", "resize", "flip", "read error", "write error", "late", "lost write",
		"misdirected write", "bad line found", "bypass", "served again"} {
		if total[k] == 0 {
			t.Errorf("it never happened: %s", k)
		}
	}
}

func simulate(t *testing.T, s uint64) *run {
	r := &run{t: t, rng: rand.New(rand.NewPCG(s, 3)), clock: fakeClock{time.Unix(1e9, 0)}, honest: s%2 == 0, gone: map[uint32]bool{}, next: 1, seen: map[string]int{}}
	r.regions = int64(24 + r.rng.IntN(40))
	r.d = newDisk(smallSize(r.regions))
	r.d.rng = rand.New(rand.NewPCG(s, 4))
	r.open()
	for range 3 + r.rng.IntN(4) {
		r.life()
	}
	if !r.honest {
		r.recover()
	}
	return r
}

func (r *run) open() {
	o := small(r.d)
	o.now = r.clock.now
	r.c = openWith(r.t, o)
	clear(r.gone)
}

// life is what happens until the next restart or power cut.
func (r *run) life() {
	if !r.honest {
		r.misbehave()
	}
	if r.rng.IntN(3) > 0 {
		r.d.cutIn = 1 + r.rng.IntN(80)
	}
	for range 500 + r.rng.IntN(2500) {
		if r.step(); r.d.dead {
			r.powerCut()
			return
		}
	}
	r.seen["restart"]++
	before, broken := held(r.c), r.c.Stats().Err != nil || !r.honest
	if r.c.Close(); r.d.dead {
		r.powerCut()
		return
	}
	r.count()
	r.well()
	r.open()
	if after := held(r.c); !broken && after < before { // freed ones may be there again
		r.t.Errorf("%d lines after a restart, of %d", after, before)
	}
}

func (r *run) step() {
	r.clock.t = r.clock.t.Add(time.Duration(r.rng.IntN(20)) * time.Millisecond)
	switch x := r.rng.IntN(1000); {
	case x < 5:
		// The oldest segments are freed, new ones come.
		segment := r.next
		r.next++
		r.c.Forget(storeA, segment)
		r.gone[segment] = true
	case x < 25:
		r.clock.t = r.clock.t.Add(time.Second)
		r.c.everyTick()
	case x < 27:
		r.resize()
	case x < 32 && !r.honest:
		r.flip()
	default:
		// A few segments are wanted most, some lines once.
		store, segment := storeA, r.next+uint32(r.rng.IntN(1+r.rng.IntN(8)))
		if r.rng.IntN(4) == 0 {
			store = storeB
		}
		line := r.rng.IntN(segmentLines)
		if r.rng.IntN(3) == 0 {
			segment += 100 + uint32(r.rng.IntN(1<<20))
		}
		if fill(r.t, r.c, store, segment, line) {
			if r.seen["hit"]++; store == storeA && r.gone[segment] {
				r.t.Error("a line of a segment that was freed")
			}
		}
	}
}

func (r *run) resize() {
	n := int64(24 + r.rng.IntN(40))
	if err := r.c.Resize(smallSize(n)); err == nil {
		r.seen["resize"]++
		r.regions = n
	} else if r.honest && !r.d.dead {
		r.t.Error(err)
	}
}

func (r *run) powerCut() {
	r.seen["cut"]++
	before := held(r.c)
	r.count()
	r.well()
	r.d.powerOn()
	r.open()
	after := held(r.c)
	r.seen["warm lines after a cut"] += after
	// What was in memory, in two regions, and what may have been overwritten.
	if lost := 8 * smallPer; r.honest && after < before-lost {
		r.t.Errorf("%d lines after a power cut, of %d", after, before)
	}
}

// count adds what the cache saw in its life.
func (r *run) count() {
	s := r.c.Stats()
	if r.honest && s.Bad > 0 {
		r.t.Errorf("an honest drive is taken for a liar: %d bad lines, %v", s.Bad, s.LastFault)
	}
	r.seen["bad line found"] += int(s.Bad)
	r.seen["bypass"] += int(s.Bypasses)
}

func (r *run) flip() {
	r.seen["flip"]++
	at := r.rng.Int64N(r.d.size / blockBytes)
	for range 50 { // a block that holds something
		if r.d.blocks[at] != nil {
			r.d.blocks[at] = append([]byte(nil), r.d.blocks[at]...)
			r.d.blocks[at][r.rng.IntN(blockBytes)] ^= 1 << r.rng.IntN(8)
			return
		}
		at = r.rng.Int64N(r.d.size / blockBytes)
	}
}

// misbehave makes the drive do wrong in one life; well ends that.
func (r *run) misbehave() {
	one := 20 << r.rng.IntN(8) // in so many
	maybe := func(what string, err error) error {
		if r.rng.IntN(one) != 0 {
			return nil
		}
		r.seen[what]++
		return err
	}
	switch r.rng.IntN(5) {
	case 0:
		r.d.readErr = func() error { return maybe("read error", errMedium) }
	case 1:
		r.d.onWrite = func(int64, int) error { return maybe("write error", errMedium) }
	case 2:
		late := func() error { return maybe("late", fmt.Errorf("drive: %w", errLate)) }
		r.d.readErr, r.d.onWrite = late, func(int64, int) error { return late() }
	case 3:
		r.d.lose = func(at int64) int64 {
			if maybe("lost write", errMedium) != nil {
				return -1
			}
			return at
		}
	case 4:
		r.d.lose = func(at int64) int64 {
			if maybe("misdirected write", errMedium) != nil {
				return r.rng.Int64N(r.d.size/blockBytes) * blockBytes
			}
			return at
		}
	}
}

func (r *run) well() { r.d.readErr, r.d.onWrite, r.d.lose = nil, nil, nil }

// recover: when the drive is well again and some time has passed, the cache serves. What is wrong on it
// already may have it bypassed once more.
func (r *run) recover() {
	r.well()
	if r.d.cutIn = 0; r.d.dead { // at the last opening
		r.powerCut()
	}
	for range 30 {
		r.clock.t = r.clock.t.Add(maxBackOff)
		r.c.everyTick()
		fill(r.t, r.c, storeB, 1<<30, 5)
	}
	if err := r.c.Stats().Err; err != nil || !has(r.t, r.c, storeB, 1<<30, 5) {
		r.t.Errorf("a drive that is well again is not used: %v", err)
	}
	r.count()
	r.seen["served again"]++
}
