package mirror

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/nvram/mirror/fallback"
	"github.com/ledge-storage/ledge/nvram/mirror/window"
	"github.com/ledge-storage/ledge/nvram/nvramtest"
)

// newWindowPair is a pair that has a window beside its cable, at a path for each side.
func newWindowPair(t *testing.T, pathA, pathB string) (p *pair, ta, tb *fallback.Transport) {
	t.Helper()
	p = &pair{t: t, cable: &cable{conns: map[net.Conn]struct{}{}}, witness: &nvramtest.Witness{}}
	p.own, p.other = nvramtest.NewRegion(logArea.Size, 512, 1), nvramtest.NewRegion(logArea.Size, 512, 2)
	if err := nvram.Format(p.own, logArea, nvram.FormatOptions{ID: testID, Epoch: 3, UpdateBytes: 32 * block}); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p.addr = ln.Addr().String()
	with := func(fo fallback.Options) *fallback.Transport {
		fo.Rest, fo.Stable, fo.Back = 20*time.Millisecond, 200*time.Millisecond, 100*time.Millisecond
		tr := fallback.New(fo)
		t.Cleanup(func() { tr.Close() }) // after the link's
		return tr
	}
	ta = with(fallback.Options{Window: window.Options{Path: pathA, Side: 'A'}, Listener: ln})
	tb = with(fallback.Options{Window: window.Options{Path: pathB, Side: 'B'}, Dial: p.cable.dial(p.addr)})
	o := options('A')
	o.Listener, o.Watch = ta.Listen(), ta
	p.a = start(t, o)
	o = options('B')
	o.Watch, o.Better = tb, tb.Better()
	o.Dial = func(ctx context.Context) (net.Conn, error) {
		if p.away.Load() {
			return nil, errors.New("away")
		}
		return tb.Dial(ctx)
	}
	p.b = start(t, o)
	return p, ta, tb
}

const windowBytes = 1 << 20

