package mirror

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/nvram/nvramtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const block = nvram.BlockBytes

var (
	secret  = []byte("0123456789abcdef0123456789abcdef")
	testID  = nvram.ID{4, 2}
	logArea = nvram.Area{Size: (2 + 96 + 32) * block}
)

// pair is two controllers and a cable: A listens, B dials.
type pair struct {
	t       testing.TB
	a, b    *Link
	addr    string
	cable   *cable
	own     *nvramtest.Region // A's log
	other   *nvramtest.Region // B's mirror
	witness *nvramtest.Witness

	away atomic.Bool // B dials nobody

	mu       sync.Mutex
	controls []string
}

// cable can be cut: what it carried ends, and nothing connects until it is mended.
type cable struct {
	mu    sync.Mutex
	cut   bool
	conns map[net.Conn]struct{}
}

func (c *cable) dial(addr string) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) {
		c.mu.Lock()
		cut := c.cut
		c.mu.Unlock()
		if cut {
			return nil, errors.New("cable is cut")
		}
		var d net.Dialer
		nc, err := d.DialContext(ctx, "tcp", addr)
		if err != nil {
			return nil, err
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.cut {
			nc.Close()
			return nil, errors.New("cable is cut")
		}
		c.conns[nc] = struct{}{}
		return nc, nil
	}
}

func (c *cable) set(cut bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cut = cut
	if cut {
		for nc := range c.conns {
			nc.Close()
		}
		clear(c.conns)
	}
}

func options(self byte) Options {
	var spinner func() Spinner
	if self == 'A' { // so that both ways of reading are in all tests
		spinner = always(50 * time.Microsecond)
	}
	return Options{Shelf: "lab", Self: self, Secret: secret, Spinner: spinner, Heartbeat: 20 * time.Millisecond, Timeout: 2 * time.Second, Retry: 5 * time.Millisecond}
}

func newPair(t testing.TB) *pair {
	t.Helper()
	p := &pair{t: t, cable: &cable{conns: map[net.Conn]struct{}{}}, witness: &nvramtest.Witness{}}
	p.own = nvramtest.NewRegion(logArea.Size, 512, 1)
	p.other = nvramtest.NewRegion(logArea.Size, 512, 2)
	if err := nvram.Format(p.own, logArea, nvram.FormatOptions{ID: testID, Epoch: 3, UpdateBytes: 32 * block}); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p.addr = ln.Addr().String()
	o := options('A')
	o.Listener = ln
	p.a = start(t, o)
	o = options('B')
	o.Dial = p.cable.dial(p.addr)
	o.OnControl = func(kind string, body []byte) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.controls = append(p.controls, kind+"="+string(body))
	}
	p.b = start(t, o)
	return p
}

