package sim

import (
	"flag"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"
)

var (
	seeds    = flag.Int("seeds", 2000, "seeds to run")
	first    = flag.Uint64("first", 1, "first seed")
	one      = flag.Uint64("seed", 0, "run only this seed, with a trace")
	mutation = flag.String("mutation", "", "break the product on purpose (see README.md)")
)

func TestMain(m *testing.M) {
	flag.Parse()
	goleak.VerifyTestMain(m)
}

// TestSeeds runs many seeds and prints how to replay the first that fails.
func TestSeeds(t *testing.T) {
	o := Options{Mutation: Mutation(*mutation)}
	if *one != 0 {
		o.Trace = t.Logf
		f, err := Run(*one, o)
		t.Logf("%+v", f)
		if err != nil {
			t.Fatalf("seed %d: %v", *one, err)
		}
		return
	}
	n := *seeds
	if testing.Short() {
		n = min(n, 300)
	}
	seed, err, total := search(*first, n, o)
	if err != nil {
		t.Fatalf("seed %d: %v\nreplay: go test ./qa/sim -run TestSeeds -seed %d -mutation %q -v", seed, err, seed, *mutation)
	}
	t.Logf("%d seeds: %+v", n, total)
	// A fault that never happened proves nothing.
	for what, count := range map[string]int{"cut in the region": total.CutsInRegion, "cut in a stripe write": total.CutsInStripe,
		"cut in an update": total.CutsInApply, "cut in a flush": total.CutsInFlush, "cut in replay": total.CutsInReplay,
		"member lost": total.MembersLost, "rot": total.RottenBlocks, "takeover": total.Takeovers, "full pool": total.NoSpace,
		"replayed update": int(total.Shelf.ReplayedUpdates), "stall": int(total.Shelf.Stalls)} {
		if count == 0 && n >= 1500 {
			t.Errorf("no %s in %d seeds", what, n)
		}
	}
}

// search runs n seeds from first on and returns the lowest that fails.
func search(first uint64, n int, o Options) (bad uint64, err error, total Faults) {
	var mu sync.Mutex
	var next atomic.Uint64
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for {
				s := first + next.Add(1) - 1
				mu.Lock()
				stop := s >= first+uint64(n) || err != nil && s > bad
				mu.Unlock()
				if stop {
					return
				}
				f, e := Run(s, o)
				mu.Lock()
				total.add(f)
				if e != nil && (err == nil || s < bad) {
					bad, err = s, e
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return bad, err, total
}

// TestMutationsAreCaught breaks the product in each of the ways of README.md: a simulation that finds nothing
// wrong with them would find nothing wrong with anything.
func TestMutationsAreCaught(t *testing.T) {
	most := 400
	if testing.Short() {
		most = 100
	}
	for _, m := range Mutations {
		t.Run(string(m), func(t *testing.T) {
			seed, err, _ := search(1, most, Options{Mutation: m})
			if err == nil {
				t.Fatalf("not caught by %d seeds", most)
			}
			t.Logf("seed %d: %v", seed, err)
		})
	}
}
