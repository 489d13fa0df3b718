package store

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/ledge-storage/ledge/target"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		// sha256-simd's server cannot be stopped; host/dedup starts one for the process.
		goleak.IgnoreAnyFunction("github.com/minio/sha256-simd.(*Avx512Server).Process"))
}

// text is n compressible blocks, different for each seed.
func text(seed uint64, n int) []byte {
	rng := rand.New(rand.NewPCG(seed, 1))
	words := []string{"func ", "return ", "err ", "if ", "nil ", "store ", "segment ", "{ ", "} ", "for ", "range "}
	var b bytes.Buffer
	for b.Len() < n*BlockBytes {
		b.WriteString(words[rng.IntN(len(words))])
		if rng.IntN(6) == 0 {
			b.WriteByte(byte('a' + rng.IntN(26)))
			b.WriteByte(byte('a' + rng.IntN(26)))
		}
	}
	return b.Bytes()[:n*BlockBytes]
}

// noise is n blocks that don't compress.
func noise(seed uint64, n int) []byte {
	rng := rand.New(rand.NewPCG(seed, 2))
	p := make([]byte, n*BlockBytes)
	for i := 0; i < len(p); i += 8 {
		le.PutUint64(p[i:], rng.Uint64())
	}
	return p
}

// warmed waits until the index knows what the segments hold.
func warmed(t testing.TB, st *Store) {
	t.Helper()
	for began := time.Now(); !st.Stats().IndexReady; time.Sleep(time.Millisecond) {
		if time.Since(began) > time.Minute {
			t.Fatal("the index is not filled")
		}
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func volume(t testing.TB, st *Store, name string) *Volume {
	t.Helper()
	v, err := st.Volume(name)
	must(t, err)
	return v
}

func wantBlocks(t testing.TB, v *Volume, lba uint64, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	must(t, v.Read(t.Context(), lba, got))
	for i := 0; i < len(want); i += BlockBytes {
		if !bytes.Equal(got[i:i+BlockBytes], want[i:i+BlockBytes]) {
			t.Fatalf("block %d of %s differs", lba+uint64(i/BlockBytes), v.name)
		}
	}
}

// The main path: written, read from the buffer, packed, read from segments, closed, opened
// elsewhere; crashed, opened elsewhere.
func TestWriteReadReopen(t *testing.T) {
	sh := newShelf(t, 1)
	ctx := t.Context()
	st := open(t, sh.options())
	if _, err := st.CreateVolume(ctx, "demo", 1<<30); err != nil {
		t.Fatal(err)
	}
	v := volume(t, st, "demo")
	a, b := text(1, 1500), noise(2, 3000)
	must(t, v.Write(ctx, 10, a))
	wantBlocks(t, v, 10, a)
	must(t, v.Write(ctx, 5000, b))
	must(t, st.Sync(ctx))
	must(t, v.Zero(ctx, 100, 300))
	clear(a[90*BlockBytes : 390*BlockBytes])
	wantBlocks(t, v, 10, a)
	wantBlocks(t, v, 5000, b)
	wantBlocks(t, v, 100000, make([]byte, 10*BlockBytes))
	must(t, st.Close(ctx))
	if err := v.Write(ctx, 0, a); !errors.Is(err, ErrClosed) {
		t.Errorf("write after close: %v", err)
	}

	st = open(t, sh.options())
	v = volume(t, st, "demo")
	wantBlocks(t, v, 10, a)
	wantBlocks(t, v, 5000, b)
	must(t, v.Write(ctx, 0, b[:700*BlockBytes]))
	copy(a, b[10*BlockBytes:700*BlockBytes])
	st.stop() // as kill -9 does

	st = open(t, sh.options())
	v = volume(t, st, "demo")
	wantBlocks(t, v, 10, a)
	wantBlocks(t, v, 5000, b)
	if s := st.Stats(); s.LogicalBytes != v.Info().LogicalBytes || s.Epoch != 3 {
		t.Errorf("stats %+v", s)
	}
	must(t, st.DeleteVolume(ctx, "demo"))
	must(t, st.Checkpoint(ctx))
	if n := sh.segments.allocated(); n > 2 { // the checkpoint's own
		t.Errorf("%d segments after everything was deleted", n)
	}
	must(t, st.Close(ctx))
}

// A foreign LUN is left alone, a second host is noticed by the first.
func TestForeignAndFenced(t *testing.T) {
	sh := newShelf(t, 1)
	ctx := t.Context()
	must(t, sh.journal.WriteAt(ctx, noise(1, 1), 8192))
	if _, err := Open(ctx, sh.options()); !errors.Is(err, ErrForeign) {
		t.Errorf("foreign LUN: %v", err)
	}
	sh = newShelf(t, 2)
	sh.segments.zombies = true
	o := sh.options()
	first := open(t, o)
	o.UUID = [16]byte{1}
	if _, err := Open(ctx, o); !errors.Is(err, ErrForeign) {
		t.Errorf("other UUID: %v", err)
	}
	o.UUID = first.UUID()
	second := open(t, o)
	if _, err := first.CreateVolume(ctx, "a", 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := first.Checkpoint(ctx); !errors.Is(err, ErrFenced) {
		t.Errorf("checkpoint of a fenced host: %v", err)
	}
	first.stop()
	must(t, second.Close(ctx))
}

func TestVolumes(t *testing.T) {
	sh := newShelf(t, 1)
	ctx := t.Context()
	st := open(t, sh.options())
	defer func() { must(t, st.Close(ctx)) }()
	for _, name := range []string{"", "-a", "A", "a/b", "ü", string(make([]byte, 200))} {
		if _, err := st.CreateVolume(ctx, name, 1<<20); !errors.Is(err, ErrName) {
			t.Errorf("name %q: %v", name, err)
		}
	}
	for _, size := range []int64{0, -4096, 4097, MaxVolume + BlockBytes} {
		if _, err := st.CreateVolume(ctx, "a", size); !errors.Is(err, ErrSize) {
			t.Errorf("size %d: %v", size, err)
		}
	}
	info, err := st.CreateVolume(ctx, "a", 64*BlockBytes)
	must(t, err)
	if _, err := st.CreateVolume(ctx, "a", 1<<20); !errors.Is(err, ErrExists) {
		t.Errorf("twice: %v", err)
	}
	v := volume(t, st, "a")
	must(t, v.Write(ctx, 0, text(1, 64)))
	if err := v.Write(ctx, 63, text(1, 2)); !errors.Is(err, target.ErrRange) {
		t.Errorf("beyond the end: %v", err)
	}
	must(t, st.ResizeVolume(ctx, "a", 32*BlockBytes))
	must(t, st.ResizeVolume(ctx, "a", 128*BlockBytes))
	want := append(text(1, 64)[:32*BlockBytes], make([]byte, 96*BlockBytes)...)
	wantBlocks(t, v, 0, want)
	must(t, st.Sync(ctx))
	wantBlocks(t, v, 0, want)
	if l := st.Volumes(); len(l) != 1 || l[0].UUID != info.UUID || l[0].SizeBytes != 128*BlockBytes || l[0].LogicalBytes != 32*BlockBytes {
		t.Errorf("%+v", l)
	}
	must(t, st.DeleteVolume(ctx, "a"))
	if err := st.DeleteVolume(ctx, "a"); !errors.Is(err, ErrNotFound) {
		t.Errorf("delete twice: %v", err)
	}
	if err := v.Write(ctx, 0, text(1, 1)); !errors.Is(err, target.ErrUnavailable) {
		t.Errorf("write to a deleted volume: %v", err)
	}
}

// An image written twice adds under 3 %, and text is stored in under half.
func TestDedupAndCompression(t *testing.T) {
	sh := newShelf(t, 1)
	ctx := t.Context()
	sh.journal.size = 64 << 20 // else segments are sealed early, and cleaned meanwhile
	st := open(t, sh.options())
	defer func() { must(t, st.Close(ctx)) }()
	_, err := st.CreateVolume(ctx, "demo", 1<<30)
	must(t, err)
	v := volume(t, st, "demo")
	img := text(3, 8192)
	write := func(lba uint64) {
		for i := 0; i < len(img); i += 256 * BlockBytes {
			must(t, v.Write(ctx, lba+uint64(i/BlockBytes), img[i:i+256*BlockBytes]))
		}
		must(t, st.Sync(ctx))
	}
	write(0)
	one, two := v.Info(), VolumeInfo{}
	whole := st.Stats()
	if one.StoredBytes*2 > int64(len(img)) {
		t.Errorf("stored %d of %d", one.StoredBytes, len(img))
	}
	write(100003)
	two = v.Info()
	if added := two.StoredBytes - one.StoredBytes; added*100 > 3*int64(len(img)) {
		t.Errorf("the second time added %d of %d", added, len(img))
	}
	if added := st.Stats().StoredBytes - whole.StoredBytes; added*100 > 3*int64(len(img)) {
		t.Errorf("the second time added %d of %d to the store", added, len(img))
	}
	if two.UniqueBytes-one.UniqueBytes > one.UniqueBytes/100 || two.LogicalBytes != 2*one.LogicalBytes {
		t.Errorf("first %+v second %+v", one, two)
	}
	wantBlocks(t, v, 100003, img)
	t.Logf("image %d, stored %d, second time + %d; store %+v", len(img), one.StoredBytes, two.StoredBytes-one.StoredBytes, st.Stats())
}

// What cannot be compressed, and is nowhere else, costs a hundredth more than its size at most, maps and all.
func TestIncompressible(t *testing.T) {
	sh := newShelf(t, 1)
	sh.journal.size = 64 << 20
	o := sh.options()
	o.CheckpointSegments = 0
	ctx := t.Context()
	st := open(t, o)
	_, err := st.CreateVolume(ctx, "a", 1<<30)
	must(t, err)
	v := volume(t, st, "a")
	const n = 64
	for i := range uint64(n) {
		must(t, v.Write(ctx, i*256, noise(i, 256)))
	}
	must(t, st.Checkpoint(ctx))
	s := st.Stats()
	cost := float64(s.StoredBytes) / (n << 20)
	if cost > 1.01 {
		t.Errorf("%.4f of its size: %+v", cost, s)
	}
	t.Logf("%.4f of its size", cost)
	must(t, st.Close(ctx))
}

// A full shelf refuses writes with the right error, goes on reading, and recovers.
func TestNoSpace(t *testing.T) {
	sh := newShelf(t, 1)
	o := sh.options()
	o.CapacityBytes = 16 * SegmentBytes
	sh.journal.size = 64 << 20
	ctx := t.Context()
	st := open(t, o)
	_, err := st.CreateVolume(ctx, "a", 1<<30)
	must(t, err)
	v := volume(t, st, "a")
	var n uint64
	for ; n < 200; n++ {
		if err = v.Write(ctx, n*256, noise(n, 256)); err != nil {
			break
		}
	}
	// Of 16 segments 8 are kept back and one is the checkpoint's; two heads are open, and may have just begun.
	if packed := uint64(16-8-1-2) * SegmentBytes >> 20; !errors.Is(err, target.ErrNoSpace) || n < packed-packed/16 || n > 130 {
		t.Fatalf("after %d MiB: %v", n, err)
	}
	wantBlocks(t, v, 256, noise(1, 256))
	must(t, v.Zero(ctx, 256, (n-1)*256))
	must(t, st.Sync(ctx))
	must(t, st.Checkpoint(ctx))
	must(t, v.Write(ctx, 256, noise(1, 256)))
	must(t, st.Close(ctx))

	// The pool behind the LUN is full: writers are refused, not kept waiting, until it is not.
	sh = newShelf(t, 2)
	full := false
	sh.segments.full = func() bool { return full }
	st = open(t, sh.options())
	_, err = st.CreateVolume(ctx, "a", 1<<30)
	must(t, err)
	v = volume(t, st, "a")
	must(t, v.Write(ctx, 0, noise(0, 256)))
	sh.p.mu.Lock()
	full = true
	sh.p.mu.Unlock()
	for n = 1; err == nil && n < 100; n++ {
		err = v.Write(ctx, n*256, noise(n, 256))
	}
	if !errors.Is(err, target.ErrNoSpace) {
		t.Fatalf("pool full: %v", err)
	}
	wantBlocks(t, v, 0, noise(0, 256))
	sh.p.mu.Lock()
	full = false
	sh.p.mu.Unlock()
	must(t, st.Checkpoint(ctx))
	must(t, v.Write(ctx, 0, noise(9, 256)))
	must(t, st.Close(ctx))
}

// A store that is full of garbage is not full: who overwrites waits for the cleaner and is never refused, from many writers at once, and
// reads are right meanwhile.
func TestOverwritesAreNotRefused(t *testing.T) {
	sh := newShelf(t, 1)
	o := sh.options()
	o.CapacityBytes, o.BufferBytes = 40*SegmentBytes, 16<<20
	sh.journal.size = 64 << 20
	ctx := t.Context()
	st := open(t, o)
	_, err := st.CreateVolume(ctx, "a", 1<<30)
	must(t, err)
	v := volume(t, st, "a")
	const n = 20 * SegmentBytes / BlockBytes // two thirds of what is not kept back
	fill := noise(1, 256)
	for lba := uint64(0); lba < n; lba += 256 {
		le.PutUint64(fill, lba)
		for i := range 256 {
			le.PutUint64(fill[i*BlockBytes:], lba+uint64(i)<<32)
		}
		must(t, v.Write(ctx, lba, fill))
	}
	const writers = 4
	last := make([]uint64, n) // what a block holds; each belongs to one writer
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 3))
			p := noise(uint64(100+w), 1)
			for k := range uint64(2 * n / writers) {
				lba := rng.Uint64N(n/writers)*writers + uint64(w)
				last[lba] = 1<<40 | uint64(w)<<32 | k
				le.PutUint64(p, last[lba])
				if err := v.Write(ctx, lba, p); err != nil {
					t.Errorf("after %d: %v; %+v", k, err, st.Stats())
					return
				}
			}
		})
	}
	wg.Wait()
	s := st.Stats()
	if moved := float64(s.BlocksMoved) / (2 * n); moved == 0 || moved > 10 {
		t.Errorf("%.2f blocks moved for each that was overwritten, %d checkpoints", moved, s.Checkpoints)
	}
	t.Logf("%.2f blocks moved for each that was overwritten, %d checkpoints", float64(s.BlocksMoved)/(2*n), s.Checkpoints)
	// What the cleaner can free counts as free.
	if _, available, capacity := v.Space(); available < 4*SegmentBytes || available > capacity-n*BlockBytes {
		t.Errorf("%d MiB of %d available with %d MiB in use", available>>20, capacity>>20, n*BlockBytes>>20)
	}
	p := make([]byte, BlockBytes)
	for lba, want := range last {
		must(t, v.Read(ctx, uint64(lba), p))
		if got := le.Uint64(p); want != 0 && got != want {
			t.Fatalf("block %d: %x, not %x", lba, got, want)
		}
	}
	must(t, st.Close(ctx))
}

