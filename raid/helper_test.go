package raid_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/raid/raidtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var ctx = context.Background()

// bed is an array on test drives and what should be on it.
type bed struct {
	t    testing.TB
	set  *raidtest.Set
	a    *raid.Array
	geo  raid.Geometry
	want map[uint64][]byte
	gen  uint64
	rng  *rand.Rand
	turn atomic.Int64 // of reads
}

func driveBytes(slots int) int64 { return raid.DataOffset + int64(slots)*raid.SlotBytes }

func deterministic(seed uint64) func([]byte) {
	r := rand.New(rand.NewPCG(seed, 7))
	return func(b []byte) {
		for i := range b {
			b[i] = byte(r.Uint32())
		}
	}
}

func newBed(t testing.TB, n int, o raid.Options, slots int) *bed {
	t.Helper()
	o.NoSpares = o.Spares == 0
	if o.Random == nil {
		o.Random = deterministic(1)
	}
	b := &bed{t: t, set: raidtest.NewSet(42, n, driveBytes(slots)), want: make(map[uint64][]byte), rng: rand.New(rand.NewPCG(3, 4))}
	a, err := raid.Create(ctx, b.set.Drives("A"), o)
	if err != nil {
		t.Fatal(err)
	}
	b.adopt(a)
	return b
}

func (b *bed) adopt(a *raid.Array) {
	b.a, b.geo = a, a.Geometry()
	b.t.Cleanup(func() { a.Close() })
}

// clone copies drives and expectations and opens the copy.
func (b *bed) clone(missing ...int) *bed {
	b.t.Helper()
	c := &bed{t: b.t, set: b.set.Clone(), want: make(map[uint64][]byte), gen: b.gen, rng: b.rng}
	for s, d := range b.want {
		c.want[s] = bytes.Clone(d)
	}
	c.open(raid.Options{}, missing...)
	return c
}

func (b *bed) open(o raid.Options, missing ...int) {
	b.t.Helper()
	drives := b.set.Drives("A")
	for _, m := range missing {
		drives[m] = nil
	}
	a, err := raid.Open(ctx, drives, o)
	if err != nil {
		b.t.Fatalf("open without %v: %v", missing, err)
	}
	b.adopt(a)
}

// random is blocks that end in their own CRC-32C: a CRC-32C over one is the same whatever else is in it.
func (b *bed) random(blocks int) []byte {
	p := make([]byte, blocks*raid.BlockBytes)
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], b.rng.Uint64())
	}
	for i := raid.BlockBytes; i <= len(p); i += raid.BlockBytes {
		binary.LittleEndian.PutUint32(p[i-4:], crc32.Checksum(p[i-raid.BlockBytes:i-4], crc32.MakeTable(crc32.Castagnoli)))
	}
	return p
}

func (b *bed) blocks() int { return b.geo.K * raid.StripBlocks }

func (b *bed) fill(stripe uint64) {
	b.t.Helper()
	data := b.random(b.blocks())
	b.gen++
	if err := b.a.WriteStripe(ctx, stripe, b.gen, [][]byte{data[:3*raid.BlockBytes], data[3*raid.BlockBytes:]}); err != nil {
		b.t.Fatal(err)
	}
	b.want[stripe] = data
}

func (b *bed) fillAll() {
	for s := range b.geo.Stripes {
		b.fill(s)
	}
}

// prepare makes an update of some blocks, and the stripe's content after it.
func (b *bed) prepare(stripe uint64, blocks ...int) (*raid.Update, []byte) {
	b.t.Helper()
	after := bytes.Clone(b.want[stripe])
	var w []raid.BlockWrite
	for _, n := range blocks {
		d := b.random(1)
		copy(after[n*raid.BlockBytes:], d)
		w = append(w, raid.BlockWrite{Block: n, Data: d})
	}
	b.gen++
	u, err := b.a.PrepareUpdate(ctx, stripe, b.gen, w)
	if err != nil {
		b.t.Fatal(err)
	}
	return u, after
}

func (b *bed) update(stripe uint64, blocks ...int) {
	b.t.Helper()
	u, after := b.prepare(stripe, blocks...)
	if err := b.a.Apply(ctx, u); err != nil {
		b.t.Fatal(err)
	}
	u.Release()
	b.want[stripe] = after
}

// read reads a copy, or what is lent, by turns.
func (b *bed) read(stripe uint64, block, count int) ([]byte, error) {
	p := make([]byte, count*raid.BlockBytes)
	if b.turn.Add(1)%2 != 0 {
		return p, b.a.Read(ctx, stripe, block, [][]byte{p})
	}
	var loan raid.Loan
	defer loan.Return()
	lent, err := b.a.Fetch(ctx, stripe, block, count, nil, &loan)
	if copied := copy(p, bytes.Join(lent, nil)); err == nil && copied != len(p) {
		return p, fmt.Errorf("%d bytes lent, %d asked for", copied, len(p))
	}
	return p, err
}

// check reads a range and compares.
func (b *bed) check(stripe uint64, block, count int) {
	b.t.Helper()
	p, err := b.read(stripe, block, count)
	if err != nil {
		b.t.Fatalf("read stripe %d block %d+%d: %v", stripe, block, count, err)
	}
	if !bytes.Equal(p, b.want[stripe][block*raid.BlockBytes:(block+count)*raid.BlockBytes]) {
		b.t.Fatalf("stripe %d block %d+%d: wrong data", stripe, block, count)
	}
}

func (b *bed) checkAll() {
	b.t.Helper()
	for s := range b.want {
		b.check(s, 0, b.blocks())
	}
}

// scrubClean scrubs every stripe and expects nothing to be wrong.
func (b *bed) scrubClean() {
	b.t.Helper()
	for s := range b.want {
		r, err := b.a.Scrub(ctx, s)
		if err != nil || r.Bad != 0 {
			b.t.Fatalf("scrub stripe %d: %+v, %v", s, r, err)
		}
	}
}

// cold reopens the array, so that no checksum block is in memory.
func (b *bed) cold(missing ...int) {
	b.t.Helper()
	b.a.Close()
	b.open(raid.Options{}, missing...)
}

func wantErr(t testing.TB, err, target error) {
	t.Helper()
	if !errors.Is(err, target) {
		t.Fatalf("error %v, want %v", err, target)
	}
}

const soon = 50 * time.Millisecond
