// Package devicetest checks that a target.Device keeps the promises of its interface. Each
// implementation's tests call it.
package devicetest

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/ledge-storage/ledge/target"
)

// Run drives d with random calls and compares it with a model in memory. The device must be
// blank, and no larger than 64 MiB.
func Run(t *testing.T, d target.Device, seed uint64) {
	t.Helper()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	i := d.Info()
	size := uint64(i.BlockBytes)
	if i.Blocks*size > 64<<20 {
		t.Fatalf("device of %d bytes", i.Blocks*size)
	}
	model := make([]byte, i.Blocks*size)
	ctx := context.Background()
	var all loans
	defer all.end(t)
	check := func(lba, blocks uint64) {
		t.Helper()
		if f, ok := d.(target.Fetcher); ok {
			all.fetch(t, f, lba, model[lba*size:(lba+blocks)*size])
		}
		got := make([]byte, blocks*size)
		half := blocks / 2 * size
		vec := [][]byte{got[:half], got[half:]}
		if half == 0 {
			vec = vec[1:]
		}
		if err := d.Read(ctx, lba, vec); err != nil {
			t.Fatalf("read %d+%d: %v", lba, blocks, err)
		}
		if !bytes.Equal(got, model[lba*size:(lba+blocks)*size]) {
			t.Fatalf("blocks %d+%d read back other data", lba, blocks)
		}
	}
	pool := make([]byte, 2<<20)
	for j := range pool {
		pool[j] = byte(r.Uint32())
	}
	for range 400 {
		lba := r.Uint64N(i.Blocks)
		blocks := 1 + r.Uint64N(min(i.Blocks-lba, 256))
		part := model[lba*size : (lba+blocks)*size]
		data := make([]byte, len(part))
		copy(data, pool[r.IntN(len(pool)-len(data)):])
		var err error
		switch r.IntN(6) {
		case 0, 1:
			err = d.Write(ctx, lba, [][]byte{data}, r.IntN(2) == 0)
			copy(part, data)
		case 2:
			err = d.Unmap(ctx, []target.Range{{LBA: lba, Blocks: blocks}})
			clear(part)
		case 3:
			err = d.WriteSame(ctx, lba, blocks, data[:size])
			for at := 0; at < len(part); at += int(size) {
				copy(part[at:], data[:size])
			}
		case 4:
			err = d.WriteSame(ctx, lba, blocks, nil)
			clear(part)
		case 5:
			part = part[:min(uint64(len(part)), 255*size)]
			old := bytes.Clone(part)
			wrong := r.IntN(len(old))
			old[wrong] ^= 1
			var miss *target.MiscompareError
			if e := d.CompareAndWrite(ctx, lba, old, data[:len(old)]); !errors.As(e, &miss) || miss.Offset != uint64(wrong) {
				t.Fatalf("compare and write of data that differ at %d: %v", wrong, e)
			}
			check(lba, uint64(len(part))/size)
			old[wrong] ^= 1
			err = d.CompareAndWrite(ctx, lba, old, data[:len(old)])
			copy(part, data)
		}
		if err != nil {
			t.Fatal(err)
		}
		check(lba, blocks)
		mapped, n, err := d.Mapped(ctx, lba, i.Blocks-lba)
		if err != nil || n < 1 || n > i.Blocks-lba {
			t.Fatalf("mapped at %d: %v %d %v", lba, mapped, n, err)
		}
		if !mapped && !bytes.Equal(model[lba*size:(lba+n)*size], make([]byte, n*size)) {
			t.Fatalf("blocks %d+%d hold data and are not mapped", lba, n)
		}
	}
	for at := uint64(0); at < i.Blocks; at += 512 {
		check(at, min(512, i.Blocks-at))
	}
	if err := d.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	for _, lba := range []uint64{i.Blocks, i.Blocks + 1, 1 << 60} {
		if f, ok := d.(target.Fetcher); ok {
			before := [][]byte{{1}}
			if out, loan, err := f.Fetch(ctx, lba, int(size), before); !errors.Is(err, target.ErrRange) || loan != nil || len(out) != 1 {
				t.Errorf("fetch at %d of %d: %d pieces, loan %v, %v", lba, i.Blocks, len(out), loan, err)
			}
		}
		if err := d.Read(ctx, lba, [][]byte{make([]byte, size)}); !errors.Is(err, target.ErrRange) {
			t.Errorf("read at %d of %d: %v", lba, i.Blocks, err)
		}
		if err := d.Write(ctx, lba, [][]byte{make([]byte, size)}, false); !errors.Is(err, target.ErrRange) {
			t.Errorf("write at %d of %d: %v", lba, i.Blocks, err)
		}
		if err := d.WriteSame(ctx, lba, 1<<60, nil); !errors.Is(err, target.ErrRange) {
			t.Errorf("write same at %d: %v", lba, err)
		}
	}
}

// loans are of a target.Fetcher. They are held for a while, so that what changes before it is given back shows.
type loans []loaned

type loaned struct {
	target.Loan
	parts [][]byte
	want  []byte
}

// heldLoans is for how many further reads a loan is held.
const heldLoans = 10

func (l *loans) fetch(t *testing.T, f target.Fetcher, lba uint64, want []byte) {
	t.Helper()
	before := []byte("before")
	parts, loan, err := f.Fetch(context.Background(), lba, len(want), [][]byte{before})
	if err != nil || loan == nil || len(parts) == 0 || &parts[0][0] != &before[0] {
		t.Fatalf("fetch at %d: %d pieces, loan %v, %v", lba, len(parts), loan, err)
	}
	*l = append(*l, loaned{loan, parts[1:], bytes.Clone(want)})
	(*l)[len(*l)-1].check(t)
	if len(*l) > heldLoans {
		(*l)[0].end(t)
		*l = (*l)[1:]
	}
}

func (l loaned) check(t *testing.T) {
	t.Helper()
	if !bytes.Equal(bytes.Join(l.parts, nil), l.want) {
		t.Fatal("what was fetched is something else")
	}
}

func (l loaned) end(t *testing.T) {
	t.Helper()
	l.check(t)
	l.Return()
}

func (l *loans) end(t *testing.T) {
	for _, x := range *l {
		x.end(t)
	}
}
