package volume

import (
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/ledge-storage/ledge/host/store"
)

// BenchmarkRead4K is a read of a block that is in the line cache, as the target engine asks for it: what metering costs
// is small against text. Noise is not decompressed, so that there is least to hide behind.
func BenchmarkRead4K(b *testing.B) {
	words := strings.Fields("func return err if nil store segment { } for range")
	for _, kind := range []string{"text", "noise"} {
		b.Run(kind, func(b *testing.B) {
			st, d := device(b, 64<<20, 4096)
			rng := rand.New(rand.NewPCG(1, 1))
			for at := uint64(0); at < 4096; at += 256 {
				p := make([]byte, 0, 1<<20+64)
				for len(p) < 1<<20 {
					if kind == "noise" {
						p = append(p, byte(rng.Uint32()))
						continue
					}
					p = append(append(p, words[rng.IntN(len(words))]...), ' ')
					if rng.IntN(6) == 0 {
						p = append(p, byte('a'+rng.IntN(26)), byte('a'+rng.IntN(26)))
					}
				}
				if err := d.Write(b.Context(), at, [][]byte{p[:1<<20]}, false); err != nil {
					b.Fatal(err)
				}
			}
			if err := st.Checkpoint(b.Context()); err != nil {
				b.Fatal(err)
			}
			dst := [][]byte{make([]byte, store.BlockBytes)}
			b.SetBytes(store.BlockBytes)
			lba := uint64(0)
			for b.Loop() {
				if err := d.Read(b.Context(), lba%4096, dst); err != nil {
					b.Fatal(err)
				}
				lba += 7
			}
		})
	}
}
