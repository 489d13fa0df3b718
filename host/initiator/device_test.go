package initiator

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/host/initiator/faketarget"
	"github.com/ledge-storage/ledge/host/initiator/iscsi"
	"github.com/ledge-storage/ledge/target"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t *testing.T, s *faketarget.Shelf, portals ...string) *Device {
	t.Helper()
	if portals == nil {
		portals = s.Portals()
	}
	d, err := Open(context.Background(), Config{
		Portals: portals, Target: faketarget.Target, LUN: faketarget.LUN, Initiator: "iqn.2026-11.test:host",
		PingInterval: 30 * time.Millisecond, PingTimeout: 100 * time.Millisecond, CommandTimeout: 2 * time.Second,
		ProbeInterval: 20 * time.Millisecond, MaxBackoff: 50 * time.Millisecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func shelf(t *testing.T, blocks int) *faketarget.Shelf {
	s := faketarget.New(blocks, 4096)
	t.Cleanup(s.Close)
	return s
}

func pattern(n int, seed uint64) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(seed, 1))
	for i := 0; i+8 <= n; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], r.Uint64())
	}
	return b
}

// Transfers of all sizes, cut at the stripe, with solicited and unsolicited data and a small window.
func TestReadWrite(t *testing.T) {
	for _, r2t := range []bool{false, true} {
		s := shelf(t, 4096)
		s.R2T, s.Window, s.OptimalBlocks, s.MaxBlocks = r2t, 3, 24, 100
		var mu sync.Mutex
		var cut bool
		s.Before(func(_ int, cdb []byte) *faketarget.Answer {
			if cdb[0] == opWrite16 {
				lba, n := binary.BigEndian.Uint64(cdb[2:]), uint64(binary.BigEndian.Uint32(cdb[10:]))
				mu.Lock()
				defer mu.Unlock()
				cut = cut || n > 96 || lba%96+n > 96
			}
			return nil
		})
		d := open(t, s)
		if d.Size() != 4096*4096 || d.BlockBytes() != 4096 {
			t.Fatalf("size %d, blocks of %d", d.Size(), d.BlockBytes())
		}
		ctx := context.Background()
		want := pattern(int(d.Size()), 1)
		var wg sync.WaitGroup
		for i := range 16 {
			wg.Go(func() {
				for off := i << 20; off < (i+1)<<20; {
					n := min(4096*(1+rand.IntN(200)), (i+1)<<20-off)
					if err := d.WriteAt(ctx, want[off:off+n], int64(off)); err != nil {
						t.Error(err)
					}
					off += n
				}
			})
		}
		wg.Wait()
		got := make([]byte, len(want))
		if err := d.ReadAt(ctx, got, 0); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) || !bytes.Equal(s.Disk(), want) {
			t.Fatal("what is read differs from what was written")
		}
		if cut {
			t.Fatal("a write crosses a multiple of the largest transfer in whole stripes")
		}
		if err := d.Unmap(ctx, 4096, 8192); err != nil {
			t.Fatal(err)
		}
		if err := d.Flush(ctx); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(s.Disk()[4096:12288], make([]byte, 8192)) {
			t.Fatal("unmapped blocks are not zero")
		}
	}
}

func TestBadRequests(t *testing.T) {
	d := open(t, shelf(t, 16))
	ctx, b := context.Background(), make([]byte, 8192)
	for _, c := range []struct {
		p    []byte
		off  int64
		want error
	}{{b[:100], 0, target.ErrAlignment}, {b, 100, target.ErrAlignment}, {b, -4096, target.ErrRange}, {b, 15 * 4096, target.ErrRange}, {b, 1<<62 + 0, target.ErrRange}} {
		if err := d.ReadAt(ctx, c.p, c.off); !errors.Is(err, c.want) {
			t.Errorf("read %d at %d: %v", len(c.p), c.off, err)
		}
		if err := d.WriteAt(ctx, c.p, c.off); !errors.Is(err, c.want) {
			t.Errorf("write %d at %d: %v", len(c.p), c.off, err)
		}
		if err := d.Unmap(ctx, c.off, int64(len(c.p))); !errors.Is(err, c.want) {
			t.Errorf("unmap %d at %d: %v", len(c.p), c.off, err)
		}
	}
}

