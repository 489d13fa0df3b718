package store

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ledge-storage/ledge/target"
)

// counted counts what is written to a LUN, and keeps no more of it than it must.
type counted struct {
	*memory
	bytes int64
}

func (c *counted) WriteAt(ctx context.Context, p []byte, off int64) error {
	err := c.memory.WriteAt(ctx, p, off)
	if err == nil {
		c.p.mu.Lock()
		c.bytes += int64(len(p))
		c.p.mu.Unlock()
	}
	return err
}

// lunFile is a LUN in a sparse file, in memory where there is /dev/shm: nobody waits for another's request in it.
type lunFile struct {
	f    *os.File
	size int64
}

func newLUNFile(b testing.TB, size int64) *lunFile {
	dir := "/dev/shm"
	if _, err := os.Stat(dir); err != nil {
		dir = b.TempDir()
	}
	f, err := os.CreateTemp(dir, "ledge-store-*")
	must(b, err)
	must(b, os.Remove(f.Name()))
	must(b, f.Truncate(size))
	b.Cleanup(func() { f.Close() })
	return &lunFile{f, size}
}

func (l *lunFile) ReadAt(_ context.Context, p []byte, off int64) error {
	_, err := l.f.ReadAt(p, off)
	return err
}

func (l *lunFile) WriteAt(_ context.Context, p []byte, off int64) error {
	_, err := l.f.WriteAt(p, off)
	return err
}

func (l *lunFile) Unmap(_ context.Context, off, n int64) error {
	return unix.Fallocate(int(l.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func (l *lunFile) Flush(context.Context) error { return nil }
func (l *lunFile) Size() int64                 { return l.size }

// beds of cleaning: which of n blocks is overwritten next.
var cleaningBeds = []struct {
	name string
	pick func(rng *rand.Rand, n uint64) uint64
}{
	{"uniform", func(rng *rand.Rand, n uint64) uint64 { return rng.Uint64N(n) }},
	{"skew90-10", func(rng *rand.Rand, n uint64) uint64 {
		if rng.IntN(10) < 9 {
			return rng.Uint64N(n / 10)
		}
		return n/10 + rng.Uint64N(n-n/10)
	}},
}

// BenchmarkCleaning is the write amplification in a store that is 80 % full of incompressible blocks: bytes written to the store LUN, of
// maps and all, for each byte that a user overwrites, after four times the store was overwritten before.
func BenchmarkCleaning(b *testing.B) {
	for _, bed := range cleaningBeds {
		b.Run(bed.name, func(b *testing.B) {
			for b.Loop() {
				written, moved, checkpoints := cleaning(b, cleanSegments, bed.pick)
				b.ReportMetric(written, "written/user")
				b.ReportMetric(moved, "moved/user")
				b.ReportMetric(float64(checkpoints), "checkpoints")
			}
		})
	}
}

// cleaning returns, for each block that a user overwrites, how many are written and how many moved, and the checkpoints of half a store.
func cleaning(b testing.TB, segments uint64, pick func(rng *rand.Rand, n uint64) uint64) (written, moved float64, checkpoints int64) {
	sh := newShelf(b, 1)
	sh.journal.size = 256 << 20
	lun := &counted{memory: sh.segments}
	o := sh.options()
	o.Segments, o.CapacityBytes, o.CheckpointSegments, o.BufferBytes, o.TableBytes, o.RecordBytes = lun, int64(segments)*SegmentBytes, 0, 16<<20, 64<<20, 1<<20
	o.PackDelay = 0
	ctx := b.Context()
	st := open(b, o)
	_, err := st.CreateVolume(ctx, "a", 1<<40)
	must(b, err)
	v, err := st.Volume("a")
	must(b, err)
	n := (segments - segments/16) * SegmentBytes * 8 / 10 / BlockBytes
	// overwrite has several writers write count blocks in all.
	phase := uint64(0)
	overwrite := func(count uint64, next func(rng *rand.Rand, i int) uint64) {
		const writers = 16
		phase++
		var wg sync.WaitGroup
		for w := range writers {
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(phase, uint64(w)))
				block := noise(uint64(w), 1)
				for i := w; i < int(count); i += writers {
					le.PutUint64(block[rng.IntN(500)*8:], rng.Uint64())
					lba := next(rng, i)
					for {
						err := v.Write(ctx, lba, block)
						if err == nil {
							break
						}
						if !errors.Is(err, target.ErrNoSpace) {
							b.Error(err)
							return
						}
						time.Sleep(time.Millisecond)
					}
				}
			})
		}
		wg.Wait()
	}
	overwrite(n, func(_ *rand.Rand, i int) uint64 { return uint64(i) })
	overwrite(4*n, func(rng *rand.Rand, _ int) uint64 { return pick(rng, n) })
	must(b, st.Sync(ctx))
	before, s := lun.bytes, st.Stats()
	overwrite(n/2, func(rng *rand.Rand, _ int) uint64 { return pick(rng, n) })
	must(b, st.Sync(ctx))
	t, after := st.Stats(), lun.bytes
	must(b, st.Close(ctx))
	return float64(after-before) / float64(n/2*BlockBytes), float64(t.BlocksMoved-s.BlocksMoved) / float64(n/2), t.Checkpoints - s.Checkpoints
}

