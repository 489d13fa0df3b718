package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/ledge-storage/ledge/qa/bench/measure"
	"github.com/ledge-storage/ledge/raid"
)

// The bed of a hot region: random 4 KiB overwrites of it, for as long as the other beds' measurements take together, with
// destage at work. Every write to a member is watched: between two flushes of a member, so within one
// round of destage, no block of it may be written twice.

func openHot(ctx context.Context, s settings, dir string) (*contest, error) {
	w := new(watch)
	r, err := newRig(ctx, dir, s.logBytes/4, s.hotBytes, overTCP, 0, w.wrap)
	if err != nil {
		return nil, err
	}
	blocks := uint64(s.hotBytes / raid.BlockBytes)
	bufs := make([][]byte, pathDepth)
	for i := range bufs {
		bufs[i] = randomBytes(raid.BlockBytes, i)
	}
	megabyte := randomBytes(1<<20, 1)
	for lba := uint64(0); lba < blocks; lba += 256 { // the blocks are there: no first writes
		if err := r.lun.Write(ctx, lba, [][]byte{megabyte}, false); err != nil {
			return nil, err
		}
	}
	if err := r.settle(ctx); err != nil {
		return nil, err
	}
	before, acked := r.pool.Status().Counters, 0.
	w.start()
	return &contest{
		close: r.close,
		contestants: []contestant{{name: "overwrite QD 32", unit: "IOPS", run: func(ctx context.Context, d time.Duration) (float64, error) {
			v, err := pump(ctx, pathDepth, d, func(worker, _ int) (int, error) {
				return 1, r.lun.Write(ctx, rand.Uint64N(blocks), bufs[worker:worker+1], false)
			})
			acked += v * d.Seconds()
			return v, err
		}}},
		after: func() ([]Verdict, []string) {
			if err := r.pool.Drain(ctx); err != nil {
				return []Verdict{{Bed: "hot", What: "drain", Note: err.Error()}}, nil
			}
			now := r.pool.Status().Counters
			written, twice := w.counts()
			v := Verdict{Bed: "hot", What: "blocks that reached a member twice in one destage", Asked: "0", Measured: measure.SpreadOf([]float64{float64(twice)}), Met: twice == 0 && written > 0}
			return []Verdict{v}, []string{fmt.Sprintf(
				"hot: %.0f blocks of a region of %d were overwritten; %d destage rounds moved %d (%.2f of each write) as %d blocks on the members, parity, checksums and metadata included.",
				acked, blocks, now.Rounds-before.Rounds, now.Blocks-before.Blocks, float64(now.Blocks-before.Blocks)/max(acked, 1), written)}
		},
	}, nil
}

// watch counts the blocks that reach the members.
type watch struct {
	mu             sync.Mutex
	on             bool
	written, twice uint64
}

func (w *watch) start() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.on = true
}

func (w *watch) counts() (written, twice uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.written, w.twice
}

func (w *watch) wrap(d raid.Drive) raid.Drive {
	return &watched{Drive: d, watch: w, since: map[int64]bool{}}
}

// watched is a drive that tells.
type watched struct {
	raid.Drive
	watch *watch
	since map[int64]bool // blocks written since the last flush; guarded by watch.mu
}

func (d *watched) WriteAt(p []byte, off int64) (int, error) {
	if off >= raid.DataOffset { // labels are no destage
		d.watch.mu.Lock()
		for at := off; d.watch.on && at < off+int64(len(p)); at += raid.BlockBytes {
			d.watch.written++
			if d.since[at] {
				d.watch.twice++
			}
			d.since[at] = true
		}
		d.watch.mu.Unlock()
	}
	return d.Drive.WriteAt(p, off)
}

func (d *watched) Flush() error {
	d.watch.mu.Lock()
	clear(d.since)
	d.watch.mu.Unlock()
	return d.Drive.Flush()
}
