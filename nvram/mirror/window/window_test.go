package window

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t testing.TB, path string, side byte) *Window {
	t.Helper()
	w, err := Open(Options{Path: path, Side: side, Create: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	return w
}

// connected is both ends of a window of the least size, so that its rings are soon full.
func connected(t testing.TB, size int64) (a, b *Window, ca, cb net.Conn) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "window")
	if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
		t.Fatal(err)
	}
	a, b = open(t, path, 'A'), open(t, path, 'B')
	ca, cb = connect(t, a, b)
	return a, b, ca, cb
}

func connect(t testing.TB, a, b *Window) (ca, cb net.Conn) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() {
		c, err := a.Dial(ctx)
		if err != nil {
			t.Error(err)
		}
		ca = c
	})
	cb, err := b.Dial(ctx)
	wg.Wait()
	if err != nil || t.Failed() {
		t.Fatal(err)
	}
	return ca, cb
}

// What one writes, in pieces of any size, the other reads, in others, both ways at once.
func TestStream(t *testing.T) {
	_, _, ca, cb := connected(t, MinBytes)
	const total = 3 << 20
	var wg sync.WaitGroup
	for i, x := range [][2]net.Conn{{ca, cb}, {cb, ca}} {
		data := make([]byte, total)
		r := rand.New(rand.NewPCG(1, uint64(i)))
		for k := range data {
			data[k] = byte(r.Uint32())
		}
		wg.Go(func() {
			r := rand.New(rand.NewPCG(2, uint64(i)))
			for p := data; len(p) > 0; {
				n := min(len(p), 1+r.IntN(9000))
				cut := r.IntN(n + 1)
				if m, err := x[0].(*Conn).WriteBuffers([][]byte{nil, p[:cut], p[cut:n], nil}); err != nil || m != int64(n) {
					t.Errorf("write %d of %d: %v", m, n, err)
					return
				}
				p = p[n:]
			}
		})
		wg.Go(func() {
			r := rand.New(rand.NewPCG(3, uint64(i)))
			got := make([]byte, 0, total)
			for len(got) < total {
				n, err := x[1].Read(got[len(got):min(total, len(got)+1+r.IntN(9000))])
				if err != nil {
					t.Error(err)
					return
				}
				got = got[:len(got)+n]
			}
			if !bytes.Equal(got, data) {
				t.Error("other bytes come than went")
			}
		})
	}
	wg.Wait()
}

func TestDeadlineAndClose(t *testing.T) {
	_, _, ca, cb := connected(t, MinBytes)
	p := make([]byte, 100)
	ca.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	if _, err := ca.Read(p); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read: %v", err)
	}
	var ne net.Error
	ca.SetWriteDeadline(time.Now().Add(20 * time.Millisecond))
	n, err := ca.Write(make([]byte, 3*minRing))
	if n != minRing || !errors.As(err, &ne) || !ne.Timeout() {
		t.Errorf("write into a full ring: %d, %v", n, err)
	}
	// A deadline that moves into the past ends a read that sleeps.
	ca.SetDeadline(time.Time{})
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := ca.Read(p); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("read: %v", err)
		}
	})
	time.Sleep(10 * time.Millisecond)
	ca.SetReadDeadline(time.Unix(1, 0))
	wg.Wait()
	// A past deadline counts though there is something to read.
	if _, err := cb.Write(p); err != nil {
		t.Fatal(err)
	}
	if _, err := ca.Read(p); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read: %v", err)
	}
	ca.SetReadDeadline(time.Time{})
	if _, err := io.ReadFull(ca, p); err != nil {
		t.Error(err)
	}
	wg.Go(func() {
		if _, err := ca.Read(p); !errors.Is(err, net.ErrClosed) {
			t.Errorf("read while it is closed: %v", err)
		}
	})
	time.Sleep(10 * time.Millisecond)
	ca.Close()
	wg.Wait()
	if _, err := ca.Write(p); !errors.Is(err, net.ErrClosed) && !errors.Is(err, ErrLost) {
		t.Errorf("write after close: %v", err)
	}
	if _, err := cb.Read(p); err != io.EOF {
		t.Errorf("read after the other's close: %v", err)
	}
	if _, err := cb.Write(p); !errors.Is(err, ErrLost) {
		t.Errorf("write after the other's close: %v", err)
	}
}

