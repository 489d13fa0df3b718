package volume

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/ledge-storage/ledge/host/store"
	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/devicetest"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/minio/sha256-simd.(*Avx512Server).Process"))
}

// lun is a sparse LUN in memory.
type lun struct {
	mu     sync.Mutex
	size   int64
	blocks map[int64][]byte
}

func (l *lun) Size() int64                 { return l.size }
func (l *lun) Flush(context.Context) error { return nil }
func (l *lun) ReadAt(_ context.Context, p []byte, off int64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := 0; i < len(p); i += 4096 {
		clear(p[i : i+4096])
		copy(p[i:], l.blocks[off+int64(i)])
	}
	return nil
}
func (l *lun) WriteAt(_ context.Context, p []byte, off int64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := 0; i < len(p); i += 4096 {
		l.blocks[off+int64(i)] = append([]byte(nil), p[i:i+4096]...)
	}
	return nil
}
func (l *lun) Unmap(_ context.Context, off, n int64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := int64(0); i < n; i += 4096 {
		delete(l.blocks, off+i)
	}
	return nil
}

func device(t testing.TB, bytes int64, block uint32) (*store.Store, *Device) {
	t.Helper()
	o := store.Options{Journal: &lun{size: 32 << 20, blocks: map[int64][]byte{}}, Segments: &lun{size: 1 << 40, blocks: map[int64][]byte{}}}
	st, err := store.Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := st.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	if _, err := st.CreateVolume(t.Context(), "v", bytes); err != nil {
		t.Fatal(err)
	}
	d, err := Open(st, "v", Options{BlockBytes: block})
	if err != nil {
		t.Fatal(err)
	}
	return st, d
}

// cut splits p into buffers of whole blocks.
func cut(rng *rand.Rand, p []byte, block int) (bufs [][]byte) {
	for len(p) > 0 {
		n := min(len(p), (1+rng.IntN(20))*block)
		bufs = append(bufs, p[:n])
		p = p[n:]
	}
	return bufs
}

// Random requests of every kind, aligned to logical blocks only, against a plain array.
func TestModel(t *testing.T) {
	for _, block := range []uint32{512, 4096} {
		const size = 1 << 20
		st, d := device(t, size, block)
		rng := rand.New(rand.NewPCG(1, uint64(block)))
		model := make([]byte, size)
		ctx, n := t.Context(), uint64(size/block)
		for step := range 1200 {
			lba := rng.Uint64N(n)
			blocks := 1 + rng.Uint64N(min(n-lba, 60))
			part := model[lba*uint64(block) : (lba+blocks)*uint64(block)]
			fresh := make([]byte, len(part))
			for i := 0; i < len(fresh); i += 8 {
				binary.LittleEndian.PutUint64(fresh[i:], rng.Uint64N(3)*rng.Uint64())
			}
			var err error
			switch rng.IntN(7) {
			case 0, 1:
				err = d.Write(ctx, lba, cut(rng, fresh, int(block)), false)
				copy(part, fresh)
			case 2:
				err = d.Unmap(ctx, []target.Range{{LBA: lba, Blocks: blocks}})
				clear(part)
			case 3:
				same := fresh[:block]
				if rng.IntN(2) == 0 {
					same = nil
				}
				err = d.WriteSame(ctx, lba, blocks, same)
				for i := 0; i < len(part); i += int(block) {
					clear(part[i : i+int(block)])
					copy(part[i:], same)
				}
			case 4:
				expect := append([]byte(nil), part...)
				at := -1
				if rng.IntN(2) == 0 {
					at = rng.IntN(len(expect))
					expect[at] ^= 1
				}
				err = d.CompareAndWrite(ctx, lba, expect, fresh)
				if at < 0 {
					copy(part, fresh)
				} else {
					var miss *target.MiscompareError
					if !errors.As(err, &miss) || miss.Offset != uint64(at) {
						t.Fatalf("step %d: compare and write with a difference at %d: %v", step, at, err)
					}
					err = nil
				}
			case 5:
				mapped, k, e := d.Mapped(ctx, lba, blocks)
				if err = e; k < 1 || k > blocks {
					t.Fatalf("step %d: mapped for %d of %d", step, k, blocks)
				}
				if got := model[lba*uint64(block) : (lba+k)*uint64(block)]; !mapped && len(bytes.Trim(got, "\x00")) > 0 {
					t.Fatalf("step %d: data in unmapped blocks", step)
				}
			}
			if err != nil {
				t.Fatalf("step %d: %v", step, err)
			}
			got := make([]byte, len(part))
			if err := d.Read(ctx, lba, cut(rng, got, int(block))); err != nil || !bytes.Equal(got, part) {
				t.Fatalf("step %d: read %d+%d differs, %v", step, lba, blocks, err)
			}
			if step%500 == 0 {
				st.Sync(ctx)
			}
		}
		all := make([]byte, size)
		if err := d.Read(ctx, 0, [][]byte{all}); err != nil || !bytes.Equal(all, model) {
			t.Fatalf("the end: %v", err)
		}
		m := d.meter
		reads, writes := m.Reads.Counts(), m.Writes.Counts()
		if m.Reads.Errors.Load()+m.Writes.Errors.Load()+m.Unmaps.Errors.Load() != 0 || reads.N() == 0 || writes.N() == 0 || (m.Partial.Load() == 0) != (block == 4096) {
			t.Errorf("%d reads, %d writes, %d partial", reads.N(), writes.N(), m.Partial.Load())
		}
	}
}

