package md

import (
	"context"
	"os"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func right(t *testing.T, rows []Row) {
	t.Helper()
	if len(rows) != len(Faults) {
		t.Fatalf("%d rows, not %d", len(rows), len(Faults))
	}
	for _, r := range rows {
		for _, c := range []struct{ when, cell string }{{"read", r.Read}, {"repaired", r.Repaired}, {"rebuilt", r.Rebuilt}} {
			if c.cell != Right {
				t.Errorf("%s: %s: %s", r.Fault, c.when, c.cell)
			}
		}
	}
}

// TestEveryCellIsRight: whatever one member lies about, what is read is what was written. With md's half, which
// qa/guest's TestMD holds, this is README.md's table; -v prints it.
func TestEveryCellIsRight(t *testing.T) {
	rows, err := Ledge(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	right(t, rows)
	linux, err := Golden()
	if err != nil {
		t.Fatal(err)
	}
	table := Table(linux, rows)
	t.Logf("\n%s", table)
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(readme), table) {
		t.Error("README.md has another table; this test prints the right one with -v")
	}
}

// TestPool: the same through the pool, with a lie in everything that a member holds.
func TestPool(t *testing.T) {
	liars := []int{0, 3, 7, 10}
	if testing.Short() {
		liars = liars[:1]
	}
	rows, err := Pool(context.Background(), liars...)
	if err != nil {
		t.Fatal(err)
	}
	right(t, rows)
}

// TestFaultsAreFaults: each fault changes what the member holds, else the table would prove nothing; and md's rows
// are what a fault looks like to who has no checksums.
func TestFaultsAreFaults(t *testing.T) {
	b, err := newBench(context.Background(), false)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range Faults {
		for variant := range 2 {
			for strip := range data + parity {
				set := b.set.Clone()
				touched := b.inflict(set, f, strip, variant)
				m, _ := b.layout.Strip(0, strip)
				changed := 0
				was, is := b.set.Disks[m].Snapshot(), set.Disks[m].Snapshot()
				for at := range is {
					if string(was[at]) != string(is[at]) {
						changed++
					}
				}
				want := map[Fault]int{Rot: 1, Lost: 1 + stripBlocks, LostParity: 1 + stripBlocks, Torn: stripBlocks / 2, Misdirected: 2 * (1 + stripBlocks)}[f]
				if f == Torn && variant == 1 {
					want++
				}
				if changed != want || len(touched) == 0 {
					t.Errorf("%s, variant %d, strip %d: %d blocks changed, not %d", f, variant, strip, changed, want)
				}
			}
		}
	}
	linux, err := Golden()
	if err != nil {
		t.Fatal(err)
	}
	wrongCells := 0
	for _, r := range linux {
		for _, c := range []string{r.Read, r.Repaired, r.Rebuilt} {
			if c != Right {
				wrongCells++
			}
		}
	}
	if wrongCells != 13 {
		t.Errorf("%d of md's 15 cells are wrong", wrongCells)
	}
}
