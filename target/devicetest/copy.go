package devicetest

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/ledge-storage/ledge/target"
)

// RunCopy copies random ranges from src to d, a blank device of src's kind, and within d, and compares
// both with models. Neither may be larger than 16 MiB; their blocks are of one size. A copy that is
// refused must have changed nothing; at least one must not be refused.
func RunCopy(t *testing.T, d target.Copier, src target.Device, seed uint64) {
	t.Helper()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 2))
	ctx, size := context.Background(), uint64(d.Info().BlockBytes)
	blocks := [2]uint64{src.Info().Blocks, d.Info().Blocks}
	devices := [2]target.Device{src, d}
	var models [2][]byte
	for i := range models {
		models[i] = make([]byte, blocks[i]*size)
		for range 8 {
			at := r.Uint64N(blocks[i])
			part := models[i][at*size : min(at+64, blocks[i])*size]
			for j := range part {
				part[j] = byte(r.Uint32())
			}
			if err := devices[i].Write(ctx, at, [][]byte{part}, false); err != nil {
				t.Fatal(err)
			}
		}
	}
	copied := 0
	for range 100 {
		from := r.IntN(2)
		n := 1 + r.Uint64N(min(blocks[0], blocks[1])/2)
		a, b := r.Uint64N(blocks[from]-n), r.Uint64N(blocks[1]-n)
		done, err := d.CopyFrom(ctx, devices[from], a, b, n)
		if err != nil {
			t.Fatalf("copy %d+%d to %d: %v", a, n, b, err)
		}
		if done {
			copied++
			copy(models[1][b*size:], models[from][a*size:][:n*size])
		}
		got := make([]byte, len(models[1]))
		if err := d.Read(ctx, 0, [][]byte{got}); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, models[1]) {
			t.Fatalf("copy %d+%d to %d (done: %v) left other data", a, n, b, done)
		}
	}
	if copied == 0 {
		t.Error("every copy was refused")
	}
	for _, x := range [][3]uint64{{blocks[0], 0, 1}, {0, blocks[1], 1}, {1, 0, blocks[0]}, {0, 1 << 63, 1}, {1 << 63, 0, 1}} {
		if done, err := d.CopyFrom(ctx, src, x[0], x[1], x[2]); done && !errors.Is(err, target.ErrRange) {
			t.Errorf("copy of %d from %d to %d: %v", x[2], x[0], x[1], err)
		}
	}
	got := make([]byte, len(models[0]))
	if err := src.Read(ctx, 0, [][]byte{got}); err != nil || !bytes.Equal(got, models[0]) {
		t.Errorf("the source has changed, %v", err)
	}
}
