package mirror

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/nvram/nvramtest"
)

// counted is a connection that counts what was written, and whose reads can be stopped.
type counted struct {
	net.Conn
	sent *atomic.Int64
	gate *gate
}

func (c *counted) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.sent.Add(int64(n))
	return n, err
}

func (c *counted) Read(p []byte) (int, error) {
	c.gate.wait()
	return c.Conn.Read(p)
}

// gate is open or shut.
type gate struct {
	mu   sync.Mutex
	shut chan struct{} // nil: open
}

func (g *gate) set(shut bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if shut && g.shut == nil {
		g.shut = make(chan struct{})
	} else if !shut && g.shut != nil {
		close(g.shut)
		g.shut = nil
	}
}

func (g *gate) wait() {
	g.mu.Lock()
	c := g.shut
	g.mu.Unlock()
	if c != nil {
		<-c
	}
}

type countedListener struct {
	net.Listener
	sent *atomic.Int64
}

func (l *countedListener) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &counted{nc, l.sent, &gate{}}, nil
}

// flowRig is a pair whose log has room for a backlog, the owner's bytes counted, the standby's reads under a gate.
type flowRig struct {
	t         *testing.T
	own       *nvramtest.Region
	other     *nvramtest.Region
	area      nvram.Area
	a, b      *Link
	sent      atomic.Int64
	standby   gate
	witness   nvramtest.Witness
	m         *nvram.Mirror
	log       *nvram.Log
	appended  uint64
	connected atomic.Bool // the standby dials only then
	holding   atomic.Pointer[chan struct{}]
	slow      atomic.Int64 // nanoseconds a byte of the standby's region
}

func newFlowRig(t *testing.T, window int64, o nvram.Options) *flowRig {
	t.Helper()
	r := &flowRig{t: t, area: nvram.Area{Size: 16 << 20}}
	hold := func(_ int64, n int) {
		if h := r.holding.Load(); h != nil && n > block { // a frame, not a superblock
			<-*h
		}
		time.Sleep(time.Duration(int64(n) * r.slow.Load()))
	}
	r.own, r.other = nvramtest.NewRegion(r.area.Size, 512, 1), nvramtest.NewRegion(r.area.Size, 512, 2)
	r.other.Hold = hold
	if err := nvram.Format(r.own, r.area, nvram.FormatOptions{ID: testID, Epoch: 3, UpdateBytes: 32 * block}); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	oa, ob := options('A'), options('B')
	oa.Timeout, ob.Timeout = 20*time.Second, 20*time.Second
	oa.Window = window
	oa.Listener = &countedListener{ln, &r.sent}
	ob.Dial = func(ctx context.Context) (net.Conn, error) {
		if !r.connected.Load() {
			return nil, errors.New("not yet")
		}
		nc, err := new(net.Dialer).DialContext(ctx, "tcp", ln.Addr().String())
		if err != nil {
			return nil, err
		}
		return &counted{nc, new(atomic.Int64), &r.standby}, nil
	}
	r.a, r.b = start(t, oa), start(t, ob)
	if r.m, err = nvram.OpenMirror(r.other, r.area); err != nil {
		t.Fatal(err)
	}
	r.b.Receive(r.m, 0)
	o.ID, o.Epoch, o.Replicator, o.Witness = testID, 3, r.a.Replicator(), &r.witness
	if r.log, err = nvram.Open(t.Context(), r.own, r.area, o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.standby.set(false); r.log.Close() })
	return r
}

func (r *flowRig) add(blocks int) {
	r.t.Helper()
	r.appended++
	if _, err := r.log.Append(r.t.Context(), set(r.appended, blocks)); err != nil {
		r.t.Fatal(err)
	}
}

// holdFrames stops the standby's region at the next frame, until the function that it returns is called.
func (r *flowRig) holdFrames() (release func()) {
	hold := make(chan struct{})
	r.holding.Store(&hold)
	return sync.OnceFunc(func() {
		r.holding.Store(nil)
		close(hold)
	})
}

