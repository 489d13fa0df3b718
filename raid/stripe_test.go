package raid_test

import (
	"bytes"
	"testing"
	"unsafe"

	"github.com/ledge-storage/ledge/raid"
)

// plain hides that a drive is a raid.VectorWriter.
type plain struct{ raid.Drive }

// alignedCopy copies p to an address that is a multiple of a block, plus skew.
func alignedCopy(p []byte, skew int) []byte {
	b := make([]byte, len(p)+2*raid.BlockBytes)
	at := (raid.BlockBytes-int(uintptr(unsafe.Pointer(&b[0]))%raid.BlockBytes))%raid.BlockBytes + skew
	copy(b[at:], p)
	return b[at : at+len(p)]
}

// Wherever the blocks of a stripe lie in memory, the members hold the same; and each strip is one write.
func TestWriteStripeMemory(t *testing.T) {
	cut := func(p []byte, n, skew int) (bufs [][]byte) {
		for ; len(p) > 0; p = p[min(n, len(p)):] {
			bufs = append(bufs, alignedCopy(p[:min(n, len(p))], skew))
		}
		return bufs
	}
	for name, lay := range map[string]func(p []byte) [][]byte{
		"one piece":           func(p []byte) [][]byte { return cut(p, len(p), 0) },
		"one piece, odd":      func(p []byte) [][]byte { return cut(p, len(p), 8) },
		"strips":              func(p []byte) [][]byte { return cut(p, raid.StripBytes, 0) },
		"blocks":              func(p []byte) [][]byte { return cut(p, raid.BlockBytes, 0) },
		"blocks, odd":         func(p []byte) [][]byte { return cut(p, raid.BlockBytes, 512) },
		"pieces, some odd":    func(p []byte) [][]byte { return append(cut(p[:40<<12], 5<<12, 0), cut(p[40<<12:], 7<<12, 100)...) },
		"one block, repeated": nil,
	} {
		for _, vector := range []bool{true, false} {
			b := newBed(t, 6, raid.Options{K: 3, M: 2}, 5)
			if !vector {
				b.a.Close()
				drives := b.set.Drives("A")
				for i := range drives {
					drives[i] = plain{drives[i]}
				}
				a, err := raid.Open(ctx, drives, raid.Options{})
				must(t, err)
				b.adopt(a)
			}
			for s := range b.geo.Stripes {
				want := b.random(b.blocks())
				var bufs [][]byte
				if lay != nil {
					bufs = lay(want)
				} else {
					block := alignedCopy(want[:raid.BlockBytes], 0)
					for range b.blocks() {
						bufs = append(bufs, block)
					}
					want = bytes.Repeat(block, b.blocks())
				}
				var before uint64
				for _, d := range b.set.Disks {
					before += d.Stats().Writes
				}
				b.gen++
				must(t, b.a.WriteStripe(ctx, s, b.gen, bufs))
				b.want[s] = want
				var after uint64
				for _, d := range b.set.Disks {
					after += d.Stats().Writes
				}
				if s > 0 && after-before != 5 { // the first one settles the label
					t.Errorf("%s: a stripe of 3+2 took %d writes", name, after-before)
				}
			}
			b.cold()
			b.checkAll()
			b.scrubClean()
			b.cold(1, 4)
			b.checkAll()
			b.a.Close()
		}
	}
}