// BenchmarkCleaningLatency is how long writes and reads take beside the cleaner: a quarter of what the store can take, so that nothing
// queues for want of speed, in a store that is 80 % full and in one that has room for all, the one and the other by turns.
func BenchmarkCleaningLatency(b *testing.B) {
	const segments, workers, count, pause = cleanSegments / 4, 8, 1500, 1300 * time.Microsecond
	type bed struct {
		v             *Volume
		st            *Store
		writes, reads []time.Duration
	}
	n := uint64(segments-segments/16) * SegmentBytes * 8 / 10 / BlockBytes
	ctx := b.Context()
	beds := make([]*bed, 2)
	for i := range beds {
		o := newShelf(b, 1).options()
		o.Journal, o.Segments = newLUNFile(b, 256<<20), newLUNFile(b, 1<<40)
		o.CapacityBytes, o.CheckpointSegments, o.BufferBytes, o.TableBytes, o.RecordBytes = int64(segments<<(8*i))*SegmentBytes, 0, 16<<20, 64<<20, 1<<20
		o.PackDelay = 0
		st := open(b, o)
		defer st.stop()
		if i == 1 {
			st.cleanAfter = 1 << 31 // nor does it clean for tidiness
		}
		_, err := st.CreateVolume(ctx, "a", 1<<40)
		must(b, err)
		v := volume(b, st, "a")
		for lba := uint64(0); lba < n; lba += 16 {
			must(b, v.Write(ctx, lba, noise(lba, 16)))
		}
		beds[i] = &bed{v: v, st: st}
	}
	run := func(x *bed, note bool) {
		var mu sync.Mutex
		var wg sync.WaitGroup
		for w := range workers {
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(rand.Uint64(), uint64(w)))
				block, dst := noise(uint64(w), 1), make([]byte, BlockBytes)
				var writes, reads []time.Duration
				for range count {
					time.Sleep(pause)
					le.PutUint64(block[rng.IntN(500)*8:], rng.Uint64())
					start := time.Now()
					must(b, x.v.Write(ctx, rng.Uint64N(n), block))
					wrote := time.Now()
					must(b, x.v.Read(ctx, rng.Uint64N(n), dst))
					writes, reads = append(writes, wrote.Sub(start)), append(reads, time.Since(wrote))
				}
				mu.Lock()
				defer mu.Unlock()
				if note {
					x.writes, x.reads = append(x.writes, writes...), append(x.reads, reads...)
				}
			})
		}
		wg.Wait()
	}
	for round := range 14 {
		for _, x := range beds {
			run(x, round >= 6)
		}
	}
	for i, name := range []string{"cleaned", "room"} {
		x := beds[i]
		for what, d := range map[string][]time.Duration{"write": x.writes, "read": x.reads} {
			slices.Sort(d)
			b.ReportMetric(float64(d[len(d)/2].Nanoseconds())/1000, "us-"+what+"-p50-"+name)
			b.ReportMetric(float64(d[len(d)*99/100].Nanoseconds())/1000, "us-"+what+"-p99-"+name)
		}
		b.ReportMetric(float64(x.st.Stats().BlocksMoved), "moved-"+name)
	}
}
