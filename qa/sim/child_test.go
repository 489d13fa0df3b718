package sim

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"iter"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// Seeds run in child processes of this test, one for each processor, each with one processor and no preemption by time:
// that is what makes the order of goroutines follow from the seed. A child that panics or hangs costs the seed that
// it was at, and the parent knows which.

// report is a child's line.
type report struct {
	Seed   uint64
	Events int
	Err    string `json:",omitempty"`
	Trace  []string
	// The last line of a child that ran all of its seeds.
	Done   bool
	Counts Counts
}

const linePrefix = "sim-report "

// A seed takes milliseconds. It hangs when it computes for hangCPU without an end, or stands still for hangLimit: a machine
// with other work may give a child nothing for minutes.
const (
	hangCPU   = 20 * time.Second
	hangLimit = 10 * time.Minute
)

// cpuTime is what a process has computed so far (proc(5), stat, fields 14 and 15, in 1/100 s); 0 when it is gone.
func cpuTime(pid int) time.Duration {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:])) // the name may hold anything; field 3 is the first after it
	if len(fields) < 13 {
		return 0
	}
	user, _ := strconv.ParseInt(fields[11], 10, 64)
	system, _ := strconv.ParseInt(fields[12], 10, 64)
	return time.Duration(user+system) * 10 * time.Millisecond
}

