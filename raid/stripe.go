package raid

import "unsafe"

// A full stripe in memory, on its way to the members: where each block lies, parity, checksums.
//
// Data is not copied where the drive takes several buffers at once (VectorWriter) and the data is aligned: the checksum block and the caller's
// blocks go out as they are. Parity and checksums are computed a few columns at a time, so that the data
// comes into a core's cache once.

// stripeImage is a stripe that is being written.
type stripeImage struct {
	a      *Array
	stripe uint64
	gens   []uint64
	// blocks are those of all strips, strip by strip: the caller's, or in slots.
	blocks [][]byte
	// heads hold the checksum blocks: blocks of their own, or the whole slots of strips that lie in one piece.
	heads []*buffer
	sums  []*stripSum
	// adjoined: the data blocks of each strip lie behind each other in memory.
	adjoined bool
}

// layOut finds a place for each block.
func (a *Array) layOut(stripe, gen uint64, data [][]byte, places []place) *stripeImage {
	width, k := a.layout.Width(), a.layout.Data()
	w := &stripeImage{a: a, stripe: stripe, gens: make([]uint64, width), blocks: make([][]byte, width*StripBlocks),
		heads: make([]*buffer, width), sums: make([]*stripSum, width), adjoined: true}
	sums := make([]stripSum, width)
	in := spans{bufs: data}
	for i := range width {
		w.gens[i] = gen
		w.sums[i] = &sums[i]
		strip := w.strip(i)
		inPlace := i < k
		for c := 0; c < StripBlocks && i < k; c++ {
			strip[c] = in.next()
			inPlace = inPlace && uintptr(unsafe.Pointer(&strip[c][0]))%BlockBytes == 0
		}
		if m := places[i].member; inPlace && (m == nil || m.vector != nil) {
			w.heads[i] = newBlock()
			w.adjoined = w.adjoined && len(join(strip)) == 1
			continue
		}
		w.heads[i] = newSlot()
		for c := range strip {
			b := w.heads[i].b[(1+c)*BlockBytes : (2+c)*BlockBytes : (2+c)*BlockBytes]
			copy(b, strip[c])
			strip[c] = b
		}
	}
	return w
}

func (w *stripeImage) strip(i int) [][]byte { return w.blocks[i*StripBlocks:][:StripBlocks] }

// chunkColumns are encoded at once where strips lie in one piece: of 8+2, 160 KiB.
const chunkColumns = 4

// encode computes parity and checksums.
func (w *stripeImage) encode() error {
	step := 1
	if w.adjoined {
		step = chunkColumns
	}
	sums := newSummer(w.a.sums, w.a.id, w.stripe)
	shards := make([][]byte, len(w.heads))
	for c := 0; c < StripBlocks; c += step {
		for i := range shards {
			shards[i] = unsafe.Slice(&w.strip(i)[c][0], step*BlockBytes)
		}
		if err := w.a.code.Encode(shards); err != nil {
			return err
		}
		for i := range shards {
			for s := range step {
				w.sums[i].crcs[c+s] = sums.block(i, c+s, w.strip(i)[c+s])
			}
		}
	}
	return nil
}

// plan makes the checksum blocks and the writes; meta is what the stripe is after them.
func (w *stripeImage) plan(places []place) (t *batch, meta *stripeMeta) {
	k := w.a.layout.Data()
	t = w.a.newBatch()
	for i, sum := range w.sums {
		sum.gen = w.gens[i]
		if i >= k {
			sum.gens = w.gens
		}
		head := w.heads[i]
		sum.encode(head.b, w.a.address(w.stripe, i))
		for _, p := range []struct {
			m   *member
			off int64
		}{{places[i].member, places[i].off}, {places[i].twin, places[i].twinOff}} {
			switch {
			case p.m == nil:
			case len(head.b) == SlotBytes:
				t.write(p.m, i, head, head.b, p.off)
			default:
				t.writeVector(p.m, i, head, append([][]byte{head.b}, join(w.strip(i))...), p.off)
			}
		}
	}
	return t, &stripeMeta{gens: w.gens, parity: true, sums: w.sums}
}

func (w *stripeImage) release() {
	for _, b := range w.heads {
		b.release()
	}
}

// join makes one slice of those that lie behind each other in one piece of memory: where the one's capacity reaches into
// the other. (Neighbours by address alone may be two allocations, which no slice may span.)
func join(blocks [][]byte) [][]byte {
	out := blocks[:0:0]
	for _, b := range blocks {
		if n := len(out); n > 0 {
			last := out[n-1]
			if all := len(last) + len(b); len(b) > 0 && cap(last) >= all && &last[:all][len(last)] == &b[0] {
				out[n-1] = last[:all]
				continue
			}
		}
		out = append(out, b)
	}
	return out
}
