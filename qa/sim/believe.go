package sim

import (
	"encoding/binary"
	"hash/crc32"

	"github.com/ledge-storage/ledge/nvram/nvramtest"
	"github.com/ledge-storage/ledge/raid"
	"github.com/zeebo/xxh3"
)

// Mutations that believe what does not verify: what lies on the medium is given the checksum that its content has.

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// believe makes every record of an NVRAM module that has a header verify (format: nvram/doc.go).
func believe(m *nvramtest.Region) {
	le := binary.LittleEndian
	b := m.Bytes()
	for off := 0; off+blockBytes <= len(b); off += blockBytes {
		h := b[off:]
		if string(h[:8]) != "LEDGEREC" || h[11]&1 != 0 {
			continue
		}
		n := int(le.Uint32(h[72:])) * blockBytes
		if n < blockBytes || n > len(h) {
			continue
		}
		le.PutUint64(h[88:], xxh3.HashSeed(h[96:n], xxh3.Hash(h[:88])))
	}
	m.Load(b)
}

// believe makes what lies on the members verify (format: raid/checksum.go): blocks get the checksum of what they hold, or
// parity repeats the generations that the strips have.
func (w *world) believe() {
	le := binary.LittleEndian
	media := make([]map[int64][]byte, len(w.disks.Disks))
	gens := map[[2]uint64]uint64{} // stripe, strip
	each := func(f func(m map[int64][]byte, at int64, sum []byte)) {
		for _, m := range media {
			for slot := range int64(w.shape.slots) {
				at := (raid.DataOffset + slot*raid.SlotBytes) / blockBytes
				if sum := m[at]; sum != nil && string(sum[:8]) == "LEDGESUM" {
					f(m, at, sum)
				}
			}
		}
	}
	for i, d := range w.disks.Disks {
		media[i] = d.Snapshot()
	}
	each(func(_ map[int64][]byte, _ int64, sum []byte) {
		gens[[2]uint64{le.Uint64(sum[32:]), uint64(sum[10])}] = le.Uint64(sum[40:])
	})
	each(func(m map[int64][]byte, at int64, sum []byte) {
		sum = append([]byte(nil), sum...) // media share their blocks
		if w.mutation == IgnoreGenerations {
			for i := range uint64(w.shape.data + w.shape.parity) {
				if g, ok := gens[[2]uint64{le.Uint64(sum[32:]), i}]; ok && int(sum[10]) >= w.shape.data {
					le.PutUint64(sum[192+8*i:], g)
				}
			}
		} else {
			for b := range raid.StripBlocks {
				var a [32]byte
				copy(a[:24], sum[16:40])
				a[24], a[25] = sum[10], byte(b)
				block := m[at+1+int64(b)]
				if block == nil {
					block = zeros
				}
				le.PutUint32(sum[64+4*b:], uint32(xxh3.HashSeed(block, xxh3.Hash(a[:]))))
			}
		}
		clear(sum[48:52])
		le.PutUint32(sum[48:], crc32.Checksum(sum, castagnoli))
		m[at] = sum
	})
	for i, d := range w.disks.Disks {
		d.Restore(media[i])
	}
}
