package shelf

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ledge-storage/ledge/host/initiator"
	"github.com/ledge-storage/ledge/qa/verify"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		for _, p := range []*program{&binary, &agentBinary} {
			if p.dir != "" {
				os.RemoveAll(p.dir)
			}
		}
		os.Exit(code)
	}))
}

// program is built once for all tests.
type program struct {
	sync.Once
	dir, path string
	err       error
}

var binary program // shelfd

const (
	drives    = 12
	lunBytes  = 64 << 20
	testLimit = 10 * time.Minute
	target    = "iqn.2026-11.io.ledge:shelf.qa"
)

// build makes shelfd, the first time.
func build(t *testing.T) string {
	t.Helper()
	return binary.build(t, "./firmware/shelfd")
}

func (p *program) build(t *testing.T, args ...string) string {
	t.Helper()
	if testing.Short() {
		t.Skip("two processes and several takeovers")
	}
	p.Do(func() {
		if p.dir, p.err = os.MkdirTemp("", "ledge-qa-shelf"); p.err != nil {
			return
		}
		p.path = filepath.Join(p.dir, "program")
		cmd := exec.Command("go", append([]string{"build", "-o", p.path}, args...)...)
		cmd.Dir = filepath.Join("..", "..")
		if out, err := cmd.CombinedOutput(); err != nil {
			p.err = fmt.Errorf("go build: %w\n%s", err, out)
		}
	})
	if p.err != nil {
		t.Fatal(p.err)
	}
	return p.path
}

// rig is a shelf with a pool on A, a LUN, and a verified writer through both portals.
type rig struct {
	*testing.T
	*Shelf
	ctx context.Context
	dev *initiator.Device
	w   *verify.Writer

	stop context.CancelFunc
	over chan error
}

func start(t *testing.T) *rig { return startWith(t, Options{}) }

