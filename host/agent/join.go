package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/ledge-storage/ledge/host/api"
)

const (
	joinTimeout = 10 * time.Second
	firstRetry  = 200 * time.Millisecond
	lastRetry   = 5 * time.Second
	maxLUN      = 1<<14 - 1
	maxPortals  = 16
)

// join registers the host at whichever controller owns the pool, and asks until one does: a shelf that
// boots, or whose operator has yet to say takeover, is waited for.
func (a *Agent) join(ctx context.Context) (api.Grant, error) {
	for retry := firstRetry; ; retry = min(2*retry, lastRetry) {
		g, err := a.joinOnce(ctx)
		if err == nil {
			return g, nil
		}
		a.trouble(fmt.Errorf("join the shelf: %w", err))
		if err := pause(ctx, retry); err != nil {
			return g, err
		}
	}
}

func (a *Agent) joinOnce(ctx context.Context) (g api.Grant, err error) {
	// The claim shuts out every agent that ran for this host before, wherever it runs: its commands have ended when
	// the answer comes, and the shelf refuses what it sends from then on.
	body := map[string]any{"claim": true, "initiator": a.cfg.Initiator, "journal_bytes": a.cfg.JournalBytes, "store_bytes": a.cfg.StoreBytes}
	var errs []error
	for _, address := range a.cfg.ShelfAPIs {
		c, err := api.New(address, a.cfg.ShelfToken)
		if err != nil {
			return g, err // checked with the configuration
		}
		one, cancel := context.WithTimeout(ctx, joinTimeout)
		g = api.Grant{}
		err = c.Do(one, http.MethodPut, "/v1/hosts/"+a.cfg.Name, body, &g)
		cancel()
		c.Close()
		if err == nil {
			err = checkGrant(g)
		}
		if err == nil {
			return g, nil
		}
		var e *api.Error
		if errors.As(err, &e) && e.Hint != "" {
			err = fmt.Errorf("%w (%s)", err, e.Hint)
		}
		errs = append(errs, fmt.Errorf("%s: %w", address, err))
	}
	return g, errors.Join(errs...)
}

// checkGrant refuses what an initiator could make nothing of.
func checkGrant(g api.Grant) error {
	if !initiatorName.MatchString(g.Target) || !initiatorName.MatchString(g.Initiator) || g.JournalLUN > maxLUN || g.StoreLUN > maxLUN || g.JournalLUN == g.StoreLUN || len(g.Portals) == 0 || len(g.Portals) > maxPortals {
		return fmt.Errorf("the shelf grants what cannot be used: %+v", g)
	}
	if c := g.CHAP; c != nil && (c.User == "" || c.Secret == "" || c.TargetSecret == "" || c.Secret == c.TargetSecret) {
		return errors.New("the shelf grants CHAP secrets that cannot be used")
	}
	for _, p := range g.Portals {
		if _, _, err := net.SplitHostPort(p); err != nil {
			return fmt.Errorf("the shelf grants portal %q: %w", p, err)
		}
	}
	return nil
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
