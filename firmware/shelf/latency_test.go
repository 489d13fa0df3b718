package shelf_test

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/firmware/shelf"
	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/nvram/region"
	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/raid/drive"
)

var latency = flag.Int("latency", 0, "how often to measure the latency of writes beside destage; figures, no test")

// TestLatencyBesideDestage writes 4 KiB blocks at random to 256 MiB, 8+2 on 12 files in memory: first while the log has
// room, then while destage runs all the time.
func TestLatencyBesideDestage(t *testing.T) {
	if *latency == 0 {
		t.Skip("-latency is not set")
	}
	for range *latency {
		for _, depth := range []int{1, 8} {
			measureLatency(t, depth)
		}
	}
}

func measureLatency(t *testing.T, depth int) {
	dir, err := os.MkdirTemp("/dev/shm", "ledge-lost-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	var drives []raid.Drive
	for i := range 12 {
		path := filepath.Join(dir, fmt.Sprint("d", i))
		if err := drive.Create(path, 128<<20); err != nil {
			t.Fatal(err)
		}
		d, err := drive.Open(path, drive.Options{Controller: "A"})
		if err != nil {
			t.Fatal(err)
		}
		drives = append(drives, d)
	}
	a, err := raid.Create(ctx, drives, raid.Options{K: 8, M: 2})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	rg, err := region.Open(filepath.Join(dir, "nvram"), region.Options{Create: true, Size: 512 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer rg.Close()
	area := nvram.Area{Size: rg.Size()}
	if err := nvram.Format(rg, area, nvram.FormatOptions{ID: nvram.NewID(), Epoch: 1}); err != nil {
		t.Fatal(err)
	}
	l, err := nvram.Open(ctx, rg, area, nvram.Options{Epoch: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	p, err := shelf.CreatePool(ctx, a, l, shelf.Options{IdleAfter: -1, MaxLUNs: 8, MaxHosts: 4})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Abort()
	const blocks = 65536
	lun, err := p.CreateLUN(ctx, shelf.LUNSpec{Name: "v", Kind: shelf.KindPlain, Bytes: blocks * 4 * kib, BlockBytes: 4096})
	if err != nil {
		t.Fatal(err)
	}
	d := lun.Device()
	phase := func(name string, until func() bool) {
		before := p.Status().Counters
		var mu sync.Mutex
		var all []time.Duration
		var wg sync.WaitGroup
		began := time.Now()
		for w := range depth {
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(uint64(w), 1))
				b := pattern(uint64(w), 4*kib)
				var took []time.Duration
				for !until() {
					at := time.Now()
					if err := d.Write(ctx, uint64(rng.IntN(blocks)), [][]byte{b}, false); err != nil {
						t.Error(err)
						return
					}
					took = append(took, time.Since(at))
				}
				mu.Lock()
				all = append(all, took...)
				mu.Unlock()
			})
		}
		wg.Wait()
		slices.Sort(all)
		at := func(q float64) time.Duration { return all[int(q*float64(len(all)-1))].Round(time.Microsecond) }
		s := p.Status().Counters
		t.Logf("QD %d %-8s %6d writes, %6.0f/s: p50 %v p99 %v p99.9 %v max %v; %d rounds, %d blocks destaged, %d stalls", depth, name, len(all),
			float64(len(all))/time.Since(began).Seconds(), at(0.5), at(0.99), at(0.999), at(1), s.Rounds-before.Rounds, s.Blocks-before.Blocks, s.Stalls-before.Stalls)
	}
	phase("quiet", func() bool { s := p.Status(); return s.LogUsedBytes*100 > s.LogBytes*45 })
	for p.Status().Counters.Rounds == 0 {
		if err := d.Write(ctx, 0, [][]byte{pattern(1, 4*kib)}, false); err != nil {
			t.Fatal(err)
		}
	}
	end := p.Status().Counters.Rounds + 40
	phase("destage", func() bool { return p.Status().Counters.Rounds > end })
}
