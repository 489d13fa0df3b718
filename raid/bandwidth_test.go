package raid_test

import (
	"fmt"
	"io"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ledge-storage/ledge/raid"
)

// slowDrive is a drive of one bandwidth: it does one request at a time, each as long as its bytes take, on the clock of a
// synctest bubble. Duplex drives read and write at the same time, each at this bandwidth.
type slowDrive struct {
	name        string
	size        int64
	perByte     time.Duration
	busy, wbusy chan struct{}

	mu     sync.Mutex
	blocks map[int64]string
	same   *sync.Map // contents, each once: nearly all are equal
}

func newSlowDrive(i int, size, bytesPerSecond int64, duplex bool, same *sync.Map) *slowDrive {
	d := &slowDrive{name: fmt.Sprint("slow", i), size: size, perByte: time.Second / time.Duration(bytesPerSecond),
		busy: make(chan struct{}, 1), blocks: make(map[int64]string), same: same}
	if d.wbusy = d.busy; duplex {
		d.wbusy = make(chan struct{}, 1)
	}
	return d
}

func (d *slowDrive) take(arm chan struct{}, n int) {
	arm <- struct{}{}
	time.Sleep(time.Duration(n) * d.perByte)
	<-arm
}

func (d *slowDrive) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > d.size {
		return 0, io.ErrUnexpectedEOF
	}
	d.take(d.busy, len(p))
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := 0; i < len(p); i += raid.BlockBytes {
		b := d.blocks[off+int64(i)]
		copy(p[i:i+raid.BlockBytes], b)
		clear(p[i+len(b) : i+raid.BlockBytes])
	}
	return len(p), nil
}

func (d *slowDrive) WriteAt(p []byte, off int64) (int, error) {
	d.take(d.wbusy, len(p))
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := 0; i < len(p); i += raid.BlockBytes {
		b, ok := d.same.Load(string(p[i : i+raid.BlockBytes]))
		if !ok {
			s := string(p[i : i+raid.BlockBytes])
			b, _ = d.same.LoadOrStore(s, s)
		}
		d.blocks[off+int64(i)] = b.(string)
	}
	return len(p), nil
}

func (d *slowDrive) Flush() error { return nil }
func (d *slowDrive) Size() int64  { return d.size }
func (d *slowDrive) Name() string { return d.name }
func (d *slowDrive) Close() error { return nil }

// rebuildTime returns how long redundancy takes to be whole again after a member fails: to spare space where there is
// some, else to a new drive; and how long the slots of one member take to be written at full bandwidth.
func rebuildTime(t *testing.T, n, k, m, spares, rows, workers int, duplex bool) (took, ideal time.Duration) {
	const bandwidth = 100 << 20
	synctest.Test(t, func(t *testing.T) {
		size := driveBytes(rows)
		var same sync.Map
		var drives []raid.Drive
		for i := range n {
			drives = append(drives, newSlowDrive(i, size, bandwidth, duplex, &same))
		}
		a, err := raid.Create(ctx, drives, raid.Options{K: k, M: m, Spares: spares, NoSpares: spares == 0, Random: deterministic(1),
			ReadTimeout: time.Hour, WriteTimeout: time.Hour})
		must(t, err)
		defer a.Close()
		g := a.Geometry()
		data := make([]byte, g.StripeBytes)
		for i := range data {
			data[i] = byte(i * 7)
		}
		var wg sync.WaitGroup
		next := make(chan uint64)
		for range 16 {
			wg.Go(func() {
				for s := range next {
					if err := a.WriteStripe(ctx, s, 1, [][]byte{data}); err != nil {
						t.Error(err)
					}
				}
			})
		}
		for s := range g.Stripes { // the others need no rebuild
			for i := range k + m {
				if member, _ := raid.LayoutOf(a).Strip(s, i); member == 1 {
					next <- s
				}
			}
		}
		close(next)
		wg.Wait()
		must(t, a.Flush(ctx))
		must(t, a.FailMember(ctx, 1, true))
		start := time.Now()
		if spares > 0 {
			err = a.RebuildWith(ctx, 1, raid.RebuildOptions{Workers: workers})
		} else {
			err = a.Replace(ctx, 1, newSlowDrive(n, size, bandwidth, duplex, &same), raid.ReplaceOptions{})
		}
		must(t, err)
		took = time.Since(start)
		strips := int64(g.Stripes) * int64(k+m) / int64(n)
		ideal = time.Duration(strips) * raid.SlotBytes * (time.Second / bandwidth)
		if r := a.AtRisk(); r.Lost[0] != g.Stripes {
			t.Fatalf("%+v", r)
		}
	})
	return took, ideal
}

// A member among 24 is rebuilt faster than one among 10 with the same bytes a drive and the same bandwidth of each drive,
// on a clock that only the drives' bytes move. What is possible: among 10 of 8+2 there is no spare space, and the new
// drive's bandwidth is the limit: 1 (of the time that a member's bytes take). Among 24 each of 23 does its share of 8
// reads and a write for each strip: 9/23, and 22/24 of the slots hold strips: 0.36 of 10 drives' time, or 2.8 times as
// fast, at the very best; where reads and writes do not share a drive's bandwidth 8/23, 3.1 times. With 6+2 it is 7/23: 3.6.
func TestRebuildBandwidth(t *testing.T) {
	if testing.Short() {
		t.Skip("half a GB of drives")
	}
	for _, c := range []struct {
		k      int
		duplex bool
		least  float64
	}{{8, false, 2.3}, {8, true, 2.7}, {6, false, 2.9}} {
		rows := 1200
		few, one := rebuildTime(t, c.k+2, c.k, 2, 0, rows, 0, c.duplex)
		if c.k != 8 {
			few, one = rebuildTime(t, 10, c.k, 2, 0, rows, 0, c.duplex)
		}
		many, share := rebuildTime(t, 24, c.k, 2, 2, rows, 0, c.duplex)
		ratio := float64(few) / float64(many)
		t.Logf("%d+2, duplex %v: among 10 %v (%.2f of what the new drive needs), among 24 %v (%.2f of a member's bytes): %.2f times as fast",
			c.k, c.duplex, few, float64(few)/float64(one), many, float64(many)/float64(share), ratio)
		if ratio < c.least {
			t.Errorf("%d+2: %.2f times as fast, not %.1f", c.k, ratio, c.least)
		}
	}
}
