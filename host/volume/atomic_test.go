package volume

import (
	"bytes"
	"context"
	"encoding/binary"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/ledge-storage/ledge/host/store"
)

// stamp is n logical blocks that all carry version v, each different.
func stamp(v uint64, n, block int) []byte {
	b := make([]byte, n*block)
	for i := range n {
		binary.LittleEndian.PutUint64(b[i*block:], v)
		binary.LittleEndian.PutUint64(b[i*block+8:], uint64(i)*v)
	}
	return b
}

// TestAtomicWritesThroughPowerCuts: a write of AtomicBlocks, beginning anywhere, is there whole or not at all.
func TestAtomicWritesThroughPowerCuts(t *testing.T) {
	for round := range 10 {
		block := []int{512, 4096}[round%2]
		journal, segments := &lun{size: 32 << 20, blocks: map[int64][]byte{}}, &lun{size: 1 << 40, blocks: map[int64][]byte{}}
		rng := rand.New(rand.NewPCG(uint64(round), 2))
		always, left := writesLeft(1<<60), writesLeft(int64(6+rng.IntN(24))) // an opening takes six
		open := func(power *atomic.Int64) (*store.Store, *Device) {
			t.Helper()
			st, err := store.Open(t.Context(), store.Options{Journal: brittle{journal, power}, Segments: brittle{segments, power}})
			if err != nil {
				t.Fatal(err)
			}
			if len(st.Volumes()) == 0 {
				if _, err := st.CreateVolume(t.Context(), "v", 64<<20); err != nil {
					t.Fatal(err)
				}
			}
			d, err := Open(st, "v", Options{BlockBytes: uint32(block)})
			if err != nil {
				t.Fatal(err)
			}
			return st, d
		}
		st, d := open(always)
		n := int(d.Info().AtomicBlocks)
		if n*block < 1000<<10 {
			t.Fatalf("AtomicBlocks is %d", n)
		}
		if err := st.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		st, d = open(left)
		lba := rng.Uint64N(d.Info().Blocks - uint64(n))
		acked, begun := uint64(0), uint64(1)
		for ; d.Write(t.Context(), lba, [][]byte{stamp(begun, n, block)}, false) == nil; begun++ {
			acked = begun
		}
		st.Close(t.Context()) // fails: the power is off
		st, d = open(always)
		got := make([]byte, n*block)
		if err := d.Read(t.Context(), lba, [][]byte{got}); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, stamp(acked, n, block)) && !bytes.Equal(got, stamp(begun, n, block)) {
			t.Errorf("round %d: neither version %d (acknowledged) nor %d (begun) whole", round, acked, begun)
		}
		if err := st.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

// TestReadsSeeWholeWrites: no read sees half of a write, whether its blocks are pending or in segments.
func TestReadsSeeWholeWrites(t *testing.T) {
	_, d := device(t, 64<<20, 4096)
	const n = 16
	ctx := context.Background()
	if err := d.Write(ctx, 7, [][]byte{stamp(1, n, 4096)}, false); err != nil {
		t.Fatal(err)
	}
	var done atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		defer done.Store(true)
		for v := uint64(2); v < 200; v++ {
			if err := d.Write(ctx, 7, [][]byte{stamp(v, n, 4096)}, false); err != nil {
				t.Error(err)
				return
			}
		}
	})
	for range 3 {
		wg.Go(func() {
			b := make([]byte, n*4096)
			for !done.Load() {
				if err := d.Read(ctx, 7, [][]byte{b}); err != nil {
					t.Error(err)
					return
				}
				if v := binary.LittleEndian.Uint64(b); !bytes.Equal(b, stamp(v, n, 4096)) {
					t.Errorf("a read sees version %d in part", v)
					return
				}
			}
		})
	}
	wg.Wait()
}