// Maps much larger than their limit are written and read, and the limit is kept.
func TestMapLimit(t *testing.T) {
	sh := newShelf(t, 1)
	o := sh.options()
	o.MapBytes = 1
	ctx := t.Context()
	st := open(t, o)
	_, err := st.CreateVolume(ctx, "a", 1<<40)
	must(t, err)
	v := volume(t, st, "a")
	const pages = 20 * leastPages
	lba := func(i uint64) uint64 { return i * 7919 % pages * 1000 }
	for i := range uint64(pages) {
		must(t, v.Write(ctx, lba(i), text(i%50, 1)))
	}
	must(t, st.Checkpoint(ctx)) // before it, what one batch changed may be too many
	check := func() {
		t.Helper()
		for i := range uint64(pages) {
			wantBlocks(t, v, lba(i), text(i%50, 1))
		}
		if s := st.Stats(); s.MapPages < pages*9/10 || s.MapResident > leastPages*3/2 {
			t.Errorf("%d pages, %d of them in memory", s.MapPages, s.MapResident)
		}
	}
	check()
	must(t, v.Zero(ctx, lba(0), 1))
	must(t, v.Write(ctx, lba(0)+1, text(5, 1)))
	must(t, v.Write(ctx, lba(0), text(0, 1)))
	st.stop()
	st = open(t, o)
	v = volume(t, st, "a")
	check()
	wantBlocks(t, v, lba(0)+1, text(5, 1))
	checkCounts(t, st)
	must(t, st.Close(ctx))
}

