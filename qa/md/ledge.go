package md

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"slices"

	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/raid/layout"
	"github.com/ledge-storage/ledge/raid/raidtest"
)

const (
	// members are 8+2 and one of distributed spare space, as md's ten and a spare drive.
	members = data + parity + 1
	spares  = 1
	slots   = 22
)

// bench is an array whose every stripe was written twice, stopped, and what each member held after the first time.
type bench struct {
	set        *raidtest.Set
	layout     *layout.Layout
	geometry   raid.Geometry
	old        []map[int64][]byte // of each member
	now, first map[uint64][]byte  // of each stripe
}

// content is bytes that no other seed gives. Each block ends in its own CRC-32C, which makes another CRC-32C over it blind.
func content(seed uint64, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), 1}).Read(b)
	for i := raid.BlockBytes; i <= n; i += raid.BlockBytes {
		binary.LittleEndian.PutUint32(b[i-4:], crc32.Checksum(b[i-raid.BlockBytes:i-4], crc32.MakeTable(crc32.Castagnoli)))
	}
	return b
}

// newBench makes the array. Half of the stripes are written the second time by an update of all their columns' blocks
// in part, as destage writes them: a whole stripe and a partial one leave different checksum blocks.
func newBench(ctx context.Context, update bool) (*bench, error) {
	b := &bench{set: raidtest.NewSet(1, members, raid.DataOffset+slots*raid.SlotBytes), now: map[uint64][]byte{}, first: map[uint64][]byte{}}
	a, err := raid.Create(ctx, b.set.Drives("A"), raid.Options{K: data, M: parity, Spares: spares})
	if err != nil {
		return nil, err
	}
	defer a.Close()
	b.geometry = a.Geometry()
	if b.layout, err = layout.New(members, data, parity, spares); err != nil {
		return nil, err
	}
	for s := range b.geometry.Stripes {
		b.first[s] = content(s, stripeBytes)
		if err := a.WriteStripe(ctx, s, 1, [][]byte{b.first[s]}); err != nil {
			return nil, err
		}
	}
	for _, d := range b.set.Disks {
		b.old = append(b.old, d.Snapshot())
	}
	for s := range b.geometry.Stripes {
		b.now[s] = content(1000+s, stripeBytes)
		if !update {
			if err := a.WriteStripe(ctx, s, 2, [][]byte{b.now[s]}); err != nil {
				return nil, err
			}
			continue
		}
		var w []raid.BlockWrite
		for n := range data * stripBlocks {
			w = append(w, raid.BlockWrite{Block: n, Data: b.now[s][n*blockBytes : (n+1)*blockBytes]})
		}
		u, err := a.PrepareUpdate(ctx, s, 2, w)
		if err != nil {
			return nil, err
		}
		err = a.Apply(ctx, u)
		u.Release()
		if err != nil {
			return nil, err
		}
	}
	return b, a.Flush(ctx)
}

// inflict puts the fault on a strip of stripe 0, whose slot begins at a block of the member's media; variant 1 has the
// other half of a torn write, and rots the checksum block instead of data. It returns the stripes touched.
func (b *bench) inflict(set *raidtest.Set, f Fault, strip, variant int) (touched []uint64) {
	m, slot := b.layout.Strip(0, strip)
	disk, old := set.Disks[m], b.old[m]
	media := disk.Snapshot()
	at := raid.DataOffset/blockBytes + int64(slot)*(1+stripBlocks)
	touched = []uint64{0}
	switch f {
	case Rot:
		block := at + 1 + 17
		if variant == 1 {
			block = at
		}
		media[block] = slices.Clone(media[block])
		for i := range 64 {
			media[block][512+i] ^= 0x5a
		}
	case Lost, LostParity:
		for i := range int64(1 + stripBlocks) {
			media[at+i] = old[at+i]
		}
	case Torn:
		from, to := int64(1+stripBlocks/2), int64(1+stripBlocks)
		if variant == 1 {
			from, to = 0, 1+stripBlocks/2
		}
		for i := from; i < to; i++ {
			media[at+i] = old[at+i]
		}
	case Misdirected:
		for i := range int64(1 + stripBlocks) {
			media[at+1+stripBlocks+i] = media[at+i]
			media[at+i] = old[at+i]
		}
		if stripe, strip := b.layout.Locate(m, slot+1); strip >= 0 {
			touched = append(touched, stripe)
		}
	}
	disk.Restore(media)
	return touched
}

