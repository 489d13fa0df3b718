package iscsi

import (
	"bytes"
	"flag"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/scsi"
)

// TestHostileNoReader: initiators that ask for as much as the window takes and read nothing. Others
// read and write meanwhile; the silent are dropped when SendTimeout is over, and their memory is back.
func TestHostileNoReader(t *testing.T) {
	for _, kind := range []string{"inline", "in workers"} {
		t.Run(kind, func(t *testing.T) {
			var dev target.Device
			if kind != "inline" {
				dev = newBlocking(t, nil)
			}
			before, goroutines := footprint()
			l := newLab(t, Options{SendTimeout: time.Second}, dev)
			stop := l.bystander(2)
			var stalled []*client
			for i := range 4 {
				c := l.dial()
				c.isid = byte(10 + i)
				if status := c.login("MaxRecvDataSegmentLength=262144"); status != 0 {
					t.Fatalf("status %04X", status)
				}
				c.ready()
				stalled = append(stalled, c)
			}
			for _, c := range stalled {
				for range 100 {
					if err := c.send(c.command(0xC0, 16<<20, read10(0, 32768)...), nil); err != nil {
						break // it was dropped already
					}
				}
			}
			eventually(t, "the reads are under way, or over", func() bool {
				s := l.srv.Stats()
				return s.Memory >= 4*2*scsi.ReadPiece || s.Sessions < 2+4
			})
			for range 20 {
				l.alive()
			}
			l.quiet(t, 2)
			blocks := stop()
			l.quiet(t, 0)
			for _, c := range stalled {
				c.nc.Close()
			}
			after, now := footprint()
			if after > before+8<<20 || now > goroutines+idleWorkers+8 {
				t.Errorf("%d → %d kB, %d → %d goroutines", before>>10, after>>10, goroutines, now)
			}
			t.Logf("%d verified blocks beside", blocks)
		})
	}
}

// TestHostileHalfPDU: initiators that stop in the middle of a PDU, in every part of it, and say
// nothing more. Their commands are over, and their sessions, when the ping time-out is; another
// session that is as long idle but answers pings is kept.
func TestHostileHalfPDU(t *testing.T) {
	l := newLab(t, Options{PingAfter: time.Second}, newBlocking(t, nil))
	stop := l.bystander(1)
	var wg sync.WaitGroup
	i := byte(0)
	stopped := func(digests bool, build func(c *client) []byte) {
		t.Helper()
		var keys []string
		if digests {
			keys = []string{"HeaderDigest=CRC32C", "DataDigest=CRC32C"}
		}
		c := l.dial()
		i++
		c.isid = i
		if status := c.login(append(keys, "InitialR2T=No")...); status != 0 {
			t.Fatalf("status %04X", status)
		}
		c.ready()
		if _, err := c.nc.Write(build(c)); err != nil {
			t.Fatal(err)
		}
		wg.Add(1)
		go func() {
			defer wg.Done()
			if err := c.ended(); err != nil {
				t.Error(err)
			}
		}()
	}
	write := func(c *client, ahs int, digests bool) []byte {
		h := c.command(0xA0, 4096, write10(0, 8)...)
		h[4] = byte(ahs / 4)
		h.setDataLen(4094)
		b := append(h[:], make([]byte, ahs)...)
		b[48+1], b[48+2] = byte(ahs-3), 1
		if digests {
			d := digest(b)
			b = append(b, d[:]...)
		}
		return append(b, make([]byte, 4096)...)
	}
	for _, n := range []int{1, 20, 47, 48, 50, 63, 64, 65, 1000, 64 + 4094, 64 + 4095} {
		stopped(false, func(c *client) []byte { return write(c, 16, false)[:n] })
	}
	for _, n := range []int{64, 66, 68, 69, 68 + 4096, 68 + 4096} { // in the digests
		stopped(true, func(c *client) []byte { return write(c, 16, true)[:n] })
	}
	stopped(false, func(c *client) []byte { // unsolicited data announced, and half a Data-Out
		h := c.command(0x20, 65536, write10(0, 128)...)
		d := new(header)
		d[0], d[1] = opDataOut, 0x80
		d.put32(16, h.itt())
		d.put32(20, noTag)
		d.setDataLen(65536)
		return append(append(h[:], d[:]...), make([]byte, 30000)...)
	})
	stopped(false, func(c *client) []byte { // a NOP-Out and a text request without their data
		h := new(header)
		h[0], h[1] = opNopOut|0x40, 0x80
		h.setDataLen(262144)
		return append(h[:], make([]byte, 100)...)
	})
	stopped(false, func(c *client) []byte {
		h := new(header)
		h[0], h[1] = opTextReq|0x40, 0x80
		h.setDataLen(8000)
		return append(h[:], make([]byte, 100)...)
	})
	wg.Wait()
	stop()
	l.quiet(t, 0)
}