// What was written before Close is read.
func TestLinger(t *testing.T) {
	_, _, ca, cb := connected(t, MinBytes)
	if _, err := ca.Write([]byte("last words")); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { ca.Close() })
	p := make([]byte, 10)
	if _, err := io.ReadFull(cb, p); err != nil || string(p) != "last words" {
		t.Errorf("%q %v", p, err)
	}
	wg.Wait()
}

// An end that dies, and comes back, ends the other's connection; the next one begins with nothing of the one before.
func TestRestart(t *testing.T) {
	path := filepath.Join(t.TempDir(), "window")
	a, b := open(t, path, 'A'), open(t, path, 'B')
	ca, cb := connect(t, a, b)
	for i := range 20 {
		if _, err := cb.Write([]byte("of the session before")); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		if _, err := b.Dial(ctx); !errors.Is(err, ErrBusy) {
			t.Errorf("a second connection: %v", err)
		}
		cancel()
		b = open(t, path, 'B') // the old process's mapping is forgotten: it left nothing but memory
		var wg sync.WaitGroup
		wg.Go(func() {
			p := make([]byte, 100)
			for err := error(nil); err == nil; {
				_, err = ca.Read(p)
			}
			ca.Close()
		})
		wg.Wait()
		ca, cb = connect(t, a, b)
		if _, err := cb.Write([]byte{byte(i)}); err != nil {
			t.Fatal(err)
		}
		p := make([]byte, 100)
		if n, err := ca.Read(p); n != 1 || p[0] != byte(i) || err != nil {
			t.Errorf("%q %v", p[:n], err)
		}
	}
}

func TestListener(t *testing.T) {
	path := filepath.Join(t.TempDir(), "window")
	l := open(t, path, 'A').Listen()
	b := open(t, path, 'B')
	accepted := make(chan net.Conn)
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(accepted)
		for {
			c, err := l.Accept()
			if err != nil {
				if !errors.Is(err, net.ErrClosed) {
					t.Error(err)
				}
				return
			}
			accepted <- c
		}
	})
	for range 3 {
		c, err := b.Dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		d := <-accepted
		c.Close()
		d.Close()
	}
	l.Close()
	wg.Wait()
}

func TestWrongWindows(t *testing.T) {
	dir := t.TempDir()
	small := filepath.Join(dir, "small")
	os.WriteFile(small, make([]byte, MinBytes-1), 0o600)
	if _, err := Open(Options{Path: small, Side: 'A'}); !errors.Is(err, ErrSize) {
		t.Error(err)
	}
	if _, err := Open(Options{Path: filepath.Join(dir, "x"), Side: 'C'}); err == nil {
		t.Error("side C")
	}
	if _, err := Open(Options{Path: dir, Side: 'A'}); err == nil {
		t.Error("a directory")
	}
	// The other side has another version.
	path := filepath.Join(dir, "window")
	a, b := open(t, path, 'A'), open(t, path, 'B')
	binary.LittleEndian.PutUint32(b.own[8:], version+1)
	store(b.own, offSession, 7)
	if _, err := a.Dial(t.Context()); !errors.Is(err, ErrLayout) {
		t.Error(err)
	}
	// Nobody is there.
	store(b.own, offSession, 0)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := a.Dial(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}

// What is not a window is left as it is, and what is not there is not made.
func TestOpenWritesNothing(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "none")
	if _, err := Open(Options{Path: path, Side: 'A'}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a path that is not there: %v", err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it was made: %v", err)
	}
	at := func(off int, text string) []byte {
		b := make([]byte, MinBytes)
		copy(b[off:], text)
		return b
	}
	for name, c := range map[string]struct {
		content []byte
		create  bool
		want    error
	}{
		"empty": {nil, false, ErrSize}, "short": {[]byte("notes"), true, ErrSize},
		"text before the blocks": {at(0, "a disk's image"), true, ErrForeign}, "behind them": {at(rings-1, "x"), false, ErrForeign},
		"in A's magic": {at(blockA, "LEDGENVR"), true, ErrForeign}, "in B's": {at(blockB, "LEDGEWIM"), true, ErrForeign},
		"all ones":                        {bytes.Repeat([]byte{0xff}, MinBytes), false, ErrForeign}, // a bridge without its other side
		"one side":                        {append(at(blockA, magic)[:blockB], at(0, "foreign")...), false, ErrForeign},
		"emptied under one who counts on": {at(blockB+offAlive, "\x07"), false, nil},
		"zero":                            {at(0, ""), false, nil}, "a window": {at(blockB, magic+"\x01"), false, nil},
	} {
		path := filepath.Join(dir, name)
		os.WriteFile(path, c.content, 0o600)
		w, err := Open(Options{Path: path, Side: 'A', Create: c.create})
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		if err == nil {
			w.Close()
		} else if now, _ := os.ReadFile(path); !bytes.Equal(now, c.content) {
			t.Errorf("%s: it was written to, or made longer", name)
		}
	}
	// Both sides make it at once.
	for i := range 50 {
		path := filepath.Join(dir, fmt.Sprint("both", i))
		var wg sync.WaitGroup
		for _, side := range []byte{'A', 'B'} {
			wg.Go(func() {
				w, err := Open(Options{Path: path, Side: side, Create: true})
				if err != nil {
					t.Error(err)
					return
				}
				w.Close()
			})
		}
		wg.Wait()
	}
	// The path comes to name another file.
	path = filepath.Join(dir, "moved")
	w := open(t, path, 'A')
	if w.Replaced() {
		t.Error("replaced at once")
	}
	os.Remove(path)
	if !w.Replaced() {
		t.Error("removed, and not seen")
	}
	os.WriteFile(path, make([]byte, DefaultBytes), 0o600)
	if !w.Replaced() {
		t.Error("another file, and not seen")
	}
}

