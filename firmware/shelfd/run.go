package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/ledge-storage/ledge/firmware/control"
	"github.com/ledge-storage/ledge/firmware/ha"
	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/nvram/mirror"
	"github.com/ledge-storage/ledge/nvram/region"
	"github.com/ledge-storage/ledge/raid/drive"
	"github.com/ledge-storage/ledge/target/iscsi"
	"github.com/ledge-storage/ledge/target/spin"
)

// Exit codes: the contract with the supervisor (firmware/init).
const (
	exitOK      = 0 // told to stop
	exitConfig  = 1 // the configuration is wrong: a restart cannot help
	exitFailed  = ha.ExitFailed
	exitFenced  = ha.ExitFenced
	exitRefused = 4 // something that an operator must mend: restarted, slowly
)

// lastLimit bounds the end of the process, once ownership has ended.
const lastLimit = 10 * time.Second

// serve runs the controller until ctx ends or ownership asks for an end. Start-up, in order; what fails says so
// and undoes what came before:
//
//	events → region → mirror → drives → link → front → portal → API → driver
func serve(ctx context.Context, c *Config, out io.Writer) (code int, err error) {
	began := time.Now()
	events := control.NewEvents(512)
	log := slog.New(events.Handler(slog.NewTextHandler(out, &slog.HandlerOptions{Level: logLevels[c.LogLevel]})))
	log.Info("ledge: starting", "shelf", c.Shelf, "controller", c.Controller, "version", version)

	r, err := openRegion(c)
	if err != nil {
		return exitRefused, err
	}
	defer r.Close()
	if err := nvram.CheckIdentity(r, c.identity()); err != nil {
		if !errors.Is(err, nvram.ErrSwapped) {
			err = fmt.Errorf("%w (shelfd --config FILE --erase-nvram IDENTITY)", err)
		}
		return exitRefused, fmt.Errorf("nvram %s: %w", c.NVRAM.Path, err)
	}
	own, mirrored := nvram.Areas(r.Size())
	m, err := nvram.OpenMirror(r, mirrored)
	if err != nil {
		return exitRefused, fmt.Errorf("nvram %s: %w", c.NVRAM.Path, err)
	}
	if err := m.Damage(); err != nil {
		log.Warn("the mirror of the partner's log is damaged; it will be filled again", "err", err)
	}
	m.Identify(c.identity())
	if _, err := nvram.Inspect(r, own); errors.Is(err, nvram.ErrEmpty) && m.State() == (nvram.MirrorState{}) {
		log.Warn("NVRAM is empty: a new module, or one that lost its content", "path", c.NVRAM.Path)
	}
	log.Info("nvram open", "path", c.NVRAM.Path, "medium", r.Medium(), "bytes", r.Size(), "mirror_complete", m.State().Complete, "mirror_epoch", m.State().Epoch)

	self := ha.Controller(c.Controller[0])
	b := &backend{self: self, began: began, conf: c, log: log, region: r, own: own, mirror: m, gate: ha.NewGate(nil), tasks: newTasks(log)}
	b.drives = newDrives(c.Drives, func(path string) (port, error) {
		return drive.Open(path, drive.Options{Controller: c.Shelf + "." + c.Controller})
	}, log)
	defer b.drives.close()
	log.Info("drives open", "patterns", strings.Join(c.Drives, " "), "found", len(b.drives.scan()))

	b.front = newFront(self, targetName(c.Shelf), log)
	a := &api{b: b}
	a.driver, err = ha.New(ha.Options{Self: self, Members: b, Pool: b, Mirror: &haLink{b: b}, Gate: b.gate, Logger: log,
		LookInterval: 1500 * time.Millisecond, Changed: func(s ha.State) { announce(out, log, c, s) }})
	if err != nil {
		return exitFailed, err
	}
	b.lost, b.broken = a.driver.Lost, a.driver.Broken

	closeLink, err := startLink(ctx, c, b, a.driver)
	if err != nil {
		return exitRefused, err
	}
	defer closeLink()
	var services sync.WaitGroup
	defer services.Wait()
	closePortal, err := startPortal(ctx, c, b, a.driver, &services)
	if err != nil {
		return exitRefused, err
	}
	defer closePortal()
	closeAPI, err := startAPI(ctx, c, a, events, log, &services)
	if err != nil {
		return exitRefused, err
	}
	defer closeAPI()

	watching, unwatch := context.WithCancel(ctx)
	defer unwatch()
	services.Go(func() { a.hotplug(watching) })

	code = a.driver.Run(ctx)
	unwatch()
	// Whatever hangs below (a drive, an initiator), the process ends: a fenced owner must not linger.
	last := time.AfterFunc(lastLimit, func() {
		fmt.Fprintln(out, "shelfd: something hangs at the end; leaving it")
		os.Exit(code)
	})
	defer last.Stop()
	log.Info("ledge: stopped", "code", code, "after", uptime(began))
	return code, nil
}

