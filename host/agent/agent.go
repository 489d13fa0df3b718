package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/ledge-storage/ledge/host/api"
	"github.com/ledge-storage/ledge/host/store"
	"github.com/ledge-storage/ledge/target/iscsi"
	"github.com/ledge-storage/ledge/target/scsi"
)

// Options of New beyond the configuration.
type Options struct {
	Logger  *slog.Logger // nil: discard
	Version string
	// Open opens the engine; required. OpenStore is the real one.
	Open OpenEngine
	// CheckInterval is how often a serving engine is asked whether it still works; zero: 500 ms.
	CheckInterval time.Duration
	// Now is the time of day, for scheduled snapshots; nil: the machine's.
	Now func() time.Time
}

// closeTimeout bounds what a clean end may wait for the shelf: what is not packed then stays in the
// journal, and is replayed.
const closeTimeout = 20 * time.Second

// Agent is one running agent.
type Agent struct {
	cfg    Config
	opt    Options
	log    *slog.Logger
	open   OpenEngine
	server *iscsi.Server
	portal net.Listener
	apiL   net.Listener
	http   *http.Server

	// admin is the turn to change the set of volumes: one request at a time, held across I/O.
	admin chan struct{}

	mu      sync.Mutex
	phase   string
	since   time.Time
	failure error
	engine  Engine // nil unless serving
	// acceptLost is an operator's order for the next opening.
	acceptLost bool
	targets    map[string]*scsi.Target
	// schedules is how the scheduled snapshots do.
	schedules []api.Schedule
	tokens    *scsi.Tokens // of all volumes, so that a copy by token goes from one to another
}

// New binds the portal and the API's socket. Nothing else happens before Run.
func New(cfg Config, opt Options) (_ *Agent, err error) {
	if opt.Logger == nil {
		opt.Logger = slog.New(slog.DiscardHandler)
	}
	if opt.CheckInterval == 0 {
		opt.CheckInterval = 500 * time.Millisecond
	}
	if opt.Now == nil {
		opt.Now = time.Now
	}
	a := &Agent{cfg: cfg, opt: opt, log: opt.Logger, open: opt.Open, admin: make(chan struct{}, 1), phase: api.PhaseJoining, since: time.Now(), targets: map[string]*scsi.Target{}, tokens: scsi.NewTokens(nil)}
	if a.portal, err = net.Listen("tcp", cfg.Listen); err != nil {
		return nil, fmt.Errorf("portal: field \"listen\": value %q: %w", cfg.Listen, err)
	}
	if a.cfg.Portal == "" {
		a.cfg.Portal = a.portal.Addr().String()
	}
	if a.apiL, err = listenUnix(cfg.API); err != nil {
		a.portal.Close()
		return nil, fmt.Errorf("API: field \"api\": value %q: %w", cfg.API, err)
	}
	a.server, err = iscsi.NewServer(iscsi.Options{Logger: a.log.With("part", "iscsi"), Auth: cfg.CHAP.Auth, Spin: cfg.Spin, Portals: func(string) []string { return []string{a.cfg.Portal} }})
	if err != nil {
		a.portal.Close()
		a.apiL.Close()
		return nil, fmt.Errorf("iSCSI: %w", err)
	}
	a.http = &http.Server{Handler: a.handler(), ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, MaxHeaderBytes: 16 << 10, ErrorLog: slog.NewLogLogger(a.log.Handler(), slog.LevelDebug)}
	return a, nil
}

