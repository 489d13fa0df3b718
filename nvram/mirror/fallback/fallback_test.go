package fallback

import (
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ledge-storage/ledge/nvram/mirror/window"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// rig is the dialing side, with a partner on the window and one at TCP that are there or not.
type rig struct {
	*testing.T
	tr  *Transport
	w   *window.Window
	tcp bool
}

func newRig(t *testing.T) *rig {
	r := &rig{T: t, tcp: true}
	path := filepath.Join(t.TempDir(), "window")
	w, err := window.Open(window.Options{Path: path, Side: 'A', Create: true})
	if err != nil {
		t.Fatal(err)
	}
	r.w = w
	t.Cleanup(func() { w.Close() })
	r.tr = New(Options{Window: window.Options{Path: path, Side: 'B'}, Answer: 50 * time.Millisecond, Stable: time.Hour, Rest: time.Minute, MostRest: 5 * time.Minute,
		Dial: func(context.Context) (net.Conn, error) {
			if !r.tcp {
				return nil, errors.New("connection refused")
			}
			a, b := net.Pipe()
			t.Cleanup(func() { a.Close(); b.Close() })
			return a, nil
		}})
	t.Cleanup(func() { r.tr.Close() })
	return r
}

// dial makes a connection, tells that it is up, and names its transport.
func (r *rig) dial(there bool) (net.Conn, string) {
	r.Helper()
	if there {
		ctx, cancel := context.WithCancel(r.Context())
		done := make(chan net.Conn)
		go func() {
			c, _ := r.w.Dial(ctx)
			done <- c
		}()
		defer func() {
			cancel()
			if c := <-done; c != nil {
				c.Close()
			}
		}()
	}
	nc, err := r.tr.Dial(r.Context())
	if err != nil {
		return nil, err.Error()
	}
	r.tr.Up(nc)
	return nc, nc.RemoteAddr().Network()
}

func (r *rig) end(nc net.Conn, fault error) {
	nc.Close()
	r.tr.Down(nc, fault)
}

func (r *rig) want(got, want string) {
	r.Helper()
	if !strings.Contains(got, want) {
		r.Errorf("%s, want %s", got, want)
	}
}

// rested lets the window's rest pass, which must be of a length.
func (r *rig) rested(want time.Duration) {
	r.Helper()
	r.tr.mu.Lock()
	defer r.tr.mu.Unlock()
	if left := time.Until(r.tr.rest); left > want || left < want-10*time.Second {
		r.Errorf("it rests for %v, want %v", left, want)
	}
	r.tr.rest = time.Time{}
}

// A partner that comes after the window was tried, and before TCP is: the window is used, and has no strike.
func TestCameMeanwhile(t *testing.T) {
	r := newRig(t)
	ctx, cancel := context.WithCancel(t.Context())
	came := make(chan net.Conn)
	tcp := r.tr.o.Dial
	var left net.Conn
	r.tr.o.Dial = func(dialing context.Context) (nc net.Conn, err error) {
		go func() {
			c, _ := r.w.Dial(ctx)
			came <- c
		}()
		left, err = tcp(dialing)
		return left, err
	}
	nc, over := r.dial(false)
	r.want(over, "window")
	cancel()
	if c := <-came; c != nil {
		defer c.Close()
	}
	_ = left.SetWriteDeadline(time.Now()) // it fails, where it is closed
	if _, err := left.Write([]byte{1}); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("TCP's connection: %v", err)
	}
	if r.tr.strikes != 0 || !r.tr.Fallback().At.IsZero() {
		t.Errorf("%d strikes, %+v", r.tr.strikes, r.tr.Fallback())
	}
	r.end(nc, nil)
}

