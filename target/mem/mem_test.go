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
	for _, huge := range []bool{false, true} {
		size := uint32(512)
		if huge {
			size = 4096
		}
		d, err := New(Options{Bytes: 4<<20 + 4096, BlockBytes: size, Name: "x", Huge: huge})
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

func TestCopy(t *testing.T) {
	src, err := New(Options{Bytes: 1 << 20, Name: "src"})
	if err != nil {
		t.Fatal(err)
	}
	d, err := New(Options{Bytes: 2 << 20, Name: "dst"})
	if err != nil {
		t.Fatal(err)
	}
	devicetest.RunCopy(t, d, src, 4)
	full, err := New(Options{Bytes: 1 << 20, Limit: pageBytes, Name: "full"})
	if err != nil {
		t.Fatal(err)
	}
	if err := src.Write(context.Background(), 0, [][]byte{bytes.Repeat([]byte{1}, 1<<20)}, false); err != nil {
		t.Fatal(err)
	}
	if done, err := full.CopyFrom(context.Background(), src, 0, 0, 2048); !done || !errors.Is(err, target.ErrNoSpace) {
		t.Errorf("16 pages into one: %v %v", done, err)
	}
	if done, err := full.CopyFrom(context.Background(), full, 0, 1, 100); done || err != nil {
		t.Errorf("ranges that overlap: %v %v", done, err)
	}
}

// TestLend: what is lent stays as it was, whatever is written, unmapped or given anew meanwhile, and
// a page's own memory is used again only when nobody looks at it.
func TestLend(t *testing.T) {
	d, err := New(Options{Bytes: 4 * pageBytes, Name: "lend", Huge: true})
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	write := func(b byte) {
		t.Helper()
		if err := d.Write(ctx, 0, [][]byte{bytes.Repeat([]byte{b}, 2*pageBytes)}, false); err != nil {
			t.Fatal(err)
		}
	}
	lend := func() ([][]byte, target.Loan) {
		v, l := d.Lend(64, 2*pageBytes, nil) // from the middle of page 0 into page 2, which is not there
		if l == nil || length(v) != 2*pageBytes {
			t.Fatalf("%d bytes lent", length(v))
		}
		return v, l
	}
	is := func(v [][]byte, b byte) {
		t.Helper()
		want := append(bytes.Repeat([]byte{b}, 2*pageBytes-64*512), make([]byte, 64*512)...)
		if !bytes.Equal(bytes.Join(v, nil), want) {
			t.Errorf("memory that was lent full of %d has changed", b)
		}
	}
	write(1)
	v1, l1 := lend()
	write(2)
	v2, l2 := lend()
	if err := d.Unmap(ctx, []target.Range{{LBA: 0, Blocks: d.Info().Blocks}}); err != nil {
		t.Fatal(err)
	}
	write(3)
	is(v1, 1)
	is(v2, 2)
	l1.Return()
	write(4)
	is(v2, 2)
	l2.Return()
	got := make([]byte, 2*pageBytes)
	if err := d.Read(ctx, 0, [][]byte{got}); err != nil || !bytes.Equal(got, bytes.Repeat([]byte{4}, 2*pageBytes)) {
		t.Errorf("reads other than what was written last: %v", err)
	}
	if _, l := d.Lend(d.Info().Blocks-1, 1024, nil); l != nil {
		t.Error("lends beyond the end")
	}
}
