package window

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"
)

// peerPath, where set, makes this test binary the other controller's process: side B of the window there.
const peerPath = "LEDGE_TEST_WINDOW"

// TestPeerProcess is that process: it says that it is there, and answers what comes, byte by byte, until it is killed.
func TestPeerProcess(t *testing.T) {
	path := os.Getenv(peerPath)
	if path == "" {
		t.Skip("it is another test's second process")
	}
	w, err := Open(Options{Path: path, Side: 'B'})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		c, err := w.Dial(ctx)
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(c, c)
		c.Close()
	}
}

func startPeer(t *testing.T, path string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^TestPeerProcess$")
	cmd.Env = append(os.Environ(), peerPath+"="+path)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return cmd
}

// A process that is killed is noticed by who waits for it, and the next one is none the worse.
func TestDeadPeer(t *testing.T) {
	path := filepath.Join(t.TempDir(), "window")
	a := open(t, path, 'A')
	for range 2 {
		peer := startPeer(t, path)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		c, err := a.Dial(ctx)
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(20 * time.Second)) // a test that fails does not hang
		p := []byte("x")
		for range 30 { // for longer than deadAfter: a live one is not taken for dead
			if _, err := c.Write(p); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(c, p); err != nil {
				t.Fatal(err)
			}
			time.Sleep(deadAfter / 20)
		}
		peer.Process.Kill()
		peer.Wait()
		began := time.Now()
		_, err = c.Read(p)
		took := time.Since(began)
		if !errors.Is(err, ErrDead) || took < deadAfter-2*bumpEvery || took > 2*deadAfter {
			t.Errorf("after %v: %v", took, err)
		}
		t.Logf("a killed process was noticed after %v", took)
		if _, err := c.Write(p); !errors.Is(err, ErrDead) {
			t.Errorf("write: %v", err)
		}
		began = time.Now()
		c.Close()
		if took := time.Since(began); took > lingerFor/2 {
			t.Errorf("it lingered for a dead one, %v", took)
		}
	}
}

// Dead is who stood still while this side looked: not a side that was stopped with this one.
func TestVigil(t *testing.T) {
	for name, c := range map[string]struct {
		step   time.Duration
		counts []uint64
		dead   bool
	}{
		"alive":        {bumpEvery, []uint64{1, 2, 2, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 5}, false},
		"dead":         {bumpEvery, make([]uint64, 17), true},
		"not yet":      {bumpEvery, make([]uint64, 15), false},
		"stopped both": {time.Hour, make([]uint64, deadLooks), false},
		"and then":     {time.Hour, make([]uint64, deadLooks+1), true},
		"comes back":   {bumpEvery, append(make([]uint64, 17), 1), false},
	} {
		var v vigil
		now, deaths := time.Now(), 0
		for _, n := range c.counts {
			if v.look(n, now) {
				deaths++
			}
			now = now.Add(c.step)
		}
		if v.dead.Load() != c.dead || deaths > 1 {
			t.Errorf("%s: dead %t, told %d times", name, v.dead.Load(), deaths)
		}
		if v.answered(now); v.dead.Load() {
			t.Errorf("%s: it answered and is dead", name)
		}
	}
}

// A process that died asleep left the count of its sleepers. The next one's is its own: zero where nobody sleeps, or each
// bell would cost the other a system call, and not zero where somebody does, or nobody would wake him.
func TestStaleSleepers(t *testing.T) {
	for _, left := range []uint32{1, 7, ^uint32(0)} {
		path := filepath.Join(t.TempDir(), "window")
		a, old := open(t, path, 'A'), open(t, path, 'B')
		atomic.StoreUint32(half(old.own, offAsleep), left)
		b := open(t, path, 'B')
		if n := atomic.LoadUint32(half(b.own, offAsleep)); n != 0 {
			t.Errorf("%d left, %d sleep after the opening", int32(left), n)
		}
		ca, cb := connect(t, a, b)
		atomic.StoreUint32(half(b.own, offAsleep), left) // the old process was not quite dead
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := cb.Read(make([]byte, 1)); err != nil {
				t.Error(err)
			}
		})
		asleep := func() (n uint32) {
			b.sleeping.Lock()
			defer b.sleeping.Unlock()
			if b.sleepers == 1 {
				n = atomic.LoadUint32(half(b.own, offAsleep))
				if n != 1 {
					t.Errorf("%d left: a sleeper is counted as %d", int32(left), int32(n))
				}
			}
			return b.sleepers
		}
		for i := 0; asleep() == 0; i++ {
			if i == 5000 {
				t.Fatal("the reader never sleeps")
			}
			time.Sleep(time.Millisecond)
		}
		ca.Write([]byte{1})
		wg.Wait()
		if n := atomic.LoadUint32(half(b.own, offAsleep)); n != 0 {
			t.Errorf("%d left: %d sleep after all woke", int32(left), n)
		}
	}
}

// A deadline is when so much time has passed, however somebody sets the clock meanwhile.
func TestDeadlineByMonotonicClock(t *testing.T) {
	_, _, ca, _ := connected(t, MinBytes)
	for _, hours := range []int64{-1, 1} {
		began := time.Now()
		d := began.Add(50 * time.Millisecond)
		// Package time keeps seconds of the wall clock from bit 30 on where it has the monotonic one, too.
		*(*uint64)(unsafe.Pointer(&d)) += uint64(hours*3600) << 30
		if d.Sub(began) != 50*time.Millisecond || d.Unix()-began.Unix() < hours*3600-1 || d.Unix()-began.Unix() > hours*3600+1 {
			t.Skip("package time keeps its clocks otherwise now")
		}
		ca.SetReadDeadline(d)
		hung := time.AfterFunc(5*time.Second, func() { ca.Close() })
		_, err := ca.Read(make([]byte, 1))
		hung.Stop()
		if took := time.Since(began); !errors.Is(err, os.ErrDeadlineExceeded) || took < 50*time.Millisecond {
			t.Error(fmt.Sprintf("the clock was set by %d h:", hours), err, took)
		}
	}
}