// What overwrites leave behind is cleaned, shared blocks stay shared, contents stay.
func TestCleaner(t *testing.T) {
	sh := newShelf(t, 1)
	o := sh.options()
	o.CapacityBytes = 28 * SegmentBytes
	sh.journal.size = 64 << 20
	ctx := t.Context()
	st := open(t, o)
	_, err := st.CreateVolume(ctx, "a", 1<<30)
	must(t, err)
	v := volume(t, st, "a")
	const blocks = 20000 // 80 MiB of noise, overwritten in part again and again
	seeds := make([]uint64, blocks/100)
	for i := range seeds {
		seeds[i] = uint64(i % 150)
		must(t, v.Write(ctx, uint64(i)*100, noise(seeds[i], 100)))
	}
	rng := rand.New(rand.NewPCG(1, 1))
	for k := range 500 {
		i := rng.IntN(len(seeds))
		seeds[i] = uint64(1000 + k)
		if err := v.Write(ctx, uint64(i)*100, noise(seeds[i], 100)); errors.Is(err, target.ErrNoSpace) {
			must(t, st.Sync(ctx))
			must(t, st.Checkpoint(ctx))
			must(t, v.Write(ctx, uint64(i)*100, noise(seeds[i], 100)))
		} else {
			must(t, err)
		}
	}
	s := st.Stats()
	if s.BlocksMoved == 0 || s.SegmentsFreed == 0 {
		t.Errorf("nothing was cleaned: %+v", s)
	}
	t.Logf("%+v", s)
	st.stop()
	st = open(t, o)
	v = volume(t, st, "a")
	for i, seed := range seeds {
		wantBlocks(t, v, uint64(i)*100, noise(seed, 100))
	}
	must(t, st.Close(context.Background()))
}

