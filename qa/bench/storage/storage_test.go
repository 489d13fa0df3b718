package main

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/qa/bench/measure"
	"github.com/ledge-storage/ledge/raid"
)

// TestBeds runs every bed, small and short: each contestant works, each ask has a verdict, and the table shows them all.
func TestBeds(t *testing.T) {
	s := settings{shm: t.TempDir(), disk: t.TempDir(), seconds: 10 * time.Millisecond, rounds: 2, slots: 8,
		logBytes: 64 << 20, hotBytes: 8 << 20, rebuildMB: 1, say: t.Logf}
	var r Report
	asked := 1 // hot's
	for _, b := range allBeds {
		if err := s.measure(context.Background(), b, &r); err != nil {
			t.Fatalf("%s: %v", b.name, err)
		}
		asked += len(b.asks)
	}
	if len(r.Verdicts) != asked {
		t.Errorf("%d verdicts of %d asks", len(r.Verdicts), asked)
	}
	var out strings.Builder
	table(&out, r)
	for _, f := range r.Figures {
		if len(f.Rounds) != s.rounds || f.Value.Min <= 0 {
			t.Errorf("%s %s: %+v", f.Bed, f.Name, f)
		}
		if !strings.Contains(out.String(), "| "+f.Bed+" | "+f.Name+" |") {
			t.Errorf("the table lacks %s %s", f.Bed, f.Name)
		}
	}
	for _, v := range r.Verdicts {
		if v.Bed == "hot" && !v.Met {
			t.Errorf("%v", v)
		}
	}
}

func TestJudge(t *testing.T) {
	figures := []Figure{{Name: "ours", Rounds: []float64{8, 90, 10}}, {Name: "bare", Rounds: []float64{10, 100, 10}}}
	b := bed{name: "b", asks: []ask{{what: "at least", a: "ours", b: "bare", bound: .9}, {what: "too much", a: "ours", b: "bare", bound: .91},
		{what: "at most", a: "ours", b: "bare", bound: .9, atMost: true}}}
	vs := judge(b, figures)
	for i, met := range []bool{true, false, true} {
		if vs[i].Met != met || vs[i].Measured != (measure.Spread{Median: .9, Min: .8, Max: 1}) {
			t.Errorf("%v", vs[i])
		}
	}
	if got := vs[1].String(); !strings.HasPrefix(got, "not met b ") || !strings.Contains(got, "asked ≥ 0.91, measured 0.9 (0.8–1)") {
		t.Error(got)
	}
}

// TestWatch: the hot bed would see a block that is written twice in a round.
func TestWatch(t *testing.T) {
	w := new(watch)
	d := w.wrap(sink{})
	w.start()
	p := make([]byte, 2*raid.BlockBytes)
	for _, off := range []int64{0, 0, raid.DataOffset, raid.DataOffset + raid.BlockBytes} {
		d.WriteAt(p, off)
	}
	if written, twice := w.counts(); written != 4 || twice != 1 {
		t.Errorf("%d written, %d of them twice; want 4 and 1 (labels are not counted)", written, twice)
	}
	d.Flush()
	d.WriteAt(p, raid.DataOffset)
	if _, twice := w.counts(); twice != 1 {
		t.Errorf("a flush does not end a round: %d", twice)
	}
}

type sink struct{ raid.Drive }

func (sink) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }
func (sink) Flush() error                           { return nil }