// TestChild runs the seeds that the parent gave.
func TestChild(t *testing.T) {
	if *worker < 0 {
		t.Skip("not a child")
	}
	debug.SetGCPercent(200) // a limit of memory instead makes the runtime give pages back and take them again, for 1.7 times the time
	debug.SetMemoryLimit(1 << 30)
	out := bufio.NewWriter(os.Stdout)
	defer out.Flush()
	say := func(r report) {
		b, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(out, "\n%s%s\n", linePrefix, b)
	}
	o := options()
	var err error
	synctest.Test(t, func(*testing.T) { err = Prepare() })
	if err != nil {
		t.Fatal(err)
	}
	if *one != 0 {
		r := report{Seed: *one, Counts: Counts{}}
		if o.Keep, err = parseKeep(*keep); err != nil {
			t.Fatal(err)
		}
		o.Trace = func(format string, args ...any) { r.Trace = append(r.Trace, fmt.Sprintf(format, args...)) }
		oc := bubble(t, *one, o)
		r.Events, r.Counts = oc.Events, oc.Counts
		if oc.Err != nil {
			r.Err = oc.Err.Error()
		}
		say(r)
		return
	}
	progress, err := os.OpenFile(*note, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer progress.Close()
	total := Counts{}
	for i := range uint64(*seeds) {
		s := *first + i
		if i/2%uint64(*workers) != uint64(*worker) {
			continue // two at a time, so that each child gets as many of either world
		}
		if _, err := progress.WriteAt(fmt.Appendf(nil, "%20d", s), 0); err != nil {
			t.Fatal(err)
		}
		oc := bubble(t, s, o)
		total.Add(oc.Counts)
		if oc.Err != nil {
			say(report{Seed: s, Events: oc.Events, Err: oc.Err.Error()})
			return
		}
	}
	say(report{Done: true, Counts: total})
}

// bubble runs a seed in a bubble. What deadlocks there is an error.
func bubble(t *testing.T, seed uint64, o Options) (out Outcome) {
	defer func() {
		if p := recover(); p != nil {
			out.Err = fmt.Errorf("panic: %v", p)
		}
	}()
	synctest.Test(t, func(*testing.T) { out = Run(seed, o) })
	return out
}

// child starts this test again.
func child(t *testing.T, o Options, more ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := exec.Command(self, append([]string{"-test.run", "^TestChild$", "-test.timeout", "0", "-mutation", string(o.Mutation), "-world", string(o.World)}, more...)...)
	c.Env = append(os.Environ(), "GOMAXPROCS=1", "GODEBUG=asyncpreemptoff=1")
	return c
}

// replay1 runs one seed, in a child.
func replay1(t *testing.T, seed uint64, o Options, trace bool) report {
	t.Helper()
	k := ""
	if o.Keep != nil {
		k = formatKeep(o.Keep)
	}
	c := child(t, o, "-worker", "0", "-workers", "1", "-seed", strconv.FormatUint(seed, 10), "-keep", k)
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	limit := time.AfterFunc(hangLimit/4, func() { c.Process.Kill() })
	defer limit.Stop()
	err := c.Wait()
	r, ok := last(bytes.NewReader(out.Bytes()), err)
	if !ok {
		r = report{Seed: seed, Err: fmt.Sprintf("the process ended: %v: %s", err, panicOf(out.String()))}
	}
	if trace {
		for _, l := range r.Trace {
			t.Log(l)
		}
		for _, k := range sorted(r.Counts) {
			t.Logf("%10d %s", r.Counts[k], k)
		}
		if !ok {
			t.Log(out.String())
		}
	}
	return r
}

// last finds the last report in what a child printed.
func last(out io.Reader, _ error) (r report, ok bool) {
	s := bufio.NewScanner(out)
	s.Buffer(nil, 64<<20)
	for s.Scan() {
		if line, found := strings.CutPrefix(s.Text(), linePrefix); found {
			var n report
			if json.Unmarshal([]byte(line), &n) == nil {
				r, ok = n, true
			}
		}
	}
	return r, ok
}

// panicOf finds the line that says why a process died.
func panicOf(out string) string {
	for _, l := range strings.Split(out, "\n") {
		if strings.HasPrefix(l, "panic: ") || strings.HasPrefix(l, "fatal error: ") {
			return l
		}
	}
	return out[max(0, len(out)-300):]
}

// search runs n seeds from first on and returns what happened, and the lowest seed that fails.
func search(t *testing.T, first uint64, n int, o Options) (total Counts, bad *report) {
	t.Helper()
	total = Counts{}
	dir := t.TempDir()
	count := max(1, min(runtime.NumCPU(), n))
	type state struct {
		cmd  *exec.Cmd
		note string
		out  bytes.Buffer
		done chan error
	}
	var children []*state
	for i := range count {
		s := &state{note: filepath.Join(dir, strconv.Itoa(i)), done: make(chan error, 1)}
		if err := os.WriteFile(s.note, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		s.cmd = child(t, o, "-worker", strconv.Itoa(i), "-workers", strconv.Itoa(count), "-first", strconv.FormatUint(first, 10), "-seeds", strconv.Itoa(n), "-note", s.note)
		s.cmd.Stdout, s.cmd.Stderr = &s.out, &s.out
		if err := s.cmd.Start(); err != nil {
			t.Fatal(err)
		}
		children = append(children, s)
	}
	at := func(s *state) uint64 {
		b, _ := os.ReadFile(s.note)
		v, _ := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
		return v
	}
	var mu sync.Mutex // guards total, bad
	worst := func() uint64 {
		mu.Lock()
		defer mu.Unlock()
		if bad == nil {
			return 0
		}
		return bad.Seed
	}
	var wg sync.WaitGroup
	for _, s := range children {
		go func() { s.done <- s.cmd.Wait() }()
		wg.Go(func() {
			tick := time.NewTicker(100 * time.Millisecond)
			defer tick.Stop()
			seen, since, used, hung := uint64(0), time.Now(), time.Duration(0), false
			cpu := time.Duration(0)
			for {
				select {
				case err := <-s.done:
					r, ok := last(bytes.NewReader(s.out.Bytes()), err)
					mu.Lock()
					defer mu.Unlock()
					total.Add(r.Counts)
					if ok && r.Done || !ok && bad != nil && at(s) > bad.Seed {
						return
					}
					if !ok {
						r = report{Seed: at(s), Err: fmt.Sprintf("the process ended: %v: %s", err, panicOf(s.out.String()))}
						if hung {
							r.Err = fmt.Sprintf("no end after %v, of them %v computing", time.Since(since).Round(time.Second), cpu-used)
						}
					}
					if bad == nil || r.Seed < bad.Seed {
						bad = &r
					}
					return
				case <-tick.C:
				}
				now := at(s)
				cpu = cpuTime(s.cmd.Process.Pid)
				if now != seen {
					seen, since, used = now, time.Now(), cpu
				}
				hung = cpu-used > hangCPU || time.Since(since) > hangLimit
				if w := worst(); hung || w != 0 && now > w {
					s.cmd.Process.Kill()
				}
			}
		})
	}
	wg.Wait()
	return total, bad
}

// shortened is a failing run made as short as can be.
type shortened struct {
	keep []int
	last report
}

func (s *shortened) text() string {
	text := ""
	for _, l := range s.last.Trace {
		text += "\n    " + l
	}
	return text + "\n    " + s.last.Err
}

func shrink(t *testing.T, bad *report, o Options) *shortened {
	t.Helper()
	s := &shortened{last: *bad}
	events := bad.Events
	if events == 0 { // it panicked: how many there are is told by a run of none
		o.Keep = []int{}
		events = replay1(t, bad.Seed, o, false).Events
	}
	began := time.Now()
	s.keep = Shrink(events, 400, func(keep []int) bool {
		if time.Since(began) > time.Minute {
			return false
		}
		o.Keep = keep
		r := replay1(t, bad.Seed, o, false)
		if r.Err != "" {
			s.last = r
		}
		return r.Err != ""
	})
	return s
}

func keys(c Counts) iter.Seq[string] { return maps.Keys(c) }

func sorted(c Counts) []string { return slices.Sorted(keys(c)) }

func TestCPUTime(t *testing.T) {
	before := cpuTime(os.Getpid())
	for began := time.Now(); cpuTime(os.Getpid())-before < 50*time.Millisecond; {
		if time.Since(began) > time.Minute {
			t.Fatalf("%v after a minute of computing", cpuTime(os.Getpid())-before)
		}
	}
	if v := cpuTime(1 << 30); v != 0 {
		t.Errorf("no such process: %v", v)
	}
}