func startWith(t *testing.T, o Options) *rig {
	t.Parallel() // most of each test is waiting for leases and time-outs
	bin := build(t)
	ctx, cancel := context.WithTimeout(t.Context(), testLimit)
	t.Cleanup(cancel)
	o.Binary, o.Dir, o.Drives, o.DriveBytes, o.NVRAMBytes = bin, t.TempDir(), drives, 64<<20, 64<<20
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{T: t, Shelf: s, ctx: ctx}
	t.Cleanup(func() {
		r.rest()
		if r.dev != nil {
			r.dev.Close()
		}
		s.Close()
		if t.Failed() {
			for _, c := range []string{"A", "B"} {
				text, _ := os.ReadFile(s.Log(c))
				t.Logf("log of %s:\n%s", c, text)
			}
		}
	})
	r.up("A", "B")
	r.must(s.Wait(ctx, "A", "without pool", func(st Status) bool { return st.Role == "no-pool" }))
	r.call("A", "POST", "/v1/pool", nil)
	r.owner("A")
	r.standby("B")
	r.call("A", "POST", "/v1/luns", map[string]any{"name": "v", "size_bytes": lunBytes, "block_bytes": 4096})
	r.must(s.Wait(ctx, "B", "showing the LUN", func(st Status) bool { return len(st.LUNs) == 1 }))
	r.dev, err = initiator.Open(ctx, initiator.Config{Portals: []string{s.Portals["A"], s.Portals["B"]}, Target: target, LUN: 1, Initiator: "iqn.2026-11.io.ledge:qa",
		PingInterval: 500 * time.Millisecond, PingTimeout: time.Second, ProbeInterval: 200 * time.Millisecond, MaxBackoff: 500 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	if r.w, err = verify.New(verify.Options{Seed: 1, Bytes: lunBytes}); err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *rig) up(controllers ...string) {
	r.Helper()
	for _, c := range controllers {
		if err := r.Start(c); err != nil {
			r.Fatal(err)
		}
	}
}

func (r *rig) must(_ Status, err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

func (r *rig) call(c, method, path string, in any) {
	r.Helper()
	if _, err := r.Call(r.ctx, c, method, path, in, nil); err != nil {
		r.Fatal(err)
	}
}

func (r *rig) owner(c string) {
	r.Helper()
	r.must(r.Wait(r.ctx, c, "owner", func(st Status) bool { return st.Role == "owner" }))
}

func (r *rig) standby(c string) {
	r.Helper()
	r.must(r.Wait(r.ctx, c, "standby", func(st Status) bool { return st.Role == "standby" }))
}

func (r *rig) inSync(owner string) {
	r.Helper()
	r.must(r.Wait(r.ctx, owner, "in sync", func(st Status) bool {
		return st.Role == "owner" && st.Partner.Connected && st.Partner.Mirror == "in-sync"
	}))
}

// write starts the writer; rest stops it; more waits until n more writes were acknowledged.
func (r *rig) write() {
	ctx, cancel := context.WithCancel(r.ctx)
	r.stop, r.over = cancel, make(chan error, 1)
	go func() { r.over <- r.w.Run(ctx, r.dev) }()
}

func (r *rig) rest() {
	if r.stop == nil {
		return
	}
	r.stop()
	r.stop = nil
	if err := <-r.over; err != nil {
		r.Error("writer:", err)
	}
}

func (r *rig) more(n uint64) {
	r.Helper()
	for want := r.w.Acked() + n; r.w.Acked() < want; {
		select {
		case <-r.ctx.Done():
			r.Fatalf("no more writes are acknowledged: %d, wanted %d", r.w.Acked(), want)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// check stops the writer and reads everything back.
func (r *rig) check(when string) {
	r.Helper()
	r.rest()
	rep, err := r.w.Check(r.ctx, r.dev)
	if err != nil {
		r.Fatalf("%s: %v", when, err)
	}
	r.Logf("%s: %+v", when, rep)
}

// TestTakeovers: power losses of either controller, a planned takeover, a refused one, both lost at once.
func TestTakeovers(t *testing.T) { takeovers(start(t)) }

// TestTakeoversOverWindow is the same with the mirror link in shared memory.
func TestTakeoversOverWindow(t *testing.T) {
	r := startWith(t, Options{Window: true})
	r.linked("window")
	takeovers(r)
}

// linked waits until both controllers say that the mirror link is over a transport.
func (r *rig) linked(transport string) (b Status) {
	r.Helper()
	for _, c := range []string{"A", "B"} {
		st, err := r.Wait(r.ctx, c, "mirrored over "+transport, func(st Status) bool { return st.Partner.Connected && st.Partner.Transport == transport })
		r.must(st, err)
		b = st
	}
	return b
}

// TestWindowLost: the window dies under writes, the socket stands in, and the next connection after the window is back is through it.
func TestWindowLost(t *testing.T) {
	r := startWith(t, Options{Window: true})
	r.inSync("A")
	r.linked("window")
	r.write()
	r.more(100)
	info, err := os.Stat(r.Window())
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := errors.Join(os.Rename(r.Window(), r.Window()+".old"), os.Truncate(r.Window()+".old", 0), os.WriteFile(r.Window(), []byte("no window any more"), 0o600)); err != nil {
		t.Fatal(err)
	}
	st := r.linked("unix")
	t.Logf("over the socket after %v", time.Since(began))
	if st.Partner.Fallback == nil || !strings.Contains(st.Partner.Fallback.Reason, "too small") {
		t.Errorf("%+v", st.Partner)
	}
	r.more(100)
	r.inSync("A")
	if text, _ := os.ReadFile(r.Window()); string(text) != "no window any more" {
		t.Errorf("what is no window was written to: %d bytes", len(text))
	}
	if err := os.Truncate(r.Window(), 0); err != nil { // empty, and window_create
		t.Fatal(err)
	}
	r.more(100)
	time.Sleep(6 * time.Second)              // the one that listens looks again by then
	r.call("B", "POST", "/v1/takeover", nil) // a change of role is a new connection
	r.owner("B")
	r.standby("A")
	r.linked("window")
	r.more(100)
	r.inSync("B")
	r.check("the window lost and back")
	if now, err := os.Stat(r.Window()); err != nil || now.Size() != info.Size() {
		t.Error(now, err)
	}
}

func takeovers(r *rig) {
	r.write()
	r.more(100)
	r.Kill("B")
	r.more(100) // solo
	r.up("B")
	r.inSync("A")
	r.check("standby lost and back")

	r.write()
	r.more(100)
	r.Kill("A")
	r.call("B", "POST", "/v1/takeover", nil)
	r.more(100)
	r.check("owner lost, B took over")
	r.up("A")
	r.standby("A")
	r.inSync("B")

	r.write()
	r.more(100)
	r.call("A", "POST", "/v1/takeover", nil) // planned: B hands over
	r.owner("A")
	r.standby("B")
	r.more(100)
	r.inSync("A")
	r.check("handed over")

	// B's mirror becomes stale: it refuses, and says so.
	r.write()
	r.Kill("B")
	r.more(100)
	r.Kill("A")
	r.up("B")
	r.standby("B")
	code, err := r.Call(r.ctx, "B", "POST", "/v1/takeover", nil, nil)
	if code != 409 || !strings.Contains(err.Error(), "stale") {
		r.Fatalf("takeover on a stale mirror: %d %v", code, err)
	}
	r.up("A")
	r.owner("A")
	r.more(100)
	r.inSync("A")
	r.check("stale standby refused")

	r.write()
	r.more(100)
	r.Kill("A")
	r.Kill("B")
	r.up("A", "B")
	r.owner("A")
	r.more(100)
	r.check("both lost")
}

// TestHandovers: the pool goes to and fro under the writer, and both processes live through all of it.
func TestHandovers(t *testing.T) {
	r := start(t)
	r.write()
	for i := range 12 {
		to, from := "B", "A"
		if i%2 == 1 {
			to, from = from, to
		}
		r.more(20)
		r.call(to, "POST", "/v1/takeover", nil)
		r.owner(to)
		r.standby(from)
	}
	r.more(100)
	r.check("handed over twelve times")
}

// TestStoppedOwner: an owner that was stopped while another took over writes no byte when it goes on, and ends.
func TestStoppedOwner(t *testing.T) {
	r := start(t)
	r.write()
	r.more(200)
	if err := r.Signal("A", syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	r.call("B", "POST", "/v1/takeover", nil)
	r.more(200)
	r.check("taken over from a stopped owner")
	// B is idle now; wait until it has destaged, so that what changes on the drives is A's doing.
	before, err := r.Hash(drives)
	for same := 0; same < 3 && err == nil; {
		time.Sleep(time.Second)
		var now string
		if now, err = r.Hash(drives); now == before {
			same++
		} else {
			before, same = now, 0
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Signal("A", syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	code, err := r.Exit(r.ctx, "A")
	if err != nil || code != 3 {
		t.Fatalf("fenced owner ended with %d, %v; want 3", code, err)
	}
	if now, err := r.Hash(drives); err != nil || now != before {
		t.Fatalf("the fenced owner changed the drives (%v)", err)
	}
	r.up("A")
	r.standby("A")
	r.inSync("B")
	r.write()
	r.more(100)
	r.check("the fenced owner is standby")
}

// TestLostNVRAM: an owner that lost its NVRAM refuses; its partner, in sync, takes over; members may be missing.
func TestLostNVRAM(t *testing.T) {
	r := start(t)
	r.write()
	r.more(200)
	r.Kill("A")
	if err := os.Remove(r.NVRAM("A")); err != nil {
		t.Fatal(err)
	}
	r.up("A")
	r.must(r.Wait(r.ctx, "A", "refusing", func(st Status) bool { return st.Phase == "refused" }))
	if code, err := r.Call(r.ctx, "A", "POST", "/v1/takeover", nil, nil); code != 409 || !strings.Contains(err.Error(), "NVRAM") {
		t.Fatalf("takeover without the log: %d %v", code, err)
	}
	r.call("B", "POST", "/v1/takeover", nil)
	r.more(100)
	r.standby("A")
	r.inSync("B")
	r.check("owner lost its NVRAM")

	r.Kill("A")
	r.Kill("B")
	for i := range 2 {
		if err := os.Rename(r.Drive(i), r.Drive(i)+".gone"); err != nil {
			t.Fatal(err)
		}
	}
	r.up("A", "B")
	r.owner("B")
	r.write()
	r.more(100)
	r.check("two members gone")
}

// TestCrashInTakeover: the new owner dies at any moment of its takeover, and comes back; nothing is lost, and the
// operator's order, given again, succeeds.
func TestCrashInTakeover(t *testing.T) {
	r := start(t)
	r.write()
	r.more(200)
	r.Kill("A")
	for _, after := range []time.Duration{5 * time.Millisecond, 20 * time.Millisecond, 60 * time.Millisecond, 500 * time.Millisecond, 3 * time.Second} {
		order := make(chan struct{})
		go func() {
			defer close(order)
			r.Call(r.ctx, "B", "POST", "/v1/takeover", nil, nil) // it dies under us
		}()
		time.Sleep(after)
		r.Kill("B")
		<-order
		r.up("B")
		st, err := r.Wait(r.ctx, "B", "back", func(st Status) bool { return st.Role == "standby" || st.Role == "owner" })
		r.must(st, err)
		t.Logf("killed after %v: back as %s at epoch %d", after, st.Role, st.Epoch)
		if st.Role == "owner" {
			break
		}
	}
	r.call("B", "POST", "/v1/takeover", nil)
	r.owner("B")
	r.more(100)
	r.check("crashed in takeover")
	r.up("A")
	r.standby("A")
	r.inSync("B")
}

// TestTakerDies: who asked for the pool dies at any moment of the handover. The owner goes on by itself, or had handed over, and
// then an order brings the pool back to it; nothing is lost.
func TestTakerDies(t *testing.T) {
	r := start(t)
	r.write()
	r.inSync("A")
	served, handed := 0, 0
	for _, after := range []time.Duration{0, time.Millisecond, 3 * time.Millisecond, 6 * time.Millisecond, 10 * time.Millisecond, 20 * time.Millisecond, 50 * time.Millisecond} {
		r.more(100)
		order := make(chan struct{})
		go func() {
			defer close(order)
			r.Call(r.ctx, "B", "POST", "/v1/takeover", nil, nil) // it dies under us
		}()
		time.Sleep(after)
		r.Kill("B")
		<-order
		ctx, cancel := context.WithTimeout(r.ctx, 8*time.Second) // longer than the owner waits for who asked
		_, err := r.Wait(ctx, "A", "owner", func(st Status) bool { return st.Role == "owner" })
		cancel()
		if err == nil {
			served++
		} else {
			handed++
			r.up("B") // it may have claimed the pool before it died
			if _, err := r.Call(r.ctx, "A", "POST", "/v1/takeover", nil, nil); err != nil {
				r.must(r.Wait(r.ctx, "B", "owner", func(st Status) bool { return st.Role == "owner" }))
				r.inSync("B")
				r.call("A", "POST", "/v1/takeover", nil)
			}
			r.owner("A")
		}
		r.more(50)
		if err == nil {
			r.up("B")
		}
		r.standby("B")
		r.inSync("A")
	}
	r.check("the taker died")
	t.Logf("the owner went on %d times, and had handed over %d times", served, handed)
}

// TestStoppedStandby: the owner goes on alone when the standby stops, and is in sync again when it goes on.
func TestStoppedStandby(t *testing.T) {
	r := start(t)
	r.write()
	r.more(100)
	if err := r.Signal("B", syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	r.must(r.Wait(r.ctx, "A", "solo", func(st Status) bool { return st.Partner.Mirror == "solo" }))
	r.more(100)
	if err := r.Signal("B", syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	r.inSync("A")
	r.Kill("A")
	r.call("B", "POST", "/v1/takeover", nil)
	r.more(100)
	r.check("the standby was stopped, then took over")
	// A clean stop of everything.
	for _, c := range []string{"A", "B"} {
		if c == "A" {
			r.up("A")
			r.standby("A")
			r.inSync("B")
		}
		if err := r.Signal(c, syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if code, err := r.Exit(r.ctx, c); code != 0 || err != nil {
			t.Fatalf("controller %s told to stop: %d %v", c, code, err)
		}
	}
	r.up("A", "B")
	r.owner("B")
	r.standby("A")
	r.check("stopped and started")
}

// TestCreateOnBoth: two operators, one pool.
func TestCreateOnBoth(t *testing.T) {
	t.Parallel()
	bin := build(t)
	ctx, cancel := context.WithTimeout(t.Context(), testLimit)
	defer cancel()
	s, err := New(Options{Binary: bin, Dir: t.TempDir(), Drives: drives, DriveBytes: 64 << 20, NVRAMBytes: 64 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	codes := make(chan int, 2)
	for _, c := range []string{"A", "B"} {
		if err := s.Start(c); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []string{"A", "B"} {
		if _, err := s.Wait(ctx, c, "without pool", func(st Status) bool { return st.Role == "no-pool" }); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []string{"A", "B"} {
		go func() {
			code, err := s.Call(ctx, c, "POST", "/v1/pool", nil, nil)
			t.Logf("create on %s: %d %v", c, code, err)
			codes <- code
		}()
	}
	if a, b := <-codes, <-codes; a == 200 && b == 200 {
		t.Fatal("both controllers created a pool")
	}
	// Whoever failed, the shelf can be used: at worst after another order.
	if _, err := s.Wait(ctx, "A", "settled", func(st Status) bool { return st.Role == "owner" || st.Role == "standby" || st.Role == "no-pool" }); err != nil {
		t.Fatal(err)
	}
	s.Call(ctx, "A", "POST", "/v1/pool", map[string]any{"force": false}, nil)
	a, err := s.Wait(ctx, "A", "owner or standby", func(st Status) bool { return st.Role == "owner" || st.Role == "standby" })
	if err != nil {
		t.Fatal(err)
	}
	b, err := s.Wait(ctx, "B", "owner or standby", func(st Status) bool { return st.Role == "owner" || st.Role == "standby" })
	if err != nil {
		t.Fatal(err)
	}
	if (a.Role == "owner") == (b.Role == "owner") {
		t.Fatalf("A is %s, B is %s", a.Role, b.Role)
	}
}
