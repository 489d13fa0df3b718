package volume

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"sync/atomic"
	"testing"

	"github.com/ledge-storage/ledge/host/store"
	"github.com/ledge-storage/ledge/target"
	"github.com/ledge-storage/ledge/target/scsi"
)

var update = flag.Bool("update", false, "write the golden file")

// brittle is a lun whose power goes in the middle of a write.
type brittle struct {
	*lun
	left *atomic.Int64 // writes of both LUNs until then
}

func writesLeft(n int64) *atomic.Int64 {
	left := new(atomic.Int64)
	left.Store(n)
	return left
}

var errPower = errors.New("power")

func (b brittle) WriteAt(ctx context.Context, p []byte, off int64) error {
	left := b.left.Add(-1)
	if left == 0 {
		b.lun.WriteAt(ctx, p[:len(p)/4096/2*4096], off) // torn
	}
	if left <= 0 {
		return errPower
	}
	return b.lun.WriteAt(ctx, p, off)
}

func (b brittle) Unmap(ctx context.Context, off, n int64) error {
	if b.left.Load() <= 0 {
		return errPower
	}
	return b.lun.Unmap(ctx, off, n)
}

func noise(seed uint64, n int) []byte {
	g := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), 1})
	b := make([]byte, n)
	g.Read(b)
	return b
}

// TestReservationsThroughPowerCuts: on the next host the volume has the state that was acknowledged last, or the one
// that was under way, whatever their lengths; and it has them before and after they are packed.
func TestReservationsThroughPowerCuts(t *testing.T) {
	ctx := t.Context()
	for round := range 8 {
		journal, segments := &lun{size: 32 << 20, blocks: map[int64][]byte{}}, &lun{size: 1 << 40, blocks: map[int64][]byte{}}
		rng := rand.New(rand.NewPCG(uint64(round), 1))
		left := writesLeft(int64(10 + rng.IntN(60)))
		open := func(power *atomic.Int64) (*store.Store, *Reservations) {
			t.Helper()
			st, err := store.Open(ctx, store.Options{Journal: brittle{journal, power}, Segments: brittle{segments, power}})
			if err != nil {
				t.Fatal(err)
			}
			r, err := OpenReservations(ctx, st)
			if err != nil {
				t.Fatal(err)
			}
			return st, r
		}
		always := writesLeft(1 << 60)
		st, r := open(always)
		id := map[string][16]byte{}
		for _, name := range []string{"v", "w"} {
			v, err := st.CreateVolume(ctx, name, 1<<20)
			if err != nil {
				t.Fatal(err)
			}
			id[name] = v.UUID
		}
		if err := r.Of(id["w"]).Save(noise(9999, 70000)); err != nil {
			t.Fatal(err)
		}
		if err := st.Close(ctx); err != nil {
			t.Fatal(err)
		}
		st, r = open(left)
		var acked, begun []byte
		lengths := []int{1, 4064, 4065, 100_000, maxStateBytes, 300}
		for v := uint64(1); ; v++ {
			begun = noise(v, lengths[rng.IntN(len(lengths))])
			if r.Of(id["v"]).Save(begun) != nil {
				break
			}
			acked = begun
		}
		st.Close(ctx) // fails: the power is off
		for pass := range 2 {
			st, r = open(always)
			got, err := r.Of(id["v"]).Load()
			if err != nil || !bytes.Equal(got, acked) && !bytes.Equal(got, begun) {
				t.Fatalf("round %d, pass %d: %d bytes, %d were acknowledged and %d begun: %v", round, pass, len(got), len(acked), len(begun), err)
			}
			if got, err := r.Of(id["w"]).Load(); err != nil || !bytes.Equal(got, noise(9999, 70000)) {
				t.Fatalf("round %d, pass %d: another volume's: %d bytes, %v", round, pass, len(got), err)
			}
			if err := st.Close(ctx); err != nil { // packs
				t.Fatal(err)
			}
		}
	}
}