// What is on its way to a standby that takes nothing is bounded by the window, whatever waits behind it.
func TestWindow(t *testing.T) {
	const window = 512 << 10
	r := newFlowRig(t, window, nvram.Options{MirrorTimeout: 10 * time.Millisecond})
	for range 100 { // 6.4 MiB, alone
		r.add(15)
	}
	release := r.holdFrames()
	defer release()
	r.connected.Store(true)
	until(t, "the first frames", func() bool { return r.sent.Load() > window/2 })
	seen := int64(0)
	for range 50 { // it has all the time that it wants
		time.Sleep(5 * time.Millisecond)
		seen = max(seen, r.sent.Load())
	}
	if most := int64(window + 64<<10); seen > most {
		t.Fatalf("%d bytes are on their way, at most %d may be", seen, most)
	}
	release()
	until(t, "in sync", inSync(r.log))
	if got := names(t, r.m); len(got) != 100 {
		t.Fatalf("%d sets in the mirror", len(got))
	}
}

// A frame is acknowledged when it is durable, and not while it is being written: of one alone, and of many that queue.
func TestAckIsDurable(t *testing.T) {
	for _, writers := range []int{1, 12} {
		r := newFlowRig(t, 0, nvram.Options{MirrorTimeout: time.Minute})
		r.connected.Store(true)
		r.add(1)
		until(t, "in sync", inSync(r.log))
		release := r.holdFrames()
		defer release()
		var acked atomic.Int64
		var wg sync.WaitGroup
		before := r.sent.Load()
		for i := range writers {
			wg.Go(func() {
				if _, err := r.log.Append(t.Context(), set(uint64(100+i), 2)); err != nil {
					t.Error(err)
				}
				acked.Add(1)
			})
		}
		until(t, "the frames are sent", func() bool { return r.sent.Load() > before+block })
		time.Sleep(200 * time.Millisecond)
		if n := acked.Load(); n != 0 {
			t.Fatalf("%d of %d writes were acknowledged before the standby had one", n, writers)
		}
		release()
		wg.Wait()
	}
}

// A frame larger than the window goes alone.
func TestFrameLargerThanWindow(t *testing.T) {
	r := newFlowRig(t, 64<<10, nvram.Options{})
	r.connected.Store(true)
	for range 8 {
		r.add(200)
		r.add(1)
	}
	until(t, "in sync", inSync(r.log))
	if got := names(t, r.m); len(got) != 16 {
		t.Fatalf("%d sets in the mirror", len(got))
	}
}

// While a returned standby is brought current, writers go on.
func TestWritersGoOnDuringResync(t *testing.T) {
	r := newFlowRig(t, 256<<10, nvram.Options{MirrorTimeout: 10 * time.Millisecond})
	for range 100 {
		r.add(15)
	}
	r.slow.Store(50) // 20 MB/s
	r.connected.Store(true)
	until(t, "resync", func() bool { return r.log.Stats().Mirror == nvram.MirrorResync })
	during := 0
	for r.log.Stats().Mirror == nvram.MirrorResync && during < 200 {
		r.add(1)
		during++
	}
	if during < 20 {
		t.Fatalf("%d writes during the resync of 6.4 MB at 20 MB/s", during)
	}
	until(t, "in sync", func() bool { solo, _ := r.witness.Solo(); return !solo && inSync(r.log)() })
	if got := names(t, r.m); len(got) != 100+during {
		t.Fatalf("%d sets in the mirror, %d appended", len(got), r.appended)
	}
}

// A partner that neither reads nor answers costs the writers MirrorTimeout, once; not their writes.
func TestHungPartner(t *testing.T) {
	r := newFlowRig(t, 0, nvram.Options{MirrorTimeout: 50 * time.Millisecond})
	r.connected.Store(true)
	r.add(1)
	until(t, "in sync", inSync(r.log))
	r.standby.set(true)
	r.add(1) // what the standby reads now stays unread
	var writers sync.WaitGroup
	for w := range 8 {
		writers.Go(func() {
			for i := range 20 {
				if _, err := r.log.Append(t.Context(), set(uint64(1000+100*w+i), 1+i%4)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	writers.Wait()
	if solo, _ := r.witness.Solo(); !solo {
		t.Fatal("acknowledged alone, and the members do not say so")
	}
	r.standby.set(false)
	until(t, "in sync again", func() bool { solo, _ := r.witness.Solo(); return !solo && inSync(r.log)() })
	if got := names(t, r.m); len(got) != 2+160 {
		t.Fatalf("%d sets in the mirror", len(got))
	}
}
