// Package conformance runs Debian's iscsi-test-cu (libiscsi-bin) against a target and takes its
// report apart. The tests of this directory run it against our own engine; Run serves whoever
// wants the same figures of another target.
//
// It never judges a target by the suite's exit status, which is 0 whatever failed.
package conformance

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
)

// Outcome of one test.
type Outcome string

const (
	Passed  Outcome = "passed"
	Failed  Outcome = "failed"
	Skipped Outcome = "skipped"
	// Unfinished is a test during which the suite ended: a crash or a hang.
	Unfinished Outcome = "unfinished"
)

// Result of one test.
type Result struct {
	// Name is Suite.Test.
	Name    string
	Outcome Outcome
	// Reason is why it was skipped, or the first failed assertion.
	Reason string
	// Log is what the suite printed of it.
	Log string
}

// Tool is the program.
const Tool = "iscsi-test-cu"

// Run runs tests (ALL, or Family.Suite.Test) against url, with the same unit by another initiator
// as the second path. Flags are more options of the program.
func Run(ctx context.Context, url, tests string, flags ...string) ([]Result, error) {
	args := append(append([]string{"--dataloss", "-V"}, flags...), "-t", tests, url, url)
	cmd := exec.CommandContext(ctx, Tool, args...)
	out, err := cmd.CombinedOutput()
	results := Parse(out)
	if ctx.Err() != nil {
		return results, fmt.Errorf("conformance: %s %s: %w", Tool, tests, ctx.Err())
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return results, fmt.Errorf("conformance: %s: %w", Tool, err)
	}
	if len(results) == 0 {
		return nil, fmt.Errorf("conformance: %s %s ran no test: %s", Tool, tests, bytes.TrimSpace(out))
	}
	return results, nil
}

// Parse takes the suite's report apart.
func Parse(report []byte) (results []Result) {
	suite := ""
	var current *Result
	var log []string
	end := func() {
		if current != nil {
			current.Log = strings.Join(log, "\n")
			judge(current, log)
			results = append(results, *current)
			current = nil
		}
		log = nil
	}
	in := bufio.NewScanner(bytes.NewReader(report))
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		line := in.Text()
		if s, ok := strings.CutPrefix(line, "Suite: "); ok {
			end()
			suite = strings.TrimSpace(s)
			continue
		}
		if strings.HasPrefix(line, "Run Summary:") {
			end()
			continue
		}
		if s, ok := strings.CutPrefix(line, "  Test: "); ok {
			end()
			name, rest, _ := strings.Cut(s, " ...")
			current = &Result{Name: suite + "." + name}
			line = rest
		}
		log = append(log, line)
	}
	end()
	return results
}

func judge(r *Result, log []string) {
	r.Outcome = Unfinished
	for _, line := range log {
		t := strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "passed"), strings.HasSuffix(t, "...passed"):
			if r.Outcome == Unfinished {
				r.Outcome = Passed
			}
		case strings.HasPrefix(line, "FAILED"), strings.HasSuffix(t, "...FAILED"):
			r.Outcome = Failed
		case strings.Contains(t, "[SKIPPED]") && !strings.Contains(t, "Skipping assert"):
			if r.Outcome == Unfinished {
				r.Outcome = Skipped
				_, r.Reason, _ = strings.Cut(t, "[SKIPPED] ")
			}
		}
	}
	if r.Outcome != Failed {
		return
	}
	i := slices.IndexFunc(log, func(l string) bool { return strings.Contains(l, "    1. ") })
	if i >= 0 {
		r.Reason = strings.TrimSpace(log[i])
	}
}

// Count the results of an outcome.
func Count(results []Result, o Outcome) (n int) {
	for _, r := range results {
		if r.Outcome == o {
			n++
		}
	}
	return n
}