// TestHostileHalfOpen: a network that swallows everything from some moment on, in both directions,
// without a word to either end. The server ends what was under way when its pings stay unanswered.
func TestHostileHalfOpen(t *testing.T) {
	dev := newBlocking(t, make(chan struct{}))
	l := newLab(t, Options{PingAfter: time.Second}, dev)
	stop := l.bystander(1)
	p := newSwallower(t, l.addr)
	direct := l.addr
	l.addr = p.addr
	c := l.session("InitialR2T=Yes").ready()
	l.addr = direct
	running, waiting := c.command(0xA0, 4096, write10(0, 8)...), c.command(0xA0, 32<<20, read16(0x8A, 0, 65536)...)
	if err := c.send(running, make([]byte, 4096)); err != nil {
		t.Fatal(err)
	}
	if err := c.send(waiting, nil); err != nil {
		t.Fatal(err)
	}
	eventually(t, "one runs and one waits for data", func() bool { return dev.in.Load() == 1 && l.srv.Stats().Memory > 32<<20 })
	p.swallow.Store(true)
	l.quiet(t, 1)
	if n := dev.in.Load(); n != 0 {
		t.Errorf("%d writes still run", n)
	}
	stop()
	l.quiet(t, 0)
}

// TestHostileHalfOpenReturns: an initiator whose connection went dead comes back at once, long
// before the ping time-out, and finds its place free.
func TestHostileHalfOpenReturns(t *testing.T) {
	dev := newBlocking(t, make(chan struct{}))
	l := newLab(t, Options{PingAfter: time.Hour}, dev)
	p := newSwallower(t, l.addr)
	direct := l.addr
	l.addr = p.addr
	c := l.session().ready()
	l.addr = direct
	if err := c.send(c.command(0xA0, 4096, write10(0, 8)...), make([]byte, 4096)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the write runs", func() bool { return dev.in.Load() == 1 })
	p.swallow.Store(true)
	back := l.session().ready()
	if n := dev.in.Load(); n != 0 {
		t.Errorf("%d writes of the old session run in the new", n)
	}
	back.nc.Close()
	l.quiet(t, 0)
}

// swallower is a proxy that can stop to forward, without closing anything.
type swallower struct {
	addr    string
	swallow atomic.Bool
}

func newSwallower(t *testing.T, to string) *swallower {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &swallower{addr: l.Addr().String()}
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex
		conns []net.Conn
	)
	forward := func(to, from net.Conn) {
		defer wg.Done()
		b := make([]byte, 64<<10)
		for {
			n, err := from.Read(b)
			if err != nil {
				return // and to is not told
			}
			if !s.swallow.Load() {
				to.Write(b[:n])
			}
		}
	}
	wg.Add(1)
	go func() {
		defer wg.Done()
		for {
			a, err := l.Accept()
			if err != nil {
				return
			}
			b, err := net.Dial("tcp", to)
			if err != nil {
				a.Close()
				continue
			}
			mu.Lock()
			conns = append(conns, a, b)
			mu.Unlock()
			wg.Add(2)
			go forward(a, b)
			go forward(b, a)
		}
	}()
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for _, c := range conns {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return s
}

// TestHostilePingOfAFullSocket: a peer that takes nothing, so that not even a ping fits, holds up
// no other's ping.
func TestHostilePingOfAFullSocket(t *testing.T) {
	l := newLab(t, Options{PingAfter: 100 * time.Millisecond, SendTimeout: time.Hour}, nil)
	var wg sync.WaitGroup
	for i := range 4 {
		// A pipe is a connection without buffers: the first byte that is not read blocks.
		ours, theirs := net.Pipe()
		wg.Add(1)
		go func() {
			defer wg.Done()
			l.srv.accept(theirs)
		}()
		c := &client{t: t, nc: ours, cmdSN: 1, itt: 1, isid: byte(20 + i)}
		if status := c.login(); status != 0 {
			t.Fatalf("status %04X", status)
		}
		defer ours.Close()
	}
	wg.Wait()
	eventually(t, "the deaf are dropped", func() bool { return l.srv.Stats().Sessions == 0 })
	c := l.session()
	p, err := c.recv()
	if err != nil || p.h.opcode() != opNopIn {
		t.Fatal(p, err)
	}
	c.nc.Close()
	l.quiet(t, 0)
}

// TestHostileDeafAtFarewell: initiators are asked to log out, or their target is taken away, while
// one takes no data: nobody waits for SendTimeout.
func TestHostileDeafAtFarewell(t *testing.T) {
	for name, f := range map[string]func(*Server){
		"RequestLogout": func(s *Server) { s.RequestLogout(testTarget, time.Minute) },
		"RemoveTarget":  func(s *Server) { s.RemoveTarget(testTarget) },
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t, Options{SendTimeout: time.Hour, PingAfter: time.Hour}, nil)
			l.srv.farewell = 100 * time.Millisecond
			ours, theirs := net.Pipe()
			l.srv.accept(theirs)
			c := &client{t: t, nc: ours, cmdSN: 1, itt: 1, isid: 1}
			if status := c.login(); status != 0 {
				t.Fatalf("status %04X", status)
			}
			eventually(t, "nobody is writing", func() bool {
				l.srv.mu.Lock()
				defer l.srv.mu.Unlock()
				for c := range l.srv.conns {
					c.send.mu.Lock()
					defer c.send.mu.Unlock()
					if c.send.writing || !c.full.Load() {
						return false
					}
				}
				return true
			})
			over := make(chan struct{})
			go func() {
				defer close(over)
				f(l.srv)
			}()
			select {
			case <-over:
			case <-time.After(time.Minute):
				t.Error("all wait for the deaf")
			}
			ours.Close()
			<-over
			l.quiet(t, 0)
		})
	}
}