// listenUnix binds a socket that only its owner may use. A socket file that nobody listens on is what
// a killed agent left, and is replaced.
func listenUnix(path string) (net.Listener, error) {
	if info, err := os.Lstat(path); err == nil {
		if info.Mode()&os.ModeSocket == 0 {
			return nil, fmt.Errorf("exists and is no socket")
		}
		if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
			c.Close()
			return nil, fmt.Errorf("another agent listens there")
		}
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// Portal is the address at which initiators reach the volumes.
func (a *Agent) Portal() string { return a.cfg.Portal }

// Run serves until ctx ends, and returns nil then, with everything closed. It returns an error where going
// on would be wrong: the store belongs to another host now.
func (a *Agent) Run(ctx context.Context) error {
	serving, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := a.server.Serve(serving, a.portal); err != nil && serving.Err() == nil {
			a.log.Error("portal ended", "error", err)
		}
	})
	wg.Go(func() {
		if err := a.http.Serve(a.apiL); !errors.Is(err, http.ErrServerClosed) {
			a.log.Error("API ended", "error", err)
		}
	})
	var err error
	for retry := firstRetry; ctx.Err() == nil; retry = min(2*retry, lastRetry) {
		began := time.Now()
		if err = a.session(ctx); ctx.Err() != nil || errors.Is(err, store.ErrFenced) {
			break
		}
		if time.Since(began) > time.Minute {
			retry = firstRetry
		}
		a.trouble(err)
		pause(ctx, retry)
	}
	a.enter(api.PhaseClosing, nil, nil)
	stop()
	a.portal.Close()
	a.server.Close()
	shut, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if a.http.Shutdown(shut) != nil {
		a.http.Close()
	}
	wg.Wait()
	if ctx.Err() != nil && !errors.Is(err, store.ErrFenced) {
		return nil
	}
	return err
}

// session is one life of the engine: join, open, serve, close.
func (a *Agent) session(ctx context.Context) error {
	a.enter(api.PhaseJoining, nil, nil)
	grant, err := a.join(ctx)
	if err != nil {
		return err
	}
	a.log.Info("joined the shelf", "target", grant.Target, "portals", grant.Portals, "journal", grant.JournalLUN, "store", grant.StoreLUN)
	a.enter(api.PhaseOpening, nil, nil)
	a.mu.Lock()
	accept := a.acceptLost
	a.mu.Unlock()
	engine, err := a.open(ctx, grant, accept)
	if err != nil {
		return fmt.Errorf("open the store: %w", err)
	}
	a.mu.Lock()
	a.acceptLost = false // it is for one opening
	a.mu.Unlock()
	targets := map[string]*scsi.Target{}
	for _, v := range engine.Volumes() {
		t, err := a.export(engine, v.Name)
		if err != nil {
			// The others are served; this one can be deleted.
			a.log.Error("volume is not exported", "volume", v.Name, "error", err)
			continue
		}
		targets[v.Name] = t
	}
	a.log.Info("serving", "volumes", len(targets), "portal", a.cfg.Portal)
	a.enter(api.PhaseServing, engine, targets) // targets is a.mu's from here on
	schedule := a.newScheduler()
	for err == nil && ctx.Err() == nil {
		schedule.run(ctx, engine)
		pause(ctx, a.opt.CheckInterval)
		err = engine.Err()
	}
	a.enter(api.PhaseClosing, nil, nil)
	a.admin <- struct{}{} // a request that changes volumes ends first
	defer func() { <-a.admin }()
	a.mu.Lock()
	targets, a.targets = a.targets, map[string]*scsi.Target{}
	a.mu.Unlock()
	for _, t := range targets {
		a.server.RemoveTarget(t.Name())
	}
	end, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	if closeErr := engine.Close(end); closeErr != nil && err == nil {
		a.log.Warn("the store was not closed cleanly; its journal will be replayed", "error", closeErr)
	}
	return err
}

// enter changes the phase. engine is nil in all phases but serving.
func (a *Agent) enter(phase string, e Engine, targets map[string]*scsi.Target) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if phase != a.phase {
		a.since = time.Now()
	}
	a.phase, a.engine = phase, e
	if e != nil {
		a.targets, a.failure = targets, nil
	}
}

// trouble remembers and logs why things do not go on; the same reason is logged once.
func (a *Agent) trouble(err error) {
	if err == nil || errors.Is(err, context.Canceled) {
		return
	}
	a.mu.Lock()
	same := a.failure != nil && a.failure.Error() == err.Error()
	a.failure = err
	a.mu.Unlock()
	if !same {
		a.log.Warn("not serving", "error", err)
	}
}
