package sim

import (
	"flag"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

var (
	seeds    = flag.Int("seeds", 20000, "seeds to run")
	first    = flag.Uint64("first", 1, "first seed")
	one      = flag.Uint64("seed", 0, "run only this seed, with a trace")
	keep     = flag.String("keep", "", "with -seed: run only these events (1,2,5-9); -: none")
	mutation = flag.String("mutation", "", "break the product on purpose (see README.md)")
	worldIs  = flag.String("world", "", "pool or shelf; by the seed if empty")
	// What a parent tells its children.
	worker  = flag.Int("worker", -1, "")
	workers = flag.Int("workers", 0, "")
	note    = flag.String("note", "", "")
)

func TestMain(m *testing.M) {
	flag.Parse()
	if *worker >= 0 {
		os.Exit(m.Run()) // goleak would look at the parent's pipes
	}
	goleak.VerifyTestMain(m)
}

func options() Options {
	return Options{World: World(*worldIs), Mutation: Mutation(*mutation)}
}

// TestSeeds runs many seeds, and prints how to replay the first that fails, made as short as can be.
func TestSeeds(t *testing.T) {
	if *worker >= 0 {
		t.Skip("a child")
	}
	o := options()
	if *one != 0 {
		k, err := parseKeep(*keep)
		if err != nil {
			t.Fatal(err)
		}
		o.Keep = k
		r := replay1(t, *one, o, testing.Verbose())
		if r.Err != "" {
			t.Fatalf("seed %d: %s", *one, r.Err)
		}
		return
	}
	n := *seeds
	if testing.Short() {
		n = min(n, 400)
	}
	total, bad := search(t, *first, n, o)
	if bad != nil {
		short := shrink(t, bad, o)
		t.Fatalf("seed %d: %s\nof its %d events these are enough:%s\nreplay: go test ./qa/sim -run TestSeeds -seed %d%s -v", bad.Seed, bad.Err, bad.Events,
			short.text(), bad.Seed, o.flags(short.keep))
	}
	t.Logf("%d seeds", n)
	for _, k := range sorted(total) {
		t.Logf("%10d %s", total[k], k)
	}
	if n < 10000 || o.World != "" {
		return
	}
	// A fault that never happened, and a path that never ran, prove nothing.
	for _, what := range must {
		if total[what] == 0 {
			t.Errorf("no %s in %d seeds", what, n)
		}
	}
}

// must are the counters that may not be zero in a run of TestSeeds.
var must = []string{
	"cut in a region write", "cut in a stripe write", "cut in an update", "cut in a flush", "cut in replay", "cut in a rebuild", "cut in a repair",
	"write: lose", "write: tear", "write: misdirect", "write: fail", "rotten block", "unreadable block", "drive died", "drive stalled", "drive timed out",
	"drive came back", "older copy came back", "member lost", "takeover", "full pool", "update replayed", "stall for room",
	"degraded read", "strip repaired", "checksum error found", "lost write found", "read error", "update by delta", "update by rebuild", "generations alone known",
	"cut in a growth", "growth went on", "array grown",
	"member rebuilt", "scrub of everything", "strip scrubbed well", "stale member refused", "stripe beyond parity", "error beyond parity",
	// Two controllers.
	"power in a region write", "power in a stripe write", "power in an update", "power in a flush", "power in a label", "power in a fence", "site power in a region write",
	"site without power", "controller without power", "controller stopped", "stop before in a region write", "stop after in a region write", "stop before in a label",
	"link cut", "link reset", "link slow", "connection said again", "message lost", "message sent twice", "NVRAM came back empty", "NVRAM came back old",
	"solo entered", "solo left", "in sync", "fence", "takeover after a fence", "partner's log replayed", "handed over", "order done", "order refused", "owner overtaken",
	"takeover contested", "claim too late", "fresh left", "fresh pool claimed", "owner without reservation",
	"owner found that it was fenced", "owner's NVRAM refused", "exit with code 3", "check of everything",
}

// TestMutationsAreCaught breaks the product in each of the ways of README.md: a simulation that finds nothing
// wrong with them would find nothing wrong with anything.
func TestMutationsAreCaught(t *testing.T) {
	if *worker >= 0 || *one != 0 {
		t.Skip("a child")
	}
	for _, m := range Mutations {
		t.Run(string(m.Name), func(t *testing.T) {
			most := 6000
			if testing.Short() {
				most = 300
			}
			_, bad := search(t, 1, most, Options{Mutation: m.Name, World: m.World})
			if bad == nil {
				t.Fatalf("not caught by %d seeds", most)
			}
			t.Logf("seed %d: %s", bad.Seed, bad.Err)
		})
	}
}

// flags are those that replay a run of these options.
func (o Options) flags(keep []int) (s string) {
	if o.World != "" {
		s += " -world " + string(o.World)
	}
	if o.Mutation != None {
		s += " -mutation " + string(o.Mutation)
	}
	if keep != nil {
		s += " -keep " + formatKeep(keep)
	}
	return s
}

func formatKeep(keep []int) string {
	if len(keep) == 0 {
		return "-"
	}
	var parts []string
	for i := 0; i < len(keep); {
		j := i
		for j+1 < len(keep) && keep[j+1] == keep[j]+1 {
			j++
		}
		if j > i {
			parts = append(parts, fmt.Sprintf("%d-%d", keep[i], keep[j]))
		} else {
			parts = append(parts, strconv.Itoa(keep[i]))
		}
		i = j + 1
	}
	return strings.Join(parts, ",")
}

func parseKeep(s string) ([]int, error) {
	if s == "" {
		return nil, nil
	}
	keep := []int{}
	if s == "-" {
		return keep, nil
	}
	for _, p := range strings.Split(s, ",") {
		lo, hi, found := strings.Cut(p, "-")
		a, err := strconv.Atoi(lo)
		b := a
		if err == nil && found {
			b, err = strconv.Atoi(hi)
		}
		if err != nil || b < a || b > 1<<20 {
			return nil, fmt.Errorf("-keep %q", s)
		}
		for ; a <= b; a++ {
			keep = append(keep, a)
		}
	}
	return keep, nil
}

func TestKeep(t *testing.T) {
	for _, s := range []string{"-", "0", "1,3-5,9", "2-7"} {
		k, err := parseKeep(s)
		if err != nil || formatKeep(k) != s {
			t.Errorf("%q: %v, %v", s, k, err)
		}
	}
	for _, s := range []string{"x", "3-1", "1,,2"} {
		if _, err := parseKeep(s); err == nil {
			t.Errorf("%q was taken", s)
		}
	}
}

// TestShrink: of a hundred events the three that matter are found, in few tries.
func TestShrink(t *testing.T) {
	tries := 0
	got := Shrink(100, 1000, func(keep []int) bool {
		tries++
		return slices.Contains(keep, 3) && slices.Contains(keep, 50) && slices.Contains(keep, 99)
	})
	if !slices.Equal(got, []int{3, 50, 99}) || tries > 150 {
		t.Fatalf("%v after %d tries", got, tries)
	}
	if got := Shrink(5, 100, func([]int) bool { return true }); len(got) != 0 {
		t.Fatalf("%v", got)
	}
}