// A window whose memory vanishes is an error.
func TestFault(t *testing.T) {
	a, _, ca, _ := connected(t, 1<<20)
	if err := os.Truncate(a.opts.Path, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := ca.Read(make([]byte, 10)); !errors.Is(err, ErrFault) {
		t.Errorf("read: %v", err)
	}
	if _, err := ca.Write(make([]byte, 10)); !errors.Is(err, ErrFault) {
		t.Errorf("write: %v", err)
	}
	ca.Close()
}

// FuzzOther: whatever the other side writes anywhere in its block, reads and writes end.
func FuzzOther(f *testing.F) {
	f.Add(uint16(offPut), uint64(1<<63), []byte("x"))
	f.Add(uint16(offTaken), uint64(5), []byte("xyz"))
	f.Add(uint16(offSession), uint64(0), []byte{})
	f.Add(uint16(offBell), ^uint64(0), []byte("a"))
	f.Fuzz(func(t *testing.T, off uint16, v uint64, p []byte) {
		_, b, ca, cb := connected(t, MinBytes)
		if _, err := cb.Write(p[:min(len(p), minRing)]); err != nil {
			t.Fatal(err)
		}
		store(b.own, int(off)%(4096-8)&^7, v)
		ca.SetDeadline(time.Now().Add(2 * time.Millisecond))
		buf := make([]byte, 2*minRing)
		for range 3 {
			ca.Read(buf)
			ca.Write(buf)
		}
	})
}

func BenchmarkRoundTrip(b *testing.B) {
	ends := func(b *testing.B) map[string][2]net.Conn {
		_, _, wa, wb := connected(b, DefaultBytes)
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			b.Fatal(err)
		}
		defer l.Close()
		ta, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			b.Fatal(err)
		}
		tb, err := l.Accept()
		if err != nil {
			b.Fatal(err)
		}
		return map[string][2]net.Conn{"window": {wa, wb}, "tcp": {ta, tb}}
	}
	for name, e := range ends(b) {
		b.Run(name, func(b *testing.B) {
			defer e[0].Close()
			var wg sync.WaitGroup
			wg.Go(func() {
				p := make([]byte, 4144)
				for {
					if _, err := io.ReadFull(e[1], p); err != nil {
						return
					}
					if _, err := e[1].Write(p[:32]); err != nil {
						return
					}
				}
			})
			p := make([]byte, 4144)
			for b.Loop() {
				if _, err := e[0].Write(p); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(e[0], p[:32]); err != nil {
					b.Fatal(err)
				}
			}
			e[0].Close()
			e[1].Close()
			wg.Wait()
		})
	}
}

// TestEnable: a device that is off is switched on, one that is on is left alone, and so is a directory that is no device's.
func TestEnable(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "enable")
	if err := enable(dir); err != nil {
		t.Errorf("no device: %v", err)
	}
	for _, c := range []struct{ is, want string }{{"0\n", "1"}, {"1\n", "1\n"}, {"2\n", "2\n"}} {
		if err := os.WriteFile(path, []byte(c.is), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := enable(dir); err != nil {
			t.Errorf("%q: %v", c.is, err)
		}
		if got, _ := os.ReadFile(path); string(got) != c.want {
			t.Errorf("%q became %q, want %q", c.is, got, c.want)
		}
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := enable(dir); err == nil {
		t.Error("what cannot be read: no error")
	}
}