var sessionCount = flag.Int("sessions", 250, "sessions of TestIdleSessions")

// TestIdleSessions holds sessions to 64 KiB each: new, and idle again after reads and writes of every kind.
func TestIdleSessions(t *testing.T) {
	n := *sessionCount
	if testing.Short() || raceEnabled {
		n = min(n, 100)
	}
	const most = 64 << 10
	l := newLab(t, Options{PingAfter: time.Hour}, newBlocking(t, nil))
	l.dev.(*blocking).Device.WriteSame(t.Context(), 0, 4096, fill(1)) // its pages are there
	start, _ := footprint()
	clients := make([]*client, n)
	for i := range clients {
		c := l.dial()
		c.nc.SetDeadline(time.Now().Add(20 * time.Minute))
		if status := c.loginAs(fmt.Sprintf("%s-%d", testInitiator, i), testTarget, "InitialR2T=No", "FirstBurstLength=262144", "MaxRecvDataSegmentLength=262144"); status != 0 {
			t.Fatalf("status %04X", status)
		}
		clients[i] = c
	}
	bound := func(when string) {
		held, goroutines := footprint()
		each := (held - start) / int64(n)
		t.Logf("%s: %d bytes a session, the client's share included, %d goroutines", when, each, goroutines)
		if each > most {
			t.Errorf("%s: %d bytes a session", when, each)
		}
	}
	bound("new")
	var wg sync.WaitGroup
	work := make(chan *client)
	for range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			big := bytes.Repeat(fill(7), 512)
			in := make([]byte, 64<<10)
			for c := range work {
				for range 2 {
					c.ready()
				}
				// A stream of writes, which grows the reader's buffer, then reads and small commands.
				for range 2 {
					for range 3 {
						h := c.command(0xA0, uint32(len(big)), write10(0, 512)...)
						if err := c.send(h, big); err != nil {
							t.Error(err)
							return
						}
					}
					for range 3 {
						if _, err := io.ReadFull(c.nc, in[:48]); err != nil || in[0] != opResponse {
							t.Errorf("opcode %#x, %v", in[0], err)
							return
						}
					}
				}
				c.must(c.command(0xC0, 1<<20, read10(0, 2048)...), nil, nil)
				for range 32 {
					if err := c.send(c.command(0x80, 0, 0, 0, 0, 0, 0, 0), nil); err != nil {
						t.Error(err)
					}
				}
				if err := c.ping(); err != nil {
					t.Error(err)
				}
			}
		}()
	}
	for _, c := range clients {
		work <- c
	}
	close(work)
	wg.Wait()
	bound("idle again")
	for _, c := range clients {
		c.nc.Close()
	}
	l.quiet(t, 0)
}
