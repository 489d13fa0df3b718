package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/spf13/cobra"
)

// Most of what is asked of a shelf only the controller that owns the pool can answer. It is found by asking both at
// once, so that a controller that hangs costs no time, and the answer "not the owner" is followed, so that a takeover
// in between does not matter.

// maxHops bounds how often an answer "ask the other" is followed.
const maxHops = 4

// owned sends one request to the owner and decodes its answer into out.
func (t *tool) owned(ctx context.Context, method, path string, in, out any) error {
	ctl, err := t.controllers()
	if err != nil {
		return err
	}
	for _, c := range ctl {
		defer c.client.Close()
	}
	at, err := findOwner(ctx, ctl)
	if err != nil {
		return err
	}
	for range maxHops {
		err = ctl[at].client.Do(ctx, method, path, in, out)
		next := follow(err, ctl, at)
		if next < 0 {
			break
		}
		at = next
	}
	if err != nil {
		return fmt.Errorf("controller %s: %w", ctl[at].Name, err)
	}
	return nil
}

// follow is the controller that an answer points to, or -1.
func follow(err error, ctl []controllerAPI, at int) int {
	var e *api.Error
	if !errors.As(err, &e) || e.Owner == "" || e.Owner == ctl[at].Name {
		return -1
	}
	for i, c := range ctl {
		if c.Name == e.Owner {
			return i
		}
	}
	return -1
}

// findOwner asks all at once and returns the first that says that it owns the pool.
func findOwner(ctx context.Context, ctl []controllerAPI) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	type answer struct {
		i int
		s controllerStatus
	}
	answers := make(chan answer, len(ctl))
	for i, c := range ctl {
		go func() { answers <- answer{i, status(ctx, c)} }()
	}
	list := make([]controllerStatus, len(ctl))
	for range ctl {
		a := <-answers
		if a.s.Status != nil && a.s.Status.Role == "owner" {
			return a.i, nil
		}
		list[a.i] = a.s
	}
	return 0, nobodyServes(list)
}

// status is one controller's answer, or why there is none.
func status(ctx context.Context, c controllerAPI) controllerStatus {
	out := controllerStatus{Controller: c.Name, Address: c.Address}
	var st api.Shelf
	err := c.client.Do(ctx, http.MethodGet, "/v1/status", nil, &st)
	switch {
	case errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil && err != nil:
		out.Error = fmt.Sprintf("no answer within %s: it hangs, or its machine is very busy", askTimeout)
	case err != nil:
		out.Error = err.Error()
	default:
		out.Status = &st
	}
	return out
}

// patience is how long a command that watches goes on without an answer: a takeover may be under way.
const patience = 2 * time.Minute

// poll calls look again and again until it says done, or fails for longer than a takeover takes. show hears what look
// has to say.
func (t *tool) poll(cmd *cobra.Command, look func(context.Context) (done bool, line string, err error)) error {
	w := &progress{w: cmd.ErrOrStderr(), live: t.tty && !t.json, every: 10 * time.Second}
	defer w.end()
	var failing time.Time
	for {
		done, line, err := look(cmd.Context())
		switch {
		case err == nil && done:
			w.show(line)
			return nil
		case err == nil:
			failing = time.Time{}
			w.show(line)
		case !passes(err) || !failing.IsZero() && time.Since(failing) > patience:
			return err
		case failing.IsZero():
			failing = time.Now()
		}
		select {
		case <-cmd.Context().Done():
			return hinted{errors.New("stopped watching"), "the work goes on in the shelf"}
		case <-time.After(t.pause):
		}
	}
}

// passes says that an error may be over soon: nobody answers, or nobody owns the pool now.
func passes(err error) bool {
	var e *api.Error
	if errors.As(err, &e) {
		return e.Status == http.StatusServiceUnavailable || e.Owner != ""
	}
	var final finalError
	return !errors.As(err, &final)
}

// finalError ends a poll at once.
type finalError struct{ error }

func (f finalError) Unwrap() error { return f.error }