// announce writes the line that people and the lab look for.
func announce(out io.Writer, log *slog.Logger, c *Config, s ha.State) {
	switch s.Phase {
	case ha.Owner:
		fmt.Fprintf(out, "ledge: serving role=owner epoch=%d portal=%s\n", s.Seen.Epoch, strings.Join(c.Portals[c.Controller], ","))
	case ha.Standby:
		fmt.Fprintf(out, "ledge: serving role=standby owner=%s epoch=%d\n", s.Seen.Owner, s.Seen.Epoch)
	case ha.NoPool:
		fmt.Fprintf(out, "ledge: serving role=no-pool; create one: POST /v1/pool\n")
	case ha.Refused:
		log.Error("this controller's NVRAM does not hold the pool's log: it cannot serve; order a takeover on the partner", "partner", s.Self.Partner().String())
	}
}

func openRegion(c *Config) (region.Region, error) {
	r, err := region.Open(c.NVRAM.Path, region.Options{Create: c.NVRAM.Size > 0, Size: c.NVRAM.Size, Kind: c.NVRAM.Kind, TrustPLP: c.NVRAM.TrustPLP})
	if err != nil {
		return nil, fmt.Errorf("nvram %s: %w", c.NVRAM.Path, err)
	}
	if r.Size() < minNVRAMBytes {
		r.Close()
		return nil, fmt.Errorf("nvram %s: %d bytes, at least %d are needed", c.NVRAM.Path, r.Size(), minNVRAMBytes)
	}
	return r, nil
}

// identity is whose the NVRAM must be.
func (c *Config) identity() nvram.Identity {
	return nvram.Identity{Shelf: c.Shelf, Controller: c.Controller[0]}
}

// eraseNVRAM empties the region, which must be as's.
func eraseNVRAM(c *Config, as string) error {
	r, err := openRegion(c)
	if err != nil {
		return err
	}
	return errors.Join(nvram.Erase(r, as), r.Close())
}

