package dedup

import (
	"crypto/sha256"
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"github.com/klauspost/cpuid/v2"
)

func engines() []Engine {
	es := []Engine{Standard, Stream}
	if cpuid.CPU.Supports(cpuid.AVX512F, cpuid.AVX512BW, cpuid.AVX512VL) {
		es = append(es, Lanes)
	}
	return es
}

// Every engine gives SHA-256(block ‖ key), whatever the number of blocks, from many goroutines.
func TestEnginesAgree(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	key := Key{1, 2, 3, 31: 9}
	for _, n := range []int{1, 2, 15, 16, 17, 100} {
		blocks := make([][]byte, n)
		want := make([]Fingerprint, n)
		for i := range blocks {
			blocks[i] = make([]byte, BlockBytes)
			for j := 0; j < BlockBytes; j += 8 {
				binary.LittleEndian.PutUint64(blocks[i][j:], rng.Uint64())
			}
			want[i] = sha256.Sum256(append(append([]byte(nil), blocks[i]...), key[:]...))
		}
		for _, e := range engines() {
			h := NewHasherWith(key, e)
			done := make(chan bool)
			for range 3 {
				go func() {
					got := make([]Fingerprint, n)
					h.Sum(got, blocks)
					ok := true
					for i := range got {
						ok = ok && got[i] == want[i]
					}
					done <- ok
				}()
			}
			for range 3 {
				if !<-done {
					t.Errorf("%v differs for %d blocks", e, n)
				}
			}
		}
	}
	if NewHasher(Key{}).Engine() != Fastest() {
		t.Error("NewHasher does not use the fastest engine")
	}
}

func fp(n uint64) (f Fingerprint) {
	s := sha256.Sum256(binary.LittleEndian.AppendUint64(nil, n))
	return Fingerprint(s)
}

func TestIndex(t *testing.T) {
	x := NewIndex(1 << 20) // 16384 buckets, 131072 entries
	if x.Bytes() != 1<<20 {
		t.Fatalf("memory %d", x.Bytes())
	}
	const n = 60000
	ref := func(i uint64) Ref {
		return Ref{Segment: uint32(i%(1<<SegmentBits-1) + 1), Slot: uint16(i % (1 << SlotBits))}
	}
	for i := range uint64(n) {
		f := fp(i)
		if err := x.Insert(&f, ref(i)); err != nil {
			t.Fatal(err)
		}
	}
	wrong, missing := 0, 0
	for i := range uint64(n) {
		f := fp(i)
		r, ok := x.Lookup(&f)
		if !ok {
			missing++
		} else if r != ref(i) {
			wrong++
		}
	}
	if missing > n/50 || wrong > 5 {
		t.Errorf("half full: %d missing, %d wrong of %d", missing, wrong, n)
	}
	f := fp(7)
	x.Insert(&f, Ref{Segment: 1<<SegmentBits - 1, Slot: 1<<SlotBits - 1})
	if r, ok := x.Lookup(&f); !ok || r != (Ref{Segment: 1<<SegmentBits - 1, Slot: 1<<SlotBits - 1}) {
		t.Errorf("the newest place does not win: %v %v", r, ok)
	}
	x.Remove(&f, Ref{Segment: 1, Slot: 1})
	if _, ok := x.Lookup(&f); !ok {
		t.Error("removing another place removed this one")
	}
	x.Remove(&f, Ref{Segment: 1<<SegmentBits - 1, Slot: 1<<SlotBits - 1})
	if _, ok := x.Lookup(&f); ok {
		t.Error("removed entry is found")
	}
	for _, r := range []Ref{{}, {Segment: 1 << SegmentBits}, {Segment: 1, Slot: 1 << SlotBits}} {
		if x.Insert(&f, r) == nil {
			t.Errorf("%v was accepted", r)
		}
	}
	// Far beyond its size it forgets, and does not grow.
	for i := range uint64(400000) {
		f := fp(i)
		x.Insert(&f, ref(i))
	}
	if x.Len() > 131072 || x.Bytes() != 1<<20 {
		t.Errorf("grew to %d entries, %d bytes", x.Len(), x.Bytes())
	}
}

func BenchmarkFingerprint(b *testing.B) {
	blocks := make([][]byte, 256)
	for i := range blocks {
		blocks[i] = make([]byte, BlockBytes)
	}
	sums := make([]Fingerprint, len(blocks))
	for _, e := range engines() {
		h := NewHasherWith(Key{}, e)
		b.Run(e.String(), func(b *testing.B) {
			b.SetBytes(int64(len(blocks)) * BlockBytes)
			for b.Loop() {
				h.Sum(sums, blocks)
			}
		})
	}
}
