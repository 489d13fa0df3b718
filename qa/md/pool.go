package md

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/ledge-storage/ledge/firmware/shelf"
	"github.com/ledge-storage/ledge/nvram"
	"github.com/ledge-storage/ledge/nvram/nvramtest"
	"github.com/ledge-storage/ledge/raid"
	"github.com/ledge-storage/ledge/raid/raidtest"
	"github.com/ledge-storage/ledge/target"
)

const (
	poolSlots = 66
	lunBytes  = 16 << 20
	poolLog   = 16 << 20
)

// Pool puts a fault on every strip that one member holds and that changed between two writes of a LUN: its data, its
// parity, and the pool's own map. The pool is opened on that, and the LUN read; scrubbed, and read; a healthy member
// rebuilt before any of it, and read. Each member lies in turn.
func Pool(ctx context.Context, liars ...int) ([]Row, error) {
	p, err := newPool(ctx)
	if err != nil {
		return nil, err
	}
	var rows []Row
	for _, f := range Faults {
		r := Row{f, Right, Right, Right}
		for _, m := range liars {
			set := p.set.Clone()
			if !inflictAll(set.Disks[m], p.old[m], f) {
				return nil, fmt.Errorf("md: member %d: nothing changed on it", m)
			}
			for _, try := range []struct {
				cell *string
				do   func(*opened) error
			}{
				{&r.Read, func(*opened) error { return nil }},
				{&r.Repaired, scrubAll},
				{&r.Rebuilt, func(o *opened) error { return o.array.Rebuild(ctx, (m+1)%members, nil, nil) }},
			} {
				lost := -1
				if try.cell == &r.Rebuilt {
					lost = (m + 1) % members
				}
				if got := p.try(ctx, set.Clone(), lost, try.do); *try.cell == Right {
					*try.cell = got
				}
			}
		}
		rows = append(rows, r)
	}
	return rows, nil
}

// pool is a pool with a LUN that was written twice, and its hardware.
type pool struct {
	set    *raidtest.Set
	old    []map[int64][]byte
	region *nvramtest.Region
	now    []byte
}

func newPool(ctx context.Context) (*pool, error) {
	p := &pool{set: raidtest.NewSet(2, members, raid.DataOffset+poolSlots*raid.SlotBytes), region: nvramtest.NewRegion(poolLog, 512, 1), now: content(5001, lunBytes)}
	array, err := raid.Create(ctx, p.set.Drives("A"), raid.Options{K: data, M: parity, Spares: spares})
	if err != nil {
		return nil, err
	}
	defer array.Close()
	area := nvram.Area{Size: p.region.Size()}
	if err := nvram.Format(p.region, area, nvram.FormatOptions{ID: nvram.NewID(), Epoch: 1}); err != nil {
		return nil, err
	}
	log, err := nvram.Open(ctx, p.region, area, nvram.Options{Epoch: 1})
	if err != nil {
		return nil, err
	}
	defer log.Close()
	sp, err := shelf.CreatePool(ctx, array, log, shelf.Options{MaxLUNs: 8, MaxHosts: 4})
	if err != nil {
		return nil, err
	}
	defer sp.Abort()
	l, err := sp.CreateLUN(ctx, shelf.LUNSpec{Name: "v", Kind: shelf.KindPlain, Bytes: lunBytes, BlockBytes: blockBytes})
	if err != nil {
		return nil, err
	}
	if err := write(ctx, sp, l.Device(), content(5000, lunBytes)); err != nil {
		return nil, err
	}
	for _, d := range p.set.Disks {
		p.old = append(p.old, d.Snapshot())
	}
	// A LUN more changes the pool's records.
	if _, err := sp.CreateLUN(ctx, shelf.LUNSpec{Name: "w", Kind: shelf.KindPlain, Bytes: lunBytes, BlockBytes: blockBytes}); err != nil {
		return nil, err
	}
	return p, write(ctx, sp, l.Device(), p.now)
}