func makeWindow(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "window")
	if err := os.WriteFile(path, make([]byte, windowBytes), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// over waits until both sides say that they are connected over a transport.
func (p *pair) over(transport string) {
	p.t.Helper()
	until(p.t, "connected over "+transport, func() bool {
		a, b := p.a.Peer(), p.b.Peer()
		return a.Connected && b.Connected && a.Transport == transport && b.Transport == transport && !a.Since.IsZero() && !b.Since.IsZero()
	})
}

func TestOverWindow(t *testing.T) {
	path := makeWindow(t)
	p, ta, tb := newWindowPair(t, path, path)
	p.over("window")
	p.b.Receive(p.mirror(), 0)
	l := p.open(nvram.Options{})
	defer l.Close()
	until(t, "in sync", inSync(l))
	p.over("window")
	m := p.mirror()
	for range 6 { // changes of role in short order, each the end of a connection
		p.b.StopReceiving()
		p.b.Receive(m, 0)
		until(t, "in sync", inSync(l))
		p.over("window")
	}
	if !ta.Fallback().At.IsZero() || !tb.Fallback().At.IsZero() {
		t.Errorf("%+v %+v: nothing stood in for the window", ta.Fallback(), tb.Fallback())
	}
}

// The window is not there, is another one, or something else: TCP stands in, and both sides say why. Once it is there the
// link goes through it, by itself.
func TestNoWindow(t *testing.T) {
	none := filepath.Join(t.TempDir(), "none")
	foreign := makeWindow(t)
	if err := os.WriteFile(foreign, append([]byte("an image"), make([]byte, windowBytes)...), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ a, b, saysA, saysB string }{
		"nowhere":      {none, none, "no such file", "no such file"},
		"A's only":     {makeWindow(t), none, "came over tcp", "no such file"},
		"not the same": {makeWindow(t), makeWindow(t), "came over tcp", "does not answer"},
		"foreign":      {foreign, foreign, "something else", "something else"},
	} {
		t.Run(name, func(t *testing.T) {
			p, ta, tb := newWindowPair(t, c.a, c.b)
			p.over("tcp")
			p.b.Receive(p.mirror(), 0)
			l := p.open(nvram.Options{})
			defer l.Close()
			until(t, "in sync", inSync(l))
			p.over("tcp")
			for _, x := range []struct {
				tr   *fallback.Transport
				says string
			}{{ta, c.saysA}, {tb, c.saysB}} {
				until(t, x.says, func() bool { return strings.Contains(x.tr.Fallback().Reason, x.says) })
			}
			if name != "nowhere" {
				return
			}
			defer os.Remove(none)
			if err := os.WriteFile(none, make([]byte, windowBytes), 0o600); err != nil {
				t.Fatal(err)
			}
			p.over("window")
			until(t, "in sync", inSync(l))
			if solo, _ := p.witness.Solo(); solo {
				t.Error("the log went solo for it")
			}
		})
	}
}

// The window dies under the writes of several hosts, again and again: each write goes on within seconds, none that was
// acknowledged is missing at the standby, and when the window is back the next connection is through it.
func TestWindowDies(t *testing.T) {
	path := makeWindow(t)
	p, ta, tb := newWindowPair(t, path, path)
	m := p.mirror()
	p.b.Receive(m, 0)
	l := p.open(nvram.Options{MirrorTimeout: 500 * time.Millisecond})
	defer l.Close()
	until(t, "in sync", inSync(l))
	var name, acked atomic.Uint64
	var longest atomic.Int64
	var writers sync.WaitGroup
	stop := make(chan struct{})
	for range 4 {
		writers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				began, n := time.Now(), name.Add(1)
				lsn, err := l.Append(t.Context(), set(n, 1+int(n%4)))
				if err != nil {
					t.Error(err)
					return
				}
				acked.Add(1)
				if took := int64(time.Since(began)); took > longest.Load() {
					longest.Store(took)
				}
				if lsn > 8 {
					l.Trim(lsn - 8)
				}
			}
		})
	}
	more := func() {
		t.Helper()
		want := acked.Load() + 200
		until(t, "writes go on", func() bool { return acked.Load() >= want })
	}
	for round := range 3 {
		p.over("window")
		more()
		began := time.Now()
		if err := os.Truncate(path, 0); err != nil {
			t.Fatal(err)
		}
		p.over("tcp")
		t.Logf("round %d: over TCP after %v", round, time.Since(began))
		more()
		until(t, "in sync over TCP", inSync(l))
		for _, tr := range []*fallback.Transport{ta, tb} {
			if f := tr.Fallback(); f.At.Before(began) || f.Reason == "" {
				t.Errorf("round %d: %+v", round, f)
			}
		}
		if err := os.Truncate(path, windowBytes); err != nil {
			t.Fatal(err)
		}
		p.over("window") // by itself, under the writes
		more()
	}
	close(stop)
	writers.Wait()
	t.Logf("%d writes, the longest %v", acked.Load(), time.Duration(longest.Load()))
	if d := time.Duration(longest.Load()); d > 5*time.Second {
		t.Errorf("a write took %v", d)
	}
	// What the log holds, which is all that was acknowledged and not trimmed, the standby has.
	until(t, "in sync", inSync(l))
	want := l.Stats().Next
	p.b.StopReceiving()
	if solo, _ := p.witness.Solo(); solo || !m.Complete(testID, 3) || m.State().Next != want {
		t.Fatalf("solo %t, mirror %+v, the log is at %d", solo, m.State(), want)
	}
	got := names(t, m)
	for n := name.Load() - 4; n <= name.Load(); n++ {
		if !got[n] {
			t.Errorf("write %d of %d was acknowledged and is not at the standby", n, name.Load())
		}
	}
}

// Both transports lead to the partner at once: the newest authenticated connection stays, whichever it is over, and the
// owner's log has one.
func TestNewestStays(t *testing.T) {
	path := makeWindow(t)
	p, _, _ := newWindowPair(t, path, path)
	m := p.mirror()
	p.b.Receive(m, 0)
	l := p.open(nvram.Options{})
	defer l.Close()
	until(t, "in sync", inSync(l))
	p.over("window")
	// The partner restarts and comes over TCP; of the old process nothing is known yet.
	p.away.Store(true)
	o := options('B')
	o.Dial = p.cable.dial(p.addr)
	b2 := start(t, o)
	until(t, "over TCP", func() bool { return p.a.Peer().Transport == "tcp" && b2.Peer().Connected })
	until(t, "the older one is over", func() bool { return !p.b.Peer().Connected })
	b2.Receive(m, 0) // the race detector finds it if the older one still writes
	until(t, "in sync", inSync(l))
	// And the other way about.
	m = p.mirror()
	p.b.StopReceiving()
	p.b.Receive(m, 0)
	p.away.Store(false)
	until(t, "over the window", func() bool { return p.a.Peer().Transport == "window" && p.b.Peer().Connected })
}
