package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/ledge-storage/ledge/qa/bench/measure"
)

// A bed is a set of contestants on the same files. open makes them; what it opened ends with close.
type bed struct {
	name string
	open func(ctx context.Context, s settings, dir string) (*contest, error)
	dir  func(s settings) string
	asks []ask
}

// A contest is an open bed.
type contest struct {
	contestants []contestant
	// after, if not nil, gives verdicts and notes of what is no contest.
	after func() ([]Verdict, []string)
	close func() error
}

// A contestant is one side of a ratio.
type contestant struct {
	name string
	unit string // of what run returns
	// run works for about d and returns a rate, or a latency.
	run func(ctx context.Context, d time.Duration) (float64, error)
	// before, if not nil, makes ready, outside the clock.
	before func(ctx context.Context) error
}

// An ask is a bound on the ratio of one contestant's figure to another's.
type ask struct {
	what    string
	a, b    string
	bound   float64
	atMost  bool
	comment string
}

// A Figure is what one contestant did.
type Figure struct {
	Bed, Name, Unit string
	Value           measure.Spread
	Rounds          []float64
	// Cost is this process's CPU time for each MB or command, in µs, for each round: what a disturbed measurement changes least.
	Cost []float64
	// Others is what else ran on this machine and host meanwhile, in cores, for each round.
	Others []float64
}

// rate says whether the figure is one, and not a time.
func (f Figure) rate() bool { return f.Unit == "MB/s" || f.Unit == "IOPS" }

// A Verdict is what was measured of an ask.
type Verdict struct {
	Bed, What, Asked string
	Measured         measure.Spread
	Met              bool
	Note             string
}

var allBeds = []bed{
	{name: "array-shm", open: openArrayShm, dir: inShm, asks: arrayAsks},
	{name: "array-disk", open: openArrayDisk, dir: onDisk, asks: arrayAsks},
	{name: "path", open: openPathTCP, dir: inShm, asks: pathAsks},
	{name: "path-spin", open: openPathSpin, dir: inShm, asks: pathAsks},
	{name: "path-window", open: openPathWindow, dir: inShm, asks: pathAsks},
	{name: "hot", open: openHot, dir: inShm},
	{name: "rebuild", open: openRebuild, dir: inShm, asks: rebuildAsks},
}

func inShm(s settings) string  { return s.shm }
func onDisk(s settings) string { return s.disk }

// measure runs a bed and adds what it found to the report.
func (s settings) measure(ctx context.Context, b bed, r *Report) (err error) {
	dir, err := os.MkdirTemp(b.dir(s), "ledge-storage-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	c, err := b.open(ctx, s, dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	figures := make([]Figure, len(c.contestants))
	for i, x := range c.contestants {
		figures[i] = Figure{Bed: b.name, Name: x.name, Unit: x.unit}
	}
	for round := range s.rounds {
		for j := range c.contestants {
			i := (j + round) % len(c.contestants)
			if err := s.once(ctx, c.contestants[i], &figures[i]); err != nil {
				return fmt.Errorf("%s: %w", c.contestants[i].name, err)
			}
		}
	}
	for i := range figures {
		figures[i].Value = measure.SpreadOf(figures[i].Rounds)
	}
	r.Figures = append(r.Figures, figures...)
	r.Verdicts = append(r.Verdicts, judge(b, figures)...)
	if c.after != nil {
		verdicts, notes := c.after()
		r.Verdicts, r.Notes = append(r.Verdicts, verdicts...), append(r.Notes, notes...)
	}
	return nil
}

func (s settings) once(ctx context.Context, c contestant, f *Figure) error {
	if c.before != nil {
		if err := c.before(ctx); err != nil {
			return err
		}
	}
	own, all, begin := ownCPU(), measure.Now(), time.Now()
	v, err := c.run(ctx, s.seconds)
	if err != nil {
		return err
	}
	took, now := time.Since(begin).Seconds(), measure.Now()
	cpu := ownCPU() - own
	others := max(0, (now.Busy-all.Busy)+(now.Steal-all.Steal)-cpu) / took
	s.say("%-10s %-22s %10.1f %-5s others %3.0f %%\n", f.Bed, f.Name, v, f.Unit, 100*others)
	f.Rounds, f.Others = append(f.Rounds, v), append(f.Others, others)
	if f.rate() && v > 0 {
		f.Cost = append(f.Cost, 1e6*cpu/(v*took))
	}
	return ctx.Err()
}

// ownCPU is the CPU time of this process, in seconds.
func ownCPU() float64 {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()).Seconds()
}

func judge(b bed, figures []Figure) (verdicts []Verdict) {
	find := func(name string) Figure {
		i := slices.IndexFunc(figures, func(f Figure) bool { return f.Name == name })
		if i < 0 {
			panic("no contestant " + name)
		}
		return figures[i]
	}
	for _, a := range b.asks {
		x, y := find(a.a), find(a.b)
		v := Verdict{Bed: b.name, What: a.what, Measured: measure.SpreadOf(measure.Ratios(x.Rounds, y.Rounds)), Note: a.comment}
		if cost := measure.Ratios(x.Cost, y.Cost); len(cost) > 0 {
			v.Note = strings.TrimPrefix(fmt.Sprintf("%s; CPU time %.2f times the other's", v.Note, measure.SpreadOf(cost).Median), "; ")
		}
		if a.atMost {
			v.Asked, v.Met = fmt.Sprintf("≤ %g", a.bound), v.Measured.Median <= a.bound
		} else {
			v.Asked, v.Met = fmt.Sprintf("≥ %g", a.bound), v.Measured.Median >= a.bound
		}
		verdicts = append(verdicts, v)
	}
	return verdicts
}

// pump calls f from depth goroutines, at least once from each, with numbers that rise, until d has passed; f returns what it moved. pump returns the sum by
// the second.
func pump(ctx context.Context, depth int, d time.Duration, f func(worker, i int) (int, error)) (float64, error) {
	var (
		wg          sync.WaitGroup
		next, moved atomic.Int64
		failed      atomic.Pointer[error]
	)
	begin := time.Now()
	for w := range depth {
		wg.Go(func() {
			for first := true; (first || time.Since(begin) < d) && failed.Load() == nil && ctx.Err() == nil; first = false {
				n, err := f(w, int(next.Add(1)-1))
				if err != nil {
					failed.CompareAndSwap(nil, &err)
					return
				}
				moved.Add(int64(n))
			}
		})
	}
	wg.Wait()
	if err := failed.Load(); err != nil {
		return 0, *err
	}
	return float64(moved.Load()) / time.Since(begin).Seconds(), ctx.Err()
}

// megabytes makes a contestant's run of what pump does, in MB/s.
func megabytes(depth int, f func(worker, i int) (int, error)) func(context.Context, time.Duration) (float64, error) {
	return func(ctx context.Context, d time.Duration) (float64, error) {
		v, err := pump(ctx, depth, d, f)
		return v / 1e6, err
	}
}

// latency makes a contestant's run of the median time of f, in µs.
func latency(f func(i int) error) func(context.Context, time.Duration) (float64, error) {
	return func(ctx context.Context, d time.Duration) (float64, error) {
		var took []float64
		for begin, i := time.Now(), 0; (i == 0 || time.Since(begin) < d) && ctx.Err() == nil; i++ {
			t := time.Now()
			if err := f(i); err != nil {
				return 0, err
			}
			took = append(took, float64(time.Since(t).Nanoseconds())/1e3)
		}
		return measure.SpreadOf(took).Median, ctx.Err()
	}
}