// startLink starts the link to the partner; its messages go to the driver and the front.
func startLink(ctx context.Context, c *Config, b *backend, d *ha.Driver) (stop func(), err error) {
	o := mirror.Options{Shelf: c.Shelf, Self: c.Controller[0], Secret: secretKey(c.Secret), Logger: b.log}
	if c.SpinMicros > 0 {
		o.Spinner = func() mirror.Spinner { return spin.Alone(time.Duration(c.SpinMicros) * time.Microsecond) }
	}
	transport, err := connections(ctx, c, &o)
	if err != nil {
		return nil, err
	}
	closeTransport := func() {
		if transport == nil {
			return
		}
		if err := transport.Close(); err != nil {
			b.log.Debug("mirror transport", "err", err)
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	owner := func() bool { st, _, _ := d.State(); return st.Phase == ha.Owner }
	pr := newPersist(ctx, b.front.t, func(ctx context.Context, kind string, body []byte) error { return b.link.Send(ctx, kind, body) }, owner, b.log)
	b.front.forward = pr.forward
	o.OnControl = func(kind string, body []byte) {
		switch kind {
		case msgLUNs:
			b.takeInventory(body, d)
		case msgPersist, msgPersisted:
			pr.take(kind, body)
		default:
			d.Message(kind, body)
		}
	}
	hello := make(chan struct{}, 1)
	o.OnPeer = func(p mirror.Peer) {
		b.front.partner(p.Connected)
		b.log.Info("mirror link", "connected", p.Connected, "transport", p.Transport)
		select {
		case hello <- struct{}{}:
		default:
		}
	}
	l, err := mirror.New(o)
	if err != nil {
		cancel()
		closeTransport()
		return nil, fmt.Errorf("mirror: %w", err)
	}
	b.link = linkTo{l, transport}
	// The LUNs are told to each partner that comes; not from its callback, which must not wait for itself.
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-hello:
				if st, _, _ := d.State(); st.Phase == ha.Owner && b.link.Connected() {
					b.publish()
				}
			case <-ctx.Done():
				return
			}
		}
	})
	b.log.Info("mirror link up", "listen", c.Mirror.Listen, "dial", c.Mirror.Dial, "window", c.Mirror.Window)
	return func() {
		cancel()
		wg.Wait()
		if err := l.Close(); err != nil {
			b.log.Debug("mirror link", "err", err)
		}
		closeTransport()
		pr.wait()
	}, nil
}

// takeInventory shows the owner's LUNs, unless we own them ourselves.
func (b *backend) takeInventory(body []byte, d *ha.Driver) {
	if st, _, _ := d.State(); st.Phase.Role() != "standby" && st.Phase != ha.Starting && st.Phase != ha.NoPool {
		return
	}
	inv, err := decodeInventory(body)
	if err != nil {
		b.log.Error("the partner's LUNs cannot be shown", "err", err)
		return
	}
	b.front.show(inv)
}

func startPortal(ctx context.Context, c *Config, b *backend, d *ha.Driver, wg *sync.WaitGroup) (stop func(), err error) {
	tag := uint16(1)
	if c.Controller == "B" {
		tag = 2
	}
	s, err := iscsi.NewServer(iscsi.Options{Logger: b.log, PortalGroupTag: tag, RelativePort: tag, Auth: c.auth, Spin: time.Duration(c.SpinMicros) * time.Microsecond, Portals: func(string) []string {
		var all []string
		for i, name := range []string{"A", "B"} {
			for _, p := range c.Portals[name] {
				all = append(all, fmt.Sprintf("%s,%d", p, i+1))
			}
		}
		return all
	}, Ready: func(string) error {
		st, _, _ := d.State()
		return b.front.ready(st.Phase)
	}})
	if err != nil {
		return nil, err
	}
	if err := s.AddTarget(b.front.t); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	l, err := listen(ctx, c.PortalListen)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("portal: %w", err), s.Close())
	}
	wg.Go(func() {
		if err := s.Serve(context.WithoutCancel(ctx), l); err != nil && !errors.Is(err, iscsi.ErrServerClosed) {
			b.log.Error("portal", "err", err)
		}
	})
	b.log.Info("iscsi portal listening", "addr", l.Addr().String(), "target", b.front.t.Name())
	return func() {
		if err := s.Close(); err != nil {
			b.log.Debug("portal", "err", err)
		}
	}, nil
}

func startAPI(ctx context.Context, c *Config, a *api, events *control.Events, log *slog.Logger, wg *sync.WaitGroup) (stop func(), err error) {
	s, err := control.NewServer(control.Options{Shelf: a, Events: events, Token: c.APIToken, Logger: log})
	if err != nil {
		return nil, err
	}
	l, err := listen(ctx, c.APIListen)
	if err != nil {
		return nil, fmt.Errorf("api: %w", err)
	}
	wg.Go(func() {
		if err := s.Serve(l); err != nil {
			log.Error("api", "err", err)
		}
	})
	log.Info("api listening", "addr", l.Addr().String())
	return func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		if err := s.Close(ctx); err != nil {
			log.Debug("api", "err", err)
		}
	}, nil
}
