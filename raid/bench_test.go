package raid_test

import (
	"math/rand/v2"
	"path/filepath"
	"sync"
	"testing"

	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/raid/drive"
)

// Against the floor: the same bytes, in the same sizes, to the same kind of files by a bare program. Compare
// BenchmarkWriteStripe with BenchmarkBareWrite, ReadStripe and ReadDegraded with BareRead.

const benchSlots = 40

func benchDrives(b *testing.B) []raid.Drive {
	b.Helper()
	dir := b.TempDir()
	var out []raid.Drive
	for i := range 12 {
		p := filepath.Join(dir, string(rune('a'+i)))
		must(b, drive.Create(p, driveBytes(benchSlots)))
		d, err := drive.Open(p, drive.Options{Controller: "A"})
		must(b, err)
		out = append(out, d)
	}
	return out
}

func benchArray(b *testing.B) (*raid.Array, raid.Geometry) {
	b.Helper()
	a, err := raid.Create(ctx, benchDrives(b), raid.Options{})
	must(b, err)
	b.Cleanup(func() { a.Close() })
	must(b, a.Acquire(ctx, 1))
	return a, a.Geometry()
}

func fillBench(b *testing.B, a *raid.Array, g raid.Geometry) []byte {
	data := make([]byte, g.StripeBytes)
	for i := range data {
		data[i] = byte(i * 7)
	}
	for s := range g.Stripes {
		must(b, a.WriteStripe(ctx, s, 1, [][]byte{data}))
	}
	return data
}

func BenchmarkWriteStripe(b *testing.B) {
	a, g := benchArray(b)
	data := fillBench(b, a, g)
	b.SetBytes(g.StripeBytes)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		must(b, a.WriteStripe(ctx, uint64(i)%g.Stripes, uint64(i)+2, [][]byte{data}))
	}
}

func BenchmarkBareWrite(b *testing.B) {
	drives := benchDrives(b)
	buf := make([]byte, raid.SlotBytes)
	b.SetBytes(8 * raid.StripBytes)
	for i := 0; b.Loop(); i++ {
		var wg sync.WaitGroup
		for _, d := range drives[:10] {
			wg.Add(1)
			go func() {
				defer wg.Done()
				d.WriteAt(buf, raid.DataOffset+int64(i%benchSlots)*raid.SlotBytes)
			}()
		}
		wg.Wait()
	}
}

func benchRead(b *testing.B, missing ...int) {
	drives := benchDrives(b)
	a, err := raid.Create(ctx, drives, raid.Options{})
	must(b, err)
	g := a.Geometry()
	data := fillBench(b, a, g)
	must(b, a.Flush(ctx))
	for _, m := range missing {
		drives[m] = nil
	}
	a, err = raid.Open(ctx, drives, raid.Options{})
	must(b, err)
	b.SetBytes(g.StripeBytes)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		must(b, a.Read(ctx, uint64(i)%g.Stripes, 0, [][]byte{data}))
	}
}

func BenchmarkReadStripe(b *testing.B)   { benchRead(b) }
func BenchmarkReadDegraded(b *testing.B) { benchRead(b, 2, 7) }

func BenchmarkBareRead(b *testing.B) {
	drives := benchDrives(b)
	bufs := make([][]byte, 8)
	for i := range bufs {
		bufs[i] = make([]byte, raid.StripBytes)
	}
	for _, d := range drives {
		for s := range benchSlots {
			d.WriteAt(make([]byte, raid.SlotBytes), raid.DataOffset+int64(s)*raid.SlotBytes)
		}
	}
	b.SetBytes(8 * raid.StripBytes)
	for i := 0; b.Loop(); i++ {
		var wg sync.WaitGroup
		for j, d := range drives[:8] {
			wg.Add(1)
			go func() {
				defer wg.Done()
				d.ReadAt(bufs[j], raid.DataOffset+int64(i%benchSlots)*raid.SlotBytes)
			}()
		}
		wg.Wait()
	}
}

// BenchmarkRead4K reads blocks at random: with their checksum blocks in memory, with the generations alone, with nothing (as from an
// array much larger than its cache).
func BenchmarkRead4K(b *testing.B) {
	for _, how := range []string{"sums", "generations", "nothing"} {
		b.Run(how, func(b *testing.B) {
			drives := benchDrives(b)
			o := raid.Options{}
			if how == "generations" {
				o.CacheBytes = 5700 // whole of one stripe
			}
			a, err := raid.Create(ctx, drives, o)
			must(b, err)
			b.Cleanup(func() { a.Close() })
			g := a.Geometry()
			fillBench(b, a, g)
			p := make([]byte, raid.BlockBytes)
			b.ReportAllocs()
			rng := rand.New(rand.NewPCG(1, 1))
			for b.Loop() {
				if how == "nothing" {
					raid.ForgetSums(a)
				}
				must(b, a.Read(ctx, rng.Uint64N(g.Stripes), rng.IntN(256), [][]byte{p}))
			}
		})
	}
}

func BenchmarkUpdate4K(b *testing.B) {
	a, g := benchArray(b)
	fillBench(b, a, g)
	p := make([]byte, raid.BlockBytes)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		u, err := a.PrepareUpdate(ctx, uint64(i)%g.Stripes, uint64(i)+2, []raid.BlockWrite{{Block: i * 37 % 256, Data: p}})
		must(b, err)
		u.Encode()
		must(b, a.Apply(ctx, u))
		u.Release()
	}
}
