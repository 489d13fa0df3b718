package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/ledge-storage/ledge/qa/bench/measure"
)

// An Idle is what a target costs while sessions do nothing.
type Idle struct {
	Target string `json:"target"`
	// CPU is its share of a core with idleSessions logged in, over Seconds.
	CPU     float64 `json:"cpu"`
	Seconds float64 `json:"seconds"`
	// SessionBytes is the growth of its resident memory for each of manySessions; 0: it did not take as many.
	SessionBytes float64 `json:"session_bytes"`
	Error        string  `json:"error,omitempty"`
}

const (
	idleSessions = 100
	manySessions = 1000
)

// idleTargets are measured idle; the others are floors, or several processes.
var idleTargets = []string{"tgtd", "gotgt", "engine", "engine-spin"}

// idle measures names, each in a fresh process: their CPU time with idleSessions, all in the same seconds, and their memory with manySessions.
func (b *bench) idle(ctx context.Context, names []string, window time.Duration) (found []Idle, err error) {
	names = slices.DeleteFunc(slices.Clone(names), func(n string) bool { return !slices.Contains(idleTargets, n) })
	targets, err := b.startAll(ctx, "idle", names)
	defer func() { err = errors.Join(err, stopAll(targets)) }()
	if err != nil {
		return nil, err
	}
	found = make([]Idle, len(targets))
	sessions := make([]*idlers, len(targets))
	for i, t := range targets {
		found[i].Target = t.Name
		if sessions[i], err = b.logIn(ctx, t, idleSessions); err != nil {
			found[i].Error = err.Error()
		}
	}
	sleep(ctx, time.Second) // what logins leave to be done
	begin, before := time.Now(), make([]float64, len(targets))
	for i, t := range targets {
		before[i] = measure.CPUSeconds(t.Pid)
	}
	sleep(ctx, window)
	for i, t := range targets {
		found[i].Seconds = time.Since(begin).Seconds()
		found[i].CPU = (measure.CPUSeconds(t.Pid) - before[i]) / found[i].Seconds
		found[i].Error = join(found[i].Error, sessions[i].logOut())
	}
	for i, t := range targets {
		empty := measure.ResidentBytes(t.Pid)
		many, err := b.logIn(ctx, t, manySessions)
		if err == nil {
			found[i].SessionBytes = float64(measure.ResidentBytes(t.Pid)-empty) / manySessions
			err = many.logOut()
		}
		found[i].Error = join(found[i].Error, err)
		fmt.Fprintf(os.Stderr, "idle: %-12s %6.3f %% of a core, %6.1f KiB a session %s\n", t.Name, 100*found[i].CPU, found[i].SessionBytes/1024, found[i].Error)
	}
	return found, ctx.Err()
}

// idlers are sessions that a client holds open.
type idlers struct {
	cmd *exec.Cmd
	end func() error
	msg *strings.Builder
}

// logIn returns once n sessions are logged in to t.
func (b *bench) logIn(ctx context.Context, t Target, n int) (*idlers, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(b.dir, libiscsi), t.URL, "idle", strconv.Itoa(n))
	i := &idlers{cmd: cmd, msg: &strings.Builder{}}
	cmd.Stderr = i.msg
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	i.end = in.Close
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		return nil, fmt.Errorf("%d sessions: %w", n, errors.Join(err, i.logOut()))
	}
	return i, nil
}

// logOut ends the sessions: an error where the target ended one before.
func (i *idlers) logOut() error {
	if i == nil {
		return nil
	}
	_ = i.end() // also after the client is gone
	if err := i.cmd.Wait(); err != nil {
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(i.msg.String()))
	}
	return nil
}

func join(message string, err error) string {
	if err == nil {
		return message
	}
	return strings.TrimPrefix(message+"; "+err.Error(), "; ")
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