// A window that does not hold: the first short connection is forgiven, then it rests, twice as long each time.
func TestStrikes(t *testing.T) {
	r := newRig(t)
	nc, over := r.dial(true)
	r.want(over, "window")
	r.end(nc, errors.New("mirror: wrong proof"))
	nc, over = r.dial(true)
	r.want(over, "window")
	r.end(nc, errors.New("memory fault"))
	for i, rest := range []time.Duration{1, 2, 4, 5, 5} {
		nc, over = r.dial(true)
		r.want(over, "pipe") // though somebody is on the window
		r.end(nc, errors.New("mirror: wrong proof"))
		r.want(r.tr.Fallback().Reason, "memory fault")
		r.rested(rest * time.Minute)
		nc, over = r.dial(true)
		r.want(over, "window")
		r.end(nc, errors.New("memory fault"))
		if t.Failed() {
			t.Fatal("round", i)
		}
	}
	// While it rests and TCP has nobody either, it is better than nothing.
	r.tcp = false
	nc, over = r.dial(true)
	r.want(over, "window")
	// One that lasts clears all.
	r.tr.mu.Lock()
	r.tr.since = time.Now().Add(-2 * time.Hour)
	r.tr.mu.Unlock()
	r.end(nc, errors.New("mirror: wrong proof"))
	if r.tr.strikes != 0 {
		t.Error(r.tr.strikes, "strikes")
	}
}

// A partner that is away on both teaches nothing; one that is on TCP only does.
func TestPartnerAway(t *testing.T) {
	r := newRig(t)
	r.tcp = false
	for range 3 {
		_, err := r.dial(false)
		r.want(err, "refused")
	}
	if f := r.tr.Fallback(); r.tr.strikes != 0 || r.tr.resting() || !f.At.IsZero() {
		t.Errorf("%d strikes, %+v", r.tr.strikes, f)
	}
	r.tcp = true
	nc, over := r.dial(false)
	r.want(over, "pipe")
	r.want(r.tr.Fallback().Reason, "does not answer")
	r.end(nc, nil)
	r.rested(time.Minute)
	// The end of a connection by this side's own doing is no failure.
	// Nor is that the partner left, or died.
	for i := range 9 {
		nc, over = r.dial(true)
		r.want(over, "window")
		r.end(nc, []error{nil, window.ErrLost, window.ErrDead}[i%3])
	}
}

// While TCP is in use the window is asked from time to time, and what it gives is offered; what does not last comes back later each time.
func TestBack(t *testing.T) {
	r := newRig(t)
	r.tr.o.Back, r.tr.o.MostBack, r.tr.o.Rest, r.tr.o.MostRest = 50*time.Millisecond, 400*time.Millisecond, 1, 1
	tcp, over := r.dial(false)
	r.want(over, "pipe")
	ctx, cancel := context.WithCancel(t.Context())
	there := make(chan struct{})
	go func() { // the partner, on the window from now on
		defer close(there)
		for ctx.Err() == nil {
			if c, err := r.w.Dial(ctx); err == nil {
				stop := context.AfterFunc(ctx, func() { c.Close() })
				_, _ = io.Copy(io.Discard, c) // to its end
				stop()
				c.Close()
			}
		}
	}()
	defer func() { cancel(); <-there }()
	took := func() (net.Conn, time.Duration) {
		t.Helper()
		began := time.Now()
		select {
		case nc := <-r.tr.Better():
			return nc, time.Since(began)
		case <-time.After(time.Minute):
			t.Fatal("nothing better")
		}
		return nil, 0
	}
	nc, _ := took()
	r.end(nc, errors.New("mirror: wrong proof")) // TCP is in use still
	for _, least := range []time.Duration{100, 200, 400, 400} {
		nc, d := took()
		if d < (least-25)*time.Millisecond {
			t.Errorf("it came back after %v, want %v", d, least*time.Millisecond)
		}
		r.end(nc, errors.New("mirror: wrong proof"))
	}
	nc, _ = took()
	r.tr.Up(nc) // it takes the other's place
	r.end(tcp, nil)
	select {
	case nc := <-r.tr.Better():
		t.Errorf("%v is better than the window", nc.RemoteAddr())
	case <-time.After(time.Second):
	}
	r.tr.mu.Lock()
	r.tr.since = time.Now().Add(-time.Hour)
	r.tr.mu.Unlock()
	r.end(nc, errors.New("memory fault")) // but it lasted
	if r.tr.relapse != 0 {
		t.Error(r.tr.relapse, "relapses")
	}
	if nc, over = r.dial(false); over != "window" {
		t.Errorf("then over %s", over)
	}
	r.end(nc, nil)
}
