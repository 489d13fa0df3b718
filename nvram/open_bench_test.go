package nvram_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/nvram/region"
)

// BenchmarkOpen is the start on a log that is full, of 1 MiB records and of 4 KiB ones, and its replay.
func BenchmarkOpen(b *testing.B) {
	const size = 512 << 20
	dir, err := os.MkdirTemp("/dev/shm", "nvram")
	if err != nil {
		b.Skip(err)
	}
	defer os.RemoveAll(dir)
	r, err := region.Open(filepath.Join(dir, "nv"), region.Options{Create: true, Size: size})
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	area := nvram.Area{Size: size}
	for _, blocks := range []int{255, 1} {
		if err := nvram.Format(r, area, nvram.FormatOptions{ID: nvram.NewID(), Epoch: 1, UpdateBytes: 16 << 20}); err != nil {
			b.Fatal(err)
		}
		l, err := nvram.Open(b.Context(), r, area, nvram.Options{Epoch: 1})
		if err != nil {
			b.Fatal(err)
		}
		payload := nvram.AlignedBlocks(blocks)
		for i := uint64(0); l.Stats().Used < l.Stats().Bytes-l.Stats().Reserve-4<<20; i++ {
			if _, err := l.Append(b.Context(), nvram.Set{Extents: []nvram.Extent{{LUN: 1, LBA: i, Blocks: uint32(blocks)}}, Payload: [][]byte{payload}}); err != nil {
				b.Fatal(err)
			}
		}
		if err := l.Close(); err != nil {
			b.Fatal(err)
		}
		b.Run(fmt.Sprintf("%dKiB/open", 4*blocks), func(b *testing.B) {
			b.SetBytes(size)
			for b.Loop() {
				l, err := nvram.Open(b.Context(), r, area, nvram.Options{Epoch: 1})
				if err != nil {
					b.Fatal(err)
				}
				l.Close()
			}
		})
		b.Run(fmt.Sprintf("%dKiB/replay", 4*blocks), func(b *testing.B) {
			l, err := nvram.Open(b.Context(), r, area, nvram.Options{Epoch: 1})
			if err != nil {
				b.Fatal(err)
			}
			defer l.Close()
			b.SetBytes(size)
			for b.Loop() {
				if err := l.Replay(func(uint64, nvram.Set) error { return nil }); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