// Definite answers come back at once as the target vocabulary; the others are retried.
func TestAnswers(t *testing.T) {
	for _, c := range []struct {
		name   string
		answer *faketarget.Answer
		want   error
	}{
		{"no space", faketarget.Sense(7, 0x2707), target.ErrNoSpace},
		{"overwrite", faketarget.Sense(7, 0x2702), target.ErrOverwrite},
		{"read-only", faketarget.Sense(7, 0x2700), target.ErrReadOnly},
		{"medium read", faketarget.Sense(3, 0x1100), target.ErrMediumRead},
		{"medium write", faketarget.Sense(3, 0x0c00), target.ErrMediumWrite},
		{"range", faketarget.Sense(5, 0x2100), target.ErrRange},
		{"reservation", &faketarget.Answer{Status: 0x18}, ErrReservation},
		{"busy", &faketarget.Answer{Status: 0x08}, nil},
		{"task set full", &faketarget.Answer{Status: 0x28}, nil},
		{"aborted", faketarget.Sense(0xb, 0x4400), nil},
		{"attention", faketarget.Sense(6, 0x2900), nil},
		{"becoming ready", faketarget.Sense(2, 0x0401), nil},
		{"transition", faketarget.Sense(2, 0x040a), nil},
		{"standby", faketarget.Sense(2, 0x040b), nil},
		{"connection lost", &faketarget.Answer{Drop: true}, nil},
		{"hardware", faketarget.Sense(4, 0x4400), nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := shelf(t, 16)
			var left atomic.Int32
			left.Store(3)
			s.Before(func(_ int, cdb []byte) *faketarget.Answer {
				if cdb[0] == opWrite16 && left.Add(-1) >= 0 {
					return c.answer
				}
				return nil
			})
			d := open(t, s)
			data := pattern(4096, 9)
			err := d.WriteAt(context.Background(), data, 4096)
			if !errors.Is(err, c.want) {
				t.Fatalf("got %v, want %v", err, c.want)
			}
			if wrote := bytes.Equal(s.Disk()[4096:8192], data); wrote != (err == nil) {
				t.Fatalf("error %v, data written: %v", err, wrote)
			}
		})
	}
}

// checker writes numbered blocks until stopped, and knows what was acknowledged.
type checker struct {
	acked [64]uint64
	wg    sync.WaitGroup
	stop  chan struct{}
	count atomic.Int64
}

func writeOn(t *testing.T, d *Device) *checker {
	c := &checker{stop: make(chan struct{})}
	for i := range len(c.acked) {
		c.wg.Go(func() {
			b := make([]byte, 4096)
			for n := uint64(1); ; n++ {
				select {
				case <-c.stop:
					return
				default:
				}
				for at := 0; at < len(b); at += 8 {
					binary.LittleEndian.PutUint64(b[at:], n)
				}
				if err := d.WriteAt(context.Background(), b, int64(i)*4096); err != nil {
					t.Error(err)
					return
				}
				c.acked[i] = n
				c.count.Add(1)
				got := make([]byte, 4096)
				if err := d.ReadAt(context.Background(), got, int64(i)*4096); err != nil || !bytes.Equal(got, b) {
					t.Errorf("block %d: %v, reads %d, acknowledged %d", i, err, binary.LittleEndian.Uint64(got), n)
					return
				}
			}
		})
	}
	return c
}

// progress waits until every writer's path works again.
func (c *checker) progress() {
	for from := c.count.Load(); c.count.Load() < from+2*int64(len(c.acked)); {
		time.Sleep(time.Millisecond)
	}
}

func (c *checker) end(t *testing.T, s *faketarget.Shelf) {
	close(c.stop)
	c.wg.Wait()
	disk := s.Disk()
	for i, n := range c.acked {
		if got := binary.LittleEndian.Uint64(disk[i*4096:]); got != n {
			t.Errorf("block %d holds %d, acknowledged %d", i, got, n)
		}
	}
}

// Controllers die, restart, are paused and change roles under load: nothing that was acknowledged is
// lost or undone, and no error is seen.
func TestTakeovers(t *testing.T) {
	s := shelf(t, 64)
	d := open(t, s)
	c := writeOn(t, d)
	c.progress()

	s.DropConnections(0)
	c.progress()

	s.Stop(1) // the standby
	c.progress()
	s.Start(1)

	s.Stop(0) // the owner; then the operator's takeover
	time.Sleep(20 * time.Millisecond)
	s.SetState(1, target.Transitioning)
	time.Sleep(20 * time.Millisecond)
	s.SetState(0, target.Standby)
	s.SetState(1, target.Optimized)
	c.progress()
	s.Start(0)
	c.progress()

	s.SetState(1, target.Standby) // an orderly handing back
	time.Sleep(10 * time.Millisecond)
	s.SetState(0, target.Optimized)
	c.progress()

	s.Pause(0) // a hung owner is noticed by its silence
	s.SetState(1, target.Optimized)
	c.progress()
	c.end(t, s)
}

// An owner that slept through a takeover says that it is optimized when it wakes; it gets no traffic.
func TestStaleOwner(t *testing.T) {
	s := shelf(t, 16)
	d := open(t, s)
	ctx, b := context.Background(), make([]byte, 4096)
	s.Pause(0)
	s.SetState(1, target.Optimized)
	if err := d.WriteAt(ctx, b, 0); err != nil {
		t.Fatal(err)
	}
	var stale atomic.Int32
	s.Before(func(controller int, cdb []byte) *faketarget.Answer {
		if controller == 0 && cdb[0] == opRead16 {
			stale.Add(1)
		}
		return nil
	})
	s.Resume(0) // still optimized, in its own opinion
	for up := false; !up; {
		for _, p := range d.Paths() {
			up = up || p.Group == 1 && p.Connected && p.Access == target.Optimized
		}
		time.Sleep(time.Millisecond)
	}
	for range 100 {
		if err := d.ReadAt(ctx, b, 0); err != nil {
			t.Fatal(err)
		}
	}
	if n := stale.Load(); n != 0 {
		t.Fatalf("%d reads went to the controller that slept", n)
	}
}

