// Storage compares the shelf's storage, raid and the path of a write, with bare programs that move the same bytes, in one run,
// alternating, and holds it against what is asked of it (issue 4, "Speed").
//
// Usage:
//
//	go run ./qa/bench/storage [-quick] [-seconds 0.5] [-rounds 7] [-beds REGEXP] [-disk DIR] [-json FILE]
//
// Beds. A bed is a set of contestants that share files, in this one process (bed.go). In each round of a bed each contestant
// runs once, in an order that turns from round to round. A figure is the median of its rounds, with the least and the greatest; a
// ratio is the median of the rounds' ratios, each of two measurements of the same round.
//
//	array-shm   8+2 over twelve files in /dev/shm (array.go)
//	array-disk  the same with O_DIRECT in -disk
//	path        4 KiB writes through a LUN, the log and its mirror over TCP on 127.0.0.1, all in /dev/shm (path.go)
//	path-spin   the same where the link looks for the next message before it sleeps
//	path-window the same through shared memory
//	hot         4 KiB overwrites of a hot 256 MiB, and what reaches the members of them (hot.go)
//	rebuild     a member's rebuild among 24 and among 10 simulated drives (rebuild.go)
//
// The bare programs do what a system call must: they write slot images that were made before ("bare"), or
// make them, parity and checksums, from the same data ("bare+codec"). They use the array's own files, offsets and sizes
// of I/O, and a goroutine for each member as many at a time as the array is asked for.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// A Report is all that a run found.
type Report struct {
	Date     string    `json:"date"`
	Commit   string    `json:"commit"`
	Cores    int       `json:"cores"`
	Go       string    `json:"go"`
	Seconds  float64   `json:"seconds"`
	Rounds   int       `json:"rounds"`
	Figures  []Figure  `json:"figures"`
	Verdicts []Verdict `json:"verdicts"`
	Notes    []string  `json:"notes"`
}

// settings are the flags, and sizes that the test makes small.
type settings struct {
	shm, disk string // directories
	seconds   time.Duration
	rounds    int
	slots     int   // of each member of an array
	logBytes  int64 // of the path's NVRAM regions
	hotBytes  int64
	rebuildMB int // bytes of each simulated drive, in MB
	say       func(format string, args ...any)
}

func main() {
	s := settings{shm: "/dev/shm", slots: 100, logBytes: 512 << 20, hotBytes: 256 << 20, rebuildMB: 24,
		say: func(format string, args ...any) { fmt.Fprintf(os.Stderr, format, args...) }}
	quick := flag.Bool("quick", false, "0.2 s a measurement, 3 rounds")
	seconds := flag.Float64("seconds", .5, "seconds a measurement")
	flag.IntVar(&s.rounds, "rounds", 7, "measurements of each contestant")
	beds := flag.String("beds", "", "only the beds whose names match this expression")
	flag.StringVar(&s.disk, "disk", os.TempDir(), "a directory of a file system that takes O_DIRECT, for array-disk")
	file := flag.String("json", "", "also write the report to this file")
	flag.Parse()
	if *quick {
		*seconds, s.rounds = .2, 3
	}
	s.seconds = time.Duration(*seconds * float64(time.Second))
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, s, *beds, *file); err != nil {
		fmt.Fprintln(os.Stderr, "storage:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, s settings, beds, file string) error {
	filter, err := regexp.Compile(beds)
	if err != nil {
		return fmt.Errorf("-beds: %w", err)
	}
	if s.seconds <= 0 || s.rounds < 1 {
		return errors.New("-seconds and -rounds are above 0")
	}
	r := Report{Date: time.Now().Format(time.DateOnly), Cores: runtime.NumCPU(), Go: runtime.Version(), Seconds: s.seconds.Seconds(), Rounds: s.rounds}
	commit, _ := exec.CommandContext(ctx, "git", "describe", "--always", "--dirty").Output() // empty outside a checkout
	r.Commit = strings.TrimSpace(string(commit))
	for _, b := range allBeds {
		if !filter.MatchString(b.name) {
			continue
		}
		if err := s.measure(ctx, b, &r); err != nil {
			return fmt.Errorf("%s: %w", b.name, err)
		}
	}
	table(os.Stdout, r)
	if file == "" {
		return nil
	}
	j, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(j, '\n'), 0o644)
}
