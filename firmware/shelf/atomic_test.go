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

// stamp is n logical blocks that all carry version v.
func stamp(v uint64, n, block int) []byte {
	b := make([]byte, n*block)
	for i := 0; i < len(b); i += block {
		copy(b[i:], fmt.Sprintf("%8d", v))
	}
	return b
}

// versions are those that the blocks of b carry.
func versions(b []byte, block int) map[string]bool {
	m := map[string]bool{}
	for i := 0; i < len(b); i += block {
		m[string(b[i:i+8])] = true
	}
	return m
}

// TestAtomicWritesThroughPowerCuts: a write of AtomicBlocks is there whole or not at all, wherever it begins: within
// a 4 KiB block, and over the end of extents that no write touched before.
func TestAtomicWritesThroughPowerCuts(t *testing.T) {
	for round := range 16 {
		block := []int{512, 4096}[round%2]
		t.Run(fmt.Sprint(round, block), func(t *testing.T) {
			r := newRig(t, 3<<20, shelf.Options{PieceBlocks: 96}) // of extents of 128
			d := r.lun("v", shelf.KindPlain, 8*extentBytes, uint32(block))
			n := int(d.Info().AtomicBlocks)
			if n*block < 90*4096 {
				t.Fatalf("AtomicBlocks is %d", n)
			}
			rng := rand.New(rand.NewPCG(uint64(round), 3))
			lba := rng.Uint64N(d.Info().Blocks - uint64(n))
			r.region.CutAt(5 + rng.IntN(120))
			var acked, begun uint64
			for v := uint64(1); ; v++ {
				begun = v
				if d.Write(ctx, lba, [][]byte{stamp(v, n, block)}, false) != nil {
					break
				}
				acked = v
			}
			r.cut()
			r.open()
			for pass := range 2 {
				got := read(t, r.device("v"), lba, n*block)
				ok := bytes.Equal(got, stamp(begun, n, block)) || acked > 0 && bytes.Equal(got, stamp(acked, n, block)) || acked == 0 && bytes.Equal(got, make([]byte, len(got)))
				if !ok {
					t.Fatalf("pass %d: of versions %d (acknowledged) and %d (begun): %v", pass, acked, begun, versions(got, block))
				}
				r.drain()
			}
		})
	}
}

// TestReadsSeeWholeWrites: no read of any length sees half of an atomic write, while blocks go from the overlay to
// the members.
func TestReadsSeeWholeWrites(t *testing.T) {
	r := newRig(t, 2<<20, shelf.Options{PieceBlocks: 64})
	d := r.lun("v", shelf.KindPlain, 8*extentBytes, 4096)
	n := int(d.Info().AtomicBlocks)
	lba := uint64(extentBlocks - n/2)
	write(t, d, lba, stamp(0, n, 4096))
	var done atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() { // keeps destage at work
		for v := uint64(0); !done.Load(); v++ {
			if err := d.Write(ctx, 4*extentBlocks+v%256, [][]byte{stamp(v, 16, 4096)}, false); err != nil {
				t.Error(err)
			}
		}
	})
	wg.Go(func() {
		defer done.Store(true)
		for v := uint64(1); v <= 60; v++ {
			if err := d.Write(ctx, lba, [][]byte{stamp(v, n, 4096)}, false); err != nil {
				t.Error(err)
			}
			if v%4 == 0 {
				if err := r.Drain(ctx); err != nil {
					t.Error(err)
				}
			}
		}
	})
	for range 3 {
		wg.Go(func() {
			b := make([]byte, n*4096)
			for !done.Load() {
				if err := d.Read(ctx, lba, [][]byte{b}); err != nil {
					t.Error(err)
					return
				}
				if seen := versions(b, 4096); len(seen) != 1 {
					t.Errorf("a read sees %v", seen)
					return
				}
			}
		})
	}
	// A long operation is not waited for, and waits for no read.
	wg.Go(func() {
		for !done.Load() {
			if err := d.Unmap(ctx, []target.Range{{LBA: 5 * extentBlocks, Blocks: 2 * extentBlocks}}); err != nil {
				t.Error(err)
			}
		}
	})
	wg.Wait()
}
