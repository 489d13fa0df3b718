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

// An index that is told of eight times what it has room for keeps a sample of it, thinner the more there is and spread evenly; half of
// what was told of it last is there. What it is told of as a hint takes no room from what it has.
func TestIndexSample(t *testing.T) {
	const room = 1 << 14
	x := NewIndex(room * 8)
	ref := Ref{Segment: 1}
	there := func(i uint64) bool {
		f := fp(i)
		_, ok := x.Lookup(&f)
		return ok
	}
	for i := range uint64(8 * room) {
		f := fp(i)
		x.Insert(&f, ref)
	}
	if !x.Forgot() || x.Len() != room {
		t.Fatalf("%d entries, forgot %v", x.Len(), x.Forgot())
	}
	old, long := 0, 0 // of what is old; of its runs of 128, those without any
	for i := uint64(0); i < 7*room; {
		before := old
		for range 128 {
			if there(i) {
				old++
			}
			i++
		}
		if old == before {
			long++
		}
	}
	if share := float64(old) / (7 * room); share < 0.06 || long > 7*room/128/100 {
		t.Errorf("%.3f of what is old, %d of %d runs of 128 have none", share, long, 7*room/128)
	}
	fresh := 0
	for i := range uint64(room / 16) {
		if there(8*room - 1 - i) {
			fresh++
		}
	}
	if fresh < room/32 {
		t.Errorf("%d of the newest %d", fresh, room/16)
	}
	before := 0
	for i := range uint64(8 * room) {
		if there(i) {
			before++
		}
	}
	taken := 0
	for i := range uint64(room) {
		f := fp(100*room + i)
		if x.Hint(&f, ref); there(100*room + i) {
			taken++
		}
	}
	after := 0
	for i := range uint64(8 * room) {
		if there(i) {
			after++
		}
	}
	if lost := before - after; lost > taken || taken > room/4 || taken == 0 {
		t.Errorf("hints: %d of %d taken, %d of %d others lost", taken, room, lost, before)
	}
	t.Logf("%d of %d old, %d of %d newest, %d hints taken", old, 7*room, fresh, room/16, taken)
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
