package cache

import (
	"math/rand/v2"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// Many readers at once, while lines come, go round the medium, are freed, and the file is resized: on a real
// file, with all goroutines. For the race detector, and for what a simulation in one goroutine can't meet.
func TestConcurrent(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cache")
	o := Options{Path: path, SizeBytes: smallSize(40), ReadTimeout: time.Minute, slowTimeout: time.Minute, lineBytes: smallLine, regionBytes: smallRegion}
	for life := range uint64(2) {
		c := openWith(t, o)
		var wg sync.WaitGroup
		for w := range uint64(8) {
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(w, life))
				end := time.Now().Add(2 * time.Minute)
				for i := 0; i < 2000 || c.Stats().Evicted == 0 && time.Now().Before(end); i++ {
					for len(c.queue) > queueLines/2 {
						time.Sleep(time.Millisecond) // the file is slower than its readers
					}
					segment, line := uint32(1+rng.IntN(1+rng.IntN(8))), rng.IntN(segmentLines)
					switch rng.IntN(300) {
					case 0:
						c.Forget(storeA, segment)
					case 1:
						if err := c.Resize(smallSize(int64(20 + rng.IntN(40)))); err != nil {
							t.Error(err)
						}
					default:
						fill(t, c, [16]byte{byte(1 + rng.IntN(2))}, segment, line)
					}
				}
			})
		}
		wg.Wait()
		if s := c.Stats(); s.Hits == 0 || s.Bad+s.Failures+s.Late != 0 || s.Evicted == 0 || s.Lines == 0 {
			t.Errorf("%+v", s)
		}
		before := held(c)
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		o.SizeBytes = c.opt.SizeBytes
		c = openWith(t, o)
		if held(c) < before {
			t.Errorf("%d lines after a restart, of %d", held(c), before)
		}
		c.Close()
	}
}