// write writes the LUN from its first byte on, and waits until all of it is on the members.
func write(ctx context.Context, p *shelf.Pool, d target.Device, b []byte) error {
	const piece = 256 << 10
	for at := 0; at < len(b); at += piece {
		if err := d.Write(ctx, uint64(at/blockBytes), [][]byte{b[at : at+piece]}, false); err != nil {
			return err
		}
	}
	return p.Drain(ctx)
}

// inflictAll puts the fault on every slot of the disk that differs from what it was. A misdirected write leaves the
// old strip in its place and lands on the slot behind; where that one changed too, its own write is what stays.
func inflictAll(d *raidtest.Disk, old map[int64][]byte, f Fault) (changed bool) {
	now := d.Snapshot()
	media := maps.Clone(now)
	const first, slotBlocks = raid.DataOffset / blockBytes, 1 + stripBlocks
	var slots []int64
	for slot := range int64(poolSlots) {
		for i := range int64(slotBlocks) {
			if at := first + slot*slotBlocks + i; !bytes.Equal(now[at], old[at]) {
				slots = append(slots, slot)
				break
			}
		}
	}
	for n, slot := range slots {
		at := first + slot*slotBlocks
		from, to := int64(0), int64(slotBlocks)
		switch f {
		case Rot:
			block := at + int64(n*7%slotBlocks) // the checksum block among them
			if now[block] == nil {
				block = at
			}
			media[block] = slices.Clone(now[block])
			for i := range 64 {
				media[block][512+i] ^= 0x5a
			}
			continue
		case Torn:
			if from = slotBlocks / 2; n%2 == 1 {
				from, to = 0, slotBlocks/2
			}
		case Misdirected:
			if slot+1 < poolSlots && !slices.Contains(slots, slot+1) {
				for i := range int64(slotBlocks) {
					media[at+slotBlocks+i] = now[at+i]
				}
			}
		}
		for i := from; i < to; i++ {
			media[at+i] = old[at+i]
		}
	}
	d.Restore(media)
	return len(slots) > 0
}

// opened is the pool's array while it is being tried.
type opened struct {
	ctx   context.Context
	array *raid.Array
}

// try opens everything but a lost member, does something, opens the pool and reads the LUN.
func (p *pool) try(ctx context.Context, set *raidtest.Set, lost int, do func(*opened) error) string {
	drives := set.Drives("A")
	if lost >= 0 {
		drives[lost] = nil
	}
	array, err := raid.Open(ctx, drives, raid.Options{})
	if err != nil {
		return err.Error()
	}
	defer array.Close()
	// The first change of the label records who is absent.
	if err := array.WriteLabel(ctx, func(*raid.Label) {}); err != nil {
		return err.Error()
	}
	if err := do(&opened{ctx, array}); err != nil {
		return err.Error()
	}
	region := nvramtest.NewRegion(poolLog, 512, 1)
	region.Load(p.region.Bytes())
	log, err := nvram.Open(ctx, region, nvram.Area{Size: region.Size()}, nvram.Options{Epoch: 1})
	if err != nil {
		return err.Error()
	}
	defer log.Close()
	sp, err := shelf.OpenPool(ctx, array, log, nil, shelf.Options{})
	if err != nil {
		return err.Error()
	}
	defer sp.Abort()
	l, ok := sp.LUN("v")
	if _, also := sp.LUN("w"); !ok || !also {
		return "a LUN is gone, no error"
	}
	got := make([]byte, lunBytes)
	if err := l.Device().Read(ctx, 0, [][]byte{got}); err != nil {
		return err.Error()
	}
	return verdict(got, p.now, content(5000, lunBytes))
}

// scrubAll scrubs every stripe, twice; the second time nothing may be wrong.
func scrubAll(o *opened) error {
	for again := range 2 {
		for s := range o.array.Geometry().Stripes {
			r, err := o.array.Scrub(o.ctx, s)
			if err != nil {
				return err
			}
			if again == 1 && r.Bad != 0 {
				return fmt.Errorf("stripe %d after a scrub: %+v", s, r)
			}
		}
	}
	return nil
}