// When one of two portals of a controller dies with a write unanswered, the other is reset first.
func TestResetBeforeOtherPortal(t *testing.T) {
	s := shelf(t, 16)
	p := s.Portals()[0]
	d := open(t, s, p, "localhost"+p[len("127.0.0.1"):])
	for len(d.Paths()) < 2 || !d.Paths()[0].InUse || !d.Paths()[1].InUse {
		time.Sleep(time.Millisecond)
	}
	var drops atomic.Int32
	var resetsBefore atomic.Int32
	s.Before(func(_ int, cdb []byte) *faketarget.Answer {
		if cdb[0] == opWrite16 {
			if drops.Add(1) == 1 {
				return &faketarget.Answer{Drop: true}
			}
			resetsBefore.Store(int32(s.Resets(0)))
		}
		return nil
	})
	if err := d.WriteAt(context.Background(), make([]byte, 4096), 0); err != nil {
		t.Fatal(err)
	}
	if resetsBefore.Load() == 0 {
		t.Fatal("the write was sent again on the other portal without a reset")
	}
}

// A caller that goes away gets its buffer back only when the command is over.
func TestCancel(t *testing.T) {
	s := shelf(t, 16)
	block := make(chan struct{})
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	s.Before(func(_ int, cdb []byte) *faketarget.Answer {
		if cdb[0] == opRead16 {
			cancel() // it has come: there is something to abort
			<-block
			return &faketarget.Answer{Silent: true}
		}
		return nil
	})
	d := open(t, s)
	if err := d.ReadAt(ctx, make([]byte, 4096), 0); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	close(block)
	if s.Aborts(0) == 0 {
		t.Fatal("the command was not aborted")
	}
	if err := d.WriteAt(context.Background(), make([]byte, 4096), 0); err != nil {
		t.Fatalf("the session does not go on: %v", err)
	}
}

// A capacity that grew is seen.
func TestGrow(t *testing.T) {
	s := shelf(t, 16)
	d := open(t, s)
	s.Grow(32)
	for d.Size() != 32*4096 {
		time.Sleep(time.Millisecond)
	}
}

// Nobody serves: Open ends with the caller's context and says why for each path.
func TestOpenFails(t *testing.T) {
	s := shelf(t, 16)
	s.SetState(0, target.Standby)
	for lun, why := range map[uint16]string{faketarget.LUN: "standby", 9: ErrNoLUN.Error()} {
		// On a busy machine it takes more than a moment to hear why.
		for limit := 100 * time.Millisecond; ; limit *= 4 {
			ctx, cancel := context.WithTimeout(context.Background(), limit)
			_, err := Open(ctx, Config{Portals: s.Portals(), Target: faketarget.Target, LUN: lun, Initiator: "iqn.2026-11.test:host"})
			cancel()
			if errors.Is(err, context.DeadlineExceeded) && bytes.Contains([]byte(err.Error()), []byte(why)) {
				break
			}
			if err == nil || limit > time.Minute {
				t.Fatalf("LUN %d: got %v", lun, err)
			}
		}
	}
	if _, err := Open(context.Background(), Config{Portals: []string{"nowhere"}, Target: faketarget.Target, Initiator: "iqn.2026-11.test:host"}); !errors.Is(err, ErrConfig) {
		t.Fatalf("got %v", err)
	}
	if _, err := Open(context.Background(), Config{Portals: s.Portals(), Target: "x", Initiator: "iqn.2026-11.test:host"}); !errors.Is(err, ErrConfig) || !errors.Is(err, iscsi.ErrConfig) {
		t.Fatalf("got %v", err)
	}
}

// lateConn returns from Write long after the target has the bytes.
type lateConn struct{ net.Conn }

func (c lateConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	time.Sleep(2 * time.Millisecond)
	return n, err
}

// The target's next R2T may come before our own write call returned; that is no error of its.
func TestAnswerBeforeWriteReturns(t *testing.T) {
	s := shelf(t, 256)
	s.R2T = true
	var dials atomic.Int32
	d, err := Open(context.Background(), Config{Portals: s.Portals()[:1], Target: faketarget.Target, LUN: faketarget.LUN, Initiator: "iqn.2026-11.test:host",
		Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			dials.Add(1)
			c, err := new(net.Dialer).DialContext(ctx, network, address)
			return lateConn{c}, err
		}})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	want := pattern(1<<20, 5)
	if err := d.WriteAt(context.Background(), want, 0); err != nil {
		t.Fatal(err)
	}
	if n := dials.Load(); n != 1 || !bytes.Equal(s.Disk(), want) {
		t.Fatalf("%d sessions; data equal: %v", n, bytes.Equal(s.Disk(), want))
	}
}