// TestReservationSlots: a deleted volume's slot is another's; what is too long or damaged is an answer.
func TestReservationSlots(t *testing.T) {
	st, d := device(t, 1<<20, 512)
	r, err := OpenReservations(t.Context(), st)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Forget(t.Context(), [16]byte{1}); err != nil {
		t.Errorf("forget what never was: %v", err)
	}
	if len(st.Volumes()) != 1 {
		t.Error("a store without reservations has a volume for them")
	}
	v := r.Of(d.vol.UUID())
	if err := v.Save(make([]byte, maxStateBytes+1)); !errors.Is(err, target.ErrNoSpace) {
		t.Errorf("a state too long: %v", err)
	}
	if err := v.Save([]byte("one")); err != nil {
		t.Fatal(err)
	}
	if err := r.Of([16]byte{7}).Save([]byte("seven")); err != nil { // no volume has it: gone with the next opening
		t.Fatal(err)
	}
	again, err := OpenReservations(t.Context(), st)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := again.Of([16]byte{7}).Load(); err != nil || len(b) != 0 {
		t.Errorf("of a volume that is not there: %q %v", b, err)
	}
	if b, err := again.Of(d.vol.UUID()).Load(); err != nil || string(b) != "one" {
		t.Errorf("%q %v", b, err)
	}
	if err := again.Forget(t.Context(), d.vol.UUID()); err != nil {
		t.Fatal(err)
	}
	if b, err := again.Of(d.vol.UUID()).Load(); err != nil || len(b) != 0 {
		t.Errorf("forgotten: %q %v", b, err)
	}
	if err := again.Of(d.vol.UUID()).Save([]byte("two")); err != nil {
		t.Fatal(err)
	}
	bad := encodeSlot(d.vol.UUID(), []byte("two"))
	bad[slotHead] ^= 1
	if err := again.vol.Write(t.Context(), 0, bad); err != nil {
		t.Fatal(err)
	}
	if _, err := again.Of(d.vol.UUID()).Load(); !errors.Is(err, store.ErrCorrupt) {
		t.Errorf("damaged: %v", err)
	}
	if err := scsi.NewTarget("iqn.x", scsi.Options{}).Attach(0, d, scsi.UnitOptions{Reservations: again.Of(d.vol.UUID())}); !errors.Is(err, store.ErrCorrupt) {
		t.Errorf("a volume whose reservations are damaged is served: %v", err)
	}
}

// The format in the store does not change.
func TestGolden(t *testing.T) {
	got := bytes.TrimRight(encodeSlot([16]byte{1, 2, 3}, []byte(`{"version":1}`)), "\x00")
	const path = "testdata/reservations.golden"
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("the format of a slot has changed (%v)", err)
	}
}

// FuzzSlot: a slot is what encodeSlot makes, or an error.
func FuzzSlot(f *testing.F) {
	f.Add(encodeSlot([16]byte{1}, []byte("state")), true)
	f.Add([]byte(slotMagic), false)
	f.Fuzz(func(t *testing.T, b []byte, right bool) {
		if n := len(b); right && n >= slotHead {
			if l := int(binary.LittleEndian.Uint32(b[12:])); l <= n-slotHead {
				binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b[12:slotHead+l], castagnoli))
			}
		}
		state, id, err := decodeSlot(b)
		if err != nil {
			if !errors.Is(err, store.ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		again, sameID, err := decodeSlot(encodeSlot(id, state))
		if err != nil || sameID != id || !bytes.Equal(again, state) {
			t.Fatalf("%x came back as %x, %v", state, again, err)
		}
	})
}

type sink struct{}

func (sink) DataIn(b *scsi.Buffer) { b.Release() }
func (sink) Aborted(uint64)        {}

// TestThreshold: initiators hear that the store runs out before it does.
func TestThreshold(t *testing.T) {
	o := store.Options{Journal: &lun{size: 32 << 20, blocks: map[int64][]byte{}}, Segments: &lun{size: 1 << 40, blocks: map[int64][]byte{}}, CapacityBytes: 22 * store.SegmentBytes}
	st, err := store.Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close(context.Background())
	if _, err := st.CreateVolume(t.Context(), "v", 1<<30); err != nil {
		t.Fatal(err)
	}
	d, err := Open(st, "v", Options{BlockBytes: 4096})
	if err != nil {
		t.Fatal(err)
	}
	tgt := scsi.NewTarget("iqn.x", scsi.Options{})
	if err := tgt.Attach(0, d, scsi.UnitOptions{}); err != nil {
		t.Fatal(err)
	}
	n := tgt.Connect("iqn.y", [6]byte{1}, 1)
	do := func(out []byte, cdb ...byte) string {
		tk := &scsi.Task{}
		tk.Reset()
		tk.Sink, tk.Aborter, tk.Nexus = sink{}, sink{}, n
		copy(tk.CDB[:], cdb)
		tk.OutLimit = int64(len(out))
		if tk.Prepare() {
			tk.Out = append(tk.Out[:0], out)
			tk.Run()
		}
		tk.Finish()
		if len(tk.Sense) > 13 {
			return fmt.Sprintf("%x/%02x%02x", tk.Sense[2]&0xF, tk.Sense[12], tk.Sense[13])
		}
		return fmt.Sprintf("status %d", tk.Status)
	}
	do(nil, 0, 0, 0, 0, 0, 0) // power on
	for i := range 128 {
		s := d.Space()
		cdb := []byte{0x2A, 0, 0, 0, 0, 0, 0, 1, 0, 0} // 1 MiB
		binary.BigEndian.PutUint32(cdb[2:], uint32(i*256))
		switch got := do(noise(uint64(i), 1<<20), cdb...); got {
		case "status 0":
		case "6/3807":
			if s.AvailableBytes >= s.ThresholdBytes {
				t.Errorf("told with %d bytes left of a threshold of %d", s.AvailableBytes, s.ThresholdBytes)
			}
			return
		default:
			t.Fatalf("write %d: %s, and nothing told before; %+v", i, got, s)
		}
	}
	t.Errorf("never told: %+v", d.Space())
}