// Ledge returns our rows: a cell is Right when it was so for each strip of the stripe, for either variant, and for
// stripes written whole and in part. Else it is what was read the first time that it was not.
func Ledge(ctx context.Context) ([]Row, error) {
	var rows []Row
	for _, f := range Faults {
		rows = append(rows, Row{f, Right, Right, Right})
	}
	for _, update := range []bool{false, true} {
		b, err := newBench(ctx, update)
		if err != nil {
			return nil, err
		}
		for i, f := range Faults {
			from, to := 0, data
			if f == LostParity {
				from, to = data, data+parity
			}
			for strip := from; strip < to; strip++ {
				for variant := range 2 {
					if err := b.row(ctx, &rows[i], strip, variant); err != nil {
						return nil, fmt.Errorf("md: %s on strip %d: %w", f, strip, err)
					}
				}
			}
		}
	}
	return rows, nil
}

// row tries one fault, and notes the cells that are not right.
func (b *bench) row(ctx context.Context, r *Row, strip, variant int) error {
	note := func(cell *string, got string) {
		if *cell == Right {
			*cell = got
		}
	}
	set := b.set.Clone()
	touched := b.inflict(set, r.Fault, strip, variant)
	rebuilt := set.Clone()
	a, err := raid.Open(ctx, set.Drives("A"), raid.Options{})
	if err != nil {
		return err
	}
	defer a.Close()
	note(&r.Read, b.read(ctx, a))

	// The scrub is to find it by itself, so on a copy that nobody has read.
	scrubbed, err := raid.Open(ctx, rebuilt.Clone().Drives("A"), raid.Options{})
	if err != nil {
		return err
	}
	defer scrubbed.Close()
	bad := 0
	for s := range b.geometry.Stripes {
		found, err := scrubbed.Scrub(ctx, s)
		bad += found.Bad
		if err != nil || found.Bad != found.Repaired || found.Bad > 0 && !slices.Contains(touched, s) {
			note(&r.Repaired, fmt.Sprintf("scrub of stripe %d: %+v, %v", s, found, err))
		}
	}
	if bad != len(touched) {
		note(&r.Repaired, fmt.Sprintf("%d strips were bad, %d were found", len(touched), bad))
	}
	note(&r.Repaired, b.read(ctx, scrubbed))
	for s := range b.geometry.Stripes {
		if found, err := scrubbed.Scrub(ctx, s); err != nil || found.Bad != 0 {
			note(&r.Repaired, fmt.Sprintf("second scrub of stripe %d: %+v, %v", s, found, err))
		}
	}

	// A member in order is the next strip's.
	m, _ := b.layout.Strip(0, (strip+1)%(data+parity))
	got, err := b.rebuild(ctx, rebuilt, m)
	note(&r.Rebuilt, got)
	return err
}

// rebuild fails member m, rebuilds it to spare space, and reads.
func (b *bench) rebuild(ctx context.Context, set *raidtest.Set, m int) (string, error) {
	drives := set.Drives("A")
	drives[m] = nil
	a, err := raid.Open(ctx, drives, raid.Options{})
	if err != nil {
		return "", err
	}
	defer a.Close()
	// The first change of the label records who is absent.
	if err := a.WriteLabel(ctx, func(*raid.Label) {}); err != nil {
		return "", err
	}
	if err := a.Rebuild(ctx, m, nil, nil); err != nil {
		return fmt.Sprintf("rebuild: %v", err), nil
	}
	return b.read(ctx, a), nil
}

// read reads everything, and says what it is.
func (b *bench) read(ctx context.Context, a *raid.Array) string {
	got := make([]byte, stripeBytes)
	for s := range b.geometry.Stripes {
		err := a.Read(ctx, s, 0, [][]byte{got})
		switch {
		case errors.Is(err, raid.ErrUnrecoverable):
			return failed
		case err != nil:
			return err.Error()
		}
		for i := 0; i < stripeBytes; i += stripBytes {
			if !bytes.Equal(got[i:i+stripBytes], b.now[s][i:i+stripBytes]) {
				return verdict(got[i:i+stripBytes], b.now[s][i:i+stripBytes], b.first[s][i:i+stripBytes])
			}
		}
	}
	return Right
}
