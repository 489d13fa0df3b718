package mem

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/devicetest"
)

func TestDevice(t *testing.T) {
	for _, size := range []uint32{512, 4096} {
		d, err := New(Options{Bytes: 4<<20 + 4096, BlockBytes: size, Name: "x"})
		if err != nil {
			t.Fatal(err)
		}
		devicetest.Run(t, d, 2)
	}
}

// TestNoSpace: a write that does not fit changes nothing, and unmapping makes room.
func TestNoSpace(t *testing.T) {
	d, err := New(Options{Bytes: 1 << 20, Limit: 2 * pageBytes, Name: "x"})
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	three := bytes.Repeat([]byte{7}, 3*pageBytes)
	if err := d.Write(ctx, 0, [][]byte{three}, false); !errors.Is(err, target.ErrNoSpace) {
		t.Fatalf("three pages of two: %v", err)
	}
	got := make([]byte, len(three))
	if err := d.Read(ctx, 0, [][]byte{got}); err != nil || !bytes.Equal(got, make([]byte, len(got))) {
		t.Errorf("a write that failed left data, %v", err)
	}
	if err := d.Unmap(ctx, []target.Range{{LBA: 0, Blocks: d.Info().Blocks}}); err != nil {
		t.Fatal(err)
	}
	if d.Held() != 0 {
		t.Errorf("%d bytes held after all was unmapped", d.Held())
	}
	if err := d.Write(ctx, 0, [][]byte{three[:2*pageBytes]}, false); err != nil {
		t.Error(err)
	}
}