// Writers of neighbouring sectors of one block don't disturb each other.
func TestNeighbours(t *testing.T) {
	_, d := device(t, 1<<20, 512)
	var wg sync.WaitGroup
	for w := range uint64(8) {
		wg.Go(func() {
			for i := range 100 {
				p := bytes.Repeat([]byte{byte(w*16) + byte(i%16)}, 512)
				if err := d.Write(t.Context(), w, [][]byte{p}, false); err != nil {
					t.Error(err)
				}
				got := make([]byte, 512)
				if err := d.Read(t.Context(), w, [][]byte{got}); err != nil || !bytes.Equal(got, p) {
					t.Errorf("sector %d, round %d: lost (%v)", w, i, err)
				}
			}
		})
	}
	wg.Wait()
}

// A counter raised by compare and write from many sides counts every success.
func TestCompareAndWriteIsAtomic(t *testing.T) {
	_, d := device(t, 1<<20, 512)
	var wg sync.WaitGroup
	const each = 50
	for range 4 {
		wg.Go(func() {
			for done := 0; done < each; {
				old := make([]byte, 512)
				if err := d.Read(t.Context(), 3, [][]byte{old}); err != nil {
					t.Error(err)
					return
				}
				next := append([]byte(nil), old...)
				binary.LittleEndian.PutUint64(next, binary.LittleEndian.Uint64(old)+1)
				var miss *target.MiscompareError
				if err := d.CompareAndWrite(t.Context(), 3, old, next); err == nil {
					done++
				} else if !errors.As(err, &miss) {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	got := make([]byte, 512)
	d.Read(t.Context(), 3, [][]byte{got})
	if n := binary.LittleEndian.Uint64(got); n != 4*each {
		t.Errorf("counted %d of %d", n, 4*each)
	}
}

func TestRefusals(t *testing.T) {
	st, d := device(t, 1<<20, 512)
	ctx := t.Context()
	sector := [][]byte{make([]byte, 512)}
	for _, lba := range []uint64{2048, 1 << 63, ^uint64(0)} {
		for what, err := range map[string]error{
			"read": d.Read(ctx, lba, sector), "write": d.Write(ctx, lba, sector, false), "unmap": d.Unmap(ctx, []target.Range{{LBA: lba, Blocks: ^uint64(0)}}),
			"same": d.WriteSame(ctx, lba, 1, nil), "caw": d.CompareAndWrite(ctx, lba, sector[0], sector[0]),
		} {
			if !errors.Is(err, target.ErrRange) {
				t.Errorf("%s at %d: %v", what, lba, err)
			}
		}
	}
	if err := d.Write(ctx, 0, [][]byte{make([]byte, 100)}, false); !errors.Is(err, target.ErrAlignment) {
		t.Errorf("odd buffer: %v", err)
	}
	if err := st.ResizeVolume(ctx, "v", 2<<20); err != nil || d.Info().Blocks != 4096 {
		t.Errorf("resize: %v, %d blocks", err, d.Info().Blocks)
	}
	if err := st.DeleteVolume(ctx, "v"); err != nil {
		t.Fatal(err)
	}
	if err := d.Read(ctx, 0, sector); !errors.Is(err, target.ErrUnavailable) {
		t.Errorf("read of a deleted volume: %v", err)
	}
}

// A request that gives up while it waits for a range lets those behind it go on.
func TestRangeLockGivesUp(t *testing.T) {
	var l rangeLock
	first, _, err := l.lock(t.Context(), 0, 10)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := l.lock(ctx, 5, 15); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	first()
	third, _, err := l.lock(t.Context(), 0, 20)
	if err != nil {
		t.Fatal(err)
	}
	third()
}

// What the engines expect of every device.
func TestDeviceContract(t *testing.T) {
	_, d := device(t, 4<<20, 512)
	devicetest.Run(t, d, 1)
}