// On a LUN with few segment numbers, openings don't eat them up, and when they run out writes are
// refused, reads are not, and the store still opens.
func TestFewNumbers(t *testing.T) {
	sh, ctx := newShelf(t, 1), t.Context()
	sh.segments.size = 128 * SegmentBytes
	st := open(t, sh.options())
	_, err := st.CreateVolume(ctx, "a", 1<<30)
	must(t, err)
	must(t, volume(t, st, "a").Write(ctx, 0, text(1, 10)))
	for range 20 {
		must(t, st.Close(ctx))
		st = open(t, sh.options())
	}
	v := volume(t, st, "a")
	for n := uint64(0); err == nil; n++ {
		err = v.Write(ctx, 100, noise(n, 256))
		if n > 2000 {
			t.Fatal("no end")
		}
	}
	if !errors.Is(err, target.ErrNoSpace) {
		t.Fatal(err)
	}
	for range 3 {
		wantBlocks(t, v, 0, text(1, 10))
		st.stop()
		st = open(t, sh.options())
		v = volume(t, st, "a")
	}
	must(t, st.Close(ctx))
}

// What is overwritten before it is packed is never stored, and never lost: not where it is read meanwhile, copied between, or cut off.
func TestOverwrittenSoon(t *testing.T) {
	sh, ctx := newShelf(t, 1), t.Context()
	o := sh.options()
	o.PackDelay = time.Hour
	st := open(t, o)
	_, err := st.CreateVolume(ctx, "a", 1<<30)
	must(t, err)
	v := volume(t, st, "a")
	must(t, st.Sync(ctx))
	const times = 50
	for i := range times {
		must(t, v.Write(ctx, 7, noise(uint64(i), 1)))
	}
	if s := st.Stats(); s.Uniques+s.Absorbed > 0 {
		t.Fatalf("packed at once: %+v", s)
	}
	wantBlocks(t, v, 7, noise(times-1, 1))
	must(t, st.Sync(ctx))
	if s := st.Stats(); s.Uniques != 1 || s.Absorbed != times-1 {
		t.Fatalf("stored %d blocks, %d absorbed", s.Uniques, s.Absorbed)
	}

	// A snapshot has what was there, and is there at once.
	must(t, v.Write(ctx, 7, noise(100, 1)))
	_, err = st.Snapshot(ctx, "s", "a")
	must(t, err)
	must(t, v.Write(ctx, 7, noise(101, 1)))
	snap, err := st.OpenSnapshot("a", "s")
	must(t, err)
	wantBlocks(t, snap, 7, noise(100, 1))

	// The power goes; nothing of it is in a segment.
	for i := range uint64(times) {
		must(t, v.Write(ctx, i%3, noise(200+i, 1)))
	}
	sh.repower(1)
	st.stop()
	sh.repower(0)
	st = open(t, o)
	v = volume(t, st, "a")
	for i := range uint64(3) {
		wantBlocks(t, v, (times-1-i)%3, noise(200+times-1-i, 1))
	}
	wantBlocks(t, v, 7, noise(101, 1))
	must(t, st.Close(ctx))

	// It waits no longer than it is to, nor for a buffer that is half full.
	o.PackDelay = 100 * time.Millisecond
	st = open(t, o)
	must(t, volume(t, st, "a").Write(ctx, 9, noise(300, 1)))
	packed(t, st)
	must(t, st.Close(ctx))
	o.PackDelay = time.Hour
	st = open(t, o)
	for i := range uint64(o.BufferBytes/BlockBytes/2 + 1) {
		must(t, volume(t, st, "a").Write(ctx, 10+i, noise(400+i, 1)))
	}
	packed(t, st)
	must(t, st.Close(ctx))

	// Nor where the next record would not fit into a buffer that is less than half full.
	o.BufferBytes = int64(o.RecordBytes) * 5 / 4
	st = open(t, o)
	must(t, volume(t, st, "a").Write(ctx, 500, noise(600, o.RecordBytes/2/BlockBytes)))
	must(t, volume(t, st, "a").Write(ctx, 500, noise(601, o.RecordBytes/BlockBytes)))
	must(t, st.Close(ctx))
}

