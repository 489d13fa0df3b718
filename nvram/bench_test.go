package nvram_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/nvram/nvramtest"
	"github.com/ledge-storage/ledge/nvram/region"
)

// media to compare on: memory shows the code's own cost, a file in /dev/shm a system call's.
func media(b *testing.B) map[string]nvram.Region {
	const size = 128 << 20
	m := map[string]nvram.Region{"memory": nvramtest.NewRegion(size, 512, 1)}
	dir, err := os.MkdirTemp("/dev/shm", "nvram")
	if err != nil {
		return m
	}
	b.Cleanup(func() { os.RemoveAll(dir) })
	r, err := region.Open(filepath.Join(dir, "nv"), region.Options{Create: true, Size: size})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { r.Close() })
	m["shm"] = r
	return m
}

// BenchmarkAppend against BenchmarkRaw: what the log costs over a bare write of payload and one header block.
func BenchmarkAppend(b *testing.B) {
	for name, r := range media(b) {
		own, other := nvram.Areas(r.Size())
		for _, c := range []struct {
			label   string
			blocks  int
			writers int
			mirror  bool
		}{{"4KiB/qd1", 1, 1, false}, {"4KiB/qd32", 1, 32, false}, {"128KiB/qd1", 32, 1, false}, {"1MiB/qd1", 256, 1, false}, {"4KiB/qd1/mirrored", 1, 1, true}, {"4KiB/qd32/mirrored", 1, 32, true}} {
			b.Run(name+"/"+c.label, func(b *testing.B) {
				if err := nvram.Format(r, own, nvram.FormatOptions{ID: nvram.NewID()}); err != nil {
					b.Fatal(err)
				}
				o := nvram.Options{}
				if c.mirror {
					if err := nvram.FormatMirror(r, other); err != nil {
						b.Fatal(err)
					}
					m, err := nvram.OpenMirror(r, other)
					if err != nil {
						b.Fatal(err)
					}
					o.Replicator, o.Witness = nvramtest.NewPartner(m), &nvramtest.Witness{}
				}
				l, err := nvram.Open(b.Context(), r, own, o)
				if err != nil {
					b.Fatal(err)
				}
				defer l.Close()
				s := nvram.Set{Extents: []nvram.Extent{{LUN: 1, Blocks: uint32(c.blocks)}}, Payload: [][]byte{make([]byte, c.blocks*block)}}
				b.SetBytes(int64(c.blocks * block))
				b.ReportAllocs()
				b.SetParallelism((c.writers + 1) / 2)
				b.ResetTimer()
				if c.writers == 1 {
					for i := 0; b.Loop(); i++ {
						appendOne(b, l, s, uint64(i))
					}
					return
				}
				b.RunParallel(func(pb *testing.PB) {
					for i := uint64(0); pb.Next(); i++ {
						appendOne(b, l, s, i)
					}
				})
			})
		}
	}
}

func appendOne(b *testing.B, l *nvram.Log, s nvram.Set, i uint64) {
	lsn, err := l.Append(b.Context(), s)
	if err != nil {
		b.Error(err)
	}
	if i%256 == 255 || len(s.Payload[0]) > 1<<19 {
		l.Trim(lsn)
	}
}

func BenchmarkRaw(b *testing.B) {
	for name, r := range media(b) {
		for _, blocks := range []int{1, 32, 256} {
			b.Run(fmt.Sprintf("%s/%dKiB", name, 4*blocks), func(b *testing.B) {
				p := nvram.AlignedBlocks(blocks + 1)
				b.SetBytes(int64(blocks * block))
				for i := int64(0); b.Loop(); i++ {
					if _, err := r.WriteAt(p, i%60*int64(len(p))); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
