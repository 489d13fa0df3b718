package shelf_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/ledge-storage/ledge/firmware/shelf"
	"github.com/ledge-storage/ledge/target"
)

// The power goes while writers and the background destage run, two members with it: every block has what was
// acknowledged for it last, or what was under way. (qa/sim does the same step by step, without the concurrency.)
func TestCutUnderWriters(t *testing.T) {
	rounds := 8
	if testing.Short() {
		rounds = 3
	}
	for round := range rounds {
		t.Run(fmt.Sprint(round), func(t *testing.T) {
			r := newRig(t, 2<<20, shelf.Options{})
			const writers, blocks = 4, 4 * extentBlocks
			d := r.lun("v", shelf.KindPlain, 4*extentBytes, 4096)
			var acked, begun [blocks]atomic.Uint64
			rng := rand.New(rand.NewPCG(uint64(round), 5))
			r.region.CutAt(50 + rng.IntN(700))
			var wg sync.WaitGroup
			for w := range writers {
				wg.Go(func() {
					rng := rand.New(rand.NewPCG(uint64(round), uint64(w)))
					for v := uint64(1); ; v++ {
						lba, n := w*extentBlocks+rng.IntN(extentBlocks), 1+rng.IntN(16)
						if v%7 == 0 {
							lba, n = w*extentBlocks+rng.IntN(2)*stripeBlocks, stripeBlocks
						}
						n = min(n, (w+1)*extentBlocks-lba)
						var src [][]byte
						for b := lba; b < lba+n; b++ {
							begun[b].Store(v)
							src = append(src, version(v, b))
						}
						var err error
						if v%9 == 0 {
							err = d.Unmap(ctx, []target.Range{{LBA: uint64(lba), Blocks: uint64(n)}})
						} else {
							err = d.Write(ctx, uint64(lba), src, false)
						}
						if err != nil {
							return
						}
						for b := lba; b < lba+n; b++ {
							acked[b].Store(v)
						}
					}
				})
			}
			wg.Wait()
			r.cut()
			lost := rng.Perm(5)
			r.lose(lost[0])
			r.lose(lost[1])
			r.open()
			for pass := range 2 {
				d = r.device("v")
				for b := range blocks {
					got := read(t, d, uint64(b), 4*kib)
					ok := false
					low, high := acked[b].Load(), begun[b].Load()
					for v := low; v <= high && !ok; v++ {
						ok = bytes.Equal(got, version(v, b))
					}
					if !ok {
						t.Fatalf("pass %d: block %d: read %q, acknowledged %d, begun %d", pass, b, got[:32], low, high)
					}
				}
				r.drain()
			}
		})
	}
}

// version is what version v of a block holds; 0 and every ninth are zeros.
func version(v uint64, b int) []byte {
	p := make([]byte, 4*kib)
	if v%9 != 0 {
		for i := 0; i < len(p); i += 16 {
			copy(p[i:], fmt.Sprintf("%8d%8d", v, b))
		}
	}
	return p
}