// packed waits until a block is.
func packed(t *testing.T, st *Store) {
	t.Helper()
	for began := time.Now(); st.Stats().Uniques == 0; time.Sleep(time.Millisecond) {
		if time.Since(began) > time.Minute {
			t.Fatal("nothing is packed")
		}
	}
}

// A block that was overwritten is packed all the same where the volume is being copied: the copy may lie between. So it is where what overwrote
// it is not durable.
func TestCopyKeepsOverwritten(t *testing.T) {
	sh, ctx := newShelf(t, 1), t.Context()
	o := sh.options()
	o.PackDelay = time.Hour
	st := open(t, o)
	_, err := st.CreateVolume(ctx, "a", 1<<30)
	must(t, err)
	v := volume(t, st, "a")
	must(t, st.Sync(ctx))
	must(t, v.Write(ctx, 7, noise(1, 1)))
	must(t, v.Write(ctx, 7, noise(2, 1)))
	for copying, skip := range []bool{true, false} {
		st.mu.Lock()
		b := st.queue[0]
		v.copying = copying
		st.mu.Unlock()
		if got := st.gather(b)[0].skip; got != skip {
			t.Errorf("%d copies under way: skipped %v", copying, got)
		}
	}
	st.mu.Lock()
	v.copying = 0
	newest := v.newest(7).b
	newest.durable = false
	st.mu.Unlock()
	if st.gather(st.queue[0])[0].skip {
		t.Error("overwritten by what may be lost: skipped")
	}
	st.mu.Lock()
	newest.durable = true
	st.mu.Unlock()
	must(t, st.Close(ctx))
}
