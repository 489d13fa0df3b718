package main

import (
	"context"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ledge-storage/ledge/qa/bench/measure"
)

const (
	diskBytes  = 4 << 30
	block      = 4 << 10
	chunk      = 1 << 20 // of sequential I/O
	streams    = 4
	queueDepth = 32
)

// fill makes blocks that compress to about half, and that no other number gives.
func fill(p []byte, number uint64) {
	rng := rand.NewPCG(number, 1)
	for i := 0; i+8 <= len(p); i += 8 {
		if i&64 != 0 {
			copy(p[i:], "        ")
			continue
		}
		x := rng.Uint64()
		for j := range 8 {
			p[i+j] = byte(x >> (8 * j))
		}
	}
}

// load measures one contestant.
func (s *settings) load(ctx context.Context, c *contestant, put func(string, float64)) error {
	bytes := int64(len(s.data))
	gb := float64(bytes) / 1e9
	sequential := func(at int64, write bool) (seconds, cpu float64, err error) {
		used, began := measure.CPUSeconds(c.pid), time.Now()
		var next atomic.Int64
		err = several(streams, func(int) error {
			p := make([]byte, chunk)
			for {
				off := next.Add(chunk) - chunk
				var err error
				switch {
				case off >= bytes:
					return nil
				case write:
					err = c.WriteAt(ctx, s.data[off:off+chunk], at+off)
				default:
					err = c.ReadAt(ctx, p, at+off)
				}
				if err != nil {
					return err
				}
			}
		})
		if err == nil && write {
			err = c.Flush(ctx)
		}
		return time.Since(began).Seconds(), measure.CPUSeconds(c.pid) - used, err
	}
	seed := uint64(0)
	random := func(write bool) (iops, cpu float64, err error) {
		seed++
		var done atomic.Int64
		used, began := measure.CPUSeconds(c.pid), time.Now()
		err = several(queueDepth, func(w int) error {
			rng := rand.New(rand.NewPCG(seed, uint64(w)))
			p := make([]byte, block)
			for time.Since(began) < s.seconds {
				off := rng.Int64N(bytes/block) * block
				var err error
				if write {
					fill(p, rng.Uint64())
					err = c.WriteAt(ctx, p, off)
				} else {
					err = c.ReadAt(ctx, p, off)
				}
				if err != nil {
					return err
				}
				done.Add(1)
			}
			return nil
		})
		n := float64(done.Load())
		return n / time.Since(began).Seconds(), (measure.CPUSeconds(c.pid) - used) / n, err
	}

	seconds, cpu, err := sequential(0, true)
	if err != nil {
		return err
	}
	put("write", gb*1e3/seconds)
	if err := s.rest(ctx, c); err != nil {
		return err
	}
	put("write cpu", cpu*1e3/gb)
	stored, err := c.stored()
	if err != nil {
		return err
	}
	put("stored", stored/float64(bytes))
	if seconds, _, err = sequential(diskBytes/2, true); err != nil {
		return err
	}
	put("again", gb*1e3/seconds)
	if err := s.rest(ctx, c); err != nil {
		return err
	}
	if stored, err = c.stored(); err != nil {
		return err
	}
	put("stored again", stored/float64(bytes)/2)
	if seconds, _, err = sequential(0, false); err != nil {
		return err
	}
	put("read", gb*1e3/seconds)
	iops, _, err := random(false)
	if err != nil {
		return err
	}
	put("random read", iops)
	if c.once {
		return nil
	}
	if iops, cpu, err = random(true); err != nil {
		return err
	}
	put("random write", iops)
	put("random write cpu", cpu*1e6)
	if c.snapshot == nil {
		return nil
	}
	began := time.Now()
	if err := c.snapshot(ctx); err != nil {
		return err
	}
	put("snapshot", time.Since(began).Seconds()*1e3)
	if iops, _, err = random(true); err != nil {
		return err
	}
	put("after snapshot", iops)
	began = time.Now()
	if err := c.delete(ctx); err != nil {
		return err
	}
	put("delete snapshot", time.Since(began).Seconds()*1e3)
	return nil
}

// rest waits until what a contestant does behind its answers is done: a flush, and half a second.
func (s *settings) rest(ctx context.Context, c *contestant) error {
	time.Sleep(500 * time.Millisecond)
	return c.Flush(ctx)
}

// several calls f n times at once and returns the first error.
func several(n int, f func(i int) error) error {
	var wg sync.WaitGroup
	errs := make(chan error, n)
	for i := range n {
		wg.Go(func() {
			if err := f(i); err != nil {
				errs <- err
			}
		})
	}
	wg.Wait()
	select {
	case err := <-errs:
		return err
	default:
		return nil
	}
}

// content is blocks that no two of are equal.
func content(bytes int) []byte {
	p := make([]byte, bytes/chunk*chunk)
	for i := 0; i < len(p); i += block {
		fill(p[i:i+block], uint64(i))
	}
	return p
}
