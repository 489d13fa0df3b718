package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/ledge-storage/ledge/firmware/control"
)

// tasks are the long work that the API began: each a goroutine that ends with the ownership of the pool at the latest.
// What must go on under the next owner says so on the members; this is only who waits for it here.
type tasks struct {
	log *slog.Logger
	now func() time.Time

	mu   sync.Mutex // guards the rest
	next uint64
	list []*task // running ones, and the last keptTasks that ended; oldest first
	// stopping: nothing begins.
	stopping bool
	wg       sync.WaitGroup
}

const (
	maxTasks  = 16 // that run at once
	keptTasks = 16
)

type task struct {
	control.Task
	unitBytes int64 // of one unit
	cancel    context.CancelFunc
}

var errTaskStopped = errors.New("stopped")

func newTasks(log *slog.Logger) *tasks { return &tasks{log: log, now: time.Now} }

// report tells how far a task is.
type report func(done, total uint64)

// start begins f, unless the same work on the same subject runs already. unitBytes is what one unit is, in bytes.
func (t *tasks) start(kind, subject, unit string, unitBytes int64, f func(context.Context, report) (note string, err error)) (control.Task, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	running := 0
	for _, x := range t.list {
		if x.State != "running" {
			continue
		}
		running++
		if x.Kind == kind && x.Subject == subject {
			return control.Task{}, &control.Hint{Err: fmt.Errorf("%w: task %d, %s %s, runs already", control.ErrConflict, x.ID, kind, subject),
				Hint: "'ledge array show' and 'ledge pool show' tell how far it is"}
		}
	}
	if t.stopping || running >= maxTasks {
		return control.Task{}, fmt.Errorf("%w: %d tasks run, or the pool is being closed", control.ErrUnavailable, running)
	}
	ctx, cancel := context.WithCancel(context.Background())
	t.next++
	x := &task{Task: control.Task{ID: t.next, Kind: kind, Subject: subject, State: "running", Unit: unit, Started: t.now()}, unitBytes: unitBytes, cancel: cancel}
	t.list = append(t.list, x)
	t.trimList()
	t.wg.Go(func() {
		defer cancel()
		note, err := f(ctx, func(done, total uint64) {
			t.mu.Lock()
			defer t.mu.Unlock()
			x.Done, x.Total = done, total
		})
		t.end(ctx, x, note, err)
	})
	return x.Task, nil
}

func (t *tasks) end(ctx context.Context, x *task, note string, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.now()
	x.Ended, x.Note = &now, note
	switch {
	case err == nil:
		x.State = "done"
		x.Done = max(x.Done, x.Total)
	case ctx.Err() != nil:
		x.State = "stopped"
	default:
		x.State, x.Error = "failed", err.Error()
	}
	t.log.Info("task ended", "task", x.ID, "kind", x.Kind, "subject", x.Subject, "state", x.State, "note", note, "err", err)
	t.trimList()
}

// trimList forgets the oldest that ended; mu is held.
func (t *tasks) trimList() {
	ended := 0
	for _, x := range t.list {
		if x.State != "running" {
			ended++
		}
	}
	t.list = slices.DeleteFunc(t.list, func(x *task) bool {
		if x.State == "running" || ended <= keptTasks {
			return false
		}
		ended--
		return true
	})
}

// stop cancels all tasks and waits for them. Until resume nothing begins.
func (t *tasks) stop() {
	t.mu.Lock()
	t.stopping = true
	for _, x := range t.list {
		x.cancel()
	}
	t.mu.Unlock()
	t.wg.Wait()
}

func (t *tasks) resume() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.stopping = false
}

// of returns the tasks of these kinds, oldest first.
func (t *tasks) of(kinds ...string) []control.Task {
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []control.Task
	for _, x := range t.list {
		if slices.Contains(kinds, x.Kind) {
			c := x.Task
			if c.State == "running" {
				c.BytesPerSecond, c.SecondsLeft = speed(c.Done, c.Total, x.unitBytes, t.now().Sub(c.Started))
			}
			out = append(out, c)
		}
	}
	return out
}

// speed since the start, and the time left at it; nothing while there is nothing to tell it from.
func speed(done, total uint64, unitBytes int64, took time.Duration) (bytesPerSecond int64, secondsLeft *int64) {
	if done == 0 || took < time.Second {
		return 0, nil
	}
	perSecond := float64(done) / took.Seconds()
	if total >= done {
		left := int64(float64(total-done) / perSecond)
		secondsLeft = &left
	}
	return int64(perSecond * float64(unitBytes)), secondsLeft
}
