package ha

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ledge-storage/ledge/target"
)

// slowDevice answers when told to.
type slowDevice struct {
	target.Device
	began, end chan struct{}
	lent       int
}

func (d *slowDevice) Read(context.Context, uint64, [][]byte) error {
	d.began <- struct{}{}
	<-d.end
	return nil
}

func (d *slowDevice) Space() target.Space { return target.Space{} }

// Fetch lends; the device counts what is lent.
func (d *slowDevice) Fetch(context.Context, uint64, int, [][]byte) ([][]byte, target.Loan, error) {
	d.Read(nil, 0, nil)
	d.lent++
	return [][]byte{{1}}, d, nil
}

func (d *slowDevice) Return() { d.lent-- }

func TestGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := NewGate(nil)
		d := &slowDevice{began: make(chan struct{}, 1), end: make(chan struct{}, 1)}
		dev := g.Device(d)
		read := func() error {
			d.end <- struct{}{}
			err := dev.Read(t.Context(), 0, nil)
			select {
			case <-d.began:
			default:
				<-d.end
			}
			return err
		}
		if err := read(); !errors.Is(err, target.ErrUnavailable) {
			t.Fatalf("shut gate: %v", err)
		}
		g.Open()
		g.Extend(g.Now() + 4*time.Second)
		if err := read(); err != nil {
			t.Fatalf("open gate: %v", err)
		}
		g.Quiesce()
		if err := read(); !errors.Is(err, target.ErrTransition) {
			t.Fatalf("quiesced gate: %v", err)
		}
		g.Open()
		g.Shut()
		if err := read(); !errors.Is(err, target.ErrUnavailable) {
			t.Fatalf("shut again: %v", err)
		}
		g.Seal()
		g.Open()
		if err := read(); !errors.Is(err, target.ErrUnavailable) {
			t.Fatalf("a sealed gate opened: %v", err)
		}
	})
}

// TestGateHoldsAnswers: what the device has answered leaves only while the lease lasts, whatever happened in between.
func TestGateHoldsAnswers(t *testing.T) {
	for _, c := range []struct {
		name string
		then func(*Gate)
		want error
	}{
		{"shut", (*Gate).Shut, target.ErrUnavailable},
		{"sealed", (*Gate).Seal, target.ErrUnavailable},
		{"quiesced", (*Gate).Quiesce, nil},
		{"stopped for a minute, then fenced", func(g *Gate) { time.Sleep(time.Minute); g.Seal() }, target.ErrUnavailable},
		{"stopped for a minute, confirmed late", func(g *Gate) {
			time.Sleep(time.Minute)
			go func() { time.Sleep(time.Second); g.Extend(g.Now() + time.Second) }()
		}, nil},
		{"stopped for a minute, never confirmed", func(g *Gate) { time.Sleep(time.Minute) }, target.ErrTransition},
		{"a confirmation that began before the stop", func(g *Gate) {
			began := g.Now()
			time.Sleep(time.Minute)
			g.Extend(began + 4*time.Second)
		}, target.ErrTransition},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := NewGate(nil)
				d := &slowDevice{began: make(chan struct{}), end: make(chan struct{})}
				g.Open()
				g.Extend(g.Now() + 4*time.Second)
				out := make(chan error, 1)
				go func() { out <- g.Device(d).Read(t.Context(), 0, nil) }()
				<-d.began
				c.then(g)
				close(d.end)
				if err := <-out; !errors.Is(err, c.want) {
					t.Fatalf("got %v, want %v", err, c.want)
				}
			})
			synctest.Test(t, func(t *testing.T) { // what may not leave is given back at once
				g := NewGate(nil)
				d := &slowDevice{began: make(chan struct{}), end: make(chan struct{})}
				g.Open()
				g.Extend(g.Now() + 4*time.Second)
				out := make(chan error, 1)
				go func() {
					parts, loan, err := g.Device(d).(target.Fetcher).Fetch(t.Context(), 0, 1, nil)
					if (err == nil) != (loan != nil && len(parts) == 1 && d.lent == 1) || err != nil && (loan != nil || len(parts) != 0 || d.lent != 0) {
						t.Errorf("%d pieces, loan %v, %d lent, %v", len(parts), loan, d.lent, err)
					}
					out <- err
				}()
				<-d.began
				c.then(g)
				close(d.end)
				if err := <-out; !errors.Is(err, c.want) {
					t.Fatalf("fetch: %v, want %v", err, c.want)
				}
			})
		})
	}
}