func start(t testing.TB, o Options) *Link {
	t.Helper()
	l, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func (p *pair) mirror() *nvram.Mirror {
	p.t.Helper()
	m, err := nvram.OpenMirror(p.other, logArea)
	if err != nil {
		p.t.Fatal(err)
	}
	return m
}

func (p *pair) open(o nvram.Options) *nvram.Log {
	p.t.Helper()
	o.ID, o.Epoch = testID, max(o.Epoch, 3)
	o.Replicator, o.Witness = p.a.Replicator(), p.witness
	l, err := nvram.Open(context.Background(), p.own, logArea, o)
	if err != nil {
		p.t.Fatal(err)
	}
	return l
}

func set(name uint64, blocks int) nvram.Set {
	b := make([]byte, blocks*block)
	for i := range b {
		b[i] = byte(name) ^ byte(i>>9)
	}
	return nvram.Set{Extents: []nvram.Extent{{LUN: 1, LBA: name, Blocks: uint32(blocks)}}, Payload: [][]byte{b}}
}

type replayer interface {
	Replay(func(uint64, nvram.Set) error) error
}

func names(t testing.TB, r replayer) map[uint64]bool {
	t.Helper()
	got := map[uint64]bool{}
	err := r.Replay(func(_ uint64, s nvram.Set) error {
		name := s.Extents[0].LBA
		got[name] = true
		if want := set(name, int(s.Extents[0].Blocks)); string(want.Payload[0]) != string(s.Payload[0]) {
			return fmt.Errorf("set %d differs", name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// until waits for a condition; the test's own timeout bounds it.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for i := 0; !ok(); i++ {
		if i > 20000 {
			t.Fatalf("never: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

func inSync(l *nvram.Log) func() bool {
	return func() bool { return l.Stats().Mirror == nvram.MirrorInSync }
}

func TestMirrorAndTakeover(t *testing.T) {
	p := newPair(t)
	m := p.mirror()
	p.b.Receive(m, 0)
	l := p.open(nvram.Options{})
	for i := uint64(1); i <= 300; i++ {
		lsn, err := l.Append(t.Context(), set(i, 1+int(i%5)))
		if err != nil {
			t.Fatal(err)
		}
		l.Trim(lsn)
	}
	if err := p.a.Send(t.Context(), "luns", []byte(`{"n":1}`)); err != nil {
		t.Fatal(err)
	}
	until(t, "control message", func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return len(p.controls) == 1 && p.controls[0] == `luns={"n":1}`
	})
	if pe := p.b.Peer(); !pe.Connected || pe.Controller != "A" || pe.Role != "owner" || pe.Epoch != 3 {
		t.Fatalf("%+v", pe)
	}
	p.own.Cut() // the owner dies
	p.b.StopReceiving()
	if solo, _ := p.witness.Solo(); solo || !m.Complete(testID, 3) || m.Complete(testID, 4) || m.Complete(nvram.ID{}, 3) {
		t.Fatal("the standby is not eligible")
	}
	if got := names(t, m); !got[300] {
		t.Fatalf("mirror holds %v", got)
	}
	// A standby that restarts knows as much.
	if m = p.mirror(); !m.Complete(testID, 3) || !names(t, m)[300] {
		t.Fatal("after a restart the standby is not eligible")
	}
	l.Close()
}

// Link cut, solo, resync while writing, in sync again, and what the standby may believe at each point.
func TestSoloAndResync(t *testing.T) {
	p := newPair(t)
	m := p.mirror()
	p.b.Receive(m, 0)
	l := p.open(nvram.Options{MirrorTimeout: 20 * time.Millisecond})
	defer l.Close()
	until(t, "in sync", inSync(l))
	name := uint64(0)
	add := func() {
		name++
		lsn, err := l.Append(t.Context(), set(name, 3))
		if err != nil {
			t.Fatal(err)
		}
		if name%10 == 0 {
			l.Trim(lsn - 5)
		}
	}
	for round := range 5 {
		add()
		p.cable.set(true)
		for range 40 * (round % 2) { // odd rounds: the tail passes what the mirror has
			add()
		}
		add()
		if solo, _ := p.witness.Solo(); !solo {
			t.Fatal("acknowledged alone, and the members do not say so")
		}
		if round == 2 { // the standby restarts meanwhile
			p.b.StopReceiving()
			m = p.mirror()
			p.b.Receive(m, 0)
		}
		p.cable.set(false)
		stop := make(chan struct{})
		var writer sync.WaitGroup
		writer.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					add()
				}
			}
		})
		until(t, "resync", func() bool { solo, _ := p.witness.Solo(); return !solo && inSync(l)() })
		close(stop)
		writer.Wait()
		until(t, "in sync at rest", inSync(l)) // a busy machine may have been too slow for the last write
		if s := m.State(); !s.Complete || s.Next != l.Stats().Next {
			t.Fatalf("round %d: mirror %+v, log %+v", round, s, l.Stats())
		}
	}
}

// A standby with another NVRAM is filled from nothing, and the members know before its content is void.
func TestEmptyStandby(t *testing.T) {
	p := newPair(t)
	p.b.Receive(p.mirror(), 0)
	l := p.open(nvram.Options{})
	defer l.Close()
	for i := uint64(1); i <= 10; i++ {
		if _, err := l.Append(t.Context(), set(i, 1)); err != nil {
			t.Fatal(err)
		}
	}
	p.b.StopReceiving()
	p.other.Load(nil)
	m := p.mirror()
	if m.Complete(testID, 3) {
		t.Fatal("an empty mirror believes that it is complete")
	}
	p.b.Receive(m, 0)
	until(t, "resync", func() bool { return m.Complete(testID, 3) && inSync(l)() })
	if entered, _ := p.witness.Counts(); entered == 0 {
		t.Fatal("the members were not told")
	}
	if got := names(t, m); len(got) != 10 {
		t.Fatal(got)
	}
}

func TestStaleOwner(t *testing.T) {
	p := newPair(t)
	p.b.Receive(p.mirror(), 9)
	p.witness.SetFail(errors.New("reservation conflict"), false)
	l := p.open(nvram.Options{MirrorTimeout: 50 * time.Millisecond})
	defer l.Close()
	until(t, "refusal", func() bool { return strings.Contains(p.a.Peer().Lost, "epoch") })
	if _, err := l.Append(t.Context(), set(1, 1)); !errors.Is(err, nvram.ErrClosed) {
		t.Fatalf("a stale owner's append: %v", err)
	}
}

// Who is not the partner gets no further than the handshake, and the partner does not notice.
func TestStrangers(t *testing.T) {
	p := newPair(t)
	m := p.mirror()
	p.b.Receive(m, 0)
	l := p.open(nvram.Options{})
	defer l.Close()
	until(t, "in sync", inSync(l))
	dial := func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", p.addr)
	}
	for want, change := range map[string]func(*Options){
		"wrong proof":       func(o *Options) { o.Secret = []byte("another secret, as long as it is") },
		`of shelf "lab"`:    func(o *Options) { o.Shelf = "other" },
		"controller A, too": func(o *Options) { o.Self = 'A' },
	} {
		o := options('B')
		change(&o)
		o.Dial = dial
		s := start(t, o)
		until(t, want, func() bool {
			return strings.Contains(s.Peer().Lost, want) || strings.Contains(s.Peer().Lost, "EOF") || strings.Contains(s.Peer().Lost, "reset")
		})
		if s.Peer().Connected {
			t.Fatal("a stranger is connected")
		}
		s.Close()
	}
	for range 20 {
		nc, err := dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(nc, "GET / HTTP/1.0\r\n\r\n")
		nc.Close()
	}
	if _, err := l.Append(t.Context(), set(1, 1)); err != nil {
		t.Fatal(err)
	}
	if entered, _ := p.witness.Counts(); entered != 0 || !inSync(l)() {
		t.Fatal("strangers disturbed the partner")
	}
}

func TestOptions(t *testing.T) {
	good := func() Options {
		o := options('A')
		o.Dial = func(context.Context) (net.Conn, error) { return nil, io.EOF }
		return o
	}
	for name, change := range map[string]func(*Options){
		"shelf":     func(o *Options) { o.Shelf = "" },
		"self":      func(o *Options) { o.Self = 'C' },
		"secret":    func(o *Options) { o.Secret = o.Secret[:8] },
		"transport": func(o *Options) { o.Dial = nil },
		"heartbeat": func(o *Options) { o.Heartbeat = o.Timeout },
	} {
		o := good()
		change(&o)
		if _, err := New(o); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
