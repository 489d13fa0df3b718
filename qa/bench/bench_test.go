package main

import (
	"encoding/json"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// rounds makes results of these IOPS; p99 is a tenth of them.
func rounds(iops ...float64) []Result {
	var rs []Result
	for _, v := range iops {
		rs = append(rs, Result{IOPS: v, P99: v / 10, ClientCPU: .5, TargetCPU: .7})
	}
	return rs
}

// TestRatiosArePaired: a machine that is slow in one round is slow for both; the ratio of the medians (200/100) would not know it.
func TestRatiosArePaired(t *testing.T) {
	row := Row{pinned, libiscsi, cells[2]}
	figures := []Figure{
		{Row: row, Target: "tgtd", Rounds: rounds(100, 1000, 10)},
		{Row: row, Target: "engine", Rounds: rounds(300, 200, 40)},
		{Row: row, Target: "gotgt", Rounds: rounds(50), Error: "it died"},
	}
	summarize(figures)
	if got, want := figures[1].Ratios["tgtd"], (Spread{Median: 3, Min: .2, Max: 4}); got != want {
		t.Errorf("ratio of the engine to tgtd is %v, want %v", got, want)
	}
	if got, want := figures[1].P99Ratios["tgtd"], (Spread{Median: 3, Min: .2, Max: 4}); got != want {
		t.Errorf("ratio of p99 is %v, want %v", got, want)
	}
	if got, want := figures[2].Ratios["tgtd"].Median, .5; got != want {
		t.Errorf("a target that failed later has ratio %v, want %v of its one round", got, want)
	}
	if _, ok := figures[0].Ratios["tgtd"]; ok {
		t.Error("the base has a ratio to itself")
	}
	if got := figures[1].IOPS; got != (Spread{Median: 200, Min: 40, Max: 300}) {
		t.Errorf("IOPS %v", got)
	}
}

// TestResult: the clients print what Result takes.
func TestResult(t *testing.T) {
	line := `{"ops":17843,"seconds":0.500,"iops":35684.8,"mbps":146.16,"p50_us":24.2,"p99_us":71.2,"p999_us":134.4,"client_cpu":0.4919}`
	var r Result
	if err := json.Unmarshal([]byte(line), &r); err != nil {
		t.Fatal(err)
	}
	if want := (Result{IOPS: 35684.8, MBps: 146.16, P50: 24.2, P99: 71.2, P999: 134.4, Seconds: .5, ClientCPU: .4919}); r != want {
		t.Errorf("got %+v, want %+v", r, want)
	}
}

func TestRows(t *testing.T) {
	for _, c := range []struct {
		filter, client string
		want           string
	}{
		{"^4k-read-qd", "auto", "4k-read-qd1/libiscsi 4k-read-qd32/libiscsi 4k-read-qd32/raw"},
		{"8x8", libiscsi, "4k-read-8x8/libiscsi 4k-write-8x8/libiscsi"},
		{"1024k-w", "both", "1024k-write-qd4/libiscsi 1024k-write-qd4/raw"},
		{"128k", raw, "128k-read-qd8/raw 128k-write-qd8/raw"},
		{"nothing", "both", ""},
	} {
		var got []string
		for _, r := range rows(free, regexp.MustCompile(c.filter), c.client) {
			got = append(got, r.Cell.ID()+"/"+r.Client)
		}
		if s := strings.Join(got, " "); s != c.want {
			t.Errorf("%s, %s: %s; want %s", c.filter, c.client, s, c.want)
		}
	}
}

func TestChosen(t *testing.T) {
	got, err := chosen("engine,tgtd", targetNames)
	if err != nil || strings.Join(got, " ") != "tgtd engine" {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := chosen("tgdt", targetNames); err == nil {
		t.Error("a target that is not there is taken")
	}
}

// TestAsksAreMeasured: an ask about a cell or a target that no run has would never be judged.
func TestAsksAreMeasured(t *testing.T) {
	for _, a := range asks {
		if !slices.ContainsFunc(cells, func(c Cell) bool { return c.ID() == a.Cell }) {
			t.Errorf("no cell is called %s", a.Cell)
		}
		if !slices.Contains(targetNames, a.Target) || !slices.Contains(targetNames, a.Base) || !slices.Contains(bases, a.Base) {
			t.Errorf("%s: %s to %s is not measured", a.Cell, a.Target, a.Base)
		}
	}
	seen := map[string]bool{}
	for _, c := range cells {
		if seen[c.ID()] {
			t.Errorf("two cells are called %s", c.ID())
		}
		seen[c.ID()] = true
	}
}

func TestJudge(t *testing.T) {
	row := Row{pinned, libiscsi, cells[2]} // 4k-read-qd32: asked 3.5 × tgtd, 0.85 × the floor, p99 at most tgtd's
	run := func(engine, tgtd, floor float64, change func(*Figure)) []Verdict {
		figures := []Figure{
			{Row: row, Target: "tgtd", Rounds: rounds(tgtd)},
			{Row: row, Target: "loopback-batch", Rounds: rounds(floor)},
			{Row: row, Target: "engine", Rounds: rounds(engine)},
		}
		if change != nil {
			change(&figures[2])
		}
		summarize(figures)
		return judge(figures, nil)
	}
	words := func(vs []Verdict) string {
		var s []string
		for _, v := range vs {
			word, _, _ := strings.Cut(v.String(), " pinned")
			s = append(s, strings.TrimSpace(word))
		}
		return strings.Join(s, ", ") // order of asks: IOPS to tgtd, p99 to tgtd, IOPS to the floor
	}
	for _, c := range []struct {
		engine, tgtd, floor float64
		want                string
	}{
		{350, 100, 400, "met, not met, met"},
		{349, 100, 411, "not met, not met, not met"},
		{100, 100, 100, "not met, met, met"},
	} {
		if got := words(run(c.engine, c.tgtd, c.floor, nil)); got != c.want {
			t.Errorf("%v: %s; want %s", c, got, c.want)
		}
	}
	vs := run(350, 100, 400, func(f *Figure) { f.Error = "it died" })
	if got := words(vs); got != "not met, not met, not met, not met" || vs[0].Note != "it died" {
		t.Errorf("a target that died in a later round: %s (%s)", got, vs[0].Note)
	}
	vs = run(350, 100, 400, func(f *Figure) { f.Rounds[0].ClientCPU = .99 })
	if !strings.Contains(vs[0].String(), "the client is the limit (99 %") {
		t.Errorf("a client with a full core is not named: %s", vs[0])
	}
	if n := met(vs); n != 2 {
		t.Errorf("%d met, want 2", n)
	}
}

func TestJudgeIdle(t *testing.T) {
	for _, c := range []struct {
		idle Idle
		want [2]bool
	}{
		{Idle{Target: "engine", CPU: .004, SessionBytes: 30000, Seconds: 10}, [2]bool{true, true}},
		{Idle{Target: "engine", CPU: .005, SessionBytes: 65536, Seconds: 10}, [2]bool{false, false}},
		{Idle{Target: "engine", Seconds: 10, Error: "1000 sessions: refused"}, [2]bool{false, false}},
	} {
		vs := judge(nil, []Idle{{Target: "tgtd", CPU: 1}, c.idle})
		if len(vs) != 2 || vs[0].Met != c.want[0] || vs[1].Met != c.want[1] {
			t.Errorf("%+v: %v", c.idle, vs)
		}
	}
}

func TestTable(t *testing.T) {
	row := Row{pinned, raw, cells[2]}
	figures := []Figure{
		{Row: row, Target: "tgtd", Rounds: rounds(10000, 30000, 20000)},
		{Row: row, Target: "engine", Rounds: rounds(40000, 90000, 80000)},
		{Row: row, Target: "gotgt", Error: "a|b"},
	}
	figures[1].Rounds[0].Others = .2
	summarize(figures)
	var s strings.Builder
	table(&s, Report{Figures: figures, Rounds: 3, Verdicts: judge(figures, nil)})
	for _, want := range []string{
		"**1 of 6 measurements were disturbed**",
		"| | client | tgtd | gotgt | engine |",
		"| 4 KiB random read, QD 32 | raw | **20.0** 10.0–30.0 · – · – · – · 2000 | failed: a/b | **80.0** 40.0–90.0 · 4.00 · – · – · 8000 |",
		"| 4 KiB random read, QD 32 | raw | 50 / 70 · 25.0 / 35.0 | failed: a/b | 50 / 70 · 6.2 / 8.8 |",
		"1 of 2 met.",
		"met     pinned, raw     4 KiB random read, QD 32, IOPS of engine to tgtd: asked ≥ 3.5, measured 4 (3–4)",
	} {
		if !strings.Contains(s.String(), want) {
			t.Errorf("the table lacks %q:\n%s", want, s.String())
		}
	}
	if strings.Contains(s.String(), "### Free") {
		t.Error("a placement that was not measured has a table")
	}
}
